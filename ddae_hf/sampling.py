"""Sampling as generators that yield after every step: a scheduler's own steps, and EDM's second-order sampler.

diffusers lacks the latter, algorithm 2 of Karras et al. 2022 (arXiv 2206.00364). Symbols: `sample` is an image with its
noise, `x + sigma * n`; `denoise(sample, sigma)` is the network's estimate of `x`, the paper's `D(x; sigma)`. The
probability-flow equation is `d sample / d sigma = (sample - denoise(sample, sigma)) / sigma`. Heun's method follows it
with two estimates of this slope for each step, so that its error falls with the square of the step size.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .families import Family


@dataclass
class Step:
    """The state after a step.

    `sample` holds noisy images or latents (B, C, H, W), as the scheduler keeps them; after the last step it holds the
    generated ones. Whoever consumes the steps may replace it, and the next step goes on from what it then holds.
    """

    number: int  # the step, from 1
    timesteps: Tensor  # the scheduler's timesteps, of all steps, on the device of `sample`
    sample: Tensor
    sigma: float | None = None  # the noise level of `sample`, where it is `x + sigma * n` and not scaled otherwise

    @property
    def timestep(self) -> Tensor:
        """The timestep of this step, without dimensions."""
        return self.timesteps[self.number - 1]

    @property
    def following(self) -> Tensor | None:
        """The timestep of the next step, without dimensions; None after the last."""
        return self.timesteps[self.number] if self.number < len(self.timesteps) else None

    def obey(self, outputs: Any) -> None:
        """Replace the sample by the one that a callback wants: `"latents"` in the dictionary that it returned."""
        if not isinstance(outputs, dict):
            raise ValueError(f"callback_on_step_end returned {outputs!r}: it must return a dictionary, even if empty.")
        self.sample = outputs.get("latents", self.sample)


@torch.no_grad()
def scheduler_steps(
    family: Family, noise: Tensor, predict: Callable[[Tensor, Tensor], Tensor], generator: Any = None
) -> Iterator[Step]:
    """Take the steps of a scheduler, whose timesteps are set, from standard-normal noise to images.

    `predict` gives the network's answer to (input, timestep (B,)), with a learned variance if the scheduler uses one.
    `generator` is for schedulers that add noise: one generator, or a list with one for each image.
    """
    timesteps = family.scheduler.timesteps.to(noise.device)  # once: the scheduler reads its own on the host
    sample = family.first_sample(noise)
    for i, timestep in enumerate(family.scheduler.timesteps):
        answer = predict(family.model_input(sample, timestep), timesteps[i].expand(len(sample)))
        step = Step(i + 1, timesteps, family.step(answer, timestep, sample, generator))
        yield step
        sample = step.sample


@dataclass(frozen=True)
class Heun:
    """EDM's second-order sampler; `ValueError` for a number out of its range."""

    s_churn: float = 0.0  # the paper's S_churn: by how much noise a step raises the level before it lowers it
    s_min: float = 0.0  # the lowest level that is raised, S_tmin
    s_max: float = math.inf  # the highest level that is raised, S_tmax
    s_noise: float = 1.0  # the standard deviation of the added noise in units of what the levels ask for, S_noise
    clip_denoised: bool = False  # whether the denoised image is clipped to [-1, 1]

    def __post_init__(self) -> None:
        for name in ("s_churn", "s_min", "s_noise"):
            check_number(name, getattr(self, name), least=0)
        check_number("s_max", self.s_max, least=self.s_min, finite=False)

    @torch.no_grad()
    def steps(
        self,
        sigmas: Sequence[float],
        timesteps: Tensor,
        noise: Tensor,
        denoise: Callable[[Tensor, float], Tensor],
        generator: Any = None,
    ) -> Iterator[Step]:
        """Take steps from standard-normal noise to images, with two calls of `denoise` in each step except the last.

        `sigmas` fall to zero, `timesteps` are what the denoiser is fed at all but the last of them, and `denoise` maps
        (sample, sigma) to the denoised image.
        """

        def slope(sample: Tensor, sigma: float) -> Tensor:
            clean = denoise(sample, sigma)
            return (sample - (clean.clamp(-1, 1) if self.clip_denoised else clean)) / sigma

        factor = min(self.s_churn / len(timesteps), math.sqrt(2) - 1)
        sample = noise * sigmas[0]
        for i, (sigma, lower) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
            if factor > 0 and self.s_min <= sigma <= self.s_max:
                raised = sigma * (1 + factor)
                added = randn_tensor(tuple(sample.shape), generator, sample.device, sample.dtype)
                sample = sample + math.sqrt(raised**2 - sigma**2) * self.s_noise * added
                sigma = raised
            first = slope(sample, sigma)
            euler = sample + (lower - sigma) * first
            step = Step(i + 1, timesteps, euler, lower)
            if lower > 0:
                step.sample = sample + (lower - sigma) * (first + slope(euler, lower)) / 2
            yield step
            sample = step.sample


def check_count(name: str, value: Any) -> None:
    """Raise `ValueError` unless an argument is a whole number of at least 1."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}: it must be a whole number of at least 1.")


def check_number(name: str, value: Any, least: float = -math.inf, finite: bool = True) -> None:
    """Raise `ValueError` unless an argument is a number, in its range."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (is_number and value >= least and (math.isfinite(value) or not finite)):
        kind = "a finite number" if finite else "a number"
        bound = "" if least == -math.inf else f" of at least {least}"
        raise ValueError(f"{name} is {value!r}: it must be {kind}{bound}.")


def count_images(batch_size: int | None, **several: Any) -> int:
    """Return how many images a call is for, or raise `ValueError`: tensors and lists in `several` must agree."""
    if batch_size is not None:
        check_count("batch_size", batch_size)
    counts = {name: np.shape(value)[0] for name, value in several.items() if np.shape(value)}
    counts |= {} if batch_size is None else {"batch_size": batch_size}
    if len(set(counts.values())) > 1 or 0 in counts.values():
        came = ", ".join(f"{name} says {count}" for name, count in sorted(counts.items()))
        raise ValueError(
            f"How many images to make is not clear: {came}. Give lists with one entry for each image, or one label and "
            "one generator for all."
        )
    return next(iter(counts.values()), 1)


def initial_noise(shape: tuple[int, ...], generator: Any, latents: Tensor | None, device: Any) -> Tensor:
    """Return standard-normal noise, float32 (B, C, H, W): drawn, or `latents`; `ValueError` if they cannot be it."""
    if latents is None:
        return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
    if tuple(latents.shape) != shape:
        raise ValueError(f"`latents` has shape {tuple(latents.shape)}: it must be standard-normal noise {shape}.")
    if not (latents.is_floating_point() and latents.isfinite().all()):
        raise ValueError("`latents` holds NaN, infinity or whole numbers: it must be standard-normal noise.")
    return latents.to(device, torch.float32)
