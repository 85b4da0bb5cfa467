r"""Probes: how well features tell classes apart.

Multinomial logistic regression minimises, over weights W (K, C) and biases b (K,), on standardised features z (C,)

    mean_i cross_entropy(W z_i + b, y_i) + l2 / 2 ||W||^2.

(scikit-learn's `LogisticRegression(C=c)` is this with l2 = 1 / (c N), for N images. For two classes it has one row of
weights and here there are two: then l2 = 2 / (c N).) Features that fit into a share of the device's free memory are
read and standardised once, and stay there; others are read in pieces at every evaluation.

All such problems, one for every layer and every l2, are solved together by L-BFGS (Liu and Nocedal 1989), each with its
own memory and step length: torch's optimiser would take them for one. It works on whitened weights: with the features'
correlation matrix Q diag(v) Q^T, the Hessian at W = 0 is at most (v / K + l2) along the columns of Q, and dividing by
its root makes every problem a round one.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .devices import products_as_before
from .pieces import Array, Pieces

# A layer's features: an array (N, C) for every view, in memory or mapped from disk; of several taps, `Joined` ones.
Views = Sequence[Array]
_Evaluate = Callable[[Tensor], tuple[Tensor, Tensor]]
_Pair = tuple[Tensor, Tensor, Tensor]  # of L-BFGS: a step, how the gradient changed, and one over their product

_CHUNK_BYTES = 64 * 2**20  # of features and of what is computed of them at once on a processor
_GPU_CHUNKS = 8  # times as many on a GPU, which many small pieces would keep waiting
_HISTORY = 10  # steps that L-BFGS remembers
_MEMORY_BYTES = 2**30  # of memory for these steps
_CORRELATION_BYTES = 2**31  # of memory for correlations, and for what they are decomposed into
_CORRELATION_COPIES = 6  # of float64, which are there at the same time
_TRIALS = 20  # of step lengths, each half the one before
_TOLERANCE = 1e-7  # where to stop: the estimated distance of a problem's loss from its optimum


@dataclass
class LinearProbes:
    """Linear classifiers on one layer's features, one for each of L strengths of regularisation.

    `weight` (L, K, C) and `bias` (L, K) are for features as they are, not standardised; `loss` (L,) has the
    objectives there, all float64. `converged` (L,) says which reached their optimum: see `minimise`.
    """

    weight: Tensor
    bias: Tensor
    loss: Tensor
    converged: Tensor

    @products_as_before("ieee")
    def predict(self, views: Views, indices: np.ndarray | None = None) -> np.ndarray:
        """Return predicted classes (L, N) of the images at `indices`, from logits averaged over views (N, C) each."""
        count = len(views[0]) if indices is None else len(indices)
        predicted = torch.empty(len(self.weight), count, dtype=torch.int64, device=self.weight.device)
        for part, logits in self._logits(views, indices):
            predicted[:, part] = logits.argmax(2)
        return predicted.cpu().numpy()

    @products_as_before("ieee")
    def logits(self, views: Views, strength: int = 0, indices: np.ndarray | None = None) -> Tensor:
        """Return the logits (N, K) that `predict` averages over views and compares, with one of the L strengths.

        They are float64, on the CPU.
        """
        parts = [logits[strength].cpu() for _, logits in self._logits(views, indices)]
        return torch.cat(parts)

    def _logits(self, views: Views, indices: np.ndarray | None) -> Iterator[tuple[slice, Tensor]]:
        """Yield places among the images at `indices`, by default all, and their logits (L, n, K)."""
        rows = np.arange(len(views[0])) if indices is None else indices
        device = self.weight.device
        size = _chunk_size(len(views), self.weight.shape[2], self.bias.numel(), device)
        for part, x in Pieces([views], rows, size, device, keep=False):
            # The mean of logits is the logit of mean features.
            mean = x.mean(0, dtype=torch.float64)
            yield part, torch.einsum("nc,lkc->lnk", mean, self.weight) + self.bias[:, None]


@products_as_before("ieee")  # with TF32, gradients are too far off to find the optimum
def fit_logistic_regression(
    features: Mapping[str, Views], labels: np.ndarray, l2: Sequence[float], *, num_classes: int | None = None,
    indices: np.ndarray | None = None, max_iterations: int = 500, device: torch.device | str = "cpu",
    standardise: bool = True,
) -> dict[str, LinearProbes]:  # fmt: skip
    """Return a multinomial logistic regression on each layer's features, with each of L strengths of regularisation.

    Args:
        features: Each layer's views, (N, C) each, which count as further images; C is the layer's own.
        labels: Classes (N,), from 0.
        l2: Strengths of regularisation, positive: see the module's formula.
        num_classes: Number of classes K; by default the largest label + 1.
        indices: The images to fit on; by default all.
        max_iterations: Iterations after which to stop in any case.
        device: Where to compute.
        standardise: Whether to divide features by their standard deviations; otherwise they are only centred.

    Raises:
        ValueError: Nothing to fit, features that do not fit together or are not finite, labels or strengths out of
            range.
    """
    rows = np.arange(len(labels)) if indices is None else np.asarray(indices)
    classes = int(labels.max()) + 1 if num_classes is None else num_classes
    _check_problem(features, labels[rows], len(labels), l2, classes)
    fitted: dict[str, LinearProbes] = {}
    for width in {views[0].shape[1] for views in features.values()}:
        names = [name for name, views in features.items() if views[0].shape[1] == width]
        together = _most_together(width, len(l2) * classes)
        for first in range(0, len(names), together):
            group = names[first : first + together]
            views = [features[name] for name in group]
            # Without a name, so that its features are gone before the next problem's come.
            probes = _Problem(views, labels, rows, l2, classes, torch.device(device), standardise).solve(max_iterations)
            fitted.update(zip(group, probes, strict=True))
    return {name: fitted[name] for name in features}


def _check_problem(
    features: Mapping[str, Views], labels: np.ndarray, count: int, l2: Sequence[float], classes: int
) -> None:
    if not features or not all(features.values()) or len(labels) == 0 or not l2:
        raise ValueError("There is nothing to fit: give features of at least one layer, one image and one l2.")
    shapes = sorted({(len(views), *view.shape) for views in features.values() for view in views})
    if len({shape[0] for shape in shapes}) > 1 or any(len(shape) != 3 or shape[1] != count for shape in shapes):
        wanted = f"every layer must have as many views, and every view the {count} images of the labels"
        raise ValueError(f"Features have shapes {shapes} (views, images, width): {wanted}.")
    if not all(0 < strength < math.inf for strength in l2):
        raise ValueError(f"l2 is {list(l2)}: every strength must be positive, or there may be no optimum.")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"Labels are {labels.min()} to {labels.max()}: allowed are 0 to {classes - 1}.")


def _most_together(width: int, outputs: int) -> int:
    """Return how many layers of a width are solved together, so that what every one of them needs fits into memory."""
    steps = 4 * outputs * (width + 1) * (2 * _HISTORY + 8)
    correlations = 8 * width**2 * _CORRELATION_COPIES
    return max(1, min(_MEMORY_BYTES // steps, _CORRELATION_BYTES // correlations))


def _chunk_size(probes: int, width: int, outputs: int, device: torch.device) -> int:
    room = _CHUNK_BYTES * (_GPU_CHUNKS if device.type == "cuda" else 1)
    return max(1, room // (4 * probes * (width + 3 * outputs)))


class _Problem:
    """P x L problems of logistic regression on P layers' features; their variables are a matrix (P L, K C + K).

    What is large is computed on the device, in float32. The rest is at `home`, which is the device if it has float64,
    and the processor otherwise.
    """

    def __init__(
        self, features: Sequence[Views], labels: np.ndarray, rows: np.ndarray, l2: Sequence[float], classes: int,
        device: torch.device, standardise: bool,
    ):  # fmt: skip
        self.device, self.classes = device, classes
        self.home = torch.device("cpu") if device.type == "mps" else device
        self.probes, self.width = len(features), features[0][0].shape[1]
        self.count = len(rows) * len(features[0])
        rows = np.sort(rows)
        self.labels = torch.as_tensor(labels[rows]).to(device)
        size = _chunk_size(self.probes, self.width, len(l2) * classes, device)
        self.features = Pieces(list(zip(*features, strict=True)), rows, size, device)
        self.l2 = torch.tensor(l2, dtype=torch.float32, device=self.home)
        # (P, C, C) and, for every l2, (P, L, 1, C)
        values, self.basis = (m.float() for m in torch.linalg.eigh(self._standardise(standardise)))
        self.root = (values.clamp_min(0)[:, None, None] / classes + self.l2[:, None, None]).rsqrt()

    def _standardise(self, divide: bool) -> Tensor:
        """Standardise the features, or only centre them, and return their correlations (P, C, C), float64.

        They are centred by an approximate mean first and by what is left of it later, so that float32 loses no digits
        of features far from zero: the corrected two-pass algorithm (Chan, Golub and LeVeque 1983).
        """
        total = torch.zeros((self.probes, self.width), dtype=torch.float64, device=self.home)
        for _, x in self.features:
            total += x.sum(1).to(self.home).double()
        if not total.isfinite().all():
            raise ValueError("Some features are not finite: the network overflows. Run it in float32.")
        shift = (total / self.count).float()
        centre = shift.to(self.device)[:, None]
        self.features.change(lambda x: x.sub_(centre))
        total = torch.zeros_like(total)
        products = torch.zeros((*total.shape, self.width), dtype=torch.float64, device=self.home)
        for _, x in self.features:
            total += x.sum(1).to(self.home).double()
            products += (x.mT @ x).to(self.home)
        rest = total / self.count
        covariance = products / self.count - rest[:, :, None] * rest[:, None, :]
        self.mean = shift.double() + rest
        std = covariance.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
        # Features that do not vary are not divided, as in scikit-learn's StandardScaler.
        std = torch.where((std > 1e-6 * self.mean.abs()) & divide, std, 1.0)
        self.std = std.float()
        left, divisor = rest.float().to(self.device)[:, None], self.std.to(self.device)[:, None]
        self.features.change(lambda x: x.sub_(left).div_(divisor))
        return covariance / (std[:, :, None] * std[:, None, :])

    def weights(self, variables: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights on standardised features (P, L, K, C) and the biases (P, L, K) of variables."""
        split = self.classes * self.width
        whitened = variables[:, :split].reshape(self.probes, len(self.l2), self.classes, self.width)
        bias = variables[:, split:].reshape(self.probes, len(self.l2), self.classes) * math.sqrt(self.classes)
        return (whitened * self.root) @ self.basis.mT[:, None], bias

    def evaluate(self, variables: Tensor) -> tuple[Tensor, Tensor]:
        """Return the objectives (P L,), float64, and their gradients by the variables."""
        weight, bias = self.weights(variables)
        flat, offset = weight.flatten(1, 2).to(self.device), bias.flatten(1).to(self.device)
        strengths = len(self.l2)
        loss = torch.zeros(self.probes, strengths, dtype=torch.float64, device=self.home)
        sum_by_weight, sum_by_bias = torch.zeros_like(flat), torch.zeros_like(offset)
        for part, x in self.features:
            logits = torch.baddbmm(offset[:, None], x, flat.mT).unflatten(2, (strengths, self.classes))
            log_probabilities = F.log_softmax(logits, dim=3)
            target = self.labels[part][None, :, None, None].expand(self.probes, -1, strengths, 1)
            chosen = log_probabilities.gather(3, target)
            loss -= chosen.squeeze(3).to(self.home).sum(1, dtype=torch.float64)
            error = log_probabilities.exp_().scatter_add_(3, target, torch.full_like(chosen, -1.0)).flatten(2)
            sum_by_weight += error.mT @ x
            sum_by_bias += error.sum(1)
        loss = loss / self.count + 0.5 * self.l2 * weight.double().square().sum((2, 3))
        by_weight = (sum_by_weight.to(self.home) / self.count).view_as(weight) + self.l2[:, None, None] * weight
        by_whitened = (by_weight @ self.basis[:, None]) * self.root
        by_bias = sum_by_bias.to(self.home) * (math.sqrt(self.classes) / self.count)
        parts = (by_whitened.reshape(len(variables), -1), by_bias.reshape(len(variables), -1))
        return loss.flatten(), torch.cat(parts, dim=1)

    def solve(self, max_iterations: int) -> list[LinearProbes]:
        """Minimise, and return every layer's probes for features as they are."""
        start = torch.zeros(self.probes * len(self.l2), self.classes * (self.width + 1), device=self.home)
        variables, loss, converged = minimise(self.evaluate, start, _TOLERANCE, max_iterations)
        weight, bias = self.weights(variables)
        if not converged.all():
            what = f"{int((~converged).sum())} of {len(converged)} probes did not reach their optimum"
            warnings.warn(f"{what} in {max_iterations} iterations: regularise them more.", stacklevel=3)
        # In float64, as features may be far from zero.
        weight = weight.double() / self.std[:, None, None].double()
        bias = bias.double() - (weight * self.mean[:, None, None]).sum(3)
        parts = (weight, bias, loss.view(self.probes, -1), converged.view(self.probes, -1))
        return [LinearProbes(*layer) for layer in zip(*parts, strict=True)]


