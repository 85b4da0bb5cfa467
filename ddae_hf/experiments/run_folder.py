"""The folder of a training run: its checkpoints, which of them are whole, its options, and what resuming allows."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from .arrays import read_json, write_text

logger = logging.getLogger(__name__)

OPTIONS = "training_options.yaml"
FILES = "files.json"


def check_folder(folder: str | os.PathLike[str], option: str = "output_dir") -> None:
    """Raise `ValueError` if the folder that an option names is a file, or lies in one."""
    path = Path(folder).absolute()
    there = next(p for p in (path, *path.parents) if p.exists())
    if not there.is_dir():
        raise ValueError(f"{option} is {folder}, and {there} is a file: give a folder.")


def saved_checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """Return the folders `checkpoint-STEP`, oldest first."""
    # Others, such as a copy `checkpoint-9-best`, are the user's.
    folders = [f for f in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", f.name)]
    return sorted(folders, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the number of steps that a checkpoint `checkpoint-STEP` was written after."""
    return int(checkpoint.name.rpartition("-")[2])


def note_files(checkpoint: Path) -> None:
    """Write `files.json`, the size and SHA-256 of every file, which is the last to be written."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path != checkpoint / FILES)
    known = {path.relative_to(checkpoint).as_posix(): [path.stat().st_size, _sha256(path)] for path in files}
    write_text(checkpoint / FILES, json.dumps(known, indent=2) + "\n")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def what_is_wrong(checkpoint: Path, needed: Sequence[str]) -> str | None:
    """Return why a checkpoint cannot be resumed, in words, or None.

    Those of versions before 0.3.0 have no `files.json`: of these only what is missing is found.

    Args:
        checkpoint: Its folder.
        needed: Patterns of files, each of which one file must match.
    """
    if missing := [pattern for pattern in needed if not any(checkpoint.glob(pattern))]:
        return f"it has no {', no '.join(missing)}"
    if not (checkpoint / FILES).is_file():
        return None
    try:
        known = read_json(checkpoint / FILES)
        for name, (size, digest) in known.items():
            path = checkpoint / name
            if not path.is_file():
                return f"it has no {name}"
            if path.stat().st_size != size or _sha256(path) != digest:
                return f"{name} is not what was written"
    except (ValueError, OSError) as error:
        return str(error).removesuffix(".")
    return None


def checkpoint_to_resume(
    output_dir: str | os.PathLike[str], wanted: str | os.PathLike[str] | None, needed: Sequence[str]
) -> Path | None:
    """Return the checkpoint to resume, or None for a fresh start.

    Args:
        output_dir: Folder of the run.
        wanted: A checkpoint's folder, `latest` for the newest of the run that is whole, or None for a fresh start.
        needed: Patterns of the files without which a run would not go on as it was: weights, the optimiser's state,
            random states, progress.

    Raises:
        ValueError: A fresh start where there are checkpoints; a checkpoint that is not there, lacks something or is
            damaged; `latest` where all are so.
    """
    check_folder(output_dir)
    found = saved_checkpoints(output_dir)
    if wanted is None:
        if found:
            raise ValueError(
                f"{output_dir} holds checkpoints of an earlier run: resume it (resume_from_checkpoint latest), or "
                "choose another output_dir."
            )
        return None
    if str(wanted) != "latest":
        if not Path(wanted).is_dir():
            raise ValueError(f"resume_from_checkpoint is {wanted}: there is no such checkpoint.")
        if reason := what_is_wrong(Path(wanted), needed):
            raise ValueError(f"{wanted} cannot be resumed: {reason}. Resume another checkpoint, or `latest`.")
        return Path(wanted)
    reasons: list[str] = []
    for checkpoint in reversed(found):
        reason = what_is_wrong(checkpoint, needed)
        if reason is None:
            for text in reasons:
                logger.warning(f"{text}. Resuming from {checkpoint}, the newest that is whole.")
            return checkpoint
        reasons.append(f"{checkpoint} cannot be resumed: {reason}")
    if reasons:
        raise ValueError(f"{'; '.join(reasons)}. Choose another output_dir, or remove these.")
    logger.info(f"{output_dir} has no checkpoint yet: starting afresh.")
    return None


def check_same_run(
    options: Mapping[str, Any], trained: Mapping[str, Any], may_change: Collection[str], where: Path
) -> None:
    """Raise `ValueError` if a run that is resumed would become another one.

    Args:
        options: The options now, plain data, with whatever else makes a run what it is.
        trained: Those that the checkpoint was trained with. One that is not there was an option of no version then,
            and so off: None, False, 0 or empty.
        may_change: Names of options that are applied from now on.
        where: The checkpoint.
    """
    different = []
    for name, now in options.items():
        before = trained.get(name)
        if name not in may_change and before != now and not (name not in trained and not now):
            different.append(f"{name} was {before!r} and is {now!r}")
    if different:
        raise ValueError(
            f"{where} was trained with other options: {'; '.join(different)}. Resuming cannot change them: give them "
            "as they were, or begin another run in another output_dir."
        )


def write_options(options: Mapping[str, Any], folder: Path) -> None:
    """Write options, plain data from which a run can be repeated with `--config`, complete or not at all."""
    write_text(folder / OPTIONS, yaml.safe_dump(dict(options), sort_keys=False))


def read_options(checkpoint: Path) -> dict[str, Any]:
    """Return the options of the run that wrote a checkpoint.

    Raises:
        ValueError: The file is damaged.
        OSError: There is none.
    """
    try:
        options = yaml.safe_load((checkpoint / OPTIONS).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{checkpoint / OPTIONS} cannot be read: {error}.") from error
    if not isinstance(options, dict):
        raise ValueError(f"{checkpoint / OPTIONS} must hold options, and holds {options!r}.")
    return options


def discard(folder: Path) -> None:
    """Remove a checkpoint: even where this is interrupted it is whole or not there."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder.rename(folder.with_name(f"partial-{folder.name}")))


def clear_rubbish(output_dir: str | os.PathLike[str]) -> None:
    """Remove what interrupted writing has left."""
    for rubbish in Path(output_dir).glob("partial-checkpoint*"):
        shutil.rmtree(rubbish)
    for rubbish in Path(output_dir).glob(f"*.{'[0-9a-f]' * 12}.partial"):  # the names that `written_whole` gives
        rubbish.unlink()


@contextlib.contextmanager
def saving(output_dir: str | os.PathLike[str]) -> Iterator[None]:
    """Say in one sentence where writing into a run's folder failed, such as on a full disk, and leave no rubbish.

    Raises:
        OSError: What happened, and what is still there.
    """
    try:
        yield
    except Exception as error:
        reason = _disk_error(error)
        if reason is None:
            raise
        clear_rubbish(output_dir)
        kept = saved_checkpoints(output_dir)
        last = f"{kept[-1]} is the last checkpoint: make room, and resume it" if kept else "Make room, and start again"
        raise OSError(f"{output_dir} could not be written to: {reason}. {last}.") from error


def _disk_error(error: BaseException | None) -> str | None:
    """Return what an error says of the disk: safetensors and torch wrap that of the system in kinds of their own."""
    while error is not None:
        if isinstance(error, OSError):
            return error.strerror or str(error)
        if re.search("No space left|StorageFull|file write failed|os error|PytorchStreamWriter", str(error)):
            return str(error)
        error = error.__cause__ or error.__context__
    return None
