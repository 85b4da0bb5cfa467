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
  image is `x` is `x * sigma / (sigma_data * r) - n * sigma_data / r`, and the paper's loss weight,
  `1 / c_out^2`, makes the error of the image the plain error of the output.
- Flow matching (rectified flow; Liu et al. 2022, arXiv 2209.03003; Lipman et al. 2022, arXiv 2210.02747): at time `s`
  the network sees `(1 - s) * x + s * n` and should answer `n - x`; `sigma = s / (1 - s)`, the timestep is
  `s * num_train_timesteps`.

This is the only module that knows which family a scheduler belongs to.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

_EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
_FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")

_UNITS = {
    "sigma": "standard deviation of the noise on images in [-1, 1], or on scaled latents",
    "timestep": "as the denoiser is fed it",
}
# How far beyond an end a level may be, relative to the end: ends are printed and written down with five digits.
_ROUNDING = 5e-5


def _inside(value: Any, low: Any, high: Any) -> Any:
    """Whether a number, or each of a tensor's, is in the range, to five digits."""
    return (low - _ROUNDING * abs(low) <= value) & (value <= high + _ROUNDING * abs(high))


def _rounded(level: Tensor, low: Any, high: Any) -> Tensor:
    """Move levels that are inside to five digits to where they are exactly; NaN for those that are not."""
    return torch.where(_inside(level, low, high), level.clamp(low, high), torch.nan)


def _sigmas(alphas_cumprod: Tensor) -> Tensor:
    abar = alphas_cumprod.double()
    # Some schedulers store exactly 2**-24 in place of zero, to keep their own samplers finite.
    abar = torch.where(abar == 2.0**-24, 0.0, abar)
    return ((1 - abar) / abar).sqrt().float()


@torch.compiler.assume_constant_result
def _first_and_last_sigma(alphas_cumprod: Tensor) -> tuple[float, float]:
    sigmas = _sigmas(alphas_cumprod)
    return sigmas[0].item(), sigmas[-1].item()


