"""Class labels: their names and their range, dropping them, and the loss of a classifier."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .building import short
from .families import readable
from .generators import Generator, uniform


def checked_names(id2label: Mapping[Any, str] | None, count: int) -> dict[int, str] | None:
    """Return the names of classes by label, also from JSON, where labels are text; not every label needs a name.

    Raises:
        ValueError: A label that is not a whole number from 0 to count - 1 or comes twice, or a name that is not text.
    """
    if id2label is None:
        return None
    if not isinstance(id2label, Mapping):
        raise ValueError(f"id2label is {short(id2label)}: it must map labels to names.")
    names: dict[int, str] = {}
    for given, name in id2label.items():
        label = int(str(given)) if str(given).isdecimal() else -1
        if not 0 <= label < count:
            allowed = f"has the labels 0 to {count - 1}" if count else "has no classes"
            raise ValueError(f"id2label names the class {given!r}, but this network {allowed}.")
        if label in names:
            raise ValueError(f"id2label names the class {label} twice: {names[label]!r} and {name!r}.")
        if not isinstance(name, str):
            raise ValueError(f"id2label names the class {label} {name!r}: names must be text.")
        names[label] = name
    return names


def warn_of_shared_names(names: Mapping[Any, str] | None, count: int) -> None:
    """Warn of two classes with one name, as ImageNet's two cranes; refuse names of classes that do not exist."""
    given = list((checked_names(names, count) or {}).values())
    if shared := sorted({name for name in given if given.count(name) > 1}):
        warnings.warn(
            f"Several classes are named {shared[0]!r}: they cannot be told apart by name, and `label2id` knows "
            "only one of them. Give them different names in `id2label`.",
            stacklevel=3,
        )


def labels_by_name(names: Mapping[Any, str]) -> dict[str, list[int]]:
    """Return the labels that each name stands for, sorted by name; more than one where classes share it.

    A class has its whole name and also each of the names that commas separate in it, as in ImageNet.
    """
    found: dict[str, set[int]] = {}
    for label, whole in names.items():
        for name in (whole, *whole.split(",")):
            if name.strip():
                found.setdefault(name.strip(), set()).add(int(label))
    return {name: sorted(labels) for name, labels in sorted(found.items())}


def label_ids(names: Mapping[Any, str], wanted: list[str]) -> list[int]:
    """Return the labels of classes by their `wanted` names, as `labels_by_name` has them.

    Raises:
        ValueError: A name that no class has, or more than one.
    """
    known = labels_by_name(names)
    if unknown := [name for name in wanted if name not in known]:
        if not known:
            raise ValueError("The classes of this checkpoint have no names: give `class_labels` as numbers.")
        near = difflib.get_close_matches(unknown[0], known, n=3, cutoff=0.0)
        raise ValueError(f"No class is named {unknown[0]!r}. The nearest are {near}; `labels` lists all.")
    if shared := [name for name in wanted if len(known[name]) > 1]:
        raise ValueError(f"{shared[0]!r} names the classes {known[shared[0]]}: give `class_labels` as numbers.")
    return [known[name][0] for name in wanted]


def check_label_range(name: str, labels: Tensor, count: int) -> None:
    """Refuse labels outside 0 to count - 1, where they are `readable`."""
    if readable(labels) and labels.numel() and (labels.min() < 0 or labels.max() >= count):
        raise ValueError(f"{name} are {labels.min()} to {labels.max()}: allowed are 0 to {count - 1}.")


def drop_labels(class_labels: Tensor, null_class: int, probability: float, generator: Generator = None) -> Tensor:
    """Replace each of the labels (B,) by the null class with this probability (Ho and Salimans 2022, arXiv 2207.12598).

    A network that is trained in this way denoises with and without a label, which guidance needs.
    """
    dropped = uniform(class_labels.shape, class_labels.device, generator) < probability
    return torch.where(dropped, null_class, class_labels)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of logits (B, K).

    Labels are classes (B,), where -100 is left out, or probabilities of classes (B, K).

    Raises:
        ValueError: Labels of another shape or type; classes outside 0 to K - 1, or numbers that are not probabilities,
            where they can be read (on the CPU, in a graph that is not compiled).
    """
    batch_size, count = logits.shape
    if count < 2:
        raise ValueError(
            "The classifier has a single class, whose cross-entropy is always 0: set num_labels to the number of "
            'classes, or set problem_type="regression" to predict a number.'
        )
    expected = (batch_size, count) if labels.is_floating_point() else (batch_size,)
    if tuple(labels.shape) != expected:
        raise ValueError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)}: allowed are classes, integers ({batch_size},), "
            f"and probabilities of classes, floats ({batch_size}, {count}). For several classes of one image, or for "
            "numbers, set the config's problem_type."
        )
    if labels.is_floating_point():
        if readable(labels):
            _check_probabilities(labels)
        return F.cross_entropy(logits.float(), labels.float())
    check_label_range("labels", labels.where(labels != -100, 0), count)
    return F.cross_entropy(logits.float(), labels.long())


def _check_probabilities(labels: Tensor) -> None:
    """Refuse probabilities (B, K) that are negative or do not add up to 1, within half precision."""
    lowest = labels.min()
    sums = labels.float().sum(1)
    if not (lowest >= -1e-3 and (sums - 1).abs().max() <= 0.02):
        raise ValueError(
            f"labels are floats of which the smallest is {lowest:.4g}, and those of an image add up to between "
            f"{sums.min():.4g} and {sums.max():.4g}: probabilities of classes must not be negative, and must add up to "
            '1. For several classes of one image, set the config\'s problem_type="multi_label_classification".'
        )
