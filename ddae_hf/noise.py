"""Noise levels: one unit for every framework, and the network input that belongs to a level.

Symbols, for clean images `x` in [-1, 1] and standard-normal `n`, both (B, C, H, W):

- `sigma`: standard deviation of the noise on unit-scale images, `x + sigma * n` (Karras et al. 2022, arXiv 2206.00364).
- `abar_t`: `scheduler.alphas_cumprod[t]`; a variance-preserving (VP) network sees
  `sqrt(abar_t) * x + sqrt(1 - abar_t) * n`, so that `sigma_t = sqrt((1 - abar_t) / abar_t)` (Ho et al. 2020).
- `timestep`: what the denoiser is fed; for VP the 0-based index `t` into the schedule.

This is the only module that knows which family a scheduler belongs to.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor


def _alphas_cumprod(scheduler: Any) -> Tensor:
    """Return `abar` (T,) of a VP scheduler, or refuse the scheduler."""
    abar = getattr(scheduler, "alphas_cumprod", None)
    if abar is None:
        raise ValueError(
            f"{type(scheduler).__name__} is not a variance-preserving scheduler (it has no `alphas_cumprod`). "
            "Supported are DDPMScheduler, DDIMScheduler and the other diffusers schedulers that carry `alphas_cumprod`."
        )
    return abar


def _sigmas(scheduler: Any) -> Tensor:
    """Return the schedule's levels (T,), ascending, float32; infinite where the signal is gone (zero-terminal SNR)."""
    abar = _alphas_cumprod(scheduler).double()
    # Some schedulers store exactly 2**-24 in place of zero, to keep their own samplers finite.
    abar = torch.where(abar == 2.0**-24, 0.0, abar)
    return ((1 - abar) / abar).sqrt().float()


def sigma_range(scheduler: Any) -> tuple[float, float]:
    """Return the smallest and the largest noise level that a denoiser under `scheduler` is trained at."""
    sigmas = _sigmas(scheduler)
    return sigmas[0].item(), sigmas[-1].item()


def timestep_to_sigma(scheduler: Any, timestep: float | Tensor) -> Tensor:
    """Convert what the denoiser is fed into a noise level.

    Args:
        scheduler: A diffusers VP scheduler.
        timestep: Scalar or (B,), 0-based, in [0, T - 1]; between integers log sigma is interpolated linearly.

    Returns:
        `sigma`, float32, of the shape of `timestep`; NaN where a tensor's timestep is outside the schedule.

    Raises:
        ValueError: A Python scalar outside the schedule, or a scheduler that is not variance-preserving.
    """
    sigmas = _sigmas(scheduler)
    last = len(sigmas) - 1
    if not isinstance(timestep, Tensor) and not 0 <= timestep <= last:
        raise ValueError(f"timestep {timestep} is outside the schedule: allowed are 0 to {last} (0-based).")
    t = torch.as_tensor(timestep, dtype=torch.float32)
    sigmas = sigmas.to(t.device)
    low = t.detach().floor().clamp(0, last).nan_to_num().long()
    high = (low + 1).clamp(max=last)
    fraction = t - low
    between = torch.exp(
        torch.lerp(sigmas.take(low).double().log(), sigmas.take(high).double().log(), fraction.double())
    ).float()
    sigma = torch.where(fraction == 0, sigmas.take(low), between)
    return torch.where((t >= 0) & (t <= last), sigma, torch.nan)


def sigma_to_timestep(scheduler: Any, sigma: float | Tensor) -> Tensor:
    """Convert a noise level into what the denoiser is fed; the inverse of `timestep_to_sigma`.

    Args:
        scheduler: A diffusers VP scheduler.
        sigma: Scalar or (B,), within `sigma_range(scheduler)`; infinite means pure noise.

    Returns:
        `timestep`, float32, of the shape of `sigma`; NaN where a tensor's sigma is outside the schedule.

    Raises:
        ValueError: A Python scalar outside the schedule, or a scheduler that is not variance-preserving.
    """
    sigmas = _sigmas(scheduler)
    if not isinstance(sigma, Tensor):
        check_sigma(scheduler, sigma)
        # A float written with a few digits may miss the schedule's float32 ends by rounding.
        sigma = min(max(float(sigma), sigmas[0].item()), sigmas[-1].item())
    s = torch.as_tensor(sigma, dtype=torch.float32)
    sigmas = sigmas.to(s.device)
    last = len(sigmas) - 1
    low = (torch.searchsorted(sigmas, s.detach().contiguous(), right=True) - 1).clamp(0, max(last - 1, 0))
    high = (low + 1).clamp(max=last)
    start, stop = sigmas.take(low).double().log(), sigmas.take(high).double().log()
    fraction = torch.where(s == sigmas.take(low), 0.0, (s.double().log() - start) / (stop - start))
    fraction = torch.where(s == sigmas.take(high), 1.0, fraction) * (high > low)
    timestep = (low + fraction).float()
    return torch.where((s >= sigmas[0]) & (s <= sigmas[-1]), timestep, torch.nan)


