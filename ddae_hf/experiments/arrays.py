"""Arrays on disk: filled batch by batch, continued where an interrupted run stopped, memory-mapped when read.

    NAME.npy            a whole array (N, ...)
    NAME.npy.partial    one that is being filled: a header and the rows so far
    rows.json           for each array, the number of rows that are done and their CRC-32
    rows.lock           held by the process that fills the arrays

Rows are checked before they are used: the rows of an unfinished array when it is continued, and the rows of a whole
array when it is opened for the first time. An array becomes `NAME.npy` only when it is whole, so that readers need no
lock.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

StrPath = str | os.PathLike[str]
Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Batches = Callable[[int, list[str]], Iterable[Mapping[str, Tensor]]]

_NOTE_SECONDS = 5.0  # between notes of what is done: what a process that is killed computes again at most
_verified: set[tuple[Any, ...]] = set()  # the states of the whole arrays that this process has checked
logger = logging.getLogger(__name__)


@dataclass
class Rows:
    """How many rows of an array are done, and the CRC-32 of their bytes, in order."""

    count: int = 0
    crc32: int = 0


def fill(folder: Path, shapes: Shapes, count: int, batches: Batches, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Return arrays of `count` rows by name, read-only and mapped from disk; rows that are missing are computed.

    One process at a time fills a folder. Another one waits for it, and then computes what is still missing. `shapes`
    has the shape of a row by the array's name. `batches` is called with a row's number and the names of incomplete
    arrays, and gives their rows from that number on, in batches of any sizes: tensors (B, ...) of `dtype` by name.

    Raises:
        ValueError: Another number of rows than `count`, rows of another shape or type, or a damaged file.
        OSError: Not enough space on disk.
    """
    whole = {name: (count, *shape) for name, shape in shapes.items()}
    if _missing(folder, whole):
        with locked(folder):
            if missing := _missing(folder, whole):
                _compute(folder, {name: whole[name] for name in missing}, batches, dtype)
    return {name: open_array(folder, name, shape, dtype) for name, shape in whole.items()}


def open_array(folder: Path, name: str, shape: Shape, dtype: str) -> np.ndarray:
    """Return a whole array, read-only, mapped from disk, or raise `ValueError` if it is not what was written.

    Its rows are compared with their checksum when this process first opens the file, and anew after a change.
    """
    path = folder / f"{name}.npy"
    rows = _read_rows(folder).get(name, Rows())
    if rows.count < shape[0]:
        raise damaged(path, f"rows.json knows of {rows.count} rows, where {shape[0]} are wanted")
    values = _mapped(path, shape, dtype, rows)
    if (there := path.stat().st_size) != values.offset + values.nbytes:
        raise damaged(path, f"it has {there} bytes, which is not the size of {shape[0]} rows")
    return values


def write_array(folder: Path, name: str, values: np.ndarray) -> None:
    """Write a whole array in place of an existing one, unless that one has the same rows."""
    new = Rows(len(values), zlib.crc32(np.ascontiguousarray(values).data))
    if _read_rows(folder).get(name) == new:
        return
    with locked(folder):
        with written_whole(folder / f"{name}.npy") as partial, partial.open("wb") as file:
            np.save(file, values, allow_pickle=False)
        _write_rows(folder, _read_rows(folder) | {name: new})


def num_bytes(shape: Shape, count: int, dtype: str = "float32") -> int:
    """Return the size in bytes of an array of `count` rows of this shape."""
    return count * math.prod(shape) * np.dtype(dtype).itemsize


def rows_done(folder: Path) -> dict[str, int]:
    """Return how many rows each array has; one whose file is gone has none."""
    return {name: rows.count for name, rows in _read_rows(folder).items()}


