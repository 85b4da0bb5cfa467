"""Randomness by index: what is drawn for an image depends on (seed, view, its index, purpose) alone.

Batch size, order, device and number of processes play no part, so that data sets can be gone through in any pieces.

Numbers come from splitmix64 (Steele, Lea and Flood 2014, doi:10.1145/2714064.2660195), which maps a counter to 64
random bits: a key is hashed from seed, purpose, view and index, and the word `j` of an image is the hash of its key
plus `j` steps of the counter. Halves of a word make two uniform numbers, or two normal ones by the method of Box and
Muller (1958). All is done in torch, for a whole batch at once and on any device; bits are equal everywhere, and numbers
to rounding.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..augment import cropped, mirror

GENERATOR = "splitmix64"  # what caches of random things are told apart by

# Purposes: draws for different ones have nothing to do with each other.
NOISE = 0  # of the denoiser's input
CHANGES = 1  # of the image itself: mirroring and cropping
POSTERIOR = 2  # of a VAE, which gives a distribution of latents
TRAINING = 3  # of whatever a network is trained with
SAMPLING = 4  # of the noise that sampling starts from
CORRUPTION = 5  # of noise on images before anything sees them

_WORD = 2**64
_STEP = 0x9E3779B97F4A7C15  # of the counter
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_IN_CACHE = 2**15  # counters that a processor works on at a time


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


def indexed_noise(
    shape: tuple[int, ...], indices: Any, seed: int = 0, view: int = 0, purpose: int = NOISE,
    device: torch.device | str = "cpu",
) -> Tensor:  # fmt: skip
    """Draw standard-normal noise (N, *shape), float32, for the N images of these indices in their data set.

    `shape` is that of an image, (C, H, W), or of several draws for it, (draws, C, H, W), of which the first does not
    depend on how many there are. Indices are whole numbers; those of a `range` need not be copied to the device.
    """
    return _normal(_keys(_places(indices, device), seed, purpose, view), shape)


def augment_view(images: Tensor, indices: Any, seed: int, view: int, flip: bool, crop_padding: int) -> Tensor:
    """Return images, half of them mirrored and all cropped at random; draws depend on (seed, index, view) alone.

    Images are (B, C, H, W) in [-1, 1], before and after; `crop_padding` pixels are added on each side before cropping.
    These are black, as in torchvision's `RandomCrop`; otherwise the changes are those of `random_changes`.

    Raises:
        ValueError: Another number of indices than of images.
    """
    places = _places(indices, images.device)
    if len(places) != len(images):
        raise ValueError(f"There are {len(images)} images, but {len(places)} indices: give one for each image.")
    shares = _uniform(_keys(places, seed, CHANGES, view), (3,))
    top, left = ((shares[:, 1:] * (2 * crop_padding + 1)).long()).unbind(1)
    crops = cropped(F.pad(images, [crop_padding] * 4, value=-1.0), top, left, *images.shape[-2:])
    return torch.where(shares[:, :1, None, None] < 0.5, mirror(crops), crops) if flip else crops


class RowDraws:
    """Draws for some rows, in place of a `torch.Generator` where functions take one.

    What is drawn for a row depends on (seed, view, its index) and on how often numbers were drawn for it before. In
    training, an image's index is its number in the whole run, so that it plays no part how the images of a step are
    shared among batches and processes.
    """

    def __init__(self, seed: int, indices: Any, device: torch.device | str, view: int = 0):
        self.keys = _keys(_places(indices, device), seed, TRAINING, view)
        self.drawn = 0  # calls so far

    def uniform(self, shape: tuple[int, ...]) -> Tensor:
        """Draw numbers between 0 and 1, both excluded, float32, of a shape whose first side is the number of rows."""
        return _uniform(self._next(shape), shape[1:])

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """Draw standard-normal numbers, likewise."""
        return _normal(self._next(shape), shape[1:])

    def _next(self, shape: tuple[int, ...]) -> Tensor:
        if shape[0] != len(self.keys):
            raise ValueError(
                f"Numbers of shape {tuple(shape)} are asked for: these are draws for {len(self.keys)} rows."
            )
        self.drawn += 1
        return _hashed_(self.keys + _signed(self.drawn * _STEP))


def _places(indices: Any, device: torch.device | str) -> Tensor:
    if isinstance(indices, range):
        return torch.arange(indices.start, indices.stop, indices.step, device=device)
    return torch.as_tensor(indices, dtype=torch.int64).to(device, non_blocking=True)


def _signed(word: int) -> int:
    """Return the whole number that has the last 64 bits of another one, as torch's int64 reads them."""
    word %= _WORD
    return word - _WORD if word >= _WORD // 2 else word


def _hash(word: int) -> int:
    """Return what `_hashed_` makes of a number, from 0 to 2^64 - 1."""
    word = (word ^ (word >> 30)) * _FACTORS[0] % _WORD
    word = (word ^ (word >> 27)) * _FACTORS[1] % _WORD
    return word ^ (word >> 31)


def _hashed_(words: Tensor) -> Tensor:
    """Replace words, int64, by random ones: splitmix64's output for each as the counter."""
    for bits, factor in ((30, _FACTORS[0]), (27, _FACTORS[1]), (31, 1)):
        # The mask takes away the copies of the sign, which an arithmetic shift leaves.
        words ^= (words >> bits).bitwise_and_(2 ** (64 - bits) - 1)
        if factor != 1:
            words *= _signed(factor)
    return words


def _keys(indices: Tensor, *numbers: int) -> Tensor:
    """Return a key, int64 (N,), for each index and these numbers, which are the same for all."""
    key = 0
    for number in numbers:
        key = _hash((key + _STEP + int(number)) % _WORD)  # NumPy's would overflow
    return _hashed_((indices + 1) * _signed(_STEP) + _signed(key))


def _bits(keys: Tensor, count: int) -> Tensor:
    """Return random numbers of 32 bits, int32 (N, count, 2)."""
    counters = torch.arange(1, count + 1, device=keys.device) * _signed(_STEP)
    return _hashed_(keys[:, None] + counters).view(torch.int32).unflatten(1, (count, 2))


def _uniform(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    count = math.prod(shape)
    bits = _bits(keys, (count + 1) // 2).flatten(1)[:, :count]
    # 23 bits and a half: float32 can hold the sum, and neither 0 nor 1 comes.
    return ((bits & (2**23 - 1)) + 0.5).mul_(2.0**-23).reshape(len(keys), *shape)


def _normal(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Draw normal numbers; a processor draws those of some rows at a time, which its cache can hold."""
    count = math.prod(shape)
    pairs = (count + 1) // 2
    drawn = torch.empty(len(keys), pairs, 2, device=keys.device)
    rows = max(1, _IN_CACHE // pairs) if keys.device.type == "cpu" else max(1, len(keys))
    for some, room in zip(keys.split(rows), drawn.split(rows), strict=True):
        bits = _bits(some, pairs)
        # -2 log of a uniform number between 0 and 1, of 31 bits: the radius is at most 6.7.
        radius = ((bits[..., 0] & (2**31 - 1)) + 0.5).mul_(2.0**-31).log_().mul_(-2).sqrt_()
        angle = bits[..., 1] * (math.pi * 2.0**-31)
        torch.mul(radius, angle.cos(), out=room[..., 0])
        torch.mul(radius, angle.sin_(), out=room[..., 1])
    return drawn.flatten(1)[:, :count].reshape(len(keys), *shape)
