"""Noise levels: one unit for every framework, and the network's input and target that belong to a level.

Symbols, for clean images `x` in [-1, 1] and standard-normal `n`, both (B, C, H, W):

- `sigma`: standard deviation of the noise on unit-scale images, `x + sigma * n` (Karras et al. 2022, arXiv 2206.00364).
- `timestep`: what the denoiser is fed.

Every family of schedulers is linear: the network sees `a * x + b * n` and should answer `c * x + d * n`.

- Variance-preserving (VP; Ho et al. 2020, arXiv 2006.11239), with `abar_t = scheduler.alphas_cumprod[t]`:
  `sigma_t = sqrt((1 - abar_t) / abar_t)`, `a = sqrt(abar_t)`, `b = sqrt(1 - abar_t)`; the timestep is the 0-based index
  `t`. The target is the noise (c, d = 0, 1), the image (1, 0), or the velocity (-b, a) of Salimans and Ho 2022
  (arXiv 2202.00512).
- EDM (Karras et al. 2022, table 1): the denoised image is `c_skip * (x + sigma * n) + c_out * output`, the input is
  `c_in * (x + sigma * n)`, the timestep is `c_noise = log(sigma) / 4`. With `r = sqrt(sigma^2 + sigma_data^2)`:
  `c_in = 1 / r`, `c_skip = sigma_data^2 / r^2`, `c_out = sigma * sigma_data / r`. The output for which the denoised
  image is `x` is `x * sigma / (sigma_data * r) - n * sigma_data / r`.
- Flow matching (rectified flow; Liu et al. 2022, arXiv 2209.03003; Lipman et al. 2022, arXiv 2210.02747): at time `s`
  the network sees `(1 - s) * x + s * n` and should answer `n - x`; `sigma = s / (1 - s)`, the timestep is
  `s * num_train_timesteps`.
"""

from __future__ import annotations

import inspect
import math
from functools import lru_cache
from typing import Any

import diffusers
import torch
from torch import Tensor

from .families import FAMILIES, Family, exactly, has_float64, is_recorded, register, rounded


def _other_levels(scheduler: Any) -> list[str]:
    """Return the options under which a scheduler samples with levels or timesteps other than its family's."""
    config = getattr(scheduler, "config", {})
    other = [option for option in ("invert_sigmas", "use_flow_sigmas") if config.get(option)]
    return other + (["timestep_type"] if config.get("timestep_type", "discrete") != "discrete" else [])


def _schedule(alphas_cumprod: Tensor, device: torch.device) -> Tensor:
    """Return the levels (T,) of a VP schedule, ascending, float32; infinite where the signal is gone."""
    abar = exactly(alphas_cumprod)
    # Some schedulers store exactly 2**-24 in place of zero, to keep their own samplers finite.
    abar = torch.where(abar == 2.0**-24, 0.0, abar)
    return ((1 - abar) / abar).sqrt().float().to(device)


@lru_cache(maxsize=32)
def _kept_schedule(values: bytes, device: torch.device) -> Tensor:
    """Return the schedule of these `alphas_cumprod`, float32, which stays on its device."""
    with torch.inference_mode(False):  # inference tensors could not be trained with
        return _schedule(torch.frombuffer(bytearray(values), dtype=torch.float32), device)


def _levels(alphas_cumprod: Tensor, device: torch.device) -> Tensor:
    """Return the schedule on a device. It is kept, unless a graph is recorded, whose tensors must not outlive it."""
    if is_recorded() or alphas_cumprod.device.type != "cpu" or alphas_cumprod.dtype != torch.float32:
        return _schedule(alphas_cumprod, device)
    try:
        values = alphas_cumprod.numpy().tobytes()
    except RuntimeError:  # inside a transform of `torch.func`
        return _schedule(alphas_cumprod, device)
    return _kept_schedule(values, device)


@torch.compiler.assume_constant_result
def _first_and_last_sigma(alphas_cumprod: Tensor) -> tuple[float, float]:
    sigmas = _levels(alphas_cumprod, torch.device("cpu"))
    return sigmas[0].item(), sigmas[-1].item()


