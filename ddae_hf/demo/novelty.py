"""How far an image is from all that a network was trained on, by its features: whether an answer means anything.

A classifier names one of its classes whatever it is shown. Its features tell more: those of an image unlike all
training images lie far from theirs. With features `f`, the mean `m` and the covariance `S` of the training images',

    distance(f) = the k-th smallest of |S^(-1/2) (f - g)| over the features g of the training images,

and an image is novel where its distance is above the 99th percentile of images that were not trained on: deep nearest
neighbours (Sun et al. 2022, arXiv 2204.06507), here after whitening. A little of the mean variance is added to `S`.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEIGHBOUR = 5  # k
PERCENTILE = 0.99
SHRINKAGE = 1e-4  # of the mean variance, which the covariance is enlarged by


class Novelty:
    """Distances to training images, in features, and the one beyond which an image is like none of them.

    Args:
        train: Features (N, C) of the training images.
        others: Features (M, C) of images of the same kind that were not trained on.

    Attributes:
        threshold: The distance that one in a hundred of the others is beyond.
    """

    def __init__(self, train: Tensor, others: Tensor):
        train = train.float()
        covariance = torch.cov(train.T).reshape(train.shape[1], -1)
        covariance += SHRINKAGE * covariance.diag().mean() * torch.eye(len(covariance))
        values, vectors = torch.linalg.eigh(covariance)
        self._whitening = vectors / values.clamp(min=1e-12).sqrt()
        self._train = train @ self._whitening
        self.threshold = self.distance(others).quantile(PERCENTILE).item()

    def distance(self, features: Tensor) -> Tensor:
        """Return the distances (B,) of features (B, C) to the fifth nearest training image's."""
        distances = torch.cdist(features.float() @ self._whitening, self._train)
        return distances.topk(min(NEIGHBOUR, len(self._train)), largest=False).values[:, -1]
