"""Commands in processes that share this one's imports, or that `accelerate launch` starts: how they end, what they say.

Importing takes longer than a tiny training, so that most processes are forks of one that has imported everything.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .moments import KILLED, Counted, Moment, Watch

ROOT = Path(__file__).parent.parent.parent
TWO = ROOT / "examples" / "accelerate_configs" / "two_cpu_processes.yaml"
LONGEST = 300  # seconds after which a command hangs
SURVIVES = 60  # seconds that the other of two processes may live
PLAN = "DDAE_FAULT"


@dataclass(frozen=True)
class Fault:
    """What happens to a process: it is killed at a moment, or may write no file beyond a number of bytes."""

    moment: Moment | None = None
    counted: Counted | None = None
    process: int = 0  # of two
    bytes: int | None = None


@dataclass(frozen=True)
class Ended:
    """How processes ended, and what they said."""

    statuses: list[int]
    text: str
    seconds: float
    survived: float = 0.0  # seconds that the other of two processes lived after the first one was gone
    counted: list[Counted] | None = None  # what the processes did, where they came to the end

    @property
    def well(self) -> bool:
        """Whether every process ended without an error."""
        return not any(self.statuses)

    @property
    def killed(self) -> bool:
        """Whether a process was killed."""
        return -signal.SIGKILL in self.statuses

    @property
    def sentence(self) -> str | None:
        """The last line that was said, unless it is that of a traceback."""
        lines = [line for line in self.text.splitlines() if line.strip()]
        return lines[-1] if lines and "Traceback" not in self.text else None


def run(words: Sequence[str], folder: Path, fault: Fault | None = None, processes: int = 1) -> Ended:
    """Run a command in a folder, on one process or two, to its end."""
    return watched(lambda: command(words), folder, fault, processes)


def command(words: Sequence[str]) -> None:
    """Run a command in this process."""
    from ddae_hf.commands.main import main

    main(list(words))


def watched(call: Callable[[], None], folder: Path, fault: Fault | None = None, processes: int = 1) -> Ended:
    """Run a function in a folder, in processes of their own, to their end."""
    fault = fault or Fault()
    log = folder / "log.txt"
    for old in (log, folder / f"out-{KILLED}", *folder.glob("counted-*.json")):
        old.unlink(missing_ok=True)
    port = _free_port()
    context = multiprocessing.get_context("fork")
    children = []
    started = time.monotonic()
    for number in range(processes):
        environment = {} if processes == 1 else _launched(number, processes, port)
        args = (call, folder, fault, number, environment)
        children.append(context.Process(target=_child, args=args))
        children[-1].start()
    _wait(children)
    survived = _since_killed(folder)
    seconds = time.monotonic() - started
    sessions = [child.pid for child in children]
    _no_orphans(lambda: [pid for pid, session in _sessions() if session in sessions])
    statuses = [child.exitcode or 0 for child in children]
    return Ended(statuses, log.read_text(errors="replace"), seconds, survived, _counted(folder))


def launch(words: Sequence[str], folder: Path, fault: Fault) -> Ended:
    """Run a command in a folder on two processes that `accelerate launch` starts, to its end."""
    plan = asdict(fault) | {"folder": str(folder), "words": list(words)}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), PLAN: json.dumps(plan)}
    start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(TWO)]
    start += ["--main_process_port", str(_free_port()), "-m", "tests.faults.processes"]
    log = folder / "log.txt"
    (folder / f"out-{KILLED}").unlink(missing_ok=True)
    started = time.monotonic()
    with log.open("w") as file:
        it = subprocess.Popen(start, env=environment, cwd=folder, stdout=file, stderr=file)
        try:
            it.wait(LONGEST)
        except subprocess.TimeoutExpired:
            it.kill()
            it.wait()
    survived = _since_killed(folder)
    _no_orphans(lambda: _started_by(json.dumps(plan)))
    status = -signal.SIGKILL if (folder / f"out-{KILLED}").is_file() else it.returncode
    return Ended([status], log.read_text(errors="replace"), time.monotonic() - started, survived)


def _launched(number: int, count: int, port: int) -> dict[str, str]:
    """Return what a launcher tells a process in its environment."""
    known = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    return {name: str(value) for name, value in known.items()} | {"MASTER_ADDR": "127.0.0.1"}


def _free_port() -> int:
    with contextlib.closing(socket.socket()) as there:
        there.bind(("127.0.0.1", 0))
        return there.getsockname()[1]


def _child(call: Callable[[], None], folder: Path, fault: Fault, number: int, environment: dict[str, str]) -> None:
    os.setsid()
    os.environ.update(environment)
    with (folder / "log.txt").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    _watched_call(call, folder, fault, number)


def _watched_call(call: Callable[[], None], folder: Path, fault: Fault, number: int) -> None:
    import datasets

    from ddae_hf.experiments import arrays, sharing

    os.chdir(folder)
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # which it rests at a stream's end
    arrays._NOTE_SECONDS = 0.0  # tiny arrays are full before the first note is due
    sharing._MEET_SECONDS = 20.0  # one that is killed before they have met is missed by the other within a minute
    if fault.bytes is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.bytes, resource.RLIM_INFINITY))
    watch = Watch(folder / "out", fault.moment if number == fault.process else None, fault.counted)
    watch.install()
    call()
    if fault.bytes is None:
        Path(folder, f"counted-{number}.json").write_text(json.dumps(asdict(watch.counted())))


def _counted(folder: Path) -> list[Counted]:
    return [Counted(**json.loads(path.read_text())) for path in sorted(folder.glob("counted-*.json"))]


def _since_killed(folder: Path) -> float:
    """Return for how many seconds a killed process is gone; 0 where none was killed."""
    note = folder / f"out-{KILLED}"
    return time.time() - float(note.read_text()) if note.is_file() else 0.0


def _wait(children: list[Any]) -> None:
    """Wait for processes; kill those that hang, or outlive a killed one by far."""
    until = time.monotonic() + LONGEST
    while any(child.is_alive() for child in children):
        if any(child.exitcode for child in children):
            until = min(until, time.monotonic() + 2 * SURVIVES)
        if time.monotonic() > until:
            for child in children:
                child.kill()
        time.sleep(0.05)


def _no_orphans(left: Callable[[], list[int]]) -> None:
    """Wait until nothing is left of what processes have started, or raise `RuntimeError` after half a minute."""
    until = time.monotonic() + 30
    while pids := left():
        if time.monotonic() > until:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            raise RuntimeError(f"{len(pids)} processes outlived the one that had started them by 30 s.")
        time.sleep(0.1)


def _sessions() -> Iterator[tuple[int, int]]:
    """Yield every process that is no zombie, with its session."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
            if state != "Z":
                yield int(path.parent.name), int(session)


def _started_by(plan: str) -> list[int]:
    """Return the processes that `launch` and its launcher have started, which know their plan."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"{PLAN}={plan}".encode() in path.read_bytes().split(bytes(1)):
                found.append(int(path.parent.name))
    return found


def _main() -> None:
    """Run what `launch` has planned, as one of its processes."""
    plan: dict[str, Any] = json.loads(os.environ[PLAN])
    folder, words = Path(plan.pop("folder")), plan.pop("words")
    moment, counted = plan.pop("moment"), plan.pop("counted")
    known = {"moment": moment and Moment(**moment), "counted": counted and Counted(**counted)}
    number = int(os.environ.get("RANK", "0"))
    _watched_call(lambda: command(words), folder, Fault(**known, **plan), number)


if __name__ == "__main__":
    _main()
