"""What the scripts share: options, images of a data set, what a network is told of them, pictures."""

from __future__ import annotations

import argparse
import glob
import hashlib
import os
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, Image, IterableDataset, IterableDatasetDict, load_dataset
from torch.utils.data import DataLoader, default_collate
from torch.utils.data import Dataset as TorchDataset

from ddae_hf import DDAEImageProcessor
from ddae_hf.augment import augment, embed_labels, random_flip
from ddae_hf.experiments.classes import (
    columns_of,
    draw_images,
    find_label_column,
    label_column,
    read_labels,
    warn_of_missing,
    with_classes,
)
from ddae_hf.experiments.data_files import list_data_files, split_files, states_its_files
from ddae_hf.experiments.devices import fast_layout
from ddae_hf.experiments.image_folder import read_image_folder
from ddae_hf.experiments.pixels import Pixels, scaled
from ddae_hf.labels import drop_labels
from ddae_hf.networks import network_of
from ranges import check_ranges


def parse_with_config(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse options, those on the command line over those of the YAML file that `--config` names.

    Options are spelt out: argparse would take `--conf FILE` for `--config`, whose options had then been left out.
    """
    parser.allow_abbrev = False
    parser.add_argument(
        "--config", help="YAML file of options; it names only what differs from `base` and the defaults."
    )
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    path = first.parse_known_args(argv)[0].config
    if path is not None:
        options = read_config(Path(path))
        known = {action.dest for action in parser._actions}
        if unknown := sorted(set(options) - known):
            parser.error(f"{path} has unknown options {unknown}; allowed are {sorted(known - {'help', 'config'})}.")
        for action in parser._actions:
            if options.get(action.dest) is not None:
                parser.set_defaults(**{action.dest: _converted(parser, action, options[action.dest])})
                action.required = False
    args = parser.parse_args(argv)
    check_ranges(parser, args)
    return args


def read_config(path: Path, inside: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return a YAML file's options over those of the files beside it that its `base` names, later ones first.

    A mapping (`denoiser`, `scheduler`) is merged with the base's, unless it names another class.
    """
    if path in inside or not path.is_file():
        what = "names itself as its base" if path in inside else "there is no such file"
        raise SystemExit(f"{path}: {what}{f' (named as the base of {inside[-1]})' if inside else ''}.")
    own = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if not isinstance(own, dict):
        raise SystemExit(f"{path} must hold options, `name: value`, and holds a {type(own).__name__}.")
    bases = own.pop("base", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    options: dict[str, Any] = {}
    for layer in [*(read_config(path.parent / name, (*inside, path)) for name in bases), own]:
        for name, value in layer.items():
            old = options.get(name)
            merged = isinstance(old, dict) and isinstance(value, dict)
            if merged and value.get("_class_name", old.get("_class_name")) == old.get("_class_name"):
                value = {**old, **value}
            options[name] = value
    return options


def _converted(parser: argparse.ArgumentParser, action: argparse.Action, value: Any) -> Any:
    """Return a YAML value as the command line would have given it: `1e-4`, which YAML reads as text, is a number."""
    flag = isinstance(action, (argparse.BooleanOptionalAction, argparse._StoreTrueAction))
    if isinstance(value, bool) and action.choices:
        return "yes" if value else "no"
    if flag != isinstance(value, bool):
        parser.error(f"{action.dest} is {value!r}: allowed {'are true and false' if flag else 'is no true or false'}.")
    if flag:
        return value
    if isinstance(value, dict):
        return value
    values = [str(v) for v in value] if isinstance(value, list) else [str(value)]
    if len(values) != (action.nargs or 1) and action.nargs != "+":
        parser.error(f"{action.dest} is {value!r}: it takes {action.nargs or 1} value(s).")
    try:
        converted = [parser._get_value(action, v) for v in values]
        for v in converted:
            parser._check_value(action, v)
    except argparse.ArgumentError as error:
        parser.error(str(error))
    return converted if action.nargs else converted[0]


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where images come from."""
    group = parser.add_argument_group("data")
    group.add_argument("--dataset_name", help="Hub id, a local folder, or a parquet file.")
    group.add_argument("--dataset_config_name", help="Configuration of a Hub data set.")
    group.add_argument("--train_data_dir", help="Folder of images; its sub-folders name classes, or splits.")
    group.add_argument("--train_split", default="train", help="Split to train on.")
    group.add_argument("--image_column", help="Column of images; by default the only one that holds images.")
    group.add_argument("--label_column", help="Column of labels; by default the only one of classes.")
    group.add_argument("--cache_dir", help="Where downloaded data is kept.")
    group.add_argument(
        "--max_train_samples", type=int,
        help="Use N training images of all classes, always the same ones; of a stream the first N.",
    )  # fmt: skip


def add_center_crop_argument(parser: argparse.ArgumentParser, default: bool | None = True) -> None:
    """Add the option that says how images of another shape than the network's are prepared."""
    parser.add_argument(
        "--center_crop", action=argparse.BooleanOptionalAction, default=default,
        help="Resize images of another shape in their proportions and cut out the centre (the default); "
        "--no-center_crop squashes them.",
    )  # fmt: skip


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how training images are changed, and what a network is told of them."""
    group, flag = parser.add_argument_group("inputs"), argparse.BooleanOptionalAction
    group.add_argument("--random_flip", action=flag, default=False, help="Mirror half of the images.")
    group.add_argument("--augment", type=float, default=0.0, help="Probability of EDM's augmentations, such as 0.12.")
    group.add_argument("--class_conditional", action=flag, default=False, help="Tell the network each image's class.")
    group.add_argument("--label_dropout", type=float, default=0.1, help="How often it is told the null class instead.")


def add_loading_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how training images are read."""
    group = parser.add_argument_group("loading")
    group.add_argument(
        "--dataloader_num_workers", type=int, default=0,
        help="Processes that decode images, anew in each epoch; with 0 images that fit into memory are decoded once.",
    )  # fmt: skip
    group.add_argument(
        "--streaming", action=argparse.BooleanOptionalAction, default=False,
        help="Read images while training, without ever downloading or holding the whole data set.",
    )  # fmt: skip
    group.add_argument(
        "--shuffle_buffer", type=int, default=10000, help="Images of a stream among which the next one is drawn."
    )


def check_loading_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Stop at options of `add_loading_arguments` that cannot work."""
    if args.streaming and args.max_train_steps is None:
        parser.error("--streaming needs --max_train_steps: how many images an epoch has is not known.")
    if args.streaming and args.max_train_samples and args.dataloader_num_workers > 1:
        parser.error("--max_train_samples: workers share a stream's files, none knows its first N: take one.")


def check_input_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Stop at options of `add_input_arguments` that cannot work."""
    if args.augment and (args.random_flip or args.class_conditional):
        other = "--random_flip" if args.random_flip else "--class_conditional"
        parser.error(f"--augment mirrors images itself, and takes the place of a class: leave out {other}.")
    if args.class_conditional and args.label_dropout in (0, 1):
        parser.error(
            f"--label_dropout is {args.label_dropout:g}: the network must see both its classes and the null class."
        )


def load_splits(args: argparse.Namespace, streaming: bool = False) -> DatasetDict | IterableDatasetDict:
    """Load every split of the data set that the options name; as streams, they are read when they are iterated."""
    if (args.dataset_name is None) == (args.train_data_dir is None):
        latents = " (or --latents_dir alone)" if hasattr(args, "latents_dir") else ""
        raise SystemExit(f"Give one of --dataset_name and --train_data_dir{latents}.")
    options = {"cache_dir": args.cache_dir, "streaming": streaming}
    try:
        if args.train_data_dir is not None:
            return read_image_folder(args.train_data_dir, streaming)
        if os.path.isfile(args.dataset_name):
            # datasets takes paths for patterns, in which brackets, stars and question marks mean something.
            files = glob.escape(os.path.abspath(args.dataset_name))
            return load_dataset("parquet", data_files={args.train_split: files}, **options)
        if os.path.isdir(args.dataset_name) and not states_its_files(args.dataset_name):
            return load_folder(args.dataset_name, args.dataset_config_name, options)
        return load_dataset(args.dataset_name, args.dataset_config_name, **options)
    except Exception as error:  # the loaders raise a dozen kinds
        source = args.train_data_dir or args.dataset_name
        raise SystemExit(f"The data set {source} cannot be read: {type(error).__name__}: {error}") from error


def load_folder(folder: str, config: str | None, options: dict[str, Any]) -> DatasetDict | IterableDatasetDict:
    """Load every split of a local folder: of its tables or, where it has none, of its images."""
    if config is not None:
        raise SystemExit(f"{folder} has no card that names configurations: leave out --dataset_config_name {config}.")
    if paths := list_data_files(folder):
        return load_dataset(folder, data_files=split_files(folder, paths), **options)
    return read_image_folder(folder, options["streaming"])


def pick_split(
    splits: DatasetDict | IterableDatasetDict,
    name: str,
    limit: int | None = None,
    label_column: str | None = None,
    labels: np.ndarray | None = None,
) -> Any:
    """Return one split, or so many of its images as `draw_images` chooses, or stop with the names of those there are.

    Classes are those of the column of labels, if there is one, or `labels` (N,). A stream gives its first images.
    """
    if name not in splits:
        raise SystemExit(f"The data set has no split {name!r}; it has {sorted(splits)}.")
    split = splits[name]
    if limit is not None and limit < 1:
        raise SystemExit(f"{limit} images of the split {name!r} are asked for: it must be at least 1.")
    if isinstance(split, IterableDataset):
        if limit:
            warnings.warn(
                f"The first {limit} images of the stream {name!r} are taken, whatever their classes.", stacklevel=2
            )
        return split.take(limit) if limit else split
    if len(split) == 0:
        raise SystemExit(f"The split {name!r} is empty.")
    if limit is None or limit >= len(split):
        return split
    if labels is None:
        column = find_label_column(split, label_column)
        labels = len(split) if column is None else split[column][:]
    return split.select(draw_images(labels, limit))


def image_column(dataset: Dataset | IterableDataset, name: str | None) -> str:
    """Return the column of images, checked by decoding one, or stop with the columns there are."""
    features = columns_of(dataset)
    found = [column for column, feature in features.items() if isinstance(feature, Image)]
    if name is None and len(found) != 1:
        raise SystemExit(f"Name the column of images with --image_column; columns are {list(features)}.")
    column = name or found[0]
    if column not in found:
        raise SystemExit(f"There is no column of images {column!r}; columns are {dict(features)}.")
    try:
        for row in dataset.select_columns([column]).take(1):
            row[column].load()
            return column
    except Exception as error:  # Pillow raises several kinds
        raise SystemExit(f"The first image of column {column!r} cannot be read: {error}") from error
    raise SystemExit("The stream is empty.")
    return column


def images_hash(dataset: Dataset, column: str) -> str:
    """Return a SHA-256 of a data set's image files, in its order."""
    digest = hashlib.sha256()
    for batch in dataset.select_columns(column).cast_column(column, Image(decode=False)).iter(1000):
        for image in batch[column]:
            content = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
            digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def load_training_images(args: argparse.Namespace) -> tuple[Dataset | IterableDataset, int]:
    """Return the training images, a data set of `image` and, where classes are used, `labels`; and how many classes."""
    splits = load_splits(args, args.streaming)
    split = args.train_split
    whole = pick_split(splits, split)
    columns = {}
    names = []
    if args.class_conditional:
        column = label_column(whole, args.label_column)
        columns["labels"] = column
        if not args.streaming:
            whole = with_classes(whole, column)
        elif not isinstance(whole.features[column], ClassLabel):
            raise SystemExit("A stream's column of labels must name its classes (ClassLabel): leave out --streaming.")
        names = whole.features[column].names
    dataset = pick_split({split: whole}, split, args.max_train_samples, args.label_column)
    columns["image"] = image_column(dataset, args.image_column)
    dataset = dataset.select_columns(list(columns.values()))
    dataset = dataset.rename_columns({old: new for new, old in columns.items() if old != new})
    if names and not args.streaming:
        warn_of_missing(names, {split: read_labels(dataset, "labels")})
    return dataset, len(names)


def check_stream(args: argparse.Namespace, stream: IterableDataset, processes: int) -> None:
    """Stop if a stream may be too short for an epoch to have a batch for every process.

    What does not fill a batch is dropped, by each worker of its own part.
    """
    needed = args.train_batch_size * (processes + max(args.dataloader_num_workers, 1) - 1)
    found = sum(1 for _ in stream.cast_column("image", Image(decode=False)).take(needed))
    if found < needed:
        raise SystemExit(
            f"The stream has {found} images: --train_batch_size {args.train_batch_size}, {processes} processes and "
            f"{args.dataloader_num_workers} workers need {needed}. Lower one of them."
        )


def collate(processor: DDAEImageProcessor, num_classes: int, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Return a batch: `pixel_values` (B, C, H, W), and `labels` (B,) where there are classes."""
    batch = {"pixel_values": processor([row["image"] for row in rows], return_tensors="pt")["pixel_values"]}
    if num_classes:
        labels = [row["labels"] for row in rows]
        if wrong := [label for label in labels if label is None or not 0 <= label < num_classes]:
            raise ValueError(f"An image has the label {wrong[0]}: allowed are 0 to {num_classes - 1}.")
        batch["labels"] = torch.tensor(labels)
    return batch


class ImageBatches(TorchDataset):
    """Whole batches of `pixel_values` (B, C, H, W), which `scaled` makes floats, and of `labels` (B,), if any."""

    def __init__(self, pixels: Pixels, labels: np.ndarray | None = None):
        self.pixels, self.labels = pixels, None if labels is None else torch.from_numpy(labels)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """Return the batch of the images at `indices`."""
        batch = {"pixel_values": self.pixels.read(indices)}
        return batch if self.labels is None else batch | {"labels": self.labels[indices]}


def whole(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a batch that needs no putting together."""
    return batch


def training_batches(
    args: argparse.Namespace, dataset: Dataset | IterableDataset, denoiser: Any, num_classes: int
) -> DataLoader:
    """Return shuffled batches: of images `ImageBatches`, of a stream's as `collate` makes them, of latents as they are.

    A stream is shuffled anew in every epoch.
    """
    processor = DDAEImageProcessor.for_denoiser(denoiser.config, do_center_crop=args.center_crop)
    put_together = default_collate
    streaming = isinstance(dataset, IterableDataset)
    if streaming:
        dataset = dataset.shuffle(seed=args.seed, buffer_size=args.shuffle_buffer)
        put_together = partial(collate, processor, num_classes)
    elif "image" in dataset.column_names:
        # Workers have memory of their own, in which each would keep what it happens to decode.
        pixels = Pixels(dataset, "image", processor, keep=args.dataloader_num_workers == 0)
        dataset = ImageBatches(pixels, read_labels(dataset, "labels") if num_classes else None)
        put_together = whole
    return DataLoader(
        dataset,
        batch_size=args.train_batch_size,
        shuffle=not streaming,
        drop_last=streaming or len(dataset) >= args.train_batch_size,
        num_workers=args.dataloader_num_workers,
        persistent_workers=args.dataloader_num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        collate_fn=put_together,
    )


def training_inputs(
    args: argparse.Namespace, batch: dict[str, torch.Tensor], network: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return clean images as floats, augmented if asked for, and what the network is told of them."""
    pixels, labels = batch["pixel_values"], batch.get("labels")
    pixels = pixels.to(memory_format=fast_layout(pixels.device))
    clean = scaled(pixels, DDAEImageProcessor.for_denoiser(network.config))
    if args.augment:
        clean, numbers = augment(clean, args.augment)
        return clean, embed_labels(numbers, network_of(network).vector_width(network))
    if labels is not None:
        null_class = network_of(network).num_labels(network.config) - 1
        labels = drop_labels(labels, null_class, args.label_dropout)
    return random_flip(clean) if args.random_flip else clean, labels
