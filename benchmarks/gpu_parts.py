r"""Parts of `gpu_campaign` that no other benchmark measures, each in a process of its own.

    python -m benchmarks.gpu_parts host --checkpoint runs/gpu_campaign/checkpoint --dataset_name path/to/cifar10

- `host`: what a pass over images needs besides the network: pixels, draws of noise, features on disk, the solver. The
  slowest of them is the most that features can reach.
- `layouts`: features and training of the paper's U-Net channels-last and contiguous, compiled and not.
- `sampling`: diffusers' pipeline against ours, as `benchmarks.sample` times them.
- `steps`: the seconds of a training step of `--config`, on small and on whole images.

All but `steps` write rows of images a second, with their ratio to the first row and, where there is one, their share of
the measured rate of matrix products in the row's type.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddae_hf import DDAEImageProcessor, DDAEModel
from ddae_hf.experiments.arrays import fill, write_json
from ddae_hf.experiments.devices import best_device, made_fast
from ddae_hf.experiments.draws import indexed_noise
from ddae_hf.experiments.features import extract_features
from ddae_hf.experiments.images import DataOptions, ImageInputs
from ddae_hf.experiments.logistic_regression import fit_logistic_regression
from ddae_hf.hidden_states import decoder_layer_names, hidden_size

from . import levers, measure, sample
from .training_ways import WAYS, Process, read_options

Row = dict[str, Any]
NOTHING: list[str] = []
SIGMA, STRENGTHS = 0.05, [1e-5, 1e-4, 1e-3, 1e-2]  # of the features and the probes of `host`
WIDTH = {True: 32, False: 128}  # of the U-Net of `layouts`, tiny and not
IMAGES = {True: 200, False: 20_000}  # that `host` reads, draws for, writes features of and solves
BATCH = {True: 50, False: 1000}  # of features
TIMED = {True: 4, False: 50}  # steps, of which there are as many at either resolution


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("part", choices=list(PARTS))
    add("--checkpoint", help="A DDPM U-Net, of host and sampling.")
    add("--dataset_name", help="Images, of host and steps: a local folder or a Hub id.")
    add("--config", default="cifar10_speedrun", help="Configuration of `ddae pretrain`, of steps.")
    add("--device", choices=["cpu", "cuda"], default=best_device())
    add("--tiny", action="store_true", help="Few images, small networks, nothing compiled: to try it out.")
    add("--output", type=Path, default=Path("runs/benchmarks/gpu_part.json"))
    args, args.rest = parser.parse_known_args(argv)
    needed = {"host": ["checkpoint", "dataset_name"], "sampling": ["checkpoint"], "steps": ["dataset_name"]}
    for name in needed.get(args.part, NOTHING):
        if getattr(args, name) is None:
            parser.error(f"{args.part} needs --{name}.")
    if args.rest and args.part != "steps":
        parser.error(f"{' '.join(args.rest)}: only steps takes options of `ddae pretrain`.")
    return args


def row(what: str, rate: dict[str, float], first: dict[str, float], share: float | None = None) -> Row:
    """Return a row: images a second, their ratio to the first row's, and their share of the matrix rate."""
    return {"what": what, "images_per_second": rate, "ratio": rate["median"] / first["median"], "share": share}


def timed(calls: dict[str, Callable[[], Any]], count: int, repeats: int, device: str) -> dict[str, dict[str, float]]:
    """Return images a second of calls that take `count` images each, in turn."""
    return {name: measure.rates(count, each) for name, each in measure.in_turn(calls, repeats, device).items()}


def open_inputs(args: argparse.Namespace) -> ImageInputs:
    """Return the images of the training split as the checkpoint's network reads them."""
    images = DataOptions(dataset_name=args.dataset_name).open()["train"].take(IMAGES[args.tiny])
    return ImageInputs(images, DDAEImageProcessor.from_pretrained(args.checkpoint))


def host(args: argparse.Namespace) -> list[Row]:
    """Measure what a pass needs besides the network, then the pass in memory, on the layers of the decoder."""
    device, repeats = args.device, 1 if args.tiny else 3
    model = DDAEModel.from_pretrained(args.checkpoint, dtype=torch.bfloat16)
    model = made_fast(model.to(device), device)
    layers = decoder_layer_names(model.denoiser)
    widths = {layer: (hidden_size(model.denoiser, layer),) for layer in layers}
    inputs = open_inputs(args)
    count, size = len(inputs), BATCH[args.tiny]

    def read() -> None:
        for _ in inputs.batches(size, device=device):
            pass

    def draw(draws: int) -> None:
        for first in range(0, count, size):
            shape = (draws, *model.config.sample_shape)
            indexed_noise(shape, range(first, min(first + size, count)), device=device)

    started = time.perf_counter()
    read()
    decoded = measure.rates(count, [time.perf_counter() - started])
    calls: dict[str, Callable[[], Any]] = {
        "pixels read once more, and on the device": read,
        "one draw of noise": partial(draw, 1),
        "four draws of noise": partial(draw, 4),
        f"features of {len(layers)} layers written to disk": partial(write, widths, count, size, device),
        f"probes of {len(layers)} layers solved, {len(STRENGTHS)} strengths": solving(widths, count, device),
        f"the whole pass in memory, {len(layers)} layers, bfloat16": lambda: extract_features(
            model, inputs.batches(size, device=device), layers, SIGMA
        ),
    }
    found = {"pixels decoded the first time": decoded, **timed(calls, count, repeats, device)}
    slowest = list(found.values())[-1]
    return [row(name, rate, slowest) for name, rate in found.items()]


