"""The images of a split: their labels, subsets, hash and pixels, and what becomes of damaged ones.

Pixels are decoded when they are first asked for, kept where they fit, on the device too, and scaled there.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset
from PIL import Image as PILImage
from torch import Tensor
from tqdm.auto import tqdm

from ..image_processing_ddae import DDAEImageProcessor
from .classes import Classes, draw_images
from .loading import is_apart, to_device
from .pieces import free_memory

Rows = Sequence[int] | np.ndarray  # places of images
SHARE = 4  # one part in so many of the free memory may be filled
# Columns whose images are masks, where there are others beside them.
MASK_COLUMNS = frozenset(
    "mask masks annotation annotations segmentation segmentation_mask semantic_mask label labels".split()
)
HINT = " Replace it, or leave such images out with skip_bad_images."


class DamagedImageError(ValueError):
    """An image that cannot be read; its text stays one message where a loader's worker would send a traceback."""

    def __init__(self, words: str):
        super().__init__(words.rpartition(f"{DamagedImageError.__name__}: ")[2].strip())


class ImageSet:
    """Images of a split, in order; a stream (`streaming`) has no length, no hash, and labels only row by row."""

    def __init__(self, dataset: Any, split: str = "train", image_column: str = "image", classes: Classes | None = None):
        self.dataset = dataset
        self.split, self.image_column = split, image_column
        self.streaming = isinstance(dataset, IterableDataset)
        self.label_column = classes.column if classes is not None and classes.column in columns_of(dataset) else None
        self._classes = classes
        self._rows: np.ndarray | None = None  # rows of the split, where these are some of its images
        self._skipped = torch.zeros(1, dtype=torch.int64)

    def __len__(self) -> int:
        if self.streaming:
            raise ValueError(f"The stream {self.split!r} does not say how many images it has: leave out streaming.")
        return len(self.dataset)

    @cached_property
    def _files(self) -> Any:
        """The images as `path` and `bytes`, in a column of their own."""
        column = self.image_column
        return self.dataset.select_columns([column]).cast_column(column, Image(decode=False))

    @cached_property
    def _feature(self) -> Image:
        # Kept, because datasets copies all of its features whenever it is asked.
        return Image(mode=self.dataset.features[self.image_column].mode)

    @property
    def names(self) -> Any:
        """The names of the classes of all splits, a list; None where the split, or a stream, does not name them."""
        return self._classes.names if self._classes is not None and self.label_column else None

    @cached_property
    def labels(self) -> Any:
        """The labels, int64 (N,), each the place of a name; None for a split without labels, and for a stream."""
        if self._classes is None or self.label_column is None or self.streaming:
            return None
        return self._classes.labels(self.dataset, self.split)

    @cached_property
    def hash(self) -> str:
        """A SHA-256 of the image files, in order."""
        digest = hashlib.sha256()
        files = self._not_a_stream("hash")._files
        for start in range(0, len(files), 1000):
            for row, image in enumerate(files[start : start + 1000][self.image_column], start):
                if image is None or image["bytes"] is image["path"] is None:
                    self.pil([row])  # this names it in an error
                content = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
                digest.update(hashlib.sha256(content).digest())
        return digest.hexdigest()

    @property
    def skipped(self) -> int:
        """How many images of the split were left out; of a stream, how many so far, in all passes."""
        return int(self._skipped)

    def take(self, count: int | None) -> ImageSet:
        """Return `count` of the images, or all: see `draw_images`. A stream knows no classes, and gives its first."""
        if count is not None and count < 1:
            raise ValueError(f"{count} images of the split {self.split!r} are asked for: it must be at least 1.")
        if count is None:
            return self
        if self.streaming:
            what = f"The first {count} images of the stream {self.split!r} are taken"
            warnings.warn(f"{what}, whatever their classes.", stacklevel=2)
            return self._with(self.dataset.take(count))
        if count >= len(self):
            return self
        return self.select(draw_images(self.dataset[self.label_column][:] if self.label_column else len(self), count))

    def select(self, indices: Rows) -> ImageSet:
        """Return the images at `indices`, in that order."""
        rows = np.asarray(indices, np.int64)
        some = self._with(self._not_a_stream("images by their number").dataset.select(rows))
        some._rows = rows if self._rows is None else self._rows[rows]
        return some

    def _with(self, dataset: Any) -> ImageSet:
        some = ImageSet(dataset, self.split, self.image_column, self._classes)
        some._skipped = self._skipped
        return some

    def _not_a_stream(self, what: str) -> ImageSet:
        if self.streaming:
            raise ValueError(f"A stream has no {what}: leave out streaming.")
        return self

    def beside(self, column: str) -> ImageSet:
        """Return the images of another column, in the same rows."""
        some = ImageSet(self.dataset, self.split, column)
        some._rows = self._rows
        return some

    def pil(self, rows: Rows) -> list[PILImage.Image]:
        """Return the images at these rows, or raise `ValueError` with the path or the row of one that is damaged."""
        chosen = [int(row) for row in rows]
        files = self._not_a_stream("images by their number")._files[chosen][self.image_column]
        return [decode(file, self._feature, self._name(row)) for row, file in zip(chosen, files, strict=True)]

    def _name(self, row: int) -> str:
        """Return what an image is called that is not a file of its own."""
        return f"Image {row if self._rows is None else self._rows[row]} (from 0) of the split {self.split!r}"

    def name(self, row: int) -> str:
        """Return what an image is called: its path, or its place in the split."""
        path = self._files[row][self.image_column]["path"]
        return path if path and os.path.isfile(path) else self._name(row)

    def labelled(self) -> ImageSet:
        """Return these images, or raise `ValueError` if one has no class, or if a stream does not name its classes."""
        columns = columns_of(self.dataset)
        if self._classes is None:
            count = sum(isinstance(feature, ClassLabel) for feature in columns.values())
            what = f"has {count} columns of classes" if count else "does not say of which classes its images are"
            hint = "name the column of labels, label_column, or put images into a folder for each class"
            raise ValueError(f"The data set {what}: {hint}; columns are {list(columns)}.")
        if self.label_column is None:
            what = f"The split {self.split!r} has no column {self._classes.column!r} of labels"
            raise ValueError(f"{what}; it has {list(columns)}.")
        if self.streaming and self.names is None:
            raise ValueError("A stream's column of labels must name its classes (ClassLabel): leave out streaming.")
        _ = self.labels  # they are checked when they are read
        return self

    def stream(self, labels: bool = False, buffer_size: int | None = None, seed: int = 0) -> IterableDataset:
        """Return a stream's rows: `image`, a PIL image, and `labels` if asked for; `ValueError` if it has none.

        With a `buffer_size`, the next image is one of that many, by a seed that changes with the epoch (`set_epoch`).
        """
        columns = {self.image_column: "image"}
        count = 0
        if labels:
            count = len(self.labelled().names)
            columns[str(self.label_column)] = "labels"
        # Renaming would decode images that were not cast before.
        files = self.dataset.cast_column(self.image_column, Image(decode=False)).select_columns(list(columns))
        rows = files.rename_columns({old: new for old, new in columns.items() if old != new})
        if buffer_size is not None:
            rows = rows.shuffle(seed=seed, buffer_size=buffer_size)
        return rows.map(partial(_decoded_row, self._feature, f"An image of the stream {self.split!r}", count))

    def check_first(self) -> None:
        """Raise `ValueError` if there is no image, or the first cannot be read."""
        first = next(iter(self.stream()), None) if self.streaming else len(self) and self.pil([0])
        if not first:
            raise ValueError(f"The split {self.split!r} is empty.")

    def readable(self) -> ImageSet:
        """Return the images that can be read, and warn how many cannot; a stream warns of each as it comes."""
        if self.streaming:
            column, feature = self.image_column, self._feature
            self._skipped.share_memory_()  # with a loader's workers
            files = self.dataset.cast_column(column, Image(decode=False))
            kept = files.filter(partial(_can_be_read, feature, column, self.split, self._skipped))
            return self._with(kept.cast_column(column, feature))
        reasons: dict[int, str] = {}
        for row in tqdm(range(len(self)), desc=f"Checking the images of {self.split}", leave=False):
            try:
                self.pil([row])
            except ValueError as error:
                reasons[row] = str(error).removesuffix(HINT)
        if not reasons:
            return self
        what = f"{len(reasons)} of {len(self)} images of the split {self.split!r}"
        if len(reasons) == len(self):
            raise ValueError(f"{what} cannot be read: {reasons[0]}")
        warnings.warn(f"{what} are left out: {next(iter(reasons.values()))}", stacklevel=3)
        self._skipped += len(reasons)
        return self.select(np.setdiff1d(np.arange(len(self)), list(reasons)))


