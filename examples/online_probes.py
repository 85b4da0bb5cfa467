"""The protocols of `sweep.py` that train probes by gradient descent, with a forward pass for every batch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from ddae_hf.experiments.devices import best_device
from ddae_hf.experiments.features import batch_features
from ddae_hf.experiments.logistic_regression import OnlineProbes
from ddae_hf.hidden_states import hidden_size
from labelled import noise_view

if TYPE_CHECKING:
    from sweep import Sweep


def train_online(sweep: Sweep, layers: list[str], sigma: float, rows: np.ndarray, noise_seed: int) -> OnlineProbes:
    """Train probes as the paper does: fresh noise, flips and crops every epoch, Adam and a cosine schedule."""
    args, data, model = sweep.args, sweep.data, sweep.model
    widths = {layer: hidden_size(model.denoiser, layer) for layer in layers}
    torch.manual_seed(args.seed)
    probes = OnlineProbes(widths, len(data.names), batch_norm=args.protocol == "batch_norm").to(best_device())
    steps = math.ceil(len(rows) / args.online_batch_size)
    optimizer = torch.optim.Adam(probes.parameters(), lr=args.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.num_epochs * steps)
    progress = tqdm(total=args.num_epochs * steps, desc=f"sigma {sigma:g}, training", leave=False)
    for epoch in range(1, args.num_epochs + 1):
        order = np.random.default_rng([args.seed, epoch]).permutation(rows)
        for indices in np.array_split(order, steps):
            images = sweep.view("train", indices, indices, epoch)
            view = noise_view("train", epoch)
            features = batch_features(model, images, indices, layers, sigma, noise_seed=noise_seed, view=view)
            labels = torch.from_numpy(data.labels["train"][indices]).to(best_device())
            loss = sum(F.cross_entropy(logits, labels) for logits in probes(features).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.update()
    progress.close()
    if not loss.isfinite():
        raise SystemExit(f"The loss of the probes is {loss.item()} at sigma {sigma:g}: lower --learning_rate.")
    return probes.eval()


@torch.no_grad()
def predict_online(
    sweep: Sweep, probes: OnlineProbes, split: str, sigma: float, rows: np.ndarray, noise_seed: int
) -> dict[str, np.ndarray]:
    """Return the classes (1, N) that probes give a split's images, by layer name."""
    found: dict[str, list[np.ndarray]] = {layer: [] for layer in probes.layers}
    start, view = 0, noise_view(split, 0)
    for images in sweep.data.batches(split, rows, f"sigma {sigma:g}, {split} images"):
        indices = rows[start : (start := start + len(images))]
        features = batch_features(sweep.model, images, indices, probes.layers, sigma, noise_seed=noise_seed, view=view)
        for layer, logits in probes(features).items():
            found[layer].append(logits.argmax(1).cpu().numpy())
    return {layer: np.concatenate(parts)[None] for layer, parts in found.items()}
