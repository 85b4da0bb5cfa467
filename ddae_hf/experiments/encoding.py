"""Latents of a data set: `encode` makes them once, and denoisers of latents train on them without their VAE.

    folder = encode("runs/cifar10_vae", Images.open("uoft-cs/cifar10"), mirror=True, output_dir="runs/latents")

`LatentInputs` gives them to probes in place of images, and `latent_dataset` to a training loop.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from ..augment import mirror
from ..checkpoints import load_vae
from ..image_processing_ddae import DDAEImageProcessor
from ..latents import downsampling
from .arrays import num_bytes, size
from .devices import best_device, made_fast
from .image_set import Rows
from .images import ImageInputs, Images, ImageSet, Inputs
from .latent_folder import DTYPE, LatentFolder
from .options import Options, option

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class EncodingOptions(Options):
    """Options of `encode`."""

    output_dir: str = option("runs/latents", "Folder of the latents.")
    train_split: str = option("train", "Split to encode.")
    max_train_samples: int | None = option(None, "Use N images of all classes, always the same ones.")
    resolution: int | None = option(None, "Side of the square images; by default the VAE's sample_size.")
    center_crop: bool = option(True, "Cut the centre of images of another shape; without it they are squashed.")
    mirror: bool = option(False, "Encode every image's mirror image too, as a second view.")
    sample_posterior: bool = option(False, "Draw latents from the VAE's distribution.")
    batch_size: int = option(16, "Images that are encoded at a time.")
    seed: int = option(0, "Seed of the draws.")
    cache_dir: str | None = option(None, "Where downloads are kept.")


def encode(vae: Any, images: Images, options: EncodingOptions | None = None, **changes: Any) -> LatentFolder:
    """Encode a split's images by a VAE once, with their labels beside them where they have any.

    An interrupted run goes on where it stopped, and latents that are there are not computed again.

    Args:
        vae: An `AutoencoderKL`; or a folder or Hub id of one, or of a checkpoint that has one.
        images: The data set.
        options: Options, by default those of `EncodingOptions`.
        **changes: Fields of the options that are to be others.

    Returns:
        The folder, whose split is named `train` whatever its name in the data set.

    Raises:
        ValueError: Options that cannot work, images that cannot be read, a folder of other latents, or a damaged file.
        OSError: No such VAE, or not enough space on disk.
    """
    options = EncodingOptions.of(options, changes)
    images = Images.open(images, cache_dir=options.cache_dir)
    source = os.fspath(vae) if isinstance(vae, (str, os.PathLike)) else None
    if source is not None:
        vae = load_vae(source, cache_dir=options.cache_dir)
    side = options.resolution or vae.config.sample_size
    if side % (factor := downsampling(vae.config)):
        raise ValueError(f"resolution is {side}: it must be a multiple of {factor}, the pixels a latent stands for.")
    sides = {"height": side, "width": side}
    processor = DDAEImageProcessor(size=sides, num_channels=vae.config.in_channels, do_center_crop=options.center_crop)
    train = images[options.train_split].take(options.max_train_samples)
    inputs = {"train": _Mirrored(train, processor)}
    folder = LatentFolder.create(
        options.output_dir, vae, (side, side),
        describe_splits(inputs, 1 + options.mirror, {"mirror": options.mirror}),
        sample_posterior=options.sample_posterior, seed=options.seed, names=train.names,
        vae_source=source or vae.config.get("_name_or_path"), dataset=images.facts(train),
    )  # fmt: skip
    encode_views(folder, vae, inputs, options.batch_size)
    return folder


def describe_splits(
    inputs: Mapping[str, ImageInputs], views: int, changes: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Return what a `LatentFolder` is told of splits, with so many views, whose later ones are changed so."""
    splits = {}
    for name, known in inputs.items():
        described = known.identity
        if not described["preprocessing"]["do_center_crop"]:
            del described["preprocessing"]["do_center_crop"]  # it goes unsaid, as before there was the choice
        splits[name] = {**described, "count": len(known), "views": views, "changes": changes}
    return splits


