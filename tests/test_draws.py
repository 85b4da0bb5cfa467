"""Randomness by index: what is drawn, and that nothing else plays a part."""

import numpy as np
import torch

from ddae_hf.experiments.draws import CHANGES, NOISE, POSTERIOR, index_generator, indexed_noise


def test_indexed_noise_depends_on_seed_index_and_view_alone():
    whole = indexed_noise((3, 8, 8), range(10), seed=4)
    assert torch.equal(whole[[7, 2]], indexed_noise((3, 8, 8), [7, 2], seed=4))
    others = [indexed_noise((3, 8, 8), range(10), seed=5), indexed_noise((3, 8, 8), range(10), seed=4, view=1)]
    for other in others:
        assert not torch.isclose(whole, other).all(dim=(1, 2, 3)).any()
    many = indexed_noise((3, 8, 8), range(500))
    assert abs(many.mean()) < 0.01 and abs(many.std() - 1) < 0.01
    assert torch.corrcoef(many.flatten(1)[:50]).fill_diagonal_(0).abs().max() < 0.35


def test_seeds_are_those_of_the_caches_that_there_are():
    """Features on disk were made with these: others would be told apart by nothing."""
    for purpose, seeds in ((NOISE, [4, 1, 7]), (CHANGES, [4, 1, 7, 1]), (POSTERIOR, [4, 1, 7, 2])):
        expected = np.random.default_rng(seeds).standard_normal(6, dtype=np.float32)
        assert np.array_equal(index_generator(4, 1, 7, purpose).standard_normal(6, dtype=np.float32), expected)
        drawn = indexed_noise((6,), torch.tensor([7]), seed=4, view=1, purpose=purpose)
        assert torch.equal(drawn[0], torch.from_numpy(expected))
