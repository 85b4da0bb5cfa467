"""Arrays on disk: filled batch by batch, continued where an interrupted run stopped, memory-mapped when read.

Side by side in a folder are one `.npy` file (N, ...) an array and `rows.json`, the number of rows that each has so far.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

Batches = Callable[[int, list[str]], Iterable[Mapping[str, Tensor]]]


def fill(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], count: int, batches: Batches, dtype: str = "float32"
) -> dict[str, np.ndarray]:
    """Return arrays, computing the rows that they lack.

    Args:
        folder: Their folder.
        shapes: The shape of a row, by the array's name.
        count: Number of rows N.
        batches: Called with a row's number and the names of arrays that are not complete, gives their rows from that
            one on, in batches of any sizes: tensors (B, ...) by name.
        dtype: The arrays' type.

    Returns:
        Arrays (N, ...) by name, read-only, mapped from disk.

    Raises:
        ValueError: Another number of rows than `count`.
        OSError: Not enough space on disk.
    """
    rows = rows_done(folder)
    missing = [name for name in shapes if rows.get(name, 0) < count]
    if missing:
        _compute(folder, {name: shapes[name] for name in missing}, count, batches, dtype, rows)
    return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in shapes}


def num_bytes(shape: tuple[int, ...], count: int, dtype: str = "float32") -> int:
    """Return the size of an array of so many rows of this shape."""
    return count * math.prod(shape) * np.dtype(dtype).itemsize


def rows_done(folder: Path) -> dict[str, int]:
    """Return how many rows each array has; one whose file is gone has none."""
    path = folder / "rows.json"
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {name: count for name, count in rows.items() if (folder / f"{name}.npy").exists()}


def check_space(folder: Path, needed: int) -> None:
    """Raise `OSError` if a folder's disk has less than so many bytes left."""
    # Writing to a mapped file on a full disk ends the process without a message.
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"{size(needed)} are needed in {folder}, where {size(free)} are free: give another folder, or keep less."
        )


def size(count: int) -> str:
    """Return a number of bytes in words."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def write_text(path: Path, text: str) -> None:
    """Write a file complete or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _compute(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    count: int,
    batches: Batches,
    dtype: str,
    rows: dict[str, int],
) -> None:
    """Fill arrays from the row where the least advanced one stopped."""
    start = min(rows.get(name, 0) for name in shapes)
    # Files take space only as they are filled.
    check_space(folder, sum(num_bytes(shape, count - rows.get(name, 0), dtype) for name, shape in shapes.items()))
    files = {}
    for name, shape in shapes.items():
        new = not rows.get(name)
        options = {"mode": "w+", "dtype": dtype, "shape": (count, *shape)} if new else {"mode": "r+"}
        files[name] = np.lib.format.open_memmap(folder / f"{name}.npy", **options)
    done = start
    for batch in batches(start, list(shapes)):
        end = done + len(next(iter(batch.values())))
        if end > count:
            raise ValueError(f"More than the {count} images came that were announced.")
        for name, values in batch.items():
            files[name][done:end] = values.cpu().numpy()
            files[name].flush()
        done = end
        rows.update({name: max(done, rows.get(name, 0)) for name in shapes})
        write_text(folder / "rows.json", json.dumps(rows) + "\n")
    if done != count:
        raise ValueError(f"{done} images came, but {count} were announced.")