def encode_views(folder: LatentFolder, vae: Any, inputs: Mapping[str, ImageInputs], batch_size: int) -> None:
    """Compute the latents that a folder lacks, in float32 on the best device there is, and keep the labels.

    The folder is one that `LatentFolder.create` made for these images. The VAE is afterwards as it was.
    """
    for split, known in inputs.items():
        if known.labels is not None:
            folder.write_labels(split, known.labels)
    logger.info(state_use(folder, vae, batch_size))
    if not folder.missing_bytes():
        return
    device, dtype = vae.device, vae.dtype
    started = time.monotonic()
    made_fast(vae, best_device()).to(best_device()).float()
    try:
        for split, described in folder.index["splits"].items():
            for view in range(described["views"]):
                title = f"Encoding {split} images, view {view}"
                views = partial(inputs[split].batches, batch_size, None, view=view, title=title)
                folder.encode(vae, split, view, views)
    finally:
        vae.to(device).type(dtype)
    logger.info("Encoded in %.0f s.", time.monotonic() - started)


class _Mirrored(ImageInputs):
    """Images, of which the second view is the mirror image."""

    def read(self, rows: Rows, view: int = 0, numbers: Rows | None = None) -> Tensor:
        pixels = super().read(rows)
        return mirror(pixels) if view else pixels


def state_use(folder: LatentFolder, vae: Any, batch_size: int) -> str:
    """Return what encoding a folder's latents will take, in words."""
    splits = folder.index["splits"]
    count = sum(known["count"] * known["views"] for known in splits.values())
    of = ", ".join(f"{known['count']:,} {name} images x {known['views']} views" for name, known in splits.items())
    weights = sum(p.numel() * p.element_size() for p in vae.parameters())
    return (
        f"Latents of {of}: {count:,} of {'x'.join(map(str, folder.shape))}, "
        f"{size(num_bytes(folder.shape, count, DTYPE))} on disk in {folder.folder}, {size(folder.missing_bytes())} of "
        f"them still to be computed, in memory for the VAE ({size(weights)}) and {batch_size} images at a time."
    )


class LatentInputs(Inputs):
    """Images by their latents in a folder, computed or not; numbers of views beyond the last begin again.

    A folder that is not of these images is refused.
    """

    def __init__(self, images: ImageSet, folder: LatentFolder, split: str):
        self.images, self.folder, self.split = images, folder, split
        if folder.index["splits"].get(split, {}).get("images") != images.hash:
            what = f"{folder.folder} has no latents of these {split} images: `transfer` makes them, from the same data"
            raise ValueError(f"{what} with the same max_train_samples and max_test_samples.")

    @property
    def identity(self) -> dict[str, Any]:
        """How the latents were made, and of which images."""
        index = self.folder.index
        known = {name: index[name] for name in ("vae", "vae_fingerprint", "shape", "sample_posterior", "seed")}
        return {**known, **index["splits"][self.split]}

    def read(self, rows: Rows, view: int = 0, numbers: Rows | None = None) -> Tensor:
        """Return the latents (B, c, h, w) of a view of the images at `rows`, float32."""
        return _read(self.folder, self.split, view % self.folder.views(self.split), rows)


def _read(folder: LatentFolder, split: str, view: int, rows: Rows) -> Tensor:
    return torch.from_numpy(folder.latents(split, view)[np.asarray(rows)]).float()


def latent_dataset(folder: LatentFolder, split: str, labels: np.ndarray | None, views: int) -> Dataset:
    """Return a split's latents as a data set of `pixel_values` and, where they came, `labels`.

    `pixel_values` are the first so many views of an image, (views, c, h, w): see `one_view`.
    """
    count = min(len(folder.latents(split, view)) for view in range(views))
    columns = {"index": np.arange(count)} | ({} if labels is None else {"labels": labels})

    def rows(batch: dict[str, Any]) -> dict[str, Any]:
        # Opened here: datasets pickles what a transform holds, which would read every latent into memory.
        row = {"pixel_values": torch.stack([_read(folder, split, view, batch["index"]) for view in range(views)], 1)}
        return row if labels is None else row | {"labels": torch.tensor(batch["labels"])}

    return Dataset.from_dict(columns).with_transform(rows)


def one_view(pixel_values: Tensor) -> Tensor:
    """Return one view, drawn at random, of each image: of (B, views, c, h, w) so (B, c, h, w); images stay."""
    if pixel_values.ndim == 4:
        return pixel_values
    count, views = pixel_values.shape[:2]
    drawn = torch.randint(views, (count,), device=pixel_values.device)
    return pixel_values[torch.arange(count, device=pixel_values.device), drawn]
