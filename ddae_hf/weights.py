"""The weights of a checkpoint: their files, with variants and shards, and the names and values of their tensors.

Weights are one file, or several with an index; the name of a variant is part of their names
(`model.fp16.safetensors`). Only safetensors are read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import is_offline_mode
from safetensors import SafetensorError, safe_open
from transformers.utils.hub import cached_file

from .building import short
from .cut import uncompiled

# The arguments of `from_pretrained` that say where files are, and those that also say how they are opened.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
LOADING_ARGUMENTS = (*HUB_ARGUMENTS, "variant", "dtype", "torch_dtype", "use_safetensors")

HEAD_FILE = "head.safetensors"
WHOLE_FILE = "model.safetensors"
DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"
COMPILED = "_orig_mod."  # what `torch.compile` puts into the names of a network's tensors
BELOW = ".base_layer."  # what peft puts into the names of the tensors of a layer that has adapters
ADAPTER = ".lora_"  # and what the names of the adapters' own tensors have


def plain_state(state: torch.nn.Module | Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a network's tensors, or a state dict, under the names that they have where nothing is compiled."""
    tensors = state.state_dict() if isinstance(state, torch.nn.Module) else state
    return {name.replace(COMPILED, ""): value for name, value in tensors.items()}


def base_state(state: torch.nn.Module | Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a network's tensors, or a state dict, as they were before the network got adapters."""
    tensors = plain_state(state).items()
    return {name.replace(BELOW, "."): value for name, value in tensors if ADAPTER not in name}


@contextmanager
def uncompiled_names(network: torch.nn.Module) -> Iterator[None]:
    """Let a network with compiled parts save its tensors under the names that they have uncompiled."""

    def rename(module: Any, found: dict[str, torch.Tensor], *args: Any) -> None:
        for name in list(found):  # renaming all of them keeps their order
            found[name.replace(COMPILED, "")] = found.pop(name)

    handle = uncompiled(network).register_state_dict_post_hook(rename)
    try:
        yield
    finally:
        handle.remove()


def fingerprint(*modules: torch.nn.Module | None, dtype: torch.dtype | None = torch.bfloat16) -> str:
    """Return a SHA-256 of networks' parameters and persistent buffers; None stands for a network that is not there.

    Values are rounded to `dtype` first: with bfloat16, storing a checkpoint in bfloat16 leaves the hash the same. None
    takes values as they are, so that no two networks share a hash.
    """
    digest = hashlib.sha256()
    for module in modules:
        for name, value in sorted(plain_state(module).items()) if module is not None else []:
            if dtype is not None and value.is_floating_point():
                value = value.to(dtype)
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def refuse_missing(where: str, what: str, expected: Iterable[str], found: Iterable[str]) -> None:
    """Raise `ValueError`, with some of their names, if expected tensors are not among those found."""
    expected = list(expected)
    if missing := sorted(set(expected) - set(found)):
        names = ", ".join(missing[:4]) + (", ..." if len(missing) > 4 else "")
        raise ValueError(
            f"{where} lacks {len(missing)} of the {len(expected)} tensors of its {what}: {names}. Its weights are "
            "incomplete, or its config.json describes another network: save or download it again."
        )


def refuse_unexpected(where: str, what: str, unexpected: Iterable[str]) -> None:
    """Raise `ValueError`, with some of their names, if there are tensors that a network has no place for."""
    if found := sorted(unexpected):
        names = ", ".join(found[:4]) + (", ..." if len(found) > 4 else "")
        raise ValueError(
            f"{where} has {len(found)} tensors that its {what} has no place for: {names}. Its config.json, or the "
            "configuration that was given, describes another network."
        )


def refuse_other_shapes(
    where: str, what: str, expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise `ValueError`, with one of their names, if stored tensors have other shapes than a network's."""
    if other := sorted(name for name, shape in expected.items() if stored[name] != shape):
        name = other[0]
        raise ValueError(
            f"{where} has {len(other)} tensors of its {what} in other shapes than its config describes: {name} is "
            f"{list(stored[name])} there, and {list(expected[name])} by the config. One of the two files is not the "
            "one that was saved: save or download it again."
        )


def where_files_are(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that say where files are, without empty ones."""
    return {name: value for name, value in arguments.items() if name in HUB_ARGUMENTS and value not in (None, "")}


def inside(hub: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """Return where the files of a sub-folder are."""
    return {**hub, "subfolder": "/".join(part for part in (hub.get("subfolder"), folder) if part)}


def location(path: str | os.PathLike[str], **hub: Any) -> tuple[str, str, str | None]:
    """Return what identifies the place of a checkpoint: two paths to one folder give the same."""
    folder = hub.get("subfolder") or ""
    if os.path.isdir(path):
        return os.path.realpath(os.path.join(path, folder)), "", None
    return os.fspath(path), folder, hub.get("revision")


def find_file(path: str | os.PathLike[str], filename: str, **hub: Any) -> str | None:
    """Return the local path of a checkpoint's file, downloaded if need be, or None where it has no such file."""
    path = os.fspath(path)
    if not os.path.isdir(path) and (os.path.exists(path) or os.path.isabs(path) or path.count("/") > 1):
        raise OSError(f"{path} is not a folder; give a checkpoint's folder or a Hub repository id (`owner/name`).")
    return cached_file(path, filename, _raise_exceptions_for_missing_entries=False, **where_files_are(hub))


def read_json(path: str, filename: str, hub: dict[str, Any]) -> dict[str, Any] | None:
    """Return the object that a checkpoint's JSON file holds, or None where it has no such file.

    Raises:
        ValueError: A file that is damaged, or that holds something other than an object.
    """
    found = find_file(path, filename, **hub)
    if found is None:
        return None
    try:
        with open(found, encoding="utf-8") as file:
            content = json.load(file, object_hook=_as_float)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{found} is damaged, and cannot be read as JSON ({error}): restore it.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{found} holds {short(content)}, where a JSON object belongs: restore it.")
    if content.get("quantization_config") is not None:
        raise ValueError(f"{found} describes quantised weights, which are not supported: save it in full precision.")
    return content


def _as_float(entry: dict[str, Any]) -> Any:
    """Return the number that transformers writes as `{"__float__": "-Infinity"}`; any other object as it is."""
    return float(entry["__float__"]) if entry.keys() == {"__float__"} else entry


def refuse_offline(what: str, path: str, hub: dict[str, Any]) -> None:
    """Raise `OSError` if a repository's files may seem to be missing only because the Hub is not asked."""
    if not os.path.isdir(path) and (hub.get("local_files_only") or is_offline_mode()):
        revision = f" at revision {hub['revision']}" if hub.get("revision") else ""
        raise OSError(
            f"{what} of {path}{revision} is not in the Hub's cache (nor is there such a folder), and the Hub is not "
            "asked in offline mode."
        )


def with_variant(name: str, variant: str | None) -> str:
    """Return the name of a variant's file of weights, or of its index, as transformers and diffusers write it."""
    stem, _, ending = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{ending}"


def weight_files(path: str, name: str, hub: dict[str, Any], *wanted: str | None) -> tuple[list[str], str | None]:
    """Return the local paths of safetensors weights, and their variant: the first of the `wanted` ones that exists.

    Raises:
        ValueError: None of them, two sets that cannot be told apart, or missing shards.
    """
    for variant in wanted:
        if files := _find_weights(path, name, hub, variant):
            return files, variant
    wanted_file = with_variant(name, wanted[-1])
    refuse_offline(wanted_file, path, hub)
    known = ", ".join(_variants(path, name, hub["subfolder"]))
    there = f" (available variants: {known})" if known else ""
    raise ValueError(
        f"{path} has no {wanted_file} in {hub['subfolder'] or 'its root'}{there}. Only safetensors weights are "
        "read, never pickles (`.bin`): convert them with diffusers' `save_pretrained(safe_serialization=True)`."
    )


def _find_weights(path: str, name: str, hub: dict[str, Any], variant: str | None) -> list[str]:
    """Return the local paths of weights: one file, its shards, or nothing."""
    single = find_file(path, with_variant(name, variant), **hub)
    index_file = with_variant(f"{name}.index.json", variant)
    index = read_json(path, index_file, hub)
    if index is None:
        return [] if single is None else [single]
    shards = _shards(path, index_file, index)
    found = [find_file(path, shard, **hub) for shard in shards]
    if single is not None:
        if None not in found:
            raise ValueError(
                f"{path} has weights twice: {os.path.basename(single)}, and those that {index_file} names."
                " Nothing says which were saved last: delete the older ones."
            )
        return [single]
    if missing := [shard for shard, file in zip(shards, found, strict=True) if file is None]:
        refuse_offline(missing[0], path, hub)
        raise ValueError(f"{path} lacks {missing[0]}, which {index_file} names: download it again.")
    return [file for file in found if file is not None]


def _shards(path: str, index_file: str, index: Mapping[str, Any]) -> list[str]:
    """Return the names of the files that an index of weights names; it may name only files beside itself."""
    names = index.get("weight_map")
    shards = list(names.values()) if isinstance(names, dict) else []
    wrong = [name for name in shards if not isinstance(name, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", name)]
    if wrong or not shards or not isinstance(index.get("metadata"), dict):
        said = f"names {short(wrong[0])} as a file of weights" if wrong else "does not say which file has which tensor"
        raise ValueError(f"{path} is damaged: its {index_file} {said}. It must name safetensors files beside itself.")
    return sorted(set(shards))


def _variants(path: str, name: str, subfolder: str) -> list[str]:
    """Return the variants of weights that a folder holds; a repository is not asked for its own."""
    stem = re.escape(name.removesuffix(".safetensors"))
    pattern = re.compile(
        rf"{stem}\.(?:([^.]+?)(?:-\d{{5}}-of-\d{{5}})?\.safetensors|safetensors\.index\.([^.]+)\.json)"
    )
    folder = Path(path, subfolder)
    found = (pattern.fullmatch(file.name) for file in (folder.iterdir() if folder.is_dir() else ()))
    return sorted({match[1] or match[2] for match in found if match})


@contextmanager
def open_weights(file: str) -> Iterator[Any]:
    """Give an open file of safetensors, or raise `ValueError` if it is none or was cut short."""
    try:
        opened = safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"{file} cannot be read: {error}. It is no file of safetensors, or is not whole: save or download it again."
        ) from error
    with opened as tensors:
        yield tensors


def tensor_names(files: Iterable[str]) -> Iterator[str]:
    """Yield the names of the tensors in files."""
    for file in files:
        with open_weights(file) as tensors:
            yield from tensors.keys()


def tensor_shapes(files: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors in files, by their names."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with open_weights(file) as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return shapes


def names_of_part(part: str, files: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield the names of a part's tensors, its adapters left out, in its network and in the files of a whole model."""
    for key in tensor_names(files):
        prefix, _, name = key.replace(COMPILED, "").partition(f"{part}.")
        if prefix in ("", "ddae.") and name and ADAPTER not in name:
            yield name.replace(BELOW, "."), key


def stored_dtype(file: str) -> torch.dtype:
    """Return the type of the floating-point tensors in a file."""
    with open_weights(file) as tensors:
        dtypes = (tensors.get_tensor(key).dtype for key in tensors.keys())  # noqa: SIM118 (not a mapping)
        return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)


@contextmanager
def replaced_weights(folder: str | os.PathLike[str], name: str, variant: str | None = None) -> Iterator[None]:
    """Let what is saved inside replace a folder's weights, also where one file replaces shards, or the reverse.

    transformers and diffusers overwrite only the same kind and leave the other, which would be the one that opens.
    """
    files = [Path(folder, with_variant(each, variant)) for each in (name, f"{name}.index.json")]
    before = [_stamp(file) for file in files]
    yield
    written = [stamp is not None and stamp != old for stamp, old in zip(map(_stamp, files), before, strict=True)]
    if any(written):
        for file, is_new in zip(files, written, strict=True):
            if not is_new:
                file.unlink(missing_ok=True)


def _stamp(file: Path) -> tuple[int, int, int] | None:
    if not file.exists():
        return None
    stat = file.stat()
    return stat.st_mtime_ns, stat.st_ino, stat.st_size


def head_metadata(head: str) -> dict[str, str]:
    """Return what a classifier without its denoiser says of its base: `base`, `revision`, `fingerprint`."""
    with open_weights(head) as tensors:
        return dict(tensors.metadata() or {})
