"""One command put through one fault: killed, without room, or with a damaged file. Each says what went wrong."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np

from .jobs import CLOSE, Job, differences, files_of
from .moments import Counted, Moment, draw
from .processes import SURVIVES, Ended, Fault, launch, run, watched

AGAIN = 1 / 3  # share of the killed commands that are killed once more when they go on
HALF_WAY = Moment("changes", 0.6)  # where a command is stopped whose files are damaged
DAMAGES = ("flipped", "cut", "missing")
ROOMY = "1g"


@dataclass
class Trial:
    """What happened to a command, and all that was wrong about it."""

    what: str
    folder: Path
    survived: bool = True  # whether the fault was survived: nothing partial is taken for whole
    equal: bool = True  # whether the command, given again, ended as it does without a fault
    wrong: list[str] = field(default_factory=list)

    def broken(self, reason: str) -> None:
        """Note that the fault was not survived."""
        self.survived = False
        self.wrong.append(reason)

    def differs(self, reason: str) -> None:
        """Note that the command did not end as it should have."""
        self.equal = False
        self.wrong.append(reason)


@dataclass(frozen=True)
class Reference:
    """A job that ran without any fault, in the folder `out` of a folder."""

    job: Job
    folder: Path
    counted: list[Counted]

    @property
    def close(self) -> float:
        """What numbers may differ by."""
        return 0.0 if self.job.processes == 1 else CLOSE


def reference(job: Job, folder: Path) -> Reference:
    """Run a job without any fault, or raise `RuntimeError` where it fails."""
    folder.mkdir(parents=True)
    ended = run(job.words, folder, processes=job.processes)
    if not ended.well or ended.counted is None:
        raise RuntimeError(f"{job.name} fails without any fault:\n{ended.text[-4000:]}")
    return Reference(job, folder, ended.counted)


def killed(known: Reference, folder: Path, random: Random, part: int, parts: int) -> Trial:
    """Kill a job at a moment in one of so many parts of it, then let it go on, which may be killed once more."""
    job = known.job
    folder.mkdir(parents=True)
    process = random.randrange(job.processes)
    moment = draw(random, part, parts)
    launched = job.processes == 2 and part % 2 == 0
    second = draw(random, 0, 1) if random.random() < AGAIN else None
    where = f", process {process}{', accelerate launch' if launched else ''}" if job.processes == 2 else ""
    trial = Trial(f"{moment}{where}{f', again at {second}' if second else ''}", folder)
    for each in [moment] if second is None else [moment, second]:
        fault = Fault(each, known.counted[process], process)
        if launched:
            ended = launch(job.words, folder, fault)
        else:
            ended = run(job.words, folder, fault, job.processes)
        shutil.copy(folder / "log.txt", folder / f"log at {each}.txt")
        if not ended.killed and not ended.well:
            trial.broken(f"ended by itself with status {ended.statuses}: {ended.text[-1500:]}")
        if job.processes == 2 and ended.killed:
            _check_other(trial, ended, launched)
        check_nothing_partial(trial, known)
    check_ends_equal(trial, known)
    return trial


def _check_other(trial: Trial, ended: Ended, launched: bool) -> None:
    """Check that the process that was left ended soon, and said why, or its launcher did, which shows a traceback."""
    if ended.survived > SURVIVES:
        trial.broken(f"the other process lived for {ended.survived:.0f} s")
    if 0 in ended.statuses:
        trial.broken("the other process ended as if all were well")
    if not ((launched and "SIGKILL" in ended.text) or (ended.sentence and "another process" in ended.text)):
        trial.broken(f"the other process did not say why it ended: {ended.text[-2500:]}")


def check_nothing_partial(trial: Trial, known: Reference) -> None:
    """Check that what looks whole is whole: checkpoints, arrays, reports, and what opens."""
    from ddae_hf.experiments.run_folder import saved_checkpoints, what_is_wrong

    out, expected = trial.folder / "out", known.folder / "out"
    if not out.is_dir():
        return
    for checkpoint in saved_checkpoints(out):
        same = expected / checkpoint.name
        if same.is_dir() and (checkpoint / "files.json").is_file() and what_is_wrong(checkpoint, ()) is None:
            for problem in differences(same, checkpoint, list(files_of(same)), known.close):
                trial.broken(f"{checkpoint.name} is taken for whole, but {problem}")
    whole = [name for name in files_of(expected) if name.endswith((".npy", "results.json", ".png"))]
    there = [name for name in whole if (out / name).is_file()]
    for problem in differences(expected, out, there, known.close):
        trial.broken(f"{problem}, after the fault")
    for folder in (out, *saved_checkpoints(out)):
        check_opens_or_is_refused(trial, known, folder)


def check_opens_or_is_refused(trial: Trial, known: Reference, folder: Path) -> None:
    """Check that a folder opens with the right content, or is refused with a sentence."""
    expected = known.folder / folder.relative_to(trial.folder)
    refused = refusal(known.job, folder, trial.folder)
    if refused is None and expected.is_dir():
        beside = [name for name in files_of(expected) if name.endswith(".safetensors") and "/" not in name]
        weights = [name for name in beside if (folder / name).is_file()]  # it does not open without those that it reads
        for problem in differences(expected, folder, weights, known.close):
            trial.broken(f"{folder.name} opens, but {problem}")
    elif refused is not None and not refused.startswith(("ValueError", "OSError")):
        trial.broken(f"{folder.name} is neither opened nor refused in a sentence: {refused}")


def refusal(job: Job, folder: Path, around: Path) -> str | None:
    """Return the error with which a folder is refused, or None where it opens; notes are left in the one around it."""
    aside = around / "aside"
    aside.mkdir(exist_ok=True)
    note = aside / "refused.txt"
    note.unlink(missing_ok=True)

    def opening() -> None:
        try:
            job.opens(folder)
        except (ValueError, OSError) as error:  # what a command says in a sentence
            note.write_text(f"{'OSError' if isinstance(error, OSError) else 'ValueError'}: {error}")
        except Exception:
            note.write_text(traceback.format_exc())

    ended = watched(opening, aside)
    return note.read_text() if note.is_file() else None if ended.well else ended.text


def check_ends_equal(trial: Trial, known: Reference, damaged: str | None = None) -> None:
    """Run the same command to its end, and compare what it leaves with what it leaves without a fault.

    With a file that is `damaged` the command may refuse to go on, what it leaves may be refused when it is opened, and
    a checkpoint that is known to be damaged, and an array that is refused, may stay so.
    """
    out, expected = trial.folder / "out", known.folder / "out"
    ended = run(known.job.words, trial.folder, processes=known.job.processes)
    if not ended.well:
        if not (damaged and ended.statuses == [1] and ended.sentence):
            trial.differs(f"the same command ended with status {ended.statuses}: {ended.text[-2500:]}")
        return
    names = list(files_of(expected))
    if damaged is not None and (checkpoint := known_to_be_damaged(trial.folder / damaged)):
        names = [name for name in names if not name.startswith(f"{checkpoint.name}/")]
    if damaged is not None and is_refused_array(trial.folder / damaged, known.folder / damaged):
        names.remove(damaged.removeprefix("out/"))
    problems = list(differences(expected, out, names, known.close))
    if problems and damaged and (refusal(known.job, out, trial.folder) or "").startswith(("ValueError", "OSError")):
        return
    for problem in problems:
        trial.differs(f"{problem}, in the end")


def without_room(known: Reference, folder: Path, random: Random) -> Trial:
    """Run a job where its folder has too little room, then again where there is enough."""
    job, out = known.job, folder / "out"
    out.mkdir(parents=True)
    share = random.uniform(0.05, 0.95)
    by_limit = os.geteuid() != 0 or random.random() < 0.5
    sizes = [path.stat().st_size for path in (known.folder / "out").rglob("*") if path.is_file()]
    with contextlib.ExitStack() as stack:
        mounted = not by_limit and stack.enter_context(small_disk(out, int(share * sum(sizes))))
        largest = int(share * max(sizes))
        trial = Trial(f"{share:.3f} of the room" if mounted else f"no file beyond {share:.3f} of the largest", folder)
        ended = run(job.words, folder, Fault(bytes=None if mounted else largest))
        shutil.copy(folder / "log.txt", folder / "log without room.txt")
        if ended.well:
            trial.broken("the command did not notice")
        elif ended.statuses != [1] or not ended.sentence:
            trial.broken(f"status {ended.statuses} in place of a sentence: {ended.text[-2500:]}")
        check_nothing_partial(trial, known)
        if mounted:
            subprocess.run(["mount", "-o", f"remount,size={ROOMY}", str(out)], check=True)
        check_ends_equal(trial, known)
    return trial


def known_to_be_damaged(path: Path) -> Path | None:
    """Return the checkpoint that a file lies in, if its damage is seen."""
    from ddae_hf.experiments.run_folder import what_is_wrong

    inside = [folder for folder in path.parents if folder.name.startswith("checkpoint-") and folder.is_dir()]
    return inside[0] if inside and what_is_wrong(inside[0], ()) is not None else None


def is_refused_array(path: Path, expected: Path) -> bool:
    """Return whether a file is an array that is refused where it is wanted: nobody has wanted it so far."""
    from ddae_hf.experiments.arrays import open_array

    if path.suffix != ".npy" or not expected.is_file():
        return False
    values = np.load(expected, mmap_mode="r")
    try:
        open_array(path.parent, path.stem, values.shape, str(values.dtype))
    except (ValueError, OSError):
        return True
    return False


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[bool]:
    """Mount a small disk in memory at a folder, and give whether that is allowed; afterwards it is gone."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        yield False
        return
    try:
        yield True
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def stopped_half_way(known: Reference, folder: Path) -> list[str]:
    """Kill a job where more than half of its files are written, and return those that the next one reads.

    Of several checkpoints that is the newest; the others are there to fall back on.
    """
    from ddae_hf.experiments.run_folder import saved_checkpoints

    folder.mkdir(parents=True)
    run(known.job.words, folder, Fault(HALF_WAY, known.counted[0]))
    older = saved_checkpoints(folder / "out")[:-1]
    unread = (".lock", ".png")
    files = [path for path in sorted((folder / "out").rglob("*")) if path.is_file() and path.suffix not in unread]
    return [path.relative_to(folder).as_posix() for path in files if not set(older) & set(path.parents)]


def damaged(known: Reference, stopped: Path, name: str, damage: str, folder: Path, random: Random) -> Trial:
    """Damage one file of a job that was stopped half-way, then let it go on."""
    shutil.copytree(stopped, folder)
    path = folder / name
    content = bytearray(path.read_bytes())
    place = random.randrange(max(1, len(content)))
    bits = random.randrange(1, 256)
    trial = Trial(f"{name} {damage}{'' if damage == 'missing' else f' at {place}'}", folder)
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[:place])
    elif content:
        content[place] ^= bits
        path.write_bytes(content)
    check_ends_equal(trial, known, damaged=name)
    return trial
