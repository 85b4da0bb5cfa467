"""What a data set is read from; of a local folder of tables (parquet, arrow, csv, json), which file is of which split.

The name of a file or of a folder on its way is that of its split: `test.parquet`, `test/0.parquet`, or
`test-00000-of-00001.parquet` as `push_to_hub` writes them, into a folder `data` with splits of any name. With no such
names, all files are the split `train`.
"""

from __future__ import annotations

import glob
import os
import re
import warnings
from collections.abc import Iterable
from typing import Any

from datasets import Dataset, Features, Image, IterableDataset, load_dataset
from huggingface_hub import metadata_load
from PIL import Image as PILImage

from .image_folder import LIKE_SPLITS, SPLITS, image_extensions, list_folder, read_image_folder, some

# The first kind that a folder has is what is read.
KINDS = (".parquet", ".arrow", ".tar", ".jsonl", ".json", ".ndjson", ".csv", ".tsv")
# What programs write beside data.
NOTES = {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
SHARD = re.compile(r"(?P<split>\w+(\.\w+)*)-\d{5}-of-\d{5}\b")
NUMBERED = re.compile(rf"(?P<split>{'|'.join(SPLITS)})([-._ ]?\d+|[-._ ](of|part|shard))*")


def list_data_files(folder: str) -> list[str]:
    """Return the tables of a folder, relative to it: those of one kind, with a warning of what else is left out."""
    found = list_folder(folder, {*KINDS, *image_extensions()}).files
    found = [path for path in found if os.path.basename(path) not in NOTES]
    tables = [path for path in found if path.lower().endswith(KINDS)]
    for kind in KINDS:
        if chosen := [path for path in tables if path.lower().endswith(kind)]:
            if others := sorted(set(found) - set(chosen)):
                hint = "; train_data_dir reads a folder's images" if set(others) - set(tables) else ""
                warnings.warn(f"{folder}: read are its {kind} files, not {some(others)}{hint}.", stacklevel=2)
            return chosen
    return []


def states_its_files(folder: str) -> bool:
    """Return whether a folder's card says which file is of which split."""
    card = os.path.join(folder, "README.md")
    known = metadata_load(card) if os.path.isfile(card) else None
    return bool(known and known.get("configs")) or os.path.isfile(os.path.join(folder, ".huggingface.yaml"))


def split_files(folder: str, paths: list[str]) -> dict[str, list[str]]:
    """Return the files of each split as patterns that match them alone, or refuse where a name may mean two things."""
    found: dict[str | None, list[str]] = {}
    for path in paths:
        found.setdefault(split_of(folder, path), []).append(path)
    unnamed = found.pop(None, [])
    if found and unnamed:
        beside = some([path for paths in found.values() for path in paths])
        what = f"The data set {folder} can be read in two ways: beside {beside}, no split is named by {some(unnamed)}"
        raise ValueError(f"{what}. Name all after their split, such as train-00000-of-00001.parquet, or none.")
    root = os.path.abspath(folder)
    named = found or {"train": unnamed}
    return {str(name): [glob.escape(os.path.join(root, path)) for path in files] for name, files in named.items()}


def split_of(folder: str, path: str) -> str | None:
    """Return the split that a file's path names, nothing where it names none, or refuse where that cannot be told."""
    *folders, name = path.split("/")
    stem = os.path.splitext(name)[0]
    shard = SHARD.match(stem)
    numbered = NUMBERED.fullmatch(stem)
    named = {part for part in folders if part in SPLITS}
    if numbered:
        named.add(numbered["split"])
    if shard and (shard["split"] in SPLITS or (folders == ["data"] and not named)):
        named.add(shard["split"])
    if len(named) == 1:
        return named.pop()
    words = {word.lower() for part in (*folders, stem) for word in re.split(r"[-._ 0-9]+", part)}
    if named or words & LIKE_SPLITS:
        what = f"The data set {folder} can be read in two ways: the split of {path} cannot be told from its name"
        names = "Name it like train.parquet or train-00000-of-00001.parquet, or put it into a folder train/"
        raise ValueError(f"{what}. {names} (likewise test and validation), or give the path of one file.")
    return None


def read_source(source: Any, config: str | None, streaming: bool, cache_dir: str | None, tables: bool = True) -> Any:
    """Return every split of a Hub id, a file or a folder; without `tables`, of a folder's images."""
    loader = source = os.fspath(source)
    files = None
    if os.path.isfile(source) and tables:
        loader = "parquet"
        # datasets takes paths for patterns, in which brackets, stars and question marks mean something.
        files = {"train": [glob.escape(os.path.abspath(source))]}
    elif not tables or (os.path.isdir(source) and not states_its_files(source)):
        if tables and config is not None:
            raise ValueError(f"{source} has no card that names configurations: leave out {config!r}.")
        paths = list_data_files(source) if tables else []
        if not paths:
            return read_image_folder(source, streaming)
        files = split_files(source, paths)
    try:
        return load_dataset(loader, config, data_files=files, cache_dir=cache_dir, streaming=streaming)
    except Exception as error:  # the loaders raise a dozen kinds
        raise ValueError(f"The data set {source} cannot be read: {type(error).__name__}: {error}") from error


def in_memory(part: Any) -> Dataset | IterableDataset:
    """Return a split that came as an object: a data set, a list of images, or a pair of images and labels."""
    if isinstance(part, (Dataset, IterableDataset)):
        return part
    images, labels = part if isinstance(part, tuple) and len(part) == 2 else (part, None)
    alone = images is None or (isinstance(part, tuple) and len(part) != 2)
    if alone or not (labels is None or hasattr(labels, "__len__")):
        what = f"type {type(part if alone else labels).__name__} came as {'images' if alone else 'labels'}"
        allowed = "a path, a data set, a list of images, a pair (images, labels), or a mapping of splits"
        raise ValueError(f"An object of {what}: give {allowed}.")
    if isinstance(images, (Dataset, IterableDataset)):
        raise ValueError("labels came beside a data set: name its column of labels, label_column.")
    images = list(images) if isinstance(images, Iterable) else [images]
    fine = (PILImage.Image,) if part is None else (PILImage.Image, type(None))
    if wrong := [image for image in images if not isinstance(image, fine)]:
        what = f"An object of type {type(wrong[0]).__name__} came among images"
        raise ValueError(f"{what}: they must be PIL images; or give a path, a data set, or a mapping of splits.")
    found = Dataset.from_dict({"image": images}, Features({"image": Image()}))
    if labels is None:
        return found
    if len(labels) != len(images):
        raise ValueError(f"There are {len(images)} images and {len(labels)} labels: give one for each.")
    return found.add_column("label", labels.tolist() if hasattr(labels, "tolist") else list(labels))
