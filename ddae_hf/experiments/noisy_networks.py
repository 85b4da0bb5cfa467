"""The classifiers that `classify_noisy` trains; both are told the noise level."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

EMBEDDING = 64
SIGMA_DATA = 0.5  # as in EDM: noisy images divided by sqrt(sigma^2 + 0.25) are of one scale at every level


def embed_sigma(sigma: Tensor) -> Tensor:
    """Return sines and cosines (B, 64) of log(sigma) / 4, as EDM takes it, for levels (B,); 10 keeps them smooth."""
    return get_timestep_embedding(10 * sigma.log() / 4, EMBEDDING)


class NoiseConditionalMLP(nn.Module):
    """A multi-layer perceptron on features (B, C) of noisy images, told their noise levels in every hidden layer."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, in_features: int, num_labels: int, hidden_size: int, num_hidden_layers: int, dropout: float):
        super().__init__()
        self.register_buffer("mean", torch.zeros(in_features))
        self.register_buffer("deviation", torch.ones(in_features))
        widths = [in_features] + [hidden_size] * num_hidden_layers
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False))
        self.shifts = nn.ModuleList(nn.Linear(EMBEDDING, hidden_size) for _ in self.layers)
        self.norms = nn.ModuleList(nn.LayerNorm(hidden_size) for _ in self.layers)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(hidden_size, num_labels)

    def forward(self, features: Tensor, sigma: Tensor) -> Tensor:
        """Return logits (B, num_labels) of features (B, C) at levels (B,)."""
        hidden = (features - self.mean) / self.deviation
        embedding = embed_sigma(sigma)
        for layer, shift, norm in zip(self.layers, self.shifts, self.norms, strict=True):
            hidden = self.dropout(F.silu(norm(layer(hidden) + shift(embedding))))
        return self.classifier(hidden)


class _Block(nn.Module):
    """A pre-activation residual block whose inner channels are shifted by what the noise level says."""

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.shift = nn.Linear(EMBEDDING, width)
        self.shortcut = nn.Conv2d(channels, width, 1, stride, bias=False) if channels != width else None

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        active = F.relu(self.norm1(hidden))
        inner = self.conv1(active) + self.shift(embedding)[:, :, None, None]
        # Where the width changes, the shortcut starts after the activation.
        return self.conv2(F.relu(self.norm2(inner))) + (self.shortcut(active) if self.shortcut else hidden)


class WideResNet(nn.Module):
    """WRN-28-k for noisy images: three groups of four blocks, of 16k, 32k and 64k channels.

    Without the maps of the noise level (`shift`), it is the network of Zagoruyko and Komodakis.
    """

    def __init__(self, k: int, num_labels: int, num_channels: int = 3):
        super().__init__()
        self.conv = nn.Conv2d(num_channels, 16, 3, padding=1, bias=False)
        widths = [16] + [16 * k] * 4 + [32 * k] * 4 + [64 * k] * 4
        strides = [2 if i in (4, 8) else 1 for i in range(12)]
        self.blocks = nn.ModuleList(_Block(*shape) for shape in zip(widths, widths[1:], strides, strict=False))
        self.norm, self.classifier = nn.BatchNorm2d(64 * k), nn.Linear(64 * k, num_labels)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        """Return logits (B, num_labels) of images, or latents, plus `sigma` (B,) times noise, (B, C, H, W)."""
        embedding = embed_sigma(sigma)
        hidden = self.conv(noisy * torch.rsqrt(sigma**2 + SIGMA_DATA**2)[:, None, None, None])
        for block in self.blocks:
            hidden = block(hidden, embedding)
        return self.classifier(F.relu(self.norm(hidden)).mean((2, 3)))
