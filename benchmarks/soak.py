"""An hour of small experiments in one process: whether memory, open files or threads grow.

    python -m benchmarks.soak --minutes 60

A round pretrains a tiny network on digits, resumes it, sweeps it and samples from it. After every round the process's
resident memory and its numbers of open files and threads are noted. A line is fitted to the second half of the rounds,
when all that is kept once is there: where memory grows by more than `MEMORY` a round, or files or threads by more than
`HANDLES` over that half, the program ends with status 1. Writes `soak.json` and `soak.png`.

A network that is kept takes 2.8 MiB a round, and the features of one layer 0.1 MiB or more. Not ours to mend: of every
tensor that it reads, safetensors 0.7 to 0.9 keeps two small objects, 57 bytes, which is 0.06 MiB a round.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from ddae_hf.experiments import Images, generate, pretrain, sweep
from ddae_hf.experiments.arrays import write_json
from ddae_hf.experiments.devices import machine
from ddae_hf.experiments.digits import digits, write_digits
from ddae_hf.experiments.plots import Picture, save_picture

from .measure import table

MEMORY = 0.1  # MiB a round
HANDLES = 1.0  # files or threads over the second half
LEAST = 4  # rounds in the second half that a line can be fitted to
TINY = {
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "sample_size": 8,
}
TITLES = {"mib": "resident memory (MiB)", "files": "open files", "threads": "threads"}


@dataclass(frozen=True)
class Sample:
    """What the process holds after a round."""

    seconds: float  # since the first round began
    mib: float  # of resident memory
    files: int  # that are open, sockets and pipes among them
    threads: int


@dataclass(frozen=True)
class Growth:
    """By how much something grows over the second half of the rounds, and by how much it may."""

    what: str
    mean: float
    growth: float
    allowed: float

    @property
    def too_much(self) -> bool:
        """Whether it grows by more than it may."""
        return self.growth > self.allowed


def sample(started: float) -> Sample:
    """Return what this process holds now, as Linux tells it."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    memory = int(status["VmRSS"].split()[0]) / 1024
    files = len(os.listdir("/proc/self/fd")) - 1  # without the one that lists them
    return Sample(time.monotonic() - started, memory, files, int(status["Threads"]))


def one_round(data: Path, folder: Path, number: int) -> None:
    """Pretrain a tiny network, resume it, sweep it and sample from it, in a new folder."""
    options: dict[str, Any] = {"denoiser": TINY, "total_batch_size": 32, "lr_warmup_steps": 2, "seed": number}
    options |= {"output_dir": str(folder / "run"), "checkpointing_steps": 4, "grid_images": 4, "sample_steps": 4}
    options |= {"num_inference_steps": 4}
    pretrain(Images.open(data), max_train_steps=4, **options)
    pretrain(Images.open(data), max_train_steps=8, resume_from_checkpoint="latest", **options)
    found = sweep(
        folder / "run", Images.open(data), layers=["decoder"], sigmas=[0.1, 0.5], max_train_samples=200,
        max_test_samples=100, num_noise_seeds=1, l2=[1e-3], output_dir=str(folder / "sweep"),
    )  # fmt: skip
    assert found is not None
    generate(folder / "run", num_images=8, num_inference_steps=4, output_dir=str(folder / "images"))


def soak(minutes: float) -> list[Sample]:
    """Do rounds for so many minutes, and return what the process held after each of them."""
    found: list[Sample] = []
    with tempfile.TemporaryDirectory(prefix="ddae_hf_soak_") as temporary:
        data = Path(temporary, "digits")
        write_digits(data, digits())
        started = time.monotonic()
        while time.monotonic() - started < 60 * minutes:
            folder = Path(temporary, "round")
            one_round(data, folder, len(found))
            shutil.rmtree(folder)
            found.append(sample(started))
            print(f"round {len(found)}: {asdict(found[-1])}", flush=True)
    return found


def growths(samples: Sequence[Sample]) -> list[Growth]:
    """Return by how much memory, files and threads grow over the second half of the rounds, by a line fitted to it.

    Raises:
        ValueError: The second half has too few rounds.
    """
    half = samples[len(samples) // 2 :]
    if len(half) < LEAST:
        raise ValueError(f"{len(half)} rounds came in the second half, and {LEAST} are needed: give more minutes.")
    rounds = np.arange(len(half))
    found = []
    for name, title in TITLES.items():
        values = np.array([float(getattr(each, name)) for each in half])
        slope = float(np.polyfit(rounds, values, 1)[0])
        allowed = MEMORY * (len(half) - 1) if name == "mib" else HANDLES
        found.append(Growth(title, float(values.mean()), slope * (len(half) - 1), allowed))
    return found


def picture(samples: Sequence[Sample]) -> Figure:
    """Return a picture of memory, files and threads over time; the second half is what growth is judged by."""
    figure = Picture(figsize=(8, 7), layout="constrained")
    minutes = [each.seconds / 60 for each in samples]
    for axes, (name, title) in zip(figure.subplots(len(TITLES), sharex=True), TITLES.items(), strict=True):
        values = [getattr(each, name) for each in samples]
        axes.plot(minutes, values, marker=".", linewidth=1)
        axes.axvspan(minutes[len(minutes) // 2], minutes[-1], alpha=0.1)
        axes.set_ylabel(title)
        axes.set_ylim(0, 1.1 * max(values))
        axes.grid(alpha=0.3)
    axes.set_xlabel("minutes")
    figure.suptitle(f"{len(samples)} rounds of pretraining, resuming, sweeping and sampling in one process")
    return figure


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="How long to go on.")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/soak"), help="Folder of soak.json and soak.png.")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)  # tiny networks gain nothing from more
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # where progress bars go
        samples = soak(options.minutes)
    try:
        found = growths(samples)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    report = {"growth": [asdict(each) for each in found], "samples": [asdict(each) for each in samples]}
    write_json(options.output_dir / "soak.json", report | machine("cpu"))
    save_picture(picture(samples), options.output_dir / "soak.png", dpi=110)
    rows = [(it.what, f"{it.mean:.1f}", f"{it.growth:+.2f}", f"{it.allowed:.2f}") for it in found]
    print(table(["", "mean", f"growth over the last {(len(samples) + 1) // 2:,} rounds", "allowed"], rows))
    if grown := [each.what for each in found if each.too_much]:
        raise SystemExit(f"These grow by more than they may: {', '.join(grown)}. See {options.output_dir}/soak.png.")


if __name__ == "__main__":
    main()
