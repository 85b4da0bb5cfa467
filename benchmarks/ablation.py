"""What every way of training adds to the plain recipe: the same images, networks and steps, other losses.

    python -m benchmarks.ablation --data digits --dataset_name runs/digits --networks unet dit --seeds 0

Every method is trained from the same first weights on the same images, and measured in the same way: a linear probe of
the best layer and noise level (chosen on held-out training images), one with ten labels a class, nearest neighbours of
held-out images, the Frechet distance of samples between features of a classifier that was trained from scratch, and the
time of a step, taken once, in units of the plain recipe's. With several seeds, the other figures are means with
intervals of 95 % (Student's t). What is done is not done again, and a training that was interrupted goes on. Writes
`results.json` and `table.md`.

Methods that align with another network take the plain one of the same data's U-Net, of seed 0, for it: they show what a
second training gains from a first one, not what a large encoder would give.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from ddae_hf.commands.parsing import find_config, read_config
from ddae_hf.experiments import Images, evaluate_generation, finetune, pretrain, sweep
from ddae_hf.experiments.arrays import read_json, write_json, write_text
from ddae_hf.experiments.devices import best_device
from ddae_hf.experiments.evaluation import EvaluationOptions
from ddae_hf.experiments.new_networks import DENOISER
from ddae_hf.experiments.results import PretrainingReport
from ddae_hf.experiments.run_folder import TRAINED
from ddae_hf.experiments.sweeping import SweepOptions
from ddae_hf.hidden_states import layer_names
from ddae_hf.networks import build_denoiser

from . import measure

REPETITIONS = 3  # of timing a step
MEASURED = ("probe", "ten_labels", "neighbours", "distance", "step")
HEADINGS = ["method", "test accuracy (%)", "10 labels a class (%)", "20 nearest neighbours (%)",
            "Frechet distance", "time a step, plain = 1"]  # fmt: skip


class Recipe:
    """A network on a data set, and where its methods act.

    Attributes:
        config: Options of `pretrain`.
        kind: The name of the network's class.
        early: The layer that auxiliary terms act on, a quarter into the network.
        late: The layer of the averaged network that they look at, two thirds into it.
    """

    def __init__(self, config: dict[str, Any]):
        self.config = config
        denoiser = build_denoiser({**DENOISER, **config["denoiser"]})
        layers = layer_names(denoiser)
        self.kind = type(denoiser).__name__
        self.early = layers[len(layers) // 4]
        self.late = layers[2 * len(layers) // 3]


def cifar(denoiser: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return the recipe of `cifar10_minutes` for a smaller network, on whole images."""
    recipe = read_config(find_config("cifar10_minutes"))
    recipe |= {"low_resolution": None, "mixed_precision": None, "max_train_steps": 600, "lr_warmup_steps": 60}
    return recipe | {"ema_decay": 0.99, "denoiser": {"sample_size": 32, **denoiser}, **more}


UNET = {
    "block_out_channels": [32, 64, 96],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
    "norm_num_groups": 8,
    "attention_head_dim": None,
}
SMALLER = {"patch_size": 4, "num_layers": 6, "num_attention_heads": 4, "attention_head_dim": 48}  # a DiT


def recipes() -> dict[tuple[str, str], Recipe]:
    """Return the recipes by data set and network."""
    digits = {"unet": read_config(find_config("digits")), "dit": read_config(find_config("digits_ddpm_dit"))}
    digits["unet"] |= {"max_train_steps": digits["dit"]["max_train_steps"]}
    small = {"unet": cifar(UNET), "dit": cifar({**read_config(find_config("cifar10_flow_dit"))["denoiser"], **SMALLER})}
    known = {"digits": digits, "cifar10": small}
    return {(data, name): Recipe(config) for data, found in known.items() for name, config in found.items()}


def term(kind: str, **options: Any) -> Callable[[Recipe, Path], dict[str, Any]]:
    """Return a method that adds an auxiliary term at the early layer."""
    return lambda recipe, teacher: {"auxiliary": [{"term": kind, "layer": recipe.early, **options}]}


