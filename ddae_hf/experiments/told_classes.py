"""What a denoiser is told of each class of a data set: the label that it knows the class by, or a text about it.

A label is a number, which says nothing of what it stands for. So classes are matched by name where the checkpoint has
names; where it has none, by number, if there are as many; and otherwise only as the user says.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..building import short
from ..checkpoints import read_checkpoint
from ..labels import labels_by_name
from ..modeling_ddae import DDAEModel
from ..networks import network_of
from ..prompts import embed
from .data_files import some
from .models import Model, path_of

PROMPT_TEMPLATE = "a photo of a {}"


class ToldClasses(ABC):
    """What a denoiser is told of the classes of a data set, which are numbered from 0."""

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What tells it from other such, as JSON."""

    @property
    @abstractmethod
    def words(self) -> list[str]:
        """What it is told of each class, in words."""

    @abstractmethod
    def condition(self, classes: Tensor) -> Any:
        """Return what the denoiser is told, as `Diffusion.conditions` takes it, of classes (B,), on the CPU."""


@dataclass
class Labels(ToldClasses):
    """Labels of a class-conditional denoiser, one for each class of the data set, in its order."""

    labels: list[int]

    @property
    def identity(self) -> dict[str, Any]:
        """The labels."""
        return {"labels": self.labels}

    @property
    def words(self) -> list[str]:
        """The labels."""
        return [f"label {label}" for label in self.labels]

    def condition(self, classes: Tensor) -> Tensor:
        """Return the labels (B,) of classes (B,)."""
        return torch.tensor(self.labels)[classes]


@dataclass
class Prompts(ToldClasses):
    """Embedded texts, one for each class of the data set, in its order."""

    prompts: list[str]
    embedded: dict[str, Tensor]  # (K, ...) by name, as `embed` returns them

    @property
    def identity(self) -> dict[str, Any]:
        """The texts, and a SHA-256 of each tensor that they are embedded as."""
        parts = {name: value.contiguous().view(torch.uint8).numpy() for name, value in self.embedded.items()}
        hashes = {name: hashlib.sha256(part.tobytes()).hexdigest() for name, part in parts.items()}
        return {"prompts": self.prompts, "embedded": hashes}

    @property
    def words(self) -> list[str]:
        """The texts."""
        return self.prompts

    def condition(self, classes: Tensor) -> dict[str, Tensor]:
        """Return the tensors (B, ...) of the texts of classes (B,), by name; what holds for all texts is (1, ...)."""
        return {name: value if len(value) == 1 else value[classes] for name, value in self.embedded.items()}


def tell_classes(
    source: Model, model: DDAEModel, names: Sequence[str], labels: Sequence[int] | None = None,
    template: str | None = None, cache_dir: str | None = None,
) -> ToldClasses:  # fmt: skip
    """Return what a denoiser is told of the classes of a data set.

    Args:
        source: The path that the model was opened from, or the model.
        model: The model.
        names: The names of the data set's classes.
        labels: The labels that the denoiser knows them by, in this order; by default those that the checkpoint names
            so or, if it names none and has as many classes, its labels in order.
        template: For a denoiser that is told a text: the text about a class, with `{}` in place of its name; by default
            `PROMPT_TEMPLATE`.
        cache_dir: Where downloads are kept.

    Raises:
        ValueError: A denoiser that is told neither labels nor texts, classes that cannot be matched, labels that it
            does not have, labels for texts or texts for labels, a template without a place for the name, or an open
            model that is told texts, which has no text encoders.
    """
    denoiser = model.diffusion.own
    network = network_of(denoiser)
    if network.stock_pipelines:
        if labels is not None:
            raise ValueError("class_labels came, but this denoiser is told a text: give prompt_template.")
        return Prompts(*_embedded(source, names, PROMPT_TEMPLATE if template is None else template, model, cache_dir))
    if template is not None:
        raise ValueError(f"prompt_template is {short(template)}, but this denoiser is told no text: leave it out.")
    count = network.num_labels(denoiser.config)
    given = model.config.null_class
    null_class = network.default_null_class(denoiser.config) if given is None else given
    known = [label for label in range(count) if label != null_class]
    if not known:
        kind = "takes vectors in place of labels" if network.is_conditional(denoiser) else "is unconditional"
        raise ValueError(
            f"This denoiser {kind}: classifying by its denoising error needs one that is told classes "
            "(`ddae pretrain --class_conditional`) or texts. A probe needs neither."
        )
    if labels is not None:
        return Labels(_checked(labels, names, known))
    return Labels(_matched(names, known, _names_of(source, cache_dir)))


def _embedded(
    source: Model, names: Sequence[str], template: str, model: DDAEModel, cache_dir: str | None
) -> tuple[list[str], dict[str, Tensor]]:
    """Return a text about each class, and all of them embedded."""
    if template.count("{}") != 1:
        raise ValueError(f"prompt_template is {short(template)}: it must have {{}} once, where the class's name goes.")
    path = path_of(source)
    if path is None:
        raise ValueError("The model is an open one, which keeps no text encoders: give the path of its pipeline.")
    prompts = [template.replace("{}", name) for name in names]
    generator = read_checkpoint(path, cache_dir=cache_dir).chain()[-1]
    return prompts, embed(generator, prompts, model.denoiser.dtype)


def _names_of(source: Model, cache_dir: str | None) -> dict[str, list[int]]:
    """Return the labels that each name stands for in a checkpoint; nothing where it names no class."""
    path = path_of(source)
    if path is None:
        return {}
    index = read_checkpoint(path, cache_dir=cache_dir).chain()[-1].index or {}
    return labels_by_name(index.get("id2label") or {})


def _checked(labels: Sequence[int], names: Sequence[str], known: Sequence[int]) -> list[int]:
    """Return labels that the user gave, or refuse them."""
    if len(labels) != len(names):
        raise ValueError(
            f"class_labels are {len(labels)}, but the data set has {len(names)} classes: give one for each."
        )
    if len(set(labels)) < len(labels):
        raise ValueError(f"class_labels are {short(list(labels))}: no two classes can have one label.")
    if unknown := [label for label in labels if label not in known]:
        allowed = some([str(label) for label in known], 20)
        raise ValueError(
            f"class_labels has {unknown[0]}: allowed are {allowed}, not the label that stands for no class."
        )
    return list(labels)


def _matched(names: Sequence[str], known: Sequence[int], named: dict[str, list[int]]) -> list[int]:
    """Return the label of each class by its name or, where the checkpoint names none, by its number."""
    own = "Give class_labels: the denoiser's label of each class of the data set, in the data set's order"
    of_classes = {name: [label for label in labels if label in known] for name, labels in named.items()}
    named = {name: labels for name, labels in of_classes.items() if labels}
    if not named:
        if len(known) != len(names):
            raise ValueError(
                f"The data set has {len(names)} classes ({some(list(names), 10)}), and the denoiser {len(known)} that "
                f"have no names. {own}."
            )
        return list(known)
    if unknown := [name for name in names if name not in named]:
        raise ValueError(
            f"{some(unknown, 5)} of the data set is no class of the checkpoint, whose classes are named "
            f"{some(list(named), 10)}. {own}."
        )
    found = [named[name] for name in names]
    shared = [name for name, labels in zip(names, found, strict=True) if len(labels) > 1]
    shared += [name for name, labels in zip(names, found, strict=True) if found.count(labels) > 1]
    if shared:
        raise ValueError(f"{shared[0]!r} names the labels {named[shared[0]]}, which cannot be told apart. {own}.")
    return [labels[0] for labels in found]
