r"""The paper's way of finding the best layer and noise level against `ddae sweep`: time and best accuracy.

    python -m benchmarks.sweep_speed --model_name_or_path runs/cifar10_cpu --dataset_name uoft-cs/cifar10 \
        --plain_sigmas 0.02 --output_dir runs/benchmarks/sweep

Ours is the command as its user gives it, in bfloat16 unless `--dtype` says otherwise, timed from start to end. The
paper's protocol trains a linear layer per tap for 15 epochs at every noise level: float32, contiguous, images changed
by Pillow in loader workers, fresh noise, a full forward with hooks that all layers share, Adam and a cosine schedule.
`--plain_steps` of its steps are timed and extrapolated to all levels, `--plain_sigmas` are trained whole.

Both choose on the same held-out training images, fit the best pair on all training images, and test it once. All is
done anew for each of `--seeds`. What a seed gave is kept in `--output_dir`: an interrupted run goes on with the next.
Options that are not named here go to `ddae sweep`.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ddae_hf.commands.parsing import parse
from ddae_hf.commands.running import sentences
from ddae_hf.experiments.arrays import write_json
from ddae_hf.experiments.devices import best_device
from ddae_hf.experiments.images import DataOptions, Images, Inputs, labelled_splits
from ddae_hf.experiments.models import open_for, open_processor
from ddae_hf.experiments.options import option
from ddae_hf.experiments.probing import Prober
from ddae_hf.experiments.sweeping import SweepOptions, changed_inputs, check_sweep
from ddae_hf.hidden_states import hidden_size

from .measure import (
    describe_limits,
    facts,
    gflop,
    highest,
    interval,
    limits,
    median,
    signed,
    synchronise,
    table,
)
from .plain_features import PlainFeatures

# Options of the sweep that are this benchmark's to set, with their defaults.
OWN = {"protocol": "logistic_regression", "noise_seed": 0, "num_noise_seeds": 3, "features_dir": None}
PADDING = 4
WARM_UP = 2  # steps that are not timed


@dataclass(kw_only=True)
class Shared(SweepOptions):
    """What both ways are told."""

    model_name_or_path: str = option(help="Checkpoint, folder or Hub id, in any layout.")


def parse_arguments(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str], DataOptions, Shared]:
    """Return the options, those for our sweep as they came, and what the sweep makes of these."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("runs/benchmarks/sweep"), help="Folder of all figures.")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="Seeds of noise, in the paper's protocol of all.")
    add("--plain_steps", type=int, default=20, help="Training steps of the paper's protocol to time for a seed.")
    add("--plain_sigmas", nargs="+", type=float, default=[], help="Noise levels at which that protocol is run whole.")
    add("--batch_norm", action="store_true", help="Put its linear layers behind a batch norm without parameters.")
    add("--workers", type=int, default=2, help="Processes of its loader.")
    args, options = parser.parse_known_args(argv)
    for name, least in {"plain_steps": 1, "workers": 0}.items():
        if getattr(args, name) < least:
            parser.error(f"--{name} is {getattr(args, name)}: it must be at least {least}.")
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        parser.error(f"--seeds are {args.seeds}: they must be different, and not negative.")
    options = ["--dtype", "bfloat16", "--layers", "decoder", *options]
    data, shared = parse([DataOptions, Shared], __doc__, options)
    if taken := [name for name, default in OWN.items() if getattr(shared, name) != default]:
        parser.error(f"{', '.join(taken)}: this benchmark sets that itself, leave it out.")
    return args, options, data, shared


def check_steps(args: argparse.Namespace, shared: Shared, fitted: int) -> None:
    """Stop if a level has too few training steps to time."""
    steps = shared.num_train_epochs * math.ceil(fitted / shared.train_batch_size)
    if args.plain_steps + WARM_UP > steps:
        raise SystemExit(f"--plain_steps is {args.plain_steps}: {steps} steps a level allow {steps - WARM_UP}.")


