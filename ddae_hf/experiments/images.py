"""Images of any data set: by split, with their labels, and as what a network reads.

`Images.open` takes images in any form; `images["train"]`, an `ImageSet`, has the images of a split. `Inputs` are what a
network reads of them: pixels here, latents in `encoding`.
"""

from __future__ import annotations

import abc
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Features
from torch import Tensor
from tqdm.auto import tqdm

from ..image_processing_ddae import DDAEImageProcessor
from .classes import Classes, find_label_column, warn_of_missing
from .data_files import in_memory, read_source
from .draws import augment_view
from .image_set import ImageSet, Pixels, Rows, columns_of, image_column, scaled
from .loading import read_ahead
from .options import Options, option
from .sharing import is_first_process

Part = tuple[np.ndarray, Any]  # rows of images, and numbers of the same images, by which what is random is seeded


@dataclass(kw_only=True)
class DataOptions(Options):
    """Where images come from."""

    dataset_name: str | None = option(None, "Hub id, a local folder, or a parquet file.")
    dataset_config_name: str | None = option(None, "Configuration of a Hub data set.")
    train_data_dir: str | None = option(None, "Folder of images; its sub-folders name classes, or splits.")
    image_column: str | None = option(None, "Column of images; by default the only one that holds images.")
    label_column: str | None = option(None, "Column of labels; by default the only one of classes.")
    skip_bad_images: bool = option(False, "Leave out images that cannot be read; by default they end the run.")

    def open(self, cache_dir: str | None = None, streaming: bool = False) -> Images:
        """Return the images that the options name: see `Images.open`."""
        if (self.dataset_name is None) == (self.train_data_dir is None):
            raise ValueError("Give one of dataset_name and train_data_dir.")
        source: Any = self.train_data_dir if self.dataset_name is None else self.dataset_name
        splits = read_source(
            source, self.dataset_config_name, streaming, cache_dir, tables=self.dataset_name is not None
        )
        given = {name: value for name, value in self.to_dict().items() if value not in (None, False)}
        return Images(splits, self.image_column, self.label_column, self.skip_bad_images, given)


@dataclass(kw_only=True)
class SplitOptions(Options):
    """Which images an experiment trains and tests on: see `labelled_splits`."""

    train_split: str = option("train", "Split to train on.")
    test_split: str = option("test", "Split to test on.")
    max_train_samples: int | None = option(None, "Use N training images of all classes, always the same ones.")
    max_test_samples: int | None = option(None, "Use N test images of all classes, always the same ones.")
    cache_dir: str | None = option(None, "Where downloads are kept.")