@register
class _VariancePreserving(Family):
    """The noise levels of schedulers that have `alphas_cumprod`."""

    name = "ddpm"
    title = "DDPM"
    default_scheduler = "DDPMScheduler"
    predictions = ("epsilon", "sample", "v_prediction")
    whole_timesteps = True

    @classmethod
    def takes(cls, scheduler: Any) -> bool:
        return getattr(scheduler, "alphas_cumprod", None) is not None and not _other_levels(scheduler)

    @classmethod
    def allowed(cls) -> str:
        return (
            f"{cls.default_scheduler}, DDIMScheduler and the other variance-preserving schedulers of diffusers (with "
            "`alphas_cumprod`)"
        )

    def sigmas(self, device: torch.device) -> Tensor:
        return _levels(self.scheduler.alphas_cumprod, device)

    def sigma_range(self) -> tuple[float, float]:
        id(self.scheduler.alphas_cumprod)  # the compiler guards this: a graph that holds the ends is for one schedule
        return _first_and_last_sigma(self.scheduler.alphas_cumprod)

    def timestep_range(self) -> tuple[float, float]:
        return 0, len(self.scheduler.alphas_cumprod) - 1

    def to_sigma(self, timestep: Tensor) -> Tensor:
        sigmas = self.sigmas(timestep.device)
        last = len(sigmas) - 1
        timestep = rounded(timestep, 0, last)
        low = timestep.detach().floor().clamp(0, last).nan_to_num().long()
        start = _at(sigmas, low)
        stop = _at(sigmas, (low + 1).clamp(max=last))
        fraction = timestep - low
        between = torch.exp(torch.lerp(exactly(start).log(), exactly(stop).log(), exactly(fraction))).float()
        between = torch.where(stop == math.inf, stop, between)  # for which torch may say NaN
        return torch.where(fraction == 0, start, between)

    def to_timestep(self, sigma: Tensor) -> Tensor:
        sigmas = self.sigmas(sigma.device)
        last = len(sigmas) - 1
        sigma = rounded(sigma, sigmas[0], sigmas[-1])
        # The last level that is not above sigma, found by counting, which ONNX can do.
        low = ((sigmas <= sigma.detach()[..., None]).sum(-1) - 1).clamp(0, max(last - 1, 0))
        high = (low + 1).clamp(max=last)
        at_low = _at(sigmas, low)
        at_high = _at(sigmas, high)
        fraction = _log_ratio(sigma, at_low) / _log_ratio(at_high, at_low)
        fraction = torch.where(sigma == at_low, 0.0, fraction)
        fraction = torch.where(sigma == at_high, 1.0, fraction) * (high > low)
        return (low + fraction).float()

    def input_shares(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        # Exact at both ends, sigma 0 and infinity.
        return torch.rsqrt(1 + sigma.square()), torch.rsqrt(1 + sigma.square().reciprocal())

    def target_shares(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.input_shares(sigma)
        zero = torch.zeros_like(a)
        one = torch.ones_like(a)
        return {"epsilon": (zero, one), "sample": (one, zero), "v_prediction": (-b, a)}[self.prediction]

    def check_prediction(self) -> None:
        super().check_prediction()
        # At pure noise the input is the target, and says nothing about the image (Lin et al. 2023, arXiv 2305.08891).
        if self._prediction == "epsilon" and math.isinf(self.sigma_range()[1]):
            raise ValueError(
                "prediction_type 'epsilon' cannot work with zero-terminal SNR (`rescale_betas_zero_snr`): "
                "set the scheduler's prediction_type to 'v_prediction' or 'sample'."
            )

    def usual(self, share: Tensor) -> Tensor:
        count = len(self.scheduler.alphas_cumprod)
        return self.sigmas(share.device)[(share * count).long().clamp(max=count - 1)]

    def trainable(self, sigma: Tensor) -> Tensor:
        low, high = self.sigma_range()
        return sigma.clamp(low, high)


def _at(values: Tensor, index: Tensor) -> Tensor:
    """Return `values[index]`, for an index without dimensions too, by an operation that ONNX has."""
    return values.gather(0, index.reshape(-1)).reshape(index.shape)


def _log_ratio(above: Tensor, below: Tensor) -> Tensor:
    """Return the logarithm of the ratio of two levels, `below` being the next lower one of a schedule."""
    if has_float64(above.device):
        return above.double().log() - below.double().log()
    return torch.log1p((above - below) / below)  # a difference of logarithms would lose digits in float32


@register
class _Karras(Family):
    """The noise levels of EDM; `sigma_min` and `sigma_max` bound sampling, not training.

    Levels that are drawn in training are positive, and float32 can hold their squares.
    """

    name = "edm"
    title = "EDM"
    default_scheduler = "EDMEulerScheduler"
    schedulers = (default_scheduler, "EDMDPMSolverMultistepScheduler")
    own_samplers = {"heun": default_scheduler}
    predictions = ("epsilon", "v_prediction")
    largest = torch.finfo(torch.float32).max ** 0.5
    smallest = torch.finfo(torch.float32).tiny

    def __init__(self, scheduler: Any):
        super().__init__(scheduler)
        config = self.config = scheduler.config
        if not (0 < config.sigma_min < config.sigma_max and config.sigma_data > 0):
            raise ValueError(
                f"The scheduler's sigma_min, sigma_max and sigma_data are {config.sigma_min}, {config.sigma_max} and "
                f"{config.sigma_data}: they must be positive, and sigma_min must be smaller than sigma_max."
            )

    def sigma_range(self) -> tuple[float, float]:
        return self.config.sigma_min, self.config.sigma_max

    def timestep_range(self) -> tuple[float, float]:
        return math.log(self.config.sigma_min) / 4, math.log(self.config.sigma_max) / 4

    def training_range(self, unit: str) -> tuple[float, float]:
        if unit == "sigma":
            return self.smallest, self.largest
        return math.log(self.smallest) / 4, math.log(self.largest) / 4

    def to_sigma(self, timestep: Tensor) -> Tensor:
        return torch.exp(4 * exactly(rounded(timestep, *self.training_range("timestep")))).float()

    def to_timestep(self, sigma: Tensor) -> Tensor:
        return (exactly(rounded(sigma, *self.training_range("sigma"))).log() / 4).float()

    def input_shares(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        r = (sigma.square() + self.config.sigma_data**2).sqrt()
        return 1 / r, sigma / r

    def target_shares(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        spread = self.config.sigma_data
        r = (sigma.square() + spread**2).sqrt()
        # diffusers' v_prediction answers with the opposite sign.
        sign = -1 if self.prediction == "v_prediction" else 1
        return sign * sigma / (spread * r), -sign * spread / r

    def usual(self, share: Tensor) -> Tensor:
        return self.log_normal(share, -1.2, 1.2)  # of Karras et al. 2022


@register
class _FlowMatching(Family):
    """The noise levels of flow matching: time s in [0, 1], from the image to pure noise."""

    name = "flow"
    title = "flow matching"
    default_scheduler = "FlowMatchEulerDiscreteScheduler"
    schedulers = (default_scheduler, "FlowMatchHeunDiscreteScheduler")
    predictions = ("velocity",)

    def __init__(self, scheduler: Any):
        super().__init__(scheduler)
        self.steps = scheduler.config.num_train_timesteps

    @classmethod
    def takes(cls, scheduler: Any) -> bool:
        return super().takes(scheduler) and not _other_levels(scheduler)

    def sigma_range(self) -> tuple[float, float]:
        return 0.0, math.inf

    def timestep_range(self) -> tuple[float, float]:
        return 0, self.steps

    def to_sigma(self, timestep: Tensor) -> Tensor:
        timestep = rounded(timestep, 0, self.steps)
        if not has_float64(timestep.device):
            return timestep / (self.steps - timestep)  # `1 - s` would lose digits in float32
        s = timestep.double() / self.steps
        return (s / (1 - s)).float()

    def to_timestep(self, sigma: Tensor) -> Tensor:
        return (self.steps / (1 + exactly(rounded(sigma, 0, math.inf)).reciprocal())).float()

    def input_shares(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return 1 / (1 + sigma), 1 / (1 + 1 / sigma)

    def target_shares(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        one = torch.ones_like(sigma)
        return -one, one

    def usual(self, share: Tensor) -> Tensor:
        return share / (1 - share)

    def first_sample(self, noise: Tensor) -> Tensor:
        return noise

    def model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return sample


def family_of(scheduler: Any) -> Family:
    """Return the family of a scheduler, with the scheduler in it, or raise `ValueError` if it belongs to none."""
    for family_class in FAMILIES:
        if family_class.takes(scheduler):
            return family_class(scheduler)
    other = _other_levels(scheduler)
    *first, last = [family_class.allowed() for family_class in reversed(FAMILIES)]
    raise ValueError(
        f"{type(scheduler).__name__} is not supported{' with ' + ', '.join(other) if other else ''}: allowed are "
        f"{', '.join(first)} and {last}."
    )


def new_scheduler(framework: str, **options: Any) -> Any:
    """Return the scheduler that networks of a framework (`Family.name`) are trained under by default.

    `options` are the scheduler's own, in place of its defaults.
    """
    for family_class in FAMILIES:
        if family_class.name == framework:
            return getattr(diffusers, family_class.default_scheduler)(**options)
    names = ", ".join(sorted(family_class.name for family_class in FAMILIES))
    raise ValueError(f"framework is {framework!r}: allowed are {names}.")


def change_scheduler(trained: Any, kind: Any, **options: Any) -> Any:
    """Return a scheduler of another kind that denoises as the trained one does.

    If the trained one clips denoised images to [-1, 1] and the other kind has no `clip_sample`, the other one
    thresholds at 1, which clips the same image. Networks whose answers are off at high noise need this: without it the
    samples leave [-1, 1] nearly everywhere. What a solver makes of a clipped image differs: `DDIMScheduler` keeps the
    network's noise beside it, others derive the noise anew from it and the sample. `options` are the other scheduler's
    own, in place of what it takes over.
    """
    config = trained.config
    known = inspect.signature(kind).parameters
    clips = config.get("clip_sample", False) and config.get("clip_sample_range", 1.0) == 1.0
    if clips and "clip_sample" not in known and "thresholding" in known:
        options = {"thresholding": True, "sample_max_value": 1.0} | options
    return kind.from_config(config, **options)


def timestep_to_sigma(scheduler: Any, timestep: float | Tensor) -> Tensor:
    """Convert what the denoiser is fed into a noise level.

    Args:
        scheduler: A diffusers scheduler.
        timestep: Scalar or (B,). VP: 0-based, in [0, T - 1]; between integers log sigma is interpolated linearly. EDM:
            log(sigma) / 4, of any level that training may draw. Flow matching: time * `num_train_timesteps`.

    Returns:
        `sigma`, float32, of the shape of `timestep`. A timestep outside is refused where it can be read (scalars,
        tensors on the CPU), and gives NaN elsewhere (on a device, in a graph that is compiled or exported).

    Raises:
        ValueError: A timestep outside the schedule, or a scheduler that is not supported.
    """
    return family_of(scheduler).sigma(timestep)


def sigma_to_timestep(scheduler: Any, sigma: float | Tensor) -> Tensor:
    """Convert a noise level into what the denoiser is fed; the inverse of `timestep_to_sigma`.

    Args:
        scheduler: A diffusers scheduler.
        sigma: Scalar or (B,). VP: within the schedule. EDM: positive and finite, as training draws levels
            beyond those of sampling. Flow matching: at least 0. Infinity, where the schedule has it, is pure noise.

    Returns:
        `timestep`, float32, of the shape of `sigma`. A sigma outside is refused or gives NaN, as in
        `timestep_to_sigma`.

    Raises:
        ValueError: A sigma outside the schedule, or a scheduler that is not supported.
    """
    return family_of(scheduler).timestep(sigma)


def add_noise(scheduler: Any, clean: Tensor, noise: Tensor, sigma: float | Tensor) -> tuple[Tensor, Tensor]:
    """Make the denoiser's input at a noise level.

    It neither synchronises with a device nor breaks a compiled graph, since it reads no tensor values there.

    Args:
        scheduler: A diffusers scheduler; its own `add_noise` and its current sampling grid play no part.
        clean: Images (B, C, H, W) in [-1, 1].
        noise: Standard-normal noise of the same shape.
        sigma: Noise level, scalar or (B,), as `sigma_to_timestep` takes it; infinite means pure noise.

    Returns:
        The input (B, C, H, W), scaled as the scheduler's family wants it, in the dtype of `clean`, computed in float32;
        and its float32 timestep (B,).

    Raises:
        ValueError: A sigma outside the schedule, see `sigma_to_timestep`, or several that are not one per image.
    """
    return family_of(scheduler).noisy(clean, noise, sigma)
