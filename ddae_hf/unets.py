"""diffusers' `UNet2DModel`.

A tap is the output of a residual block, or of the attention that follows it: the paper's `out_k` is the k-th tap of the
decoder. The network takes `num_class_embeds` labels. Nothing marks one of them as the null class, the label that stands
for no class; a network trained here has it last, and its checkpoint says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from .cut import Cut, Recorder, identity, in_float32, is_compiled, runs_forward_alone, uncompiled
from .network_class import NetworkClass, Tap
from .noise import family_of


class UNet2D(NetworkClass):
    """diffusers' `UNet2DModel`."""

    model = UNet2DModel
    component = "unet"
    parts = ("down_blocks", "mid_block", "up_blocks")
    indivisible = ("ResnetBlock2D",)
    # Blocks whose forward is a plain walk over `resnets` and `attentions`, so that shorter lists stop it early.
    walks = {
        "DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D",
        "UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D",
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

    def example_label(self, denoiser: Any) -> Tensor | None:
        """Return a vector where its class embedding is the identity."""
        if denoiser.config.get("class_embed_type") == "identity":
            return torch.zeros(1, self.vector_width(denoiser))
        return super().example_label(denoiser)

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

    def float32_modules(self, denoiser: Any) -> set[str]:
        """Return the embedding of timesteps, where it has weights."""
        return {"time_proj"} if list(denoiser.time_proj.parameters()) else set()

    def taps(self, denoiser: Any) -> list[Tap]:
        """Return the taps of encoder (`down_blocks.0.resnets.0`, ...), middle (`mid_block`) and decoder."""
        last = len(denoiser.down_blocks) - 1
        found = []
        for i, block in enumerate(denoiser.down_blocks):
            found += self._block_taps(block, f"down_blocks.{i}", 2**i, "encoder")
        if denoiser.mid_block is not None:
            found.append(Tap("mid_block", denoiser.mid_block.resnets[-1].out_channels, 2**last, "middle"))
        for i, block in enumerate(denoiser.up_blocks):
            found += self._block_taps(block, f"up_blocks.{i}", 2 ** (last - i), "decoder")
        return found

    def _block_taps(self, block: Any, prefix: str, stride: int, part: str) -> list[Tap]:
        # Attention j follows residual block j; a skip block's only attention follows its last one.
        first = len(block.resnets) - len(getattr(block, "attentions", None) or [])
        names = [f"resnets.{j}" if j < first else f"attentions.{j - first}" for j in range(len(block.resnets))]
        widths = [resnet.out_channels for resnet in block.resnets]
        return [Tap(f"{prefix}.{name}", width, stride, part) for name, width in zip(names, widths, strict=True)]

    def runs_as_seen(self, denoiser: Any, layers: Sequence[str]) -> bool:
        """Whether all blocks are plain walks, and neither the network nor a block that is cut has hooks."""
        blocks = [*denoiser.down_blocks, *denoiser.up_blocks]
        if not all(type(uncompiled(block)).__name__ in self.walks for block in blocks):
            return False
        seen = [denoiser.get_submodule(name) for name in self._blocks_around(layers)]
        return all(runs_forward_alone(module) for module in (denoiser, *seen))

    def _blocks_around(self, layers: Iterable[str]) -> set[str]:
        """Return the names of the blocks that have one of `layers` inside; other layers are blocks themselves."""
        return {layer.rsplit(".", 2)[0] for layer in layers if layer.count(".") == 3}

    def view(self, denoiser: Any, layers: Sequence[str], found: dict[str, Tensor], stop_early: bool) -> Cut:
        """Return the network with block lists that end at the tap, and output layers that do nothing."""
        down = [f"down_blocks.{i}" for i in range(len(denoiser.down_blocks))]
        up = [f"up_blocks.{i}" for i in range(len(denoiser.up_blocks))]
        names = [*down, *([] if denoiser.mid_block is None else ["mid_block"]), *up]
        last = max(layers, key=[tap.name for tap in self.taps(denoiser)].index) if stop_early else ""
        if stop_early:
            ends = [name == last or last.startswith(f"{name}.") for name in names]
            names = names[: ends.index(True) + 1]
        views = {name: self._block_view(denoiser.get_submodule(name), name, layers, found, last) for name in names}
        replaced: dict[str, Any] = dict.fromkeys(("conv_norm_out", "conv_act", "conv_out"), identity) if last else {}
        replaced["down_blocks"] = [views[name] for name in down if name in views]
        replaced["mid_block"] = views.get("mid_block")
        replaced["up_blocks"] = [views[name] for name in up if name in views]
        return Cut(denoiser, replaced)

    def _block_view(self, block: Any, prefix: str, layers: Sequence[str], found: dict[str, Tensor], last: str) -> Any:
        """Return a view of a block that records its taps and, if the `last` is among them, ends after it."""
        if prefix in layers:
            return Recorder(block, prefix, found)
        if prefix not in self._blocks_around(layers):
            return block
        replaced: dict[str, Any] = {}
        stop = None
        if last.startswith(f"{prefix}."):
            stop = int(last.rpartition(".")[2]) + 1
            replaced["upsamplers" if prefix.startswith("up") else "downsamplers"] = None
        for kind in ("resnets", "attentions"):
            modules = getattr(block, kind, None)
            if modules is not None:
                names = [f"{prefix}.{kind}.{j}" for j in range(len(modules))]
                kept = [
                    Recorder(module, name, found) if name in layers else module
                    for module, name in zip(modules, names, strict=True)
                ]
                replaced[kind] = kept[:stop]
        return Cut(block, replaced)

    def with_float32_output(self, denoiser: Any) -> Any:
        """Compute its last norm and convolution in float32: most of what sampling in bfloat16 loses is lost there."""
        if denoiser.dtype == torch.float32:
            return denoiser
        layers = {name: getattr(denoiser, name) for name in ("conv_norm_out", "conv_out")}
        if any(is_compiled(module) or not runs_forward_alone(module) for module in (denoiser, *layers.values())):
            return denoiser
        return Cut(denoiser, {name: in_float32(layer) for name, layer in layers.items()})