class Pixels:
    """The pixels of an `ImageSet`, as integers from 0 to 255 that `scaled` makes floats of.

    With `keep`, an image is decoded once, if all fit into memory. When all are decoded, they are kept on a GPU as well
    that asks for them, if they fit there. Where some have more than 8 bits, none are kept, and batches with such images
    are floats.
    """

    def __init__(self, images: Any, processor: DDAEImageProcessor, keep: bool = True):
        if processor.do_normalize and not processor.do_rescale:
            reason = "image files count from 0 to 255, so leave it out"
            raise ValueError(f"The image processor has do_rescale=False: {reason}.")
        self.images, self.processor, self.keep = images, processor, keep
        self.kept: tuple[Tensor, Tensor] | None = None  # pixels of all images, and which of them are there
        self.resident: Tensor | None = None  # pixels of all images, on the device
        self.fits = True  # whether the device has room for them, as far as is known

    def __len__(self) -> int:
        return len(self.images)

    def are_on(self, device: torch.device | str) -> bool:
        """Return whether the pixels of all images are kept on a device apart; they are brought there if they may be."""
        if not is_apart(device) or self.kept is None or not self.fits:
            return False
        home = torch.empty(0, device=device).device  # with its number
        if self.resident is None or self.resident.device != home:
            room, there = self.kept
            if not there.all():
                return False
            self.fits = room.numel() * SHARE <= free_memory(home)
            self.resident = room.to(home) if self.fits else None
        return self.fits

    def read(self, indices: Rows | Tensor, device: torch.device | str = "cpu") -> Tensor:
        """Return pixels (B, C, H, W) of the images at `indices`, in that order: uint8, or floats in [-1, 1].

        They are on the device; where all pixels are kept there, nothing but `indices` is copied.
        """
        rows = torch.as_tensor(indices)
        if self.are_on(device) and self.resident is not None:
            return self.resident[to_device(rows, device)]
        return to_device(self._read(rows), device)

    def _read(self, rows: Tensor) -> Tensor:
        kept = self.kept
        missing = rows if kept is None else rows[~kept[1][rows]]
        if kept is not None and len(missing) == 0:
            return kept[0][rows]
        pixels = self._decode(missing)
        if pixels.dtype != torch.uint8 or (kept is not None and pixels.shape[1:] != kept[0].shape[1:]):
            self.keep, self.kept = False, None
            return pixels if kept is None else self._decode(rows)
        if kept is None:
            processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # each of which keeps the images for itself
            needed = len(self) * pixels[0].numel() * SHARE * processes
            self.keep = self.keep and needed <= free_memory(torch.device("cpu"))
            if not self.keep:
                return pixels
            # Empty memory takes space only where it is written to.
            room = torch.empty(len(self), *pixels.shape[1:], dtype=torch.uint8)
            kept = self.kept = room, torch.zeros(len(self), dtype=torch.bool)
        kept[0][missing] = pixels
        kept[1][missing] = True
        return kept[0][rows]

    def _decode(self, rows: Tensor) -> Tensor:
        return counted(self.images.pil(rows.tolist()), self.processor)


