"""Latents: the small tensors that stand for images where a denoiser does not work on pixels.

A diffusers `AutoencoderKL` (Rombach et al. 2022, arXiv 2112.10752) maps images `x` (B, C, H, W) in [-1, 1] to a normal
distribution over `u` (B, c, h, w) with mean `mu` and deviation `s`, and maps `u` back to images. The denoiser is fed
the *scaled latents* `z = (u - shift_factor) * scaling_factor` or, where the VAE has a mean and a deviation for each
channel, `z = (u - latents_mean) * scaling_factor / latents_std`, as diffusers' Stable Diffusion XL pipelines have it.
Their variance is near one; noise levels are in their unit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import torch
from torch import Tensor

from .building import building, short

VAES = ("AutoencoderKL",)
SCALES = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")  # the options that scale latents
AT_ONCE = 2**20  # pixels, as of 16 images of 256 x 256: a layer of Stable Diffusion's encoder makes 0.5 GiB of them


def check_vae_class(name: str | None, where: str = "the vae") -> None:
    """Raise `ValueError` unless `name` is a class of VAE that this package supports."""
    if not isinstance(name, str) or name not in VAES:
        raise ValueError(f"{where} is of class {short(name)}, which is not supported: allowed is {', '.join(VAES)}.")


def build_vae(config: Mapping[str, Any]) -> Any:
    """Build a randomly initialised VAE from its diffusers config (with `_class_name`)."""
    check_vae_class(config.get("_class_name"))
    cls = getattr(diffusers, config["_class_name"])
    with building("vae", config, cls):
        vae = cls.from_config(config)
        _check_scales(vae.config)
        return vae


def encode(vae: Any, pixel_values: Tensor, noise: Tensor | None = None) -> Tensor:
    """Return the scaled latents (B, c, h, w), float32, of images (B, C, H, W) in [-1, 1].

    Standard-normal `noise` (B, c, h, w) gives a draw, `u = mu + s * noise`; without it the mean is taken. Images are
    encoded `AT_ONCE` pixels at a time, which bounds the memory.
    """
    posteriors = [vae.encode(part).latent_dist for part in _pieces(pixel_values.to(vae.dtype))]
    latents = torch.cat([posterior.mean for posterior in posteriors]).float()
    if noise is not None:
        deviations = torch.cat([posterior.std for posterior in posteriors]).float()
        latents = latents + deviations * noise.to(latents.device)
    if (scales := _of_channels(vae.config, latents)) is not None:
        mean, std = scales
        return (latents - mean) * vae.config.scaling_factor / std
    return (latents - (vae.config.shift_factor or 0)) * vae.config.scaling_factor


def _of_channels(config: Any, latents: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the VAE's mean and deviation of each channel, (1, c, 1, 1), where it has them."""
    if config.get("latents_mean") is None:
        return None
    mean, std = (latents.new_tensor(config[name]).reshape(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
    return mean, std


def _pieces(images: Tensor) -> Sequence[Tensor]:
    """Return images in pieces that are encoded at once; in a graph that is compiled or exported, they are one piece."""
    if torch.compiler.is_compiling():
        return [images]
    return images.split(max(1, AT_ONCE // (images.shape[-2] * images.shape[-1])))


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Return the images (B, C, H, W), float32, roughly in [-1, 1], that scaled latents (B, c, h, w) stand for."""
    if (scales := _of_channels(vae.config, latents)) is not None:
        mean, std = scales
        unscaled = latents * std / vae.config.scaling_factor + mean
    else:
        unscaled = 1 / vae.config.scaling_factor * latents + (vae.config.shift_factor or 0)
    return vae.decode(unscaled.to(vae.dtype)).sample.float()


def downsampling(config: Any) -> int:
    """Return how many pixels a latent's side stands for, from the VAE's diffusers config."""
    widths = config.get("block_out_channels") or [64]  # one level is diffusers' default
    if not isinstance(widths, (list, tuple)):
        raise ValueError(f"The vae's block_out_channels is {short(widths)}: it must be a list of widths, one a level.")
    return 2 ** (len(widths) - 1)


def check_vae(config: Any, denoiser: Any) -> None:
    """Raise `ValueError` unless a VAE's latents, as its complete diffusers config describes them, suit a denoiser."""
    if config["latent_channels"] != denoiser["in_channels"]:
        raise ValueError(
            f"The vae has latents of {config['latent_channels']} channels, but the denoiser takes "
            f"{denoiser['in_channels']}: give the vae that the denoiser was trained with."
        )
    _check_scales(config)


def check_images(images: Tensor, expected: tuple[int, int, int]) -> None:
    """Raise `ValueError` for images that are not floats (B, C, H, W) with the channels, height and width expected."""
    if images.ndim != 4 or tuple(images.shape[1:]) != expected:
        raise ValueError(
            f"pixel_values has shape {tuple(images.shape)}: this model takes (batch, {expected[0]}, {expected[1]}, "
            f"{expected[2]}). `DDAEImageProcessor.from_pretrained` of its checkpoint prepares them."
        )
    if not images.is_floating_point():
        raise ValueError(f"pixel_values is of type {images.dtype}: it must be floats in [-1, 1].")


def _check_scales(config: Any) -> None:
    """Raise `ValueError` unless a VAE's channels are scaled in one way, each by a mean and a deviation or none."""
    mean, std = (config.get(name) for name in ("latents_mean", "latents_std"))
    if mean is None and std is None:
        return
    if mean is None or std is None or config.get("shift_factor"):
        raise ValueError(
            f"The vae has latents_mean {short(mean)}, latents_std {short(std)} and shift_factor "
            f"{short(config.get('shift_factor'))}: give latents_mean and latents_std together and without a shift, or "
            "neither."
        )
    for name, values in (("latents_mean", mean), ("latents_std", std)):
        numbers = isinstance(values, (list, tuple)) and all(type(value) in (int, float) for value in values)
        lowest = 0 if name == "latents_std" else -math.inf
        if not numbers or len(values) != config["latent_channels"] or not all(lowest < v < math.inf for v in values):
            kind = "positive numbers" if name == "latents_std" else "numbers"
            raise ValueError(
                f"The vae's {name} is {short(values)}: it must be {kind}, one for each of its "
                f"{config['latent_channels']} channels."
            )
