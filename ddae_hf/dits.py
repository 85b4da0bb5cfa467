"""diffusers' `DiTTransformer2DModel`, and how transformers of image patches are walked.

A tap is the output of a transformer block. The network has `num_embeds_ada_norm` classes, and the null class after
them; with `num_embeds_ada_norm=0` it has only the null class, and is unconditional.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import LabelEmbedding, Timesteps
from torch import Tensor, nn

from .cut import Cut, runs_forward_alone
from .network_class import NetworkClass, Tap, cut_blocks, place_of, taps_of_block, view_of_block
from .self_conditioned import SelfConditionedDiTTransformer2DModel


class PatchTransformer(NetworkClass):
    """Transformers of diffusers on the patches of an image: blocks one after the other, all of one width."""

    component = "transformer"
    parts: tuple[str, ...] = ()
    indivisible = ("BasicTransformerBlock",)

    def computed_buffers(self, config: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return its positions, which do not depend on its blocks."""
        with torch.device("cpu"):
            return {"pos_embed.pos_embed": self.build({**config, "num_layers": 0}).pos_embed.pos_embed}

    def divisor(self, config: Mapping[str, Any]) -> tuple[int, str]:
        """Return the side of its patches."""
        return config["patch_size"], f"with patches of {config['patch_size']}"

    def taps(self, denoiser: Any) -> list[Tap]:
        """Return its blocks, `transformer_blocks.0`, ..., and what is inside of them."""
        stride = denoiser.config["patch_size"]
        names = [f"transformer_blocks.{k}" for k in range(len(denoiser.transformer_blocks))]
        width = denoiser.inner_dim
        return [tap for name in names for tap in taps_of_block(name, width, stride, "decoder", inner=False)]

    def runs_as_seen(self, denoiser: Any, layers: Sequence[str]) -> bool:
        """Whether neither the network nor what is cut has hooks."""
        cut = [denoiser.get_submodule(name) for name in cut_blocks(layers)]
        return all(runs_forward_alone(module) for module in (denoiser, *cut))

    def view(self, denoiser: Any, layers: Sequence[str], found: dict[str, Tensor], stop_early: bool) -> Cut:
        """Return the network with fewer blocks; its small output layer runs."""
        names = [f"transformer_blocks.{k}" for k in range(len(denoiser.transformer_blocks))]
        last = max(layers, key=[tap.name for tap in self.taps(denoiser)].index) if stop_early else ""
        count = 1 + place_of(last, names) if stop_early else len(names)
        blocks = zip(names[:count], list(denoiser.transformer_blocks)[:count], strict=True)
        views = [view_of_block(block, name, layers, found, last) for name, block in blocks]
        return Cut(denoiser, {"transformer_blocks": views})


class DiT(PatchTransformer):
    """diffusers' `DiTTransformer2DModel`."""

    model = DiTTransformer2DModel
    parts = ("transformer_blocks",)
    borrowed = ("transformer_blocks.0.norm1.emb",)
    # An option that diffusers lacks: frequency i of the n of the timestep embedding is `10000 ** (-i / (n - shift))`.
    # The official DiTs have shift 0, which their conversions note. diffusers builds every DiT with shift 1, and a
    # checkpoint without the note keeps it.
    frequencies = "downscale_freq_shift"

    def build(self, config: Mapping[str, Any]) -> Any:
        """Build it without the option that diffusers would log as ignored, and note the option in its config."""
        denoiser = self.model.from_config({k: v for k, v in config.items() if k != self.frequencies})
        denoiser.register_to_config(**{k: v for k, v in config.items() if k == self.frequencies})
        return denoiser

    def complete(self, denoiser: Any) -> None:
        """Give the timestep embedding the frequencies that the config asks for."""
        shift = denoiser.config.get(self.frequencies)
        for module in denoiser.modules() if shift is not None else ():
            if isinstance(module, Timesteps):
                module.downscale_freq_shift = shift

    def present_config(self, config: dict[str, Any]) -> dict[str, Any] | None:
        """Recognise DiTs that diffusers once kept in a more general class, such as `facebook/DiT-XL-2-256`."""
        if config.get("_class_name") != "Transformer2DModel" or config.get("norm_type") != "ada_norm_zero":
            return super().present_config(config)
        return of_class(self.model, config)

    def num_labels(self, config: Mapping[str, Any]) -> int:
        """Count the null class, which it always has."""
        return config["num_embeds_ada_norm"] + 1

    def label_options(self, num_classes: int) -> dict[str, int]:
        """Leave out the null class, which the option does not count."""
        return {"num_embeds_ada_norm": num_classes}

    def default_null_class(self, config: Mapping[str, Any]) -> int | None:
        """Return its last label."""
        return config["num_embeds_ada_norm"]

    def is_conditional(self, denoiser: Any) -> bool:
        """Whether it has classes besides the null class."""
        return denoiser.config["num_embeds_ada_norm"] > 0

    def stop_own_dropping(self, denoiser: nn.Module) -> None:
        """Stop its blocks from dropping labels, since each would draw for itself."""
        for module in denoiser.modules():
            if isinstance(module, LabelEmbedding):
                module.dropout_prob = 0


class SelfConditionedDiT(DiT):
    """`DiTTransformer2DModel` with self-conditioning."""

    model = SelfConditionedDiTTransformer2DModel
    own_module = "self_conditioned"

    def computed_buffers(self, config: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return its positions; the network without blocks that has them can have no layer that conditions others."""
        return super().computed_buffers({**config, "self_condition_layer": None})


def of_class(model: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config of a more general class as one of `model`, which has fewer options."""
    known = inspect.signature(model).parameters
    return {k: v for k, v in config.items() if k in known} | {"_class_name": model.__name__}
