r"""Accuracy of a linear probe after so many minutes of training from scratch: our recipe against the paper's.

    python -m benchmarks.quality_per_minute --dataset_name uoft-cs/cifar10 --minutes 20 --seeds 0 1 2

Ours is `ddae pretrain` with `--config`, by default `cifar10_minutes`. The paper's is its DDPM on the same network:
dropout 0.1, Adam, batches of 128, constant rate after a warm-up, averaged weights, in the plain loop of
`training_speed`, float32; what it says in epochs is scaled to the steps that fit into the minutes: a warm-up of 13
epochs of 2000, and an average over 10,000 of 194,000 steps. Its learning rate is the best of `--learning_rates` on
held-out training images, with the first seed.

How many steps fit is measured first, in a short run of each recipe; the minutes that a run then took are reported. A
checkpoint is probed by `ddae sweep`: layer and noise level are chosen on held-out training images, and tested once; for
the first seed after every quarter of the training, for the others at the end. Options that are not named here go to the
sweep. What is done is not done again: an interrupted benchmark goes on. Both recipes run on `--device`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import yaml

from ddae_hf.commands.parsing import find_config, parse, read_config
from ddae_hf.experiments.arrays import write_json
from ddae_hf.experiments.devices import best_device
from ddae_hf.experiments.images import DataOptions
from ddae_hf.experiments.run_folder import PROGRESS
from ddae_hf.experiments.sweeping import SweepOptions

from . import measure
from .training_ways import WAYS, Plain, Process, read_options

QUARTERS = 4
STEP_SECONDS = "step_seconds.json"
WARM_UP, CHUNK, TIMED_SHARE = 5, 5, 0.05  # to find out how many steps fit, some are timed for a share of the minutes
# Shares of the paper's training, 2000 epochs of 97 steps: its warm-up, and the reach of its average.
PAPER_WARM_UP, PAPER_REACH = 13 / 2000, 10_000 / 194_000
PAPER = {
    "scheduler": {"_class_name": "DDPMScheduler", "beta_start": 1e-4, "beta_end": 0.02},
    "total_batch_size": 128,
    "random_flip": True,
    "lr_scheduler": "constant_with_warmup",
}


def parse_arguments(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Return the benchmark's options, and those of the sweep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--dataset_name", required=True, help="Hub id, or a local folder.")
    add("--config", default="cifar10_minutes", help="Our recipe: a configuration of `ddae pretrain`.")
    add("--minutes", type=float, default=20.0, help="Training time of a run.")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--learning_rates", nargs="+", type=float, default=[2e-4, 5e-4, 1e-3], help="The plain recipe's to try.")
    add("--search_minutes", type=float, help="Training time of the runs that choose it; by default --minutes.")
    add("--workers", type=int, default=0, help="Processes that load the plain recipe's images.")
    add("--device", choices=["cpu", "cuda"], default=best_device(), help="Where both recipes train and are probed.")
    add("--output_dir", type=Path, default=Path("runs/benchmarks/quality_per_minute"))
    args, rest = parser.parse_known_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no such device; give cpu.")
    args.search_minutes = args.search_minutes or args.minutes
    if min(args.minutes, args.search_minutes) <= 0:
        parser.error(f"--minutes {args.minutes}, --search_minutes {args.search_minutes}: they must be positive.")
    if min(args.learning_rates) <= 0:
        parser.error(f"--learning_rates are {args.learning_rates}: they must be positive.")
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        parser.error(f"--seeds are {args.seeds}: they must be different, and not negative.")
    _, sweep = parse([DataOptions, SweepOptions], None, [*sweep_options(args), *rest])
    if sweep.features_dir is not None:
        parser.error("--features_dir: this benchmark sets that itself, leave it out.")
    return args, rest


def sweep_options(args: argparse.Namespace) -> list[str]:
    """Return the options of every probe, besides those that the benchmark was given for them."""
    options = ["--dataset_name", args.dataset_name, "--dtype", "bfloat16", "--num_noise_seeds", "1"]
    return [*options, "--layers", "decoder"]


def begin(args: argparse.Namespace, rest: list[str]) -> None:
    """Note the options that runs depend on in the output folder, or stop if it holds runs of other options."""
    path = args.output_dir / "options.json"
    known = {"config": read_config(find_config(args.config)), "dataset_name": args.dataset_name, "sweep": rest}
    known |= {"device": args.device}
    begun = path.exists() and (args.output_dir / STEP_SECONDS).exists()  # the first that a run writes
    if begun and json.loads(path.read_text(encoding="utf-8")) != known:
        other = "another --config, data set, sweep or --device"
        raise SystemExit(f"{args.output_dir} holds runs of {other}: give another folder.")
    write_json(path, known)


def recipe_options(args: argparse.Namespace, plain: bool, folder: Path) -> list[str]:
    """Return the options of `ddae pretrain` that describe a recipe."""
    config = args.config
    if plain:
        denoiser = {**read_config(find_config(args.config))["denoiser"], "dropout": 0.1}
        config = folder / "paper.yaml"
        folder.mkdir(parents=True, exist_ok=True)
        config.write_text(yaml.safe_dump({**PAPER, "denoiser": denoiser}), encoding="utf-8")
    return ["--config", str(config), "--dataset_name", args.dataset_name, "--sample_steps", "0"]


def step_seconds(args: argparse.Namespace) -> dict[str, float]:
    """Return the seconds of a step of each recipe, and keep them for later calls."""
    path = args.output_dir / STEP_SECONDS
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    _, ours = read_options([*recipe_options(args, False, args.output_dir), "--output_dir", "."])
    low = ours.low_resolution_share if ours.low_resolution else 0.0
    kinds = [("plain", "plain", 1.0, 0), ("ours", "configured", low, 1), ("ours", "configured", 1 - low, 0)]
    found = {"plain": 0.0, "ours": 0.0}
    for name, way, share, low_share in kinds:
        if not share:
            continue
        with tempfile.TemporaryDirectory() as folder:
            options = [*recipe_options(args, name == "plain", Path(folder)), "--output_dir", folder]
            options += ["--max_train_steps", "10000", "--low_resolution_share", str(low_share)]
            process = Process(WAYS[way], options, args.device, args.workers)
            process.steps(WARM_UP)
            seconds: list[float] = []
            while sum(seconds) < 60 * args.minutes * TIMED_SHARE:
                seconds.append(process.steps(CHUNK)[0])
            process.close()
        found[name] += share * sum(seconds) / (CHUNK * len(seconds))
    write_json(path, found)
    return found


def run_command(args: argparse.Namespace, name: str, options: list[str]) -> None:
    """Run a command of `ddae` on the device that the benchmark was told."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if args.device == "cpu" else {}
    subprocess.run([sys.executable, "-m", "ddae_hf", name, *options], check=True, env={**os.environ, **hidden})


