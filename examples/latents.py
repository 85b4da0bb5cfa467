"""Latents of a data set: how they are made, what that takes, and batches of them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from ddae_hf.augment import mirror
from ddae_hf.experiments.arrays import num_bytes, size
from ddae_hf.experiments.devices import best_device, made_fast
from ddae_hf.experiments.draws import augment_view, indexed_noise
from ddae_hf.experiments.latent_folder import DTYPE, LatentFolder
from labelled import Images, LabelledImages, noise_view


def describe_splits(images: Images, views: dict[str, int], changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what a `LatentFolder` is told of splits, with so many views each, whose later ones are changed so."""
    preprocessing = images.processor.to_dict()
    if not preprocessing["do_center_crop"]:
        del preprocessing["do_center_crop"]  # as version 0.1.0 described its latents, so that they can be continued
    return {
        name: {
            "count": len(images.splits[name]),
            "views": count,
            "images": images.hash(name),
            "preprocessing": preprocessing,
            "changes": changes,
        }
        for name, count in views.items()
    }


def state_use(folder: LatentFolder, vae: Any, batch_size: int, image_size: tuple[int, int]) -> str:
    """Return what encoding a folder's latents will take, in words."""
    splits = folder.index["splits"]
    counts = {name: known["count"] * known["views"] for name, known in splits.items()}
    total, missing = num_bytes(folder.shape, sum(counts.values()), DTYPE), folder.missing_bytes()
    of = ", ".join(f"{known['count']:,} {name} images x {known['views']} views" for name, known in splits.items())
    batch = num_bytes((vae.config.in_channels, *image_size), batch_size)
    weights = sum(p.numel() * p.element_size() for p in vae.parameters())
    return (
        f"Latents of {of}: {sum(counts.values()):,} of {'x'.join(map(str, folder.shape))}, {size(total)} on disk in "
        f"{folder.folder}, {size(missing)} of them still to be computed. Memory stays bounded: while encoding the VAE "
        f"({size(weights)}) and what it needs for {batch_size} images at a time ({size(batch)} as pixels), afterwards "
        "the denoiser; latents are read from the disk. Decoded images are kept where all fit into a quarter "
        "of the free memory."
    )


def encode_views(folder: LatentFolder, vae: Any, images: Images) -> None:
    """Compute the latents that a folder lacks, with the VAE on the best device there is and back afterwards.

    Views after the first are changed as the folder's description says: mirrored, or as `augment_view` does.
    """
    if not folder.missing_bytes():
        return
    home, started = vae.device, time.monotonic()
    made_fast(vae, best_device()).to(best_device())
    for split, known in folder.index["splits"].items():
        for view in range(known["views"]):
            folder.encode(vae, split, view, partial(view_batches, images, split, known, view))
    vae.to(home)
    print(f"Encoded in {time.monotonic() - started:.0f} s.")


def view_batches(images: Images, split: str, known: dict[str, Any], view: int, start: int) -> Iterator[torch.Tensor]:
    """Yield a view of a split's images from `start` on, of which a `LatentFolder` knows the count and the changes."""
    changes = known["changes"]
    for pixels in images.batches(split, np.arange(start, known["count"]), f"Encoding {split} images, view {view}"):
        indices = range(start, start := start + len(pixels))
        if view and changes.get("mirror"):
            pixels = mirror(pixels)
        elif view:
            pixels = augment_view(pixels, indices, changes["seed"], view, changes["flip"], changes["crop_padding"])
        yield pixels


def read(latents: np.ndarray, indices: np.ndarray | list[int]) -> torch.Tensor:
    """Return latents (B, c, h, w) at some indices of an array on disk, float32."""
    return torch.from_numpy(latents[np.asarray(indices)]).float()


def latent_dataset(
    folder: LatentFolder,
    split: str,
    labels: np.ndarray | None = None,
    views: int | None = None,
    noise: tuple[int, int] | None = None,
) -> Dataset:
    """Return a split's latents as a data set of `pixel_values` and, where they came, `labels`.

    With `views`, `pixel_values` are the first so many views of an image, (views, c, h, w): training draws one of them,
    see `one_view`. Without, they are the first, (c, h, w). With `noise` (draws, seed) rows have noise of their own.
    """
    count = min(len(folder.latents(split, view)) for view in range(views or 1))
    columns = {"index": np.arange(count)} | ({} if labels is None else {"labels": labels})

    def rows(batch: dict[str, Any]) -> dict[str, Any]:
        # Opened here: datasets pickles what a transform holds, which would read every latent into memory.
        found = [read(folder.latents(split, view), batch["index"]) for view in range(views or 1)]
        row = {"pixel_values": torch.stack(found, dim=1) if views else found[0]}
        if labels is not None:
            row["labels"] = torch.tensor(batch["labels"])
        if noise is not None:
            row["noise"] = indexed_noise((noise[0], *folder.shape), batch["index"], noise[1], noise_view(split, 0))
        return row

    return Dataset.from_dict(columns).with_transform(rows)


def one_view(pixel_values: torch.Tensor) -> torch.Tensor:
    """Return one view, drawn at random, of each image: of (B, views, c, h, w) so (B, c, h, w); images stay."""
    if pixel_values.ndim == 4:
        return pixel_values
    count, views = pixel_values.shape[:2]
    drawn = torch.randint(views, (count,), device=pixel_values.device)
    return pixel_values[torch.arange(count, device=pixel_values.device), drawn]


class EncodedImages(LabelledImages):
    """Labelled images by their latents, which stand in for their pixels."""

    def __init__(self, images: LabelledImages, folder: LatentFolder):
        vars(self).update(vars(images))
        self.folder, self.as_pixels = folder, images
        for name in self.splits:
            if folder.index["splits"].get(name, {}).get("images") != self.hash(name):
                raise ValueError(
                    f"{folder.folder} has no latents of these {name} images: latent_transfer.py makes them, from the "
                    "same data with the same --max_train_samples and --max_test_samples."
                )

    @property
    def pixels(self) -> LabelledImages:
        """The images by their pixels."""
        return self.as_pixels

    def pixel_values(self, split: str, indices: np.ndarray, view: int = 0) -> torch.Tensor:
        """Return the latents (B, c, h, w) of a view of the images at `indices`."""
        return read(self.folder.latents(split, view), indices)

    def dataset(self, split: str, noise: tuple[int, int] | None = None) -> Dataset:
        """Return a split as `pixel_values`, all views of training images, `labels`, and `noise` as for pixels."""
        views = self.folder.views(split) if split == "train" else None
        return latent_dataset(self.folder, split, self.labels[split], views, noise)
