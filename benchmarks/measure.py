"""What the benchmarks share: the machine's limits, ways of doing one thing timed in turn, and their table.

A figure is compared only with others of the same run: every way is called once to warm up, then all of them in turn,
so that a machine that slows down slows all. Rates are medians over the rounds, with their extremes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import scipy.stats
import torch
from torch.utils.flop_counter import FlopCounterMode

from ddae_hf.experiments.devices import machine, products_as_before

MATRIX_SIDE = {"cpu": 2048, "cuda": 8192}
CONVOLUTION = {"cpu": (64, 256, 16), "cuda": (512, 256, 16)}  # batch, channels, side of the images
COPIED = 2**28  # bytes
TIMES = {"cpu": 1, "cuda": 20}  # that a convolution and a copy are timed at once


def synchronise(device: str) -> None:
    """Wait for the device to finish."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], Any], device: str) -> float:
    """Return how long a call takes, until the device has finished."""
    synchronise(device)
    started = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - started


def in_turn(calls: dict[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, list[float]]:
    """Return the seconds of each call, `repeats` of them by name, after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            seconds[name].append(seconds_of(call, device))
    return seconds


def median(values: Sequence[float]) -> float:
    """Return the middle value."""
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def rates(amount: float, seconds: Sequence[float]) -> dict[str, float]:
    """Return an amount over seconds: the median, the least and the most."""
    each = sorted(amount / s for s in seconds)
    return {"median": median(each), "least": each[0], "most": each[-1]}


def interval(values: Sequence[float] | np.ndarray) -> dict[str, float | None]:
    """Return the mean of values, and how far its 95 % interval reaches on either side (Student's; of one value, None).

    If each image has a figure such as 100 * (right here - right there), it is that of a paired difference in points.
    """
    each = np.asarray(values, dtype=np.float64)
    if len(each) < 2:
        return {"mean": float(each.mean()), "half_width": None}
    quantile = scipy.stats.t.ppf(0.975, len(each) - 1)
    return {"mean": float(each.mean()), "half_width": float(quantile * each.std(ddof=1) / len(each) ** 0.5)}


def signed(found: dict[str, float | None], digits: int = 2) -> str:
    """Return an `interval` as text."""
    half = found["half_width"]
    return f"{found['mean']:+.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")


def gflop(call: Callable[[], Any]) -> float:
    """Return how many thousand million floating-point operations a call's products and convolutions take."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 1e9


@torch.no_grad()
def limits(device: str, repeats: int = 5) -> dict[str, float]:
    """Return the machine's rates, medians: GFLOP/s of a square matrix product and of a 3x3 convolution, GB/s copied.

    On GPUs float32 is TF32 in both, as torch has it for convolutions, and what is short is timed several times at once.
    """
    times = TIMES[device]
    side, (batch, channels, size) = MATRIX_SIDE[device], CONVOLUTION[device]
    calls: dict[str, Callable[[], Any]] = {}
    amounts: dict[str, float] = {}
    for name, dtype in {"float32": torch.float32, "bfloat16": torch.bfloat16}.items():
        matrix = torch.randn(side, side, device=device).to(dtype)
        images = torch.randn(batch, channels, size, size, device=device).to(dtype)
        images = images.to(memory_format=torch.channels_last)
        convolution = torch.nn.Conv2d(channels, channels, 3, padding=1).to(device, dtype)
        convolution.to(memory_format=torch.channels_last)
        calls[f"matrix_{name}"] = lambda matrix=matrix: matrix @ matrix
        amounts[f"matrix_{name}"] = 2 * side**3 / 1e9
        calls[f"convolution_{name}"] = repeated(partial(convolution, images), times)
        amounts[f"convolution_{name}"] = times * 2 * 9 * channels**2 * batch * size**2 / 1e9
    source = torch.zeros(COPIED // 4, device=device)
    target = torch.empty_like(source)
    calls["copy"] = repeated(partial(target.copy_, source), times)
    amounts["copy"] = times * 2 * COPIED / 1e9  # read and written
    with products_as_before("tf32"):
        seconds = in_turn(calls, repeats, device)
    return {name: rates(amounts[name], each)["median"] for name, each in seconds.items()}


def repeated(call: Callable[[], Any], times: int) -> Callable[[], None]:
    """Return a call that does the same several times."""

    def several() -> None:
        for _ in range(times):
            call()

    return several


def highest(*found: dict[str, float]) -> dict[str, float]:
    """Return the highest of each of the machine's limits, which were measured several times."""
    return {name: max(limits[name] for limits in found) for name in found[0]}


def describe_limits(found: dict[str, float]) -> str:
    """Return the machine's limits in words."""
    kinds = {"matrix": "matrix product", "convolution": "3x3 convolution"}
    lines = [
        f"{title}: {found[f'{kind}_bfloat16']:,.0f} GFLOP/s in bfloat16, {found[f'{kind}_float32']:,.0f} in float32"
        for kind, title in kinds.items()
    ]
    return "Limits measured in this run. " + "; ".join(lines) + f"; memory: {found['copy']:.0f} GB/s."


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines) + "\n"


def facts(device: str) -> dict[str, Any]:
    """Return the machine and the versions, for a JSON of results."""
    return machine(device)


def autocast(device: str, dtype: torch.dtype) -> Any:
    """Return a context of mixed precision, or one that changes nothing for float32."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device, dtype)
