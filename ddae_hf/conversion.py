"""Published checkpoints of other code bases, as stock diffusers networks.

Three kinds of file are known, and told apart by what they hold:

- The official DiTs (Peebles and Xie 2023, arXiv 2212.09748) become a `DiTTransformer2DModel`.
- The U-Nets of the DDAE paper's authors (Xiang et al. 2023, arXiv 2303.09769) become a `UNet2DModel` whose hidden
  states are exact, but whose output is not.
- EDM's pickles (Karras et al. 2022, arXiv 2206.00364) are refused, with a message on what diffusers' networks lack.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor

from .networks import build_denoiser
from .noise import new_scheduler
from .pickles import read_weights, texts

# How many attention heads the published DiTs have, by their width; the files do not say it.
DIT_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
FRAMEWORKS = ("ddpm", "edm")

_Modules = Iterator[tuple[str, tuple[str, ...]]]  # a module in the file, and the modules here that share its rows


@dataclass
class Conversion:
    """A published network as a stock one, with its scheduler.

    `config` holds the other entries of a `DDAEConfig` that are known; its `features_only` says why a network cannot
    sample.
    """

    source: str  # what the file holds, in words
    source_parameters: int  # how many parameters it has in the file
    denoiser: Any
    scheduler: Any
    config: dict[str, Any] = field(default_factory=dict)


def convert(path: str | os.PathLike[str], **options: Any) -> Conversion:
    """Convert a published checkpoint.

    `options` say what the file does not, see `convert_dit` and `convert_unet`; None counts as not given.

    Raises:
        ValueError: A file that cannot be read safely or is of no known kind, a network that stock classes cannot
            represent, an option that is missing or that this kind does not take.
    """
    content = read_weights(Path(path))
    if content is None:
        _refuse_edm(Path(path))
    parts = content if isinstance(content, dict) else {}
    given = {name: value for name, value in options.items() if value is not None}
    dit, unet = _tensors(parts.get("ema")) or _tensors(parts), _tensors(parts.get("EMA"), "ema_model.nn_model.")
    try:
        if "x_embedder.proj.weight" in dit:
            _check_options(given, ("num_heads", "num_classes"), "an official DiT")
            noted = getattr(parts.get("args"), "num_classes", None)
            return convert_dit(dit, **{"num_classes": noted, **given})
        if "image_proj.weight" in unet:
            _check_options(given, ("framework", "sample_size"), "a U-Net of the DDAE paper's authors")
            return convert_unet(unet, **given)
    except KeyError as error:
        raise ValueError(f"{path} lacks the tensor {error}, which networks of its kind have.") from error
    except (TypeError, IndexError) as error:
        raise ValueError(f"{path} is not laid out as networks of its kind are: {error}.") from error
    held = f"it holds the entries {', '.join(map(str, list(parts)[:5]))}" if parts else "it holds no entries"
    raise ValueError(
        f"{path} is not a checkpoint of a known kind ({'it is not a torch file' if content is None else held}): the "
        "known kinds are official DiT `.pt` files, `model_*.pth` of the DDAE paper's authors, and EDM's `.pkl`."
    )


def _tensors(value: Any, prefix: str = "") -> dict[str, Tensor]:
    """Return a dictionary's tensors whose names begin with `prefix`, under their names without it."""
    named = value.items() if isinstance(value, dict) else ()
    found = {k.removeprefix(prefix): v for k, v in named if isinstance(v, Tensor) and str(k).startswith(prefix)}
    held: dict[int, int] = {}
    for name, tensor in found.items():
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(
                f"The tensor {name} of shape {tuple(tensor.shape)} has fewer values in the file than this shape needs."
            )
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    if (claimed := sum(tensor.numel() * tensor.element_size() for tensor in found.values())) > sum(held.values()):
        raise ValueError(
            f"The tensors share their values: they claim {claimed:,} bytes, but the file holds {sum(held.values()):,}."
        )
    return found


def _check_options(given: dict[str, Any], allowed: tuple[str, ...], kind: str) -> None:
    if unknown := sorted(given.keys() - set(allowed)):
        raise ValueError(f"{', '.join(unknown)} came, but the file holds {kind}: allowed are {', '.join(allowed)}.")


