"""How long work stops before its end: on a signal, keeping what was done, or at numbers that are not finite."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any, Self

import torch

SAME = 1.0  # seconds in which a launcher repeats a signal that its processes have got from the terminal already


class Interrupted(KeyboardInterrupt):
    """Work that stopped on a signal, whose number is `signal`; the text says what is kept and how to go on."""

    def __init__(self, text: str, number: int = signal.SIGINT):
        super().__init__(text)
        self.signal = number


class Stopping:
    """Notes SIGINT (Ctrl-C) and SIGTERM while it is entered, for work that stops where it can be taken up again.

    A second signal acts as it did before. Threads other than the main one get no signals, and note none.
    """

    def __init__(self) -> None:
        self.requested: int | None = None  # number of the signal that came
        self._came = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):  # ignored signals stay ignored; None is not Python's
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def agreed(self, accelerator: Any) -> int | None:
        """Return the number of the signal that came to any process, the same in all; every process must call this."""
        if accelerator.num_processes == 1:
            return self.requested
        mine = torch.tensor([self.requested or 0], device=accelerator.device)
        return int(accelerator.gather(mine).max()) or None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested is None:
            self.requested = number
            self._came = time.monotonic()
        elif time.monotonic() - self._came > SAME:
            self.__exit__()
            signal.raise_signal(number)


def interrupted(number: int, step: int, total: int, checkpoint: Path | None) -> Interrupted:
    """Return the exception that ends a training after a signal, once a checkpoint is written."""
    return Interrupted(
        f"Stopped by {signal.Signals(number).name} after step {step} of {total}: {checkpoint} is saved. To go "
        "on from it, give the same options, and resume_from_checkpoint latest where there is that option.",
        number,
    )


class NotFinite(ValueError):
    """A loss or weights that are not finite."""


def largest(weights: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the largest magnitude of weights, which is finite if all are."""
    return torch.nn.utils.get_total_norm([w for w in weights if w.is_floating_point()], math.inf).float()


class Look:
    """A look at the last losses and at weights, which a GPU need not wait for: it copies what is seen, and goes on."""

    def __init__(self, accelerator: Any, losses: Iterable[torch.Tensor], weights: Iterable[torch.Tensor]):
        """Begin to look; every process must call this."""
        seen = accelerator.reduce(torch.stack([*(loss.float() for loss in losses), largest(weights)]), "mean")
        self._seen = seen.to("cpu", non_blocking=seen.is_cuda)  # from a GPU into pinned memory, which torch allocates
        self._arrived = torch.cuda.Event() if seen.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> tuple[list[float], bool]:
        """Return means over all processes of the losses, and whether all is finite; this waits for what is seen."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._seen[:-1].tolist(), bool(self._seen.isfinite().all())


def look(accelerator: Any, losses: Iterable[torch.Tensor], weights: Iterable[torch.Tensor]) -> tuple[list[float], bool]:
    """Look, and wait for what is seen: see `Look`."""
    return Look(accelerator, losses, weights).read()


def check_weights(checkpoint: Path, weights: Iterable[torch.Tensor]) -> None:
    """Raise `NotFinite` if a checkpoint to resume, as version 0.1.0 could write it, is not finite."""
    if not largest(weights).isfinite():
        raise NotFinite(f"{checkpoint} holds weights that are not finite: resume an earlier one.")


def not_finite(
    step: int, loss: float | None, rate: float, checkpoint: Path | None, option: str = "learning_rate"
) -> NotFinite:
    """Return the error that stops a run: `loss` is the mean of its last losses, and `option` gives the rate."""
    what = f"The loss is {loss}"
    if loss is not None and math.isfinite(loss):
        what = f"Some weights are not finite, after a loss of {loss:.4g},"
    last = "There is no checkpoint yet: start again"
    if checkpoint is not None:
        last = f"{checkpoint} is the last good checkpoint: resume from it"
    return NotFinite(
        f"{what} at step {step}, at a learning rate of {rate:.3g}; none of it is saved. {last} with a lower {option}, "
        "or in higher precision."
    )
