"""Published files that are pickles, read without running anything that they name.

A pickle may name any function and have it called. This is the one module that reads them all the same:

- torch files go through torch's restricted loader (`weights_only=True`), with an inert stand-in for
  `argparse.Namespace`, the options that a training run stores beside its weights;
- any other pickle is taken as a description. Each name in it out of a short list becomes a `Record` of what it would be
  called with, and any other is refused, so that no class or function is looked up, let alone called.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch

# What EDM's pickles name (github.com/NVlabs/edm): networks with their source code, tensors, numbers.
RECORDED = {
    "torch_utils.persistence._reconstruct_persistent_obj", "dnnlib.util.EasyDict",
    "torch._utils._rebuild_parameter", "torch._utils._rebuild_tensor_v2", "torch.storage._load_from_bytes",
    "torch.nn.modules.container.ModuleDict", "torch.nn.modules.container.ModuleList",
    "collections.OrderedDict", "builtins.set",
    "numpy.core.multiarray.scalar", "numpy.core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype",
    "numpy._core.multiarray.scalar", "numpy._core.multiarray._reconstruct",
}  # fmt: skip


class Record:
    """What a pickle says of an object, which is never made: its name, arguments, entries and state."""

    name: str
    args: tuple[Any, ...]
    entries: dict[Any, Any]
    state: Any

    def __new__(cls, *args: Any) -> Record:
        """Note the arguments; a pickle may make an object without `__init__`."""
        record = super().__new__(cls)
        record.args, record.entries, record.state = args, {}, None
        return record

    def __setitem__(self, key: Any, value: Any) -> None:
        self.entries[key] = value

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Describer(pickle._Unpickler):  # type: ignore[name-defined]
    # The unpickler in C would make room for any number of objects that a pickle claims to have.
    def find_class(self, module: str, name: str) -> Any:
        if (full := f"{module}.{name}") not in RECORDED:
            raise ValueError(f"it names {full}, and allowed are {', '.join(sorted(RECORDED))}")
        return type("Record", (Record,), {"name": full})


def records(value: Any) -> Iterator[Record]:
    """Walk through all records in a value, the outer ones first."""
    left, seen = [value], set()
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Record):
            yield value
            left += [value.state, value.entries, *value.args]
        elif isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list | tuple):
            left += value


def read_weights(path: Path) -> Any:
    """Read a torch file or a pickle.

    Returns:
        A torch file's content, tensors on the CPU; of any other pickle plain containers and `Record`s.

    Raises:
        ValueError: No file, one that is broken, or one that names what is not allowed.
    """
    if not path.is_file():
        raise ValueError(f"{path} is no file: pass the path of a checkpoint.")
    old = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)  # how torch's files began before version 1.6
    with path.open("rb") as file:
        start = file.read(len(old))
        if start == old or start.startswith(b"PK\x03\x04"):
            return _read_torch(path, mmap=start != old)
        file.seek(0)
        return _read_pickle(path, file)


def _read_torch(path: Path, mmap: bool) -> Any:
    # Mapped, an optimiser's state, twice the network's size, is never read.
    try:
        with torch.serialization.safe_globals([(SimpleNamespace, "argparse.Namespace")]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a broken file raises what it likes
        name = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it names {name[1]}" if name else str(error).partition("\n")[0]
        raise ValueError(
            f"{path} cannot be read by torch's restricted loader ({reason}): allowed are tensors, plain containers "
            "and the options of a training run (argparse.Namespace)."
        ) from error


def _read_pickle(path: Path, file: BinaryIO) -> Any:
    try:
        return _Describer(file).load()
    except Exception as error:  # likewise
        raise ValueError(
            f"{path} is neither a torch file nor a pickle that can be read safely: {str(error).rstrip('.')}."
        ) from error
