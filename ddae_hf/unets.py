"""diffusers' `UNet2DModel`, and how U-Nets of blocks with `resnets` and `attentions` are walked.

A tap is the output of a residual block, or of the attention that follows it: the paper's `out_k` is the k-th tap of the
decoder. The network takes `num_class_embeds` labels. Nothing marks one of them as the null class, the label that stands
for no class; a network trained here has it last, and its checkpoint says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from .cut import Cut, identity, in_float32, is_compiled, recorded, runs_forward_alone, uncompiled
from .network_class import NetworkClass, Tap, cut_blocks, place_of, taps_of_block, view_of_block
from .noise import family_of
from .self_conditioned import SelfConditionedUNet2DModel

BLOCKS = "transformer_blocks"


class UNet(NetworkClass):
    """U-Nets of diffusers: an encoder, a middle and a decoder."""

    component = "unet"
    indivisible: tuple[str, ...] = ("ResnetBlock2D",)
    # Blocks whose forward is a plain walk over `resnets` and `attentions`, so that shorter lists stop it early.
    walks = {
        "DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D", "CrossAttnDownBlock2D",
        "UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D", "CrossAttnUpBlock2D",
        "UNetMidBlock2D", "UNetMidBlock2DCrossAttn",
    }  # fmt: skip

    def divisor(self, config: Mapping[str, Any]) -> tuple[int, str]:
        """Return the stride of the deepest level."""
        levels = len(config["down_block_types"])
        return 2 ** (levels - 1), f"with {levels} levels, each half the size of the one before"

    def check_timesteps(self, config: Mapping[str, Any], scheduler: Any) -> None:
        """Refuse an embedding of logarithms, and a learned one where timesteps are not the numbers of its rows."""
        kind = config.get("time_embedding_type", "positional")
        if kind == "fourier":
            raise ValueError(
                "The denoiser's time_embedding_type is 'fourier': it takes the logarithm of what it is fed, which "
                "suits only score-SDE schedulers, and these are not supported; timestep 0 would give NaN. Set it to "
                "'positional'."
            )
        if kind != "positional" and not family_of(scheduler).whole_timesteps:
            raise ValueError(
                f"The denoiser's time_embedding_type is {kind!r}, which cannot take the timesteps of "
                f"{type(scheduler).__name__}: set it to 'positional'."
            )

    def float32_modules(self, denoiser: Any) -> set[str]:
        """Return the embedding of timesteps, where it has weights."""
        return {"time_proj"} if list(denoiser.time_proj.parameters()) else set()

    def taps(self, denoiser: Any) -> list[Tap]:
        """Return the taps of encoder (`down_blocks.0.resnets.0`, ...), middle (`mid_block`) and decoder."""
        last = len(denoiser.down_blocks) - 1
        found: list[Tap] = []
        for i, block in enumerate(denoiser.down_blocks):
            found += self._block_taps(block, f"down_blocks.{i}", 2**i, "encoder")
        if (middle := denoiser.mid_block) is not None:
            for j, attention in enumerate(getattr(middle, "attentions", None) or []):
                found += _inner_taps(attention, f"mid_block.attentions.{j}", 2**last, "middle")
            found.append(Tap("mid_block", middle.resnets[-1].out_channels, 2**last, "middle"))
        for i, block in enumerate(denoiser.up_blocks):
            found += self._block_taps(block, f"up_blocks.{i}", 2 ** (last - i), "decoder")
            if getattr(block, "upsamplers", None):  # the whole block, whose output is of the next level's size
                width = block.resnets[-1].out_channels
                found.append(Tap(f"up_blocks.{i}", width, 2 ** (last - i - 1), "decoder", inner=True))
        return found

    def _block_taps(self, block: Any, prefix: str, stride: int, part: str) -> Iterator[Tap]:
        # Attention j follows residual block j; a skip block's only attention follows its last one.
        attentions = list(getattr(block, "attentions", None) or [])
        first = len(block.resnets) - len(attentions)
        for j, resnet in enumerate(block.resnets):
            name = f"{prefix}.resnets.{j}"
            if j >= first:
                name = f"{prefix}.attentions.{j - first}"
                yield from _inner_taps(attentions[j - first], name, stride, part)
            yield Tap(name, resnet.out_channels, stride, part)

    def runs_as_seen(self, denoiser: Any, layers: Sequence[str]) -> bool:
        """Whether all blocks are plain walks, and neither the network nor what is cut has hooks."""
        around = {_block_of(layer) for layer in layers} - {None}
        blocks = [*denoiser.down_blocks, *denoiser.up_blocks, *([denoiser.mid_block] if "mid_block" in around else [])]
        if not all(type(uncompiled(block)).__name__ in self.walks for block in blocks):
            return False
        attentions = [denoiser.get_submodule(name) for name in {_attention_of(layer) for layer in layers} - {None}]
        if not all(map(_ends_anywhere, attentions)):
            return False
        seen = [denoiser.get_submodule(name) for name in around | cut_blocks(layers)]
        return all(runs_forward_alone(module) for module in (denoiser, *seen, *attentions))

    def view(self, denoiser: Any, layers: Sequence[str], found: dict[str, Tensor], stop_early: bool) -> Cut:
        """Return the network with block lists that end at the tap, and output layers that do nothing."""
        down = [f"down_blocks.{i}" for i in range(len(denoiser.down_blocks))]
        up = [f"up_blocks.{i}" for i in range(len(denoiser.up_blocks))]
        names = [*down, *([] if denoiser.mid_block is None else ["mid_block"]), *up]
        last = max(layers, key=[tap.name for tap in self.taps(denoiser)].index) if stop_early else ""
        if stop_early:
            names = names[: place_of(last, names) + 1]
        views = {name: _block_view(denoiser.get_submodule(name), name, layers, found, last) for name in names}
        replaced: dict[str, Any] = dict.fromkeys(("conv_norm_out", "conv_act", "conv_out"), identity) if last else {}
        replaced["down_blocks"] = [views[name] for name in down if name in views]
        replaced["mid_block"] = views.get("mid_block")
        replaced["up_blocks"] = [views[name] for name in up if name in views]
        return Cut(denoiser, replaced)

    def with_float32_output(self, denoiser: Any) -> Any:
        """Compute its last norm and convolution in float32: most of what sampling in bfloat16 loses is lost there."""
        if denoiser.dtype == torch.float32:
            return denoiser
        layers = {name: getattr(denoiser, name) for name in ("conv_norm_out", "conv_out")}
        if any(is_compiled(module) or not runs_forward_alone(module) for module in (denoiser, *layers.values())):
            return denoiser
        return Cut(denoiser, {name: in_float32(layer) for name, layer in layers.items()})


def _inner_taps(attention: Any, name: str, stride: int, part: str) -> Iterator[Tap]:
    """Yield the taps inside of an attention that consists of transformer blocks, which others do not."""
    for k in range(len(getattr(attention, BLOCKS, ()))):
        yield from taps_of_block(f"{name}.{BLOCKS}.{k}", attention.inner_dim, stride, part, inner=True)


def _block_of(layer: str) -> str | None:
    """Return the name of the block that has a layer inside; None for one that is a block itself."""
    parts = layer.split(".")
    depth = 1 if parts[0] == "mid_block" else 2
    return ".".join(parts[:depth]) if len(parts) > depth else None


def _attention_of(layer: str) -> str | None:
    """Return the name of the attention that has a layer inside; None for other layers."""
    name, within, _ = layer.partition(f".{BLOCKS}.")
    return name if within else None


def _ends_anywhere(attention: Any) -> bool:
    """Whether an attention may end after any of its blocks: what follows them then adds tensors of one width."""
    return attention.is_input_continuous and attention.inner_dim == attention.in_channels


def _number_in(layer: str, prefix: str) -> int:
    """Return j of a layer `prefix.kind.j` or `prefix.kind.j.more`."""
    return int(layer.removeprefix(f"{prefix}.").split(".")[1])


def _block_view(block: Any, prefix: str, layers: Sequence[str], found: dict[str, Tensor], last: str) -> Any:
    """Return a view of a block that records its taps and, if the `last` is among them, ends after it."""
    view = block
    if any(layer.startswith(f"{prefix}.") for layer in layers):
        replaced: dict[str, Any] = {}
        for kind in ("resnets", "attentions"):
            if (modules := getattr(block, kind, None)) is not None:
                parts = enumerate(modules)
                replaced[kind] = [_part_view(each, f"{prefix}.{kind}.{j}", layers, found, last) for j, each in parts]
        if last.startswith(f"{prefix}."):
            stop = _number_in(last, prefix) + 1
            replaced |= {kind: parts[:stop] for kind, parts in replaced.items()}
            replaced |= {name: None for name in ("upsamplers", "downsamplers") if hasattr(block, name)}
            if prefix == "mid_block":  # whose attention j stands before residual block j + 1
                replaced["resnets"].append(identity)
        view = Cut(block, replaced)
    return recorded(view, prefix, layers, found)


def _part_view(module: Any, name: str, layers: Sequence[str], found: dict[str, Tensor], last: str) -> Any:
    """Return a view of a residual block or an attention that records it, or its blocks, and ends after the `last`."""
    view = module
    if any(layer.startswith(f"{name}.") for layer in layers):
        names = [f"{name}.{BLOCKS}.{k}" for k in range(len(module.transformer_blocks))]
        blocks = zip(names, module.transformer_blocks, strict=True)
        replaced: dict[str, Any] = {BLOCKS: [view_of_block(block, each, layers, found, last) for each, block in blocks]}
        if last.startswith(f"{name}."):
            replaced[BLOCKS] = replaced[BLOCKS][: place_of(last, names) + 1]
            replaced["proj_out"] = identity
        view = Cut(module, replaced)
    return recorded(view, name, layers, found)


class UNet2D(UNet):
    """diffusers' `UNet2DModel`."""

    model = UNet2DModel
    parts = ("down_blocks", "mid_block", "up_blocks")

    def fed_timestep(self, denoiser: Any, timestep: Tensor) -> Tensor:
        """Return the nearest whole timestep for a learned embedding, which has one row for every trained timestep."""
        learned = denoiser.config.get("time_embedding_type") == "learned"
        return timestep.round().long() if learned else timestep

    def num_labels(self, config: Mapping[str, Any]) -> int:
        """Return the number of rows of its table of labels."""
        return 0 if config.get("class_embed_type") else config.get("num_class_embeds") or 0

    def label_options(self, num_classes: int) -> dict[str, int]:
        """Count the null class as one more label."""
        return {"num_class_embeds": num_classes + 1} if num_classes else {}

    def is_conditional(self, denoiser: Any) -> bool:
        """Whether it has an embedding of classes."""
        return denoiser.class_embedding is not None

    def example_condition(self, denoiser: Any) -> Tensor | None:
        """Return a vector where its class embedding is the identity."""
        if denoiser.config.get("class_embed_type") == "identity":
            return torch.zeros(1, self.vector_width(denoiser))
        return super().example_condition(denoiser)

    def accept_vectors(self, denoiser: Any, width: int) -> None:
        """Give it an embedding of classes that is the identity, without weights."""
        if self.is_conditional(denoiser):
            raise ValueError(
                "Augmentation needs an unconditional UNet2DModel, which takes its labels: a class-conditional "
                "UNet2DModel came."
            )
        if self.vector_width(denoiser) < width:
            channels = self.vector_width(denoiser)
            raise ValueError(f"The time embedding has {channels} channels: labels need {width} or more.")
        denoiser.class_embedding = nn.Identity()

    def vector_width(self, denoiser: Any) -> int:
        """Return the width of its time embedding."""
        return denoiser.time_embedding.linear_2.out_features


class SelfConditionedUNet2D(UNet2D):
    """`UNet2DModel` with self-conditioning."""

    model = SelfConditionedUNet2DModel
    own_module = "self_conditioned"
