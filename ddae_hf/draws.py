"""Randomness by index: what is drawn for an image depends on (seed, view, its index, purpose) alone.

Batch size, order and number of processes play no part, so that data sets can be gone through in any pieces.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

# Purposes: draws for different ones have nothing to do with each other.
NOISE = 0  # of the denoiser's input
CHANGES = 1  # of the image itself: mirroring and cropping
POSTERIOR = 2  # of a VAE, which gives a distribution of latents
SAMPLING = 4  # of the noise that sampling starts from


def index_generator(seed: int, view: int, index: int, purpose: int = NOISE) -> np.random.Generator:
    """Return the random generator of an image.

    Args:
        seed: The seed.
        view: Number of the draw, where an image gets several.
        index: The image's non-negative index in its data set.
        purpose: What the draws are for.
    """
    return np.random.default_rng([seed, view, int(index), *([purpose] if purpose else [])])


def indexed_noise(shape: tuple[int, ...], indices: Any, seed: int = 0, view: int = 0, purpose: int = NOISE) -> Tensor:
    """Draw standard-normal noise of (seed, view, image index, purpose).

    Args:
        shape: Shape of one image, (C, H, W), or of several draws for it, (draws, C, H, W).
        indices: The images' non-negative indices in their data set, N integers.
        seed: The noise seed.
        view: Number of the draw, where an image gets several.
        purpose: What the noise is for.

    Returns:
        float32 (N, *shape) on the CPU.
    """
    generators = [index_generator(seed, view, i, purpose) for i in indices]
    return torch.from_numpy(np.stack([g.standard_normal(shape, dtype=np.float32) for g in generators]))
