"""What a denoiser is told beside the image: its timestep, and class labels with the null class that stands for none.

- `UNet2DModel`: `num_class_embeds` labels. Nothing marks one of them as the null class; a network trained here has it
  last, and its checkpoint says so.
- `DiTTransformer2DModel`: `num_embeds_ada_norm` classes, and the null class after them. With `num_embeds_ada_norm=0`
  there is the null class alone, and the network is unconditional.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.embeddings import LabelEmbedding, Timesteps
from torch import Tensor

from .noise import readable

# The option of a DiT's config that says which frequencies its timestep embedding has.
FREQUENCIES = "downscale_freq_shift"


def fed_timestep(denoiser: Any, timestep: Tensor) -> Tensor:
    """Return `timestep` in the type that the denoiser's embedding takes.

    float32 where the embedding is a formula; a learned embedding has one row for every trained timestep, so there the
    nearest integer.
    """
    if getattr(denoiser.config, "time_embedding_type", None) == "learned":
        return timestep.round().long()
    return timestep


def adjust_timestep_embedding(denoiser: Any) -> None:
    """Give a DiT's timestep embedding the frequencies that its config asks for in `downscale_freq_shift`.

    Frequency i of n is `10000 ** (-i / (n - shift))`. The official DiTs have shift 0, which their conversions note;
    diffusers builds every DiT with shift 1, and so do checkpoints without the note stay.
    """
    shift = denoiser.config.get(FREQUENCIES)
    if shift is None or "num_embeds_ada_norm" not in denoiser.config:
        return
    for module in denoiser.modules():
        if isinstance(module, Timesteps):
            module.downscale_freq_shift = shift


def num_labels(config: Any) -> int:
    """Return how many class labels a denoiser tells apart, its null class included; 0 for one that takes none.

    Args:
        config: The denoiser's complete diffusers config.
    """
    if "num_embeds_ada_norm" in config:
        return config["num_embeds_ada_norm"] + 1
    return 0 if config.get("class_embed_type") else config.get("num_class_embeds") or 0


def label_options(class_name: str, num_classes: int) -> dict[str, int]:
    """Return the options that give a denoiser of this class so many labels and a null class after them.

    With no classes it is unconditional.
    """
    if class_name == "DiTTransformer2DModel":
        return {"num_embeds_ada_norm": num_classes}
    return {"num_class_embeds": num_classes + 1} if num_classes else {}


def default_null_class(config: Any) -> int | None:
    """Return the null class that a denoiser's config implies: a DiT's last label, none for a U-Net."""
    return config.get("num_embeds_ada_norm")


def check_null_class(null_class: int | None, config: Any) -> None:
    """Raise `ValueError` unless a denoiser, of which this is the config, has the label that is to stand for none."""
    count = num_labels(config)
    if null_class is not None and not 0 <= null_class < count:
        has = f"its labels are 0 to {count - 1}" if count else "it takes no labels"
        raise ValueError(f"null_class is {null_class}, but of this denoiser {has}.")


def checked_names(id2label: Mapping[Any, str] | None, count: int) -> dict[int, str] | None:
    """Return the names of classes by label, from JSON too, where all labels are text.

    Args:
        id2label: The names by label; not every label needs one.
        count: Number of labels.

    Raises:
        ValueError: A label that is no whole number from 0 to count - 1 or comes twice, or a name that is no text.
    """
    if id2label is None:
        return None
    names: dict[int, str] = {}
    for given, name in id2label.items():
        label = int(str(given)) if str(given).isdecimal() else -1
        if not 0 <= label < count:
            allowed = f"its labels are 0 to {count - 1}" if count else "it tells no classes apart"
            raise ValueError(f"id2label names the class {given!r}, but of this network {allowed}.")
        if label in names:
            raise ValueError(f"id2label names the class {label} twice: {names[label]!r} and {name!r}.")
        if not isinstance(name, str):
            raise ValueError(f"id2label names the class {label} {name!r}: names are text.")
        names[label] = name
    return names


def labels_by_name(names: Mapping[Any, str]) -> dict[str, list[int]]:
    """Return the labels that each name stands for, sorted by name; more than one where classes share it.

    A class has its whole name, and beside it each of the names that commas part in it, as in ImageNet.
    """
    found: dict[str, set[int]] = {}
    for label, whole in names.items():
        for name in (whole, *whole.split(",")):
            if name.strip():
                found.setdefault(name.strip(), set()).add(int(label))
    return {name: sorted(labels) for name, labels in sorted(found.items())}


def is_conditional(denoiser: Any) -> bool:
    """Whether a denoiser can be given class labels."""
    if "num_embeds_ada_norm" in denoiser.config:
        return denoiser.config.num_embeds_ada_norm > 0
    return denoiser.class_embedding is not None


def class_conditioning(
    denoiser: Any, class_labels: Any, batch_size: int, device: Any, null_class: int | None = None
) -> dict[str, Tensor]:
    """Return the keyword arguments that tell a denoiser its classes: `class_labels`, or nothing.

    Args:
        denoiser: A diffusers network.
        class_labels: Labels (B,), or one for all; a U-Net whose `class_embed_type` is `"identity"` takes vectors
            (B, width). None means the null class.
        batch_size: Number of images, B.
        device: Where they are.
        null_class: The null class of a denoiser that does not imply one.

    Raises:
        ValueError: Labels for an unconditional network, labels that it does not have, that are no whole numbers or not
            one an image, or neither labels nor a null class for a conditional one.
    """
    if class_labels is not None and not is_conditional(denoiser):
        raise ValueError("class_labels came, but this denoiser is unconditional: leave them out.")
    if class_labels is None:
        class_labels = default_null_class(denoiser.config) if null_class is None else null_class
        if not is_conditional(denoiser) and class_labels is None:
            return {}
        if class_labels is None:
            raise ValueError("This denoiser is class-conditional: pass class_labels, or set its null_class.")
    several = class_labels if isinstance(class_labels, list) else [class_labels]
    if any(isinstance(label, str) for label in several):
        raise ValueError(f"class_labels are {class_labels!r}: they are numbers; `get_label_ids` gives those of names.")
    labels = torch.as_tensor(class_labels, device=device)
    labels = labels.reshape(1) if labels.ndim == 0 else labels
    if len(labels) not in (1, batch_size):
        raise ValueError(f"{len(labels)} class_labels came for {batch_size} images: pass one, or one an image.")
    if count := num_labels(denoiser.config):
        if labels.ndim > 1 or labels.is_floating_point() or labels.dtype == torch.bool:
            came = f"of shape {tuple(labels.shape)} and type {labels.dtype}"
            raise ValueError(f"class_labels are {came}: they must be whole numbers, one, or one an image.")
        check_label_range("class_labels", labels, count)
    return {"class_labels": labels.expand(batch_size, *labels.shape[1:])}


def check_label_range(name: str, labels: Tensor, count: int) -> None:
    """Refuse labels outside 0 to count - 1, where they are `readable`."""
    if not readable(labels) or not labels.numel():
        return
    if labels.min() < 0 or labels.max() >= count:
        raise ValueError(f"{name} are {labels.min()} to {labels.max()}: allowed are 0 to {count - 1}.")


def drop_labels(class_labels: Tensor, null_class: int, probability: float) -> Tensor:
    """Replace each of the labels (B,) by the null class with this probability (Ho and Salimans 2022, arXiv 2207.12598).

    A network trained so denoises with and without a label, which guidance needs.
    """
    dropped = torch.rand(class_labels.shape, device=class_labels.device) < probability
    return torch.where(dropped, null_class, class_labels)


def disable_label_dropout(denoiser: torch.nn.Module) -> None:
    """Stop a DiT from dropping labels by itself in training mode, where each block would draw for itself."""
    for module in denoiser.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0
