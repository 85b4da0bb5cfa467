"""How a command runs: what it shows, on how many threads, and how it ends."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import torch
from accelerate import PartialState
from diffusers.utils import logging as diffusers_logging
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers.utils import logging as transformers_logging

from ..experiments.sharing import FirstFailed, is_first_process, is_of_another, refuse_fsdp
from ..experiments.stopping import Interrupted
from .parsing import parse

logger = logging.getLogger(__name__)
CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")  # a container's: microseconds or `max`, then the period that they are out of
ALIKE_SECONDS = 10  # in which the first of several processes may say what went wrong in all
INTERRUPTED = "Interrupted: the same command goes on from what was kept, or starts again if nothing was."
LOST = (
    "Process {} stops, because another process of this launch is gone or does not answer; the output of that one says "
    "why, if it could. The same command goes on from what was kept, with resume_from_checkpoint latest where there is "
    "that option. What torch says: {}"
)


def run_command(command: ModuleType, words: Sequence[str]) -> None:
    """Run a module of this package with the options of its `KINDS`, as the words give them."""
    name = command.__name__.rpartition(".")[2].replace("_", "-")
    options = parse(command.KINDS, command.__doc__, words, f"ddae {name}")
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))
    show_log(is_first_process())
    with sentences(), logging_redirect_tqdm():  # each line of the log by itself, above the progress bars
        if name != "pretrain":  # which takes FSDP for its own --shard
            refuse_fsdp()
        command.main(*options)
        if torch.distributed.is_initialized():  # none ends as if all were well before the first has written everything
            PartialState().wait_for_everyone()
    if torch.distributed.is_initialized():
        PartialState().destroy_process_group()


def usable_cores() -> int:
    """Return on how many cores this process may compute: a container's limit can be lower than the number of cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = CPU_LIMIT.read_text().partition(" ") if CPU_LIMIT.is_file() else ("max", "", "")
    return cores if quota == "max" else max(1, min(cores, round(int(quota) / int(period))))


def show_log(main_process: bool = True) -> None:
    """Show what experiments say about their progress; of several processes, only the main one does."""
    level = logging.INFO if main_process else logging.ERROR
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=level)
    for name in ("accelerate", "httpx", "httpx2", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.formatwarning = lambda message, *where: f"{message}\n"  # a sentence, without the line of code
    transformers_logging.set_verbosity_error()  # experiments check themselves what a checkpoint lacks
    transformers_logging.disable_progress_bar()  # for opening files, like the next one
    diffusers_logging.disable_progress_bar()


@contextlib.contextmanager
def sentences() -> Iterator[None]:
    """End the program with a sentence, and no traceback, at what its user can mend: wrong options, files, disks.

    A program that a signal stops ends with that signal's status, once what it leaves behind is in order.
    """
    try:
        with _terminable():
            yield
    except (ValueError, OSError) as error:
        logger.debug("Where this was raised:", exc_info=True)
        if not is_first_process():  # which mostly fails alike and says so; then the launcher ends this one
            time.sleep(ALIKE_SECONDS)
        raise SystemExit(str(error)) from error
    except FirstFailed as error:  # which says why itself
        raise SystemExit(1) from error
    except RuntimeError as error:
        if not is_of_another(error):
            raise
        logger.debug("Where this was raised:", exc_info=True)
        raise SystemExit(LOST.format(os.environ.get("RANK", "0"), str(error).partition("\n")[0])) from error
    except KeyboardInterrupt as error:
        print(str(error) or INTERRUPTED, file=sys.stderr)
        raise SystemExit(128 + getattr(error, "signal", signal.SIGINT)) from error  # `Interrupted` knows its own


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Raise `Interrupted` at SIGTERM unless it has another handler, like Python at Ctrl-C; only the first counts."""

    def stop(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)
        raise Interrupted("", number)

    ours = threading.current_thread() is threading.main_thread()
    ours = ours and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
