"""Randomness by index: what is drawn, and that nothing else plays a part."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch

from ddae_hf.experiments import draws
from ddae_hf.experiments.draws import CHANGES, NOISE, POSTERIOR, TRAINING, RowDraws, augment_view, indexed_noise
from ddae_hf.generators import normal_quantile

WORD = 2**64


def mixed(word):
    """Return splitmix64's output for a counter, by whole numbers of any size."""
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB % WORD
    return word ^ (word >> 31)


def key_of(index, *numbers):
    key = 0
    for number in numbers:
        key = mixed((key + draws._STEP + number) % WORD)
    return mixed(((index + 1) * draws._STEP + key) % WORD)


def normal_numbers(key, count):
    """Return Box and Muller's normal numbers of a key in float64."""
    numbers = []
    for place in range(1, count // 2 + 1):
        word = mixed((key + place * draws._STEP) % WORD)
        low, high = word % 2**32, word >> 32
        radius = math.sqrt(-2 * math.log((low % 2**31 + 0.5) / 2**31))
        angle = math.pi * ((high ^ 2**31) - 2**31) / 2**31  # of signed numbers
        numbers += [radius * math.cos(angle), radius * math.sin(angle)]
    return numbers


def test_the_generator_is_the_published_one():
    """The first outputs of splitmix64 for the seed 1234567, which implementations elsewhere are tested with."""
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    counters = torch.tensor([draws._signed(1234567 + i * draws._STEP) for i in (1, 2, 3)])
    assert [word % WORD for word in draws._hashed_(counters).tolist()] == known
    assert [mixed((1234567 + i * draws._STEP) % WORD) for i in (1, 2, 3)] == known


@pytest.mark.parametrize(("seed", "view", "purpose"), [(0, 0, NOISE), (4, 7, CHANGES), (2**40, 1, POSTERIOR)])
def test_noise_is_that_of_a_computation_in_whole_numbers(seed, view, purpose):
    drawn = indexed_noise((2, 3, 4), [7, 2**33], seed, view, purpose)
    expected = [normal_numbers(key_of(index, seed, purpose, view), 24) for index in (7, 2**33)]
    np.testing.assert_allclose(drawn.flatten(1), expected, rtol=2e-6, atol=2e-6)


def test_indexed_noise_depends_on_seed_index_view_and_purpose_alone():
    whole = indexed_noise((3, 8, 8), range(10), seed=4)
    for indices in ([7, 2], np.array([7, 2]), torch.tensor([7, 2])):
        assert torch.equal(whole[[7, 2]], indexed_noise((3, 8, 8), indices, seed=4))
    assert torch.equal(whole[3:9:2], indexed_noise((3, 8, 8), range(3, 9, 2), seed=4))
    for other in ({"seed": 5}, {"seed": 4, "view": 1}, {"seed": 4, "purpose": POSTERIOR}):
        found = indexed_noise((3, 8, 8), range(10), **other)
        assert not torch.isclose(whole, found).all(dim=(1, 2, 3)).any()
    assert torch.equal(indexed_noise((4, 3, 5, 5), [3])[:, 0], indexed_noise((3, 5, 5), [3]))  # the first of four
    assert indexed_noise((3, 8, 8), range(0)).shape == (0, 3, 8, 8)


def test_pieces_that_fit_into_the_cache_are_drawn_as_all_at_once(monkeypatch):
    whole = indexed_noise((3, 9, 9), range(50))
    for size in (1, 1000):
        monkeypatch.setattr(draws, "_IN_CACHE", size)
        assert torch.equal(indexed_noise((3, 9, 9), range(50)), whole)


def test_global_generators_play_no_part_and_stay_as_they_are():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = indexed_noise((3, 8, 8), range(3))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(1)
    assert torch.equal(first, indexed_noise((3, 8, 8), range(3)))


def test_noise_is_standard_normal_and_images_have_nothing_to_do_with_each_other():
    many = indexed_noise((3, 32, 32), range(400))
    assert scipy.stats.kstest(many.flatten()[:400_000], "norm").pvalue > 0.001
    assert abs(many.mean()) < 0.005 and abs(many.var() - 1) < 0.01 and abs((many**4).mean() - 3) < 0.03
    between = torch.corrcoef(many.flatten(1)).fill_diagonal_(0).abs().max()
    assert between < 6 / math.sqrt(3072)
    within = torch.corrcoef(many.flatten(1).T[:300]).fill_diagonal_(0).abs().max()
    assert within < 6 / math.sqrt(400)
    spectrum = torch.fft.rfft2(many).abs().square().mean((0, 1))
    assert (spectrum / spectrum.mean() - 1).abs().max() < 0.25


def test_uniform_numbers_are_uniform_and_never_0_or_1():
    shares = RowDraws(0, range(1000), "cpu").uniform((1000, 500))
    assert 0 < shares.min() and shares.max() < 1
    assert scipy.stats.kstest(shares.flatten()[:400_000], "uniform").pvalue > 0.001
    ends = torch.tensor([0, -1], dtype=torch.int32).view(1, 1, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draws, "_bits", lambda keys, count: ends)
        assert draws._uniform(torch.zeros(1, dtype=torch.int64), (2,)).tolist() == [[2.0**-24, 1 - 2.0**-24]]
        assert draws._normal(torch.zeros(1, dtype=torch.int64), (2,)).isfinite().all()


def test_draws_for_rows_do_not_depend_on_how_rows_are_shared_out():
    def several(indices):
        rows = RowDraws(3, indices, "cpu")
        count = len(indices)
        return [rows.normal((count, 3, 4)), rows.uniform((count,)), rows.normal((count, 3, 4)), rows.uniform((count,))]

    whole = several(range(100, 112))
    parts = zip(several(range(100, 105)), several(range(105, 112)), strict=True)
    for one, two in zip(whole, parts, strict=True):
        assert torch.equal(one, torch.cat(two))
    assert not torch.isclose(whole[0], whole[2]).any() and not torch.isclose(whole[1], whole[3]).any()
    for other in (RowDraws(4, range(100, 112), "cpu"), RowDraws(3, range(100, 112), "cpu", view=1)):
        assert not torch.isclose(whole[0], other.normal((12, 3, 4))).any()
    with pytest.raises(ValueError, match=r"shape \(11,\) are asked for: these are draws for 12 rows"):
        RowDraws(3, range(100, 112), "cpu").uniform((11,))


def test_training_has_other_draws_than_images_have():
    trained = RowDraws(0, range(5), "cpu").normal((5, 3, 8, 8))
    for purpose in (NOISE, CHANGES, POSTERIOR, TRAINING):
        assert not torch.isclose(trained, indexed_noise((3, 8, 8), range(5), purpose=purpose)).all((1, 2, 3)).any()


def test_views_need_an_index_an_image():
    with pytest.raises(ValueError, match="3 images, but 2 indices"):
        augment_view(torch.zeros(3, 1, 8, 8), range(2), 0, 1, True, 2)


def test_seeds_and_indices_of_numpy_are_as_good():
    expected = indexed_noise((3, 4), [5], 7, 2)
    assert torch.equal(indexed_noise((3, 4), [np.int64(5)], np.int64(7), np.int32(2)), expected)


def test_quantiles_are_those_of_the_normal_distribution_on_macs_too():
    shares = (torch.arange(2**12) + 0.5) / 2**12
    expected = scipy.stats.norm.ppf(shares.double().numpy())
    np.testing.assert_allclose(normal_quantile(shares), expected, rtol=1e-5, atol=1e-6)
    device = SimpleNamespace(type="mps")
    other = type("Shares", (), {"device": device, "__rmul__": lambda self, factor: factor * shares})()
    np.testing.assert_allclose(normal_quantile(other), expected, rtol=2e-5, atol=1e-6)