def convert_dit(state: dict[str, Tensor], num_heads: int | None = None, num_classes: int | None = None) -> Conversion:
    """Convert the weights of an official DiT.

    Its timestep frequencies differ from those that diffusers gives a DiT, so the config here has the entry
    `downscale_freq_shift`, which `networks.build_denoiser` obeys. By default `num_heads` is that of the published
    network of this width, and `num_classes`, which does not count the null class, is ImageNet's 1000.

    Raises:
        ValueError: An unknown number of heads, or a network that diffusers' DiT cannot represent.
    """
    if (kernel := state["x_embedder.proj.weight"]).ndim != 4:
        raise ValueError(
            f"The tensor x_embedder.proj.weight has shape {tuple(kernel.shape)}: it must have four dimensions."
        )
    width, channels, patch, _ = kernel.shape
    depth = _count(state, "blocks")
    side = math.isqrt(state["pos_embed"].shape[1])
    heads = DIT_HEADS.get(width) if num_heads is None else num_heads
    if heads is None or heads < 1 or width % heads:
        published = ", ".join(f"{n} of width {w}" for w, n in DIT_HEADS.items())
        raise ValueError(
            f"num_heads is {num_heads} for a DiT of width {width}: the file does not say it, and it must divide the "
            f"width. Pass num_heads; the published networks have {published}."
        )
    rows = len(state["y_embedder.embedding_table.weight"])
    classes = 1000 if num_classes is None else num_classes
    if rows != classes + 1:
        raise ValueError(
            f"The table of labels has {rows} rows for {classes} classes, but must have one row more than classes: "
            "diffusers' DiT always has a null class, which a DiT trained without label dropout lacks. For another "
            "number of classes, pass num_classes."
        )
    config = {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": channels,
        "out_channels": len(state["final_layer.linear.bias"]) // patch**2,  # twice as many where variance is learned
        "num_layers": depth,
        "sample_size": side * patch,
        "patch_size": patch,
        "num_embeds_ada_norm": classes,
        "norm_eps": 1e-6,
        "downscale_freq_shift": 0,
    }
    weights = {name: value for name, value in state.items() if name != "pos_embed"}
    if state["pos_embed"].shape != (1, side**2, width):
        raise ValueError(f"The file's pos_embed has shape {tuple(state['pos_embed'].shape)}: the width is {width}.")
    denoiser = _build(config, _renamed(weights, _dit_modules(depth)))
    if (denoiser.pos_embed.pos_embed - state["pos_embed"]).abs().max() > 1e-4:
        raise ValueError("The file's pos_embed is not the sine-cosine one, the only one that diffusers' DiT has.")
    source = f"an official DiT: {depth} blocks of width {width}, patches of {patch}, {classes} classes"
    parameters = sum(value.numel() for value in weights.values())
    return Conversion(source, parameters, denoiser.eval(), DDIMScheduler(clip_sample=False))


def _dit_modules(depth: int) -> _Modules:
    yield "x_embedder.proj", ("pos_embed.proj",)
    yield "final_layer.adaLN_modulation.1", ("proj_out_1",)
    yield "final_layer.linear", ("proj_out_2",)
    for i in range(depth):
        there, here = f"blocks.{i}", f"transformer_blocks.{i}"
        yield f"{there}.adaLN_modulation.1", (f"{here}.norm1.linear",)
        yield f"{there}.attn.qkv", tuple(f"{here}.attn1.to_{part}" for part in "qkv")
        yield f"{there}.attn.proj", (f"{here}.attn1.to_out.0",)
        yield f"{there}.mlp.fc1", (f"{here}.ff.net.0.proj",)
        yield f"{there}.mlp.fc2", (f"{here}.ff.net.2",)
        # The file's network embeds time and label once; here each block embeds them for itself.
        yield "t_embedder.mlp.0", (f"{here}.norm1.emb.timestep_embedder.linear_1",)
        yield "t_embedder.mlp.2", (f"{here}.norm1.emb.timestep_embedder.linear_2",)
        yield "y_embedder.embedding_table", (f"{here}.norm1.emb.class_embedder.embedding_table",)