class ChangedImages(Dataset):
    """Images (N, H, W, C), or (N, H, W) in grey, with their labels: mirrored and cropped at random, if wanted."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, changed: bool):
        self.pixels, self.labels, self.changed = pixels, labels, changed

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return an image (C, H, W) in [-1, 1] and its label."""
        image = Image.fromarray(self.pixels[index])
        if self.changed:
            left, top, mirrored = (int(torch.randint(n, ())) for n in (2 * PADDING + 1, 2 * PADDING + 1, 2))
            image = ImageOps.expand(image, PADDING).crop((left, top, left + image.width, top + image.height))
            image = ImageOps.mirror(image) if mirrored else image
        values = torch.from_numpy(np.array(image, dtype=np.float32)) / 127.5 - 1
        return values.permute(2, 0, 1) if values.ndim == 3 else values[None], int(self.labels[index])


def decoded(inputs: Inputs, split: str) -> np.ndarray:
    """Return images' pixels, uint8 (N, H, W, C) or (N, H, W), in memory as torchvision's CIFAR-10 has them."""
    batches = inputs.batches(250, title=f"decoding {split} images")
    pixels = torch.cat([((batch + 1) * 127.5).round().to(torch.uint8) for batch in batches])
    return pixels.permute(0, 2, 3, 1).squeeze(3).numpy()


