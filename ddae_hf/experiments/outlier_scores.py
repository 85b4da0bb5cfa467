"""Scores of how unlike its training images an image is, by its features, and how well a score tells two sets apart.

A higher score says that an image is more likely from elsewhere. With features f of an image and g of training images,
the distances are

- to the k-th nearest training image (Sun et al. 2022, arXiv 2204.06507): |f - g_k|, where all features are of length 1,
  as in the paper, or standardised by the training images' mean and deviation;
- Mahalanobis': (f - m)^T S^-1 (f - m), with the training images' mean m and covariance S;
- Mahalanobis' to the nearest class (Lee et al. 2018, arXiv 1807.03888): the smallest over classes of the same with the
  class's mean, and with the covariance of what is left when each training image's class mean is taken away.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from sklearn.covariance import EmpiricalCovariance
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

RESAMPLES = 1000  # of images, for intervals
_ACCEPTED = 19, 20  # the share of known images, 95 %, that a threshold accepts: 19 of 20
_AT_ONCE = 2**22  # numbers of drawn images that are held at a time


@dataclass(kw_only=True)
class Separation:
    """How well a score tells outside images from known ones, with 95 % intervals over images.

    Attributes:
        auroc: Share of pairs of a known and an outside image in which the outside one has the higher score, equal ones
            counted half; 0.5 is chance, and below it the score calls known images the stranger ones.
        auroc_interval: Its ends.
        fpr95: Share of the outside images that are taken for known ones where 95 % of the known ones are.
        fpr95_interval: Its ends.
    """

    auroc: float
    auroc_interval: list[float]
    fpr95: float
    fpr95_interval: list[float]


def unit_length(features: np.ndarray) -> np.ndarray:
    """Return features (N, C) of length 1 each; those of length 0 stay as they are."""
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.where(lengths == 0, 1, lengths)


def standardised(features: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Return features (N, C) less the mean of training images' (M, C), over their standard deviation.

    Features that do not vary are not divided, as in scikit-learn's `StandardScaler`.
    """
    deviation = train.std(0)
    return (features - train.mean(0)) / np.where(deviation == 0, 1, deviation)


def nearest_distance(features: np.ndarray, train: np.ndarray, neighbour: int) -> np.ndarray:
    """Return the Euclidean distance (N,) of features (N, C) to those of the k-th nearest of training images (M, C)."""
    found = NearestNeighbors(n_neighbors=neighbour, algorithm="brute").fit(train)
    return found.kneighbors(features)[0][:, -1]


def mahalanobis(features: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Return the squared Mahalanobis distance (N,) of features (N, C) to training images' (M, C).

    Directions in which these do not vary at all play no part: the covariance's pseudo-inverse is taken.
    """
    return EmpiricalCovariance(store_precision=True).fit(train).mahalanobis(features)


def class_mahalanobis(features: np.ndarray, train: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the squared Mahalanobis distance (N,) of features (N, C) to the nearest class of training images (M, C).

    `labels` (M,) are the classes of the training images, which share one covariance.
    """
    classes, places = np.unique(labels, return_inverse=True)
    means = np.stack([train[places == place].mean(0) for place in range(len(classes))])
    shared = EmpiricalCovariance(assume_centered=True).fit(train - means[places])
    return np.min([shared.mahalanobis(features - mean) for mean in means], axis=0)


def separation(inside: np.ndarray, outside: np.ndarray, seed: int) -> Separation:
    """Return how well scores tell outside images (M,) from known ones (N,).

    The intervals are percentiles over 1,000 bootstrap resamples of the images of each set, which depend on `seed` and
    the numbers of images alone: scores of the same images share them.

    Raises:
        ValueError: No images of a kind, or a score that is not finite.
    """
    for name, scores in {"inside": inside, "outside": outside}.items():
        if not len(scores) or not np.isfinite(scores).all():
            raise ValueError(f"{len(scores)} scores of images {name} came: give at least one, all of them finite.")
    first = inside.argsort(kind="stable")
    second = outside.argsort(kind="stable")
    known = inside[first]
    others = outside[second]
    _, fpr = rates(known, others, np.ones((1, len(known)), np.int64), np.ones((1, len(others)), np.int64))
    drawn = [
        rates(known, others, of_known[:, first], of_others[:, second])
        for of_known, of_others in zip(
            _resampled(len(known), [seed, 0], len(others)), _resampled(len(others), [seed, 1], len(known)), strict=True
        )
    ]
    ends = [np.percentile(np.concatenate(each), [2.5, 97.5]).tolist() for each in zip(*drawn, strict=True)]
    truth = np.repeat([0, 1], [len(known), len(others)])
    auroc = float(roc_auc_score(truth, np.concatenate([known, others])))
    return Separation(auroc=auroc, auroc_interval=ends[0], fpr95=float(fpr[0]), fpr95_interval=ends[1])


def rates(
    inside: np.ndarray, outside: np.ndarray, of_inside: np.ndarray, of_outside: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the areas under the curves, and the false-positive rates at 95 %, (R,) each, of R resamples.

    Scores are in ascending order, (N,) of known and (M,) of outside images; `of_inside` (R, N) and `of_outside` (R, M)
    say how often each resample has an image, as whole numbers.
    """
    known = _summed(of_inside)
    others = _summed(of_outside)
    below = known[:, np.searchsorted(inside, outside, "left")]
    up_to = known[:, np.searchsorted(inside, outside, "right")]
    areas = (of_outside * (below + up_to)).sum(1) / (2.0 * known[:, -1] * others[:, -1])
    share, of = _ACCEPTED
    limits = inside[(of * known[:, 1:] >= share * known[:, -1:]).argmax(1)]
    taken = others[np.arange(len(others)), np.searchsorted(outside, limits, "right")]
    return areas, taken / others[:, -1]


def _summed(counts: np.ndarray) -> np.ndarray:
    """Return how many images of each resample (R, N) come before each place (R, N + 1)."""
    return np.concatenate([np.zeros((len(counts), 1), counts.dtype), counts.cumsum(1)], axis=1)


def _resampled(count: int, seed: list[int], beside: int) -> Iterator[np.ndarray]:
    """Yield how often resamples have each of `count` images, some resamples (R, count) at a time.

    R is the same for two sets that are the other's `beside`.
    """
    generator = np.random.default_rng(seed)
    at_once = max(1, _AT_ONCE // max(count, beside))
    for first in range(0, RESAMPLES, at_once):
        rows = min(at_once, RESAMPLES - first)
        drawn = generator.integers(count, size=(rows, count)) + count * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)
