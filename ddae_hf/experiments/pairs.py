"""Layers at noise levels, and how probes of them did: what the reports of probes are made of."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .arrays import damaged, read_json, write_json
from .calibration import Calibration
from .report import Figure, in_memory, many, percent


@dataclass(kw_only=True)
class Pair:
    """A layer at a noise level, and the figures of its probe on held-out training images.

    Attributes:
        layer: The layer, or `pixels`.
        validation_accuracy: With the best strength of regularisation.
        l2: That strength; None of probes that are trained online.
        by_l2: Accuracy by strength.
        knn_20: Accuracy by the nearest 20 images; `knn_200` likewise.
        alignment: See `logistic_regression.alignment`; `uniformity` likewise.
        temperature: Of the smallest negative log likelihood of the held-out images: see `fitted_temperature`.
        correct: Which held-out images were classified correctly: see `noise_curve.packed`. It is kept with the figures
            of a level, not in reports.
    """

    layer: str
    sigma: float
    validation_accuracy: float | None = None
    l2: float | None = None
    by_l2: dict[str, float] = many()
    knn_20: float | None = None
    knn_200: float | None = None
    alignment: float | None = None
    uniformity: float | None = None
    temperature: float | None = None
    correct: str | None = in_memory()

    @property
    def words(self) -> str:
        """Layer and level, for tables."""
        return "" if self.layer == "pixels" else f"`{self.layer}`, sigma {self.sigma:.3g}"


@dataclass(kw_only=True)
class Probe:
    """How the probe of the best pair did in tests.

    Attributes:
        best: The pair that was chosen, on held-out training images.
        test_accuracies: By noise seed, fitted on all training images.
        test_f1: Macro F1, with the first noise seed.
        few_label_test_accuracies: By labels a class, one accuracy a draw of them.
        calibration: How far the probe of the first noise seed can be trusted.
    """

    best: Pair
    test_accuracies: dict[str, float]
    test_f1: float | None = None
    few_label_test_accuracies: dict[str, list[float]] = many()
    calibration: Calibration | None = None

    @property
    def words(self) -> str:
        """Layer and level, for tables."""
        return self.best.words


@dataclass(kw_only=True)
class FusedProbe(Probe):
    """How the probe of several taps did, whose features were joined.

    Attributes:
        steps: The taps in the order in which they were added, the best pair first. The figures of each are those of a
            probe of all taps up to it, joined.
        best: The step whose taps were tested: the first of those with the highest accuracy on held-out images.
        gain: By how much its test accuracy is above the best pair's, with the first noise seed.
        gain_interval: The ends of the gain's 95 % interval, by the images: see `fusing.paired_gain`.
    """

    steps: list[Pair]
    gain: float
    gain_interval: list[float]

    @property
    def taps(self) -> list[Pair]:
        """The taps that were tested, in the order in which their features were joined."""
        return self.steps[: self.steps.index(self.best) + 1]

    @property
    def words(self) -> str:
        """All taps that were tested, for tables."""
        return "; ".join(tap.words for tap in self.taps)

    @property
    def joined(self) -> dict[str, FusedProbe]:
        """This probe by its name in tables; nothing where the best pair alone did best, whose probe it then is."""
        return {f"DDAE, {len(self.taps)} taps joined": self} if len(self.taps) > 1 else {}

    @property
    def said(self) -> str:
        """What was joined and what that gained, in sentences."""
        low, high = self.gain_interval
        return (
            "Taps were then added one by one, each time the one with which a probe of all joined features classifies "
            "the held-out images best, without another pass of the network. The table has this accuracy and what each "
            f"tap adds to it, which flatters, as it was chosen for that. The first {len(self.taps)} of "
            f"{len(self.steps)} taps do best; on the test images they gain {100 * self.gain:+.2f} points over the best "
            f"pair alone (95 % interval {100 * low:+.2f} to {100 * high:+.2f}, paired by images, first noise seed)."
        )

    def with_steps(self, head: Sequence[str], rows: Sequence[list[str]]) -> tuple[list[str], list[list[str]]]:
        """Return a probe's table with a row for every tap that was added, and what each adds, in percent.

        The table's first columns are features, tap and labels, and its first row is of the best pair, whose held-out
        accuracy it gets too.
        """
        accuracies = [step.validation_accuracy or 0.0 for step in self.steps]
        table = [[*row[:3], "", "", *row[3:]] for row in rows]
        table[0][3] = percent(accuracies[0])
        for number, step in enumerate(self.steps[1:], 1):
            gain = f"{100 * (accuracies[number] - accuracies[number - 1]):+.2f}"
            row = [f"with tap {number + 1}", step.words, "", percent(accuracies[number]), gain]
            table.insert(number, [*row, *[""] * (len(head) - 3)])
        return [*head[:3], "held out", "adds", *head[3:]], table

    def figures(self, seed: str) -> list[Figure]:
        """Return its test accuracy with a noise seed, unless the best pair alone did best, whose figure it then is."""
        taps = "; ".join(f"{tap.layer} at sigma {tap.sigma:g}" for tap in self.taps)
        name, where = "Test accuracy of a linear probe on several taps", {"taps": taps, "noise_seed": int(seed)}
        return [Figure("accuracy", name, self.test_accuracies[seed], where) for _ in self.joined]


@dataclass(kw_only=True)
class Point(Pair):
    """A checkpoint of a training run, or an average of its weights: its best pair, and what else was measured.

    Attributes:
        step: The step that it is of.
        length: The average's length, as `averages` has it; None for a checkpoint.
    """

    step: int
    length: float | None = None
    test_accuracy: float
    test_loss: float | None = None
    frechet_distance: float | None = None


def words_of_neighbours(pairs: Sequence[Pair]) -> str:
    """Return in a sentence, after a space, where nearest neighbours classify best; nothing where none were asked."""
    near = [(getattr(pair, name), name[4:], pair) for name in ("knn_20", "knn_200") for pair in pairs]
    known = [found for found in near if found[0] is not None]
    if not known:
        return ""
    share, count, pair = max(known, key=lambda found: found[0])
    text = f" The nearest {count} neighbours classify held-out images best at `{pair.layer}`, sigma {pair.sigma:g}, "
    return f"{text}with an accuracy of {percent(share)} %."


def kept_pairs(path: Path | None, known: Mapping[str, Any], compute: Callable[[], Sequence[Pair]]) -> list[Pair]:
    """Return figures that a file holds, or compute them and keep them there, so that an interrupted search goes on.

    `known` says as JSON what they depend on; a file of figures that depend on something else is written anew. Without
    a path nothing is kept.

    Raises:
        ValueError: The file is damaged.
    """
    key = _hash_of(known)
    kept = read_json(path) if path is not None and path.exists() else {}
    if kept.get("key") != key:
        rows = [dataclasses.asdict(pair) for pair in compute()]
        kept = {"key": key, "rows": rows, "sha256": _hash_of(rows)}
        if path is not None:
            write_json(path, kept)
    elif path is not None and kept.get("sha256", "") not in ("", _hash_of(kept.get("rows"))):  # "": of 0.2.0
        raise damaged(path, "its checksum is not that of the figures that were written")
    return [Pair(**row) for row in kept["rows"]]


def _hash_of(known: Any) -> str:
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
