r"""Pretraining: images a second of the plain loop and of ours, and their losses over the same number of images.

    python -m benchmarks.training_speed --dataset_name uoft-cs/cifar10 --width 64 --batch_size 128 --curve_images 25600
    python -m benchmarks.training_speed --dataset_name uoft-cs/cifar10 --width 128 --batch_size 512 --device cuda

The plain loop is that of diffusers' example of unconditional training: float32, contiguous, images that Pillow opens
and mirrors in worker processes, averaged weights updated every step. Ours is `ddae pretrain`, loader and averaged
weights and all. All start from the same weights and go on in turn, a chunk of steps each; the first chunk warms up and
is not counted.

`--width 128` is the paper's U-Net, 35.7 M parameters, and 64 one of 8.95 M; in its place any `--config` of the DDPM
framework. Options that are not named here go to `ddae pretrain`, and hold for the plain loop too. Writes a JSON file
with every figure, and a picture of the losses beside it.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import yaml

from ddae_hf.checkpoints import build_scheduler
from ddae_hf.commands.parsing import CONFIGS
from ddae_hf.experiments.arrays import write_json
from ddae_hf.experiments.devices import best_device
from ddae_hf.experiments.new_networks import SCHEDULER, new_networks
from ddae_hf.networks import network_of
from ddae_hf.noise import family_of

from . import measure
from .training_ways import IMAGES, WAYS, Process, read_options

DEFAULT_WAYS = {"cpu": ["float32", "bfloat16"], "cuda": ["tf32", "bfloat16", "compiled"]}
POINTS = 40  # of a curve
# What the plain loop does not have, so that it cannot be compared.
LACKING = (
    "augment",
    "class_conditional",
    "latents_dir",
    "streaming",
    "init_from",
    "log_sigma",
    "low_resolution",
    "gradient_checkpointing",
    "resume_from_checkpoint",
)
# Options that the benchmark sets itself.
FIXED = (
    "train_batch_size",
    "total_batch_size",
    "max_train_steps",
    "output_dir",
    "sample_steps",
    "mixed_precision",
    "allow_tf32",
)


def parse_arguments(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Return the benchmark's options, and those that are of `ddae pretrain`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    network = parser.add_mutually_exclusive_group()
    network.add_argument("--width", type=int, help="First channels of the paper's U-Net, which has 128; default 64.")
    network.add_argument("--config", help="Configuration of `ddae pretrain` in place of that U-Net.")
    add = parser.add_argument
    add("--batch_size", type=int, default=128)
    add("--device", choices=["cpu", "cuda"], default=best_device())
    add(
        "--ways",
        nargs="+",
        choices=[w for w in WAYS if w != "plain"],
        help="Ways of ours to time; by default those that suit the device.",
    )
    add("--workers", type=int, default=2, help="Processes that load the plain loop's images.")
    add("--steps", type=int, default=10, help="Steps of a chunk.")
    add("--repeats", type=int, default=5, help="Chunks of each way that are timed, if the curves need no more.")
    add("--curve_images", type=int, default=12800, help="Train each way on at least this many images.")
    add("--output", type=Path, default=Path("runs/benchmarks/pretrain.json"))
    args, rest = parser.parse_known_args(argv)
    for name, least in {"batch_size": 1, "workers": 0, "steps": 1, "repeats": 1, "curve_images": 0}.items():
        if getattr(args, name) < least:
            parser.error(f"--{name} is {getattr(args, name)}: it must be at least {least}.")
    for option in rest:
        if (name := option.partition("=")[0].removeprefix("--").removeprefix("no-")) in FIXED:
            parser.error(f"--{name}: the benchmark chooses it itself; see --batch_size, --steps, --repeats and --ways.")
    args.width = None if args.config else args.width or 64
    if args.width is not None and (args.width < 32 or args.width % 32):
        parser.error(f"--width is {args.width}: it must be a multiple of 32, the number of groups of its norms.")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no such device; give cpu.")
    args.ways = ["plain", *(args.ways or DEFAULT_WAYS[args.device])]
    args.chunks = 1 + max(args.repeats, math.ceil(args.curve_images / (args.batch_size * args.steps)) - 1)
    return args, rest


def shared_options(args: argparse.Namespace, rest: list[str], folder: Path) -> list[str]:
    """Return the options of `ddae pretrain` that all ways share, or stop if the plain loop does not have them."""
    config = args.config
    if config is None:
        config = folder / "network.yaml"
        base = (CONFIGS / "networks" / "unet.yaml").resolve()
        channels = [args.width, *[2 * args.width] * 3]
        described = {"base": str(base), "denoiser": {"block_out_channels": channels}, "random_flip": True}
        config.write_text(yaml.safe_dump(described), encoding="utf-8")
    argv = ["--config", str(config), *rest, "--train_batch_size", str(args.batch_size), "--sample_steps", "0"]
    argv += ["--max_train_steps", str(args.chunks * args.steps), "--output_dir", str(folder)]
    _, options = read_options(argv)
    if found := [f"--{name}" for name in LACKING if getattr(options, name)]:
        raise SystemExit(f"{', '.join(found)}: the plain loop cannot do that; leave it out.")
    if options.gradient_accumulation_steps not in (None, 1):
        raise SystemExit("--gradient_accumulation_steps: the plain loop makes a step of every batch; leave it out.")
    scheduler = build_scheduler({**SCHEDULER, **options.scheduler})
    if family_of(scheduler).name != "ddpm":
        raise SystemExit(f"The plain loop trains under DDPM, not under a {type(scheduler).__name__}: choose another.")
    return argv


def describe_network(argv: list[str]) -> dict[str, float]:
    """Return how large the network is, and what training costs per image: a forward pass, and twice that backwards."""
    try:
        network, _ = new_networks(read_options(argv)[1], IMAGES)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    config = network.config
    if network_of(network).component != "unet" or config.in_channels not in (1, 3):
        raise SystemExit("The plain loop trains a U-Net of grey or RGB images: choose another --config.")
    image = torch.zeros(1, config.in_channels, config.sample_size, config.sample_size)
    forward = measure.gflop(torch.no_grad()(lambda: network(image, 0)))
    return {"parameters": network.num_parameters(), "gflop_forward": forward, "gflop_an_image": 3 * forward}


def train_in_turn(args: argparse.Namespace, argv: list[str]) -> dict[str, dict[str, Any]]:
    """Return the seconds of each way's chunks and the losses of all its steps, the ways taking turns."""
    processes = {name: Process(WAYS[name], argv, args.device, args.workers) for name in args.ways}
    found: dict[str, dict[str, Any]] = {name: {"chunk_seconds": [], "losses": []} for name in processes}
    try:
        for chunk in range(args.chunks):
            for name, process in processes.items():
                seconds, losses = process.steps(args.steps)
                found[name]["chunk_seconds"].append(seconds)
                found[name]["losses"] += losses
            rates = {name: args.steps * args.batch_size / r["chunk_seconds"][-1] for name, r in found.items()}
            said = ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items())
            print(f"chunk {chunk + 1} of {args.chunks}, images/s: {said}", flush=True)
    finally:
        for process in processes.values():
            process.close()
    return found