def check_space(folder: Path, needed: int) -> None:
    """Raise `OSError` if a folder's disk has fewer than `needed` bytes left."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        what = f"{size(needed)} are needed in {folder}, where {size(free)} are free"
        raise OSError(f"{what}: give another folder, or keep less.")


def size(count: int) -> str:
    """Return a number of bytes in words."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name in a sentence the file that could not be written, as on a full disk: the system's error does not."""
    try:
        yield
    except OSError as error:
        short = "requested and" in str(error)  # NumPy's words for it, without a number
        if error.filename is not None or (error.errno is None and not short):
            raise
        reason = error.strerror or str(error)
        named = OSError(f"{path} could not be written: {reason}. Make room, and start again: what is written is kept.")
        named.strerror = reason  # for callers that say more about it
        raise named from error


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give the name of a new file to write to: it takes the place of `path` at the end, or is removed on failure."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        with writing(path):
            yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file complete or not at all."""
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Return the content of a JSON file of our own, or raise `ValueError` if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise damaged(path, str(error)) from error


def damaged(path: Path, reason: str) -> ValueError:
    """Return the error to raise where a file of ours is not what was written."""
    what = f"{path} is damaged ({reason}). Delete this file, or delete this folder, {path.parent}"
    return ValueError(f"{what}: what is missing is made again.")


def differences(known: Mapping[str, Any], wanted: Mapping[str, Any], inside: str = "") -> list[str]:
    """Return in words where a description differs from the one that is wanted."""
    found: list[str] = []
    for name, value in wanted.items():
        has = known.get(name)
        if isinstance(has, dict) and isinstance(value, dict) and has.get("_class_name") == value.get("_class_name"):
            found += differences(has, value | dict.fromkeys(has.keys() - value.keys()), f"{inside}{name}.")
        elif has != value:
            hashes = len(str(has)) + len(str(value)) > 100
            found.append(f"{inside}{name} differs" if hashes else f"{inside}{name} is {has} there, {value} here")
    return found


@contextlib.contextmanager
def kept_or_temporary(folder: StrPath | None) -> Iterator[Path]:
    """Give a folder or, where none is asked for, a temporary one, which is removed afterwards."""
    if folder is not None:
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory(prefix="ddae_hf_") as temporary:
        yield Path(temporary)


def described_folder(parent: Path, identity: Mapping[str, Any]) -> Path:
    """Return the folder for this description, named by a hash of its `identity.json`; make it if it is missing."""
    text = json.dumps(identity, indent=2, sort_keys=True)
    folder = parent / hashlib.sha256(text.encode()).hexdigest()[:20]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "identity.json"
    if not path.exists():
        write_text(path, text + "\n")
    elif path.read_bytes() != text.encode() + b"\n":
        raise damaged(path, "it does not say what its folder's name stands for")
    return folder


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from changing a folder's arrays; wait, with a message, for one that is changing them."""
    lock = FileLock(folder / "rows.lock")
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        logger.warning("Another process is filling %s: waiting until it is done.", folder)
        held = lock.acquire()
    with held:
        yield


def _partial(folder: Path, name: str) -> Path:
    return folder / f"{name}.npy.partial"


def _read_rows(folder: Path) -> dict[str, Rows]:
    """Return how much of each array is done; arrays without a file, or a checksum (version 0.1.0), are left out."""
    path = folder / "rows.json"
    known = read_json(path) if path.exists() else {}
    try:
        rows = {name: Rows(**it) for name, it in known.items() if not isinstance(it, int)}
        whole = all(type(number) is int for it in rows.values() for number in (it.count, it.crc32))
        sound = whole and all(it.count >= 0 and 0 <= it.crc32 < 2**32 for it in rows.values())
    except (AttributeError, TypeError):
        sound = False
    if not sound:
        raise damaged(path, "it does not say how many rows of each array are done")
    return {n: it for n, it in rows.items() if (folder / f"{n}.npy").exists() or _partial(folder, n).exists()}


def _write_rows(folder: Path, rows: dict[str, Rows]) -> None:
    write_text(folder / "rows.json", json.dumps(rows, default=dataclasses.asdict) + "\n")


def _state(path: Path, rows: Rows) -> tuple[Any, ...]:
    """Return facts that change with a file: which file it is, its size, its time, and what `rows.json` knows of it."""
    status = path.stat()
    return str(path.resolve()), status.st_ino, status.st_size, status.st_mtime_ns, rows.count, rows.crc32


def _missing(folder: Path, shapes: Shapes) -> list[str]:
    done = rows_done(folder)
    return [n for n, shape in shapes.items() if done.get(n, 0) < shape[0] or not (folder / f"{n}.npy").exists()]


def _compute(folder: Path, shapes: Shapes, batches: Batches, dtype: str) -> None:
    """Fill arrays from the row where the least advanced one stopped."""
    rows = _read_rows(folder)
    count = next(iter(shapes.values()))[0]
    needed = (num_bytes(shape[1:], count - rows.get(name, Rows()).count, dtype) for name, shape in shapes.items())
    check_space(folder, sum(needed))
    with _Unfinished(folder, shapes, dtype, rows) as unfinished:
        done = min(it.count for it in unfinished.rows.values())
        for batch in batches(done, list(shapes)) if done < count else ():
            end = done + len(next(iter(batch.values())))
            if end > count:
                raise ValueError(f"More images came than the {count} that were announced.")
            unfinished.add(batch, done)
            done = end
        if done != count:
            raise ValueError(f"{done} images came, but {count} were announced.")
    for name, it in unfinished.rows.items():
        whole = _partial(folder, name).replace(folder / f"{name}.npy")
        _verified.add(_state(whole, it))  # this process has written its rows, or checked them


