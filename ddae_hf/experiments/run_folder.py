"""The folder of a training run: its checkpoints, how far they have come, which are whole, and what resuming allows."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from .arrays import StrPath, read_json, write_json, write_text

logger = logging.getLogger(__name__)

SUCCESSORS = {"adam_weight_decay": "weight_decay", "num_samples": "grid_images"}  # of options of earlier versions
# Options that say which images are trained on, and options that say where a run is and how it is watched.
OF_DATA = frozenset(
    """dataset_name dataset_config_name train_data_dir image_column label_column skip_bad_images train_split
    max_train_samples latents_dir""".split()
)
OF_PLACES = frozenset(
    """output_dir cache_dir dataloader_num_workers checkpointing_steps resume_from_checkpoint report_to
    logging_dir""".split()
)
TRAINED = "train_results.json"  # of a training that is finished
OPTIONS = "training_options.yaml"
FILES = "files.json"
PROGRESS = Path("state") / "progress.json"
WEIGHTS = "state/model.safetensors"  # where accelerate keeps them
# What a checkpoint has besides weights, without which a run would not go on as it was.
MOMENTS = "optimizer.bin"  # the optimiser's, in `state`
PARTS = "optimizer"  # the folder that a sharded run has in its place
STATE = (f"state/{MOMENTS}", "state/random_states_0.pkl", PROGRESS.as_posix())
IN_PARTS = {STATE[0]: f"state/{PARTS}/*.safetensors"}  # what stands for a file in a sharded run
# Words of safetensors and torch, whose errors in writing are not `OSError`.
OF_DISKS = "No space left|StorageFull|file write failed|os error|PytorchStreamWriter|inline_container|iostream error"


def check_folder(folder: StrPath, option: str = "output_dir") -> None:
    """Raise `ValueError` if the folder that an option names is a file, or lies in one."""
    path = Path(folder).absolute()
    there = next(p for p in (path, *path.parents) if p.exists())
    if not there.is_dir():
        raise ValueError(f"{option} is {folder}, and {there} is a file: give a folder.")
    if not os.access(there, os.W_OK):
        raise ValueError(f"{option} is {folder}, and {there} may not be written to: give another folder.")


def saved_checkpoints(output_dir: StrPath) -> list[Path]:
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
    write_json(checkpoint / FILES, known)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def what_is_wrong(checkpoint: Path, needed: Sequence[str]) -> str | None:
    """Return why a checkpoint cannot be resumed, in words, or None; `needed` are patterns that a file each must match.

    Versions before 0.3.0 wrote no `files.json`: then files are checked for being missing or cut short.
    """
    patterns = {pattern: (pattern, IN_PARTS.get(pattern, pattern)) for pattern in needed}
    if missing := [name for name in needed if not any(any(checkpoint.glob(each)) for each in patterns[name])]:
        return f"it has no {', no '.join(missing)}"
    try:
        if not (checkpoint / FILES).is_file():
            cut = [path for path in sorted(checkpoint.rglob("*")) if _is_cut_short(path)]
            return f"{cut[0].relative_to(checkpoint).as_posix()} is damaged" if cut else None
        known = read_json(checkpoint / FILES)
        if not isinstance(known, dict):
            return f"{FILES} does not say which files there are"
        for name, noted in known.items():
            path = checkpoint / name
            if not isinstance(noted, list) or len(noted) != 2 or ".." in path.parts or Path(name).is_absolute():
                return f"{FILES} says of {name!r} what cannot be"
            size, digest = noted
            if not path.is_file():
                return f"it has no {name}"
            if path.stat().st_size != size or _sha256(path) != digest:
                return f"{name} is not what was written"
    except (ValueError, OSError) as error:
        return str(error).removesuffix(".")
    return None


def _is_cut_short(path: Path) -> bool:
    """Return whether a file holds no tensors, or has lost its end, where torch's archives have their table."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt"):
                return False
        except SafetensorError:
            return True
    return path.suffix in (".bin", ".pt", ".pth", ".pkl") and not zipfile.is_zipfile(path)


