"""Latents of a data set on disk: what `encode` has made, mapped from there, read in place of images.

`LatentInputs` gives them to probes, and `latent_dataset` to a training loop. The files of a `LatentFolder` are

    latents.json          which images the latents are of, and how they were made
    train-0.npy, ...      one array (N, c, h, w), float16, for each split and view
    train-labels.npy      the labels (N,) of a split, where there are any
    rows.json             how many rows of each array are done, and their checksum

Latents take 8 KiB for each view of an image of 256 x 256 pixels. They are written a batch at a time, and read through
memory maps. Latents of version 0.1.0 have no checksum: they are refused until they are encoded again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from ..checkpoints import plain_config
from ..generators import Generator, uniform
from ..latents import SCALES, downsampling
from ..latents import encode as scaled_latents
from ..weights import fingerprint
from . import arrays
from .draws import GENERATOR, POSTERIOR, indexed_noise
from .features import evaluating
from .image_set import Rows
from .images import ImageSet, Inputs
from .loading import to_device

INDEX = "latents.json"
DTYPE = "float16"
FLOAT32 = "float32"  # what a VAE computes in where latents.json does not say it


def latents_of(vae: Any, pixels: Tensor, indices: Any, *, seed: int | None, view: int) -> Tensor:
    """Return the latents (B, c, h, w), float16, of images (B, C, H, W) of these indices in their data set.

    With a seed they are draws, those of the view, otherwise means. The VAE is on the device to use, in the type to
    compute in, and its mode plays no part. Latents that are not finite raise `ValueError`.
    """
    factor = downsampling(vae.config)
    shape = (vae.config.latent_channels, *(side // factor for side in pixels.shape[-2:]))
    own = None
    if seed is not None:
        own = indexed_noise(shape, indices, seed, view, purpose=POSTERIOR, device=vae.device)
    with evaluating(vae):
        latents = scaled_latents(vae, to_device(pixels, vae.device), own).to(getattr(torch, DTYPE))
    if not latents.isfinite().all():
        what = f"Latents of the images {indices[0]} to {indices[-1]} are not finite in {DTYPE}"
        raise ValueError(f"{what}: the VAE overflows. Run it in float32, and look at its scaling_factor.")
    return latents


def one_view(pixel_values: Tensor, generator: Generator = None) -> Tensor:
    """Return one random view of each image, (B, c, h, w) of (B, views, c, h, w); images stay as they are."""
    if pixel_values.ndim == 4:
        return pixel_values
    count, views = pixel_values.shape[:2]
    drawn = (uniform((count,), pixel_values.device, generator) * views).long()
    return pixel_values[torch.arange(count, device=pixel_values.device), drawn]


class LatentFolder:
    """Latents of the splits of a data set, in one or more views of every image; a folder without any is refused.

    Attributes:
        folder: Where the latents are.
        index: What `latents.json` says: `vae` (its config), `vae_fingerprint`, `shape` (c, h, w), `sample_posterior`,
            `seed`, `splits` (by name: `count`, `views` and more), and the notes of `create`.
    """

    def __init__(self, folder: arrays.StrPath):
        self.folder = Path(folder)
        if not (self.folder / INDEX).is_file():
            raise ValueError(f"{folder} holds no latents: it has no {INDEX}.")
        self.index: dict[str, Any] = arrays.read_json(self.folder / INDEX)

    @classmethod
    def create(
        cls,
        folder: arrays.StrPath,
        vae: Any,
        image_size: tuple[int, int],
        splits: dict[str, Any],
        *,
        sample_posterior: bool = False,
        seed: int = 0,
        dtype: str = "float32",
        **notes: Any,
    ) -> LatentFolder:
        """Open a folder for latents of this description, or create it; they are not computed yet.

        `splits` has by name `count` (number of images), `views` (number of views), and what tells the images and their
        views from others, as JSON. With `sample_posterior`, latents are draws in place of means; each (seed, image,
        view) has its own draw. `dtype` names the type that the VAE computes in. `notes` are what readers may want to
        know, as JSON. A folder of latents of another description raises `ValueError`, and a disk without room for them
        raises `OSError`.
        """
        height, width = (side // downsampling(vae.config) for side in image_size)
        index = {
            "vae": plain_config(vae),
            "vae_fingerprint": fingerprint(vae, dtype=torch.float32),
            "shape": [vae.config.latent_channels, height, width],
            "sample_posterior": sample_posterior,
            "seed": seed if sample_posterior else None,
            "splits": splits,
        }
        if sample_posterior:
            index["generator"] = GENERATOR
        if dtype != FLOAT32:
            index["dtype"] = dtype
        path = Path(folder) / INDEX
        text = json.dumps({**notes, **index}, indent=2, sort_keys=True) + "\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            with arrays.locked(path.parent):
                if not path.is_file():  # another process may have come first
                    # Without a description, nobody knows which images the rows are of.
                    (path.parent / "rows.json").unlink(missing_ok=True)
                    arrays.write_text(path, text)
        known = arrays.read_json(path)
        wanted = json.loads(text)
        described = {name: wanted[name] for name in index} | {"dtype": dtype}
        if found := arrays.differences({"dtype": FLOAT32, **known}, described):
            raise ValueError(f"{folder} holds other latents ({'; '.join(found)}): give another folder, or delete it.")
        if known != wanted:
            arrays.write_text(path, text)
        latents = cls(folder)
        arrays.check_space(latents.folder, latents.missing_bytes())
        return latents

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent."""
        channels, height, width = self.index["shape"]
        return channels, height, width

    @property
    def computed_in(self) -> str:
        """Name of the type that the VAE computes in."""
        return self.index.get("dtype", FLOAT32)

    def views(self, split: str) -> int:
        """Return the number of a split's views, or raise `ValueError` with the splits there are."""
        if split not in self.index["splits"]:
            raise ValueError(f"{self.folder} has no split {split!r}: it has {sorted(self.index['splits'])}.")
        return self.index["splits"][split]["views"]

    def missing_bytes(self) -> int:
        """Return the space that the missing latents will take, in bytes."""
        rows = arrays.rows_done(self.folder)
        return sum(
            arrays.num_bytes(self.shape, known["count"] - rows.get(f"{split}-{view}", 0), DTYPE)
            for split, known in self.index["splits"].items()
            for view in range(known["views"])
        )

    @property
    def complete(self) -> bool:
        """Whether all latents are there in whole arrays: a process that is killed may leave one that is only filled."""
        splits = self.index["splits"]
        views = ((split, view) for split in splits for view in range(splits[split]["views"]))
        return not self.missing_bytes() and all(self._is_whole(split, view) for split, view in views)

    def _is_whole(self, split: str, view: int) -> bool:
        return (self.folder / f"{split}-{view}.npy").is_file()

    def encode(self, vae: Any, split: str, view: int, images: Callable[[int], Iterable[Tensor]]) -> None:
        """Compute a view's latents, from the image at which an interrupted run stopped.

        The VAE is the one that the folder was created for, on the device to use; its mode plays no part. `images`,
        called with an index, gives `pixel_values` in batches from that image on. Another number of images than
        announced, and latents that are not finite, raise `ValueError`.
        """

        def latents(start: int) -> Iterator[Tensor]:
            for pixels in images(start):
                indices = range(start, start := start + len(pixels))
                yield latents_of(vae, pixels, indices, seed=self.index["seed"], view=self.number(split, view))

        self.keep(split, view, latents)

    def keep(self, split: str, view: int, latents: Callable[[int], Iterable[Tensor]]) -> None:
        """Keep a view's latents, which `latents` gives in batches from an image on: see `encode`."""
        name = f"{split}-{view}"

        def batches(start: int, missing: list[str]) -> Iterable[dict[str, Tensor]]:
            return ({name: batch} for batch in latents(start))

        arrays.fill(self.folder, {name: self.shape}, self.index["splits"][split]["count"], batches, DTYPE)

    def number(self, split: str, view: int) -> int:
        """Return the number of a view's draws, which no two views of all splits share."""
        return len(self.index["splits"]) * view + sorted(self.index["splits"]).index(split)

    def latents(self, split: str, view: int = 0) -> np.ndarray:
        """Return a view's latents (N, c, h, w), float16, mapped from disk, or raise `ValueError` if any is missing."""
        views, count = self.views(split), self.index["splits"][split]["count"]
        if not 0 <= view < views:
            raise ValueError(f"{self.folder} has {views} views of the split {split!r}: view {view} is not among them.")
        done = arrays.rows_done(self.folder).get(f"{split}-{view}", 0)
        if done < count or not self._is_whole(split, view):
            what = f"{self.folder} has {done} of {count} latents of the split {split!r}, view {view}"
            what += ", in a file that is not finished" if done == count else ""
            raise ValueError(f"{what}: finish encoding them with the command that began it.")
        return arrays.open_array(self.folder, f"{split}-{view}", (count, *self.shape), DTYPE)

    def read(self, split: str, view: int, rows: Rows) -> Tensor:
        """Return a view's latents (B, c, h, w) at these rows, float32."""
        return torch.from_numpy(self.latents(split, view)[np.asarray(rows)]).float()

    def write_labels(self, split: str, labels: np.ndarray) -> None:
        """Keep a split's labels (N,), 64-bit integers, beside its latents."""
        count = self.index["splits"][split]["count"]
        if labels.shape != (count,) or labels.dtype != np.int64:
            came = f"labels of the split {split!r} have shape {labels.shape} and type {labels.dtype}"
            raise ValueError(f"{came}: give ({count},), int64.")
        arrays.write_array(self.folder, f"{split}-labels", labels)

    def labels(self, split: str) -> np.ndarray | None:
        """Return a split's labels (N,), None where it has none, or raise `ValueError` where their file is damaged."""
        if not (self.folder / f"{split}-labels.npy").is_file():
            return None
        count = self.index["splits"][split]["count"]
        return np.array(arrays.open_array(self.folder, f"{split}-labels", (count,), "int64"))

    def check_vae(self, vae: Any) -> None:
        """Raise `ValueError` unless the latents are those of this VAE, scaled as it says."""
        if fingerprint(vae, dtype=torch.float32) != self.index["vae_fingerprint"]:
            raise ValueError(f"The latents in {self.folder} were made by another VAE than this one.")
        own = plain_config(vae)
        for name in SCALES:
            made = self.index["vae"].get(name)
            has = own.get(name)
            if made != has:
                raise ValueError(f"The latents in {self.folder} were made with a {name} of {made}: this VAE has {has}.")


