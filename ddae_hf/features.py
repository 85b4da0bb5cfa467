"""Features of a data set: pooled hidden states of several layers at one noise level, in one pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .hidden_states import pool_hidden_states
from .modeling_ddae import DDAEModel
from .noise import indexed_noise


@torch.no_grad()
def extract_features(
    model: DDAEModel,
    batches: Iterable[Tensor],
    layers: Sequence[str],
    sigma: float,
    *,
    noise_seed: int = 0,
    view: int = 0,
) -> dict[str, Tensor]:
    """Compute the features of a data set.

    The noise of each image, `model.config.num_noise_samples` draws, depends on (noise_seed, its index, view) alone.
    Images that share one draw would be told apart at noise levels where fresh noise hides them.

    Args:
        model: The model, in evaluation mode, on the device to use.
        batches: `pixel_values` (B, C, H, W), in the data set's order; batches of any sizes.
        layers: Names of layers.
        sigma: Noise level.
        noise_seed: Seed of the noise.
        view: Number of the draw; data sets that must not share noise take different ones.

    Returns:
        Features (N, C), float32 on the CPU, by layer name.
    """
    found: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    start = 0
    for images in batches:
        indices = range(start, start + len(images))
        start += len(images)
        shape = (model.config.num_noise_samples, *images.shape[1:])
        noise = indexed_noise(shape, indices, noise_seed, view).transpose(0, 1).to(model.device)
        images = images.to(model.device, memory_format=torch.channels_last)
        hidden = model(images, sigma=sigma, noise=noise, output_hidden_states=list(layers)).hidden_states
        for layer, states in zip(layers, hidden, strict=True):
            found[layer].append(pool_hidden_states(states, model.config.pooling).cpu())
    if start == 0:
        raise ValueError("The data set is empty: there is no image to compute features of.")
    return {layer: torch.cat(parts) for layer, parts in found.items()}
