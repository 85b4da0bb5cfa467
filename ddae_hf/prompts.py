"""Texts as conditions of a denoiser, by the tokenizers and text encoders of its checkpoint.

diffusers' own pipeline embeds them, with nothing but these parts, so that a denoiser is told what it is told there.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor

from .building import refusing, short
from .checkpoints import Checkpoint, read_checkpoint
from .latents import downsampling
from .networks import network_of, skeleton
from .weights import WHOLE_FILE, inside, weight_files

PIXELS_OF_LATENT = 8  # a latent's side, where there is no VAE to ask, as in the pipelines


def embed_prompts(
    pretrained_model_name_or_path: str | os.PathLike[str],
    prompts: str | Sequence[str] | None = None,
    *,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    **hub: Any,
) -> dict[str, Tensor]:
    """Return the condition that texts are for a checkpoint's denoiser, by its own tokenizers and text encoders.

    These are opened on the CPU and let go again; no other part is.

    Args:
        pretrained_model_name_or_path: A folder or Hub repository in the layout of `StableDiffusionPipeline`,
            `StableDiffusionXLPipeline`, `PixArtAlphaPipeline` or `PixArtSigmaPipeline`.
        prompts: A text for all images, or a list of one for each (B). None is the null prompt: what the pipeline's
            guidance compares with.
        dtype: The type in which texts are embedded, by default that of the stored text encoders.
        variant: Which of several sets of weights, such as `"fp16"`; encoders without it are opened with their plain
            weights.
        **hub: `revision`, `subfolder`, `token` and so on, which say where the files are.

    Returns:
        Tensors (B, ...), or (1, ...) for all images, by name, as the models take them for `condition`: the sequence
        `encoder_hidden_states` (B, L, D); for Stable Diffusion XL `text_embeds` (B, P) and `time_ids` (B, 6), for
        PixArt `encoder_attention_mask` (B, L) and, where it is told sizes, `resolution` (B, 2) and `aspect_ratio`
        (B, 1).

    Raises:
        ValueError: A checkpoint whose denoiser is told no text, or that has no text encoders; prompts that are no text.
        OSError: The folder or repository does not exist or cannot be reached.
    """
    return embed(read_checkpoint(pretrained_model_name_or_path, variant, **hub), prompts, dtype)


def embeds(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint has all that embeds texts."""
    names = set(checkpoint.texts)
    encoders = {name for name in names if name.startswith("text_encoder")}
    return bool(encoders) and {name.replace("text_encoder", "tokenizer") for name in encoders} <= names


def embed(
    checkpoint: Checkpoint, prompts: str | Sequence[str] | None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Return the condition that texts are for a checkpoint's denoiser: see `embed_prompts`."""
    texts = [""] if prompts is None else [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"prompts are {short(prompts)}: they must be a text, or a list of texts.")
    network = network_of(checkpoint.denoiser)
    if not network.stock_pipelines:
        raise ValueError(f"{checkpoint.path} has a {network.model.__name__}, which is told no text: leave prompts out.")
    if checkpoint.index is None or not embeds(checkpoint):
        raise ValueError(
            f"{checkpoint.path} has no text encoders and tokenizers: give the whole pipeline that it is of "
            f"({', '.join(network.stock_pipelines)})."
        )
    pipeline = _open_encoders(checkpoint, dtype)
    with torch.inference_mode():
        found = pipeline.encode_prompt(
            prompt=texts, device=torch.device("cpu"), num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    config = skeleton(checkpoint.denoiser).config
    told = [tensor.clone() for tensor in found if tensor is not None]
    if prompts is None and pipeline.config.get("force_zeros_for_empty_prompt"):
        told = [torch.zeros_like(tensor) for tensor in told]
    condition = dict(zip(network.text_parts(config), told, strict=True))
    factor = PIXELS_OF_LATENT if checkpoint.vae is None else downsampling(checkpoint.vae)
    height, width = (side * factor for side in network.size(config))
    for name, sizes in network.size_parts(config, height, width).items():
        condition[name] = torch.tensor([sizes], dtype=torch.float32)
    return condition


def _open_encoders(checkpoint: Checkpoint, dtype: torch.dtype | None) -> Any:
    """Return the checkpoint's pipeline with nothing but its tokenizers and text encoders, on the CPU."""
    index = checkpoint.index or {}
    stock = getattr(diffusers, index["_class_name"])
    options = inspect.signature(stock).parameters
    given: dict[str, Any] = {name: None for name, option in options.items() if option.default is option.empty}
    given |= {name: index[name] for name in ("force_zeros_for_empty_prompt",) if name in options and name in index}
    given |= {name: False for name in ("requires_safety_checker", "add_watermarker") if name in options}
    for name, kind in checkpoint.texts.items():
        where = inside(checkpoint.hub, name)
        arguments: dict[str, Any] = {}
        if name.startswith("text_encoder"):
            _, variant = weight_files(checkpoint.path, WHOLE_FILE, where, checkpoint.variant, None)
            arguments = {"dtype": dtype or "auto", "variant": variant, "use_safetensors": True}
        with refusing(f"{checkpoint.path}: its {name} cannot be opened as a {kind}"):
            given[name] = getattr(transformers, kind).from_pretrained(checkpoint.path, **arguments, **where)
    return stock(**given)
