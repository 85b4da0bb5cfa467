"""Scores and how well they tell sets apart, against plain formulas in float64 and scikit-learn's curves."""

import numpy as np
import pytest
from sklearn.covariance import EmpiricalCovariance
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.preprocessing import StandardScaler, normalize

from ddae_hf.experiments import outlier_scores
from ddae_hf.experiments.outlier_scores import (
    class_mahalanobis,
    mahalanobis,
    nearest_distance,
    rates,
    separation,
    standardised,
    unit_length,
)


@pytest.fixture
def features():
    """Features of training images of three classes, in one of which is one image, and of others."""
    random = np.random.default_rng(0)
    labels = np.array([0, 4] * 20 + [7])
    train = random.normal(size=(41, 5)) @ random.normal(size=(5, 5)) + labels[:, None]
    return train, labels, random.normal(size=(9, 5)) * 3


def test_distances_are_those_of_formulas(features):
    train, labels, others = features
    near = np.sort(np.linalg.norm(others[:, None] - train, axis=2), axis=1)
    for place in (1, 5, 41):
        np.testing.assert_allclose(nearest_distance(others, train, place), near[:, place - 1])
    inverse = np.linalg.inv(np.cov(train.T, bias=True))
    away = others - train.mean(0)
    np.testing.assert_allclose(mahalanobis(others, train), np.einsum("ni,ij,nj->n", away, inverse, away))
    np.testing.assert_allclose(mahalanobis(others, train), EmpiricalCovariance().fit(train).mahalanobis(others))
    means = {label: train[labels == label].mean(0) for label in (0, 4, 7)}
    left = train - np.stack([means[label] for label in labels])
    inverse = np.linalg.inv(left.T @ left / len(left))
    each = [np.einsum("ni,ij,nj->n", others - mean, inverse, others - mean) for mean in means.values()]
    np.testing.assert_allclose(class_mahalanobis(others, train, labels), np.min(each, axis=0))


def test_features_are_normalised_as_scikit_learn_does(features):
    train, _, others = features
    others[3] = 0
    train[:, 2] = 7.5
    np.testing.assert_allclose(unit_length(others), normalize(others))
    np.testing.assert_allclose(standardised(others, train), StandardScaler().fit(train).transform(others))


def scores(ties):
    random = np.random.default_rng(1)
    inside = random.normal(size=60)
    outside = random.normal(size=37) + 1
    return [np.round(each, 0 if ties else 9) for each in (inside, outside)]


@pytest.mark.parametrize("ties", [False, True])
def test_rates_are_those_of_scikit_learns_curves(ties):
    """Of resamples too, whose counts are weights there."""
    inside, outside = map(np.sort, scores(ties))
    random = np.random.default_rng(2)
    of_inside = np.stack([np.ones(60, int), random.multinomial(60, [1 / 60] * 60)])
    of_outside = np.stack([np.ones(37, int), random.multinomial(37, [1 / 37] * 37)])
    areas, passed = rates(inside, outside, of_inside, of_outside)
    both = np.concatenate([inside, outside])
    for area, share, *weights in zip(areas, passed, of_inside, of_outside, strict=True):
        weight = np.concatenate(weights)
        assert area == pytest.approx(roc_auc_score(np.arange(97) >= 60, both, sample_weight=weight))
        fpr, tpr, _ = roc_curve(np.arange(97) < 60, -both, sample_weight=weight, drop_intermediate=False)
        assert share == pytest.approx(fpr[np.argmax(tpr >= 0.95 - 1e-12)])


@pytest.mark.parametrize("count", [20, 100, 360, 1000])
def test_the_threshold_accepts_95_in_100_known_images_and_no_more(count):
    """At numbers of which rounding would make another share."""
    inside = np.arange(count, dtype=float)
    _, passed = rates(inside, inside, np.ones((1, count), int), np.ones((1, count), int))
    assert passed[0] == 0.95


def test_a_separation_has_sklearns_area_and_intervals_by_a_seed(monkeypatch):
    inside, outside = scores(False)
    found = separation(inside, outside, 0)
    truth = np.repeat([0, 1], [60, 37])
    assert found.auroc == roc_auc_score(truth, np.concatenate([inside, outside])) > 0.5
    for value, (low, high) in ((found.auroc, found.auroc_interval), (found.fpr95, found.fpr95_interval)):
        assert 0 <= low <= value <= high <= 1 and low < high
    assert found == separation(10 * inside, 10 * outside, 0) != separation(inside, outside, 1)
    monkeypatch.setattr(outlier_scores, "_AT_ONCE", 200)  # pieces play no part
    assert separation(inside, outside, 0) == found
    reversed_ = separation(-inside, -outside, 0)
    assert reversed_.auroc == pytest.approx(1 - found.auroc)
    np.testing.assert_allclose(reversed_.auroc_interval, [1 - end for end in found.auroc_interval[::-1]])


def test_intervals_cover_what_they_should():
    """Of 100 pairs of samples, about 95 intervals have the true area, which is that of two normal distributions."""
    random = np.random.default_rng(3)
    covered = 0
    for _ in range(100):
        low, high = separation(random.normal(size=50), random.normal(size=50) + 1, 0).auroc_interval
        covered += low <= 0.76025 <= high
    assert 88 <= covered <= 100


def test_sets_that_are_apart_and_alike():
    apart = separation(np.zeros(4), np.ones(3), 0)
    assert (apart.auroc, apart.fpr95, apart.auroc_interval, apart.fpr95_interval) == (1, 0, [1, 1], [0, 0])
    alike = separation(np.ones(4), np.ones(3), 0)
    assert (alike.auroc, alike.fpr95) == (0.5, 1)
    for wrong in (np.array([]), np.array([1.0, np.nan])):
        with pytest.raises(ValueError, match="scores of images outside came: give at least one, all of them finite"):
            separation(np.ones(3), wrong, 0)
