"""Published files that are pickles, read without running anything that they name.

A pickle may name any function and have it called. This is the only module that reads pickles nevertheless:

- A torch file is first read as a description, which must not claim more than the file holds. Each name in it that is on
  a short list becomes something inert, and any other name is refused, so that no class or function is looked up, let
  alone called. The file then goes through torch's restricted loader (`weights_only=True`), with a stand-in for
  `argparse.Namespace`, the options that a training run stores beside its weights.
- Of any other pickle only the texts are read.

What a file costs is bounded by its size: lengths beyond its end are refused before memory is taken for them, and so are
the few ways in which a short pickle can describe something large.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, NamedTuple

import torch

# What torch files may name besides tensors and their storages.
NAMES = {"argparse.Namespace", "collections.OrderedDict", "torch.Size", "torch.device"}
STORAGES = {
    "DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "LongStorage": 8, "IntStorage": 4,
    "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1, "UntypedStorage": 1,
}  # fmt: skip
# What picklers of protocol 2 and later write for numbers, text, containers, names and calls. Byte arrays are left out,
# because they take the memory that they claim.
INSTRUCTIONS = """PROTO FRAME MARK STOP POP NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT
    BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BINSTRING SHORT_BINSTRING
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS EMPTY_SET ADDITEMS
    BINGET LONG_BINGET BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD BINPERSID""".split()
MOST_ARGUMENTS = 16  # of a call, which copies its arguments


class _Inert:
    """Stands for an object that a pickle describes, which is never made."""

    def __new__(cls, *args: Any) -> _Inert:
        return super().__new__(cls)

    def __setitem__(self, key: Any, value: Any) -> None:
        return

    def __setstate__(self, state: Any) -> None:
        return


class _Bounded:
    """A file that refuses to be read beyond its end, before it takes memory for what is not there."""

    def __init__(self, file: BinaryIO):
        self.file = file
        start = file.tell()
        self.left = file.seek(0, os.SEEK_END) - start
        file.seek(start)

    def read(self, count: int) -> bytes:
        if count > self.left:
            raise ValueError(f"it ends where {count:,} more bytes should follow, but only {self.left:,} do")
        self.left -= count
        return self.file.read(count)

    def readline(self) -> bytes:
        line = self.file.readline()
        self.left -= len(line)
        return line


class _Instructions(dict[int, Callable[[Any], None]]):
    def __missing__(self, code: int) -> Callable[[Any], None]:
        raise ValueError(f"it holds the instruction {bytes([code])!r}, which files of networks do not")


def _hashing(load: Callable[[Any], None], keys: slice) -> Callable[[Any], None]:
    """Return an instruction that hashes these members of the stack, and takes only plain ones.

    A pair that holds the same pair twice, and so on many levels deep, is a short pickle whose hash takes for ever.
    """

    def checked(unpickler: Any) -> None:
        if not all(isinstance(key, str | bytes | int | float | None) for key in unpickler.stack[keys]):
            raise ValueError("it has a key that is neither text nor a number")
        load(unpickler)

    return checked


def _calling(load: Callable[[Any], None]) -> Callable[[Any], None]:
    """Return an instruction that calls what is on the stack, with few arguments only."""

    def checked(unpickler: Any) -> None:
        arguments = unpickler.stack[-1]
        if not isinstance(arguments, tuple) or len(arguments) > MOST_ARGUMENTS:
            raise ValueError(f"it has a call without a tuple of at most {MOST_ARGUMENTS} arguments")
        load(unpickler)

    return checked


class _Storage(NamedTuple):
    """A row of numbers in a torch file, in which tensors lie."""

    length: int
    width: int


class _Claims(pickle._Unpickler):  # type: ignore[name-defined]
    """What the pickle in a torch file claims to be there, in `storages` by their keys; its tensors lie in these."""

    # The unpickler in C would make room for any number of objects that a pickle claims to have.
    dispatch = _Instructions(
        {ord(op.code): pickle._Unpickler.dispatch[ord(op.code)]  # type: ignore[attr-defined]
        for op in pickletools.opcodes if op.name in INSTRUCTIONS}
    )  # fmt: skip
    dispatch[pickle.SETITEM[0]] = _hashing(dispatch[pickle.SETITEM[0]], slice(-2, -1))
    dispatch[pickle.SETITEMS[0]] = _hashing(dispatch[pickle.SETITEMS[0]], slice(None, None, 2))
    dispatch[pickle.ADDITEMS[0]] = _hashing(dispatch[pickle.ADDITEMS[0]], slice(None))
    for _code in (pickle.REDUCE[0], pickle.NEWOBJ[0]):
        dispatch[_code] = _calling(dispatch[_code])

    def __init__(self, file: _Bounded):
        super().__init__(file)
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if module in ("torch", "torch.storage") and name in STORAGES:
            return _Storage(0, STORAGES[name])  # it cannot be called
        if full in ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"):
            return _check_tensor
        if full == "torch._utils._rebuild_parameter":
            return lambda tensor, requires_grad, hooks: tensor
        if full == "collections.Counter":  # of a learning rate's schedule
            return dict.copy  # which takes a dictionary and nothing else
        if full in NAMES or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return _Inert
        raise ValueError(f"it names {full}")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage, key, _, count, *view = pid
        if not (isinstance(storage, _Storage) and isinstance(key, str) and isinstance(count, int) and count >= 0):
            raise ValueError("it refers to something other than a storage")
        if kind != "storage" or view not in ([], [None]):
            raise ValueError("it refers to a part of a storage")
        self.storages[key] = claimed = storage._replace(length=count)
        return claimed


def _check_tensor(storage: _Storage, offset: int, size: Sequence[int], stride: Sequence[int], *rest: Any) -> object:
    """Raise `ValueError` where a tensor does not lie inside its storage, since torch would make the storage longer."""
    extent = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1 if all(size) else 0
    if min([offset, *size, *stride]) < 0 or extent > storage.length:
        raise ValueError(f"it has a tensor of {extent:,} numbers in a storage of {storage.length:,}")
    return object()


def texts(path: Path) -> Iterator[str]:
    """Yield the texts and names in a pickle as far as it is whole, and make none of its objects."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for _, argument, _ in pickletools.genops(content):  # type: ignore[arg-type]  # it reads like a file
                if isinstance(argument, str):
                    yield argument
    except ValueError:  # it ends too early, or is not a pickle at all
        return