class Images:
    """The images of a data set, by split: see `open`.

    Attributes:
        splits: Names of the splits.
        opened_with: The `DataOptions` that open the same images again; empty for objects in memory.
    """

    def __init__(
        self, splits: Mapping[str, Any], image_column: str | None, label_column: str | None, skip_bad_images: bool,
        opened_with: dict[str, Any],
    ):  # fmt: skip
        self.splits, self.opened_with = list(splits), opened_with
        self._datasets, self._image_column, self._skip = dict(splits), image_column, skip_bad_images
        self._sets: dict[str, ImageSet] = {}
        features = Features()
        for split in reversed(self._datasets.values()):
            features.update(columns_of(split))
        column = find_label_column(features, label_column)
        self._classes = None if column is None else Classes(self._datasets, column)

    @classmethod
    def open(
        cls,
        source: Any,
        *,
        labels: Sequence[Any] | np.ndarray | None = None,
        config_name: str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        streaming: bool = False,
        cache_dir: str | None = None,
        skip_bad_images: bool = False,
    ) -> Images:
        """Return the images of any source.

        Args:
            source: A Hub id; a folder of tables or, without any, of images; a parquet file; a `Dataset` or a list of
                PIL images, which are the split `train`; or a mapping from the names of splits to data sets, lists of
                images, or pairs (images, labels). Data sets may be streams. `Images` are returned as they are.
            labels: Classes of a list of images, numbers or names.
            config_name: Configuration of a Hub data set.
            image_column: Column of images, by default the only one that holds images.
            label_column: Column of labels, whole numbers or names, by default the only one of classes.
            streaming: Whether to read a Hub id, a folder or a file while it is gone through, without downloading it.
            cache_dir: Where downloads are kept.
            skip_bad_images: Whether to leave out images that cannot be read, with a warning that counts them. For
                this, a split's images are all decoded when it is first asked for; a stream's images as it is read.

        Raises:
            ValueError: A source that cannot be read, or that can be read in two ways; no such column.
        """
        if isinstance(source, Images):
            return source
        if isinstance(source, (str, os.PathLike)):
            if labels is not None:
                raise ValueError("labels are for a list of images: name a data set's column of labels, label_column.")
            options = DataOptions(
                dataset_name=os.fspath(source), dataset_config_name=config_name, image_column=image_column,
                label_column=label_column, skip_bad_images=skip_bad_images,
            )  # fmt: skip
            return options.open(cache_dir, streaming)
        if streaming or config_name is not None:
            raise ValueError("streaming and config_name are for data that is not in memory yet: leave them out.")
        if labels is not None:
            source = (source, labels)
        parts = source if isinstance(source, Mapping) else {"train": source}
        if not parts:
            raise ValueError("The data set has no splits.")
        splits = {str(name): in_memory(part) for name, part in parts.items()}
        if any(isinstance(part, tuple) for part in parts.values()):
            label_column = "label"
        return cls(splits, image_column, label_column, skip_bad_images, {})

    def __getitem__(self, split: str) -> ImageSet:
        """Return the images of a split, or raise `ValueError` if there are none, or the first cannot be read."""
        if split not in self._datasets:
            hint = "" if self.opened_with else ": name splits by a mapping, {'train': ..., 'test': ...}"
            if "train_data_dir" in self.opened_with:
                hint = ": the splits of a folder are the folders train, test and validation inside it"
            raise ValueError(f"The data set has no split {split!r}; it has {sorted(self._datasets)}{hint}.")
        if split not in self._sets:
            dataset = self._datasets[split].with_format(None)
            column = image_column(dataset, self._image_column)
            opened = ImageSet(dataset, split, column, self._classes)
            if not self._skip:
                opened.check_first()
            self._sets[split] = opened.readable() if self._skip else opened
        return self._sets[split]

    def facts(self, train: ImageSet, test: ImageSet | None = None) -> dict[str, Any]:
        """Return what result files say of the data: its name, its splits, how many images were used and left out."""
        source = self.opened_with.get("dataset_name") or self.opened_with.get("train_data_dir")
        of_hub = "dataset_name" in self.opened_with and not os.path.exists(str(source))
        info = next(iter(self._datasets.values())).info
        # Of a data set that came open and was read from files, datasets knows only the kind of the files.
        known = info.dataset_name if info.dataset_name != info.builder_name else None
        facts = {
            "name": Path(source).resolve().name if source else known,
            "id": source if of_hub else None,
            "config": self.opened_with.get("dataset_config_name"),
            "train_split": train.split,
            "test_split": None if test is None else test.split,
            "num_images": None if train.streaming else len(train),
            "skipped_images": train.skipped + (0 if test is None else test.skipped) or None,
        }
        return {name: value for name, value in facts.items() if value is not None}


def labelled_splits(images: Images, options: Any) -> tuple[ImageSet, ImageSet]:
    """Return the images to train on and those to test on, with their labels, as options of an experiment name them.

    The same images in both, images without labels, and training images of a single class are refused.
    """
    if options.train_split == options.test_split:
        raise ValueError(f"test_split is {options.test_split!r}, like train_split: test on other images.")
    train, test = images[options.train_split].labelled(), images[options.test_split].labelled()
    if train.streaming or test.streaming:
        raise ValueError("A stream knows its labels only row by row: leave out streaming.")
    if len(train) == len(test) and train.hash == test.hash:
        raise ValueError(f"The splits {train.split!r} and {test.split!r} are the same images: test on other images.")
    train, test = train.take(options.max_train_samples), test.take(options.max_test_samples)
    if len(np.unique(train.labels)) < 2:
        raise ValueError("The training images are all of one class: a classifier needs at least two.")
    warn_of_missing(train.names, {"train": train.labels, "test": test.labels})
    return train, test


