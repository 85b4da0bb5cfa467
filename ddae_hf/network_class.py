"""`NetworkClass`: everything that depends on the class of a denoiser. There is one object for each class.

Methods take the network itself, a `denoiser`, or its complete diffusers config.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, SupportsIndex

import torch
from torch import Tensor, nn

from .building import short
from .cut import Cut, Recorder, identity, recorded, runs_forward_alone
from .families import in_batch
from .labels import check_label_range


class Tap(NamedTuple):
    """A place where a network's hidden state can be read."""

    name: str  # its dotted path in `named_modules()`
    channels: int  # width of the hidden state
    stride: int  # pixels of the network's input, in height and in width, that one of its positions stands for
    part: str  # "encoder", "middle" or "decoder"; networks without these are decoders as a whole
    inner: bool = False  # whether it is read only where it is named: it lies inside of another tap, or around some


def taps_of_block(name: str, width: int, stride: int, part: str, *, inner: bool) -> list[Tap]:
    """Return the taps of a transformer block: queries and keys of its self-attention, and the block itself."""
    inside = [Tap(each, width, stride, part, inner=True) for each in _projections(name).values()]
    return [*inside, Tap(name, width, stride, part, inner)]


def _projections(block: str) -> dict[str, str]:
    """Return the names of a transformer block's queries and keys, by those that they have in its self-attention."""
    return {which: f"{block}.attn1.{which}" for which in ("to_q", "to_k")}