@dataclass
class Run:
    """A training of one recipe, for some minutes, and what its probes found."""

    name: str
    seed: int
    minutes: float
    rate: float | None = None  # the plain recipe's

    def folder(self, args: argparse.Namespace) -> Path:
        """Return where it is."""
        rate = "" if self.rate is None else f"-{self.rate:g}"
        return args.output_dir / f"{self.name}{rate}-{self.minutes:g}min-seed{self.seed}"

    def train(self, args: argparse.Namespace, seconds: dict[str, float]) -> None:
        """Train, unless that is done already."""
        folder = self.folder(args)
        if (folder / "train_results.json").exists():
            return
        steps = max(1, int(self.minutes * 60 / seconds[self.name] / QUARTERS)) * QUARTERS
        options = [*recipe_options(args, self.name == "plain", args.output_dir), "--output_dir", str(folder)]
        options += ["--seed", str(self.seed), "--max_train_steps", str(steps)]
        options += ["--checkpointing_steps", str(steps // QUARTERS), "--checkpoints_total_limit", str(QUARTERS)]
        if self.name == "ours":
            options += ["--resume_from_checkpoint", "latest"]
            run_command(args, "pretrain", options)
            return
        decay = 1 - 1 / max(2, PAPER_REACH * steps)
        options += ["--learning_rate", str(self.rate), "--ema_decay", str(decay), "--lr_warmup_steps"]
        options += [str(round(PAPER_WARM_UP * steps))]
        Plain(*read_options(options), args.device, args.workers).train(folder)

    def probe(self, args: argparse.Namespace, rest: list[str], quarters: range) -> dict[str, Any]:
        """Probe the ends of some quarters of the training, and return accuracies and the minutes that they took."""
        folder = self.folder(args)
        results = json.loads((folder / "train_results.json").read_text(encoding="utf-8"))
        found: dict[str, Any] = {"seed": self.seed, "images": results["images"], "points": []}
        for quarter in quarters:
            output = folder / "probes" / str(quarter)
            checkpoint = folder / f"checkpoint-{quarter * results['steps'] // QUARTERS}"
            if not (output / "eval_results.json").exists():
                options = [*sweep_options(args), *rest]
                options += ["--model_name_or_path", str(checkpoint), "--output_dir", str(output)]
                run_command(args, "sweep", options)
                shutil.rmtree(output / "features")
            report = json.loads((output / "eval_results.json").read_text(encoding="utf-8"))
            progress = json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8"))
            point = {"minutes": progress["seconds"] / 60, **report["best"]}
            found["points"].append(point | {"test_accuracy": next(iter(report["test_accuracies"].values()))})
        labels = np.load(output / "test_labels.npy")
        found["correct"] = (np.load(output / "test_predictions.npy") == labels).astype(int)
        return found


def compare(ours: list[dict[str, Any]], plain: list[dict[str, Any]]) -> dict[str, Any]:
    """Return ours less plain on the same test images, in points, by seed, with 95 % intervals over images and seeds."""
    gains = 100.0 * np.array([np.subtract(a["correct"], b["correct"]) for a, b in zip(ours, plain, strict=True)])
    over = {"images": measure.interval(gains.mean(0)), "seeds": measure.interval(gains.mean(1))}
    return {"by_seed": gains.mean(1).tolist(), "over": over}


def draw(path: Path, found: dict[str, list[dict[str, Any]]]) -> None:
    """Draw accuracy over minutes: a line through the first seed's quarters, and a point at the end of every seed."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, runs in found.items():
        minutes, scores = zip(*[(p["minutes"], 100 * p["test_accuracy"]) for p in runs[0]["points"]], strict=True)
        (line,) = axes.plot(minutes, scores, label=name)
        for run in runs:
            end = run["points"][-1]
            axes.plot(end["minutes"], 100 * end["test_accuracy"], "o", color=line.get_color())
    axes.set(xlabel="minutes of training", ylabel="linear probe, test accuracy (%)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def summary(found: dict[str, list[dict[str, Any]]]) -> str:
    """Return the accuracies as a Markdown table."""
    rows = []
    for name, runs in found.items():
        scores = np.array([100 * run["points"][-1]["test_accuracy"] for run in runs])
        first = ", ".join(f"{p['minutes']:.1f}: {100 * p['test_accuracy']:.2f}" for p in runs[0]["points"])
        minutes = ", ".join(f"{run['points'][-1]['minutes']:.1f}" for run in runs)
        spread = f" ({scores.std(ddof=1):.2f})" if len(scores) > 1 else ""
        each = ", ".join(f"{score:.2f}" for score in scores)
        rows.append([name, minutes, f"{runs[0]['images']:,}", first, each, f"{scores.mean():.2f}{spread}"])
    columns = ["recipe", "minutes", "images", "first seed, after minutes", "test accuracy by seed", "mean (deviation)"]
    return measure.table(columns, rows)


def choose_rate(args: argparse.Namespace, rest: list[str], seconds: dict[str, float]) -> tuple[float, dict[str, float]]:
    """Return the plain recipe's best learning rate, and the accuracy of each on held-out training images."""
    tried = {}
    for rate in args.learning_rates:
        run = Run("plain", args.seeds[0], args.search_minutes, rate)
        run.train(args, seconds)
        (point,) = run.probe(args, rest, range(QUARTERS, QUARTERS + 1))["points"]
        tried[rate] = point["validation_accuracy"]
    return max(tried, key=tried.__getitem__), {str(rate): accuracy for rate, accuracy in tried.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    args, rest = parse_arguments(argv)
    begin(args, rest)
    seconds = step_seconds(args)
    best, tried = choose_rate(args, rest, seconds)
    rates = {"ours": None, "plain": best}
    runs = [Run(name, seed, args.minutes, rate) for seed in args.seeds for name, rate in rates.items()]
    for run in runs:
        run.train(args, seconds)
        run.probe(args, rest, range(QUARTERS, QUARTERS + 1))
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in rates}
    for run in runs:
        first = 1 if run.seed == args.seeds[0] else QUARTERS
        found[run.name].append(run.probe(args, rest, range(first, QUARTERS + 1)))
    gain = compare(found["ours"], found["plain"])
    for result in (result for results in found.values() for result in results):
        del result["correct"]
    report = {"options": {**vars(args), "output_dir": str(args.output_dir)}, "sweep_options": rest}
    report |= {"step_seconds": seconds, "learning_rates": tried, "learning_rate": best, "runs": found}
    report |= {"gain": gain, "facts": measure.facts(args.device)}
    write_json(args.output_dir / "results.json", report)
    draw(args.output_dir / "quality_per_minute.png", found)
    scores = ", ".join(f"{rate}: {100 * accuracy:.2f}" for rate, accuracy in tried.items())
    print(f"\nThe plain recipe's learning rates, after {args.search_minutes:g} minutes on held-out images: {scores}.\n")
    print(summary(found))
    images, seeds = (measure.signed(gain["over"][kind]) for kind in ("images", "seeds"))
    print(f"Gain on the same test images, with 95 % intervals: {images} points over images, {seeds} over seeds.")
    print(f"Every figure is in {args.output_dir}.")


if __name__ == "__main__":
    main()
