"""Several taps: which layers at which noise levels classify best together, and what each of them adds.

Taps are added one by one to the best pair of a sweep: each time the one with which a probe of all features joined
classifies held-out training images best. All features are on disk by then, and are joined where they are read: the
network does not run for this choice, and no joined array is ever in memory as a whole.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..hidden_states import hidden_size
from .pairs import FusedProbe, Pair, kept_pairs
from .pieces import Joined
from .probing import Fitted, Prober

MOST_FEATURES = 2**14  # of an image, joined, whose correlations take 2 GiB


@dataclass(eq=False)
class JoinedProber(Prober):
    """Probes of several taps: what a layer has for features at a noise level are those of `taps`, then its own.

    Attributes:
        taps: Layers at noise levels, whose features come first, in this order.
    """

    taps: Sequence[Pair] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.chosen_on = self.rows  # as in the sweep, whose grid has more pairs than are left here

    @classmethod
    def of(cls, prober: Prober, taps: Sequence[Pair], layers: list[str]) -> JoinedProber:
        """Return the probes of taps and one of these layers, with a prober's images and options."""
        options = dataclasses.replace(prober.options, knn=False, alignment=False)  # figures of single pairs
        return cls(
            prober.model, prober.train, prober.test, options, layers, prober.sigmas, prober.folder,
            prober.selection_views, taps=taps,
        )  # fmt: skip

    def features(
        self, split: str, layers: list[str], sigma: float, noise_seed: int, *,
        views: Sequence[int] | None = None, rows: np.ndarray | None = None,
    ) -> dict[str, list[Any]]:  # fmt: skip
        """Return joined features of a split's images, or of those at `rows`: for each layer, one `Joined` a view."""
        read = partial(super().features, split, noise_seed=noise_seed, views=views, rows=rows)
        own = read(layers, sigma)
        before = [read([tap.layer], tap.sigma)[tap.layer] for tap in self.taps]
        return {layer: [Joined(parts) for parts in zip(*before, own[layer], strict=True)] for layer in layers}


def check_fusing(prober: Prober) -> None:
    """Raise `ValueError` where as many taps as are asked for cannot be found or joined."""
    count = prober.options.fuse
    if count == 1:
        return
    pairs = len(prober.layers) * len(prober.sigmas)
    if count > pairs:
        raise ValueError(
            f"fuse is {count}, but the number of pairs of layer and noise level is {pairs}: ask for fewer taps, or "
            "give more layers or sigmas."
        )
    pooling = prober.model.config.pooling
    widths = [hidden_size(prober.model.denoiser, layer, pooling) for layer in prober.layers] * len(prober.sigmas)
    if (joined := sum(sorted(widths)[-count:])) > MOST_FEATURES:
        raise ValueError(
            f"fuse is {count}: so many taps may have {joined:,} features together, where {MOST_FEATURES:,} are "
            "allowed. Ask for fewer taps, give layers of fewer channels, or take another pooling."
        )


def add_taps(prober: Prober, pairs: Sequence[Pair], folder: Path | None, known: Mapping[str, Any]) -> list[Pair]:
    """Return the best pair and the taps that are added to it, as many as the options say, in their order.

    The figures of each are those of all taps up to it, joined, on held-out training images. Those of every candidate
    are kept in a folder, if any, as those of the sweep's `pairs` are: `known` says what both depend on.
    """
    taps = [_best(pairs)]
    for number in range(2, prober.options.fuse + 1):
        found: list[Pair] = []
        own = {**known, "joined": [[tap.layer, tap.sigma] for tap in taps]}
        for sigma in tqdm(prober.sigmas, desc=f"Tap {number} of {prober.options.fuse}", disable=None):
            taken = [tap.layer for tap in taps if tap.sigma == sigma]
            if left := [layer for layer in prober.layers if layer not in taken]:
                path = None if folder is None else folder / f"tap-{number}-sigma-{sigma}.json"
                found += kept_pairs(path, own, partial(JoinedProber.of(prober, taps, left).level, sigma))
        taps.append(_best(found))
    return taps


def tested_taps(prober: Prober, steps: list[Pair], alone: Fitted) -> tuple[FusedProbe, Fitted]:
    """Test the first of some taps that did best together, and compare them with the best pair alone.

    Both were fitted with the first noise seed. Returns the figures, and what was fitted.
    """
    best = _best(steps)
    joined = JoinedProber.of(prober, steps[: steps.index(best)], [best.layer])
    probe, fitted = joined.tested([best], prober.options.num_noise_seeds)
    truth = prober.labels["test"]
    gain, interval = paired_gain(fitted.predicted == truth, alone.predicted == truth)
    return FusedProbe(**vars(probe), steps=steps, gain=gain, gain_interval=interval), fitted


def _best(pairs: Sequence[Pair]) -> Pair:
    return max(pairs, key=lambda pair: pair.validation_accuracy or 0.0)  # the first of equals


def paired_gain(right: np.ndarray, right_before: np.ndarray) -> tuple[float, list[float]]:
    """Return by how much an accuracy is above another one on the same images, and the ends of its 95 % interval.

    Both arrays (N,) say which images were classified correctly. The interval is that of Agresti and Min 2005
    (doi:10.1002/sim.1781): half an image is added to each of the four kinds, those that both got right, that either one
    alone got right, and that none got right.
    """
    count = len(right) + 2
    gained = float((right & ~right_before).sum()) + 0.5
    lost = float((right_before & ~right).sum()) + 0.5
    centre = (gained - lost) / count
    reach = NormalDist().inv_cdf(0.975) * math.sqrt(gained + lost - (gained - lost) ** 2 / count) / count
    return float(right.mean() - right_before.mean()), [centre - reach, centre + reach]
