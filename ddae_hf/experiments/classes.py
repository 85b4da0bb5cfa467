"""The classes of a data set: which column holds them, their names and numbers, and drawing images of all of them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value

from .data_files import some


def find_label_column(features: Features, name: str | None) -> str | None:
    """Return the column of labels: the one of that name, or the only one of classes; None if there is none."""
    if name is None:
        found = [column for column, feature in features.items() if isinstance(feature, ClassLabel)]
        return found[0] if len(found) == 1 else None
    feature = features.get(name)
    plain = isinstance(feature, Value) and re.fullmatch(r"u?int\d+|(large_)?string", feature.dtype)
    if not isinstance(feature, ClassLabel) and not plain:
        what = f"There is no column of labels {name!r} with whole numbers or names"
        raise ValueError(f"{what}; the columns are {dict(features)}.")
    return name


class Classes:
    """The classes of a data set: the ones that it names, or else all different numbers or words in its splits.

    Splits without the column are ignored, and so are values that stand for no class, such as -1. Nothing is read before
    it is asked for.
    """

    def __init__(self, splits: Mapping[str, Dataset | IterableDataset], column: str):
        self.column = column
        self.splits = {name: split for name, split in splits.items() if column in (split.features or {})}

    @cached_property
    def kind(self) -> ClassLabel | Value:
        """What the column holds."""
        kinds = {name: split.features[self.column] for name, split in self.splits.items() if split.features}
        kind = next(iter(kinds.values()))
        if any(other != kind for other in kinds.values()):
            raise ValueError(f"The column {self.column!r} is not the same in all splits: {kinds}.")
        return kind

    @cached_property
    def values(self) -> np.ndarray | None:
        """The column's value for each class, in order; None where only reading a whole stream would tell."""
        if isinstance(self.kind, ClassLabel):
            return np.arange(self.kind.num_classes)
        found: set[Any] = set()
        for split in self.splits.values():
            if isinstance(split, IterableDataset):
                return None
            found.update(split[self.column][:])
        found.discard(None)
        return np.array(sorted(value for value in found if isinstance(value, str) or value >= 0))

    @cached_property
    def names(self) -> list[str] | None:
        """The names of the classes; the label of a class is its place among them."""
        if isinstance(self.kind, ClassLabel):
            return list(self.kind.names)
        return None if self.values is None else [str(value) for value in self.values]

    def labels(self, dataset: Dataset, split: str) -> np.ndarray:
        """Return the labels (N,) of images of a split, int64; those that stand for no class raise `ValueError`."""
        found = dataset[self.column][:]
        if None in found:
            raise ValueError(f"Some images have no label in the column {self.column!r} of {split!r}: leave them out.")
        labels = np.asarray(found)
        values = np.array([]) if self.values is None else self.values
        if labels.dtype.kind in "iu" and (labels.min() < 0 or labels.max() > values.max(initial=-1)):
            allowed = f"0 to {len(values) - 1}" if isinstance(self.kind, ClassLabel) else "0 and more"
            there = f"{labels.min()} to {labels.max()}"
            raise ValueError(f"Labels of the split {split!r} are {there}: allowed are {allowed}.")
        return np.searchsorted(values, labels)


def warn_of_missing(names: Sequence[str], labels: Mapping[str, np.ndarray]) -> None:
    """Warn of classes that have no image in a split, which is given by its labels."""
    for split, found in labels.items():
        present = set(np.unique(found).tolist())
        missing = [name for i, name in enumerate(names) if i not in present]
        if missing:
            what = f"The split {split!r} has no images of {len(missing)} of the {len(names)} classes"
            warnings.warn(f"{what}: {some(missing, 10)}.", stacklevel=3)


def draw_images(labels: Sequence[Any] | np.ndarray | int, count: int, seed: int = 0) -> np.ndarray:
    """Return the sorted indices of `count` images, or of all if there are fewer.

    `labels` are the labels of all images, or just their number. Each class has the share that it has of all images, to
    within rounding (Webster's method), and at least one image while `count` allows. Which of its images are drawn is
    random; a smaller draw lies within a larger one.
    """
    labels = [0] * labels if isinstance(labels, int) else labels
    total = len(labels)
    numbers = dict[Any, int]()
    order = np.random.default_rng(seed).permutation(total)
    codes = np.array([numbers.setdefault(label, len(numbers)) for label in labels], np.int64)[order]
    sizes = np.bincount(codes)
    by_class = np.argsort(codes, kind="stable")
    places = np.empty(total, np.int64)  # of each image within its class, in this order
    places[by_class] = np.arange(total) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    turns = np.where(places == 0, 0, (places + 0.5) / sizes[codes])
    return np.sort(order[np.argsort(turns, kind="stable")[:count]])


def draw_labels(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Return the indices of `per_class` images of every class that has any."""
    rng = np.random.default_rng(seed)
    classes, counts = np.unique(labels, return_counts=True)
    if not 1 <= per_class <= counts.min():
        allowed = f"allowed are 1 to {counts.min()}, which the smallest class has"
        raise ValueError(f"{per_class} labels a class are asked for: {allowed}.")
    return np.concatenate([rng.choice(np.flatnonzero(labels == k), per_class, replace=False) for k in classes])