def minimise(
    evaluate: _Evaluate, variables: Tensor, tolerance: float, max_iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Minimise B independent smooth functions by L-BFGS, each along its own direction and with its own step length.

    `evaluate` gives their values (B,) and gradients (B, D) at variables (B, D), which start as they came. A function is
    done when the quadratic model expects less than `tolerance` from its next step, or rounding lets no step descend.

    Returns:
        Variables (B, D), values (B,), and which functions are done (B,).
    """
    value, gradient = evaluate(variables)
    history: tuple[_Pair, ...] = ()
    scale = torch.ones_like(gradient[:, :1])
    done = torch.zeros(len(variables), dtype=torch.bool, device=variables.device)
    direction, slope, done = _descent(gradient, history, scale, done, tolerance)
    finished = bool(done.all())
    for _ in range(max_iterations):
        if finished:
            break
        step, found = torch.ones_like(slope), torch.ones_like(done)
        for trial in range(_TRIALS + 1):
            if trial == _TRIALS:  # down to rounding: what has found no step keeps its place
                done = done | ~found
                step = torch.where(found, step, 0.0)
            moved = step[:, None] * direction
            new_value, new_gradient = evaluate(variables + moved)
            found = new_value <= value + 1e-4 * step * slope  # Armijo
            pair, new_scale = _curvature(moved, new_gradient - gradient, scale)
            new_history = (*history, pair)[-_HISTORY:]
            following = _descent(new_gradient, new_history, new_scale, done, tolerance)
            # What comes next depends on both, so the host waits for the device once an evaluation, but not twice: the
            # next direction is computed before it is known to be wanted.
            all_found, finished = torch.stack([found.all(), following[2].all()]).tolist()
            if all_found:
                break
            step = torch.where(found, step, 0.5 * step)
        variables, value, gradient = variables + moved, new_value, new_gradient
        history, scale = new_history, new_scale
        direction, slope, done = following
    return variables, value, done


def _descent(
    gradient: Tensor, history: Sequence[_Pair], scale: Tensor, done: Tensor, tolerance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return directions (B, D), the slopes along them (B,) and which functions are done, whose directions are 0."""
    direction = _direction(gradient, history, scale)
    slope = (gradient * direction).sum(1)
    done = done | (-0.5 * slope < tolerance)
    # Functions that are done stay where they are, and do not keep the others waiting.
    return direction * ~done[:, None], slope * ~done, done


def _curvature(moved: Tensor, change: Tensor, scale: Tensor) -> tuple[_Pair, Tensor]:
    """Return what a step (B, D) and the gradient's change say of the Hessian, and the inverse Hessian's scale (B, 1).

    A pair without curvature would spoil the model: it is left out, and its function's scale stays.
    """
    curvature = (moved * change).sum(1, keepdim=True)
    good = curvature > 1e-8 * moved.norm(dim=1, keepdim=True) * change.norm(dim=1, keepdim=True)
    pair = (moved * good, change * good, torch.where(good, 1 / curvature, 0.0))
    return pair, torch.where(good, curvature / change.square().sum(1, keepdim=True).clamp_min(1e-30), scale)


def _direction(gradient: Tensor, history: Sequence[_Pair], scale: Tensor) -> Tensor:
    """Return minus the approximate inverse Hessian times the gradient (B, D): the two loops of L-BFGS."""
    direction, shares = -gradient, []
    for moved, change, inverse in reversed(history):
        shares.append(inverse * (moved * direction).sum(1, keepdim=True))
        direction = direction - shares[-1] * change
    direction = direction * scale
    for moved, change, inverse in history:
        correction = inverse * (change * direction).sum(1, keepdim=True)
        direction = direction + (shares.pop() - correction) * moved
    return direction


@products_as_before("ieee")
def knn_predict(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, neighbours: Sequence[int], *,
    device: torch.device | str = "cpu",
) -> dict[int, np.ndarray]:  # fmt: skip
    """Classify by the nearest training images: cosine similarity, votes weighted by exp(similarity / 0.07).

    The protocol and this temperature are those of Wu et al. 2018 (arXiv 1805.01978). Features are centred on the
    training images' mean first: pooled hidden states share a large offset, which would make all look alike.

    Returns:
        Classes (M,) by number of neighbours, at most N, from features (N, C), their labels (N,) and features (M, C).
    """
    if not 1 <= min(neighbours) <= max(neighbours) <= len(train):
        raise ValueError(f"neighbours are {list(neighbours)}: allowed are 1 to the {len(train)} training images.")
    device = torch.device(device)
    mean = torch.from_numpy(train.mean(0, dtype=np.float64)).float().to(device)
    targets = torch.as_tensor(labels).to(device)

    def make_unit(x: Tensor) -> None:
        F.normalize(x.sub_(mean), dim=2, out=x)

    keys = Pieces([[train]], np.arange(len(train)), 65536 if device.type == "cuda" else 4096, device)
    asked = Pieces([[test]], np.arange(len(test)), 1024, device, keep=False)
    keys.change(make_unit)
    asked.change(make_unit)
    num_classes = int(labels.max()) + 1
    votes: dict[int, list[Tensor]] = {k: [] for k in neighbours}
    for _, (queries,) in asked:
        similarity = torch.empty(len(queries), 0, device=device)
        classes_found = torch.empty(len(queries), 0, dtype=torch.long, device=device)
        for part, (near,) in keys:
            similarity = torch.cat([similarity, queries @ near.T], 1)
            classes_found = torch.cat([classes_found, targets[part].expand(len(queries), -1)], 1)
            similarity, order = similarity.topk(min(max(neighbours), similarity.shape[1]), dim=1)
            classes_found = classes_found.gather(1, order)
        weight = ((similarity - 1) / 0.07).exp()
        for k in neighbours:
            ballot = torch.zeros(len(queries), num_classes, device=device)
            votes[k].append(ballot.scatter_add_(1, classes_found[:, :k], weight[:, :k]).argmax(1))
    return {k: torch.cat(parts).cpu().numpy() for k, parts in votes.items()}


def alignment(first: np.ndarray, second: np.ndarray) -> float:
    """Return the mean squared distance between two views' features (N, C), each of length 1; 0 is perfect.

    Wang and Isola 2020 (arXiv 2005.10242), with exponent 2.
    """
    if first.shape != second.shape:
        raise ValueError(f"Views have shapes {first.shape} and {second.shape}: they must show the same images.")
    a, b = (F.normalize(torch.from_numpy(np.array(x, dtype=np.float64)), dim=1) for x in (first, second))
    return (a - b).square().sum(1).mean().item()


def uniformity(features: np.ndarray) -> float:
    """Return the logarithm of the mean over pairs of images of exp(-2 d^2); the lower, the more evenly they spread.

    d is the distance between two images' features (N, C), each of length 1. Wang and Isola 2020 (arXiv 2005.10242).
    """
    if len(features) < 2:
        raise ValueError(f"{len(features)} image(s) came: uniformity is measured on pairs, so give at least two.")
    x = F.normalize(torch.from_numpy(np.array(features, dtype=np.float64)), dim=1)
    # |a - b|^2 = 2 - 2 ab; an image paired with itself adds 1, which is taken away.
    total = sum(torch.exp(4 * (part @ x.T) - 4).sum().item() for part in x.split(1024)) - len(x)
    return math.log(total / (len(x) * (len(x) - 1)))