def compare(
    args: argparse.Namespace, found: dict[str, dict[str, Any]], gflop: float, limits: dict[str, float]
) -> dict[str, dict[str, Any]]:
    """Return each way's images a second, their ratio to the plain loop's, and how its loss differs."""
    rows: dict[str, dict[str, Any]] = {}
    plain = torch.tensor(found["plain"]["losses"], dtype=torch.float64)
    half = len(plain) // 2
    for name, measured in found.items():
        rates = measure.rates(args.steps * args.batch_size, measured["chunk_seconds"][1:])
        losses = torch.tensor(measured["losses"], dtype=torch.float64)
        difference = (losses - plain)[half:]
        computed = gflop * rates["median"]
        rows[name] = {
            "images_per_second": rates,
            "ratio": rates["median"] / rows["plain"]["images_per_second"]["median"] if rows else 1.0,
            "gflops": computed,
            "share_of_matrix_rate": computed / limits["matrix_bfloat16"],
            "share_of_convolution_rate": computed / limits["convolution_bfloat16"],
            "loss_last_half": losses[half:].mean().item(),
            "difference": measure.interval(difference.numpy()),
            **measured,
        }
    return rows


def curve(losses: Sequence[float], batch_size: int) -> tuple[list[float], list[float]]:
    """Return numbers of images seen and the mean losses around them, of at most `POINTS` windows."""
    windows = torch.tensor(losses).tensor_split(min(POINTS, len(losses)))
    ends = torch.tensor([len(window) for window in windows]).cumsum(0)
    middles = [(int(end) - len(window) / 2) * batch_size for end, window in zip(ends, windows, strict=True)]
    return middles, [window.mean().item() for window in windows]


def draw(path: Path, args: argparse.Namespace, rows: dict[str, dict[str, Any]]) -> None:
    """Draw the losses of all ways over the images that they have seen."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for (name, row), style in zip(rows.items(), ("-", "--", "-.", ":"), strict=False):
        axes.plot(*curve(row["losses"], args.batch_size), style, label=WAYS[name].title)
    axes.set(title="Training", xlabel="images seen", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Return the figures as a Markdown table."""
    lines = []
    for name, r in rows.items():
        rate = r["images_per_second"]
        lines.append(
            [
                WAYS[name].title,
                f"{rate['median']:.1f} ({rate['least']:.1f} to {rate['most']:.1f})",
                f"{r['ratio']:.2f}",
                f"{r['gflops']:,.0f}",
                f"{100 * r['share_of_matrix_rate']:.0f} %",
                f"{100 * r['share_of_convolution_rate']:.0f} %",
                f"{r['loss_last_half']:.4f}",
                "" if name == "plain" else measure.signed(r["difference"], 4),
            ]
        )
    columns = ["way", "images/s", "ratio", "GFLOP/s", "of bf16 matrix rate", "of bf16 convolution rate"]
    return measure.table([*columns, "loss, last half", "less plain (95 %)"], lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    args, rest = parse_arguments(argv)
    with tempfile.TemporaryDirectory() as folder:
        options = shared_options(args, rest, Path(folder))
        network = describe_network(options)
        before, found = measure.limits(args.device), train_in_turn(args, options)
        limits = measure.highest(before, measure.limits(args.device))
        rows = compare(args, found, network["gflop_an_image"], limits)
    for row in rows.values():
        row["curve"] = dict(zip(("images", "loss"), curve(row["losses"], args.batch_size), strict=True))
    report = {"options": {**vars(args), "output": str(args.output)}, "pretrain_options": rest, "network": network}
    write_json(args.output, {**report, "facts": measure.facts(args.device), "limits": limits, "ways": rows})
    picture = args.output.with_suffix(".png")
    draw(picture, args, rows)
    images = args.chunks * args.steps * args.batch_size
    print(f"\n{measure.describe_limits(limits)} A network of {network['parameters']:,} parameters, ", end="")
    print(f"{network['gflop_an_image']:.2f} GFLOP an image of training, batches of {args.batch_size}, ", end="")
    print(f"{images:,} images a way:\n\n{table(rows)}\nEvery figure: {args.output}; picture: {picture}.")


if __name__ == "__main__":
    main()
