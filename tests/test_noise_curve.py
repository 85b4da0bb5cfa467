"""The shape of accuracy over noise levels: made-up curves of each shape, their tests, and what a sweep says of them."""

import dataclasses
import json
from math import comb

import numpy as np
import pytest

from ddae_hf.experiments.noise_curve import (
    MEANING,
    NoiseCurve,
    corrected_p_values,
    curve_from,
    curve_of,
    packed,
    shape_of,
    unpacked,
)
from ddae_hf.experiments.pairs import Pair
from ddae_hf.experiments.report import accuracy_interval

SIGMAS = [0.1, 0.2, 0.5, 1.0, 2.0]


def answers(accuracies, count=1000, seed=0):
    """Which images are right at each level: those that are easy enough, so that levels differ on few of them."""
    ease = np.random.default_rng(seed).permutation(count) / count
    return np.stack([ease < accuracy for accuracy in accuracies])


@pytest.mark.parametrize(
    "accuracies, shape, peak",
    [
        ([0.80, 0.85, 0.90, 0.85, 0.70], "inner peak", 0.5),
        ([0.80, 0.90, 0.90, 0.85, 0.70], "inner peak", 0.2),  # the first of equals
        ([0.80, 0.90, 0.899, 0.901, 0.70], "inner peak", 1.0),  # what lies between is no significant fall
        ([0.90, 0.85, 0.80, 0.75, 0.50], "falling", 0.1),
        ([0.90, 0.902, 0.80, 0.75, 0.50], "falling", 0.2),  # no significant rise
        ([0.50, 0.60, 0.70, 0.80, 0.90], "rising", 2.0),
        ([0.90, 0.90, 0.90, 0.90, 0.90], "flat", 0.1),
        ([0.900, 0.902, 0.901, 0.903, 0.900], "flat", 1.0),
        ([0.90, 0.80, 0.70, 0.80, 0.90], "neither", 0.1),  # a valley
        ([0.80, 0.90, 0.80, 0.90, 0.80], "neither", 0.2),  # two peaks
        ([0.85, 0.80, 0.90, 0.80, 0.70], "neither", 0.5),  # a fall before the peak
        ([0.90, 0.90, 0.93, 0.88, 0.90], "neither", 0.5),  # no level differs from both ends
    ],
)
def test_curves_of_every_shape_are_told_apart(accuracies, shape, peak):
    curve = curve_from("it", SIGMAS, answers(accuracies))
    assert (curve.shape, curve.peak) == (shape, peak)
    assert curve.accuracies == pytest.approx(accuracies) and curve.sigmas == SIGMAS
    assert MEANING[shape] in curve.words(1000)


def test_few_images_say_nothing():
    """The same accuracies, of fewer images: three right of three against one is not significant."""
    accuracies = [0.80, 0.90, 0.70]
    assert curve_from("it", SIGMAS[:3], answers(accuracies, 1000)).shape == "inner peak"
    assert curve_from("it", SIGMAS[:3], answers(accuracies, 20)).shape == "flat"


def test_levels_of_one_accuracy_rarely_have_a_shape_by_chance():
    """Holm's correction bounds the share of curves with any significant difference by 5 %; without it, it is larger."""
    rng = np.random.default_rng(0)
    shapes = [curve_from("it", SIGMAS, rng.random((5, 200)) < 0.8).shape for _ in range(200)]
    assert sum(shape != "flat" for shape in shapes) <= 0.05 * 200 + 3 * (0.05 * 0.95 * 200) ** 0.5


