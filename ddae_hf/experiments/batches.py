"""Batches to train on, of images, a stream or latents, each epoch's in an order of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Image
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from ..image_processing_ddae import DDAEImageProcessor
from .devices import fast_layout
from .image_set import ImageSet, Pixels, counted, scaled
from .loading import to_device
from .sharing import is_first_process

logger = logging.getLogger(__name__)
Batch = dict[str, Tensor]
HASHED = 4096  # images by whose hash a data set is recognised


class Batches(Sampler[list[int]]):
    """The batches of every epoch, as lists of rows, beginning with any batch.

    `of_epoch` returns the batches of an epoch by its number. Every epoch has equally many, of `batch_size` rows each;
    only the last batch may have fewer.
    """

    def __init__(self, of_epoch: Callable[[int], Sequence[Any]], batch_size: int):
        self.of_epoch, self.batch_size = of_epoch, batch_size
        self.drop_last = True  # batches at the end that are too few for all processes
        self.begin(0, 0)

    def begin(self, epoch: int, first: int) -> None:
        """Give the batches of this epoch next, from number `first` on."""
        self.epoch, self.first = epoch, first

    def __len__(self) -> int:
        return max(0, len(self.of_epoch(self.epoch)) - self.first)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.of_epoch(self.epoch)[self.first :]:
            yield [int(row) for row in batch]


class BatchSizes(NamedTuple):
    """How a step's images are shared out."""

    total: int  # images of a step
    per_device: int  # images of a forward pass on each device
    accumulation: int  # forward passes of a step
    processes: int  # number of devices


def whole(batch: Batch) -> Batch:
    """Return a batch as it is: its rows were read together."""
    return batch


def _read(pixels: Pixels, labels: Tensor | None, device: torch.device | str, rows: list[int]) -> Batch:
    batch = {"pixel_values": pixels.read(rows, device)}
    return batch if labels is None else {**batch, "labels": to_device(labels[rows], device)}


def _put_together(processor: DDAEImageProcessor, rows: list[dict[str, Any]]) -> Batch:
    """Return a stream's rows as a batch."""
    batch = {"pixel_values": counted([row["image"] for row in rows], processor)}
    if "labels" in rows[0]:
        batch["labels"] = torch.tensor([row["labels"] for row in rows])
    return batch


def image_batches(
    images: ImageSet, processor: DDAEImageProcessor, options: Any, labels: bool = False,
    device: torch.device | str = "cpu",
) -> DataLoader[Any]:  # fmt: skip
    """Return shuffled batches of images: `pixel_values` (B, C, H, W), and `labels` (B,) if asked for.

    Pixels are integers where they can be; `clean_images` makes them floats. They come on the device, unless images are
    read by workers or from a stream, and are kept there where all of them fit.

    Raises:
        ValueError: Fewer images than a step has, or a stream that may be too short.
    """
    sizes, workers = options.sizes, options.dataloader_num_workers
    if not images.streaming:
        # Workers have their own memory, and each would keep there what it happens to decode.
        pixels = Pixels(images, processor, keep=workers == 0)
        known = torch.from_numpy(images.labels) if labels else None
        place = device if workers == 0 else "cpu"  # a GPU cannot be used in workers
        return row_batches(range(len(images)), options, partial(_read, pixels, known, place), pin=workers > 0)
    # Each worker drops the images of its own part that do not fill a batch.
    needed = sizes.per_device * (sizes.processes + max(workers, 1) - 1)
    found = sum(1 for _ in images.dataset.cast_column(images.image_column, Image(decode=False)).take(needed))
    if found < needed:
        raise ValueError(
            f"The stream has {found} images: batches of {sizes.per_device}, {sizes.processes} processes and {workers} "
            f"workers (dataloader_num_workers) need {needed}. Lower one of them."
        )
    # The first process reads a stream, and accelerate hands on what the others get.
    workers = workers if is_first_process() else 0
    rows = images.stream(labels, options.shuffle_buffer, options.seed)
    together = partial(_put_together, processor)
    return DataLoader(rows, sizes.per_device, drop_last=True, collate_fn=together, **_loading(workers))


def row_batches(rows: Any, options: Any, collate: Callable[[Any], Batch], pin: bool = True) -> DataLoader[Any]:
    """Return shuffled batches of the rows of a data set: see `image_batches`.

    With `pin`, they come in memory from which a GPU fetches them by itself, if there is one. The order is new in every
    epoch, and does not depend on the size of the batches. Rows that do not fill a step are left out; but if there are
    fewer rows than a batch holds, all of them make one batch.
    """
    sizes, count = options.sizes, len(rows)
    if count < sizes.total > sizes.per_device:
        raise ValueError(
            f"There are {count} images, fewer than a step's total_batch_size of {sizes.total}: give a smaller one."
        )
    if count < sizes.total:
        logger.warning(f"There are only {count} images for a total_batch_size of {sizes.total}: every step has all.")
    used = count // sizes.total * sizes.total or count

    def of_epoch(epoch: int) -> Sequence[Tensor]:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(options.seed + epoch))
        return order[:used].split(sizes.per_device)

    order = Batches(of_epoch, sizes.per_device)
    return DataLoader(rows, batch_sampler=order, collate_fn=collate, **_loading(options.dataloader_num_workers, pin))


def _loading(workers: int, pin: bool = True) -> dict[str, Any]:
    return {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": pin and torch.cuda.is_available()}


def clean_images(pixels: Tensor, config: Any) -> Tensor:
    """Return a batch's images as floats, as a network of this configuration takes them, in the fastest layout."""
    pixels = pixels.to(memory_format=fast_layout(pixels.device))
    return scaled(pixels, DDAEImageProcessor.for_denoiser(config))


def images_hash(images: ImageSet) -> str | None:
    """Return a hash of some thousands of the images, by which all are recognised; None for a stream."""
    if images.streaming:
        return None
    return images.select(np.linspace(0, len(images) - 1, min(len(images), HASHED)).astype(int)).hash
