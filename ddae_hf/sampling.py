"""The second-order sampler of EDM, which diffusers lacks: algorithm 2 of Karras et al. 2022 (arXiv 2206.00364).

Symbols: `sample` is an image with its noise, `x + sigma * n`; `denoise(sample, sigma)` is the network's estimate of
`x`, the paper's `D(x; sigma)`. The probability-flow equation is
`d sample / d sigma = (sample - denoise(sample, sigma)) / sigma`; Heun's method follows it with two estimates of this
slope a step, and so with an error that falls with the square of the step size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


def churn_factor(
    sigma: float, num_steps: int, s_churn: float = 0.0, s_min: float = 0.0, s_max: float = math.inf
) -> float:
    """Return `gamma`, by which a step of the stochastic sampler raises the noise level before it lowers it.

    Args:
        sigma: The step's noise level.
        num_steps: Number of steps.
        s_churn: Overall stochasticity, the paper's S_churn.
        s_min: Lowest level that is raised, S_tmin.
        s_max: Highest level that is raised, S_tmax.
    """
    return min(s_churn / num_steps, math.sqrt(2) - 1) if s_min <= sigma <= s_max else 0.0


def heun_step(
    denoise: Callable[[Tensor, float], Tensor],
    sample: Tensor,
    sigma: float,
    next_sigma: float,
    *,
    gamma: float = 0.0,
    s_noise: float = 1.0,
    generator: Any = None,
) -> Tensor:
    """Take one step from a noise level to the next lower one: two calls of `denoise`, or one where the next is zero.

    Args:
        denoise: Maps (sample, sigma) to the denoised image.
        sample: Noisy image (B, C, H, W), of standard deviation `sigma` around the clean one.
        sigma: Its noise level.
        next_sigma: The noise level to reach.
        gamma: How much noise is added first, see `churn_factor`; 0 for the deterministic sampler.
        s_noise: Standard deviation of that noise in units of what the levels ask for, S_noise.
        generator: Its random generator, or one for every image.

    Returns:
        The sample at `next_sigma`.
    """
    if gamma > 0:
        raised = sigma * (1 + gamma)
        noise = randn_tensor(tuple(sample.shape), generator, sample.device, sample.dtype)
        sample = sample + math.sqrt(raised**2 - sigma**2) * s_noise * noise
        sigma = raised
    slope = (sample - denoise(sample, sigma)) / sigma
    euler = sample + (next_sigma - sigma) * slope
    if next_sigma == 0:
        return euler
    next_slope = (euler - denoise(euler, next_sigma)) / next_sigma
    return sample + (next_sigma - sigma) * (slope + next_slope) / 2
