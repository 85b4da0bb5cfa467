"""`LatentFolder`: the scaled latents of a data set on disk, made once and read in any order.

    latents.json          what the latents are of and how they were made
    train-0.npy, ...      one array (N, c, h, w), float16, a split and view
    train-labels.npy      the labels (N,) of a split, where there are any
    rows.json             how many rows of each array are done, and their checksum

Latents take 8 KiB an image of 256 pixels and view. They are written a batch at a time, and read through memory maps.
Those that version 0.1.0 left have no checksum: they are refused until they are encoded again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoints import plain_config
from ..latents import downsampling, encode
from ..weights import fingerprint
from .arrays import check_space, fill, locked, num_bytes, open_array, read_json, rows_done, write_array, write_text
from .draws import POSTERIOR, indexed_noise
from .features import evaluating

INDEX = "latents.json"
DTYPE = "float16"


class LatentFolder:
    """Latents of the splits of a data set, in one or more views of every image.

    Attributes:
        folder: Where the latents are.
        index: What `latents.json` says: `vae` (its config), `vae_fingerprint`, `shape` (c, h, w), `sample_posterior`,
            `seed`, `splits` (by name: `count`, `views` and more), and the notes of `create`.

    Raises:
        ValueError: The folder holds no latents, or a damaged description of them.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        if not (self.folder / INDEX).is_file():
            raise ValueError(f"{folder} holds no latents: it has no {INDEX}.")
        self.index: dict[str, Any] = read_json(self.folder / INDEX)

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike[str],
        vae: Any,
        image_size: tuple[int, int],
        splits: dict[str, dict[str, Any]],
        *,
        sample_posterior: bool = False,
        seed: int = 0,
        **notes: Any,
    ) -> LatentFolder:
        """Open a folder for latents that are described so, or create it; they are not computed yet.

        `splits` have by name `count` (number of images), `views` (number of views), and what tells the images and their
        views from others, as JSON. With `sample_posterior` latents are draws in place of means; each (seed, image,
        view) has its own. `notes` are what readers may want to know, as JSON.

        Raises:
            ValueError: The folder holds latents of another description.
            OSError: Not enough space on disk.
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
        path = Path(folder) / INDEX
        text = json.dumps({**notes, **index}, indent=2, sort_keys=True) + "\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            with locked(path.parent):
                if not path.is_file():  # another process may have come first
                    # Nobody knows what rows without a description are of.
                    (path.parent / "rows.json").unlink(missing_ok=True)
                    write_text(path, text)
        known = read_json(path)
        wanted = json.loads(text)
        if found := _differences(known, {name: wanted[name] for name in index}):
            raise ValueError(f"{folder} holds other latents ({'; '.join(found)}): give another folder, or delete it.")
        if known != wanted:
            write_text(path, text)
        latents = cls(folder)
        check_space(latents.folder, latents.missing_bytes())
        return latents

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent."""
        channels, height, width = self.index["shape"]
        return channels, height, width

    def views(self, split: str) -> int:
        """Return the number of a split's views, or raise `ValueError` with the splits there are."""
        if split not in self.index["splits"]:
            raise ValueError(f"{self.folder} has no split {split!r}: it has {sorted(self.index['splits'])}.")
        return self.index["splits"][split]["views"]

    def missing_bytes(self) -> int:
        """Return the space that the latents that are not computed yet will take."""
        rows = rows_done(self.folder)
        return sum(
            num_bytes(self.shape, known["count"] - rows.get(f"{split}-{view}", 0), DTYPE)
            for split, known in self.index["splits"].items()
            for view in range(known["views"])
        )

    def encode(self, vae: Any, split: str, view: int, images: Callable[[int], Iterable[Tensor]]) -> None:
        """Compute a view's latents, from the image at which an interrupted run stopped.

        The VAE is the one that the folder was created for, on the device to use; its mode plays no part. `images`,
        called with an index, gives `pixel_values` in batches from that image on.

        Raises:
            ValueError: Another number of images than announced, latents that are not finite, or a damaged file.
        """
        name, count = f"{split}-{view}", self.index["splits"][split]["count"]
        # No two splits share a draw.
        number = len(self.index["splits"]) * view + sorted(self.index["splits"]).index(split)

        def batches(start: int, missing: list[str]) -> Iterable[dict[str, Tensor]]:
            for pixels in images(start):
                indices = range(start, start := start + len(pixels))
                own = None
                if self.index["sample_posterior"]:
                    own = indexed_noise(self.shape, indices, self.index["seed"], number, purpose=POSTERIOR)
                with evaluating(vae):
                    latents = encode(vae, pixels.to(vae.device), own).to(getattr(torch, DTYPE))
                if not latents.isfinite().all():
                    what = f"Latents of the {split} images {indices[0]} to {indices[-1]} are not finite in {DTYPE}"
                    raise ValueError(f"{what}: the VAE overflows. Run it in float32, and look at its scaling_factor.")
                yield {name: latents}

        fill(self.folder, {name: self.shape}, count, batches, DTYPE)

    def latents(self, split: str, view: int = 0) -> np.ndarray:
        """Return a view's latents (N, c, h, w), float16, mapped from disk.

        Raises:
            ValueError: No such split or view, one that is not complete, or a damaged file.
        """
        views, count = self.views(split), self.index["splits"][split]["count"]
        if not 0 <= view < views:
            raise ValueError(f"{self.folder} has {views} views of the split {split!r}: view {view} is not among them.")
        done = rows_done(self.folder).get(f"{split}-{view}", 0)
        if done < count:
            what = f"{self.folder} has {done} of {count} latents of the split {split!r}, view {view}"
            raise ValueError(f"{what}: finish encoding them with the command that began it.")
        return open_array(self.folder, f"{split}-{view}", (count, *self.shape), DTYPE)

    def write_labels(self, split: str, labels: np.ndarray) -> None:
        """Keep a split's labels (N,), 64-bit integers, beside its latents."""
        count = self.index["splits"][split]["count"]
        if labels.shape != (count,) or labels.dtype != np.int64:
            came = f"labels of the split {split!r} have shape {labels.shape} and type {labels.dtype}"
            raise ValueError(f"{came}: give ({count},), int64.")
        write_array(self.folder, f"{split}-labels", labels)

    def has_labels(self, split: str) -> bool:
        """Return whether a split's labels are kept."""
        return (self.folder / f"{split}-labels.npy").is_file()

    def labels(self, split: str) -> np.ndarray:
        """Return a split's labels (N,), or raise `ValueError` where it has none or their file is damaged."""
        if not self.has_labels(split):
            raise ValueError(f"{self.folder} has no labels of the split {split!r}.")
        return np.array(open_array(self.folder, f"{split}-labels", (self.index["splits"][split]["count"],), "int64"))

    def check_vae(self, vae: Any) -> None:
        """Raise `ValueError` unless the latents are those of this VAE, scaled as it says."""
        if fingerprint(vae, dtype=torch.float32) != self.index["vae_fingerprint"]:
            raise ValueError(f"The latents in {self.folder} were made by another VAE than this one.")
        for name in ("scaling_factor", "shift_factor"):
            made = self.index["vae"].get(name)
            has = vae.config.get(name)
            if made != has:
                raise ValueError(f"The latents in {self.folder} were made with a {name} of {made}: this VAE has {has}.")


def _differences(known: dict[str, Any], wanted: dict[str, Any], inside: str = "") -> list[str]:
    """Return in words where a description differs from the one that is wanted."""
    found: list[str] = []
    for name, value in wanted.items():
        has = known.get(name)
        if isinstance(has, dict) and isinstance(value, dict):
            found += _differences(has, value | dict.fromkeys(has.keys() - value.keys()), f"{inside}{name}.")
        elif has != value:
            hashes = len(str(has)) + len(str(value)) > 100
            found.append(f"{inside}{name} differs" if hashes else f"{inside}{name} is {has} there, {value} here")
    return found
