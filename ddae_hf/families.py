"""`Family`: what a family of schedulers has to define. The families that exist, and the symbols, are in `noise.py`."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .generators import Generator, normal_quantile, uniform

_UNITS = {
    "sigma": "standard deviation of the noise on images in [-1, 1], or on scaled latents",
    "timestep": "as the denoiser is fed it",
}
# How far beyond an end a level may be, relative to the end: ends are printed and written down with five digits.
_ROUNDING = 5e-5
_ENDLESS = "of 300 digits or more"


def _inside(value: Any, low: Any, high: Any) -> Any:
    """Whether a number, or each number of a tensor, is in the range, to five digits."""
    return (low - _ROUNDING * abs(low) <= value) & (value <= high + _ROUNDING * abs(high))


def _is_float(value: Any) -> bool:
    """Whether a number is not a whole one that no float can hold."""
    return not 2**1023 <= abs(value) < math.inf


def rounded(level: Tensor, low: Any, high: Any) -> Tensor:
    """Move levels that are in the range to five digits exactly into it, and turn all others into NaN."""
    return torch.where(_inside(level, low, high), level.clamp(low, high), torch.nan)


def is_recorded() -> bool:
    """Whether a graph is being recorded, or fake tensors may be in use."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or is_in_torch_dispatch_mode()


def readable(values: Tensor) -> bool:
    """Whether values can be read: without waiting for a device, and while no graph is being recorded."""
    return values.device.type == "cpu" and not is_recorded()


def has_float64(device: torch.device) -> bool:
    """Return whether a device computes in float64, which Apple's GPUs do not."""
    return device.type != "mps"


def exactly(values: Tensor) -> Tensor:
    """Return values in float64, or in float32 on a device that has no float64."""
    return values.double() if has_float64(values.device) else values.float()


def in_batch(values: Tensor, count: int, device: Any) -> Tensor:
    """Return a tensor, () or (1,) with one number for all images or (count,), as a tensor (count,) on a device.

    One number that the host holds is written there by the device, as a copy would wait for it.
    """
    if values.device != torch.device(device) and readable(values) and values.numel() == 1 and not values.requires_grad:
        return torch.full((count,), values.item(), dtype=values.dtype, device=device)
    return values.to(device).expand(count)


