"""When a command is killed: at the n-th thing that it does to its files, or after so many seconds."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

# Events of Python's audit hooks before which a process can be killed, and which of their arguments are paths.
CHANGES = {
    "os.mkdir": 1,
    "os.remove": 1,
    "os.rename": 2,  # `os.replace` and pathlib's names for it, too
    "os.rmdir": 1,
    "os.truncate": 1,
    "shutil.rmtree": 1,
}
KILLED = "killed.txt"  # the end of the name of the note that a killed process leaves
TORN = 0.5  # share of the files that are being written which are left behind torn


@dataclass(frozen=True)
class Moment:
    """When to kill a process: `share` is how much of what the uninterrupted one did is done by then, from 0 to 1.

    `kind` says what is counted, changes of files or seconds; `tears` leaves the file that is being written torn.
    """

    kind: str
    share: float
    tears: bool = False

    def number(self, counted: Counted) -> float:
        """Return the number of the change, or the seconds."""
        if self.kind == "seconds":
            return self.share * counted.seconds
        return 1 + int(self.share * counted.changes)

    def __str__(self) -> str:
        return f"{self.share:.3f} of the {self.kind}{', torn' if self.tears else ''}"


@dataclass(frozen=True)
class Counted:
    """What an uninterrupted process did: changes of files in its folder, and the seconds that it took."""

    changes: int
    seconds: float


def draw(random: Random, part: int, parts: int) -> Moment:
    """Return a moment in one of so many equal parts of a run: two of three are changes of files."""
    share = (part + random.random()) / parts
    kind = random.choice(["changes", "changes", "seconds"])
    tears = random.random() < TORN
    return Moment(kind, share, tears and kind == "changes")


class Watch:
    """Counts the changes of files in a folder, and kills its process at a moment; in children of it, it does nothing.

    A change is counted before it happens. Libraries that are not written in Python write safetensors and torch's
    archives: these are counted twice, before they are written and once the file is there, where it can be torn.
    """

    def __init__(self, folder: Path, moment: Moment | None = None, counted: Counted | None = None):
        self.folder = str(folder)
        self.process = os.getpid()
        self.count = 0
        self.started = time.monotonic()
        self.tears = moment is not None and moment.tears
        self.last = 0.0
        if moment is not None and counted is not None:
            if moment.kind == "seconds":
                threading.Thread(target=self._later, args=(moment.number(counted),), daemon=True).start()
            else:
                self.last = moment.number(counted)

    def install(self) -> None:
        """Begin to watch this process, for the rest of its life."""
        import safetensors.torch
        import torch

        sys.addaudithook(self._seen)
        safetensors.torch.serialize_file = self._torn(safetensors.torch.serialize_file)
        torch.save = self._torn(torch.save)
        os.fsync = self._counted_before(os.fsync)

    def counted(self) -> Counted:
        """Return what the process did so far."""
        return Counted(self.count, time.monotonic() - self.started)

    def _later(self, seconds: float) -> None:
        time.sleep(seconds)
        self._die()

    def _die(self) -> None:
        """Kill the process, and leave a note of the time outside of the folder."""
        with open(f"{self.folder}-{KILLED}", "w") as file:
            file.write(str(time.time()))
        os.kill(self.process, signal.SIGKILL)

    def _change(self) -> bool:
        """Count a change, and kill the process before it; return whether the change is to be torn instead."""
        if os.getpid() != self.process:
            return False
        self.count += 1
        if self.count != self.last:
            return False
        if not self.tears:
            self._die()
        return self.tears

    def _inside(self, path: Any) -> bool:
        if not isinstance(path, (str, os.PathLike)):
            return False
        return f"{os.path.abspath(path)}/".startswith(f"{self.folder}/")

    def _seen(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            if flags & (os.O_WRONLY | os.O_RDWR) and self._inside(path) and self._change():
                os.close(os.open(path, flags, 0o644))  # an empty file, or a new one without content
                self._die()
        elif event in CHANGES:
            relative = event in ("os.remove", "os.rmdir") and args[1] != -1  # as `shutil.rmtree` names its files
            if (relative or any(self._inside(path) for path in args[: CHANGES[event]])) and self._change():
                self._die()

    def _counted_before(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function before which the process may be killed; it leaves nothing torn."""

        def calls(*args: Any) -> Any:
            if self._change():
                self._die()
            return call(*args)

        return calls

    def _torn(self, write: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that writes a file whose last half may never get there; its path is the second argument."""

        def writes(content: Any, path: Any, *args: Any, **options: Any) -> Any:
            counts = self._inside(path)
            torn = counts and self._change()
            done = write(content, path, *args, **options)
            if torn or (counts and self._change()):
                os.truncate(path, os.path.getsize(path) // 2)
                self._die()
            return done

        return writes