def aligned(**options: Any) -> Callable[[Recipe, Path], dict[str, Any]]:
    """Return a method that aligns the early layer with the best layer of the teacher."""

    def changes(recipe: Recipe, teacher: Path) -> dict[str, Any]:
        best = read_json(teacher / "figures.json")
        where = {"encoder": str(teacher / "trained"), "encoder_layer": best["layer"], "encoder_sigma": best["sigma"]}
        return {"auxiliary": [{"term": "representation_alignment", "layer": recipe.early, **where, **options}]}

    return changes


def self_conditioned(recipe: Recipe, teacher: Path) -> dict[str, Any]:
    """Return the options of a network of which a middle state conditions what follows."""
    return {"denoiser": {**recipe.config["denoiser"], "_class_name": f"SelfConditioned{recipe.kind}"}}


def predicting_images(recipe: Recipe, teacher: Path) -> dict[str, Any]:
    """Return the options of a network that predicts images, with the loss of velocities."""
    scheduler = {**recipe.config["scheduler"], "prediction_type": "sample"}
    return {"scheduler": scheduler, "loss_weighting": "velocity", "log_sigma": [0.8, 0.8]}


METHODS: dict[str, Callable[[Recipe, Path], dict[str, Any]]] = {
    "plain": lambda recipe, teacher: {},
    "dispersive": term("dispersive"),
    "self-alignment": lambda recipe, teacher: term("self_alignment", averaged_layer=recipe.late)(recipe, teacher),
    "self-distillation": term("self_distillation"),
    "alignment": aligned(hidden_size=256),
    "alignment of maps": aligned(projection="convolution", normalise=True, weight=1.0),
    "self-conditioning": self_conditioned,
    "images, velocity loss": predicting_images,
    "min-SNR": lambda recipe, teacher: {"loss_weighting": "min_snr"},
    "levels below 0.5": lambda recipe, teacher: {"sigma_max": 0.5},
    "levels above 0.1": lambda recipe, teacher: {"sigma_min": 0.1},
}


def judge_of(args: argparse.Namespace, images: Images, plain: Path) -> str:
    """Return the extractor of the data set: a classifier of the U-Net, trained from scratch, for all methods."""
    folder = args.output_dir / args.data / "judge"
    if not (folder / "config.json").is_file():
        options = {
            "from_scratch": True,
            "max_train_steps": args.judge_steps,
            "layer": recipes()[args.data, "unet"].late,
        }
        finetune(plain / "trained", images, output_dir=str(folder), **options)
    return f"ddae:{folder}"


def step_seconds(args: argparse.Namespace, images: Images, options: dict[str, Any], path: Path) -> float:
    """Return the seconds of a step that a file holds, measured once: what so many steps add to a training of a few.

    They are the least of `REPETITIONS`. On a processor they are those that it has computed, so that other load counts
    little.
    """
    if not path.is_file():
        few, more = ([timed(images, options, count) for _ in range(REPETITIONS)] for count in (5, 5 + args.timed_steps))
        write_json(path, {"seconds": (min(more) - min(few)) / args.timed_steps})
    return read_json(path)["seconds"]


def timed(images: Images, options: dict[str, Any], steps: int) -> float:
    """Return the seconds of a training of so many steps."""
    clock = time.perf_counter if best_device() == "cuda" else time.process_time
    with tempfile.TemporaryDirectory() as folder:
        started = clock()
        pretrain(images, **{**options, "max_train_steps": steps, "lr_warmup_steps": 1}, output_dir=folder)
        return clock() - started


