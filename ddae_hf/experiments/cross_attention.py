"""Where a denoiser that is told a text looks for each of its words: cross-attention maps.

    from PIL import Image
    from ddae_hf.experiments import word_maps

    maps = word_maps("stable-diffusion-v1-5/stable-diffusion-v1-5", Image.open("cat.jpg"), "a photo of a cat on a sofa")
    maps["cat"]  # (1, 512, 512)

A cross-attention gives every place of the image shares of the text's tokens, `softmax(q k^T * scale)`, which sum to 1.
The map of a word is the mean of its tokens' shares, over heads and layers, as of Hertz et al. 2022 (arXiv 2208.01626),
who read them while an image is drawn; here an image that there is gets noise of one level, and one pass is enough.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..building import refusing
from ..checkpoints import Checkpoint, read_checkpoint
from ..modeling_ddae import DDAEModel
from ..network_class import Tap
from ..networks import network_of
from ..prompts import embed, open_tokenizer
from ..texts import MASK, SEQUENCE
from .arrays import StrPath
from .features import evaluating
from .models import Model, base_of, open_model, open_processor

SIDE = 16  # places in height and in width that the maps of the default layers have at least
MASKED = -10000.0  # what diffusers adds to the scores of tokens that a mask leaves out


class ToldWords(NamedTuple):
    """A prompt as the denoiser is told it, and where its words are."""

    condition: dict[str, Tensor]  # as `embed_prompts` returns it
    places: dict[str, list[int]]  # the numbers of a word's tokens in the sequence, by word


def word_maps(
    model: Model,
    images: Any,
    prompt: str,
    words: str | Sequence[str] | None = None,
    *,
    texts: StrPath | None = None,
    layers: Sequence[str] | None = None,
    sigma: float | None = None,
    dtype: str | None = None,
    cache_dir: str | None = None,
) -> dict[str, Tensor]:
    """Return the cross-attention maps of words of a prompt, over images.

    Args:
        model: A checkpoint's folder or Hub id, or an open model, of a denoiser that is told a text.
        images: An image, or a list of images that go through the network together, as `DDAEImageProcessor` takes them.
        prompt: The text that the denoiser is told of all images.
        words: Words of the prompt, or phrases, whatever their case; by default all of its words. The map of a word that
            is several tokens, or stands in the prompt several times, is the mean over all of these tokens.
        texts: The checkpoint whose tokenizers and text encoders embed the prompt; by default `model`, if it is a path.
        layers: Names of transformer blocks with cross-attention (`up_blocks.1.attentions.0.transformer_blocks.0`), or
            of what has some inside (`up_blocks.1`). By default those of one resolution: the coarsest with at least 16
            places in height and in width or, where none has as many, the finest.
        sigma: Noise level on images or scaled latents; by default the model's.
        dtype: Name of the type that network and text encoders compute in, by default the checkpoint's. The shares are
            computed in float32 of its queries and keys.
        cache_dir: Where downloads are kept.

    Returns:
        A map (B, height, width), float32 on the CPU, of the model's images, by word, in [0, 1]: each layer's mean over
        heads (and over `config.num_noise_samples` draws of the model's fixed noise) resized bilinearly to the image,
        and then the mean of the layers.

    Raises:
        ValueError: A denoiser that is told no text, a checkpoint without text encoders, a word that is not in the
            prompt or that comes after the tokens which the text encoder reads, other layers, or an open model of a
            type that differs from `dtype`.
        OSError: No such checkpoint.
    """
    if texts is None and not isinstance(model, (str, os.PathLike)):
        raise ValueError("model is an open one, which keeps no text encoders: name its checkpoint as texts.")
    where = model if texts is None else texts
    checkpoint = read_checkpoint(where, cache_dir=cache_dir)  # type: ignore[arg-type]
    positions_of(checkpoint, prompt, words, None)  # before any long work
    network = open_model(model, dtype=dtype, cache_dir=cache_dir)
    told = tell_words(checkpoint, prompt, words, network.dtype)
    pixel_values = open_processor(model, cache_dir)(images, return_tensors="pt")["pixel_values"]
    return read_word_maps(network, pixel_values, told, layers, sigma)


def tell_words(
    checkpoint: Checkpoint, prompt: str, words: str | Sequence[str] | None = None, dtype: torch.dtype | None = None
) -> ToldWords:
    """Return a prompt as a checkpoint's denoiser is told it, with the places of words: see `word_maps`."""
    condition = embed(checkpoint, prompt, dtype)
    return ToldWords(condition, positions_of(checkpoint, prompt, words, condition[SEQUENCE].shape[1]))


def positions_of(
    checkpoint: Checkpoint, prompt: str, words: str | Sequence[str] | None, length: int | None
) -> dict[str, list[int]]:
    """Return the numbers of the tokens of words in a prompt, by word, as the checkpoint's own tokenizers count.

    Args:
        checkpoint: The checkpoint.
        prompt: The prompt.
        words: Words or phrases; None means every word.
        length: Number of tokens that the text encoder reads; None means that it reads all.

    Raises:
        ValueError: See `word_maps`.
    """
    if not isinstance(prompt, str):
        raise ValueError(f"prompt is of type {type(prompt).__name__}: it must be a text.")
    text = prompt.lower().strip()  # as PixArt's pipelines change it; CLIP's tokenizers ignore case and outer spaces
    known = list(dict.fromkeys(re.findall(r"\w+", text)))
    wanted = known if words is None else [words] if isinstance(words, str) else list(words)
    if not wanted:
        raise ValueError("There are no words: give a prompt that has some, and words as a list of one or more.")
    spans = _token_spans(checkpoint, text, length)
    read = max(end for _, end in spans)
    places = {}
    for word in wanted:
        plain = word.lower().strip()
        found = [match.span() for match in re.finditer(rf"(?<!\w){re.escape(plain)}(?!\w)", text)] if plain else []
        if not found:
            raise ValueError(f"{word!r} is not in the prompt {prompt!r}: its words are {', '.join(known)}.")
        found = [(first, last) for first, last in found if last <= read]
        if not found:
            raise ValueError(f"{word!r} comes after the {length} tokens of a prompt that are read: shorten the prompt.")
        places[word] = [
            number
            for number, (start, end) in enumerate(spans)
            if any(start < last and first < end for first, last in found)
        ]
    return places


def _token_spans(checkpoint: Checkpoint, text: str, length: int | None) -> list[tuple[int, int]]:
    """Return where each token of a text begins and ends in it; those that stand for no part of it have no extent."""
    names = [name for name in checkpoint.texts if name.startswith("tokenizer")]
    if not names:
        raise ValueError(
            f"{checkpoint.path} has no tokenizers: word maps need a checkpoint with tokenizers and text encoders."
        )
    cut = {} if length is None else {"truncation": True, "max_length": length}
    encoded = []
    for name in names:
        tokenizer = open_tokenizer(checkpoint, name)
        with refusing(f"{checkpoint.path}: its {name} cannot divide {text!r}"):
            encoded.append(tokenizer(text, return_offsets_mapping=True, **cut))
    if any(each["input_ids"] != encoded[0]["input_ids"] for each in encoded):
        raise ValueError(f"{checkpoint.path} has tokenizers that divide {text!r} differently, which is not supported.")
    return encoded[0]["offset_mapping"]


def layers_with_words(model: DDAEModel, layers: Sequence[str] | None = None) -> list[Tap]:
    """Return a model's transformer blocks with cross-attention, in forward order: see `word_maps` for `layers`."""
    denoiser = model.diffusion.own
    network = network_of(denoiser)
    blocks = [tap for tap in network.taps(denoiser) if _attention(model, tap) is not None]
    if not network.stock_pipelines or not blocks:
        raise ValueError(f"This {type(denoiser).__name__} has no cross-attention to a text, and so no maps of words.")
    if layers is None:
        side = min(model.config.sample_shape[1:])
        coarsest = max((tap.stride for tap in blocks if side // tap.stride >= SIDE), default=None)
        stride = min(tap.stride for tap in blocks) if coarsest is None else coarsest
        return [tap for tap in blocks if tap.stride == stride]
    if isinstance(layers, str) or not layers:
        raise ValueError(f"layers is {layers!r}: it must be a list of one or more names.")
    chosen = set()
    for layer in layers:
        within = {tap for tap in blocks if f"{tap.name}.".startswith(f"{layer}.")}
        if not within:
            names = ", ".join(tap.name for tap in blocks)
            raise ValueError(f"There is no cross-attention in the layer {layer!r}: allowed are {names}.")
        chosen |= within
    return [tap for tap in blocks if tap in chosen]


def _attention(model: DDAEModel, tap: Tap) -> Any:
    """Return the cross-attention of a transformer block; None for other taps."""
    return getattr(model.diffusion.own.get_submodule(tap.name), "attn2", None)


def read_word_maps(
    model: Any, pixel_values: Tensor, told: ToldWords, layers: Sequence[str] | None = None, sigma: float | None = None
) -> dict[str, Tensor]:
    """Return maps (B, height, width) of words over images (B, C, H, W) in [-1, 1], by word: see `word_maps`."""
    model = base_of(model)
    taps = layers_with_words(model, layers)
    shape = model.config.sample_shape
    total = torch.zeros(len(pixel_values), len(told.places), *pixel_values.shape[-2:], device=model.device)
    for tap, shares in zip(taps, read_shares(model, pixel_values, told.condition, taps, sigma), strict=True):
        columns = torch.stack([shares[..., places].mean(-1) for places in told.places.values()], -1)
        maps = network_of(model.diffusion.own).on_grid(columns, tap, shape[1:])
        total += F.interpolate(maps, tuple(pixel_values.shape[-2:]), mode="bilinear")
    return {word: (total[:, number] / len(taps)).cpu() for number, word in enumerate(told.places)}


def read_shares(
    model: DDAEModel, pixel_values: Tensor, condition: Any, taps: Sequence[Tap], sigma: float | None = None
) -> list[Tensor]:
    """Return what each place of images gives to each token, (B, N, L) for each block, float32, in the blocks' order.

    They are means over heads and over draws of noise, and sum to 1 over the L tokens of the sequence, its padding
    included.
    """
    diffusion = model.diffusion
    level = model.config.sigma if sigma is None else sigma
    diffusion.family.check_sigma(level)
    names = [f"{tap.name}.attn2.{part}" for tap in taps for part in ("to_q", "to_k")]
    with evaluating(model):
        clean = model.encode(pixel_values.to(model.device))
        draws = model.fixed_noise[: model.config.num_noise_samples, None].expand(-1, len(clean), -1, -1, -1)
        conditions = diffusion.conditions(condition, len(clean), clean.device)
        found = diffusion.module_outputs(clean, draws, level, names, conditions)
        mask = conditions[MASK].repeat(len(draws), 1) if MASK in conditions else None
        shares = []
        for tap in taps:
            queries, keys = (found.pop(f"{tap.name}.attn2.{part}") for part in ("to_q", "to_k"))
            attention = _attention(model, tap)
            each = shares_of_tokens(queries, keys, attention.heads, attention.scale, mask)
            shares.append(each.unflatten(0, (len(draws), len(clean))).mean(0))
    return shares


def shares_of_tokens(queries: Tensor, keys: Tensor, heads: int, scale: float, mask: Tensor | None) -> Tensor:
    """Return the mean over heads of `softmax(q k^T * scale)`, (B, N, L), float32.

    Queries are (B, N, D) and keys (B, L, D), with the channels of one head after those of another; the mask (B, L) is 1
    where there is a token.
    """
    q, k = (each.float().unflatten(2, (heads, -1)).transpose(1, 2) for each in (queries, keys))
    scores = scale * (q @ k.transpose(2, 3))
    if mask is not None:
        scores = scores + MASKED * (1 - mask.float())[:, None, None]
    return scores.softmax(-1).mean(1)
