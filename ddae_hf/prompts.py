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
from transformers.utils import is_sentencepiece_available

from .building import check_numbers, refusing, short
from .checkpoints import Checkpoint, read_checkpoint
from .latents import downsampling
from .networks import network_of, skeleton
from .weights import WHOLE_FILE, find_file, inside, read_json, refuse_missing, refuse_offline, weight_files

PIXELS_OF_LATENT = 8  # a latent's side, where there is no VAE to ask, as in the pipelines
# The files that hold a tokenizer's words: one of these sets, by the beginning of its class's name.
WORDS = {"CLIP": (("tokenizer.json",), ("vocab.json", "merges.txt")), "T5": (("tokenizer.json",), ("spiece.model",))}


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
            `StableDiffusionXLPipeline`, `PixArtAlphaPipeline` or `PixArtSigmaPipeline`. A classifier that `save_head`
            wrote stands for its base.
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
        ValueError: A checkpoint whose denoiser is told no text, or that has no text encoders, or damaged ones; prompts
            that are no text.
        OSError: The folder or repository does not exist or cannot be reached.
    """
    return embed(read_checkpoint(pretrained_model_name_or_path, variant, **hub).chain()[-1], prompts, dtype)


def embeds(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint has all that embeds texts."""
    names = set(checkpoint.texts)
    encoders = {name for name in names if name.startswith("text_encoder")}
    return bool(encoders) and {name.replace("text_encoder", "tokenizer") for name in encoders} <= names


