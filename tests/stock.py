"""Small random checkpoints in the layouts of diffusers' Stable Diffusion and PixArt pipelines, tokenizers included."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

WORDS = ("a", "cat", "dog", "photo", "of", "the", "red")
LENGTH = 9  # tokens of CLIP's sequence
WIDTH = 16  # of its embeddings
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
BLOCKS = {
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
UNET = {
    "sample_size": 8, "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": WIDTH,
    "attention_head_dim": 4, **BLOCKS,
}  # fmt: skip
# In XL the attention is in the inner levels, and has more than one transformer block.
XL = {
    **UNET, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
    "cross_attention_dim": 2 * WIDTH, "projection_class_embeddings_input_dim": 6 * 4 + 12,
}  # fmt: skip
PIXART = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 8, "num_layers": 3,
    "cross_attention_dim": 24, "sample_size": 8, "patch_size": 2, "caption_channels": 12, "norm_num_groups": 4,
}  # fmt: skip


def clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """Return a tokenizer of CLIP's kind that knows some words."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(set("".join(WORDS)))
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(f"{word}</w>" for word in WORDS if len(word) > 1)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(dict.fromkeys(tokens))}))
    merges = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges.append(f"{parts[0]} {parts[1]}")
            parts = [parts[0] + parts[1], *parts[2:]]
            if len(parts) > 1 and parts[0] not in tokens:
                tokens.append(parts[0])
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(dict.fromkeys(tokens))}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(dict.fromkeys(merges)) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=LENGTH)


def clip_config(tokenizer: CLIPTokenizer, **options: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=LENGTH, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, **options,
    )  # fmt: skip


def t5_tokenizer() -> T5Tokenizer:
    """Return a tokenizer of T5's kind that knows some words."""
    pieces = ["<pad>", "</s>", "<unk>", *(f"▁{word}" for word in WORDS), "▁", *sorted(set("".join(WORDS)))]
    return T5Tokenizer(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0)


def make_vae(**options: Any) -> diffusers.AutoencoderKL:
    sizes = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4, "sample_size": 16}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return diffusers.AutoencoderKL(**{**sizes, **blocks, **options})


