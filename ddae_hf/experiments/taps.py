"""Taps as words: `mid_block@0.14` is the layer `mid_block` at the noise level 0.14.

Options of commands and reports name taps so; a configuration holds them as pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, SupportsFloat


def tap_word(layer: str, sigma: float) -> str:
    """Return a layer at a noise level as one word, which `read_tap` reads back without loss."""
    return f"{layer}@{float(sigma)!r}"


def read_tap(tap: str | Sequence[Any]) -> tuple[str, float]:
    """Return the layer and the noise level of a word `layer@sigma`, or of a pair of both.

    Whether a network has the layer, and its scheduler the level, is for `DDAEConfig` to say.

    Raises:
        ValueError: Neither a word nor a pair, or a level that is no number.
    """
    wanted = "give words layer@sigma, such as mid_block@0.14, or pairs of a layer and a number"
    if not isinstance(tap, str) and not (isinstance(tap, Sequence) and len(tap) == 2):
        raise ValueError(f"A tap is {tap!r}: {wanted}.")
    layer = tap.rpartition("@")[0] if isinstance(tap, str) else tap[0]
    sigma = tap.rpartition("@")[2] if isinstance(tap, str) else tap[1]
    if isinstance(tap, str):
        with_number = _is_number(sigma)
    else:
        with_number = isinstance(sigma, SupportsFloat) and not isinstance(sigma, bool)
    if not (isinstance(layer, str) and layer and with_number):
        raise ValueError(f"A tap is {tap!r}: {wanted}.")
    if math.isnan(float(sigma)):
        raise ValueError(f"A tap is {tap!r}, whose noise level is not a number: {wanted}.")
    return layer, float(sigma)


def read_taps(taps: Iterable[str | Sequence[Any]]) -> list[tuple[str, float]]:
    """Return the layers and noise levels of several words or pairs, in their order.

    Raises:
        ValueError: A single word in place of a list, an empty list, a tap that comes twice, or what `read_tap` refuses.
    """
    if isinstance(taps, str) or not isinstance(taps, Iterable):
        raise ValueError(f"taps is {taps!r}: it must be a list of words, such as mid_block@0.14.")
    found = [read_tap(tap) for tap in taps]
    if not found:
        raise ValueError("taps is empty: give one or more words, such as mid_block@0.14, or leave it out.")
    if twice := [tap for tap in found if found.count(tap) > 1]:
        raise ValueError(f"taps has {tap_word(*twice[0])} more than once: leave one of them out.")
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