class _Unfinished:
    """Arrays that are being filled: their files stay open, and what they have is noted now and then.

    A note is taken, and `rows.json` written, only after the arrays' rows are on disk for certain: every `_NOTE_SECONDS`
    and at the end, also where an exception is the end. A process that is killed loses what came after its last note.
    """

    def __init__(self, folder: Path, shapes: Shapes, dtype: str, known: dict[str, Rows]):
        self.folder, self.shapes, self.dtype, self.known = folder, shapes, dtype, known
        self.rows = {name: _begin(folder, name, shape, dtype, known.get(name)) for name, shape in shapes.items()}
        self.waiting: tuple[Mapping[str, Tensor], int, torch.cuda.Event] | None = None  # for its copy from a GPU

    def __enter__(self) -> _Unfinished:
        with contextlib.ExitStack() as opened:
            # Unbuffered: the rows that are counted are with the system, and no write that failed is tried again.
            self.files = {n: opened.enter_context(_partial(self.folder, n).open("ab", buffering=0)) for n in self.rows}
            self.opened = opened.pop_all()
        self.noted = time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        # With a full disk or a GPU that failed, this fails too: the first error is told, and the last note holds.
        secondary = () if kind is None else (OSError, RuntimeError)
        with self.opened, contextlib.suppress(*secondary):
            try:
                self.write_waiting()
            finally:
                self.note()

    def add(self, batch: Mapping[str, Tensor], start: int) -> None:
        """Append a batch whose first row is number `start`; one on a GPU is written when the next one has come."""
        copy, event = _sent_to_host(batch)
        self.write_waiting()
        if event is None:
            self.write(copy, start)
        else:
            self.waiting = (copy, start, event)
        if time.monotonic() - self.noted >= _NOTE_SECONDS:
            self.note()

    def write_waiting(self) -> None:
        """Append the batch that is on its way from a GPU, if there is one."""
        if self.waiting is not None:
            copy, start, event = self.waiting
            self.waiting = None
            event.synchronize()
            self.write(copy, start)

    def write(self, batch: Mapping[str, Tensor], start: int) -> None:
        """Append those rows that an array lacks of a batch in memory, and count them."""
        for name, shape in self.shapes.items():
            rows, values = self.rows[name], batch[name].numpy()
            if values.shape[1:] != shape[1:] or values.dtype != self.dtype:
                came = f"Rows of {name} came with shape {values.shape[1:]} and type {values.dtype}"
                raise ValueError(f"{came}, but {shape[1:]} and {self.dtype} were announced.")
            new = np.ascontiguousarray(values[max(0, rows.count - start) :])
            left = new.reshape(-1).view(np.uint8).data
            with writing(_partial(self.folder, name)):
                while len(left):
                    left = left[self.files[name].write(left) :]  # less than all of it where the disk is nearly full
            self.rows[name] = Rows(rows.count + len(new), zlib.crc32(new.data, rows.crc32))

    def note(self) -> None:
        """Make what is written durable, and note it."""
        for name, file in self.files.items():
            with writing(_partial(self.folder, name)):
                os.fsync(file.fileno())
        _write_rows(self.folder, self.known | self.rows)
        self.noted = time.monotonic()


def _sent_to_host(batch: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], torch.cuda.Event | None]:
    """Return a batch in memory, and the event after which a copy from a GPU is complete, which does not wait for it."""
    device = next(iter(batch.values())).device
    if device.type != "cuda":
        return {name: values.cpu() for name, values in batch.items()}, None
    pinned = {name: torch.empty_like(values, device="cpu", pin_memory=True) for name, values in batch.items()}
    for name, values in batch.items():
        pinned[name].copy_(values, non_blocking=True)
    return pinned, torch.cuda.current_stream(device).record_event()


def _begin(folder: Path, name: str, shape: Shape, dtype: str, rows: Rows | None) -> Rows:
    """Return the rows that an unfinished array continues from, after a check; make its file if it is missing."""
    path = _partial(folder, name)
    whole = folder / f"{name}.npy"
    if rows is not None and path.exists():
        values = _mapped(path, shape, dtype, rows)
        os.truncate(path, values.offset + values.nbytes)  # rows that came after the last note are written again
        return rows
    if whole.exists():
        logger.warning("%s has no checksum, because version 0.1.0 wrote none: it is computed again.", whole)
        whole.unlink()
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    with writing(path), path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
    return Rows()


def _mapped(path: Path, shape: Shape, dtype: str, rows: Rows) -> np.memmap:
    """Return an array's finished rows, mapped from disk, or raise `ValueError` if they are not what was written."""
    if rows.count > shape[0]:
        raise damaged(path, f"rows.json knows of {rows.count} rows, where {shape[0]} are wanted")
    state = _state(path, rows)
    with path.open("rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            header = np.lib.format.read_array_header_1_0(file) if version == (1, 0) else None
        except Exception as error:  # a broken header can raise any error
            raise damaged(path, "it is not an array") from error
        if header != (shape, False, np.dtype(dtype)):
            raise damaged(path, f"it is not the {dtype} array of shape {shape} that is wanted")
        try:
            values = np.memmap(file, dtype, "r", file.tell(), (rows.count, *shape[1:]))
        except ValueError as error:
            raise damaged(path, f"it ends before row {rows.count}") from error
    if state not in _verified and zlib.crc32(values.data) != rows.crc32:
        raise damaged(path, "its checksum is not that of the rows that were written")
    _verified.add(state)
    return values
