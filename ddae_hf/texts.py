"""Networks that are told a text: what they are told, and the null condition, which is the embedding of no text.

A condition is a mapping of tensors (B, ...) by name, as `embed_prompts` makes it of texts: the sequence of embeddings
`encoder_hidden_states` (B, L, D) and, depending on the network, a mask of it or a pooled embedding, and numbers that
describe the size of the image. A tensor alone is taken for the sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .building import LARGEST, short
from .network_class import NetworkClass

SEQUENCE = "encoder_hidden_states"
MASK = "encoder_attention_mask"
Shapes = dict[str, tuple[int | None, ...]]


class TextConditioned(NetworkClass):
    """A class of denoisers that are told a text, which have `text_parts` and may have `size_parts`."""

    def _parts(self, config: Mapping[str, Any]) -> Shapes:
        sizes = self.size_parts(config, 1, 1)
        return self.text_parts(config) | {name: (len(values),) for name, values in sizes.items()}

    def is_conditional(self, denoiser: Any) -> bool:
        """It always is."""
        return True

    def example_condition(self, denoiser: Any) -> dict[str, Tensor]:
        """Return the condition of a text of one token."""
        shapes = self._parts(denoiser.config)
        return {name: torch.ones(1, *(length or 1 for length in shape)) for name, shape in shapes.items()}

    def check_condition_shapes(self, shapes: Mapping[str, Any] | None, config: Mapping[str, Any]) -> None:
        """Raise `ValueError` unless these are shapes, without the batch, of all that the network is told."""
        if shapes is None:
            return
        for name, shape in shapes.items():
            if not isinstance(shape, (list, tuple)) or any(type(n) is not int or not 0 < n <= LARGEST for n in shape):
                raise ValueError(
                    f"condition_shapes says {short(shape)} of {short(name)}: it must be a list of lengths."
                )
        self._check_shapes({name: tuple(shape) for name, shape in shapes.items()}, config)

    def _check_shapes(self, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> None:
        expected = self._parts(config)
        told = ", ".join(f"{name} (B, {', '.join(str(n or 'L') for n in s)})" for name, s in expected.items())
        if sorted(shapes) != sorted(expected):
            raise ValueError(
                f"The condition has the parts {', '.join(map(str, shapes)) or 'none'}: this {self.model.__name__} "
                f"is told {told}."
            )
        for name, shape in shapes.items():
            known = expected[name]
            if len(shape) != len(known) or any(n not in (m, None) for m, n in zip(shape, known, strict=True)):
                came = ", ".join(map(str, shape))
                raise ValueError(f"The condition's {name} has the shape (B, {came}): allowed is {told}.")
        lengths = {shapes[name][0] for name, known in expected.items() if known[0] is None}
        if len(lengths) > 1:
            raise ValueError(f"The condition's sequence and mask are of lengths {sorted(lengths)}: they must be equal.")

    def conditions(
        self, denoiser: Any, condition: Any, batch_size: int, device: Any, null_condition: Any = None
    ) -> dict[str, Tensor]:
        """Return the tensors (B, ...) of a condition by name, on a device and in the network's type.

        Args:
            denoiser: The network.
            condition: A mapping of tensors (B, ...), or (1, ...) for all images; a tensor is taken for the sequence.
                None means `null_condition`. Where it says nothing of the size of images, the null condition does.
            batch_size: B.
            device: Where the tensors are to be.
            null_condition: Likewise, a mapping of tensors (1, ...).

        Raises:
            ValueError: No condition and no null condition, parts that are missing or have other shapes or types.
        """
        null = {} if null_condition is None else dict(null_condition)
        given = null if condition is None else condition
        if isinstance(given, Tensor) and given.is_floating_point() and given.ndim > 1:
            given = {SEQUENCE: given}
        if not isinstance(given, Mapping):
            raise ValueError(
                f"The condition is {short(given)}, but this {type(denoiser).__name__} is told a text, and no class "
                "labels: give what `embed_prompts` makes of texts."
            )
        if not given:
            raise ValueError(
                f"This {type(denoiser).__name__} is told a text, and its checkpoint came without text encoders: open "
                "the whole pipeline, or give a condition, which `embed_prompts` makes of texts."
            )
        sizes = self.size_parts(denoiser.config, 1, 1)
        given = {**{name: null[name] for name in sizes if name in null}, **given}
        if wrong := [name for name, value in given.items() if not isinstance(value, Tensor) or value.ndim < 2]:
            raise ValueError(f"The condition's {wrong[0]} is {short(given[wrong[0]])}: it must be a tensor (B, ...).")
        if wrong := [name for name, value in given.items() if name != MASK and not value.is_floating_point()]:
            kind = str(given[wrong[0]].dtype).removeprefix("torch.")
            raise ValueError(f"The condition's {wrong[0]} is of type {kind}: it must be floats.")
        self._check_shapes({name: tuple(value.shape[1:]) for name, value in given.items()}, denoiser.config)
        counts = {name: len(value) for name, value in given.items()}
        if wrong := [name for name, count in counts.items() if count not in (1, batch_size)]:
            count = counts[wrong[0]]
            raise ValueError(
                f"The condition's {wrong[0]} is for {count} images, but {batch_size} came: give it for one, or for all."
            )
        return {name: _fitted(value, batch_size, device, denoiser.dtype) for name, value in given.items()}


def _fitted(value: Tensor, batch_size: int, device: Any, dtype: torch.dtype) -> Tensor:
    kind = dtype if value.is_floating_point() else value.dtype
    # As pipelines repeat them: products of a view that is expanded could differ in the last bit.
    return value.to(device, kind).expand(batch_size, *value.shape[1:]).contiguous()


class StoredCondition(nn.Module):
    """A null condition that is stored with a model, as buffers (1, ...) by name.

    Args:
        shapes: Their shapes without the batch; masks are whole numbers.
    """

    def __init__(self, shapes: Mapping[str, Any]):
        super().__init__()
        for name, shape in shapes.items():
            kind = torch.int64 if name == MASK else torch.get_default_dtype()
            self.register_buffer(name, torch.ones(1, *shape, dtype=kind))

    def forward(self) -> dict[str, Tensor]:
        """Return the buffers by name: calling the module brings them back from where accelerate has sent them."""
        return dict(self.named_buffers())
