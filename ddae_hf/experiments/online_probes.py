"""The paper's probes as a module: linear classifiers that learn by gradient descent while a network runs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class OnlineProbes(nn.Module):
    """Linear classifiers on layers of given widths, trained together while a network computes their features.

    With `batch_norm` features pass a batch norm without parameters first, as in He et al. 2022 (arXiv 2111.06377) and
    l-DAE (arXiv 2401.14404).
    """

    def __init__(self, widths: dict[str, int], num_classes: int, batch_norm: bool = False):
        super().__init__()
        self.layers = list(widths)
        norms = (nn.BatchNorm1d(width, affine=False) if batch_norm else nn.Identity() for width in widths.values())
        self.norms = nn.ModuleList(norms)
        self.heads = nn.ModuleList(nn.Linear(width, num_classes) for width in widths.values())

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return logits (B, K) of features (B, C), by layer name."""
        parts = zip(self.layers, self.norms, self.heads, strict=True)
        return {layer: head(norm(features[layer])) for layer, norm, head in parts}

    def linear(self, layer: str) -> tuple[Tensor, Tensor]:
        """Return a layer's classifier in evaluation, weights (K, C) and biases (K,), its batch norm folded in."""
        head: Any = self.heads[self.layers.index(layer)]
        norm: Any = self.norms[self.layers.index(layer)]
        weight, bias = head.weight.detach(), head.bias.detach()
        if isinstance(norm, nn.Identity):
            return weight, bias
        weight = weight * (norm.running_var + norm.eps).rsqrt()
        return weight, bias - weight @ norm.running_mean