def write(widths: dict[str, tuple[int]], count: int, size: int, device: str) -> None:
    """Write features of `count` images to a temporary folder, as a sweep does."""

    def batches(start: int, names: list[str]) -> Iterator[dict[str, Tensor]]:
        for first in range(start, count, size):
            yield {name: torch.zeros(min(size, count - first), *widths[name], device=device) for name in names}

    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder), widths, count, batches)


def solving(widths: dict[str, tuple[int]], count: int, device: str) -> Callable[[], Any]:
    """Return a call that fits probes on random features of ten classes, which a little of each feature tells."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (count,), generator=generator)
    features = {}
    for name, (width,) in widths.items():
        means = 0.3 * torch.randn(10, width, generator=generator)
        features[name] = [(torch.randn(count, width, generator=generator) + means[labels]).numpy()]
    return lambda: fit_logistic_regression(features, labels.numpy(), STRENGTHS, num_classes=10, device=device)


def layouts(args: argparse.Namespace) -> list[Row]:
    """Measure features and training steps in both layouts, compiled and not."""
    device, repeats = args.device, 1 if args.tiny else 5
    network = levers.paper_unet(WIDTH[args.tiny])
    image = torch.zeros(1, 3, 32, 32)
    whole = measure.gflop(torch.no_grad()(lambda: network(image, 0)))
    up_to = measure.gflop(levers.feature_pass(network, "cpu", 1, dtype=torch.float32))
    limit = measure.limits(device, repeats)["matrix_bfloat16"]
    jobs = {"features": (levers.feature_pass, 512, up_to), "a training step": (levers.training_step, 256, 3 * whole)}
    rows = []
    for job, (make, size, cost) in jobs.items():
        size = 4 if args.tiny else size
        calls = {}
        for compiled in (False,) if args.tiny else (False, True):
            for layout, name in levers.LAYOUTS.items():
                what = f"{job}, bfloat16, batches of {size}, {name}{', compiled' if compiled else ''}"
                calls[what] = make(network, device, size, layout=layout, compiled=compiled)
        found = timed(calls, size, repeats, device)
        first = next(iter(found.values()))
        rows += [row(what, rate, first, rate["median"] * cost / limit) for what, rate in found.items()]
    return rows


def sampling(args: argparse.Namespace) -> list[Row]:
    """Measure diffusers' pipeline and ours at ten calls of the network an image."""
    sizes = [4] if args.tiny else [256, 512, 1024]
    given = {"batch_sizes": sizes, "repeats": 1 if args.tiny else 3, "speed_calls": 2 if args.tiny else 10}
    options = sample.Arguments(model_name_or_path=args.checkpoint, device=args.device, **given)
    speed = sample.measure_speed(options, sample.open_ways(options), measure.limits(args.device))
    return [
        row(f"{way}, batches of {r['batch_size']}", r["images_per_second"],
            speed["plain"]["images_per_second"], r["share_of_matrix_rate"])
        for way, r in speed.items()
    ]  # fmt: skip


def steps(args: argparse.Namespace) -> dict[str, float]:
    """Return the seconds of a step on small images and on whole ones, after compiling, and what follows for a run.

    So few images are taken that all are decoded before the first step that counts.
    """
    count = TIMED[args.tiny]
    shared = ["--config", args.config, "--dataset_name", args.dataset_name, "--sample_steps", "0", *args.rest]
    _, options = read_options([*shared, "--output_dir", "."])
    share = options.low_resolution_share if options.low_resolution else 0.0
    found: dict[str, float] = {"share": share}
    with tempfile.TemporaryDirectory() as folder:
        words = [*shared, "--output_dir", folder, "--max_train_steps", str(1000 * count)]
        words += ["--max_train_samples", str(count // 2 * options.sizes.total)]
        if share:  # two parts of the steps are on small images: one until all is decoded and compiled, and one timed
            words += ["--low_resolution_share", "0.002"]
        process = Process(WAYS["configured" if args.tiny else "compiled"], words, args.device, 0)
        for name in ("low", "high") if share else ("high",):
            process.steps(count)
            found[name] = process.steps(count)[0] / count
        process.close()
    found["mean"] = share * found.get("low", 0.0) + (1 - share) * found["high"]
    return found | {"batch": options.sizes.total}


PARTS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "host": host, "layouts": layouts, "sampling": sampling, "steps": steps,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Measure one part."""
    args = parse_arguments(argv)
    found = PARTS[args.part](args)
    content = found if args.part == "steps" else {"rows": found}
    write_json(args.output, {"part": args.part, "facts": measure.facts(args.device), **content})
    print(f"Every figure is in {args.output}.")


if __name__ == "__main__":
    main()
