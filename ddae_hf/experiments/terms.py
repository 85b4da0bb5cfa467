"""Auxiliary terms that need no other network than the denoiser and its average: see `auxiliary`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..hidden_states import pool_hidden_states
from ..networks import tap_of
from .auxiliary import Seen, Setting, Term, TermOptions, register
from .options import option

NEAR = 0.05  # differences below it count by their squares in the smooth l1 distance, as Jiang et al. 2025 have it

# Dispersive loss: hidden states of different images are pushed apart.


@dataclass(kw_only=True)
class DispersiveOptions(TermOptions):
    """Options of `Dispersive`."""

    weight: float = option(0.5, "What the term is multiplied by.")
    temperature: float = option(0.5, "Distances are divided by it: lower ones push close images apart more.")


@register
class Dispersive(Term):
    """Pushes hidden states of different images apart (Wang and He 2025, arXiv 2506.09027, with squared l2 distances).

    It is `log mean_ij exp(-||z_i - z_j||^2 / (D temperature))` over all pairs of images of a pass on one device, each
    with itself too, where `z` are hidden states of D numbers. It has no positive pairs and no weights. The paper's
    weight and temperature are 0.5 and 0.5 a quarter into the network, or 0.25 and 1 at its end.
    """

    kind = "dispersive"
    options_class = DispersiveOptions
    compares_images = True

    def forward(self, seen: Seen) -> Tensor:
        """Return the term, float32 ()."""
        with torch.autocast(seen.sigma.device.type, enabled=False):
            flat = seen.states[self.options.layer].float().flatten(1)
            flat = flat - flat.mean(0)  # distances stay, and lose fewer digits
            squares = flat.square().sum(1)
            distances = (squares[:, None] + squares - 2 * flat @ flat.T).clamp(min=0)
            exponents = -distances / (flat.shape[1] * self.options.temperature)
            return exponents.flatten().logsumexp(0) - 2 * math.log(len(flat))


# Self-alignment: an early hidden state is to be what a late one of the averaged network is, which sees less noise.


class Projection(nn.Sequential):
    """Two linear layers with SiLU between, on the channels of each position.

    Args:
        channels: Channels of what comes in.
        inside: Channels between the layers.
        out: Channels of what comes out.
    """

    def __init__(self, channels: int, inside: int, out: int):
        super().__init__(nn.Linear(channels, inside), nn.SiLU(), nn.Linear(inside, out))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return a hidden state (B, C, H, W) or (B, N, C), or pooled features (B, C), with `out` channels instead."""
        if hidden.ndim == 4:
            return super().forward(hidden.movedim(1, -1)).movedim(-1, 1)
        return super().forward(hidden)


@dataclass(kw_only=True)
class SelfAlignmentOptions(TermOptions):
    """Options of `SelfAlignment`."""

    averaged_layer: str = option(help="Name of the layer of the averaged network that it is aligned with.")
    weight: float = option(0.2, "What the term is multiplied by; 0.5 suits the distance cosine.")
    lowered: float = option(0.2, "How much less time, at most, the averaged network's images have gone towards noise.")
    distance: Literal["smooth_l1", "cosine"] = option("smooth_l1", "How far two hidden states are from each other.")
    hidden_size: int | None = option(
        None, "Width inside the projection; by default the channels of both layers together."
    )


@register
class SelfAlignment(Term):
    """Aligns a hidden state with a later one of the averaged network: SRA (Jiang et al. 2025, arXiv 2505.02831).

    With the projected hidden state `h(z)` of the network in training and the averaged network's `y`, for the same image
    and noise, the term is the mean of `d(h(z), y)` over images and positions. No gradient goes through `y`, and its
    image has gone less far towards noise: at the time `max(0, s - lowered * u)`, with `u` uniform in [0, 1] (see
    `less_noisy`). For `smooth_l1`, `d` is the mean over channels of `e^2 / (2 * 0.05)` where the difference `e` is
    below 0.05 and of `|e| - 0.05 / 2` elsewhere; for `cosine` it is 1 minus the cosine of the angle between the two.

    The paper aligns block 8 with block 20, of 28. Its code begins with the weight 0.2 and lowers that late in training,
    and takes 0.5 for the cosine, which it added later; its projection has two layers, as wide inside as both hidden
    states together. `until` is what there is here for the late part.

    In a U-Net the two layers may have maps of different sizes. The larger one, after its projection, is then averaged
    over the positions of the smaller one: an enlarged map would ask for details that the other does not have.
    """

    kind = "self_alignment"
    options_class = SelfAlignmentOptions

    def __init__(self, options: SelfAlignmentOptions, setting: Setting):
        super().__init__(options, setting)
        channels = tap_of(setting.denoiser, options.layer).channels
        wanted = tap_of(setting.denoiser, options.averaged_layer).channels
        self.projection = Projection(channels, options.hidden_size or channels + wanted, wanted)

    @property
    def averaged_layer(self) -> str:
        """The layer that it is aligned with."""
        return self.options.averaged_layer

    @property
    def lowered(self) -> float:
        """How much less time, at most, the averaged network's images have gone towards noise."""
        return self.options.lowered

    def forward(self, seen: Seen) -> Tensor:
        """Return the term, float32 ()."""
        projected = self.projection(seen.states[self.options.layer].float())
        with torch.autocast(seen.sigma.device.type, enabled=False):
            found, wanted = on_one_grid(projected.float(), seen.averaged[self.averaged_layer].float())
            if self.options.distance == "smooth_l1":
                return F.smooth_l1_loss(found, wanted, beta=NEAR)
            return (1 - F.cosine_similarity(found, wanted, dim=1 if found.ndim == 4 else -1)).mean()


