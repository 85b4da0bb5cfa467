"""What the files of a data set mean, in a folder of images or of tables (parquet, arrow, csv, json).

Images: splits are the folders `train`, `test` and `validation` right inside; without any of them, all images form the
split `train`. In a split, the first folder on the way to an image is its class; but where these are `images` and
`masks` alone, each image has the mask of the same name, such as `images/a/0.jpg` and `masks/a/0.png`. No other name
means anything.

Tables: a file, or a folder on the way to it, is named after its split: `test.parquet`, `test/0.parquet`, or
`test-00000-of-00001.parquet`, as `push_to_hub` writes them into a folder `data`, where splits may have any name.
Without such names, all files form the split `train`.
"""

from __future__ import annotations

import csv
import glob
import json
import os
import posixpath
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any

import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, load_dataset
from huggingface_hub import metadata_load
from PIL import Image as PILImage

SPLITS = ("train", "validation", "test")
# What other programs take for splits: if all classes have such names, they are probably meant as splits.
LIKE_SPLITS = {"train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation"}
SHARDS = 1024  # of a stream; with one for each image, datasets would take long to begin
WHOLE = re.compile("(0|-?[1-9][0-9]*)?")  # a number, or nothing, in a table of text
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
# Of these kinds, the first that a folder has is read.
KINDS = (".parquet", ".arrow", ".tar", ".jsonl", ".json", ".ndjson", ".csv", ".tsv")
# What programs write beside data.
NOTES = {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
SHARD = re.compile(r"(?P<split>\w+(\.\w+)*)-\d{5}-of-\d{5}\b")
NUMBERED = re.compile(rf"(?P<split>{'|'.join(SPLITS)})([-._ ]?\d+|[-._ ](of|part|shard))*")


def read_source(source: Any, config: str | None, streaming: bool, cache_dir: str | None, tables: bool = True) -> Any:
    """Return every split of a Hub id, a file or a folder; without `tables`, a folder's images are read."""
    loader = source = os.fspath(source)
    files = None
    if os.path.isfile(source) and tables:
        loader = "parquet"
        # datasets takes paths for patterns, in which brackets, stars and question marks have a meaning.
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
    except Exception as error:  # the loaders raise a dozen kinds of errors
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
    if wrong := [image for image in images if not isinstance(image, PILImage.Image | None)]:
        what = f"An object of type {type(wrong[0]).__name__} came among images"
        raise ValueError(
            f"{what}: they must be PIL images, which `Image.fromarray` makes of arrays; or give a path, a data set, or "
            "a mapping of splits."
        )
    found = Dataset.from_dict({"image": images}, Features({"image": Image()}))
    if labels is None:
        return found
    if len(labels) != len(images):
        raise ValueError(f"There are {len(images)} images and {len(labels)} labels: give one for each.")
    return found.add_column("label", labels.tolist() if hasattr(labels, "tolist") else list(labels))


def list_data_files(folder: str) -> list[str]:
    """Return the paths of a folder's tables, relative to it: only one kind is read, and a warning names the rest."""
    found = [path for path in list_folder(folder, KINDS).files if os.path.basename(path) not in NOTES]
    tables = [path for path in found if path.lower().endswith(KINDS)]
    for kind in KINDS:
        if chosen := [path for path in tables if path.lower().endswith(kind)]:
            if others := sorted(set(found) - set(chosen)):
                hint = "; train_data_dir reads a folder's images" if set(others) - set(tables) else ""
                warnings.warn(f"{folder}: its {kind} files are read, not {some(others)}{hint}.", stacklevel=2)
            return chosen
    return []


def states_its_files(folder: str) -> bool:
    """Return whether a folder's card says which file belongs to which split."""
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
        what = f"some files name a split, such as {beside}, and others do not, such as {some(unnamed)}"
        hint = "Name all after their split, like train-00000-of-00001.parquet, or none"
        raise ValueError(f"The data set {folder} can be read in two ways: {what}. {hint}.")
    root = os.path.abspath(folder)
    named = found or {"train": unnamed}
    return {str(name): [glob.escape(os.path.join(root, path)) for path in files] for name, files in named.items()}


def split_of(folder: str, path: str) -> str | None:
    """Return the split that a file's path names, or None; refuse a path where this cannot be told."""
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


@dataclass
class Listing:
    """What lies under a folder, with links followed; paths are relative to it, with `/` between names."""

    files: list[str] = field(default_factory=list)  # images, and tables that were asked for, in order
    metadata: list[str] = field(default_factory=list)  # files named like a table of metadata
    folders: list[str] = field(default_factory=list)  # folders that were entered
    skipped: Counter[str] = field(default_factory=Counter)  # how many other files there are, by extension or in words

    def what_was_skipped(self) -> str:
        """Return how many files were skipped, in all and of each kind."""
        count = self.skipped.total()
        kinds = ", ".join(f"{number} {kind}" for kind, number in self.skipped.most_common())
        return f"skipped {count} file{'s' * (count != 1)}{': ' * bool(count)}{kinds}"


@dataclass
class Split:
    """A split's images; their paths begin with `prefix`, which is empty or names the split's folder."""

    prefix: str
    images: list[str]

    @property
    def folders(self) -> list[str]:
        """The first folder inside the split on the way to each image, empty for images right inside."""
        return ["/".join(path.removeprefix(self.prefix).split("/")[:-1][:1]) for path in self.images]


def list_folder(root: str | os.PathLike[str], tables: Iterable[str] = ()) -> Listing:
    """Return the images that Pillow opens under a folder, and the tables of these extensions, such as `.csv`.

    Hidden files, and links that lead back to where they lie, are skipped.
    """
    found = Listing()
    extensions = {name for name, kind in PILImage.registered_extensions().items() if kind in PILImage.OPEN}
    extensions.update(tables)

    def enter(folder: str, prefix: str, around: tuple[str, ...]) -> None:
        here = os.path.realpath(folder)
        if here in around:
            found.skipped["links to a folder around them"] += 1
            return
        if prefix:
            found.folders.append(prefix.removesuffix("/"))
        with os.scandir(folder) as entries:
            for entry in entries:
                path = prefix + entry.name
                extension = os.path.splitext(entry.name)[1].lower()
                if entry.name.startswith("."):
                    found.skipped["hidden"] += 1
                elif os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                    enter(entry.path, f"{path}/", (*around, here))
                elif entry.is_symlink() and not os.path.exists(entry.path):
                    found.skipped["broken links"] += 1
                elif entry.name in METADATA:
                    found.metadata.append(path)
                elif extension in extensions:
                    found.files.append(path)
                else:
                    found.skipped[extension or "without extension"] += 1

    enter(os.fspath(root), "", ())
    for paths in (found.files, found.metadata, found.folders):
        paths.sort()
    return found


def read_image_folder(folder: str, streaming: bool = False) -> dict[str, Dataset | IterableDataset]:
    """Return the splits of a folder of images: `image`, columns of metadata, and `label` where folders name classes.

    Where the folders are `images` and `masks`, there is `mask` in place of `label`.
    A warning says what is left out. A folder without images, or one that can be read in two ways, is refused.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"The data set {folder} cannot be read: there is no such folder.")
    found = list_folder(folder)
    if not found.files:
        raise ValueError(f"The data set {folder} cannot be read: it has no images; {found.what_was_skipped()}.")
    if found.skipped:
        warnings.warn(f"{folder}: {found.what_was_skipped()}.", stacklevel=2)
    splits = find_splits(folder, found.files)
    masks = take_masks(folder, splits)
    known = join_metadata(folder, found.metadata, splits)
    classes = {} if "label" in known or masks else find_classes(folder, found.folders, splits)
    if "label" in known and not masks and any(any(split.folders) for split in splits.values()):
        warnings.warn(f"{folder}: its metadata gives the labels, not the names of its folders.", stacklevel=2)
    kind = ClassLabel(names=sorted({label for labels in classes.values() for label in labels}))
    datasets = {}
    for name, split in splits.items():
        rows = {column: [values[path] for path in split.images] for column, values in known.items()}
        files = {"image": split.images} | ({"mask": masks[name]} if masks else {})
        root = os.path.abspath(folder)
        paths = {column: [os.path.join(root, path) for path in given] for column, given in files.items()}
        dataset = Dataset.from_dict({**paths, **rows})
        for column in files:
            dataset = dataset.cast_column(column, Image())
        if name in classes:
            dataset = dataset.add_column("label", kind.str2int(classes[name]), feature=kind)
        datasets[name] = stream(dataset) if streaming else dataset
    return datasets


def find_splits(folder: str, images: list[str]) -> dict[str, Split]:
    """Return the images of each split, or refuse where a folder may be a split or a class of that name."""
    first = {path.partition("/")[0] for path in images if "/" in path}
    splits = [f"{name}/" for name in SPLITS if name in first]
    if not splits:
        return {"train": Split("", images)}
    others = [f"{name}/" for name in sorted(first) if f"{name}/" not in splits]
    others += [path for path in images if "/" not in path]
    if others:
        what = f"it has images in {some(splits)}, which name splits, and beside them {some(others)}"
        hint = "Rename what is meant as a split, train/, test/ or validation/, and move away what belongs to none"
        all_classes = "If all are classes, put them into one folder train/."
        raise ValueError(f"The data set {folder} can be read in two ways: {what}. {hint}. {all_classes}")
    return {name[:-1]: Split(name, [path for path in images if path.startswith(name)]) for name in splits}


def take_masks(folder: str, splits: dict[str, Split]) -> dict[str, list[str]]:
    """Return the mask of each image, by split, and take the masks out of the images of splits that have both.

    There are none unless a split consists of folders `images` and `masks`; then each split does, or it is refused, and
    so are images without a mask, masks without an image, and two files of one name.
    """
    kinds = {name: set(split.folders) for name, split in splits.items()}
    if {"images", "masks"} not in kinds.values():
        return {}
    if odd := [name for name, found in kinds.items() if found != {"images", "masks"}]:
        what = f"the split {odd[0]!r} has {some(sorted(kinds[odd[0]]))} in place of them"
        raise ValueError(f"The data set {folder} has folders images/ and masks/, but {what}: give every split both.")
    masks = {}
    for name, split in splits.items():
        files: dict[str, dict[str, str]] = {"images": {}, "masks": {}}
        for path, kind in zip(split.images, split.folders, strict=True):
            stem = os.path.splitext(path.removeprefix(f"{split.prefix}{kind}/"))[0]
            if other := files[kind].get(stem):
                raise ValueError(f"{folder}: {other} and {path} have one name: leave one of them out.")
            files[kind][stem] = path
        for here, there in (("images", "masks"), ("masks", "images")):
            if alone := [path for stem, path in files[here].items() if stem not in files[there]]:
                what = f"{len(alone)} {here} of the split {name!r} have no file of their name in {there}/"
                raise ValueError(f"{folder}: {what}: {some(alone)}.")
        split.images = list(files["images"].values())
        masks[name] = [files["masks"][stem] for stem in files["images"]]
    return masks


def find_classes(folder: str, folders: list[str], splits: dict[str, Split]) -> dict[str, list[str]]:
    """Return the class of each image of those splits in which every image lies in the folder of a class."""
    classes = {}
    for name, split in splits.items():
        labels = split.folders
        if all(labels):
            classes[name] = labels
            inside = {path.removeprefix(split.prefix) for path in folders if path.startswith(split.prefix)}
            if empty := sorted(path for path in inside - set(labels) if "/" not in path):
                warnings.warn(f"{folder}: no images of the split {name!r} are in {some(empty)}.", stacklevel=3)
        elif any(labels):
            loose = [path for path, label in zip(split.images, labels, strict=True) if not label]
            what = f"{folder}: the split {name!r} has no labels, since {len(loose)} of its {len(labels)} images"
            warnings.warn(f"{what} lie in no folder of a class: {some(loose)}.", stacklevel=3)
    names = {label for labels in classes.values() for label in labels}
    if names and {label.lower() for label in names} <= LIKE_SPLITS:
        what = f"{folder}: {some(sorted(names))} are taken for classes"
        warnings.warn(f"{what}. Splits are named train, test and validation.", stacklevel=3)
    return classes


def join_metadata(folder: str, tables: list[str], splits: dict[str, Split]) -> dict[str, dict[str, Any]]:
    """Return what tables of metadata say, by column and image, or refuse tables that do not match the images."""
    rows: dict[str, dict[str, Any]] = {}
    for table in tables:
        place = posixpath.dirname(table)
        if place and f"{place}/" not in {split.prefix for split in splits.values()}:
            raise ValueError(f"{folder}/{table}: metadata is read only right inside {folder} or a split: move it.")
        for row in read_table(os.path.join(folder, table)):
            file_name = row.pop("file_name", None)
            if not isinstance(file_name, str):
                raise ValueError(f"{folder}/{table} has a row without `file_name`, the path of an image: {row}.")
            path = posixpath.normpath(posixpath.join(place, file_name))
            if path in rows:
                raise ValueError(f"{folder}/{table} has a second row for the image {path}: leave one out.")
            rows[path] = row
    if not tables:
        return {}
    images = {path for split in splits.values() for path in split.images}
    alone = {"rows without an image": rows.keys() - images, "images without a row": images - rows.keys()}
    for what, paths in alone.items():
        if paths:
            raise ValueError(f"{folder}: {some(tables)} leaves {len(paths)} {what}, such as {some(sorted(paths))}.")
    columns = {column: None for row in rows.values() for column in row}
    if "image" in columns:
        raise ValueError(f"{folder}: {some(tables)} has a column `image`, which would hide the images: rename it.")
    return {column: {path: row.get(column) for path, row in rows.items()} for column in columns}


def read_table(path: str) -> list[dict[str, Any]]:
    """Return the rows of a table, or refuse a file that is not one."""
    parquet = path.endswith(".parquet")
    try:
        return pq.read_table(path).to_pylist() if parquet else read_text_table(path)
    except (ValueError, csv.Error) as error:  # another encoding, or not such a file at all
        kind = "parquet" if parquet else "a table in UTF-8"
        raise ValueError(f"{path} cannot be read as {kind}: {error}.") from error


def read_text_table(path: str) -> list[dict[str, Any]]:
    """Return the rows of a table in text. Columns of a CSV file are numbers if all values are whole, else text."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        if path.endswith(".jsonl"):
            rows = [json.loads(line) for line in file if line.strip()]
            if not all(isinstance(row, dict) for row in rows):
                raise ValueError(f"{path}: each line must be an object, such as {{'file_name': '0.png', 'size': 3}}.")
            return rows
        reader = csv.DictReader(file)
        rows = list(reader)
    names = reader.fieldnames or []
    # Values without a name stand under the key None, and names without a value have the value None.
    if len(set(names)) < len(names) or any(None in row or None in row.values() for row in rows):
        raise ValueError(f"{path}: every line must have as many values as the first has names, which must all differ.")
    for name in names:
        kind = int if all(WHOLE.fullmatch(row[name]) for row in rows) else str
        for row in rows:
            row[name] = kind(row[name]) if row[name] else None
    return rows


def stream(dataset: Dataset) -> IterableDataset:
    """Return a data set as a stream, in up to `SHARDS` parts that workers share and whose order shuffling changes."""
    files = dataset.cast_column("image", Image(decode=False))
    ends = [len(files) * i // SHARDS for i in range(SHARDS + 1)]
    parts = [range(first, last) for first, last in pairwise(ends) if first < last]
    return IterableDataset.from_generator(_rows, dataset.features, gen_kwargs={"dataset": files, "parts": parts})


def _rows(dataset: Dataset, parts: list[range]) -> Iterator[dict[str, Any]]:
    for index in chain.from_iterable(parts):
        yield dataset[index]


def some(names: list[str], count: int = 3) -> str:
    """Return the first of some names, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
