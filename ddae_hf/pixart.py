"""diffusers' `PixArtTransformer2DModel`, as in PixArt-alpha (Chen et al. 2023, arXiv 2310.00426) and PixArt-sigma.

A tap is the output of a transformer block. The network is told a text and its mask and, in PixArt-alpha of 1024 pixels,
height and width of the image and their ratio. Half of its output may be a learned variance.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import PixArtTransformer2DModel
from torch import Tensor

from .dits import PatchTransformer, of_class
from .texts import MASK, SEQUENCE, Shapes, TextConditioned


class PixArt(TextConditioned, PatchTransformer):
    """diffusers' `PixArtTransformer2DModel`."""

    model = PixArtTransformer2DModel
    stock_pipelines = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")

    def present_config(self, config: dict[str, Any]) -> dict[str, Any] | None:
        """Recognise those that diffusers once kept in a more general class, as `PixArt-alpha/PixArt-XL-2-512x512`."""
        if config.get("_class_name") != "Transformer2DModel" or config.get("norm_type") != "ada_norm_single":
            return super().present_config(config)
        return of_class(self.model, config)

    def text_parts(self, config: Mapping[str, Any]) -> Shapes:
        """Return the sequence and its mask."""
        width = config.get("caption_channels") or config["cross_attention_dim"]
        return {SEQUENCE: (None, width), MASK: (None,)}

    def size_parts(self, config: Mapping[str, Any], height: int, width: int) -> dict[str, list[float]]:
        """Return height, width and their ratio, where the network is told them."""
        told = config.get("use_additional_conditions")
        if told is None:  # as diffusers has it
            told = config["sample_size"] == 128
        return {"resolution": [height, width], "aspect_ratio": [height / width]} if told else {}

    def call(self, denoiser: Any, sample: Tensor, timestep: Tensor, **keywords: Any) -> Any:
        """Name the timestep, as its forward takes it third."""
        return denoiser(sample, timestep=timestep, **keywords)

    def keywords(self, conditions: dict[str, Any]) -> dict[str, Any]:
        """Put the sizes where its forward takes them."""
        sizes = {name: value for name, value in conditions.items() if name not in (SEQUENCE, MASK)}
        texts = {name: conditions[name] for name in (SEQUENCE, MASK)}
        return texts | ({"added_cond_kwargs": sizes} if sizes else {})