def convert_unet(state: dict[str, Tensor], framework: str | None = None, sample_size: int = 32) -> Conversion:
    """Convert the weights of a U-Net of the DDAE paper's authors.

    Under DDPM they feed it t / 1000 for t from 1 to 1000, so here its timestep embedding is a table with one row for
    each step. Under EDM they feed it log(sigma) / 4, as is done here.

    `framework` is `"ddpm"` or `"edm"`, which the file does not say, and `sample_size` is the side of the images that
    the network was trained on, in pixels.

    Raises:
        ValueError: No framework, or a network that `UNet2DModel` cannot represent.
    """
    if framework not in FRAMEWORKS:
        raise ValueError(
            f"framework is {framework!r}: the file does not say under which one the network was trained. Pass "
            "'ddpm' or 'edm', the `model_type` in the configuration of its training."
        )
    config, modules = _unet_parts(state)
    config["sample_size"] = sample_size
    stem = config["block_out_channels"][0]
    weights = _renamed(state, modules)
    scheduler = new_scheduler(framework)
    # The dropout is the one that they trained with; the level is the 4th of their 18, or t = 11, counted from 1.
    config["dropout"] = 0.1 if framework == "ddpm" else 0.13
    known = {"timestep": 10} if framework == "ddpm" else {"sigma": 0.06}
    if framework == "ddpm":
        steps = scheduler.config.num_train_timesteps
        config |= {"time_embedding_type": "learned", "num_train_timesteps": steps}
        weights["time_proj.weight"] = get_timestep_embedding(torch.arange(1, steps + 1) / steps, stem)
    denoiser = _build(config, weights)
    reason = (
        "it was converted from a network whose output is normalised in 8 groups, while a UNet2DModel has the same "
        "number of groups in all its layers, so that its hidden states are right but its output is not."
    )
    source = f"a U-Net of the DDAE paper's authors, stem of {stem} channels, {len(config['block_out_channels'])} levels"
    parameters = sum(value.numel() for value in state.values())
    return Conversion(source, parameters, denoiser.eval(), scheduler, {**known, "features_only": reason})


