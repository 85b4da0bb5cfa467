"""Draw faults from a seed, put every command through them, and print a table; a fault that is found ends it with 1."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

from .jobs import Job, all_jobs, prepare
from .processes import watched
from .trials import DAMAGES, Reference, Trial, damaged, killed, reference, stopped_half_way, without_room

Row = dict[str, Any]
KINDS = ("kill", "disk", "damage")


def parsed() -> argparse.Namespace:
    """Return the options of this program."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    add = parser.add_argument
    add("--moments", type=int, default=20, help="Kills of each command, and of two processes in all.")
    add("--seed", type=int, default=None, help="What all is drawn from; by default another one each time.")
    add("--only", default="", help="A regular expression: jobs whose name it is found in.")
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="Kinds of faults.")
    add("--damages", type=int, default=len(DAMAGES), help="Kinds of damage to each file, 1 to 3.")
    add("--output_dir", type=Path, default=Path("runs/faults"), help="Folder of the table and of what failed.")
    return parser.parse_args()


def main() -> None:
    """Run the program."""
    options = parsed()
    seed = int.from_bytes(os.urandom(3)) if options.seed is None else options.seed
    print(f"Faults are drawn from the seed {seed}. To draw them again: make test-faults SEED={seed}", flush=True)
    work = options.output_dir.absolute() / "work"
    if work.exists():
        shutil.rmtree(work)
    (work / "data").mkdir(parents=True)
    set_apart(work)
    import_everything()
    started = time.monotonic()
    if not watched(lambda: prepare(work / "data"), work).well:
        raise SystemExit((work / "log.txt").read_text())
    rows: list[Row] = []
    every = all_jobs(work / "data")
    for job in every:
        if re.search(options.only, job.name):
            rows += rows_of(job, every, options, seed, work)
    found = {"seed": seed, "moments": options.moments, "seconds": round(time.monotonic() - started), "rows": rows}
    (options.output_dir / "results.json").write_text(json.dumps(found, indent=2) + "\n")
    print(table(rows))
    wrong = sum(row["moments"] - row["passed"] for row in rows)
    print(f"{found['seconds']} s, seed {seed}. {wrong} of {sum(row['moments'] for row in rows)} faults did harm.")
    raise SystemExit(wrong > 0)


def set_apart(work: Path) -> None:
    """Have all processes compute on the processor, alone on a thread, and keep what they download in the folder."""
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "cache"), "TOKENIZERS_PARALLELISM": "false"}


def import_everything() -> None:
    """Import what the commands need, so that processes begin with it."""
    from ddae_hf.commands import encode, finetune, pretrain, running, sweep, train_vae  # noqa: F401


def rows_of(job: Job, every: list[Job], options: argparse.Namespace, seed: int, work: Path) -> Iterator[Row]:
    """Yield a row of the table for every kind of fault of a job."""
    folder = work / re.sub(r"\W+", "_", job.name)
    known = reference(job, folder / "whole")
    alike = [other for other in every if other.processes == job.processes]
    sharing = [other for other in alike if job.processes == 2 or other.command == job.command]
    place = sharing.index(job)
    count = options.moments // len(sharing) + (place < options.moments % len(sharing))
    if "kill" in options.kinds and count:
        yield row(job, "killed", kills(known, folder, count, seed), seed)
    if job.processes == 2:
        return
    if "disk" in options.kinds:
        yield row(job, "no room", disks(known, folder, max(1, count // 4), seed), seed)
    if "damage" in options.kinds and place == 0:  # files of a command's variants are alike
        yield row(job, "damaged", damages(known, folder, options.damages, seed), seed)


def kills(known: Reference, folder: Path, count: int, seed: int) -> Iterator[Trial]:
    """Yield what became of so many kills."""
    for part in range(count):
        random = Random(f"{seed} killed {known.job.name} {part} {count}")
        yield killed(known, folder / f"killed-{part}", random, part, count)


def disks(known: Reference, folder: Path, count: int, seed: int) -> Iterator[Trial]:
    """Yield what became of so many full disks."""
    for part in range(count):
        yield without_room(known, folder / f"no-room-{part}", Random(f"{seed} no room {known.job.name} {part}"))


def damages(known: Reference, folder: Path, kinds: int, seed: int) -> Iterator[Trial]:
    """Yield what became of damage of so many kinds to every file."""
    stopped = folder / "stopped"
    for number, name in enumerate(stopped_half_way(known, stopped)):
        random = Random(f"{seed} damaged {known.job.name} {name}")
        for damage in sorted(random.sample(DAMAGES, kinds)):
            yield damaged(known, stopped, name, damage, folder / f"damaged-{number}-{damage}", random)


def row(job: Job, what: str, trials: Iterator[Trial], seed: int) -> Row:
    """Go through trials, say which fail, and return a row of the table; folders of those that pass are removed."""
    started = time.monotonic()
    found: list[Trial] = []
    for trial in trials:
        found.append(trial)
        if trial.wrong:
            print(f"\nFAULT: {job.name}, {what}: {trial.what}, seed {seed}; see {trial.folder}", flush=True)
            print("\n".join(f"    {reason}" for reason in trial.wrong), flush=True)
        else:
            shutil.rmtree(trial.folder)
    result: Row = {"job": job.name, "fault": what, "moments": len(found)}
    result |= {"survived": sum(trial.survived for trial in found), "equal": sum(trial.equal for trial in found)}
    result |= {"passed": sum(not trial.wrong for trial in found), "seconds": round(time.monotonic() - started, 1)}
    result |= {"wrong": [{"what": trial.what, "reasons": trial.wrong} for trial in found if trial.wrong]}
    print(f"{job.name}, {what}: {result['passed']} of {len(found)} pass, {result['seconds']} s", flush=True)
    return result


def table(rows: list[Row]) -> str:
    """Return rows as text, a line each."""
    names = ("job", "fault", "moments", "survived", "equal", "seconds")
    lines = [names, *([str(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(names))]
    return "\n".join("  ".join(_cells(line, widths)) for line in lines)


def _cells(line: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    """Yield a line's cells, all as wide as their columns; numbers stand on the right."""
    for number, (cell, width) in enumerate(zip(line, widths, strict=True)):
        yield cell.ljust(width) if number < 2 else cell.rjust(width)


if __name__ == "__main__":
    sys.exit(main())
