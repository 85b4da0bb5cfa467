"""What the denoising loss counts: how much a noise level weighs, and which levels are drawn.

Every framework's loss is the plain squared error of the network's answer (`diffusion`). A weighting says what the error
of the denoised image is to weigh at a level, and is converted by `Family.image_error`, so that it means the same
whatever the network predicts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ..families import Family

Weighting = Literal["min_snr", "velocity"]
SHORTEST = 0.05  # time by which the error of a velocity is divided at least, as Li and He 2025 have it
LEAST = 1e-3  # share of the training distribution that a cut must leave


def weighting(family: Family, kind: Weighting | None, gamma: float) -> Callable[[Tensor], Tensor] | None:
    """Return the weight (B,) of an answer's squared error as a function of noise levels (B,); None if all are 1.

    - `min_snr`: the denoised image's error weighs `min(1 / sigma^2, gamma)` (Hang et al. 2023, arXiv 2303.09556).
    - `velocity`: it weighs `1 / max(s, 0.05)^2` with the time `s = sigma / (1 + sigma)`, which makes it the error of
      flow matching's velocity. For a network that predicts the image this is the objective of Li and He 2025 (arXiv
      2511.13720), who draw `log_sigma` with mean 0.8 and standard deviation 0.8.
    """
    if kind is None:
        return None

    def weight(sigma: Tensor) -> Tensor:
        if kind == "min_snr":
            return family.image_error(sigma) * sigma.square().reciprocal().clamp(max=gamma)
        time = 1 / (1 + 1 / sigma)
        return family.image_error(sigma) / time.clamp(min=SHORTEST).square()

    return weight


def shares_between(
    family: Family, low: float | None, high: float | None, log_normal: tuple[float, float] | None
) -> tuple[float, float] | None:
    """Return which shares of the training distribution have levels from `low` to `high`; None if neither is given.

    Raises:
        ValueError: Levels of which the distribution has less than a thousandth, or none.
    """
    if low is None and high is None:
        return None

    def levels_below(share: float) -> float:
        drawn = torch.tensor([share], dtype=torch.float32)
        return float(family.usual(drawn) if log_normal is None else family.log_normal(drawn, *log_normal))

    first = 0.0 if low is None else _first(lambda share: levels_below(share) >= low)
    last = 1.0 if high is None else _first(lambda share: levels_below(share) > high)
    if last - first < LEAST:
        raise ValueError(
            f"sigma_min is {low} and sigma_max {high}: {max(0.0, last - first):.2%} of the levels that this framework "
            f"draws lie between them, and it must be {LEAST:.1%} or more. Half of them lie below "
            f"{levels_below(0.5):.3g}."
        )
    return first, last


def _first(holds: Callable[[float], bool]) -> float:
    """Return the smallest share, of float32's 2^24 between 0 and 1, from which on a condition holds; 1 if none."""
    count = 2**24
    below, above = 0, count  # it does not hold at the first, unless that is 0, and is not asked at the last
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (below, middle) if holds(middle / count) else (middle, above)
    return above / count if above > 1 else 0.0