def read_weights(path: Path) -> Any:
    """Return the content of a torch file, with tensors on the CPU, or None if it is not a torch file.

    Raises:
        ValueError: No file, a broken file, or a file that names what is not allowed.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file: pass the path of a checkpoint.")
    old = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)  # how torch's files began before version 1.6
    with path.open("rb") as file:
        start = file.read(len(old))
    zipped = start.startswith(b"PK\x03\x04")
    if not zipped and start != old:
        return None
    try:
        _check_claims(path, zipped)
        with torch.serialization.safe_globals([(SimpleNamespace, "argparse.Namespace")]):
            # With mapping, an optimiser's state, which is twice the network's size, is never read.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a broken file may raise anything
        name = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it names {name[1]}" if name else str(error).partition("\n")[0]
        raise ValueError(
            f"{path} cannot be read by torch's restricted loader ({reason}): allowed are tensors, plain containers "
            "and the options of a training run (argparse.Namespace)."
        ) from error


def _check_claims(path: Path, zipped: bool) -> None:
    """Raise `ValueError` where a torch file claims more than it holds, since torch would allocate all of it."""
    held = path.stat().st_size
    with path.open("rb") as file:
        if zipped:
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
                if any(entry.compress_type for entry in entries) or sum(entry.file_size for entry in entries) > held:
                    raise ValueError(f"its entries claim more than the {held:,} bytes that it has, or are compressed")
                named = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
                if len(named) != 1:
                    raise ValueError(f"it has {len(named)} pickles where it must have one")
                content = _Claims(_Bounded(io.BytesIO(archive.read(named[0]))))
            content.load()
        else:  # three pickles about the format, then the content, then the keys of the storages that follow
            bounded = _Bounded(file)
            for _ in range(3):
                _Claims(bounded).load()
            content = _Claims(bounded)
            content.load()
            if set(_Claims(bounded).load()) != content.storages.keys():
                raise ValueError("it does not hold the storages that it refers to")
    if sum(length * width for length, width in content.storages.values()) > held:
        raise ValueError(f"its tensors claim more than the {held:,} bytes that it has")
