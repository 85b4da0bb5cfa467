"""How what is read reaches the device that computes: copies that nobody waits for, and a thread that reads ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

Part = TypeVar("Part")
AHEAD = 2  # parts that are read before they are wanted


def is_apart(device: torch.device | str) -> bool:
    """Return whether a device works beside the processor, which can read meanwhile."""
    return torch.device(device).type != "cpu"


def pinned(values: Tensor) -> Tensor:
    """Return a tensor in memory from which a GPU fetches it by itself; without CUDA it stays where it is."""
    return values.pin_memory() if torch.cuda.is_available() and values.device.type == "cpu" else values


def to_device(values: Tensor, device: torch.device | str) -> Tensor:
    """Return a tensor on a device; neither the processor nor a GPU waits for the copy."""
    if not is_apart(device):
        return values.to(device)
    values = pinned(values)
    return values.to(device, non_blocking=values.is_pinned())


def read_ahead(read: Callable[[Part], Tensor], parts: Sequence[Part], device: torch.device | str) -> Iterator[Tensor]:
    """Yield on a device what `read` returns of each part, in order.

    Where the device works beside the processor, a thread reads the next parts meanwhile, into pinned memory; on the
    processor itself, and where there is one part alone, each is read when it is wanted. The thread ends with the
    generator: after the last part, when the consumer stops, and at an error of either. An error of `read` comes where
    its part would have come.
    """
    if not is_apart(device) or len(parts) < 2:
        for part in parts:
            yield to_device(read(part), device)
        return

    def read_pinned(part: Part) -> Tensor:
        return pinned(read(part))

    reader = ThreadPoolExecutor(1, "read_ahead")
    coming: deque[Future[Tensor]] = deque()
    try:
        for part in parts:
            coming.append(reader.submit(read_pinned, part))
            if len(coming) > AHEAD:
                yield to_device(coming.popleft().result(), device)
        while coming:
            yield to_device(coming.popleft().result(), device)
    finally:
        reader.shutdown(cancel_futures=True)