class _VariancePreserving:
    """The noise levels of schedulers that have `alphas_cumprod`."""

    predictions = ("epsilon", "sample", "v_prediction")

    def __init__(self, scheduler: Any):
        self.scheduler = scheduler

    @property
    def sigmas(self) -> Tensor:
        """The levels (T,), ascending, float32; infinite where the signal is gone (zero-terminal SNR)."""
        return _sigmas(self.scheduler.alphas_cumprod)

    def sigma_range(self) -> tuple[float, float]:
        return _first_and_last_sigma(self.scheduler.alphas_cumprod)

    def timestep_range(self) -> tuple[float, float]:
        return 0, len(self.scheduler.alphas_cumprod) - 1

    def training_range(self, unit: str) -> tuple[float, float]:
        return self.sigma_range() if unit == "sigma" else self.timestep_range()

    def sigma(self, t: Tensor) -> Tensor:
        """Interpolate log sigma linearly between whole timesteps."""
        sigmas = self.sigmas.to(t.device)
        last = len(sigmas) - 1
        t = _rounded(t, 0, last)
        low = t.detach().floor().clamp(0, last).nan_to_num().long()
        start, stop = _at(sigmas, low), _at(sigmas, (low + 1).clamp(max=last))
        fraction = t - low
        between = torch.exp(torch.lerp(start.double().log(), stop.double().log(), fraction.double())).float()
        return torch.where(fraction == 0, start, between)

    def timestep(self, sigma: Tensor) -> Tensor:
        sigmas = self.sigmas.to(sigma.device)
        last = len(sigmas) - 1
        sigma = _rounded(sigma, sigmas[0], sigmas[-1])
        # The last level that is not above sigma; counted, which ONNX can do.
        low = ((sigmas <= sigma.detach()[..., None]).sum(-1) - 1).clamp(0, max(last - 1, 0))
        high = (low + 1).clamp(max=last)
        at_low, at_high = _at(sigmas, low), _at(sigmas, high)
        start, stop = at_low.double().log(), at_high.double().log()
        fraction = torch.where(sigma == at_low, 0.0, (sigma.double().log() - start) / (stop - start))
        fraction = torch.where(sigma == at_high, 1.0, fraction) * (high > low)
        return (low + fraction).float()

    def input_shares(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        # Exact at both ends, sigma 0 and infinity.
        return torch.rsqrt(1 + sigma.square()), torch.rsqrt(1 + sigma.square().reciprocal())

    def target_shares(self, sigma: Tensor, prediction: str) -> tuple[Tensor, Tensor]:
        a, b = self.input_shares(sigma)
        zero, one = torch.zeros_like(a), torch.ones_like(a)
        return {"epsilon": (zero, one), "sample": (one, zero), "v_prediction": (-b, a)}[prediction]

    def draw(self, shape: tuple[int], device: Any, generator: Any) -> Tensor:
        """Draw timesteps uniformly over the schedule (Ho et al. 2020)."""
        sigmas = self.sigmas.to(device)
        return sigmas[torch.randint(len(sigmas), shape, device=device, generator=generator)]


def _at(values: Tensor, index: Tensor) -> Tensor:
    """Return `values[index]`, for an index without dimensions too, by an operation that ONNX has."""
    return values.gather(0, index.reshape(-1)).reshape(index.shape)


class _Karras:
    """The noise levels of EDM; `sigma_min` and `sigma_max` bound sampling, not training.

    What is drawn in training is positive, and has a square in float32.
    """

    largest = torch.finfo(torch.float32).max ** 0.5
    smallest = torch.finfo(torch.float32).tiny

    predictions = ("epsilon", "v_prediction")

    def __init__(self, scheduler: Any):
        config = self.config = scheduler.config
        if not (0 < config.sigma_min < config.sigma_max and config.sigma_data > 0):
            raise ValueError(
                f"The scheduler's sigma_min, sigma_max and sigma_data are {config.sigma_min}, {config.sigma_max} and "
                f"{config.sigma_data}: they must be positive, and sigma_min the smaller one."
            )

    def sigma_range(self) -> tuple[float, float]:
        return self.config.sigma_min, self.config.sigma_max

    def timestep_range(self) -> tuple[float, float]:
        return math.log(self.config.sigma_min) / 4, math.log(self.config.sigma_max) / 4

    def training_range(self, unit: str) -> tuple[float, float]:
        low, high = self.smallest, self.largest
        return (low, high) if unit == "sigma" else (math.log(low) / 4, math.log(high) / 4)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.exp(4 * _rounded(t, *self.training_range("timestep")).double()).float()

    def timestep(self, sigma: Tensor) -> Tensor:
        return (_rounded(sigma, *self.training_range("sigma")).double().log() / 4).float()

    def input_shares(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        r = (sigma.square() + self.config.sigma_data**2).sqrt()
        return 1 / r, sigma / r

    def target_shares(self, sigma: Tensor, prediction: str) -> tuple[Tensor, Tensor]:
        spread = self.config.sigma_data
        r = (sigma.square() + spread**2).sqrt()
        # diffusers' v_prediction answers with the opposite sign.
        sign = -1 if prediction == "v_prediction" else 1
        return sign * sigma / (spread * r), -sign * spread / r

    def draw(self, shape: tuple[int], device: Any, generator: Any) -> Tensor:
        """Draw log-normally, with the mean -1.2 and the deviation 1.2 of Karras et al. 2022."""
        return _log_normal((-1.2, 1.2), shape, device, generator)


class _Flow:
    """The noise levels of flow matching: time s in [0, 1], from the image to pure noise."""

    predictions = ("velocity",)

    def __init__(self, scheduler: Any):
        self.steps = scheduler.config.num_train_timesteps

    def sigma_range(self) -> tuple[float, float]:
        return 0.0, math.inf

    def timestep_range(self) -> tuple[float, float]:
        return 0, self.steps

    def training_range(self, unit: str) -> tuple[float, float]:
        return self.sigma_range() if unit == "sigma" else self.timestep_range()

    def sigma(self, t: Tensor) -> Tensor:
        s = _rounded(t, 0, self.steps).double() / self.steps
        return (s / (1 - s)).float()

    def timestep(self, sigma: Tensor) -> Tensor:
        return (self.steps / (1 + _rounded(sigma, 0, math.inf).double().reciprocal())).float()

    def input_shares(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return 1 / (1 + sigma), 1 / (1 + 1 / sigma)

    def target_shares(self, sigma: Tensor, prediction: str) -> tuple[Tensor, Tensor]:
        one = torch.ones_like(sigma)
        return -one, one

    def draw(self, shape: tuple[int], device: Any, generator: Any) -> Tensor:
        """Draw times uniformly."""
        s = torch.rand(shape, device=device, generator=generator)
        return s / (1 - s)


def _family(scheduler: Any) -> _VariancePreserving | _Karras | _Flow:
    """Return the scheduler's family, or refuse the scheduler."""
    name = type(scheduler).__name__
    config = getattr(scheduler, "config", {})
    if name in _EDM:
        return _Karras(scheduler)
    # Options under which a scheduler samples with other levels or timesteps than its family's.
    other = [option for option in ("invert_sigmas", "use_flow_sigmas") if config.get(option)]
    other += ["timestep_type"] if config.get("timestep_type", "discrete") != "discrete" else []
    if name in _FLOW and not other:
        return _Flow(scheduler)
    if getattr(scheduler, "alphas_cumprod", None) is not None and not other:
        return _VariancePreserving(scheduler)
    raise ValueError(
        f"{name} is not supported{' with ' + ', '.join(other) if other else ''}: "
        "allowed are DDPMScheduler, DDIMScheduler and the other variance-preserving schedulers of diffusers (with "
        f"`alphas_cumprod`), EDM's ({', '.join(_EDM)}) and flow matching's ({', '.join(_FLOW)})."
    )


def family(scheduler: Any) -> str:
    """Return the framework that a scheduler belongs to: `"ddpm"`, `"edm"` or `"flow"`.

    A network trained in one framework can be sampled by the samplers of it, and by no others.

    Raises:
        ValueError: A scheduler of no framework that is supported.
    """
    return {_VariancePreserving: "ddpm", _Karras: "edm", _Flow: "flow"}[type(_family(scheduler))]


def sigma_range(scheduler: Any) -> tuple[float, float]:
    """Return the smallest and the largest noise level of a scheduler: 0 and infinity for flow matching."""
    return _family(scheduler).sigma_range()


def readable(values: Tensor) -> bool:
    """Whether values can be looked at: without waiting for a device, and with no graph being recorded without them."""
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing() or is_in_torch_dispatch_mode()
    return values.device.type == "cpu" and not recorded


def check_level(scheduler: Any, unit: str, value: Any, allowed: tuple[float, float] | None = None) -> None:
    """Refuse a noise level outside a range, to five digits, and what is no number.

    Python scalars are always looked at, in a graph that is compiled too, where they are constants; other values only
    where they are `readable`.

    Args:
        scheduler: The scheduler that the level is of.
        unit: `"sigma"` or `"timestep"`.
        value: The level or levels, in this unit: a number, a tensor, or what can become one.
        allowed: The range; by default every level that a network of the scheduler's family may be trained at.

    Raises:
        ValueError: A level outside, or NaN.
    """
    is_number = isinstance(value, int | float)
    values = value if is_number else torch.as_tensor(value)
    if not is_number and not readable(values):
        return
    low, high = _family(scheduler).training_range(unit) if allowed is None else allowed
    if is_number:
        # The compiler can show a scalar that changes in no other format.
        wrong = None if _inside(values, low, high) else f"{float(values)!r}"
    else:
        # In float64, as bfloat16 takes 1000 for 999; unwrapped, as `torch.func.vmap` lets nobody look at its batch.
        values = torch.func.debug_unwrap(values).double()
        outside = values[~_inside(values, low, high)]
        wrong = f"{outside[0].item():.7g}" if len(outside) else None
    if wrong is not None:
        raise ValueError(
            f"{unit} {wrong} is outside the schedule of {type(scheduler).__name__}: allowed are {low:.5g} to "
            f"{high:.5g} ({_UNITS[unit]})."
        )


def check_sigma(scheduler: Any, sigma: Any) -> None:
    """Refuse a `sigma`, or several, at which a sampler would not evaluate a network (to five digits)."""
    check_level(scheduler, "sigma", sigma, sigma_range(scheduler))


def check_timestep(scheduler: Any, timestep: Any) -> None:
    """Refuse a `timestep`, or several, at which a sampler would not evaluate a network (to five digits)."""
    check_level(scheduler, "timestep", timestep, _family(scheduler).timestep_range())


def timestep_to_sigma(scheduler: Any, timestep: float | Tensor) -> Tensor:
    """Convert what the denoiser is fed into a noise level.

    Args:
        scheduler: A diffusers scheduler.
        timestep: Scalar or (B,). VP: 0-based, in [0, T - 1]; between integers log sigma is interpolated linearly. EDM:
            log(sigma) / 4, of any level that training may draw. Flow matching: time * `num_train_timesteps`.

    Returns:
        `sigma`, float32, of the shape of `timestep`. What is outside is refused where it can be read (scalars, tensors
        on the CPU), and NaN elsewhere (on a device, in a graph that is compiled or exported).

    Raises:
        ValueError: A timestep outside the schedule, or a scheduler that is not supported.
    """
    group = _family(scheduler)
    check_level(scheduler, "timestep", timestep)
    return group.sigma(torch.as_tensor(timestep, dtype=torch.float32))


def sigma_to_timestep(scheduler: Any, sigma: float | Tensor) -> Tensor:
    """Convert a noise level into what the denoiser is fed; the inverse of `timestep_to_sigma`.

    Args:
        scheduler: A diffusers scheduler.
        sigma: Scalar or (B,). VP: within `sigma_range(scheduler)`. EDM: positive and finite, as training draws levels
            beyond those of sampling. Flow matching: from 0 on. Infinite, where the schedule has it, is pure noise.

    Returns:
        `timestep`, float32, of the shape of `sigma`. What is outside is refused where it can be read (scalars, tensors
        on the CPU), and NaN elsewhere (on a device, in a graph that is compiled or exported).

    Raises:
        ValueError: A sigma outside the schedule, or a scheduler that is not supported.
    """
    group = _family(scheduler)
    check_level(scheduler, "sigma", sigma)
    return group.timestep(torch.as_tensor(sigma, dtype=torch.float32))


def _level(scheduler: Any, sigma: float | Tensor, images: Tensor) -> Tensor:
    """Return `sigma`, where it can be checked, as a float32 tensor (B, 1, ...) that goes with the images'."""
    check_level(scheduler, "sigma", sigma)
    level, count = torch.as_tensor(sigma, dtype=torch.float32, device=images.device), images.shape[0]
    if level.ndim > 1 or (level.ndim == 1 and level.shape[0] not in (count, 1)):
        raise ValueError(f"sigma has shape {tuple(level.shape)} for {count} images: pass a scalar, or one each.")
    return level.expand(count).reshape(-1, *[1] * (images.ndim - 1))


def add_noise(scheduler: Any, clean: Tensor, noise: Tensor, sigma: float | Tensor) -> tuple[Tensor, Tensor]:
    """Make the denoiser's input at a noise level.

    It neither synchronises with a device nor breaks a compiled graph: there it reads no tensor's values.

    Args:
        scheduler: A diffusers scheduler; its own `add_noise` and its current sampling grid play no part.
        clean: Images (B, C, H, W) in [-1, 1].
        noise: Standard-normal noise of the same shape.
        sigma: Noise level, scalar or (B,), as `sigma_to_timestep` takes it; infinite means pure noise.

    Returns:
        The input (B, C, H, W), scaled as the scheduler's family wants it, in the dtype of `clean`, computed in float32;
        and its float32 timestep (B,).

    Raises:
        ValueError: A sigma outside the schedule, see `sigma_to_timestep`, or neither one nor one an image.
    """
    a, b = _family(scheduler).input_shares(_level(scheduler, sigma, clean))
    timestep = sigma_to_timestep(scheduler, sigma).to(clean.device).expand(clean.shape[0])
    return (a * clean.float() + b * noise.float()).to(clean.dtype), timestep


def prediction_type(scheduler: Any) -> str:
    """Return what the denoiser predicts, in the words of its scheduler's config.

    `epsilon` (the noise), `sample` (the clean image) or `v_prediction` for VP; `epsilon` for EDM's own output, and
    `v_prediction` for its negative; `velocity` for flow matching.

    Raises:
        ValueError: Another prediction type, or noise prediction under zero-terminal SNR, where at pure noise the
            network's input is its target and says nothing of the image (Lin et al. 2023, arXiv 2305.08891).
    """
    group = _family(scheduler)
    allowed = group.predictions
    kind = scheduler.config.get("prediction_type", allowed[0])
    if kind not in allowed:
        raise ValueError(
            f"prediction_type {kind!r} is not supported with {type(scheduler).__name__}: allowed are "
            f"{', '.join(allowed)}."
        )
    if isinstance(group, _VariancePreserving) and kind == "epsilon" and math.isinf(group.sigma_range()[1]):
        raise ValueError(
            "prediction_type 'epsilon' cannot work with zero-terminal SNR (`rescale_betas_zero_snr`): "
            "set the scheduler's prediction_type to 'v_prediction' or 'sample'."
        )
    return kind


def prediction_target(scheduler: Any, clean: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
    """Return what a perfect denoiser would output, float32 (B, C, H, W), given `add_noise`'s input: see there."""
    c, d = _family(scheduler).target_shares(_level(scheduler, sigma, clean), prediction_type(scheduler))
    return c * clean.float() + d * noise.float()


def denoised(scheduler: Any, sample: Tensor, output: Tensor, sigma: float | Tensor) -> Tensor:
    """Return the clean image that a denoiser's output stands for.

    Args:
        scheduler: The denoiser's scheduler.
        sample: The denoiser's input (B, C, H, W), as `add_noise` makes it.
        output: The denoiser's output, of the same shape.
        sigma: Noise level, scalar or (B,), as `add_noise` takes it.

    Returns:
        The image (B, C, H, W), float32; for EDM `c_skip * (x + sigma * n) + c_out * output`.

    Raises:
        ValueError: A sigma outside the schedule, or neither one nor one an image.
    """
    level, group = _level(scheduler, sigma, sample), _family(scheduler)
    (a, b), (c, d) = group.input_shares(level), group.target_shares(level, prediction_type(scheduler))
    return (d * sample.float() - b * output.float()) / (a * d - b * c)


def sample_training_sigma(
    scheduler: Any,
    batch_size: int,
    device: Any = None,
    generator: Any = None,
    log_normal: tuple[float, float] | None = None,
) -> Tensor:
    """Draw the noise levels (batch_size,) of a training step.

    Args:
        scheduler: A diffusers scheduler.
        batch_size: Number of levels.
        device: Where to draw.
        generator: Random generator on that device.
        log_normal: Mean and standard deviation of log sigma, in place of the family's own distribution: uniform
            timesteps for VP, (-1.2, 1.2) for EDM, uniform times for flow matching. There (0, 1) are the logit-normal
            times of Esser et al. 2024 (arXiv 2403.03206), as the logit of time is log sigma. With VP, levels beyond
            an end of the schedule are that end.

    Raises:
        ValueError: `log_normal` that is no distribution.
    """
    group = _family(scheduler)
    if log_normal is None:
        return group.draw((batch_size,), device, generator)
    mean, deviation = log_normal
    if not (math.isfinite(mean) and 0 < deviation < math.inf):
        raise ValueError(
            f"log sigma cannot have mean {mean} and deviation {deviation}: they must be finite, the deviation positive."
        )
    sigma = _log_normal((mean, deviation), (batch_size,), device, generator)
    return sigma.clamp(*group.sigma_range()) if isinstance(group, _VariancePreserving) else sigma


def _log_normal(moments: tuple[float, float], shape: tuple[int], device: Any, generator: Any) -> Tensor:
    return torch.exp(moments[0] + moments[1] * torch.randn(shape, device=device, generator=generator))


def check_time_embedding(config: Any, scheduler: Any) -> None:
    """Raise `ValueError` if a denoiser, of which this is the config, cannot be fed the scheduler's timesteps."""
    kind = config.get("time_embedding_type", "positional")
    if kind == "fourier":
        raise ValueError(
            "The denoiser's time_embedding_type is 'fourier': it takes the logarithm of what it is fed, as score-SDE "
            "schedulers need it, which are not supported; timestep 0 would give no numbers. Set it to 'positional'."
        )
    if kind != "positional" and not isinstance(_family(scheduler), _VariancePreserving):
        raise ValueError(
            f"The denoiser's time_embedding_type is {kind!r}, which cannot take the timesteps of "
            f"{type(scheduler).__name__}: set it to 'positional'."
        )


def indexed_noise(shape: tuple[int, ...], indices: Any, seed: int = 0, view: int = 0, stream: int = 0) -> Tensor:
    """Draw standard-normal noise that depends on (seed, image index, view) alone.

    Batch size, order and number of processes play no part, so that cached features can be made in any pieces.

    Args:
        shape: Shape of one image, (C, H, W), or of several draws for it, (draws, C, H, W).
        indices: The images' non-negative indices in their data set, N integers.
        seed: The noise seed.
        view: Number of the draw, where an image gets several.
        stream: Number of the purpose: draws of different ones have nothing to do with each other.

    Returns:
        float32 (N, *shape) on the CPU.
    """
    purpose = [stream] if stream else []
    seeds = ([seed, view, int(i), *purpose] for i in indices)
    return torch.from_numpy(
        np.stack([np.random.default_rng(s).standard_normal(shape, dtype=np.float32) for s in seeds])
    )
