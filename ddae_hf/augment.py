"""Changes to training images: mirrors, crops, mixtures, and augmentation that the network is told about.

All functions take and return images (B, C, H, W), floats in [-1, 1]; `random_flip`, `random_crop` and `mixup` take
latents too. Random numbers come from torch's global generators, which the training code seeds, unless a function is
given a generator of its own. What happens to an image then depends on its batch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .generators import Generator, normal, uniform

NUM_LABELS = 9
_SCALE = 2**0.2  # factor of one standard deviation of scaling and stretching
_SHIFT = 1 / 8  # one standard deviation of shifting, in image sizes


def mirror(images: Tensor) -> Tensor:
    """Return images (B, C, H, W) mirrored left to right."""
    return images.flip(-1)


def reduced(images: Tensor, side: int) -> Tensor:
    """Return images (B, C, side, side): each pixel is the mean of those of (B, C, H, W) that it covers."""
    return F.interpolate(images, side, mode="area")


def random_flip(images: Tensor, generator: Generator = None) -> Tensor:
    """Mirror each image (B, C, H, W) left to right with probability one half."""
    mirrored = uniform((len(images), 1, 1, 1), images.device, generator) < 0.5
    return torch.where(mirrored, mirror(images), images)


def random_crop(images: Tensor, padding: int, generator: Generator = None) -> Tensor:
    """Shift each image (B, C, H, W) by up to `padding` pixels, uniformly; reflections fill its edges.

    Wide ResNets are trained in this way (Zagoruyko and Komodakis 2016, arXiv 1605.07146). `augment_view` fills with
    black instead.

    Raises:
        ValueError: A padding that is negative, or not below both sides of the images.
    """
    height, width = images.shape[-2:]
    if not 0 <= padding < min(height, width):
        raise ValueError(
            f"The padding is {padding}: it must be at least 0, and smaller than both sides of the images, which have "
            f"{height}x{width} pixels."
        )
    padded = F.pad(images, [padding] * 4, mode="reflect")
    shares = uniform((len(images), 2), images.device, generator)
    top, left = (shares * (2 * padding + 1)).long().unbind(1)
    return cropped(padded, top, left, height, width)


def cropped(images: Tensor, top: Tensor, left: Tensor, height: int, width: int) -> Tensor:
    """Return the part (B, C, height, width) of each image (B, C, H, W) that begins at its own row and column (B,)."""
    count, channels = images.shape[:2]
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = left[:, None] + torch.arange(width, device=images.device)
    image = torch.arange(count, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[:, None, None]
    return images[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def random_changes(images: Tensor, flip: bool, crop_padding: int, generator: Generator = None) -> Tensor:
    """Change images (B, C, H, W) by `random_flip`, if `flip`, then by `random_crop`, if `crop_padding` is not 0.

    No random numbers are drawn for a change that is not asked for.
    """
    images = random_flip(images, generator) if flip else images
    return random_crop(images, crop_padding, generator) if crop_padding else images


def mixup(
    images: Tensor, targets: Tensor, others: Tensor, other_targets: Tensor, shares: Tensor
) -> tuple[Tensor, Tensor]:
    """Average each image with another one, and their targets in the same proportion.

    This is mixup (Zhang et al. 2018, arXiv 1710.09412) of images (B, C, H, W) and probabilities (B, K), both float32.
    `shares` (B,), in [0, 1], are those of `images` in the mixtures; the paper draws them from Beta(alpha, alpha).
    """
    mixed = torch.lerp(others, images, shares[:, None, None, None])
    return mixed, torch.lerp(other_targets, targets, shares[:, None])


def _matrix(rows: list[list[Any]], like: Tensor) -> Tensor:
    """Return 3x3 matrices (B, 3, 3) whose entries are tensors (B,) or numbers."""
    entries = [v if isinstance(v, Tensor) else torch.full_like(like, v) for row in rows for v in row]
    return torch.stack(entries, dim=-1).reshape(-1, 3, 3)


def _scaling(x: Any, y: Any, like: Tensor) -> Tensor:
    return _matrix([[x, 0, 0], [0, y, 0], [0, 0, 1]], like)


def _rotation(angle: Tensor) -> Tensor:
    cos, sin = angle.cos(), angle.sin()
    return _matrix([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]], angle)


def augment(images: Tensor, probability: float = 0.12, generator: Generator = None) -> tuple[Tensor, Tensor]:
    """Transform images at random, and say how: augmentation that does not leak into what the network generates.

    This follows Karras et al. 2022 (arXiv 2206.00364, appendix F.2, table 6). Each image is mirrored left to right half
    of the time, and with a small probability each is mirrored upside down, scaled, rotated, stretched along a random
    direction, and shifted. Nine numbers say what was done. Zeros say that nothing was done; the network is given zeros
    when it generates images and when its hidden states are read.

    The paper filters with wavelets and learns a linear map of the numbers. Here images are resampled once, bicubically,
    and the numbers are added to the time embedding, so that a stock `UNet2DModel` takes them without new weights.

    Args:
        images: Images (B, C, H, W) in [-1, 1], of equal height and width.
        probability: Probability of each transformation except the mirror left to right. At 0 nothing is changed at all.
        generator: Random generator on the images' device.

    Returns:
        The images (B, C, H, W), mirrored at their borders where something beyond them comes into view, and labels
        (B, 9), float32: mirrored left to right (0 or 1); upside down (0 or 1); logarithm of the scale in units of its
        deviation; cosine minus one and sine of the rotation; logarithm of the stretch in units of its deviation, times
        cosine and sine of its direction; shift to the right and downwards in units of its deviation.

    Raises:
        ValueError: A probability outside [0, 1], or images that are not square.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"The augmentation's probability is {probability}: it must be between 0 and 1.")
    if images.shape[-1] != images.shape[-2]:
        raise ValueError(f"Images of {images.shape[-2]}x{images.shape[-1]} pixels came: augmentation needs squares.")

    def share() -> Tensor:
        return uniform((len(images),), images.device, generator)

    def deviations() -> Tensor:
        return normal((len(images),), images.device, generator)

    def sometimes(values: Tensor, chance: float = probability) -> Tensor:
        return torch.where(share() < chance, values, 0.0)

    mirrored = sometimes((share() < 0.5).float(), 1.0 if probability else 0.0)
    upside_down = sometimes((share() < 0.5).float())
    scale = sometimes(deviations())
    angle = sometimes((2 * share() - 1) * math.pi)
    stretch, direction = sometimes(deviations()), (2 * share() - 1) * math.pi
    shifted = sometimes(torch.ones_like(scale))
    right, down = shifted * deviations(), shifted * deviations()
    labels = torch.stack(
        [
            mirrored, upside_down, scale, angle.cos() - 1, angle.sin(),
            stretch * direction.cos(), stretch * direction.sin(), right, down,
        ], dim=1,
    )  # fmt: skip
    # These matrices say where a pixel comes from, in coordinates from -1 to 1 to the right and downwards: they undo the
    # changes, the last one first.
    origin = (
        _scaling(1, 1 - 2 * upside_down, scale)
        @ _scaling(_SCALE**-scale, _SCALE**-scale, scale)
        @ _rotation(-angle)
        @ _rotation(direction) @ _scaling(_SCALE**-stretch, _SCALE**stretch, scale) @ _rotation(-direction)
        @ _matrix([[1, 0, -2 * _SHIFT * right], [0, 1, -2 * _SHIFT * down], [0, 0, 1]], scale)
    )  # fmt: skip
    images = torch.where(mirrored[:, None, None, None] > 0, mirror(images), images)
    return _resample(images, origin, labels[:, 1:].any(dim=1)), labels


def _resample(images: Tensor, origin: Tensor, changed: Tensor) -> Tensor:
    """Fetch pixels from where matrices (B, 3, 3) say; images that are not `changed` (B,) stay exactly as they are."""
    places = F.affine_grid(origin.float()[:, :2], list(images.shape), align_corners=False)
    moved = F.grid_sample(images.float(), places, mode="bicubic", padding_mode="reflection", align_corners=False)
    # Bicubic interpolation overshoots at edges.
    return torch.where(changed[:, None, None, None], moved.clamp(-1, 1).to(images.dtype), images)


def embed_labels(labels: Tensor, width: int) -> Tensor:
    """Pad labels (B, 9) with zeros to (B, width), to be added to the time embedding."""
    return F.pad(labels, (0, width - labels.shape[1]))
