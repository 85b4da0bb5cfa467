"""What the scripts share: options from YAML, images from a data set, a picture grid."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from datasets import ClassLabel, Dataset, DatasetDict, Image, Value, load_dataset
from PIL import Image as PILImage


def parse_with_config(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse options, those on the command line over those of the YAML file that `--config` names."""
    parser.add_argument("--config", help="YAML file of options; it names only what differs from the defaults.")
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    path = first.parse_known_args(argv)[0].config
    if path is not None:
        if not os.path.isfile(path):
            parser.error(f"--config {path}: there is no such file.")
        options = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        known = {action.dest for action in parser._actions}
        if unknown := sorted(set(options) - known):
            parser.error(f"{path} has unknown options {unknown}; allowed are {sorted(known - {'help', 'config'})}.")
        for action in parser._actions:
            if options.get(action.dest) is not None:
                parser.set_defaults(**{action.dest: _converted(parser, action, options[action.dest])})
                action.required = False
    return parser.parse_args(argv)


def _converted(parser: argparse.ArgumentParser, action: argparse.Action, value: Any) -> Any:
    """Return a YAML value as the command line would have given it: `1e-4`, which YAML reads as text, is a number."""
    if isinstance(value, bool):
        return {True: "yes", False: "no"}[value] if action.choices else value
    if isinstance(value, dict):
        return value
    values = [str(v) for v in value] if isinstance(value, list) else [str(value)]
    try:
        converted = [parser._get_value(action, v) for v in values]
        for v in converted:
            parser._check_value(action, v)
    except argparse.ArgumentError as error:
        parser.error(str(error))
    return converted if action.nargs == "+" else converted[0]


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where images come from."""
    group = parser.add_argument_group("data")
    group.add_argument("--dataset_name", help="Hub id, a local folder, or a parquet file.")
    group.add_argument("--dataset_config_name", help="Configuration of a Hub data set.")
    group.add_argument("--train_data_dir", help="Folder of images; its sub-folders name the classes.")
    group.add_argument("--train_split", default="train", help="Split to train on.")
    group.add_argument("--image_column", help="Column of images; by default the only one that holds images.")
    group.add_argument("--cache_dir", help="Where downloaded data is kept.")
    group.add_argument("--max_train_samples", type=int, help="Use only the first N training images.")


def load_splits(args: argparse.Namespace) -> DatasetDict:
    """Load every split of the data set that the options name."""
    if (args.dataset_name is None) == (args.train_data_dir is None):
        raise SystemExit("Give one of --dataset_name and --train_data_dir.")
    try:
        if args.train_data_dir is not None:
            if not os.path.isdir(args.train_data_dir):
                raise FileNotFoundError("there is no such folder")
            return load_dataset("imagefolder", data_dir=args.train_data_dir, cache_dir=args.cache_dir)
        if os.path.isfile(args.dataset_name):
            return load_dataset("parquet", data_files={args.train_split: args.dataset_name}, cache_dir=args.cache_dir)
        return load_dataset(args.dataset_name, args.dataset_config_name, cache_dir=args.cache_dir)
    except Exception as error:  # the loaders raise a dozen kinds
        source = args.train_data_dir or args.dataset_name
        raise SystemExit(f"The data set {source} cannot be read: {type(error).__name__}: {error}") from error


def pick_split(splits: DatasetDict, name: str, limit: int | None = None) -> Dataset:
    """Return one split, or stop with the names of those there are."""
    if name not in splits:
        raise SystemExit(f"The data set has no split {name!r}; it has {sorted(splits)}.")
    split = splits[name]
    if len(split) == 0:
        raise SystemExit(f"The split {name!r} is empty.")
    return split.select(range(min(limit, len(split)))) if limit else split


def image_column(dataset: Dataset, name: str | None) -> str:
    """Return the column of images, checked by decoding one, or stop with the columns there are."""
    found = [column for column, feature in dataset.features.items() if isinstance(feature, Image)]
    if name is None and len(found) != 1:
        raise SystemExit(f"Name the column of images with --image_column; columns are {dataset.column_names}.")
    column = name or found[0]
    if column not in found:
        raise SystemExit(f"There is no column of images {column!r}; columns are {dict(dataset.features)}.")
    try:
        dataset[0][column].load()
    except Exception as error:  # Pillow raises several kinds
        raise SystemExit(f"The first image of column {column!r} cannot be read: {error}") from error
    return column


def label_column(dataset: Dataset, name: str | None) -> str:
    """Return the column of integer labels, or stop with the columns there are."""
    found = [column for column, feature in dataset.features.items() if isinstance(feature, ClassLabel)]
    column = name or (found[0] if len(found) == 1 else None)
    if column is None:
        raise SystemExit(f"Name the column of labels with --label_column; columns are {dataset.column_names}.")
    feature = dataset.features.get(column)
    if not isinstance(feature, ClassLabel) and not (isinstance(feature, Value) and "int" in feature.dtype):
        raise SystemExit(f"There is no column of integer labels {column!r}; columns are {dict(dataset.features)}.")
    return column


def image_grid(images: Sequence[PILImage.Image], columns: int | None = None, min_side: int = 64) -> PILImage.Image:
    """Return images of one size as one picture, enlarged without smoothing to `min_side` pixels each."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    width, height = images[0].size
    scale = max(1, math.ceil(min_side / max(width, height)))
    width, height = width * scale, height * scale
    rows = math.ceil(len(images) / columns)
    grid = PILImage.new("RGB", (columns * (width + 1) - 1, rows * (height + 1) - 1), "white")
    for i, image in enumerate(images):
        place = (i % columns * (width + 1), i // columns * (height + 1))
        grid.paste(image.convert("RGB").resize((width, height), PILImage.Resampling.NEAREST), place)
    return grid