def view_of_block(block: Any, name: str, layers: Sequence[str], found: dict[str, Tensor], last: str) -> Any:
    """Return a view of a transformer block that records its taps and, if the `last` is inside of it, ends after it.

    What a block that ends has computed is all in `found`, and its output means nothing.
    """
    wanted = {which: each for which, each in _projections(name).items() if each in layers}
    if not wanted:
        return recorded(block, name, layers, found)
    attention = block.attn1
    if last in wanted.values():

        def project(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            found.update({each: getattr(attention, which)(hidden) for which, each in wanted.items()})
            return hidden

        return Cut(block, {"attn1": project, "attn2": None, "ff": identity})
    parts = {which: Recorder(getattr(attention, which), each, found) for which, each in wanted.items()}
    return recorded(Cut(block, {"attn1": Cut(attention, parts)}), name, layers, found)


def cut_blocks(layers: Sequence[str]) -> set[str]:
    """Return the names of the transformer blocks, and of their self-attentions, that `view_of_block` cuts."""
    attentions = {layer.rpartition(".")[0] for layer in layers if layer.endswith((".attn1.to_q", ".attn1.to_k"))}
    return attentions | {attention.removesuffix(".attn1") for attention in attentions}


def place_of(layer: str, names: Sequence[str]) -> int:
    """Return the index of the first name that is a layer's, or that of a part that has it inside."""
    return [layer == name or layer.startswith(f"{name}.") for name in names].index(True)


def height_and_width(sample_size: Any) -> tuple[int, int]:
    """Return the height and the width that a network's `sample_size` stands for, or raise `ValueError`."""
    sides = sample_size if isinstance(sample_size, (list, tuple)) else [sample_size, sample_size]
    if len(sides) != 2 or any(type(side) is not int or side < 1 for side in sides):
        raise ValueError(f"sample_size is {short(sample_size)}: it must be a side, or height and width, at least 1.")
    return sides[0], sides[1]


class NetworkClass(ABC):
    """A class of denoisers."""

    model: Any  # the class
    component: str  # the key under which diffusers' pipelines keep it
    parts: tuple[str, ...] = ()  # a network of another class that has all of these can be read as one of this class
    indivisible: tuple[str, ...] = ()  # names of classes of its blocks that a device map must not divide
    borrowed: tuple[str, ...] = ()  # names of parts of blocks that its forward calls outside of their block, too
    own_module: str = ""  # the module of this package that defines the class, where diffusers does not
    stock_pipelines: tuple[str, ...] = ()  # pipelines of diffusers that alone can sample from it, and embed its texts

    @property
    def libraries(self) -> tuple[str, ...]:
        """What a `model_index.json` may name as the library of the class, besides diffusers.

        For a class of this package, whose module may have been loaded from a checkpoint under another name, that is the
        module, first as it is installed, and then as code in the component's folder.
        """
        own = self.own_module
        return (f"ddae_hf.{own}", own) if own else (self.model.__module__,)

    def build(self, config: Mapping[str, Any]) -> Any:
        """Build a randomly initialised network from its config."""
        return self.model.from_config(config)

    def complete(self, denoiser: Any) -> None:
        """Apply what a network's config asks for but its class ignores; most classes ignore nothing."""
        return

    def present_config(self, config: dict[str, Any]) -> dict[str, Any] | None:
        """Return such a network's config in today's terms, whichever version wrote it; None for other networks."""
        return config if config.get("_class_name") == self.model.__name__ else None

    def computed_buffers(self, config: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the buffers that are computed from the config and that no checkpoint holds, on the CPU, by name."""
        return {}

    @abstractmethod
    def divisor(self, config: Mapping[str, Any]) -> tuple[int, str]:
        """Return what the sides of its images must be multiples of, and why, in words."""

    def size(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Return height and width of its images, or raise `ValueError` where the config does not say them."""
        if config["sample_size"] is None:
            raise ValueError("The denoiser's config has no sample_size: set it to the side of its images or latents.")
        return height_and_width(config["sample_size"])

    def check_config(self, config: Mapping[str, Any]) -> None:
        """Raise `ValueError` unless the network can divide its images as it must."""
        factor, reason = self.divisor(config)
        if any(side % factor for side in self.size(config)):
            raise ValueError(f"sample_size is {config['sample_size']}: {reason}, it must be a multiple of {factor}.")

    def check_timesteps(self, config: Mapping[str, Any], scheduler: Any) -> None:
        """Raise `ValueError` if the network cannot be fed the scheduler's timesteps."""
        return

    def fed_timestep(self, denoiser: Any, timestep: Tensor) -> Tensor:
        """Return `timestep` (B,), float32, in the type that the network's embedding takes."""
        return timestep

    def num_labels(self, config: Mapping[str, Any]) -> int:
        """Return how many class labels the network tells apart, its null class included; 0 if it takes none."""
        return 0

    def label_options(self, num_classes: int) -> dict[str, int]:
        """Return the options of a network with `num_classes` classes and then a null class; 0 is unconditional."""
        return {}

    def default_null_class(self, config: Mapping[str, Any]) -> int | None:
        """Return the null class that the config implies."""
        return None

    def check_null_class(self, null_class: int | None, config: Mapping[str, Any]) -> None:
        """Raise `ValueError` unless the network has the label that is to stand for no class."""
        count = self.num_labels(config)
        if null_class is not None and not (isinstance(null_class, SupportsIndex) and 0 <= int(null_class) < count):
            has = f"has the labels 0 to {count - 1}" if count else "takes no labels"
            raise ValueError(f"null_class is {short(null_class)}, but this denoiser {has}.")

    def is_conditional(self, denoiser: Any) -> bool:
        """Whether the network can be given class labels."""
        return self.num_labels(denoiser.config) > 0

    def conditions(
        self, denoiser: Any, condition: Any, batch_size: int, device: Any, null_condition: Any = None
    ) -> dict[str, Tensor]:
        """Return what the network is told about its images besides the timestep, as tensors (B, ...) by name.

        Here it is told their classes, by the name of `class_labels`, or nothing; `keywords` makes arguments of it.
        The `condition` is labels (B,), or one label for all images; a U-Net whose `class_embed_type` is `"identity"`
        takes vectors (B, width). None means the null class: `null_condition` where the network does not imply one.

        Raises:
            ValueError: Labels for an unconditional network; labels that the network does not have, that are not whole
                numbers, or that are not one for each image; neither labels nor a null class for a conditional network.
        """
        class_labels = condition
        takes_labels = self.is_conditional(denoiser)
        if class_labels is not None and not takes_labels:
            raise ValueError("class_labels came, but this denoiser is unconditional: leave them out.")
        if class_labels is None:
            class_labels = self.default_null_class(denoiser.config) if null_condition is None else null_condition
            if class_labels is None and takes_labels:
                raise ValueError("This denoiser is class-conditional: pass class_labels, or set its null_class.")
            if class_labels is None:
                return {}
        several = class_labels if isinstance(class_labels, list) else [class_labels]
        if any(isinstance(label, str) for label in several):
            raise ValueError(
                f"class_labels are {class_labels!r}: they must be numbers; `get_label_ids` turns names into them."
            )
        labels = torch.as_tensor(class_labels)  # where it is: numbers are checked before they go to a device
        labels = labels.reshape(1) if labels.ndim == 0 else labels
        if len(labels) not in (1, batch_size):
            raise ValueError(f"{len(labels)} class_labels came for {batch_size} images: pass one, or one per image.")
        if count := self.num_labels(denoiser.config):
            if labels.ndim > 1 or labels.is_floating_point() or labels.dtype == torch.bool:
                came = f"of shape {tuple(labels.shape)} and type {labels.dtype}"
                raise ValueError(f"class_labels are {came}: they must be whole numbers: one, or one per image.")
            check_label_range("class_labels", labels, count)
        if labels.ndim == 1:
            return {"class_labels": in_batch(labels, batch_size, device)}
        return {"class_labels": labels.to(device).expand(batch_size, *labels.shape[1:])}

    def keywords(self, conditions: dict[str, Tensor]) -> dict[str, Any]:
        """Return the keyword arguments of the network's forward that tell it what `conditions` returned."""
        return dict(conditions)

    def call(self, denoiser: Any, sample: Tensor, timestep: Tensor, **keywords: Any) -> Any:
        """Call a network, or a view of it, with its input (B, C, H, W) and its timestep (B,)."""
        return denoiser(sample, timestep, **keywords)

    def text_parts(self, config: Mapping[str, Any]) -> dict[str, tuple[int | None, ...]]:
        """Return the shapes, without the batch, of what it is told of a text, in the order of its text encoders.

        None stands for any length; a network that is told no text has nothing.
        """
        return {}

    def size_parts(self, config: Mapping[str, Any], height: int, width: int) -> dict[str, list[float]]:
        """Return what it is told of the size of images of this height and width, in pixels, besides a text."""
        return {}

    def check_condition_shapes(self, shapes: Mapping[str, Any] | None, config: Mapping[str, Any]) -> None:
        """Raise `ValueError` unless the network can be told stored tensors of these shapes, by name, without a batch.

        Those that are told classes store none: their null condition is a label.
        """
        if shapes is not None:
            name = self.model.__name__
            raise ValueError(f"condition_shapes is {short(shapes)}, but a {name} is told no text: leave it out.")

    def example_condition(self, denoiser: Any) -> Any:
        """Return a condition for one image that the network accepts; None if it is told nothing."""
        return torch.zeros(1, dtype=torch.long) if self.is_conditional(denoiser) else None

    def stop_own_dropping(self, denoiser: nn.Module) -> None:
        """Stop a network from dropping labels by itself in training mode."""
        return

    def accept_vectors(self, denoiser: Any, width: int) -> None:
        """Make an unconditional network take vectors as its `class_labels` while it is trained.

        Vectors of `width` numbers, padded with zeros to `vector_width`, are added to its time embedding. Its config and
        weights stay those of an unconditional network, and so does what it saves. `ValueError` if it cannot take them.
        """
        name = type(denoiser).__name__
        raise ValueError(f"Augmentation needs an unconditional UNet2DModel, which takes its labels: a {name} came.")

    def vector_width(self, denoiser: Any) -> int:
        """Return the width of the vectors of `accept_vectors`; 0 where it takes none."""
        return 0

    def float32_modules(self, denoiser: Any) -> set[str]:
        """Return the names of the parts whose weights stay in float32 where the rest is in half precision."""
        return set()

    @abstractmethod
    def taps(self, denoiser: Any) -> list[Tap]:
        """Return every tap, inner ones too, in the order in which the network computes them."""

    def on_grid(self, hidden: Tensor, tap: Tap, size: Sequence[int]) -> Tensor:
        """Return a hidden state as (B, C, height, width), of a network whose inputs have this height and width.

        Tokens (B, N, C) are laid out row by row.
        """
        if hidden.ndim == 4:
            return hidden
        height, width = (side // tap.stride for side in size)
        return hidden.transpose(1, 2).unflatten(2, (height, width))

    def runs_as_seen(self, denoiser: Any, layers: Sequence[str]) -> bool:
        """Whether a `view` for these layers computes what a call of the network does."""
        return runs_forward_alone(denoiser)

    @abstractmethod
    def view(self, denoiser: Any, layers: Sequence[str], found: dict[str, Tensor], stop_early: bool) -> Cut:
        """Return a view of the network that puts the hidden states of `layers` into `found` when it is called.

        With `stop_early` the view ends after the deepest of them, and has no output.
        """

    def with_float32_output(self, denoiser: Any) -> Any:
        """Return a view of a half-precision network with its output layers in float32, if that is known to help.

        Where the network has hooks (offloading) or is compiled, as a whole or in these layers, it stays as it is: its
        hooks and its compiled graphs run.
        """
        return denoiser