def checkpoint_to_resume(output_dir: StrPath, wanted: StrPath | None, needed: Sequence[str]) -> Path | None:
    """Return the checkpoint to resume: the one wanted, for `latest` the newest that is whole, or None to start afresh.

    Raises:
        ValueError: A fresh start where there are checkpoints, or a finished training; a checkpoint that is not there,
            is damaged or lacks one of the files `needed`; `latest` where all are so.
    """
    found = saved_checkpoints(output_dir)
    if wanted is None and found:
        raise ValueError(
            f"{output_dir} holds checkpoints of an earlier run: resume it (resume_from_checkpoint latest), or choose "
            "another output_dir."
        )
    if wanted in (None, "latest") and not found and (Path(output_dir) / TRAINED).is_file():
        raise ValueError(
            f"{output_dir} holds an earlier training, of which no checkpoint is left to go on from: choose another "
            "output_dir, or delete that one."
        )
    if wanted is None:
        return None
    if str(wanted) != "latest":
        if not Path(wanted).is_dir():
            raise ValueError(f"resume_from_checkpoint is {wanted}: there is no such checkpoint.")
        found = [Path(wanted)]
    reasons: list[str] = []
    for checkpoint in reversed(found):
        reason = what_is_wrong(checkpoint, needed)
        if reason is None:
            for text in reasons:
                logger.warning(f"{text}. Resuming from {checkpoint}, the newest that is whole.")
            return checkpoint
        reasons.append(f"{checkpoint} cannot be resumed: {reason}")
    if reasons:
        raise ValueError(f"{'; '.join(reasons)}. Resume another checkpoint, or `latest`, or choose another output_dir.")
    logger.info(f"{output_dir} has no checkpoint yet: starting afresh.")
    return None


def check_same_run(
    options: Mapping[str, Any], trained: Mapping[str, Any], may_change: Collection[str], where: Path
) -> None:
    """Raise `ValueError` if a run that is resumed would become another one, by an option that is not in `may_change`.

    An option that the checkpoint, `where`, does not know did not exist then, so it was off: None, 0 or empty.
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
    """Return the options of the run that wrote a checkpoint, or raise `ValueError` where the file is damaged."""
    try:
        options = yaml.safe_load((checkpoint / OPTIONS).read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{checkpoint / OPTIONS} cannot be read: {error}.") from error
    if not isinstance(options, dict):
        raise ValueError(f"{checkpoint / OPTIONS} must hold options, but holds a {type(options).__name__}.")
    return with_present_names(options)


def with_present_names(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options, as any version noted them, by the names that they have now."""
    found = {SUCCESSORS.get(name, name): value for name, value in options.items()}
    if isinstance(found.get("vae"), dict):  # of an autoencoder in training; elsewhere it is a checkpoint's path
        found["autoencoder"] = found.pop("vae")
    if "label_fraction" in found:  # of fine-tuning
        found["train_batch_size"] = found.pop("batch_size", None)
        if found["label_fraction"] == 1:
            del found["label_fraction"]
    return found


