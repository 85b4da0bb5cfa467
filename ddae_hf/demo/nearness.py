"""Which training images are nearest to an image by its features, and whether any is near enough for an answer.

A classifier names one of its classes whatever it is shown. Its features tell more: those of an image unlike all
training images lie far from theirs. With features `f` (C,), their mean `m` and their deviation `s` over the training
images, and the features `g` of these,

    distance(f, g) = |(f - m) / s - (g - m) / s|,

an image is strange where its k-th nearest training image is farther away than that of 99 in 100 images that were not
trained on: deep nearest neighbours of Sun et al. 2022 (arXiv 2204.06507), on standardised features, which a linear
probe reads too.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEIGHBOUR = 5  # k
SHARE = 0.99  # of other images that are not strange


class Nearness:
    """Distances to training images, by features.

    Args:
        train: Features (N, C) of the training images.
        others: Features (M, C) of images of the same kind that were not trained on.

    Attributes:
        limit: The distance to the k-th nearest image beyond which an image is strange.
    """

    def __init__(self, train: Tensor, others: Tensor):
        self._mean = train.mean(0)
        self._deviation = train.std(0, correction=0).clamp(min=1e-12)
        self._train = (train - self._mean) / self._deviation
        nearest, _ = self.nearest(others, NEIGHBOUR)
        self.limit = nearest[:, -1].quantile(SHARE).item()

    def nearest(self, features: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return the distances (B, count) of features (B, C) to the nearest training images, and their places."""
        distances = torch.cdist((features - self._mean) / self._deviation, self._train)
        return distances.topk(min(count, len(self._train)), largest=False)

    def strangeness(self, features: Tensor) -> float:
        """Return how far features (1, C) are from the k-th nearest training image's, as a multiple of the limit."""
        distances, _ = self.nearest(features, NEIGHBOUR)
        return distances[0, -1].item() / self.limit
