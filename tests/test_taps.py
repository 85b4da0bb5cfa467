"""Taps as words, `layer@sigma`."""

import math

import numpy as np
import pytest

from ddae_hf.experiments.taps import read_tap, read_taps, tap_word


@pytest.mark.parametrize("sigma", [0.05, 0.1 + 0.2, 1e-7, 80, math.inf, np.float32(0.1)])
def test_a_word_says_a_tap_without_loss(sigma):
    assert read_tap(tap_word("up_blocks.1.resnets.2", sigma)) == ("up_blocks.1.resnets.2", float(sigma))


def test_words_and_pairs_are_read_alike():
    taps = [("mid_block", 0.14), ("up_blocks.0.resnets.0", 0.05)]
    assert read_taps(["mid_block@0.14", "up_blocks.0.resnets.0@5e-2"]) == read_taps(taps) == taps
    assert tap_word("mid_block", 0.14) == "mid_block@0.14"


@pytest.mark.parametrize(
    ("taps", "message"),
    [
        ("mid_block@0.1", "it must be a list"),
        (3, "it must be a list"),
        ([], "taps is empty"),
        (["mid_block"], "'mid_block': give words"),
        (["mid_block@"], "give words"),
        (["@0.1"], "give words"),
        (["mid_block@x"], "give words"),
        (["mid_block@nan"], "not a number"),
        ([("mid_block", "0.1")], "give words"),
        ([("mid_block", True)], "give words"),
        ([("mid_block", 0.1, 0.2)], "give words"),
        ([(3, 0.1)], "give words"),
        ([None], "give words"),
        (["mid_block@0.1", ("mid_block", 0.10)], "mid_block@0.1 more than once"),
    ],
)
def test_what_is_no_list_of_taps_is_refused(taps, message):
    with pytest.raises(ValueError, match=message):
        read_taps(taps)