@dataclasses.dataclass
class Progress:
    """How far a run has come, with all that it was resumed from."""

    epoch: int = 0  # the one that it is in
    batch: int = 0  # batches of this epoch that are done, each of all processes
    batches: int = 0  # batches of all epochs
    images: int = 0
    seconds: float = 0.0
    num_images: int | None = None  # of the data set; None for a stream
    losses: list[float] = dataclasses.field(default_factory=list)  # of the last batches, means over all processes
    parts: dict[str, list[float]] = dataclasses.field(default_factory=dict)  # of each term of a sum, likewise
    steps: int = 0  # of the optimiser
    batch_images: int | None = None  # images of a batch of all processes
    images_hash: str | None = None  # of the images or latents, unless they are a stream

    @classmethod
    def read(cls, checkpoint: Path) -> Progress:
        """Return how far a run had come when it wrote a checkpoint, of this version or of an earlier one.

        Raises:
            ValueError: A file that is damaged.
        """
        path = checkpoint / PROGRESS
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is damaged ({error}): resume another checkpoint.") from error
        names = {field.name for field in dataclasses.fields(cls)}
        given: dict[str, Any] = known if isinstance(known, dict) else {"epoch": None}
        progress = cls(**{name: value for name, value in given.items() if name in names})
        if not progress.is_sound():
            raise ValueError(f"{path} is damaged: it does not say how far the run has come. Resume another checkpoint.")
        if "steps" not in known:  # before version 0.3.0
            progress.steps = step_of(checkpoint)
            processes = len(list((checkpoint / "state").glob("random_states_*")))
            batch_size = read_options(checkpoint).get("train_batch_size")
            if type(batch_size) is not int or batch_size < 1:
                raise ValueError(f"{checkpoint / OPTIONS} says no train_batch_size: resume another checkpoint.")
            progress.batch_images = batch_size * processes
        return progress

    def is_sound(self) -> bool:
        """Whether every value is of its type, and no count is negative."""
        counts = (self.epoch, self.batch, self.batches, self.images, self.steps)
        optional = (self.num_images, self.batch_images)
        numbers = [self.seconds]
        for losses in (self.losses, *(self.parts.values() if isinstance(self.parts, dict) else [None])):
            numbers += losses if isinstance(losses, list) else [None]
        return (
            all(type(count) is int and count >= 0 for count in counts)
            and all(count is None or (type(count) is int and count >= 0) for count in optional)
            and all(type(number) in (int, float) for number in numbers)
            and isinstance(self.images_hash, (str, type(None)))
        )

    def count(self, images: int, last: bool) -> None:
        """Add a batch, which may be the last of its epoch."""
        self.batches += 1
        self.images += images
        self.epoch, self.batch = (self.epoch + 1, 0) if last else (self.epoch, self.batch + 1)

    def cut_into(self, batch_images: int) -> None:
        """Count in batches of another size; raise `ValueError` unless the images that are done fill such batches."""
        before = self.batch_images or batch_images
        if self.batch * before % batch_images:
            raise ValueError(
                f"{self.batch * before} images of the epoch are done, which is not a whole number of batches of "
                f"{batch_images}: give the train_batch_size and the number of processes that the run began with."
            )
        self.batch = self.batch * before // batch_images
        self.batches = self.batches * before // batch_images
        self.batch_images = batch_images

    def loss(self) -> float | None:
        """Return the mean of the last losses; a checkpoint of version 0.1.0 has kept none."""
        return fmean(self.losses) if self.losses else None

    def means(self) -> dict[str, float]:
        """Return the mean of the last values of each part of the loss, by name."""
        return {name: fmean(values) for name, values in self.parts.items() if values}


def discard(folder: Path) -> None:
    """Remove a checkpoint: even if this is interrupted, it is whole or not there."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder.rename(folder.with_name(f"partial-{folder.name}")))


def clear_rubbish(output_dir: StrPath) -> None:
    """Remove what interrupted writing has left; several processes may do so at once."""
    for rubbish in Path(output_dir).glob("partial-checkpoint*"):
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(rubbish)
    for rubbish in Path(output_dir).glob(f"*.{'[0-9a-f]' * 12}.partial"):  # the names that `written_whole` gives
        rubbish.unlink(missing_ok=True)


@contextlib.contextmanager
def saving(output_dir: StrPath) -> Iterator[Path]:
    """Give a run's folder, made if it is missing, to write to; a failure raises `OSError` in one sentence."""
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    except Exception as error:
        reason = _disk_error(error)
        if reason is None:
            raise
        clear_rubbish(output_dir)
        kept = saved_checkpoints(output_dir)
        last = f"{kept[-1]} is the last checkpoint: make room, and resume it" if kept else "Make room, and start again"
        raise OSError(f"{output_dir} could not be written to: {reason}. {last}.") from error


@contextlib.contextmanager
def alone_in(output_dir: StrPath) -> Iterator[None]:
    """Keep other trainings out of a run's folder, made if it is missing, and clear it of what interrupted ones left.

    Raises:
        ValueError: Another training is at work there.
        OSError: The folder cannot be written to.
    """
    with saving(output_dir) as folder:
        lock = FileLock(folder / "training.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"Another training is at work in {output_dir}: choose another output_dir.") from error
    try:
        clear_rubbish(output_dir)
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _disk_error(error: BaseException | None) -> str | None:
    """Return what an error says of the disk: safetensors and torch wrap the system's error in kinds of their own."""
    while error is not None:
        if isinstance(error, OSError):
            return error.strerror or str(error)
        if re.search(OF_DISKS, str(error)):
            return str(error)
        error = error.__cause__ or error.__context__
    return None