def _unet_parts(state: dict[str, Tensor]) -> tuple[dict[str, Any], _Modules]:
    """Return the config of a U-Net as far as its weights tell, and what its modules are called here."""
    down, up = _levels(state, "down"), _levels(state, "up")
    channels = [len(state[f"down.{level[0]}.res.conv1.bias"]) for level in down]
    attention = [f"down.{level[0]}.attn.norm.weight" in state for level in down]
    stem = len(state["image_proj.bias"])
    if stem != channels[0]:
        raise ValueError(
            f"The file holds a U-Net of the DDAE paper's authors whose first level has {channels[0]} channels behind a "
            f"stem of {stem}, as in their DDPM++. The stem of a UNet2DModel has as many channels as its first level, "
            "so no configuration of it can hold these weights."
        )
    config = {
        "_class_name": "UNet2DModel",
        "in_channels": state["image_proj.weight"].shape[1],
        "out_channels": len(state["final.bias"]),
        "block_out_channels": channels,
        "layers_per_block": len(down[0]),
        "down_block_types": ["AttnDownBlock2D" if attends else "DownBlock2D" for attends in attention],
        "up_block_types": ["AttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(attention)],
        "attention_head_dim": None,  # one head
        "norm_eps": 1e-5,
        "downsample_padding": 1,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
    }
    return config, _unet_modules({"down": down, "up": up})


def _levels(state: dict[str, Tensor], side: str) -> list[list[int]]:
    """Return the numbers of the residual blocks in each level of a side; the modules between levels resample."""
    levels: list[list[int]] = [[]]
    for i in range(_count(state, side)):
        if f"{side}.{i}.res.conv1.weight" in state:
            levels[-1].append(i)
        else:
            levels.append([])
    if not all(levels):
        raise ValueError(f"The network's `{side}` has two resamplings without a residual block between them.")
    return levels


def _unet_modules(sides: dict[str, list[list[int]]]) -> _Modules:
    yield "image_proj", ("conv_in",)
    yield "time_emb.lin1", ("time_embedding.linear_1",)
    yield "time_emb.lin2", ("time_embedding.linear_2",)
    for side, levels in sides.items():
        for k, level in enumerate(levels):
            here = f"{side}_blocks.{k}"
            for j, i in enumerate(level):
                yield from _residual_modules(f"{side}.{i}.res", f"{here}.resnets.{j}")
                yield from _attention_modules(f"{side}.{i}.attn", f"{here}.attentions.{j}")
            yield f"{side}.{level[-1] + 1}.conv", (f"{here}.{side}samplers.0.conv",)
    yield from _residual_modules("middle.res1", "mid_block.resnets.0")
    yield from _attention_modules("middle.attn", "mid_block.attentions.0")
    yield from _residual_modules("middle.res2", "mid_block.resnets.1")
    yield "norm", ("conv_norm_out",)
    yield "final", ("conv_out",)


def _residual_modules(there: str, here: str) -> _Modules:
    for name in ("norm1", "conv1", "norm2"):
        yield f"{there}.{name}", (f"{here}.{name}",)
    yield f"{there}.conv2.1", (f"{here}.conv2",)
    yield f"{there}.shortcut", (f"{here}.conv_shortcut",)
    yield f"{there}.time_emb.1", (f"{here}.time_emb_proj",)


def _attention_modules(there: str, here: str) -> _Modules:
    yield f"{there}.norm", (f"{here}.group_norm",)
    yield f"{there}.projection", tuple(f"{here}.to_{part}" for part in "qkv")
    yield f"{there}.output", (f"{here}.to_out.0",)


def _count(state: dict[str, Tensor], modules: str) -> int:
    """Return the length of a list of modules, every one of which must have a tensor."""
    numbers = {name.split(".")[1] for name in state if name.startswith(f"{modules}.")}
    if not numbers or numbers != {str(i) for i in range(len(numbers))}:
        raise ValueError(
            f"The file's `{modules}` are not numbered from 0 on: {', '.join(sorted(numbers)[:5]) or 'none'}."
        )
    return len(numbers)


def _renamed(state: dict[str, Tensor], modules: Iterable[tuple[str, tuple[str, ...]]]) -> dict[str, Tensor]:
    """Return weights and biases under their names here; a module that the network lacks is passed over."""
    renamed: dict[str, Tensor] = {}
    used = set()
    for there, here in modules:
        for part in ("weight", "bias"):
            if (name := f"{there}.{part}") in state:
                used.add(name)
                pieces = state[name].chunk(len(here))
                renamed |= {f"{module}.{part}": piece for module, piece in zip(here, pieces, strict=True)}
    if unused := sorted(state.keys() - used):
        raise ValueError(f"The network has parts that networks of its kind lack: {', '.join(unused[:3])}.")
    return renamed


def _build(config: dict[str, Any], weights: dict[str, Tensor]) -> Any:
    """Return the network of a config with these weights; it is built only if all of them fit."""
    with torch.device("meta"):  # a file of a few weights may describe a network that is too large for memory
        shapes = build_denoiser(config).state_dict()
    there = {name: tuple(value.shape) for name, value in weights.items()}
    here = {name: tuple(value.shape) for name, value in shapes.items()}
    if wrong := sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name)):
        raise ValueError(
            f"A {config['_class_name']} cannot hold these weights: {len(wrong)} differ in shape, such as {wrong[0]} "
            f"({there.get(wrong[0], 'missing')} in the file, {here.get(wrong[0], 'missing')} in the network)."
        )
    denoiser = build_denoiser(config)
    denoiser.load_state_dict(weights)
    return denoiser


_EDM_REASONS = {
    "SongUNet": (
        "its residual blocks and attentions scale their sums by sqrt(1/2), its decoder attends only after the last "
        "residual block of a level, and it resamples in residual blocks with a projected skip, and UNet2DModel has no "
        "options for these"
    ),
    "DhariwalUNet": "how its parts map to those of a UNet2DModel has not been worked out",
}


def _refuse_edm(path: Path) -> None:
    """Raise `ValueError` for a pickle of EDM, naming the network that it holds and what stock classes lack."""
    words = set(texts(path))
    if any(word.startswith("torch_utils.persistence") for word in words):
        network = next((name for name in _EDM_REASONS if name in words), None)
        reason = _EDM_REASONS[network] if network else f"it holds none of {', '.join(_EDM_REASONS)}"
        what = f" that holds a {network}" if network else ""
        raise ValueError(f"{path} is a pickle of EDM{what}. It cannot be converted: {reason}.")
