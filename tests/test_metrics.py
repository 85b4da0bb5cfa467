"""Metrics are scikit-learn's values under evaluate's interface, without the network."""

import evaluate
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

from ddae_hf.experiments.metrics import F1, Accuracy, Precision, Recall, classification_metrics

SCORES = {F1: f1_score, Precision: precision_score, Recall: recall_score}


@pytest.fixture
def answers():
    """References and predictions of five classes, of which the fourth is never predicted."""
    rng = np.random.default_rng(0)
    references = rng.integers(0, 5, 300)
    predictions = np.where(rng.random(300) < 0.6, references, rng.integers(0, 5, 300))
    predictions[predictions == 3] = 0
    return {"references": references, "predictions": predictions}


def test_the_combination_gives_every_figure_averaged_over_classes(answers):
    pair = (answers["references"], answers["predictions"])
    expected = {"accuracy": accuracy_score(*pair)}
    expected |= {m().name: s(*pair, average="macro", zero_division=0) for m, s in SCORES.items()}
    assert list(expected) == ["accuracy", "f1", "precision", "recall"]
    found = classification_metrics().compute(**answers)
    assert found == expected and all(type(value) is float for value in found.values())


@pytest.mark.parametrize("metric", SCORES)
def test_arguments_are_those_of_evaluate(metric, answers):
    pair = (answers["references"], answers["predictions"])
    for options in ({"average": "micro"}, {"average": "weighted"}, {"labels": [0, 2]}, {"zero_division": 1}):
        expected = SCORES[metric](*pair, **{"average": "macro", "zero_division": 0, **options})
        assert metric().compute(**answers, **options) == {metric().name: expected}
    each = metric().compute(**answers, average=None)[metric().name]
    np.testing.assert_array_equal(each, SCORES[metric](*pair, average=None, zero_division=0))
    two = {name: (values > 1).astype(int) for name, values in answers.items()}
    expected = SCORES[metric](two["references"], two["predictions"], pos_label=0)
    assert metric().compute(**two, average="binary", pos_label=0) == {metric().name: expected}


def test_answers_may_come_in_parts(answers):
    whole, parts = Accuracy().compute(**answers), evaluate.combine([Accuracy(), F1()])
    for part in (slice(0, 100), slice(100, 300)):
        parts.add_batch(**{name: values[part] for name, values in answers.items()})
    assert parts.compute() == whole | F1().compute(**answers)
    assert Accuracy().compute(**answers, normalize=False)["accuracy"] == pytest.approx(whole["accuracy"] * 300)
