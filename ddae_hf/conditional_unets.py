"""diffusers' `UNet2DConditionModel`, as in Stable Diffusion 1, 2 and XL.

Taps are as in `UNet2DModel`, and an attention consists of transformer blocks, which are inner taps. The network is told
a text and, in XL (Podell et al. 2023, arXiv 2307.01952), a pooled embedding of the text and six sizes: height and width
of the original image, top and left of the crop, height and width that are wanted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import UNet2DConditionModel

from .texts import SEQUENCE, Shapes, TextConditioned
from .unets import UNet

SIZES = 6  # of an image in XL
# What it may not be told, or may not do, by option and allowed values.
ALLOWED: dict[str, tuple[Any, ...]] = {
    "time_embedding_type": ("positional",),
    "addition_embed_type": (None, "text_time"),
    "attention_type": ("default",),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "encoder_hid_dim_type": (None,),
    "dual_cross_attention": (False,),
    "only_cross_attention": (False,),
    "mid_block_only_cross_attention": (None, False),
    "time_cond_proj_dim": (None,),  # the strength of guidance, which networks that were distilled with it are told
}


class UNet2DConditional(TextConditioned, UNet):
    """diffusers' `UNet2DConditionModel`."""

    model = UNet2DConditionModel
    stock_pipelines = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
    indivisible = ("ResnetBlock2D", "BasicTransformerBlock")

    def check_config(self, config: Mapping[str, Any]) -> None:
        """Refuse networks that are told something besides a text and sizes, or that are fed more than noisy latents."""
        super().check_config(config)
        for name, allowed in ALLOWED.items():
            if config.get(name, allowed[0]) not in allowed:
                values = " or ".join(map(repr, allowed))
                raise ValueError(
                    f"The denoiser's {name} is {config[name]!r}, which is not supported: allowed is {values}."
                )
        if not isinstance(config["cross_attention_dim"], int):
            raise ValueError("The denoiser's cross_attention_dim differs from block to block, which is not supported.")
        if config["in_channels"] != config["out_channels"]:
            raise ValueError(
                f"The denoiser is fed {config['in_channels']} channels and answers with {config['out_channels']}, as "
                "those for inpainting, editing and upscaling do: allowed are networks that are fed noisy latents alone."
            )

    def text_parts(self, config: Mapping[str, Any]) -> Shapes:
        """Return the sequence and, in XL, the pooled embedding."""
        parts: Shapes = {SEQUENCE: (None, config["cross_attention_dim"])}
        if config.get("addition_embed_type") == "text_time":
            sizes = SIZES * config["addition_time_embed_dim"]
            parts["text_embeds"] = (config["projection_class_embeddings_input_dim"] - sizes,)
        return parts

    def size_parts(self, config: Mapping[str, Any], height: int, width: int) -> dict[str, list[float]]:
        """Return the sizes of an image that was not cropped, in XL."""
        if config.get("addition_embed_type") != "text_time":
            return {}
        return {"time_ids": [height, width, 0, 0, height, width]}

    def keywords(self, conditions: dict[str, Any]) -> dict[str, Any]:
        """Put what comes beside the sequence where its forward takes it."""
        added = {name: value for name, value in conditions.items() if name != SEQUENCE}
        return {SEQUENCE: conditions[SEQUENCE]} | ({"added_cond_kwargs": added} if added else {})