def stable_diffusion(folder: Path, prediction_type: str = "epsilon", **options: Any) -> Any:
    """Return a small `StableDiffusionPipeline`, and save it, if `folder` is given more than a tokenizer's."""
    torch.manual_seed(0)
    tokenizer = clip_tokenizer(folder / "tokenizer")
    scheduler = diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1, prediction_type=prediction_type)
    pipeline = diffusers.StableDiffusionPipeline(
        vae=make_vae(), unet=diffusers.UNet2DConditionModel(**{**UNET, **options}), scheduler=scheduler,
        text_encoder=CLIPTextModel(clip_config(tokenizer)).eval(), tokenizer=tokenizer,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return pipeline


def stable_diffusion_xl(folder: Path) -> Any:
    """Return a small `StableDiffusionXLPipeline`, and save it."""
    torch.manual_seed(0)
    tokenizer = clip_tokenizer(folder / "tokenizer")
    config = clip_config(tokenizer, projection_dim=12)
    pipeline = diffusers.StableDiffusionXLPipeline(
        vae=make_vae(), unet=diffusers.UNet2DConditionModel(**XL),
        scheduler=diffusers.EulerDiscreteScheduler(**BETAS), tokenizer=tokenizer, tokenizer_2=tokenizer,
        text_encoder=CLIPTextModel(config).eval(), text_encoder_2=CLIPTextModelWithProjection(config).eval(),
        add_watermarker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return pipeline


def pixart(
    folder: Path, kind: str = "PixArtAlphaPipeline", vae_options: dict[str, Any] | None = None, **options: Any
) -> Any:
    """Return a small `PixArtAlphaPipeline` or `PixArtSigmaPipeline`, and save it."""
    torch.manual_seed(0)
    tokenizer = t5_tokenizer()
    sizes = {"d_model": 12, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 3}
    encoder = T5EncoderModel(T5Config(vocab_size=len(tokenizer), feed_forward_proj="gated-gelu", **sizes)).eval()
    pipeline = getattr(diffusers, kind)(
        tokenizer=tokenizer, text_encoder=encoder, vae=make_vae(**vae_options or {}),
        transformer=diffusers.PixArtTransformer2DModel(**{**PIXART, **options}),
        scheduler=diffusers.DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02),
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return pipeline


LAYOUTS: dict[str, Callable[[Path], Any]] = {
    "sd1": stable_diffusion,
    "sd2": functools.partial(
        stable_diffusion, prediction_type="v_prediction", use_linear_projection=True, attention_head_dim=(2, 4)
    ),
    "xl": stable_diffusion_xl,
    "alpha": pixart,
    # Which diffusers tells from others by the size of its latents, as it does the sizes that it is told.
    "alpha of 1024 pixels": functools.partial(
        pixart, sample_size=128, patch_size=16, vae_options={"mid_block_add_attention": False}
    ),
    "sigma": functools.partial(pixart, kind="PixArtSigmaPipeline"),
}


class Called(Exception):
    """A pipeline has called its network."""


def denoiser_of(pipeline: Any) -> Any:
    return pipeline.components.get("unet") or pipeline.components["transformer"]


def first_call(pipeline: Any, prompts: list[str]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what a pipeline calls its network with first: half of the batch is told no text, half the prompts."""
    calls: list[Any] = []

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        calls.append((args, kwargs))
        raise Called

    handle = denoiser_of(pipeline).register_forward_pre_hook(keep, with_kwargs=True)
    own = {} if hasattr(pipeline, "unet") else {"use_resolution_binning": False, "clean_caption": False}
    try:
        pipeline(prompts, guidance_scale=5.0, num_inference_steps=2, **own)
    except Called:
        return calls[0]
    finally:
        handle.remove()
    raise AssertionError("The pipeline did not call its network.")


def batched(values: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return nested arguments with a function of every tensor that has a batch."""
    if isinstance(values, dict):
        return {name: batched(value, function) for name, value in values.items()}
    return function(values) if isinstance(values, torch.Tensor) and values.ndim else values


def noisy_input(pipeline: Any, latents: torch.Tensor, noise: torch.Tensor, timestep: int) -> tuple[Any, Any]:
    """Return the network's input that a pipeline's scheduler makes of latents, and the timestep as it has it."""
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(1000)
    (found,) = [t for t in scheduler.timesteps if t == timestep][:1]
    noisy = scheduler.add_noise(latents, noise, found.expand(len(latents)))
    return scheduler.scale_model_input(noisy, found), found


def outputs_of(network: torch.nn.Module, names: list[str], *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
    """Return the outputs of parts of a network by name, as hooks find them in a call of it."""
    found: dict[str, torch.Tensor] = {}

    def keep(name: str, module: Any, inputs: Any, output: Any) -> None:
        found[name] = output[0] if isinstance(output, tuple) else output

    parts = [(name, network.get_submodule(name)) for name in names]
    handles = [part.register_forward_hook(functools.partial(keep, name)) for name, part in parts]
    network(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return found


class CountedOperations(TorchDispatchMode):
    """Counts floating-point operations, as torch's `FlopCounterMode` does, but without hooks on modules.

    Under those, hidden states would be read by hooks, and not by a view.
    """

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **kwargs or {})
        if formula := flop_registry.get(function._overloadpacket):
            self.count += formula(*args, **kwargs or {}, out_val=output)
        return output


def operations_before(network: Any, names: Iterable[str], *inputs: Any, **told: Any) -> tuple[dict[str, int], int]:
    """Return how many operations a call of a network has done when each of its modules ends, and of all, counted."""
    done: dict[str, int] = {}
    with CountedOperations() as counted:
        handles = [
            network.get_submodule(name).register_forward_hook(
                lambda *_, name=name: done.__setitem__(name, counted.count)
            )
            for name in names
        ]
        network(*inputs, **told)
    for handle in handles:
        handle.remove()
    return done, counted.count