class LatentInputs(Inputs):
    """Images by their latents in a folder, computed or not; after the last view, numbers begin again at the first.

    A folder of other images is refused.
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
        known |= {} if self.folder.computed_in == FLOAT32 else {"dtype": self.folder.computed_in}
        return {**known, **index["splits"][self.split]}

    def fetch(self, rows: Any, view: int = 0, device: torch.device | str = "cpu") -> Tensor:
        """Return the latents (B, c, h, w) of a view of the images at `rows`, float16."""
        latents = self.folder.latents(self.split, view % self.folder.views(self.split))
        return to_device(torch.from_numpy(latents[np.asarray(rows)]), device)

    def made(self, fetched: Tensor, view: int, numbers: Any) -> Tensor:
        """Return latents (B, c, h, w) as float32."""
        return fetched.float()


def latent_dataset(folder: LatentFolder, split: str, labels: np.ndarray | None) -> Dataset:
    """Return a split's latents as a data set of `pixel_values` and, where they are given, `labels`.

    `pixel_values` are all views of an image, (views, c, h, w): see `one_view`.
    """
    views = range(folder.views(split))
    count = min(len(folder.latents(split, view)) for view in views)
    columns = {"index": np.arange(count)} | ({} if labels is None else {"labels": labels})

    def rows(batch: dict[str, Any]) -> dict[str, Any]:
        # Latents are opened here: datasets pickles what a transform holds, and would read them all into memory.
        row = {"pixel_values": torch.stack([folder.read(split, view, batch["index"]) for view in views], 1)}
        return row if labels is None else row | {"labels": torch.tensor(batch["labels"])}

    return Dataset.from_dict(columns).with_transform(rows)
