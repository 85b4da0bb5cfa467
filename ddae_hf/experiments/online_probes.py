"""Probes that are trained by gradient descent, with a forward pass of the network for every batch: the paper's way."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

from ..hidden_states import hidden_size
from .accelerating import accelerated
from .batches import Batch, Batches
from .features import batch_features
from .images import noise_view
from .training import Loop

if TYPE_CHECKING:
    from .probing import Prober


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


def train_online(prober: Prober, layers: list[str], sigma: float, rows: np.ndarray, noise_seed: int) -> OnlineProbes:
    """Train the probes of some layers on some training images as the paper does.

    Every epoch has fresh noise, flips and crops; the optimiser is Adam, on a cosine schedule.

    Raises:
        ValueError: The loss is no finite number.
    """
    options, model, labels = prober.options, prober.model, torch.from_numpy(prober.labels["train"])
    widths = {layer: hidden_size(model.denoiser, layer) for layer in layers}
    steps = math.ceil(len(rows) / options.online_batch_size)

    def of_epoch(epoch: int) -> list[np.ndarray]:
        order = np.random.default_rng([options.seed, epoch + 1]).permutation(rows)
        return np.array_split(order, steps)

    with accelerated(seed=options.seed, mixed_precision="no", place=False) as accelerator:
        probes = OnlineProbes(widths, len(prober.train.names or ()), options.protocol == "batch_norm").to(model.device)
        numbers: Any = range(len(labels))  # of the images, which `loss` reads
        order = Batches(of_epoch, options.online_batch_size)
        loop = Loop(
            accelerator,
            probes,
            torch.optim.Adam(probes.parameters(), lr=options.learning_rate),
            DataLoader(numbers, batch_sampler=order, collate_fn=lambda some: {"rows": torch.tensor(some)}),
            total_steps=options.num_epochs * steps,
            seed=options.seed,
            schedule=lambda optimizer: CosineAnnealingLR(optimizer, options.num_epochs * steps),
            desc=f"sigma {sigma:g}, training",
        )

        def loss(batch: Batch) -> Tensor:
            epoch = loop.progress.epoch + 1  # the view 0 is of the images as they are
            some = batch["rows"].numpy()
            images, view = prober.train.read(some, epoch), noise_view(False, epoch)
            features = batch_features(model, images, some, layers, sigma, noise_seed=noise_seed, view=view)
            truth = labels[some].to(model.device)
            losses = (F.cross_entropy(logits, truth) for logits in loop.module(features).values())
            return sum(losses, torch.zeros((), device=model.device))

        loop.run(loss)
    return probes.eval()


@torch.no_grad()
def predict_online(
    prober: Prober, probes: OnlineProbes, split: str, sigma: float, rows: np.ndarray, noise_seed: int
) -> dict[str, np.ndarray]:
    """Return the classes (1, N) that probes give a split's images at `rows`, by layer name."""
    found: dict[str, list[np.ndarray]] = {layer: [] for layer in probes.layers}
    inputs = prober.train if split == "train" else prober.test
    start, view = 0, noise_view(split == "test", 0)
    for images in inputs.batches(prober.options.batch_size, rows, title=f"sigma {sigma:g}, {split} images"):
        indices = rows[start : (start := start + len(images))]
        features = batch_features(prober.model, images, indices, probes.layers, sigma, noise_seed=noise_seed, view=view)
        for layer, logits in probes(features).items():
            found[layer].append(logits.argmax(1).cpu().numpy())
    return {layer: np.concatenate(parts)[None] for layer, parts in found.items()}
