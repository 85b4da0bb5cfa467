"""Calibration against torchmetrics, scipy and float64 formulas, and that a temperature is fitted on unseen images."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from torchmetrics.functional.classification import multiclass_calibration_error

from ddae_hf.experiments import probing
from ddae_hf.experiments.calibration import (
    BINS,
    Calibration,
    calibration_of,
    fitted_temperature,
    negative_log_likelihood,
    reliability,
)
from ddae_hf.experiments.logistic_regression import fit_logistic_regression
from ddae_hf.experiments.sweeping import check_sweep

from .test_sweeping import opened, save_checkpoint


def draw(count, classes, sharpness=1.0, seed=0):
    """Logits, `sharpness` times those whose probabilities the labels are drawn with."""
    rng = np.random.default_rng(seed)
    true = rng.normal(0, 2, (count, classes))
    labels = np.array([rng.choice(classes, p=p) for p in softmax(true, 1)])
    return torch.from_numpy(sharpness * true), labels


def likelihood(logits, labels):
    return -log_softmax(logits.numpy(), 1)[np.arange(len(labels)), labels].mean()


@pytest.mark.parametrize("classes", [2, 7])
def test_the_calibration_error_is_torchmetrics_and_the_formulas(classes):
    logits, labels = draw(2000, classes, 3)
    found = reliability(logits, labels)
    probabilities = torch.softmax(logits, 1)
    expected = multiclass_calibration_error(probabilities, torch.from_numpy(labels), classes, n_bins=BINS, norm="l1")
    assert found.error == pytest.approx(expected.item(), abs=1e-6) and found.error > 0.05
    confidence = softmax(logits.numpy(), 1).max(1)
    right = logits.numpy().argmax(1) == labels
    total = 0.0
    for low in range(BINS):
        inside = (confidence >= low / BINS) & (confidence < (low + 1) / BINS)
        assert inside.sum() == found.count[low]
        if inside.any():
            total += inside.sum() * abs(right[inside].mean() - confidence[inside].mean())
            assert found.accuracy[low] == pytest.approx(right[inside].mean(), abs=1e-12)
    assert found.error == pytest.approx(total / len(labels), abs=1e-12)
    assert negative_log_likelihood(logits, labels) == pytest.approx(likelihood(logits, labels), rel=1e-12)


def test_images_of_full_confidence_are_in_the_last_bin():
    """They are not in one of their own, as errors of the two could not cancel each other."""
    logits = torch.tensor([[100.0, 0.0], [3.0, 0.0]])
    found = reliability(logits, np.array([1, 0]))
    assert found.count.tolist() == [0] * (BINS - 1) + [2]
    assert found.error == pytest.approx((1 + 1 / (1 + np.exp(-3))) / 2 - 0.5)


@pytest.mark.parametrize("temperature", [0.25, 1.0, 4.0])
def test_the_temperature_of_logits_that_are_too_sharp_or_too_flat_is_recovered(temperature):
    logits, labels = draw(20_000, 5, temperature)
    found = fitted_temperature(logits, labels)
    assert found == pytest.approx(temperature, rel=0.03)
    best = minimize_scalar(
        lambda log: likelihood(logits / np.exp(log), labels), bounds=(-5, 5), method="bounded", options={"xatol": 1e-9}
    )
    assert found == pytest.approx(np.exp(best.x), rel=1e-4)
    after = calibration_of(logits, labels, found)
    assert after.negative_log_likelihood_at_temperature <= after.negative_log_likelihood
    assert after.calibration_error_at_temperature < 0.015
    if temperature != 1:
        assert after.calibration_error > 5 * after.calibration_error_at_temperature
    assert calibration_of(logits / found, labels, None).calibration_error == after.calibration_error_at_temperature


def test_logits_of_any_size_have_their_temperature():
    logits, labels = draw(500, 3)
    expected = fitted_temperature(logits, labels)
    for factor in (1e-6, 1e6):
        assert fitted_temperature(factor * logits, labels) == pytest.approx(factor * expected, rel=1e-6)
    assert fitted_temperature(logits.float(), labels) == pytest.approx(expected, rel=1e-4)


def test_where_no_temperature_is_best_there_is_none():
    """All right: the smaller, the better. Worse than chance: the larger, the better. All alike: no difference."""
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 1.0]])
    assert fitted_temperature(logits, np.array([0, 1, 0])) is None
    assert fitted_temperature(logits, np.array([1, 0, 1])) is None
    assert fitted_temperature(torch.zeros(3, 2), np.array([0, 1, 0])) is None
    assert fitted_temperature(torch.full((3, 2), float("nan")), np.array([0, 1, 0])) is None
    found = calibration_of(logits, np.array([0, 1, 0]), None)
    assert found.temperature is found.calibration_error_at_temperature is None and found.calibration_error > 0
    assert found.words(3, 1.0).endswith("was fitted: the probe classifies all held-out images correctly.")
    assert found.words(3, None).endswith(" nats. No temperature was fitted.")


def test_logits_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="Some logits of test images are not finite.*Run it in float32"):
        calibration_of(torch.tensor([[0.0, float("inf")]]), np.array([0]), 1.0)


def test_the_sentence_has_every_figure():
    figures = Calibration(
        calibration_error=0.0512, negative_log_likelihood=0.25, temperature=1.5,
        calibration_error_at_temperature=0.0211, negative_log_likelihood_at_temperature=0.125,
    )  # fmt: skip
    text = figures.words(1234, 0.5)
    assert all(each in text for each in ("5.12 %", "0.2500 nats", "1.500", "2.11 %", "0.1250 nats", "1,234 held-out"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.mark.parametrize("views", [1, 2])
def test_a_temperature_is_fitted_on_images_that_the_probe_has_not_seen(views, checkpoint, digits, tmp_path):
    """As a probe made here says, of features that are read anew; that of the images it learnt from is another."""
    changes = {"layers": ["mid_block"], "sigmas": [0.3, 1.0], "num_views": views, "l2": [1e-6]}
    prober = check_sweep(*opened(checkpoint, digits, **changes), tmp_path)
    (pair,) = prober.level(0.3)
    labels = prober.labels["train"]
    read = prober.features("train", ["mid_block"], 0.3, 0)["mid_block"]
    probe = fit_logistic_regression({"it": read}, labels, [1e-6], num_classes=10, indices=prober.fitted)["it"]
    logits = torch.from_numpy(np.mean(read, 0, dtype=np.float64)) @ probe.weight[0].T + probe.bias[0]
    held_out, fitted = prober.held_out, prober.fitted
    assert not set(held_out) & set(fitted) and pair.temperature > 1
    assert pair.temperature == pytest.approx(fitted_temperature(logits[held_out], labels[held_out]), rel=1e-4)
    seen = fitted_temperature(logits[fitted], labels[fitted])
    assert seen is None or pair.temperature > 1.5 * seen
    probe, fitted = prober.tested([pair], 1)
    shown = prober.features("test", ["mid_block"], 0.3, 0)["mid_block"]
    logits = torch.from_numpy(np.mean(shown, 0, dtype=np.float64)) @ fitted.weight.T + fitted.bias
    torch.testing.assert_close(fitted.logits, logits)
    assert np.array_equal(fitted.logits.argmax(1).numpy(), fitted.predicted)
    expected = calibration_of(logits, prober.labels["test"], pair.temperature)
    assert dataclasses.asdict(probe.calibration) == pytest.approx(dataclasses.asdict(expected), rel=1e-6)


def test_probes_that_learn_by_gradient_descent_are_calibrated_by_their_own_logits(checkpoint, digits, monkeypatch):
    changes = {"layers": ["mid_block"], "sigmas": [0.3], "protocol": "batch_norm", "num_train_epochs": 3}
    prober = check_sweep(*opened(checkpoint, digits, **changes))
    asked = []
    original = probing.logits_online

    def noted(prober, probes, split, sigma, rows, noise_seed):
        found = original(prober, probes, split, sigma, rows, noise_seed)
        asked.append((split, rows, found["mid_block"]))
        return found

    monkeypatch.setattr(probing, "logits_online", noted)
    (pair,) = prober.level(0.3)
    probe, fitted = prober.tested([pair], 1)
    (first, rows, logits), (second, _, answers) = asked
    assert (first, second) == ("train", "test") and np.array_equal(rows, prober.held_out)
    assert pair.temperature == fitted_temperature(logits, prober.labels["train"][rows])
    assert probe.calibration == calibration_of(answers, prober.labels["test"], pair.temperature)
    assert probe.test_accuracies["0"] == (answers.argmax(1).numpy() == prober.labels["test"]).mean()