def counted(images: list[PILImage.Image], processor: DDAEImageProcessor) -> Tensor:
    """Return the pixels (B, C, H, W) of images: uint8, which `scaled` makes floats of, or floats if some have more."""
    plain: dict[str, Any] = {"do_rescale": False, "do_normalize": False, "data_format": "channels_first"}
    counts = processor(images, **plain, return_tensors="pt")["pixel_values"]
    return counts if counts.dtype == torch.uint8 else _scale(counts, processor)


def scaled(pixels: Tensor, processor: DDAEImageProcessor) -> Tensor:
    """Return what the processor makes of pixels in uint8, on their device; floats are returned as they are."""
    return _scale(pixels, processor) if pixels.dtype == torch.uint8 else pixels


def _scale(pixels: Tensor, processor: DDAEImageProcessor) -> Tensor:
    """Scale and shift in the processor's order, which decides every rounding; in place, which is far faster."""
    if processor.do_rescale or processor.do_normalize:
        pixels = pixels.float()
    if processor.do_rescale:
        pixels.mul_(processor.rescale_factor)
    if processor.do_normalize:
        for change, value in ((pixels.sub_, processor.image_mean), (pixels.div_, processor.image_std)):
            # A plain number needs no copy to the device.
            one = isinstance(value, (int, float))
            change(float(value) if one else to_device(torch.tensor(value).float().reshape(-1, 1, 1), pixels.device))
    return pixels


