"""Randomness by index: what is drawn for an image depends on (seed, view, its index, purpose) alone.

Batch size, order and number of processes play no part, so that data sets can be gone through in any pieces.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..augment import mirror

# Purposes: draws for different ones have nothing to do with each other.
NOISE = 0  # of the denoiser's input
CHANGES = 1  # of the image itself: mirroring and cropping
POSTERIOR = 2  # of a VAE, which gives a distribution of latents
SAMPLING = 4  # of the noise that sampling starts from


@contextlib.contextmanager
def separate_randomness(seed: int | None = None) -> Iterator[None]:
    """Leave Python's, NumPy's and torch's global generators as they were; inside they begin with `seed`, or go on."""
    python = random.getstate()
    numpy = np.random.get_state()
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        try:
            if seed is not None:
                random.seed(seed)
                np.random.seed(seed)
                torch.manual_seed(seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def seed_by(*numbers: int) -> None:
    """Make what torch's global generators draw from here on depend on these numbers alone."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))


def index_generator(seed: int, view: int, index: int, purpose: int = NOISE) -> np.random.Generator:
    """Return the random generator of an image, by its non-negative index in its data set, for one view and purpose."""
    return np.random.default_rng([seed, view, int(index), *([purpose] if purpose else [])])


def indexed_noise(shape: tuple[int, ...], indices: Any, seed: int = 0, view: int = 0, purpose: int = NOISE) -> Tensor:
    """Draw standard-normal noise (N, *shape) for the N images of these indices in their data set, float32, on the CPU.

    `shape` is that of an image, (C, H, W), or of several draws for it, (draws, C, H, W).
    """
    generators = [index_generator(seed, view, i, purpose) for i in indices]
    return torch.from_numpy(np.stack([g.standard_normal(shape, dtype=np.float32) for g in generators]))


def augment_view(images: Tensor, indices: Iterable[int], seed: int, view: int, flip: bool, crop_padding: int) -> Tensor:
    """Return images, half of them mirrored and all cropped at random; draws depend on (seed, index, view) alone.

    Images are (B, C, H, W) in [-1, 1], before and after; `crop_padding` pixels are added on each side before cropping.
    These are black, as in torchvision's `RandomCrop`; otherwise the changes are those of `random_changes`.
    """
    height, width = images.shape[-2:]
    padded = F.pad(images, [crop_padding] * 4, value=-1.0)
    views = []
    for i, image in zip(indices, padded, strict=True):
        rng = index_generator(seed, view, i, CHANGES)
        mirrored = flip and rng.random() < 0.5
        top, left = rng.integers(0, 2 * crop_padding + 1, size=2)
        crop = image[:, top : top + height, left : left + width]
        views.append(mirror(crop) if mirrored else crop)
    return torch.stack(views)