def run(args: argparse.Namespace, images: Images, network: str, method: str, seed: int) -> dict[str, Any]:
    """Train, probe and sample one network, as far as that is not done, and return its figures."""
    folder = args.output_dir / args.data / network / method.replace(" ", "_").replace(",", "") / str(seed)
    if (folder / "figures.json").is_file():
        return read_json(folder / "figures.json")
    teacher = args.output_dir / args.data / "unet" / "plain" / "0"
    recipe = recipes()[args.data, network]
    options = {**recipe.config, **METHODS[method](recipe, teacher), "seed": seed, "sample_steps": 0}
    if args.max_train_steps:
        options |= {"max_train_steps": args.max_train_steps, "lr_warmup_steps": max(1, args.max_train_steps // 10)}
    print(f"{args.data}, {network}, {method}, seed {seed}", flush=True)
    if not (folder / "trained" / TRAINED).is_file():
        pretrain(images, **options, output_dir=str(folder / "trained"), resume_from_checkpoint="latest")
    trained = PretrainingReport.read(folder / "trained")
    probe = sweep(
        folder / "trained", images, layers=["all"], sigmas=args.sigmas, few_labels=[10], num_draws=10, knn=True,
        num_noise_seeds=1, max_selection_samples=args.max_selection_samples, output_dir=str(folder / "probe"),
    )  # fmt: skip
    samples = evaluate_generation(
        folder / "trained", images, extractor=judge_of(args, images, teacher), num_images=args.num_images,
        num_inference_steps=50, batch_size=100, output_dir=str(folder / "samples"),
        features_dir=str(args.output_dir / args.data / "judged"),
    )  # fmt: skip
    found = {
        "layer": probe.best.layer,
        "sigma": probe.best.sigma,
        "probe": 100 * next(iter(probe.test_accuracies.values())),
        "ten_labels": 100 * float(np.mean(probe.few_label_test_accuracies["10"])),
        "neighbours": 100 * probe.best.knn_20,
        "distance": samples.results["generated"]["frechet_distance"],
        "step": step_seconds(args, images, options, folder.parent / "step.json"),
        "loss": trained.parts_last_100_batches.get("denoising", trained.loss_last_100_batches),
    }
    write_json(folder / "figures.json", found)
    return found


def cell(values: list[float]) -> str:
    """Return a mean, with its 95 % interval where there are several values."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    half = student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{np.mean(values):.2f} ± {half:.2f}"


def table(figures: dict[str, list[dict[str, Any]]]) -> str:
    """Return the figures of one network on one data set as Markdown."""
    plain = figures["plain"][0]["step"]
    rows = []
    for method, runs in figures.items():
        values = {name: [each[name] for each in runs] for name in MEASURED}
        values["step"] = [runs[0]["step"] / plain]
        rows.append([method, *(cell(values[name]) for name in MEASURED)])
    return measure.table(HEADINGS, rows)


def parse_arguments() -> argparse.Namespace:
    """Return the benchmark's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--data", choices=["digits", "cifar10"], required=True, help="Which recipes are trained.")
    add("--dataset_name", required=True, help="The data set: a Hub id or a local folder.")
    add("--networks", nargs="+", choices=["unet", "dit"], default=["unet", "dit"])
    add("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    add("--seeds", nargs="+", type=int, default=[0])
    add("--sigmas", nargs="+", type=float, default=[0.05, 0.14, 0.3], help="Noise levels that are probed.")
    add("--max_train_steps", type=int, help="Steps of a training, in place of the recipe's.")
    add("--timed_steps", type=int, default=30, help="Steps that a step is timed by.")
    add("--judge_steps", type=int, default=400, help="Steps of the classifier that samples are compared by.")
    add("--num_images", type=int, default=1000, help="Samples.")
    add("--max_selection_samples", type=int, default=10000, help="Training images that probes are chosen with.")
    add("--output_dir", type=Path, default=Path("runs/ablation"))
    args = parser.parse_args()
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        parser.error(f"--seeds are {args.seeds}: they must be different, and not negative.")
    for name in ("max_train_steps", "timed_steps", "judge_steps"):
        if (steps := getattr(args, name)) is not None and steps < 1:
            parser.error(f"--{name} is {steps}: give at least 1.")
    try:  # what follows a training is refused before it
        SweepOptions(sigmas=args.sigmas, max_selection_samples=args.max_selection_samples)
        EvaluationOptions(extractor="inception", num_images=args.num_images)
    except ValueError as error:
        parser.error(str(error))
    return args


def main() -> None:
    """Run the benchmark."""
    args = parse_arguments()
    try:
        images = Images.open(args.dataset_name)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error
    run(args, images, "unet", "plain", 0)  # the teacher
    results: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for network in args.networks:
        found = results[network] = {}
        for method in dict.fromkeys(["plain", *args.methods]):
            found[method] = [run(args, images, network, method, seed) for seed in args.seeds]
    write_json(args.output_dir / args.data / "results.json", results)
    tables = "\n\n".join(f"{args.data}, {network}\n\n{table(found)}" for network, found in results.items())
    write_text(args.output_dir / args.data / "table.md", tables + "\n")
    print(tables)


if __name__ == "__main__":
    main()
