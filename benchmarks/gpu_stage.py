"""A stage of `gpu_campaign`: how long it may still take, where its files are, and the processes that it runs."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
GRACE = 20  # seconds that a part has to end after it was interrupted
LINES = 15  # of a log that are shown of a part that failed


@dataclass
class Campaign:
    """A stage: its options, and how long it may still take."""

    args: argparse.Namespace
    deadline: float
    left_out: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """Where everything lands."""
        return self.args.output_dir

    def left(self) -> float:
        """Return the seconds that are left for measuring."""
        return self.deadline - time.monotonic()

    def log(self, name: str) -> Path:
        """Return the file of what a part prints."""
        return self.folder / "logs" / f"{name.replace('/', '-')}.log"

    def printed(self, name: str) -> list[str]:
        """Return the lines that a part has printed in this call; none if it was not begun."""
        log = self.log(name)
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        return text.replace("\r", "\n").splitlines()

    def environment(self, compiled: bool = False) -> dict[str, str]:
        """Return the environment of a part's process."""
        given = {**os.environ, "HF_HUB_OFFLINE": "1", "DDAE_TEST_DEVICE": self.args.device}
        given |= {"PYTHONUNBUFFERED": "1", "COLUMNS": "200"}  # logs are whole lines, as they come
        if self.args.device == "cpu":
            given |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
        return given | ({"ACCELERATE_DYNAMO_BACKEND": "inductor"} if compiled and not self.args.tiny else {})

    def run(self, name: str, words: Sequence[Any], needed: float, reserve: float = 0.0, compiled: bool = False) -> bool:
        """Run `python -m WORDS`, and return whether it ended well; what it prints goes to a log.

        It is not begun with less than `needed` seconds before the deadline, and it is interrupted `reserve` seconds
        before it.
        """
        log = self.log(name)
        log.unlink(missing_ok=True)
        if not self.args.tiny and self.left() - reserve < needed:
            self.left_out.append(f"{name} ({max(0.0, self.left() - reserve):.0f} s left, {needed:.0f} s needed)")
            return False
        log.parent.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        with log.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", *map(str, words)], cwd=ROOT, env=self.environment(compiled),
                stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            in_time = waited(process, self.left() - reserve)
        seconds = time.monotonic() - started
        ended = "done" if process.returncode == 0 else f"ended with {process.returncode}"
        print(f"{name}: {ended if in_time else 'interrupted, as its time was over'}, {seconds:.0f} s", flush=True)
        if not in_time:
            self.left_out.append(f"{name} (interrupted after {seconds:.0f} s)")
        elif process.returncode:
            print("\n".join(f"    {line}" for line in self.printed(name)[-LINES:]), flush=True)
        return process.returncode == 0


def waited(process: subprocess.Popen, seconds: float) -> bool:
    """Return whether a process ended within some seconds; otherwise interrupt it, as Ctrl-C would, and then end it."""
    try:
        process.wait(max(0.0, seconds))
        return True
    except subprocess.TimeoutExpired:
        for number in (signal.SIGINT, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
                process.wait(GRACE)
                break
            except (subprocess.TimeoutExpired, ProcessLookupError):
                continue
        process.wait()
        return False
