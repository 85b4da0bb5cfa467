"""Work that the processes of `accelerate launch` share: the first one asks for parts of it, and all compute.

The first process runs an experiment as it would alone. What takes long is a task, which every process knows by name:
the first one calls `Team.each`, the others are in `Team.serve` and compute their share, and the results reach the first
one in order. So whatever is decided, written or printed is so once, and figures do not depend on the number of
processes. Messages go through accelerate's process group.

    team = Team({"features": features_of})
    if team.helps:
        team.serve()
    else:
        with team:
            for batch in team.each("features", parts, layer=layer):
                ...
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor

Task = Callable[..., Any]
USE_FSDP = "ACCELERATE_USE_FSDP"  # the variable by which `accelerate launch` asks for FSDP
_MEET_SECONDS = 300.0  # that a process waits at its start for the others of its launch, which may be starting still
_FOR_DAYS = timedelta(days=7)  # that it then waits for what another one does
_GO_ON = "go on"  # what the first process says before each round of a task
_NO_MORE = "no more"
_DONE, _FAILED = "done", "failed"  # how it lets the others go
# What gloo, which raises plain errors, says where another process is gone or does not answer.
_GONE = r"gloo|Connection (closed|reset|refused)|Broken pipe"


def told_to_shard() -> bool:
    """Return whether `accelerate launch` was told to use FSDP: on processors its environment alone says so."""
    return parse_flag_from_env(USE_FSDP)


def refuse_fsdp() -> None:
    """Raise `ValueError` where accelerate was told to use FSDP, for whatever does not shard by itself.

    Where it was, transformers leaves networks without weights in all processes but the first, for FSDP to fill them.
    """
    if told_to_shard():
        raise ValueError(
            "accelerate was told to use FSDP (distributed_type: FSDP), which only `ddae pretrain` takes, as its "
            "--shard; elsewhere every process has whole networks. Launch with distributed_type MULTI_GPU (--multi_gpu)."
        )


def this_process() -> PartialState:
    """Return accelerate's state of this process among all, as an `Accelerator` sets it up.

    Without GPUs accelerate would let launched processes run apart, unless told to use the processor. Processes meet
    within five minutes, and may then wait for each other for days: one fits probes while the others have nothing to do.

    Raises:
        torch.distributed.DistError: Another process of the launch did not come.
        ValueError: More processes on this machine than it has GPUs: two of them would share one. Or accelerate was told
            to use FSDP, and nobody has taken that over: see `sharding.fsdp_taken_over`.
    """
    refuse_fsdp()
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    processor = not (alone or torch.accelerator.is_available()) or parse_flag_from_env("ACCELERATE_USE_CPU")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not processor and torch.cuda.is_available() and here > (gpus := torch.cuda.device_count()):
        raise ValueError(f"{here} processes were launched on a machine with {gpus} GPU(s): launch one for each GPU.")
    met = {} if alone or dist.is_initialized() else _meet()
    return PartialState(cpu=processor, timeout=_FOR_DAYS, **met)


def _meet() -> dict[str, Any]:
    """Wait for the other processes of the launch; return what torch's process group is then told of them."""
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timedelta(seconds=_MEET_SECONDS)))
    store.set_timeout(_FOR_DAYS)
    return {"store": store, "rank": rank, "world_size": world_size}


def is_first_process() -> bool:
    """Return whether this is the first of the launched processes, or the only one."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Let SIGINT and SIGTERM come afterwards: inside, processes would get out of step with each other."""
    ours = threading.current_thread() is threading.main_thread()
    came: list[int] = []
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)} if ours else {}
    for number in before:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def is_of_another(error: BaseException) -> bool:
    """Return whether an error was raised because another process of the launch is gone, or does not answer."""
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and bool(re.search(_GONE, str(error))))


class FirstFailed(RuntimeError):
    """Raised where a process helps the first one, and that one ended with an error, which it says itself."""


@dataclass
class _Failure:
    """What went wrong in another process."""

    process: int
    error: Exception


class Team:
    """The processes of a launch, of which there may be one, and the tasks that they share.

    Args:
        tasks: By name, functions of (parts, **details) that give a result for each part in order: tensors by name, or
            what can be pickled.
    """

    def __init__(self, tasks: Mapping[str, Task]):
        self.tasks = tasks
        state = this_process()
        self.count: int = state.num_processes
        self.number: int = state.process_index
        self.over = False  # whether the others were let go

    @property
    def helps(self) -> bool:
        """Whether this process is not the first one, and is to `serve`."""
        return self.number > 0

    def __enter__(self) -> Team:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let the others go; where this process failed because another one is gone, there is nobody to tell."""
        self.over = True
        with contextlib.suppress(RuntimeError) if kind is not None else contextlib.nullcontext():
            self._tell(_DONE if kind is None else _FAILED)

    def each(self, task: str, parts: Sequence[Any], **details: Any) -> Iterator[Any]:
        """Yield a task's result for each part, in order; process k of n computes parts k, k + n, ...

        An error in another process is raised here. Whoever takes no more results ends the task for all.
        """
        if self.count == 1:
            yield from self.tasks[task](parts, **details)
            return
        self._tell((task, list(parts), details))
        own = self._results(task, parts, details)
        left = self._rounds(parts)
        try:
            while left:
                mine = next(own, None)  # first: where a signal comes meanwhile, the others can still be told
                with held_back():
                    self._tell(_GO_ON)
                    results = self._gather(mine)
                left -= 1
                for result in results:
                    if isinstance(result, _Failure):
                        raise result.error
                    if result is not None:
                        yield result
        finally:
            if left and not self.over:
                self._tell(_NO_MORE)

    def serve(self) -> None:
        """Compute shares of tasks until the first process needs no more; `FirstFailed` if it ends with an error."""
        while not self._is_over(job := self._tell()):
            task, parts, details = job
            own = self._results(task, parts, details)
            for _ in range(self._rounds(parts)):
                mine = next(own, None)
                word = self._tell()
                if self._is_over(word):
                    return
                if word == _NO_MORE:
                    break
                self._gather(mine)

    def _is_over(self, word: Any) -> bool:
        if word == _FAILED:
            raise FirstFailed("The first process failed.")
        return word == _DONE

    def agree(self, value: Any = None) -> Any:
        """Return the first process's value in all processes, which all ask for it."""
        return self._tell(value)

    def _rounds(self, parts: Sequence[Any]) -> int:
        return -(-len(parts) // self.count)

    def _results(self, task: str, parts: Sequence[Any], details: Mapping[str, Any]) -> Iterator[Any]:
        """Yield this process's results, in memory, and an error as the last of them."""
        try:
            for result in self.tasks[task](parts[self.number :: self.count], **details):
                yield _in_memory(result)
        except Exception as error:  # whatever it is, the first process is to say it
            yield _Failure(self.number, error)

    def _tell(self, message: Any = None) -> Any:
        """Return the first process's message, in all processes."""
        if self.count == 1:
            return message
        messages = [message]
        dist.broadcast_object_list(messages, src=0)
        return messages[0]

    def _gather(self, result: Any) -> list[Any]:
        """Return all processes' results in the first process, and nothing elsewhere."""
        results: list[Any] | None = None if self.helps else [None] * self.count
        dist.gather_object(result, results, dst=0)
        return results or []


def _in_memory(result: Any) -> Any:
    """Return tensors by name as they are to be sent: from the processor's memory."""
    if not isinstance(result, dict):
        return result
    return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in result.items()}
