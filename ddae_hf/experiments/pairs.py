"""Layers at noise levels, and how probes of them did: what the reports of probes are made of."""

from __future__ import annotations

from dataclasses import dataclass

from .calibration import Calibration
from .report import in_memory, many


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
