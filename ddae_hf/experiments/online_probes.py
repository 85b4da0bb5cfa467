"""Probes that are trained by gradient descent, with a forward pass of the network for every batch: the paper's way."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, Dataset

from ..hidden_states import hidden_size
from ..modeling_ddae import DDAEModel
from .accelerating import accelerated
from .batches import Batch, Batches, whole
from .features import batch_features
from .images import Inputs, noise_view
from .training import Loop

if TYPE_CHECKING:
    from .sweeping import SweepOptions


class OnlineProbes(nn.Module):
    """Linear classifiers, one a layer, trained together by gradient descent while a network computes their features.

    Args:
        widths: Width C of each layer's features, by layer name.
        num_classes: Number of classes K.
        batch_norm: Whether features pass a batch norm without parameters first, as in He et al. 2022
            (arXiv 2111.06377) and l-DAE (arXiv 2401.14404).
    """

    def __init__(self, widths: dict[str, int], num_classes: int, batch_norm: bool = False):
        super().__init__()
        self.layers = list(widths)
        self.norms = nn.ModuleList(
            nn.BatchNorm1d(c, affine=False) if batch_norm else nn.Identity() for c in widths.values()
        )
        self.heads = nn.ModuleList(nn.Linear(c, num_classes) for c in widths.values())

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


def train_online(
    model: DDAEModel,
    inputs: Inputs,
    labels: np.ndarray,
    num_classes: int,
    layers: list[str],
    options: SweepOptions,
    *,
    sigma: float,
    rows: np.ndarray,
    noise_seed: int,
) -> OnlineProbes:
    """Train probes as the paper does: fresh noise, flips and crops every epoch, Adam and a cosine schedule.

    Args:
        model: The network.
        inputs: The training images.
        labels: Their classes (N,).
        num_classes: Number of classes.
        layers: The layers, whose probes are trained together.
        options: Those of the protocol.
        sigma: Noise level.
        rows: Indices of the images to train on.
        noise_seed: Seed of the noise.

    Raises:
        ValueError: The loss is no finite number.
    """
    widths = {layer: hidden_size(model.denoiser, layer) for layer in layers}
    steps = math.ceil(len(rows) / options.online_batch_size)

    def of_epoch(epoch: int) -> list[np.ndarray]:
        order = np.random.default_rng([options.seed, epoch + 1]).permutation(rows)
        return np.array_split(order, steps)

    with accelerated(seed=options.seed, mixed_precision="no", place=False) as accelerator:
        probes = OnlineProbes(widths, num_classes, batch_norm=options.protocol == "batch_norm").to(model.device)
        loop = Loop(
            accelerator,
            probes,
            torch.optim.Adam(probes.parameters(), lr=options.learning_rate),
            DataLoader(_Rows(len(inputs)), batch_sampler=Batches(of_epoch, options.online_batch_size), collate_fn=whole),
            total_steps=options.num_epochs * steps,
            seed=options.seed,
            schedule=lambda optimizer: CosineAnnealingLR(optimizer, options.num_epochs * steps),
            desc=f"sigma {sigma:g}, training",
        )

        def loss(batch: Batch) -> Tensor:
            indices = batch["rows"].numpy()
            epoch = loop.progress.epoch + 1  # the view 0 is of the images as they are, which are tested on
            images, view = inputs.read(indices, epoch), noise_view(False, epoch)
            features = batch_features(model, images, indices, layers, sigma, noise_seed=noise_seed, view=view)
            truth = torch.from_numpy(labels[indices]).to(model.device)
            return sum(F.cross_entropy(logits, truth) for logits in loop.module(features).values())

        loop.run(loss)
    return probes.eval()


class _Rows(Dataset[Batch]):
    """The numbers of so many rows, a whole batch at a time."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitems__(self, rows: list[int]) -> Batch:
        return {"rows": torch.tensor(rows)}


@torch.no_grad()
def predict_online(
    model: DDAEModel,
    probes: OnlineProbes,
    batches: Iterable[Tensor],
    sigma: float,
    rows: np.ndarray,
    noise_seed: int,
    view: int,
) -> dict[str, np.ndarray]:
    """Return the classes (1, N) that probes give images, those at `rows` in batches, by layer name."""
    found: dict[str, list[np.ndarray]] = {layer: [] for layer in probes.layers}
    start = 0
    for images in batches:
        indices = rows[start : (start := start + len(images))]
        features = batch_features(model, images, indices, probes.layers, sigma, noise_seed=noise_seed, view=view)
        for layer, logits in probes(features).items():
            found[layer].append(logits.argmax(1).cpu().numpy())
    return {layer: np.concatenate(parts)[None] for layer, parts in found.items()}
