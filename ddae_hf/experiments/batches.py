"""Batches to train on: of images, of a stream of images, of latents; each epoch's in an order of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler


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