class Inputs(abc.ABC):
    """What a network reads of images: their pixels, or latents of them."""

    images: ImageSet

    def __len__(self) -> int:
        return len(self.images)

    @property
    def labels(self) -> Any:
        """The labels of the images: see `ImageSet`."""
        return self.images.labels

    @property
    def names(self) -> Any:
        """The names of the classes."""
        return self.images.names

    @property
    @abc.abstractmethod
    def identity(self) -> dict[str, Any]:
        """What tells these inputs from others, as JSON."""

    @abc.abstractmethod
    def fetch(self, rows: Any, view: int = 0, device: torch.device | str = "cpu") -> Tensor:
        """Return, on the device, what is kept of a view of the images at B rows: what `made` takes."""

    @abc.abstractmethod
    def made(self, fetched: Tensor, view: int, numbers: Any) -> Tensor:
        """Return the inputs (B, C, H, W), float32, that something fetched stands for, on its device: see `read`."""

    def are_on(self, device: torch.device | str) -> bool:
        """Return whether all that `fetch` returns is kept on a device apart from the processor."""
        return False

    def read(
        self, rows: Rows | Tensor, view: int = 0, numbers: Any = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Return the inputs (B, C, H, W) at B rows, float32, on the device.

        View 0 is the image as it is; later views depend on the kind of inputs. What is random about them is seeded by
        `numbers`, one for each image, by default the rows.
        """
        return self.made(self.fetch(rows, view, device), view, rows if numbers is None else numbers)

    def batches(
        self, batch_size: int, rows: Rows | None = None, start: int = 0, *, view: int = 0, title: str = "Images",
        device: torch.device | str = "cpu",
    ) -> Iterator[Tensor]:  # fmt: skip
        """Yield inputs (B, C, H, W) with a progress bar: of `rows`, by default all, from the place `start` on.

        They are on the device; while a GPU computes with a batch, the next ones are read. What is random about a later
        view is seeded by the place among `rows`.
        """
        chosen = np.arange(len(self)) if rows is None else np.asarray(rows)
        yield from self.parts(parts_of(chosen, batch_size, start), view=view, title=title, device=device)

    def parts(
        self, parts: Sequence[Part], *, view: int = 0, title: str = "Images", device: torch.device | str = "cpu"
    ) -> Iterator[Tensor]:
        """Yield inputs (B, C, H, W) of each part's rows, seeded by its numbers, with a progress bar: see `batches`."""
        there = self.are_on(device)

        def fetch(part: Part) -> Tensor:
            return self.fetch(part[0], view, device if there else "cpu")

        # It has no name, so that its thread ends at an error, whoever keeps the traceback. Where all is there, nothing
        # is left to a thread.
        for (_, numbers), values in zip(
            tqdm(parts, desc=title, leave=False, disable=not is_first_process()),
            map(fetch, parts) if there else read_ahead(fetch, parts, device),
            strict=True,
        ):
            yield self.made(values, view, numbers)


class ImageInputs(Inputs):
    """Images by their pixels, in [-1, 1], which are kept in memory and on the device where they fit.

    With `flip`, half of the images in later views are mirrored; with `crop_padding`, all are cropped: `augment_view`.
    """

    def __init__(
        self,
        images: ImageSet,
        processor: DDAEImageProcessor,
        *,
        flip: bool = False,
        crop_padding: int = 0,
        seed: int = 0,
    ):
        self.images, self.processor, self.pixels = images, processor, Pixels(images, processor)
        self.flip, self.crop_padding, self.seed = flip, crop_padding, seed

    @property
    def identity(self) -> dict[str, Any]:
        """The images' hash, and how they are prepared."""
        return {"images": self.images.hash, "preprocessing": self.processor.to_dict()}

    def fetch(self, rows: Any, view: int = 0, device: torch.device | str = "cpu") -> Tensor:
        """Return pixels (B, C, H, W), which are the same for all views: uint8, or floats in [-1, 1]."""
        return self.pixels.read(rows, device)

    def made(self, fetched: Tensor, view: int, numbers: Any) -> Tensor:
        """Return pixels (B, C, H, W) as floats, of later views mirrored and cropped."""
        pixels = scaled(fetched, self.processor)
        return pixels if view == 0 else augment_view(pixels, numbers, self.seed, view, self.flip, self.crop_padding)

    def are_on(self, device: torch.device | str) -> bool:
        """Return whether the pixels of all images are kept on a device apart from the processor."""
        return self.pixels.are_on(device)


def parts_of(rows: np.ndarray, size: int, start: int = 0) -> list[Part]:
    """Return rows in parts of a size, from a place on; an image's number is its place among the rows."""
    firsts = range(start, len(rows), size)
    return [(rows[first : first + size], range(first, min(first + size, len(rows)))) for first in firsts]


def noise_view(test: bool, view: int) -> int:
    """Return the number of a view's draw of noise: training and test images never share one."""
    return 2 * view + test
