"""Batches to train on: of images, of a stream of images, of latents; each epoch's in an order of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..image_processing_ddae import DDAEImageProcessor
from .images import ImageSet
from .pixels import Pixels
from .training_options import BatchSizes

Batch = dict[str, Tensor]
HASHED = 4096  # images by which a data set is known again


class Batches(Sampler[list[int]]):
    """Batches of every epoch, as lists of rows, from any of them on.

    Args:
        of_epoch: Returns an epoch's batches, a function of its number; each epoch has as many.
        batch_size: Rows of a batch, the last of an epoch perhaps excepted.
    """

    def __init__(self, of_epoch: Callable[[int], Sequence[Any]], batch_size: int):
        self.of_epoch, self.batch_size = of_epoch, batch_size
        self.drop_last = True  # of what does not make a batch for each process
        self.epoch = self.first = 0

    def begin(self, epoch: int, first: int) -> None:
        """Give this epoch next, from its batch `first` on."""
        self.epoch, self.first = epoch, first

    def __len__(self) -> int:
        return max(0, len(self.of_epoch(self.epoch)) - self.first)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.of_epoch(self.epoch)[self.first :]:
            yield [int(row) for row in batch]


def shuffled(count: int, batch_size: int, total: int, seed: int) -> Batches:
    """Return batches of rows in an order that is new in every epoch, the same for whatever size they are cut into.

    Args:
        count: Number of rows.
        batch_size: Rows of a batch. Where there are fewer in all, they are one batch.
        total: Rows of a step, a multiple of `batch_size`; an epoch leaves out those that do not make a step.
        seed: Seed of the orders.
    """
    used = count // total * total or count

    def of_epoch(epoch: int) -> Sequence[Tensor]:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch))
        return order[:used].split(batch_size)

    return Batches(of_epoch, batch_size)


class _ImageRows(Dataset[Batch]):
    """Whole batches of `pixel_values` (B, C, H, W), which `scaled` makes floats, and of `labels` (B,), if any."""

    def __init__(self, pixels: Pixels, labels: np.ndarray | None):
        self.pixels, self.labels = pixels, None if labels is None else torch.from_numpy(labels)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitems__(self, rows: list[int]) -> Batch:
        batch = {"pixel_values": self.pixels.read(rows)}
        return batch if self.labels is None else {**batch, "labels": self.labels[rows]}


def whole(batch: Batch) -> Batch:
    """Return a batch that needs no putting together."""
    return batch


def _put_together(processor: DDAEImageProcessor, rows: list[dict[str, Any]]) -> Batch:
    """Return a stream's rows as a batch."""
    batch = {"pixel_values": processor([row["image"] for row in rows], return_tensors="pt")["pixel_values"]}
    if "labels" in rows[0]:
        batch["labels"] = torch.tensor([row["labels"] for row in rows])
    return batch


def image_batches(
    images: ImageSet, processor: DDAEImageProcessor, sizes: BatchSizes, options: Any, labels: bool = False
) -> DataLoader[Any]:
    """Return shuffled batches of images: `pixel_values` (B, C, H, W), and `labels` (B,) if asked for.

    Args:
        images: The images; a stream is shuffled anew in every epoch.
        processor: Prepares them.
        sizes: Of the batches.
        options: Has `seed`, `dataloader_num_workers` and, for a stream, `shuffle_buffer`.
        labels: Whether to give labels.

    Raises:
        ValueError: Fewer images than a step has, or a stream that may be too short.
    """
    if not images.streaming:
        # Workers have memory of their own, in which each would keep what it happens to decode.
        pixels = images.pixels(processor, keep=options.dataloader_num_workers == 0)
        rows = _ImageRows(pixels, images.labels if labels else None)
        return row_batches(rows, len(images), sizes, options, whole)
    _check_stream(images, sizes, options.dataloader_num_workers)
    return DataLoader(
        images.stream(labels, options.shuffle_buffer, options.seed),
        batch_size=sizes.per_device,
        drop_last=True,
        collate_fn=partial(_put_together, processor),
        **_loading(options),
    )


def row_batches(rows: Any, count: int, sizes: BatchSizes, options: Any, collate: Callable[[Any], Any]) -> DataLoader:
    """Return shuffled batches of the rows of a data set: see `image_batches`."""
    if count < sizes.total > sizes.per_device:
        raise ValueError(
            f"There are {count} images, fewer than a step's total_batch_size of {sizes.total}: give a smaller one."
        )
    order = shuffled(count, sizes.per_device, sizes.total, options.seed)
    return DataLoader(rows, batch_sampler=order, collate_fn=collate, **_loading(options))


def _loading(options: Any) -> dict[str, Any]:
    workers = options.dataloader_num_workers
    return {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": torch.cuda.is_available()}


def _check_stream(images: ImageSet, sizes: BatchSizes, workers: int) -> None:
    """Raise `ValueError` if a stream may be too short for an epoch to have a batch for every process.

    What does not fill a batch is dropped, by each worker of its own part.
    """
    needed = sizes.per_device * (sizes.processes + max(workers, 1) - 1)
    files = images.dataset.cast_column(images.image_column, Image(decode=False))
    found = sum(1 for _ in files.take(needed))
    if found < needed:
        raise ValueError(
            f"The stream has {found} images: batches of {sizes.per_device}, {sizes.processes} processes and {workers} "
            f"workers (dataloader_num_workers) need {needed}. Lower one of them."
        )


def images_hash(images: ImageSet) -> str | None:
    """Return a hash by which images are known again, of some thousands of them; nothing of a stream."""
    if images.streaming:
        return None
    return images.select(np.linspace(0, len(images) - 1, min(len(images), HASHED)).astype(int)).hash


def num_steps(options: Any, count: int | None, sizes: BatchSizes) -> int:
    """Return the number of steps that training takes.

    Raises:
        ValueError: A stream without `max_train_steps`.
    """
    if options.max_train_steps is not None:
        return options.max_train_steps
    if count is None:
        raise ValueError("A stream needs max_train_steps: how many images an epoch has is not known.")
    return options.num_train_epochs * max(1, count // sizes.total)