class Family(ABC):
    """A family of schedulers: what it knows of noise levels, of the network's input and target, and of sampling.

    Everything else follows from its attributes and abstract methods. Tensors of levels are float32, and finite or
    infinite as the ranges say. Neither the `add_noise` nor the current grid of its `scheduler` plays a part.
    """

    name: str  # of the framework
    title: str  # of the framework in a sentence
    schedulers: tuple[str, ...] = ()  # the names of its schedulers' classes
    default_scheduler: str  # the one that new networks are trained under
    own_samplers: dict[str, str] = {}  # samplers that are not the scheduler's own, and the scheduler that each needs
    predictions: tuple[str, ...]  # the values of the schedulers' `prediction_type`; the first where they have none
    whole_timesteps = False  # whether timesteps are numbers of rows, which a learned embedding can look up

    def __init__(self, scheduler: Any):
        self.scheduler = scheduler

    @property
    def _prediction(self) -> str:
        return self.scheduler.config.get("prediction_type", self.predictions[0])

    @classmethod
    def takes(cls, scheduler: Any) -> bool:
        """Whether the scheduler is of this family."""
        return type(scheduler).__name__ in cls.schedulers

    @classmethod
    def allowed(cls) -> str:
        """Return its schedulers, as an error message lists them."""
        return f"{cls.title}'s ({', '.join(cls.schedulers or [cls.default_scheduler])})"

    @abstractmethod
    def sigma_range(self) -> tuple[float, float]:
        """Return the smallest and the largest sigma that sampling may ask for."""

    @abstractmethod
    def timestep_range(self) -> tuple[float, float]:
        """Return the smallest and the largest timestep that sampling may ask for."""

    def training_range(self, unit: str) -> tuple[float, float]:
        """Return the ends of all levels that a network may be trained at, `"sigma"` or `"timestep"`."""
        return self.sigma_range() if unit == "sigma" else self.timestep_range()

    @abstractmethod
    def to_sigma(self, timestep: Tensor) -> Tensor:
        """Convert timesteps (float32, any shape), NaN for those outside `training_range`; see `rounded`."""

    @abstractmethod
    def to_timestep(self, sigma: Tensor) -> Tensor:
        """Convert noise levels (float32, any shape), NaN for those outside `training_range`; see `rounded`."""

    @abstractmethod
    def input_shares(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Return `a` and `b`, of the shape of `sigma`: the network sees `a * x + b * n`. `b` is `a * sigma`."""

    @abstractmethod
    def target_shares(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Return `c` and `d`, of the shape of `sigma`: the network should answer `c * x + d * n`, see `prediction`."""

    @abstractmethod
    def usual(self, share: Tensor) -> Tensor:
        """Return the levels (B,) below which these shares (B,) of the family's own training distribution are.

        Shares are between 0 and 1: where they are drawn uniformly, the levels are those of training.
        """

    def trainable(self, sigma: Tensor) -> Tensor:
        """Turn log-normal draws into levels that the family has."""
        return sigma

    def check_prediction(self) -> None:
        """Refuse a `prediction_type` of the scheduler that cannot work."""
        if self._prediction not in self.predictions:
            raise ValueError(
                f"prediction_type {self._prediction!r} is not supported with {type(self.scheduler).__name__}: allowed "
                f"are {', '.join(self.predictions)}."
            )

    @property
    def prediction(self) -> str:
        """What the denoiser predicts, in the words of its scheduler's config; one that cannot work is refused.

        `epsilon` (the noise), `sample` (the clean image) or `v_prediction` for VP; `epsilon` for EDM's own output, and
        `v_prediction` for its negative; `velocity` for flow matching.
        """
        self.check_prediction()
        return self._prediction

    def check_level(self, unit: str, value: Any, allowed: tuple[float, float] | None = None) -> None:
        """Raise `ValueError` for a noise level outside a range, to five digits, and for NaN.

        Python scalars are always checked, also in a compiled graph, where they are constants; other values are checked
        only where they are `readable`. `unit` is `"sigma"` or `"timestep"`, and `allowed` is the range, by default that
        of all levels that a network of the family may be trained at.
        """
        is_number = isinstance(value, int | float)
        values = value if is_number else torch.as_tensor(value)
        if not is_number and not readable(values):
            return
        low, high = self.training_range(unit) if allowed is None else allowed
        if is_number:
            # The compiler can print a changing scalar in no other format.
            wrong = None if _inside(values, low, high) else f"{float(values)!r}" if _is_float(values) else _ENDLESS
        else:
            # In float64, because bfloat16 takes 1000 for 999; unwrapped, because `torch.func.vmap` hides its batch.
            values = torch.func.debug_unwrap(values).double()
            outside = values[~_inside(values, low, high)]
            wrong = f"{outside[0].item():.7g}" if len(outside) else None
        if math.isnan(low + high):
            raise ValueError(f"The scheduler's {unit} is from {low} to {high}: give it betas between 0 and 1.")
        if wrong is not None:
            raise ValueError(
                f"{unit} {wrong} is outside the schedule of {type(self.scheduler).__name__}: allowed are {low:.5g} to "
                f"{high:.5g} ({_UNITS[unit]})."
            )

    def check_sigma(self, sigma: Any) -> None:
        """Refuse a `sigma`, or several, at which a sampler would not evaluate a network (to five digits)."""
        self.check_level("sigma", sigma, self.sigma_range())

    def check_timestep(self, timestep: Any) -> None:
        """Refuse a `timestep`, or several, at which a sampler would not evaluate a network (to five digits)."""
        self.check_level("timestep", timestep, self.timestep_range())

    def level_of(self, sigma: Any, timestep: Any, default: Any, allowed: tuple[float, float]) -> Any:
        """Return the noise level that is asked for by either of its names, or by none, checked where it can be.

        `allowed` is the range of `sigma`, as numbers.
        """
        if sigma is not None and timestep is not None:
            raise ValueError("Both sigma and timestep came: pass one of them.")
        if timestep is not None:
            self.check_timestep(timestep)
            return self.sigma(timestep)
        sigma = default if sigma is None else sigma
        self.check_level("sigma", sigma, allowed)
        return sigma

    def sigma(self, timestep: float | Tensor) -> Tensor:
        """Convert what the denoiser is fed into a noise level: see `timestep_to_sigma`."""
        self.check_level("timestep", timestep)
        return self.to_sigma(torch.as_tensor(timestep, dtype=torch.float32))

    def timestep(self, sigma: float | Tensor) -> Tensor:
        """Convert a noise level into what the denoiser is fed: see `sigma_to_timestep`."""
        self.check_level("sigma", sigma)
        return self.to_timestep(torch.as_tensor(sigma, dtype=torch.float32))

    def _level(self, sigma: float | Tensor, images: Tensor) -> Tensor:
        """Return `sigma`, checked where it can be, as a float32 tensor (B, 1, ...) that broadcasts over the images."""
        self.check_level("sigma", sigma)
        level = torch.as_tensor(sigma, dtype=torch.float32)
        count = images.shape[0]
        if level.ndim > 1 or (level.ndim == 1 and level.shape[0] not in (count, 1)):
            raise ValueError(
                f"sigma has shape {tuple(level.shape)} for {count} images: pass a scalar, or one sigma for each image."
            )
        return in_batch(level, count, images.device).reshape(-1, *[1] * (images.ndim - 1))

    def _fed(self, sigma: float | Tensor, images: Tensor) -> Tensor:
        """Return the timestep (B,) of a `sigma` that was checked."""
        timestep = self.to_timestep(torch.as_tensor(sigma, dtype=torch.float32))
        return in_batch(timestep, images.shape[0], images.device)

    def noisy(self, clean: Tensor, noise: Tensor, sigma: float | Tensor) -> tuple[Tensor, Tensor]:
        """Return the denoiser's input and its timestep (B,): see `add_noise`."""
        a, b = self.input_shares(self._level(sigma, clean))
        return (a * clean.float() + b * noise.float()).to(clean.dtype), self._fed(sigma, clean)

    def scaled(self, sample: Tensor, sigma: float | Tensor) -> tuple[Tensor, Tensor]:
        """Return the denoiser's input and its timestep (B,) for `x + sigma * n` (B, C, H, W), at a finite level."""
        a, _ = self.input_shares(self._level(sigma, sample))
        return (a * sample.float()).to(sample.dtype), self._fed(sigma, sample)

    def target(self, clean: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
        """Return what a perfect denoiser would output, float32 (B, C, H, W), given the input that `noisy` makes."""
        c, d = self.target_shares(self._level(sigma, clean))
        return c * clean.float() + d * noise.float()

    def denoised(self, noisy: Tensor, output: Tensor, sigma: float | Tensor) -> Tensor:
        """Return the clean image (B, C, H, W), float32, that the denoiser's output for an input of `noisy` stands for.

        For EDM it is `c_skip * (x + sigma * n) + c_out * output`.
        """
        level = self._level(sigma, noisy)
        a, b = self.input_shares(level)
        c, d = self.target_shares(level)
        return (d * noisy.float() - b * output.float()) / (a * d - b * c)

    def image_error(self, sigma: Tensor) -> Tensor:
        """Return how many times the answer's squared error is the denoised image's, of the shape of `sigma`."""
        a, b = self.input_shares(sigma)
        c, d = self.target_shares(sigma)
        return (b / (a * d - b * c)).square()

    def draw(
        self,
        batch_size: int,
        device: Any = None,
        generator: Generator = None,
        log_normal: tuple[float, float] | None = None,
        shares: tuple[float, float] | None = None,
    ) -> Tensor:
        """Draw the noise levels (batch_size,) of a training step, with a generator on `device`.

        `log_normal` holds the mean and the standard deviation of log sigma, in place of the family's own distribution,
        which is uniform timesteps for VP, (-1.2, 1.2) for EDM, and uniform times for flow matching. For flow matching,
        (0, 1) gives the logit-normal times of Esser et al. 2024 (arXiv 2403.03206), because the logit of time is log
        sigma. For VP, levels beyond an end of the schedule become that end. With `shares` the distribution is cut:
        only levels between these two shares of it are drawn. It raises `ValueError` if `log_normal` is not a
        distribution.
        """
        share = uniform((batch_size,), device, generator).clamp(min=2.0**-25)  # torch's may be 0
        if shares is not None:
            first, last = shares
            share = (first + (last - first) * share).clamp(max=last - 2.0**-24)
        return self.usual(share) if log_normal is None else self.log_normal(share, *log_normal)

    def log_normal(self, share: Tensor, mean: float, deviation: float) -> Tensor:
        """Return the levels (B,) below which these shares (B,) of a log-normal distribution are: see `draw`."""
        if not (math.isfinite(mean) and 0 < deviation < math.inf):
            raise ValueError(
                f"log sigma cannot have mean {mean} and deviation {deviation}: they must be finite, the deviation "
                "positive."
            )
        return self.trainable(torch.exp(mean + deviation * normal_quantile(share)))

    @property
    def samplers(self) -> tuple[str, ...]:
        """The names of the samplers besides the scheduler's own that suit this scheduler's levels."""
        name = type(self.scheduler).__name__
        return tuple(sampler for sampler, needed in self.own_samplers.items() if needed == name)

    def check_sampler(self, sampler: str | None) -> None:
        """Raise `ValueError` unless the sampler is among `samplers`, or None, which is the scheduler's own."""
        known = {name: family for family in FAMILIES for name in family.own_samplers}
        if sampler is None or sampler in self.samplers:
            return
        if found := known.get(sampler):
            needed = found.own_samplers[sampler]
            raise ValueError(
                f"sampler={sampler!r} needs an {needed}, not a {type(self.scheduler).__name__}: for a network trained "
                f"with {found.title}, set `pipeline.scheduler = {needed}.from_config(pipeline.scheduler.config)`."
            )
        names = ", ".join(map(repr, known))
        raise ValueError(f"sampler is {sampler!r}: allowed are {names}, and None for the scheduler's own.")

    def check_steps(self) -> None:
        """Raise `ValueError` if the scheduler's steps need more than the network's output, a timestep and a sample."""
        parameters = list(inspect.signature(self.scheduler.step).parameters.values())
        if any(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters[3:]):
            raise ValueError(f"{type(self.scheduler).__name__} takes steps that need more than an image and its noise.")

    @property
    def learns_variance(self) -> bool:
        """Whether the scheduler's steps take a variance that the network predicts besides the image's noise."""
        return str(self.scheduler.config.get("variance_type")).startswith("learned")

    def set_timesteps(self, count: int) -> None:
        """Set the scheduler's timesteps for `count` steps, on the host, where its steps read them without waiting."""
        self.scheduler.set_timesteps(count)

    def first_sample(self, noise: Tensor) -> Tensor:
        """Turn standard-normal noise into what the scheduler's steps start from, once its timesteps are set."""
        return noise * self.scheduler.init_noise_sigma

    def model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """Return the network's input for a sample of the scheduler's own steps."""
        return self.scheduler.scale_model_input(sample, timestep)

    def step(self, output: Tensor, timestep: Tensor, sample: Tensor, generator: Any) -> Tensor:
        """Take the scheduler's own step and return the next sample; a generator goes where the step is random."""
        if "generator" in inspect.signature(self.scheduler.step).parameters:
            return self.scheduler.step(output, timestep, sample, generator=generator).prev_sample
        return self.scheduler.step(output, timestep, sample).prev_sample


FAMILIES: list[type[Family]] = []  # in the order in which they are asked


def register(family_class: type[Family]) -> type[Family]:
    """Make a family known; it is asked before the families that are known already."""
    FAMILIES.insert(0, family_class)
    return family_class
