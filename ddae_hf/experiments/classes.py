"""The classes of a data set: which column says them, their names and numbers, and drawing images of all of them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value

LABELS = r"u?int\d+|(large_)?string"  # types of columns that may say classes
NAMED = 10  # classes that a warning names


def columns_of(dataset: Dataset | IterableDataset) -> Features:
    """Return what the columns hold, or stop at a stream that does not say it."""
    if dataset.features is None:
        raise SystemExit("The data set does not say what its columns hold, so it cannot be streamed: leave that out.")
    return dataset.features


def find_label_column(dataset: Dataset | IterableDataset, name: str | None) -> str | None:
    """Return the column of labels: the one of that name, or the only one of classes; nothing if there is none."""
    found = [column for column, feature in columns_of(dataset).items() if isinstance(feature, ClassLabel)]
    return label_column(dataset, name) if name is not None or len(found) == 1 else None


def label_column(dataset: Dataset | IterableDataset, name: str | None) -> str:
    """Return the column of labels, or stop with the columns there are."""
    features = columns_of(dataset)
    found = [column for column, feature in features.items() if isinstance(feature, ClassLabel)]
    column = name or (found[0] if len(found) == 1 else None)
    if column is None:
        what = f"has {len(found)} columns of classes" if found else "does not say of which classes its images are"
        raise SystemExit(
            f"The data set {what}: name the column of labels with --label_column, or put images into a folder for "
            f"each class; columns are {list(features)}."
        )
    feature = features.get(column)
    if not isinstance(feature, ClassLabel) and not (isinstance(feature, Value) and re.fullmatch(LABELS, feature.dtype)):
        raise SystemExit(
            f"There is no column of labels {column!r}, whole numbers or names; columns are {dict(features)}."
        )
    return column


def read_labels(dataset: Dataset, column: str) -> np.ndarray:
    """Return the labels (N,) of a column, or stop where some are missing."""
    labels = dataset[column][:]
    if None in labels:
        raise SystemExit(f"Some images have no label in the column {column!r}: leave them out.")
    return np.asarray(labels)


class Classes:
    """The classes of some splits: those that the data set names or, of numbers or words, the different ones in order.

    Attributes:
        names: Their names; the label of a class is its place among them.
    """

    def __init__(self, splits: Mapping[str, Dataset], column: str):
        self.column = column
        kinds = {}
        for name, split in splits.items():
            if column not in split.features:
                raise SystemExit(
                    f"The split {name!r} has no column {column!r} of labels; it has {list(split.features)}."
                )
            kinds[name] = split.features[column]
        kind = next(iter(kinds.values()))
        if any(other != kind for other in kinds.values()):
            raise SystemExit(f"The column {column!r} is not the same in all splits: {kinds}.")
        found = {name: read_labels(split, column) for name, split in splits.items()}
        if isinstance(kind, ClassLabel):
            self.values = np.arange(kind.num_classes)
            self.names = list(kind.names)
        else:
            self.values = np.unique(np.concatenate(list(found.values())))
            self.names = [str(value) for value in self.values]
        for name, labels in found.items():
            if labels.dtype.kind in "iu" and (labels.min() < 0 or labels.max() > self.values[-1]):
                allowed = f"0 to {kind.num_classes - 1}" if isinstance(kind, ClassLabel) else "0 and more"
                raise SystemExit(
                    f"Labels of the split {name!r} are {labels.min()} to {labels.max()}: allowed are {allowed}."
                )

    def labels(self, dataset: Dataset) -> np.ndarray:
        """Return the labels (N,) of images of one of the splits, from 0 to the number of classes - 1."""
        return np.searchsorted(self.values, read_labels(dataset, self.column))


def find_labels(whole: Dataset, part: Dataset, name: str | None) -> tuple[np.ndarray | None, list[str] | None]:
    """Return the labels of a part of a split and the names of the split's classes, or nothing where it has none."""
    column = find_label_column(whole, name)
    if column is None:
        return None, None
    classes = Classes({"train": whole}, column)
    return classes.labels(part), classes.names


def with_classes(dataset: Dataset, column: str) -> Dataset:
    """Return a data set whose column of labels names classes, and has their numbers."""
    classes = Classes({"train": dataset}, column)
    if isinstance(dataset.features[column], ClassLabel):
        return dataset
    labels = classes.labels(dataset)
    feature = ClassLabel(names=classes.names)
    return dataset.remove_columns(column).add_column(column, labels, feature=feature)


def warn_of_missing(names: Sequence[str], labels: Mapping[str, np.ndarray]) -> None:
    """Warn of the classes of which a split, given by its labels, has no image."""
    for split, found in labels.items():
        present = set(np.unique(found).tolist())
        missing = [name for i, name in enumerate(names) if i not in present]
        if missing:
            more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
            warnings.warn(
                f"The split {split!r} has no images of {len(missing)} of the {len(names)} classes: "
                f"{', '.join(missing[:NAMED])}{more}.",
                stacklevel=3,
            )


def draw_images(labels: Sequence[Any] | np.ndarray | int, count: int, seed: int = 0) -> np.ndarray:
    """Return the sorted indices of `count` images with these labels, or of so many without, at most all of them.

    Each class has the share that it has of all images, to within rounding (Webster's method), and at least one image
    while `count` allows. Which ones is random; a smaller draw lies within a larger one.
    """
    labels = [0] * labels if isinstance(labels, int) else labels
    total = len(labels)
    numbers = dict[Any, int]()
    order = np.random.default_rng(seed).permutation(total)
    codes = np.array([numbers.setdefault(label, len(numbers)) for label in labels], np.int64)[order]
    sizes = np.bincount(codes)
    by_class = np.argsort(codes, kind="stable")
    places = np.empty(total, np.int64)  # of an image among those of its class, in this order
    places[by_class] = np.arange(total) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    turns = np.where(places == 0, 0, (places + 0.5) / sizes[codes])
    return np.sort(order[np.argsort(turns, kind="stable")[:count]])
