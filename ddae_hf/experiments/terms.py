"""Auxiliary terms that need no other network than the denoiser and its average: see `auxiliary`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .auxiliary import Seen, Term, TermOptions, register
from .options import option

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