def on_one_grid(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return maps (B, C, H, W), the larger one averaged over the positions of the smaller one; (B, N, C) stay."""
    if one.ndim == 3 or one.shape[2:] == other.shape[2:]:
        return one, other
    grid = (min(one.shape[2], other.shape[2]), min(one.shape[3], other.shape[3]))
    return F.adaptive_avg_pool2d(one, grid), F.adaptive_avg_pool2d(other, grid)


# Self-distillation: each image is to be told from others by what the averaged network makes of it.


@dataclass(kw_only=True)
class SelfDistillationOptions(TermOptions):
    """Options of `SelfDistillation`."""

    weight: float = option(0.1, "What the term is multiplied by.")
    temperature: float = option(0.2, "Cosines are divided by it: lower ones attend more to the closest other images.")
    lowered: float = option(0.2, "How much less time, at most, the averaged network's images have gone towards noise.")
    hidden_size: int = option(512, "Width inside the projector and the predictor.")
    output_size: int = option(128, "Numbers of an image that are compared.")


@register
class SelfDistillation(Term):
    """Finds each image among others by the averaged network's features: contrastive self-distillation.

    A hidden state is averaged over its positions, and layer-normalised. Of the network in training a projector and a
    predictor make `q_i`, of the averaged network at the same layer the projector alone makes `k_i`, and the term is
    InfoNCE (van den Oord et al. 2018, arXiv 1807.03748) over the images of a pass on one device, the mean over `i` of

        -log(exp(cos(q_i, k_i) / temperature) / sum_j exp(cos(q_i, k_j) / temperature))

    without a gradient through `k`. Xiang et al. 2025 (DDAE++, arXiv 2505.10999) distil contrastively against the
    averaged network, in self-conditioned networks. Their formula could not be had, and the README of their repository
    (FutureXiang/ddae_plus_plus) lists this part as still to come. What is particular here is this package's choice:

    - Projector, predictor and the temperature 0.2 follow MoCo v3 (arXiv 2104.02057), without its batch normalisation,
      so that an image's `q` does not depend on others, and without its factor of twice the temperature. MoCo v3
      averages the projector of `k` too; here there is one projector, the one in training.
    - The averaged network sees the same noise at a lower level, as the teacher of SD-DiT does (arXiv 2403.17004), and
      as `self_alignment` asks for too: both then share a pass.
    - Images are those of the denoising loss: no augmentation is added that the network would learn to generate.
    - The weight brings the term, which is about log B at first for B images, near the denoising loss.
    """

    kind = "self_distillation"
    options_class = SelfDistillationOptions
    compares_images = True

    def __init__(self, options: SelfDistillationOptions, setting: Setting):
        super().__init__(options, setting)
        channels = tap_of(setting.denoiser, options.layer).channels
        self.projector = Projection(channels, options.hidden_size, options.output_size)
        self.predictor = Projection(options.output_size, options.hidden_size, options.output_size)

    @property
    def averaged_layer(self) -> str:
        """The layer that is read of both networks."""
        return self.options.layer

    @property
    def lowered(self) -> float:
        """How much less time, at most, the averaged network's images have gone towards noise."""
        return self.options.lowered

    def forward(self, seen: Seen) -> Tensor:
        """Return the term, float32 ()."""
        asked = self.predictor(self.projector(pooled(seen.states[self.options.layer])))
        with torch.no_grad():
            known = self.projector(pooled(seen.averaged[self.options.layer]))
        with torch.autocast(seen.sigma.device.type, enabled=False):
            cosines = F.normalize(asked.float(), dim=1) @ F.normalize(known.float(), dim=1).T
            scaled = cosines / self.options.temperature
            return (scaled.logsumexp(1) - scaled.diagonal()).mean()


def pooled(hidden: Tensor) -> Tensor:
    """Return the mean of a hidden state's positions, (B, C) float32, with mean 0 and variance 1 over channels."""
    means = pool_hidden_states(hidden)
    return F.layer_norm(means, means.shape[1:])
