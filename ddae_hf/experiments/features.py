"""Features of a data set: pooled hidden states of several layers at one noise level, in one pass, kept on disk.

What is random about an image's features depends on (noise seed, image index, view) alone: its noise and, where its
latent is a draw, that draw. Batches, interruptions and the number of processes play no part.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..hidden_states import check_layers, hidden_size, pool_hidden_states
from ..modeling_ddae import DDAEModel
from ..noise import family_of
from ..weights import fingerprint
from .arrays import Batches, StrPath, described_folder, fill
from .draws import GENERATOR, POSTERIOR, indexed_noise
from .loading import to_device

Images = Callable[[int], Iterable[Tensor]]


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Compute in evaluation mode, without gradients and outside autocast; afterwards every mode is as it was."""
    training = [module for module in network.modules() if module.training]
    device = next(network.parameters()).device
    network.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for module in training:  # one by one: a part that was frozen stays in evaluation mode
            module.training = True


def extract_features(
    model: DDAEModel,
    batches: Iterable[Tensor],
    layers: Sequence[str],
    sigma: float,
    *,
    noise_seed: int = 0,
    view: int = 0,
) -> dict[str, Tensor]:
    """Compute the features (N, C) of a data set, float32 on the CPU, by layer name: see `batch_features`.

    `batches` are `pixel_values` (B, C, H, W) in the data set's order, of any sizes. A noise level outside the schedule
    and a data set without images are refused.
    """
    family_of(model.scheduler).check_sigma(sigma)
    parts: list[Tensor] = []
    start = 0
    for images in batches:
        indices = range(start, start := start + len(images))
        found = batch_features(model, images, indices, layers, sigma, noise_seed=noise_seed, view=view)
        widths = {layer: values.shape[1] for layer, values in found.items()}
        parts.append(torch.cat(list(found.values()), dim=1).cpu())  # the one copy of a batch
    if not parts:
        raise ValueError("The data set is empty: there is no image to compute features of.")
    columns = torch.cat(parts).split(list(widths.values()), dim=1)
    return {layer: values.contiguous() for layer, values in zip(widths, columns, strict=True)}


def batch_features(
    model: DDAEModel,
    images: Tensor,
    indices: Sequence[int] | np.ndarray | Tensor,
    layers: Sequence[str],
    sigma: float | Tensor,
    *,
    noise_seed: int = 0,
    view: int = 0,
) -> dict[str, Tensor]:
    """Compute features (B, C) of some images of a data set, float32 on the model's device, by layer name.

    `images` are `pixel_values` (B, C, H, W), `indices` their places in the data set, and `sigma` is a scalar or (B,).
    Each image has `model.config.num_noise_samples` draws of noise of its own: images that share one would be told apart
    at noise levels where fresh noise hides them. Data sets that must not share noise take different views. Features are
    those of evaluation mode, in the type of the model's weights, whatever the caller's mode and autocast.
    """
    config, shape = model.config, model.config.sample_shape
    draws = partial(indexed_noise, indices=indices, seed=noise_seed, view=view, device=model.device)
    noise = draws((config.num_noise_samples, *shape)).transpose(0, 1)
    own = draws(shape, purpose=POSTERIOR) if config.sample_posterior else None
    with evaluating(model):
        clean = model.encode(to_device(images, model.device), own)
        hidden = model.read_layers(clean, list(layers), sigma=sigma, noise=noise)
        return {layer: pool_hidden_states(hidden[layer], config.pooling) for layer in layers}


def features_of_parts(
    model: DDAEModel, inputs: Any, parts: Sequence[tuple[np.ndarray, Any]], layers: Sequence[str], sigma: float, *,
    noise_seed: int, view: int, image_view: int = 0, title: str = "Features",
) -> Iterator[dict[str, Tensor]]:  # fmt: skip
    """Yield the features of parts of a data set, `Inputs`: see `Inputs.parts`, whose numbers are the indices here."""
    for (_, numbers), batch in zip(
        parts,
        inputs.parts(parts, view=image_view, title=title, device=model.device),  # without a name: see there
        strict=True,
    ):
        yield batch_features(model, batch, numbers, layers, sigma, noise_seed=noise_seed, view=view)


def told_text(model: DDAEModel) -> dict[str, Any]:
    """Return what tells apart the texts that a denoiser is told, as JSON; nothing of a denoiser that is told none."""
    if model.condition is None:
        return {}
    return {"prompt": model.config.prompt, "condition": fingerprint(model.condition, dtype=None)}


class FeatureCache:
    """Features on disk: computed once, memory-mapped when read, continued where an interrupted run stopped.

    Every set of features has a folder of its own, named by a hash of all that they depend on, which `identity.json` in
    it spells out: the denoiser's weights, its scheduler, a text that it is told, the images, the noise level, the noise
    seed and the view. It has one array (N, C), float32, for each layer: see `arrays`. Several processes may share a
    folder.

    The model is on the device to use. It may change: whenever features are asked for, its weights are hashed.
    """

    def __init__(self, folder: StrPath, model: DDAEModel, noise_seed: int = 0):
        self.folder, self.model, self.noise_seed = Path(folder), model, noise_seed

    @property
    def identity(self) -> dict[str, Any]:
        """What features of the model as it is now depend on besides the images, the level and the view, as JSON."""
        model = self.model
        names = ["denoiser", "scheduler", "pooling", "num_noise_samples", "null_class"]
        names += ["vae", "sample_posterior"] if model.config.vae is not None else []
        return {name: getattr(model.config, name) for name in names} | {
            "weights": fingerprint(model.denoiser, model.vae, dtype=None),
            "dtype": str(model.denoiser.dtype),
            "noise_seed": self.noise_seed,
            "generator": GENERATOR,
            **told_text(model),
        }

    def features(
        self, images: Images, count: int, layers: Sequence[str], sigma: float, *, view: int = 0, data: dict[str, Any]
    ) -> dict[str, np.ndarray]:
        """Return the features (N, C) of a data set by layer, mapped from disk, computing those that are not there yet.

        `images`, called with an index, gives `pixel_values` in batches from that image on, `count` in all. `data` tells
        these images from others, as JSON: a hash of their files, how they were prepared. `view` is the number of the
        draw of noise.

        Raises:
            ValueError: An unknown layer or noise level, another number of images than `count`, or a damaged file.
            OSError: Not enough space on disk.
        """
        model, noise_seed = self.model, self.noise_seed

        def batches(start: int, missing: list[str]) -> Iterable[dict[str, Tensor]]:
            for batch in images(start):
                indices = range(start, start := start + len(batch))
                yield batch_features(model, batch, indices, missing, sigma, noise_seed=noise_seed, view=view)

        return self.kept(batches, count, layers, sigma, view=view, data=data)

    def kept(
        self, batches: Batches, count: int, layers: Sequence[str], sigma: float, *, view: int, data: dict[str, Any]
    ) -> dict[str, np.ndarray]:
        """Return features likewise, where `batches` computes those that are missing: see `arrays.fill`."""
        check_layers(self.model.denoiser, layers)
        family_of(self.model.scheduler).check_sigma(sigma)
        identity = {**self.identity, "data": data, "count": count, "sigma": float(sigma), "view": view}
        folder = described_folder(self.folder, identity)
        denoiser, pooling = self.model.denoiser, self.model.config.pooling
        return fill(folder, {layer: (hidden_size(denoiser, layer, pooling),) for layer in layers}, count, batches)