def test_p_values_are_those_of_fair_coins_with_holms_correction():
    rng = np.random.default_rng(1)
    right = rng.random((4, 60)) < np.array([[0.9], [0.5], [0.7], [0.75]])
    found = corrected_p_values(right)
    plain = {}
    for i in range(4):
        for j in range(i + 1, 4):
            one, other = int((right[i] & ~right[j]).sum()), int((right[j] & ~right[i]).sum())
            tail = sum(comb(one + other, k) for k in range(min(one, other) + 1)) / 2 ** (one + other)
            plain[i, j] = min(1.0, 2 * tail)
    assert found.keys() == plain.keys()
    order = sorted(plain, key=plain.get)
    for place, pair in enumerate(order):
        steps = [(len(order) - k) * plain[order[k]] for k in range(place + 1)]
        assert found[pair] == pytest.approx(min(1.0, max(steps)), rel=1e-9)
    assert corrected_p_values(np.ones((2, 5), dtype=bool)) == {(0, 1): 1.0}


def test_a_shape_is_of_significant_differences_alone():
    p = {(0, 1): 0.2, (0, 2): 0.049, (1, 2): 0.051}
    assert shape_of([0.9, 0.95, 0.8], p) == "falling"
    assert shape_of([0.9, 0.95, 0.8], p | {(0, 1): 0.01, (1, 2): 0.01}) == "inner peak"
    assert shape_of([0.9, 0.95, 0.8], dict.fromkeys(p, 0.05)) == "flat"
    assert shape_of([0.9, 0.95, 0.8], p | {(0, 2): 0.5, (1, 2): 0.01}) == "neither"


def test_figures_of_a_curve_are_those_of_its_levels():
    right = answers([0.80, 0.90, 0.70], 400)
    curve = curve_from("it", SIGMAS[:3], right)
    rise, fall = curve.differences
    assert (rise.sigmas, fall.sigmas) == ([0.1, 0.2], [0.2, 0.5])
    assert (rise.gain, fall.gain) == (pytest.approx(0.1), pytest.approx(-0.2))
    assert curve.intervals == [list(accuracy_interval(accuracy, 400)) for accuracy in (0.8, 0.9, 0.7)]
    z = 1.959964
    for accuracy, (low, high) in zip(curve.accuracies, curve.intervals, strict=True):  # Wilson's equation
        for end in (low, high):
            assert (accuracy - end) ** 2 == pytest.approx(z**2 * end * (1 - end) / 400)
        assert low < accuracy < high
    text = curve.words(400)
    assert "+10.00 points from sigma 0.1 to 0.2 (p < 0.0001) and -20.00 points from sigma 0.2 to 0.5" in text
    (whole,) = curve_from("it", SIGMAS[:3], right[[1, 0, 2]]).differences
    assert whole.sigmas == [0.1, 0.5] and whole.gain == pytest.approx(-0.2)


@pytest.mark.parametrize("count", [1, 8, 13])
def test_bits_are_unpacked_as_they_were(count):
    right = np.random.default_rng(count).random(count) < 0.5
    assert np.array_equal(unpacked(packed(right), count), right)
    with pytest.raises(ValueError, match="bits came"):
        unpacked(packed(right), count + 8)
    with pytest.raises(ValueError, match="bits came"):
        unpacked(packed(right) + "00", count)


def pairs_of(right, layer="it"):
    return [
        Pair(layer=layer, sigma=sigma, validation_accuracy=float(each.mean()), correct=packed(each))
        for sigma, each in zip(SIGMAS, right, strict=False)
    ]


def test_a_curve_is_made_of_a_layers_pairs_whatever_their_order():
    right = answers([0.80, 0.90, 0.70])
    others = pairs_of(right[[0, 2, 1]], "another")
    expected = curve_from("it", SIGMAS[:3], right)
    expected.shapes = {"another": "neither", "it": "inner peak"}
    assert ". Shapes of all 2 layers: 1 neither, 1 inner peak." in expected.words(1000)
    assert curve_of([*others, *pairs_of(right)[::-1]], "it", 1000) == expected
    assert curve_of(pairs_of(right[:2]), "it", 1000) is None
    old = pairs_of(right)
    old[1] = dataclasses.replace(old[1], correct=None)  # of an earlier version
    assert curve_of(old, "it", 1000) is None
    assert isinstance(expected, NoiseCurve) and json.dumps(dataclasses.asdict(expected))