class PaperProtocol:
    """Linear layers on features of fresh noise, one per tap, trained together at one noise level."""

    def __init__(self, args: argparse.Namespace, shared: Shared, prober: Prober):
        self.args, self.shared, self.layers, self.device = args, shared, prober.layers, best_device()
        self.features = PlainFeatures(
            shared.model_name_or_path, self.layers, self.device, shared.null_class, shared.cache_dir
        )
        self.pixels = {"train": decoded(prober.train, "train"), "test": decoded(prober.test, "test")}
        self.labels, self.num_classes = prober.labels, len(prober.train.names)

    def batches(self, split: str, rows: np.ndarray, training: bool) -> DataLoader:
        """Return the batches of the images at `rows`."""
        return DataLoader(
            ChangedImages(self.pixels[split][rows], self.labels[split][rows], training),
            batch_size=self.shared.train_batch_size,
            shuffle=training,
            num_workers=self.args.workers,
            persistent_workers=training and self.args.workers > 0,
            pin_memory=self.device == "cuda",
        )

    def heads(self) -> nn.ModuleList:
        """Return new linear layers."""

        def head(layer: str) -> nn.Module:
            width = hidden_size(self.features.denoiser, layer)
            norm = nn.BatchNorm1d(width, affine=False) if self.args.batch_norm else nn.Identity()
            return nn.Sequential(norm, nn.Linear(width, self.num_classes))

        return nn.ModuleList(head(layer) for layer in self.layers).to(self.device)

    def logits(self, heads: nn.ModuleList, images: Tensor, sigma: float) -> list[Tensor]:
        """Return every layer's logits (B, K) of images under fresh noise."""
        images = images.to(self.device, non_blocking=True)
        timestep = self.features.nearest_timestep(sigma)
        found = self.features(images, torch.randn_like(images), timestep)
        return [head(found[layer]) for head, layer in zip(heads, self.layers, strict=True)]

    def train(self, rows: np.ndarray, sigma: float) -> Iterator[nn.ModuleList]:
        """Train on the images at `rows`, and yield the linear layers after every step."""
        heads, loader, epochs = self.heads(), self.batches("train", rows, training=True), self.shared.num_train_epochs
        optimizer = torch.optim.Adam(heads.parameters(), lr=self.shared.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
        for images, labels in itertools.chain.from_iterable(itertools.repeat(loader, epochs)):
            labels = labels.to(self.device, non_blocking=True)
            loss = sum(F.cross_entropy(logits, labels) for logits in self.logits(heads, images, sigma))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            yield heads

    @torch.no_grad()
    def predict(self, heads: nn.ModuleList, split: str, rows: np.ndarray, sigma: float) -> dict[str, np.ndarray]:
        """Return the classes (N,) of the images at `rows`, by layer name."""
        heads.eval()
        found = []
        for images, _ in self.batches(split, rows, training=False):
            found.append(torch.stack([x.argmax(1) for x in self.logits(heads, images, sigma)]).cpu())
        return dict(zip(self.layers, torch.cat(found, 1).numpy(), strict=True))


def time_steps(protocol: PaperProtocol, rows: np.ndarray, sigma: float, seed: int) -> float:
    """Return the mean seconds of a training step, of some in a row."""
    torch.manual_seed(seed)
    steps, count = protocol.train(rows, sigma), protocol.args.plain_steps
    collections.deque(itertools.islice(steps, WARM_UP), maxlen=0)
    synchronise(protocol.device)
    started = time.perf_counter()
    collections.deque(itertools.islice(steps, count), maxlen=0)
    synchronise(protocol.device)
    seconds = (time.perf_counter() - started) / count
    steps.close()  # this also stops the loader's workers
    return seconds


def run_whole(protocol: PaperProtocol, prober: Prober, seed: int) -> dict[str, Any]:
    """Run the paper's protocol at some levels, and return its figures and the test images' classes."""
    torch.manual_seed(seed)
    labels, pairs, seconds = prober.labels, [], []
    for sigma in protocol.args.plain_sigmas:
        started = time.perf_counter()
        (heads,) = collections.deque(protocol.train(prober.fitted, sigma), maxlen=1)
        synchronise(protocol.device)
        seconds.append(time.perf_counter() - started)
        for layer, classes in protocol.predict(heads, "train", prober.held_out, sigma).items():
            accuracy = float((classes == labels["train"][prober.held_out]).mean())
            pairs.append({"layer": layer, "sigma": sigma, "validation_accuracy": accuracy})
    best = max(pairs, key=lambda pair: pair["validation_accuracy"])
    every = {split: np.arange(len(values)) for split, values in labels.items()}
    (heads,) = collections.deque(protocol.train(every["train"], best["sigma"]), maxlen=1)
    predicted = protocol.predict(heads, "test", every["test"], best["sigma"])[best["layer"]]
    return {
        "pairs": pairs,
        "best": best,
        "level_seconds": seconds,
        "predicted": predicted.tolist(),
        "test_accuracy": float((predicted == labels["test"]).mean()),
    }


def run_ours(folder: Path, options: list[str], seed: int) -> dict[str, Any]:
    """Run our sweep as its user does, and return its figures and the test images' classes."""
    shutil.rmtree(folder, ignore_errors=True)  # an interrupted run left it, and this one is timed from its start
    own = ["--num_noise_seeds", "1", "--noise_seed", str(seed), "--output_dir", str(folder)]
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "ddae_hf", "sweep", *options, *own], check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"ddae sweep ended with {done.returncode}: its message is above.")
    report = json.loads((folder / "eval_results.json").read_text(encoding="utf-8"))
    return {
        "seconds": seconds,
        "levels_seconds": report["seconds"]["levels"],
        "pairs": report["pairs"],
        "best": report["best"],
        "predicted": np.load(folder / "test_predictions.npy").tolist(),
        "test_accuracy": report["test_accuracies"][str(seed)],
    }


def run_seed(args: argparse.Namespace, options: list[str], prober: Prober, protocol: PaperProtocol, seed: int) -> Any:
    """Run both with a seed, or return what they gave before."""
    path = args.output_dir / f"seed-{seed}.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    found = {"limits": limits(protocol.device)}
    found |= {"ours": run_ours(args.output_dir / f"ours-{seed}", options, seed)}
    found |= {"step_seconds": time_steps(protocol, prober.fitted, prober.options.sigmas[0], seed)}
    found |= {"plain": run_whole(protocol, prober, seed) if args.plain_sigmas else None}
    write_json(path, found)
    return found


