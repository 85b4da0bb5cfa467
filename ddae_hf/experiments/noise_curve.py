"""The shape of accuracy over noise levels, by paired tests on the images that it was measured on.

While a network generalises, the accuracy of its features has a peak at an inner noise level; as it begins to memorise
its training images, the curve gradually becomes one that falls with the noise level all the way (Li et al. 2025, arXiv
2502.05743). Curves that are measured on few images have peaks by chance. So every two levels are compared by McNemar's
exact test (1947, doi:10.1007/BF02295996), with the correction of Holm (1979) for their number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from .pairs import Pair
from .report import accuracy_interval, many

LIKELY = 0.05  # a difference is significant if its corrected p value is below
FEWEST_LEVELS = 3
PAPER = "arXiv 2502.05743"
MEANING = {
    "inner peak": f"has an inner peak, as curves of networks that generalise have ({PAPER})",
    "falling": f"falls, and nothing rises significantly: so do curves of networks that memorise ({PAPER}), and those "
    "with a peak that is too small to be seen on so few images, or below the smallest level",
    "rising": "rises as far as it was measured: a peak may lie beyond",
    "flat": "is flat: no two levels differ significantly",
    "neither": "has neither one inner peak nor one direction",
}


@dataclass(kw_only=True)
class Difference:
    """By how much accuracy at one noise level is above that at another, on the same images.

    Attributes:
        sigmas: The smaller level and the larger one.
        gain: Accuracy at the larger level minus that at the smaller one.
        p: Of McNemar's exact test, two-sided, corrected for the number of pairs of levels.
    """

    sigmas: list[float]
    gain: float
    p: float

    @property
    def words(self) -> str:
        """The difference in points, and how likely such a one is by chance."""
        p = "p < 0.0001" if self.p < 1e-4 else f"p = {self.p:.2g}"
        return f"{100 * self.gain:+.2f} points from sigma {self.sigmas[0]:.3g} to {self.sigmas[1]:.3g} ({p})"


@dataclass(kw_only=True)
class NoiseCurve:
    """Accuracy of one layer's probes on held-out images over noise levels, and its shape.

    Attributes:
        layer: The layer that was chosen.
        sigmas: The noise levels, ascending.
        accuracies: One at each level.
        intervals: The ends of the 95 % interval of each: see `accuracy_interval`.
        shape: `inner peak`, `falling`, `rising`, `flat` or `neither`: see `shape_of`.
        peak: The level of the highest accuracy, the smallest of equals.
        differences: From the smallest level to the peak, from there to the largest one, or, if the peak is at an end,
            between the ends alone.
        shapes: The shape of every layer's curve, each by tests of its own.
    """

    layer: str
    sigmas: list[float]
    accuracies: list[float]
    intervals: list[list[float]]
    shape: str
    peak: float
    differences: list[Difference]
    shapes: dict[str, str] = many()

    def words(self, num_images: int) -> str:
        """Return the shape in sentences, and what it was found by."""
        differences = " and ".join(each.words for each in self.differences)
        counts = ", ".join(f"{count} {shape}" for shape, count in Counter(self.shapes.values()).most_common())
        return (
            f"Over the {len(self.sigmas)} noise levels, the accuracy of `{self.layer}` on the {num_images:,} held-out "
            f"images {MEANING[self.shape]}. It changes by {differences}, in exact McNemar tests of all pairs of levels "
            "with Holm's correction. The layer was chosen on the same images, which this does not correct for"
            f"{f'. Shapes of all {len(self.shapes)} layers: {counts}' if len(self.shapes) > 1 else ''}."
        )


def packed(correct: np.ndarray) -> str:
    """Return which of N images were classified correctly (N,) as bits, eight to a byte, in hexadecimal."""
    return np.packbits(correct).tobytes().hex()


def unpacked(text: str, count: int) -> np.ndarray:
    """Return what `packed` made of `count` images, or raise `ValueError` where it is of another number."""
    found = np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8))
    if not count <= len(found) < count + 8:
        raise ValueError(f"{len(found)} bits came: {count} images need as many, filled up to whole bytes.")
    return found[:count].astype(bool)


def curve_of(pairs: Sequence[Pair], layer: str, num_images: int) -> NoiseCurve | None:
    """Return a layer's curve over the noise levels of its pairs, each on the same `num_images` held-out images.

    It is None where there are fewer than three levels, or where an earlier version did not keep what became of each
    image.
    """
    curves = {}
    for name in dict.fromkeys(pair.layer for pair in pairs):
        own = sorted((pair for pair in pairs if pair.layer == name), key=lambda pair: pair.sigma)
        kept = [pair.correct for pair in own if pair.correct is not None]
        if len(own) < FEWEST_LEVELS or len(kept) < len(own):
            return None
        correct = np.stack([unpacked(text, num_images) for text in kept])
        curves[name] = curve_from(name, [pair.sigma for pair in own], correct)
    found = curves[layer]
    found.shapes = {name: curve.shape for name, curve in curves.items()}
    return found


def curve_from(layer: str, sigmas: Sequence[float], correct: np.ndarray) -> NoiseCurve:
    """Return the curve of L ascending levels, from which of N images each classified correctly (L, N)."""
    accuracies = [float(each.mean()) for each in correct]
    p = corrected_p_values(correct)
    peak, last = int(np.argmax(accuracies)), len(sigmas) - 1
    ends = [(0, peak), (peak, last)] if 0 < peak < last else [(0, last)]
    differences = [
        Difference(sigmas=[sigmas[i], sigmas[j]], gain=accuracies[j] - accuracies[i], p=p[i, j]) for i, j in ends
    ]
    return NoiseCurve(
        layer=layer, sigmas=list(sigmas), accuracies=accuracies, peak=sigmas[peak], differences=differences,
        intervals=[list(accuracy_interval(each, correct.shape[1])) for each in accuracies],
        shape=shape_of(accuracies, p),
    )  # fmt: skip


def corrected_p_values(correct: np.ndarray) -> dict[tuple[int, int], float]:
    """Return the p value of every two of L levels, the smaller one first, from which of N images they got right (L, N).

    McNemar's test asks of the images that only one of two levels got right whether either has more of them than a fair
    coin would give it. Holm's correction multiplies the smallest of m p values by m, the next by m - 1, and so on, and
    lets none of them be below an earlier one.
    """
    from scipy.stats import binomtest

    p = {}
    for i, j in combinations(range(len(correct)), 2):
        only = [int((correct[i] & ~correct[j]).sum()), int((correct[j] & ~correct[i]).sum())]
        p[i, j] = float(binomtest(only[0], sum(only)).pvalue) if any(only) else 1.0
    highest = 0.0
    for number, pair in enumerate(sorted(p, key=lambda pair: p[pair])):
        highest = max(highest, min(1.0, (len(p) - number) * p[pair]))
        p[pair] = highest
    return p


def shape_of(accuracies: Sequence[float], p: dict[tuple[int, int], float]) -> str:
    """Return the shape of accuracies at ascending levels, by the corrected p value of every two of them.

    Returns:
        `flat`: no two levels differ significantly.
        `falling`: the last level is significantly below the first, and no level significantly above a smaller one.
        `rising`: the last level is significantly above the first, and no level significantly below a smaller one.
        `inner peak`: the highest accuracy is significantly above both the first and the last, nothing rises
            significantly after it, and nothing falls significantly before it.
        `neither`: all else.
    """
    significant = [pair for pair, value in p.items() if value < LIKELY]
    rises = [(i, j) for i, j in significant if accuracies[j] > accuracies[i]]
    falls = [(i, j) for i, j in significant if accuracies[j] < accuracies[i]]
    last, peak = len(accuracies) - 1, int(np.argmax(accuracies))
    if not significant:
        return "flat"
    if not rises and (0, last) in falls:
        return "falling"
    if not falls and (0, last) in rises:
        return "rising"
    one_way = all(i < peak for i, _ in rises) and all(j > peak for _, j in falls)
    return "inner peak" if one_way and (0, peak) in rises and (peak, last) in falls else "neither"