def embed(
    checkpoint: Checkpoint, prompts: str | Sequence[str] | None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Return the condition that texts are for a checkpoint's denoiser: see `embed_prompts`."""
    texts = [""] if prompts is None else [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(texts, Sequence) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"prompts are {short(prompts)}: they must be a text, or a list of texts.")
    network = network_of(checkpoint.denoiser)
    if not network.stock_pipelines:
        raise ValueError(f"{checkpoint.path} has a {network.model.__name__}, which is told no text: leave prompts out.")
    if checkpoint.index is None or not embeds(checkpoint):
        raise ValueError(
            f"{checkpoint.path} has no text encoders and tokenizers: give the whole pipeline that it is of "
            f"({', '.join(network.stock_pipelines)})."
        )
    config = skeleton(checkpoint.denoiser).config
    pipeline = _open_encoders(checkpoint, dtype)
    with refusing(f"{checkpoint.path}: its text encoders cannot embed the prompts"), torch.inference_mode():
        found = pipeline.encode_prompt(
            prompt=list(texts), device=torch.device("cpu"), num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    told = [tensor.clone() for tensor in found if tensor is not None]
    if prompts is None and pipeline.config.get("force_zeros_for_empty_prompt"):
        told = [torch.zeros_like(tensor) for tensor in told]
    condition = dict(zip(network.text_parts(config), told, strict=False))
    factor = PIXELS_OF_LATENT if checkpoint.vae is None else downsampling(checkpoint.vae)
    height, width = (side * factor for side in network.size(config))
    for name, sizes in network.size_parts(config, height, width).items():
        condition[name] = torch.tensor([sizes], dtype=torch.float32)
    network.check_condition_shapes({name: tuple(tensor.shape[1:]) for name, tensor in condition.items()}, config)
    return condition


def _open_encoders(checkpoint: Checkpoint, dtype: torch.dtype | None) -> Any:
    """Return the checkpoint's pipeline with nothing but its tokenizers and text encoders, on the CPU."""
    index = checkpoint.index or {}
    stock = getattr(diffusers, index["_class_name"])
    options = inspect.signature(stock).parameters
    given: dict[str, Any] = {name: None for name, option in options.items() if option.default is option.empty}
    given |= {name: False for name in ("requires_safety_checker", "add_watermarker") if name in options}
    zeros = "force_zeros_for_empty_prompt"
    if zeros in options and zeros in index:
        if not isinstance(index[zeros], bool):
            raise ValueError(f"{checkpoint.path} says that {zeros} is {short(index[zeros])}: it must be true or false.")
        given[zeros] = index[zeros]
    for name in checkpoint.texts:
        encodes = name.startswith("text_encoder")
        given[name] = _open_encoder(checkpoint, name, dtype) if encodes else open_tokenizer(checkpoint, name)
    for name in checkpoint.texts:
        positions = getattr(getattr(given[name], "config", None), "max_position_embeddings", None)
        tokens = getattr(given.get(name.replace("text_encoder", "tokenizer")), "model_max_length", None)
        if positions is not None and (not isinstance(tokens, int) or not 2 <= tokens <= positions):
            raise ValueError(
                f"{checkpoint.path} is damaged: its tokenizer makes texts of {short(tokens)} tokens (model_max_length "
                f"in tokenizer_config.json), but its {name} takes 2 to {positions}."
            )
    return stock(**given)


def open_tokenizer(checkpoint: Checkpoint, name: str) -> Any:
    """Return a checkpoint's tokenizer by the name of its component, or raise `ValueError`.

    Its words must be there: transformers makes a tokenizer without words where they are missing.
    """
    kind = checkpoint.texts[name]
    where = inside(checkpoint.hub, name)
    sets = next(sets for beginning, sets in WORDS.items() if kind.startswith(beginning))
    there = (files for files in sets if all(find_file(checkpoint.path, file, **where) for file in files))
    files = next(there, None)
    if files is None:
        refuse_offline(sets[0][0], checkpoint.path, where)
        wanted = " or ".join(" and ".join(files) for files in sets)
        raise ValueError(f"{checkpoint.path} is incomplete: its {name} needs {wanted}.")
    if files == ("spiece.model",) and not is_sentencepiece_available():
        raise ValueError(
            f"{checkpoint.path} has its {name} as a spiece.model alone, which needs another package: "
            "`pip install sentencepiece protobuf`. (Saved again where that is installed, it has a tokenizer.json.)"
        )
    for file in ("tokenizer_config.json", *files):
        if file.endswith(".json"):
            read_json(checkpoint.path, file, where)  # which refuses what is damaged
    with refusing(f"{checkpoint.path}: its {name} cannot be opened as a {kind}"):
        return getattr(transformers, kind).from_pretrained(checkpoint.path, **where)


def _open_encoder(checkpoint: Checkpoint, name: str, dtype: torch.dtype | None) -> Any:
    """Return a text encoder with all of its weights."""
    kind = checkpoint.texts[name]
    where = inside(checkpoint.hub, name)
    described = read_json(checkpoint.path, "config.json", where)
    if described is None:
        refuse_offline("config.json", checkpoint.path, where)
        raise ValueError(f"{checkpoint.path} is incomplete: its {name} has no config.json.")
    check_numbers(f"{checkpoint.path}: its {name}", described)
    _, variant = weight_files(checkpoint.path, WHOLE_FILE, where, checkpoint.variant, None)
    cls = getattr(transformers, kind)
    with refusing(f"{checkpoint.path}: its {name} cannot be opened as a {kind}"):
        config = cls.config_class.from_pretrained(checkpoint.path, **where)
        config._attn_implementation = None  # a config may name code on the Hub
        encoder, info = cls.from_pretrained(
            checkpoint.path, config=config, dtype=dtype or "auto", variant=variant, use_safetensors=True,
            output_loading_info=True, **where,
        )  # fmt: skip
    every = set(encoder.state_dict())
    refuse_missing(checkpoint.path, name, every, every - set(info["missing_keys"]))
    return encoder


def check_told(checkpoint: Checkpoint, condition: Any, prompt: Any) -> None:
    """Refuse another prompt or condition for a model that stores what its denoiser is told."""
    stored = checkpoint.config.get("prompt")
    if checkpoint.holds_model and (condition is not None or prompt != stored):
        raise ValueError(
            f"{checkpoint.path} was saved with what its denoiser is told ("
            f"{'no prompt' if stored is None else f'the prompt {stored!r}'}): leave prompt and condition out. Its "
            "forward takes another `condition`; to train for another prompt, open the generative checkpoint with it."
        )


def null_condition(checkpoint: Checkpoint, dtype: torch.dtype, prompt: str | None, condition: Any) -> dict[str, Tensor]:
    """Return what a generator's denoiser is to be told of all images, (1, ...) by name; empty where nothing is.

    Args:
        checkpoint: The generator, whose denoiser needs not be loaded yet.
        dtype: The type of the denoiser.
        prompt: A text; None is the null prompt.
        condition: Embeddings, in place of a text.
    """
    denoiser = skeleton(checkpoint.denoiser)
    network = network_of(denoiser)
    if condition is not None and prompt is not None:
        raise ValueError("Both prompt and condition came: pass one of them.")
    if not network.stock_pipelines and condition is not None:
        raise ValueError("condition came, but this denoiser is told no text: leave it out, or pass it to the forward.")
    if not network.stock_pipelines or (condition is None and prompt is None and not embeds(checkpoint)):
        return {}
    told = network.conditions(denoiser, embed(checkpoint, prompt, dtype) if condition is None else condition, 1, "cpu")
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in told.items()}