def summarise(seeds: dict[int, Any], prober: Prober, protocol: PaperProtocol) -> dict[str, Any]:
    """Return the figures of all seeds together."""
    shared, labels = prober.options, prober.labels["test"]
    steps = [math.ceil(n / shared.train_batch_size) for n in (len(prober.fitted), len(prober.labels["train"]))]
    per_level, last = (shared.num_train_epochs * n for n in steps)
    image = torch.zeros(1, *prober.model.config.sample_shape, device=protocol.device)
    cost = gflop(partial(protocol.features, image, image, 0))
    passed = len(shared.sigmas) * len(prober.rows) * shared.num_views * prober.model.config.num_noise_samples
    each = []
    for seed, found in seeds.items():
        ours, step, plain = found["ours"], found["step_seconds"], found["plain"]
        row = {"seed": seed, "best": ours["best"], "test_accuracy": ours["test_accuracy"]}
        row |= {"plain_levels": step * per_level * len(shared.sigmas)}
        row |= {"plain_in_all": row["plain_levels"] + step * last}
        row |= {"ours_levels": ours["levels_seconds"], "ours_in_all": ours["seconds"]}
        row |= {f"ratio_{part}": row[f"plain_{part}"] / row[f"ours_{part}"] for part in ("levels", "in_all")}
        row |= {"plain_gflop_per_second": shared.train_batch_size * cost / step}
        row |= {"ours_gflop_per_second": passed * cost / ours["levels_seconds"]}
        if plain:
            right = [np.array(way["predicted"]) == labels for way in (ours, plain)]
            row["gain"] = interval(100 * (right[0].astype(float) - right[1]))
        each.append(row)
    gains = [row["gain"]["mean"] for row in each if "gain" in row]
    return {
        "gflop_per_image": cost,
        "steps_per_level": per_level,
        "steps_of_the_last_fit": last,
        "timesteps": {str(sigma): protocol.features.nearest_timestep(sigma) for sigma in shared.sigmas},
        "images": {"fitted": len(prober.fitted), "held_out": len(prober.held_out), "test": len(labels)},
        "seeds": each,
        "gain": interval(gains) if gains else None,
    }


def time_table(found: dict[str, Any], limit: dict[str, float], ours: str) -> str:
    """Return the seconds of both as text: medians over the seeds, with their extremes."""

    def spread(name: str) -> str:
        values = [row[name] for row in found["seeds"]]
        extremes = f" ({min(values):,.1f} to {max(values):,.1f})" if len(values) > 1 else ""
        return f"{median(values):,.1f}{extremes}"

    rows = [
        [title, spread(f"plain_{part}"), spread(f"ours_{part}"), spread(f"ratio_{part}")]
        for part, title in {"in_all": "in all", "levels": "of the levels"}.items()
    ]
    speed = {way: median([row[f"{way}_gflop_per_second"] for row in found["seeds"]]) for way in ("plain", "ours")}
    kinds = {"plain": "float32", "ours": ours}
    shares = {way: f"{value:,.0f}, {100 * value / limit[f'matrix_{kinds[way]}']:.0f} %" for way, value in speed.items()}
    rows.append(["GFLOP/s in forward passes, share of the matrix rate", shares["plain"], shares["ours"], ""])
    return table(["seconds", "the paper's protocol, extrapolated", f"ours, {ours}", "ratio"], rows)


def accuracy_table(found: dict[str, Any], seeds: dict[int, Any]) -> str:
    """Return the best pairs and their test accuracies as text."""

    def pair(way: dict[str, Any] | None) -> list[str]:
        if way is None:
            return ["", ""]
        return [f"`{way['best']['layer']}`, {way['best']['sigma']:g}", f"{100 * way['test_accuracy']:.2f}"]

    rows = []
    for row in found["seeds"]:
        gain = [signed(row["gain"]) if "gain" in row else ""]
        rows.append([row["seed"], *pair(seeds[row["seed"]]["plain"]), *pair(seeds[row["seed"]]["ours"]), *gain])
    columns = ["seed", "the paper's best pair", "test accuracy", "our best pair", "test accuracy", "gain in points"]
    return table(columns, rows)


