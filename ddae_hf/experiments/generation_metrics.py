"""How far generated images are from real ones, measured between their features.

Features are float tensors (N, C), one row an image, of any network, the same one for both sets. The two distances are
those of torchmetrics, in float64.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """Return the squared Frechet distance between Gaussians that have the means and covariances of two sets.

    `|mean_1 - mean_2|^2 + tr(cov_1 + cov_2 - 2 (cov_1 cov_2)^(1/2))`, with covariances divided by N - 1 (Heusel et al.
    2017, arXiv 1706.08500); with Inception features it is the FID. It falls as N grows: compare only figures of one N.
    The sets, (N, C) and (M, C), may change places.

    Raises:
        ValueError: Features of different widths, values that are not finite, or fewer than two images.
        ImportError: torchmetrics is not installed.

    Warns:
        UserWarning: A set of no more than C images: its covariance is singular, and the distance far too large.
    """
    _check(real, generated, fewest=2)
    count, width = min(len(real), len(generated)), real.shape[1]
    if count <= width:
        what = f"{count} images came for features of {width} numbers: their covariance is singular, and the Frechet"
        hint = f"Use more than {width}, or compare only figures of as many."
        warnings.warn(f"{what} distance far larger than of many images. {hint}", stacklevel=2)
    metric = _torchmetrics("Frechet", width).to(real.device)
    # The distance does not depend on the origin; near it, covariances lose no digits to the mean's square.
    origin = real.mean(0, dtype=torch.float64)
    for features, is_real in ((real, True), (generated, False)):
        for rows in features.split(4096):
            metric.update(rows.double() - origin, real=is_real)
    return metric.compute().item()


def kernel_distance(
    real: Tensor, generated: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Return mean and standard deviation, over random subsets, of the kernel distance between two sets.

    The squared maximum mean discrepancy with the kernel `(x . y / C + 1)^3` (Binkowski et al. 2018, arXiv 1801.01401);
    with Inception features it is the KID. Its estimate is unbiased, so that it may be below 0.

    Args:
        real: Features (N, C) of real images.
        generated: Features (M, C) of generated images; the two sets may change places.
        subsets: Number of subsets.
        subset_size: Images of each set in a subset.
        seed: Seed of the draw of subsets.

    Raises:
        ValueError: Features of different widths, values that are not finite, fewer images than a subset has, or subsets
            of fewer than two images.
        ImportError: torchmetrics is not installed.
    """
    if subsets < 1 or subset_size < 2:
        asked = f"{subsets} subsets of {subset_size} images are asked for"
        raise ValueError(f"{asked}: allowed are 1 or more of at least 2.")
    _check(real, generated, fewest=subset_size)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance` will save all extracted features")
        metric = _torchmetrics("kernel", real.shape[1], subsets=1, subset_size=subset_size)
    values = []
    with torch.random.fork_rng(devices=[]):  # the metric, too, shuffles with the global generator
        torch.default_generator.manual_seed(seed)
        for _ in range(subsets):
            for features, is_real in ((real, True), (generated, False)):
                chosen = torch.randperm(len(features), device="cpu")[:subset_size]
                metric.update(features[chosen.to(features.device)].double(), real=is_real)
            values.append(metric.compute()[0])
            metric.reset()
    found = torch.stack(values)
    return found.mean().item(), found.std(correction=0).item()


def precision_recall(real: Tensor, generated: Tensor, k: int = 3, *, chunk_size: int = 512) -> tuple[float, float]:
    """Return improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991, equation 1).

    They are the shares of generated images that lie among the real ones, and of real images that lie among the
    generated ones: no further from one of them than that one's k-th nearest neighbour of its own set is.

    Args:
        real: Features (N, C) of real images.
        generated: Features (M, C) of generated images.
        k: Which neighbour gives the radius; 3 in the paper.
        chunk_size: Rows of the distance table held at a time. It changes no result.

    Raises:
        ValueError: Features of different widths, values that are not finite, k below 1, or no more than k images.
    """
    if k < 1 or chunk_size < 1:
        raise ValueError(f"k is {k} and chunk_size {chunk_size}: both must be at least 1.")
    _check(real, generated, fewest=k + 1)
    origin = real.mean(0, dtype=torch.float64)
    real, generated = real.double() - origin, generated.double() - origin
    # What float32 features do not tell apart is no distance, so that images that come several times are found.
    rounding = 1e-7 * max(real.norm(dim=1).max(), generated.norm(dim=1).max())
    radii, generated_radii = (_radii(features, k, chunk_size) + rounding for features in (real, generated))
    precise, recalled = 0, torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows, distances in _distances(generated, real, chunk_size):
        precise += int((distances <= radii).any(1).sum())
        recalled |= (distances <= generated_radii[rows, None]).any(0)
    return precise / len(generated), recalled.double().mean().item()


def _radii(features: Tensor, k: int, chunk_size: int) -> Tensor:
    """Return each image's distance (N,) to its k-th nearest neighbour; the nearest of all is the image itself."""
    found = [distances.kthvalue(k + 1, dim=1).values for _, distances in _distances(features, features, chunk_size)]
    return torch.cat(found)


def _distances(rows: Tensor, columns: Tensor, chunk_size: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield Euclidean distances, some rows at a time, with the slice that says which."""
    for start in range(0, len(rows), chunk_size):
        part = slice(start, start + chunk_size)
        yield part, torch.cdist(rows[part], columns, compute_mode="use_mm_for_euclid_dist")


def _check(real: Tensor, generated: Tensor, fewest: int) -> None:
    shapes = f"{tuple(real.shape)} and {tuple(generated.shape)}"
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        raise ValueError(f"Features have shapes {shapes}: they must be (N, C) and (M, C), of one network.")
    if min(len(real), len(generated)) < fewest:
        raise ValueError(f"Features have shapes {shapes}: there must be at least {fewest} images of each kind.")
    for name, features in (("real", real), ("generated", generated)):
        if bad := int((~torch.isfinite(features)).any(1).sum()):
            what = f"{bad} of {len(features)} {name} images have features that are not finite: the network that"
            raise ValueError(f"{what} computes them overflows on these images, or its weights are damaged.")


def _torchmetrics(name: str, width: int, **options: Any) -> Any:
    """Return a metric of torchmetrics that takes features in place of images."""
    try:
        from torchmetrics.image import fid, kid
    except ImportError as error:
        raise ImportError(f"This distance needs torchmetrics: pip install 'torchmetrics>=1.6' ({error}).") from error
    metric: Any = fid.FrechetInceptionDistance if name == "Frechet" else kid.KernelInceptionDistance
    identity: Any = torch.nn.Identity()
    identity.num_features = width
    # One process has all the features: it does not wait for others, which may have ended.
    return metric(identity, sync_on_compute=False, **options)
