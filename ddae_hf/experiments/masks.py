"""Images with masks, which give every pixel a class: which column has them, what they may hold, reading both together.

A mask is an image of the size of its own, with the number of a class for each pixel (PIL's modes `L`, `P`, `I` and
`1`). Pixels of the number 255 are of no class: they are neither learnt nor counted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Image
from torch import Tensor
from tqdm.auto import tqdm

from ..class_maps import read_mask
from ..image_processing_ddae import DDAEImageProcessor
from .image_set import MASK_COLUMNS, SHARE, ImageSet, Pixels, Rows, columns_of
from .images import Images
from .loading import to_device
from .pieces import free_memory
from .sharing import is_first_process

IGNORED = 255  # the number of no class
PART = 100  # masks that are looked at together


class MaskedImages:
    """Images of a split with their masks, and how a model takes both.

    Attributes:
        images: The images.
        masks: Their masks, in the same rows.
        classes: The numbers of the classes that the masks hold, ascending, and without 255.
    """

    def __init__(self, images: ImageSet, mask_column: str, processor: DDAEImageProcessor):
        """Look at every image and mask, and keep the masks at the model's size where they fit into memory.

        Raises:
            ValueError: An image or mask that cannot be read, a mask in colours, or one of another size than its image.
        """
        self.images, self.masks, self.processor = images, images.beside(mask_column), processor
        self.pixels = Pixels(images, processor)
        size = processor.size["height"], processor.size["width"]
        fits = len(images) * size[0] * size[1] * SHARE <= free_memory(torch.device("cpu"))
        kept: Tensor | None = torch.empty(len(images), *size, dtype=torch.uint8) if fits else None
        found: set[int] = set()
        title = f"Looking at the masks of {images.split}"
        for start in tqdm(range(0, len(images), PART), desc=title, leave=False, disable=not is_first_process()):
            rows = range(start, min(start + PART, len(images)))
            masks = self._read(rows, images.pil(rows))
            found.update(*(np.unique(mask).tolist() for mask in masks))
            if max(found) > IGNORED:
                kept = None
            if kept is not None:
                kept[rows.start : rows.stop] = torch.from_numpy(np.stack(processor.fit_masks(masks)))
        self.classes = sorted(found - {IGNORED})
        self.kept = kept

    def __len__(self) -> int:
        return len(self.images)

    @property
    def hash(self) -> str:
        """A SHA-256 of the files of the images and of the masks."""
        return hashlib.sha256(f"{self.images.hash} {self.masks.hash}".encode()).hexdigest()

    def _read(self, rows: Rows | range, images: Sequence[Any] | None = None) -> list[np.ndarray]:
        """Return the masks (H, W) at these rows, checked against their images' sizes if these are given."""
        found = []
        for place, (row, mask) in enumerate(zip(rows, self.masks.pil(rows), strict=True)):
            size = None if images is None else (images[place].height, images[place].width)
            try:
                found.append(read_mask(mask, size))
            except ValueError as error:
                raise ValueError(f"The mask of {self.images.name(int(row))}: {error}") from error
        return found

    def truths(self, rows: Rows | range) -> list[Tensor]:
        """Return the masks at these rows at their own sizes (H, W), int64."""
        return [torch.from_numpy(mask).long() for mask in self._read(rows)]

    def read(self, rows: Sequence[int], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Return `pixel_values` (B, C, H, W), uint8 or floats, and `labels` (B, H, W), int64, of the model's size."""
        if self.kept is not None:
            labels = self.kept[torch.as_tensor(rows)].long()
        else:
            labels = torch.from_numpy(np.stack(self.processor.fit_masks(self._read(rows))))
        return {"pixel_values": self.pixels.read(rows, device), "labels": to_device(labels, device)}

    def check_classes(self, names: Sequence[str]) -> None:
        """Raise `ValueError` if a mask holds a class beyond those that have names."""
        if self.classes and self.classes[-1] >= len(names):
            raise ValueError(
                f"Masks of the split {self.images.split!r} hold the class {self.classes[-1]}, but there are "
                f"{len(names)} classes, 0 to {len(names) - 1}: name all in class_names, or give pixels of no class the "
                f"number {IGNORED}."
            )


def masked_splits(images: Images, options: Any, processor: DDAEImageProcessor) -> tuple[MaskedImages, MaskedImages]:
    """Return the images to train on and those to test on, with their masks, as options of an experiment name them.

    The same images in both, streams, and images without masks are refused.
    """
    if options.train_split == options.test_split:
        raise ValueError(f"test_split is {options.test_split!r}, like train_split: test on other images.")
    train, test = images[options.train_split], images[options.test_split]
    if train.streaming or test.streaming:
        raise ValueError("Masks are read together with their images, not as a stream: leave out streaming.")
    columns = [find_mask_column(each, options.mask_column) for each in (train, test)]
    if len(train) == len(test) and train.hash == test.hash:
        raise ValueError(f"The splits {train.split!r} and {test.split!r} are the same images: test on other images.")
    chosen = train.take(options.max_train_samples), test.take(options.max_test_samples)
    first, second = (MaskedImages(each, column, processor) for each, column in zip(chosen, columns, strict=True))
    return first, second


def find_mask_column(images: ImageSet, name: str | None) -> str:
    """Return the column of masks, by default the only one of images beside the images, or that with a mask's name."""
    features = columns_of(images.dataset)
    found = [key for key, kind in features.items() if isinstance(kind, Image) and key != images.image_column]
    if name is not None:
        if name not in found:
            raise ValueError(f"There is no column of masks {name!r}; columns of images are {found} beside the images.")
        return name
    if len(found) > 1:
        found = [column for column in found if column in MASK_COLUMNS]
    if len(found) != 1:
        raise ValueError(
            f"The split {images.split!r} does not say which masks its images have: name a column of images, "
            "mask_column, or put images and masks of one name into folders images/ and masks/; columns are "
            f"{list(features)}."
        )
    return found[0]


def names_of_classes(train: MaskedImages, names: Sequence[str] | None) -> list[str]:
    """Return the names of the classes, by default the numbers that training masks hold up to the largest.

    Raises:
        ValueError: Training masks of a single class.
    """
    if len(train.classes) < 2:
        raise ValueError(
            f"The training masks hold the classes {train.classes} alone: a model needs at least two. Pixels of the "
            f"number {IGNORED} are of no class; masks of an object and its background have 1 and 0."
        )
    found = list(names) if names is not None else [str(number) for number in range(train.classes[-1] + 1)]
    train.check_classes(found)
    return found