def report(args: argparse.Namespace, prober: Prober, results: dict[str, Any], seeds: dict[int, Any]) -> str:
    """Return what was found, as text."""
    found, shared = results["summary"], prober.options
    levels, images = len(shared.sigmas), found["images"]
    parts = [
        f"{len(prober.layers)} layers x {levels} noise levels, {images['fitted']:,} images fitted and "
        f"{images['held_out']:,} chosen on; {results['device']}, {results['threads']} thread(s).\n",
        time_table(found, results["limits"], shared.dtype),
        f"The paper's: {args.plain_steps} training steps timed per seed, times {found['steps_per_level']:,} a level "
        f"({shared.num_train_epochs} epochs), times {levels} levels, and {found['steps_of_the_last_fit']:,} to fit the "
        "best pair on all images;\nits predictions are left out. Ours: the whole command, its start included.\n",
    ]
    for seed, each in seeds.items():
        if each["plain"]:
            seconds = ", ".join(f"{s:,.1f}" for s in each["plain"]["level_seconds"])
            step = each["step_seconds"] * found["steps_per_level"]
            parts.append(
                f"Seed {seed}: levels trained whole took {seconds} s, the timed steps say {step:,.1f} a level."
            )
    parts.append(f"\n{accuracy_table(found, seeds)}")
    if found["gain"]:
        which = ", ".join(f"{sigma:g}" for sigma in args.plain_sigmas)
        over_seeds = f" Over {len(seeds)} seeds: {signed(found['gain'])}." if len(seeds) > 1 else ""
        parts.append(
            f"The paper's at sigma {which}, ours at all levels. Gains on the same {images['test']:,} test images, with "
            f"95 % intervals.{over_seeds}"
        )
    return "\n".join([*parts, describe_limits(results["limits"])])


def begin(args: argparse.Namespace, options: list[str]) -> None:
    """Note the options in the output folder, or stop if it holds figures of other options."""
    path = args.output_dir / "options.json"
    named = {name: value for name, value in vars(args).items() if name not in ("output_dir", "seeds")}
    known = {**named, "sweep": options}
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != known:
        raise SystemExit(f"{args.output_dir} holds figures of other options: give another --output_dir.")
    write_json(path, known)


def open_prober(shared: Shared, images: Images) -> Prober:
    """Return what our sweep would probe, or raise `ValueError` where it cannot."""
    processor = open_processor(shared.model_name_or_path, shared.cache_dir)
    inputs = [changed_inputs(part, processor, shared) for part in labelled_splits(images, shared)]
    prober = check_sweep(open_for(shared.model_name_or_path, shared), *inputs, processor, shared)
    if prober.model.config.vae is not None:
        raise ValueError(f"{shared.model_name_or_path} works on latents: this benchmark is for denoisers of pixels.")
    return prober


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    args, options, data, shared = parse_arguments(argv)
    with sentences():
        prober = open_prober(shared, data.open(shared.cache_dir))
        protocol = PaperProtocol(args, shared, prober)
        for sigma in args.plain_sigmas:  # refused now, if they are outside the schedule
            protocol.features.nearest_timestep(sigma)
    check_steps(args, shared, len(prober.fitted))
    begin(args, options)
    seeds = {seed: run_seed(args, options, prober, protocol, seed) for seed in args.seeds}
    device = best_device()
    found = highest(*(seed["limits"] for seed in seeds.values()))
    results = {"options": {**vars(args), "output_dir": str(args.output_dir), "sweep": options}, "device": device}
    results |= {**facts(device), "limits": found, "summary": summarise(seeds, prober, protocol)}
    write_json(args.output_dir / "results.json", results)
    print(report(args, prober, results, seeds))
    print(f"Every figure is in {args.output_dir}.")


if __name__ == "__main__":
    main()
