"""Mean denoising errors of images under each class, in stages: after each, the classes of large errors are left out.

A draw is of noise and of a noise level. For an image, all classes share it, and it depends on (seed, image index, the
draw's place among all) alone: neither batches nor stages play a part. See Li et al. 2023, arXiv 2303.16203.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..diffusion import Diffusion
from ..families import Family
from .draws import indexed_noise
from .images import noise_view
from .told_classes import ToldClasses


class Stage(NamedTuple):
    """Draws that are made of the classes that are left."""

    places: list[int]  # of the draws among all, which are in the order of their levels
    ends: list[int]  # numbers of draws, of all stages so far, after which answers are taken
    told: int  # classes that are left before it
    kept: int  # classes that are left after it


def evenly(places: Sequence[int], count: int) -> list[int]:
    """Return `count` of some places, evenly spaced."""
    return [places[(2 * number + 1) * len(places) // (2 * count)] for number in range(count)]


def halved(places: Sequence[int]) -> list[int]:
    """Return places in an order in which the first half, of it the first half, and so on, are evenly spaced."""
    if len(places) < 2:
        return list(places)
    first = evenly(places, len(places) // 2)
    return [*halved(first), *(place for place in places if place not in first)]


def planned(stage_draws: Sequence[int], stage_classes: Sequence[int], num_classes: int) -> list[Stage]:
    """Return the stages: the draws of all stages so far are evenly spaced, and answers are taken at about half of each.

    Of 500 draws the first 50 are numbers 5, 15, 25 and so on, as those of Li et al. 2023 are.
    """
    by_end = [list(range(stage_draws[-1]))]
    for count in reversed(stage_draws[:-1]):
        by_end.insert(0, evenly(by_end[0], count))
    stages: list[Stage] = []
    made: set[int] = set()
    told = num_classes
    for chosen, kept in zip(by_end, stage_classes, strict=True):
        new = [place for place in chosen if place not in made]
        sizes = [len(new) >> halvings for halvings in reversed(range(len(new).bit_length()))]
        ends = [len(made) + size for size in sizes if size >= len(made) or size == len(new)]
        stages.append(Stage(halved(new), ends, told, kept))
        made.update(new)
        told = kept
    return stages


def calls_of(stages: Sequence[Stage]) -> list[int]:
    """Return the evaluations of the network for an image up to each of the stages' ends."""
    found = []
    before = 0
    made = 0
    for stage in stages:
        found += [before + (end - made) * stage.told for end in stage.ends]
        before = found[-1]
        made = stage.ends[-1]
    return found


def spaced_levels(family: Family, count: int, sigmas: Sequence[float] | None = None) -> Tensor:
    """Return the noise level (count,) of each draw, ascending, float32.

    They are evenly spaced in shares of the family's own training distribution. If `sigmas` are given, the draws have
    these in equal shares, to within rounding.
    """
    if sigmas is not None:
        ascending = torch.tensor(sorted(sigmas), dtype=torch.float32)
        return ascending[torch.arange(count) * len(ascending) // count]
    # A share may fall between two timesteps of a schedule, where rounding must not choose.
    shares = (torch.arange(count, dtype=torch.float64) + 0.5) / count + 1e-9
    return family.usual(shares).float()


@dataclass
class ClassErrors:
    """Computes errors under classes.

    Attributes:
        diffusion: The denoiser, in evaluation mode, with its scheduler.
        told: What it is told of each class.
        stages: The draws, and how many classes are left.
        levels: The noise level of each draw, on the processor.
        error: `"l1"`, the mean of absolute values, or `"l2"`, of squares.
        batch_size: Noisy images, each with a class, that the network is given at a time.
        seed: Seed of the noise.
    """

    diffusion: Diffusion
    told: ToldClasses
    stages: list[Stage]
    levels: Tensor
    error: str
    batch_size: int
    seed: int

    def under_classes(self, clean: Tensor, indices: Sequence[int]) -> Tensor:
        """Return mean errors (B, ends, K) of images under K classes after each of the stages' ends, float64.

        `clean` are images (B, C, H, W) in [-1, 1], or scaled latents, and `indices` their numbers in the data set. The
        result is on the processor, and NaN for the classes that were left out. Errors that are not finite raise
        `ValueError`.
        """
        left = torch.arange(self.stages[0].told).expand(len(clean), -1)
        sums = torch.zeros(left.shape, dtype=torch.float64)
        found = []
        made = 0
        for stage in self.stages:
            errors = torch.cat(self._of_draws(clean, indices, stage.places, left)).cpu().double()
            if not errors.isfinite().all():
                raise ValueError("Some errors are not finite: the network overflows. Run it in float32.")
            so_far = sums.gather(1, left) + errors.cumsum(0)  # (draws, B, classes that are left)
            for end in stage.ends:
                means = torch.full(sums.shape, torch.nan, dtype=torch.float64)
                found.append(means.scatter_(1, left, so_far[end - made - 1] / end))
            sums.scatter_(1, left, so_far[-1])
            smallest = so_far[-1].argsort(dim=1, stable=True)[:, : stage.kept]
            left = left.gather(1, smallest).sort(1).values
            made = stage.ends[-1]
        return torch.stack(found, 1)

    def _of_draws(self, clean: Tensor, indices: Sequence[int], places: Sequence[int], left: Tensor) -> list[Tensor]:
        """Return errors (some draws, B, R), float32, of draws under the classes (B, R) that are left of each image."""
        at_once = max(1, self.batch_size // left.numel())
        found = []
        for start in range(0, len(places), at_once):
            some = places[start : start + at_once]
            views = [noise_view(True, place) for place in some]
            noise = [indexed_noise(clean.shape[1:], indices, self.seed, view, device=clean.device) for view in views]
            sigma = self.levels[list(some)].repeat_interleave(len(clean))
            repeated = clean.repeat(len(some), 1, 1, 1)
            classes = left.repeat(len(some), 1)
            errors = self._of_noisy(repeated, torch.cat(noise), sigma, classes)
            found.append(errors.unflatten(0, (len(some), len(clean))))
        return found

    def _of_noisy(self, clean: Tensor, noise: Tensor, sigma: Tensor, classes: Tensor) -> Tensor:
        """Return the errors (N, R) of N images, each with its noise and level, under R classes (N, R) of its own."""
        family = self.diffusion.family
        noisy, timestep = family.noisy(clean, noise, sigma)
        target = family.target(clean, noise, sigma)
        found = []
        for cells in torch.arange(classes.numel()).split(self.batch_size):
            rows = (cells // classes.shape[1]).to(clean.device)
            condition = self.told.condition(classes.flatten()[cells])
            conditions = self.diffusion.conditions(condition, len(cells), clean.device)
            answer = self.diffusion.predict(noisy[rows], timestep[rows], conditions)[:, : clean.shape[1]]
            difference = answer - target[rows]
            each = difference.abs() if self.error == "l1" else difference.square()
            found.append(each.flatten(1).mean(1))
        return torch.cat(found).unflatten(0, classes.shape)