def columns_of(dataset: Dataset | IterableDataset) -> Features:
    """Return what the columns hold, or raise `ValueError` for a stream that does not say it."""
    if dataset.features is None:
        raise ValueError("The data set does not say what its columns hold, so it cannot be streamed.")
    return dataset.features


def image_column(dataset: Dataset | IterableDataset, name: str | None) -> str:
    """Return the column of images, or raise `ValueError` with the columns there are; masks are no such column."""
    features = columns_of(dataset)
    found = [column for column, feature in features.items() if isinstance(feature, Image)]
    if name is None and len(found) > 1:
        found = [column for column in found if column not in MASK_COLUMNS]
    if name is None and len(found) != 1:
        raise ValueError(f"Name the column of images, image_column; columns are {list(features)}.")
    if name is not None and name not in found:
        raise ValueError(f"There is no column of images {name!r}; columns are {dict(features)}.")
    return name or found[0]


def decode(file: dict[str, Any] | None, feature: Image, where: str) -> PILImage.Image:
    """Return the image of a file, given as its `path` and `bytes`, or raise an error that says which it is.

    `where` names an image that is not a file of its own.
    """
    try:
        if file is None:
            raise ValueError("there is none")
        return feature.decode_example(file)
    except Exception as error:  # Pillow raises several kinds, most of which do not name the file
        path, content = (file or {}).get("path"), (file or {}).get("bytes")
        if path and os.path.isfile(path):
            where = f"The image {path}"
        elif path:
            where = f"{where} ({path})"
        elif content:
            where = f"{where} ({len(content)} bytes, SHA-256 {hashlib.sha256(content).hexdigest()[:16]})"
        reason = str(error).partition(" <_io")[0].rstrip(".")  # without the name of an object
        raise DamagedImageError(f"{where} cannot be read: {reason}.{HINT}") from error


def _decoded_row(feature: Image, where: str, num_classes: int, row: dict[str, Any]) -> dict[str, Any]:
    if num_classes and (row["labels"] is None or not 0 <= row["labels"] < num_classes):
        raise ValueError(f"An image has the label {row['labels']}: allowed are 0 to {num_classes - 1}.")
    return {**row, "image": decode(row["image"], feature, where)}


def _can_be_read(feature: Image, column: str, split: str, skipped: Tensor, row: dict[str, Any]) -> bool:
    try:
        decode(row[column], feature, "An image")
    except ValueError as error:
        skipped += 1
        warnings.warn(f"Left out of the stream {split!r}: {str(error).removesuffix(HINT)}", stacklevel=2)
        return False
    return True
