"""Arrays that are gone through several times on a device, in pieces: kept there where they fit into its memory.

Where they do not fit, each pass reads them again, so that those mapped from disk are never in memory as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

_SHARE = 0.25  # of the device's free memory, which arrays may take

# A container's memory, of which the system sees more: how much it may use, or `max`, and how much it does.
CONTAINER = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current"))

Piece = tuple[slice, Tensor]  # which of the rows, and what they hold


class Joined:
    """Arrays (N, C1), (N, C2), ... side by side, as an array (N, C1 + C2 + ...) of which only rows are ever made.

    So arrays that are mapped from disk stay there: `joined[rows]` reads these rows alone.

    Raises:
        ValueError: Arrays of different numbers of rows, or none.
    """

    def __init__(self, arrays: Sequence[np.ndarray]):
        counts = sorted({len(array) for array in arrays})
        if len(counts) != 1:
            raise ValueError(f"Arrays of {counts} rows came: give one or more, all of as many rows.")
        self.arrays = arrays
        self.shape = (counts[0], sum(array.shape[1] for array in arrays))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        return np.concatenate([array[rows] for array in self.arrays], axis=1)


Array = np.ndarray | Joined


class Pieces:
    """Rows of arrays on a device, P arrays side by side: pieces (P, n, C), float32, n at most `size`.

    Iterating over it is a pass: it gives each piece with the slice of `rows` that it holds, all rows of the first group
    of arrays, then all of the next group. `change` changes what passes give.

    Args:
        groups: Groups of P arrays (N, C) each, in memory or mapped from disk, perhaps `Joined`.
        rows: Which rows are read, in this order.
        size: Rows of a piece.
        device: Where the pieces are.
        keep: Whether the first pass keeps them there, if all take at most a share of its free memory. Otherwise each
            pass reads them again.
    """

    def __init__(
        self, groups: Sequence[Sequence[Array]], rows: np.ndarray, size: int, device: torch.device, *,
        keep: bool = True,
    ):  # fmt: skip
        self.groups, self.rows, self.size, self.device = groups, rows, size, device
        self.changes: list[Callable[[Tensor], object]] = []
        self.kept: list[Piece] | None = None
        needed = 4 * len(groups) * len(groups[0]) * len(rows) * groups[0][0].shape[1]
        self.keep = keep and needed <= _SHARE * free_memory(device)

    def __iter__(self) -> Iterator[Piece]:
        if self.kept is not None:
            yield from self.kept
            return
        kept = []
        for part, piece in self._sent():
            for change in self.changes:
                change(piece)
            if self.keep:
                kept.append((part, piece))
            yield part, piece
        if self.keep:
            self.kept = kept

    def change(self, change: Callable[[Tensor], object]) -> None:
        """Change every piece by a function that works in place: once where they are kept, otherwise at every pass."""
        self.changes.append(change)
        for _, piece in self.kept or ():
            change(piece)

    def _sent(self) -> Iterable[Piece]:
        if self.device.type == "cuda":
            return _sent_ahead(self._read(), self.device)
        return ((part, piece.to(self.device)) for part, piece in self._read())

    def _read(self) -> Iterator[Piece]:
        """Yield new pieces in memory, from where a GPU can fetch them."""
        for arrays in self.groups:
            for start in range(0, len(self.rows), self.size):
                part = slice(start, min(start + self.size, len(self.rows)))
                shape = (len(arrays), part.stop - start, arrays[0].shape[1])
                piece = torch.empty(shape, dtype=torch.float32, pin_memory=self.device.type == "cuda")
                for target, array in zip(piece.numpy(), arrays, strict=True):
                    target[...] = array[self.rows[part]]
                yield part, piece


def _sent_ahead(pieces: Iterable[Piece], device: torch.device) -> Iterator[Piece]:
    """Yield pieces of pinned memory on a GPU: the next one is read and copied while the present one is computed with.

    Three of them are there at most, however far the host is ahead of the GPU: it waits until the one before the present
    one is no longer computed with.
    """
    copying, computing = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    present: tuple[slice, Tensor, torch.cuda.Event] | None = None
    used: torch.cuda.Event | None = None
    for part, piece in pieces:
        with torch.cuda.stream(copying):
            following = (part, piece.to(device, non_blocking=True), copying.record_event())
        if present is not None:
            yield _arrived(*present, computing)
            if used is not None:
                used.synchronize()
            used = computing.record_event()
        present = following
    if present is not None:
        yield _arrived(*present, computing)


def _arrived(part: slice, piece: Tensor, copied: torch.cuda.Event, computing: torch.cuda.Stream) -> Piece:
    """Let what is computed from now on wait for a copy, and keep the copy's memory until that is done with."""
    computing.wait_event(copied)
    piece.record_stream(computing)
    return part, piece


def free_memory(device: torch.device) -> int:
    """Return how many bytes may still be used, of a GPU's memory or of the processor's, which others share."""
    if device.type != "cuda":
        available = psutil.virtual_memory().available
        limit, used = (file.read_text().strip() if file.is_file() else "max" for file in CONTAINER)
        return available if "max" in (limit, used) else min(available, max(0, int(limit) - int(used)))
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
