"""Metrics of a classifier that `evaluate` combines and computes offline: `evaluate.load` would ask the Hub for them.

Names, arguments and results are those of evaluate's metrics, and scikit-learn computes them. But unless `average`
says otherwise, classes are averaged as `macro`, their plain mean, and a division by zero gives 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import evaluate
import numpy as np
from datasets import Features, Value
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score


class ClassMetric(evaluate.Metric):
    """A figure of predicted against true classes; metrics of one process keep them in memory."""

    figure: ClassVar[Callable[..., Any]]
    defaults: ClassVar[dict[str, Any]] = {"average": "macro", "zero_division": 0}

    def __init__(self, *args: Any, num_process: int = 1, **options: Any):
        super().__init__(*args, num_process=num_process, **{"keep_in_memory": num_process == 1, **options})

    def _info(self) -> evaluate.MetricInfo:
        features = Features({"predictions": Value("int64"), "references": Value("int64")})
        return evaluate.MetricInfo(description=str(self.__doc__), citation="", features=features)

    def _compute(self, predictions: list[int], references: list[int], **options: Any) -> dict[str, Any]:
        """Return the figure by the metric's name; with `average=None` one for each class, (K,)."""
        value = type(self).figure(references, predictions, **{**self.defaults, **options})
        return {self.name: float(value) if np.ndim(value) == 0 else value}


class Accuracy(ClassMetric):
    """The share of predictions that are right, or with `normalize=False` their number."""

    figure = accuracy_score
    defaults: ClassVar[dict[str, Any]] = {}


class F1(ClassMetric):
    """The harmonic mean of precision and recall."""

    figure = f1_score


class Precision(ClassMetric):
    """The share of the images given a class that belong to it."""

    figure = precision_score


class Recall(ClassMetric):
    """The share of a class's images that are given that class."""

    figure = recall_score


def classification_metrics() -> evaluate.CombinedEvaluations:
    """Return accuracy, and F1, precision and recall averaged over classes, in one."""
    return evaluate.combine([Accuracy(), F1(), Precision(), Recall()])