def check_sigma(scheduler: Any, sigma: float) -> None:
    """Raise `ValueError` unless the Python scalar `sigma` is a level of the schedule (to five digits)."""
    low, high = sigma_range(scheduler)
    inside = low <= sigma <= high or math.isclose(sigma, low, rel_tol=1e-5) or math.isclose(sigma, high, rel_tol=1e-5)
    if not inside:
        raise ValueError(
            f"sigma {sigma} is outside the schedule of {type(scheduler).__name__}: allowed are {low:.5g} to {high:.5g} "
            "(standard deviation of the noise on images in [-1, 1])."
        )


def _coefficients(sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Return `sqrt(abar)` and `sqrt(1 - abar)` at `sigma`; exact at both ends, sigma 0 and infinity."""
    return torch.rsqrt(1 + sigma.square()), torch.rsqrt(1 + sigma.square().reciprocal())


def _as_level(sigma: float | Tensor, clean: Tensor) -> Tensor:
    """Return `sigma` as a float32 (B,) tensor on the images' device."""
    return torch.as_tensor(sigma, dtype=torch.float32, device=clean.device).expand(clean.shape[0])


def _per_image(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1))


def add_noise(scheduler: Any, clean: Tensor, noise: Tensor, sigma: float | Tensor) -> tuple[Tensor, Tensor]:
    """Make the denoiser's input at a noise level.

    Reads no tensor's values: it neither synchronises with a device nor breaks a compiled graph.

    Args:
        scheduler: A diffusers VP scheduler; its own `add_noise` and its current sampling grid play no part.
        clean: Images (B, C, H, W) in [-1, 1].
        noise: Standard-normal noise of the same shape.
        sigma: Noise level, scalar or (B,); infinite means pure noise.

    Returns:
        The input `sqrt(abar) * clean + sqrt(1 - abar) * noise` (B, C, H, W) in the dtype of `clean`, computed in
        float32, and its float32 timestep (B,); NaN where a tensor's sigma is outside the schedule.
    """
    timestep = sigma_to_timestep(scheduler, sigma).to(clean.device).expand(clean.shape[0])
    signal, spread = (_per_image(c, clean) for c in _coefficients(_as_level(sigma, clean)))
    return (signal * clean.float() + spread * noise.float()).to(clean.dtype), timestep


def prediction_type(scheduler: Any) -> str:
    """Return what the denoiser predicts: `epsilon` (the noise), `sample` (the clean image) or `v_prediction`.

    Raises:
        ValueError: Another prediction type, or noise prediction under zero-terminal SNR, where at pure noise the
            network's input is its target and says nothing of the image (Lin et al. 2023, arXiv 2305.08891).
    """
    kind = scheduler.config.prediction_type
    allowed = ("epsilon", "sample", "v_prediction")
    if kind not in allowed:
        raise ValueError(f"prediction_type {kind!r} is not supported: allowed are {', '.join(allowed)}.")
    if kind == "epsilon" and math.isinf(sigma_range(scheduler)[1]):
        raise ValueError(
            "prediction_type 'epsilon' cannot work with zero-terminal SNR (`rescale_betas_zero_snr`): "
            "set the scheduler's prediction_type to 'v_prediction' or 'sample'."
        )
    return kind


def prediction_target(scheduler: Any, clean: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
    """Return what a perfect denoiser would output, float32 (B, C, H, W), given `add_noise`'s input.

    Velocity is `sqrt(abar) * noise - sqrt(1 - abar) * clean` (Salimans and Ho 2022, arXiv 2202.00512).
    """
    kind = prediction_type(scheduler)
    clean, noise = clean.float(), noise.float()
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return clean
    signal, spread = (_per_image(c, clean) for c in _coefficients(_as_level(sigma, clean)))
    return signal * noise - spread * clean


def sample_training_sigma(scheduler: Any, batch_size: int, device: Any = None, generator: Any = None) -> Tensor:
    """Draw the levels (batch_size,) that training uses: for VP, timesteps uniform over the schedule (Ho et al.)."""
    sigmas = _sigmas(scheduler).to(device)
    return sigmas[torch.randint(len(sigmas), (batch_size,), device=device, generator=generator)]


def fed_timestep(denoiser: torch.nn.Module, timestep: Tensor) -> Tensor:
    """Return `timestep` in the type that the denoiser's embedding takes.

    float32 where the embedding is a formula; a learned embedding has one row for every trained timestep, so there the
    nearest integer.
    """
    if getattr(denoiser.config, "time_embedding_type", None) == "learned":
        return timestep.round().long()
    return timestep


def indexed_noise(shape: tuple[int, ...], indices: Any, seed: int = 0, view: int = 0) -> Tensor:
    """Draw standard-normal noise that depends on (seed, image index, view) alone.

    Batch size, order and number of processes play no part, so that cached features can be made in any pieces.

    Args:
        shape: Shape of one image, (C, H, W), or of several draws for it, (draws, C, H, W).
        indices: The images' non-negative indices in their data set, N integers.
        seed: The noise seed.
        view: Number of the draw, where an image gets several.

    Returns:
        float32 (N, *shape) on the CPU.
    """
    draws = [np.random.default_rng([seed, view, int(i)]).standard_normal(shape, dtype=np.float32) for i in indices]
    return torch.from_numpy(np.stack(draws))
