"""`UNet2DModel` and `DiTTransformer2DModel` with the self-conditioning of DDAE++ (Xiang et al. 2025, arXiv 2505.10999).

The network's own hidden state in its middle tells its later blocks what the image shows. In place of the condition `c`,
which embeds the timestep and labels, each block after one named by `self_condition_layer` is told

    c + (1 + G(e(t))) * W(mean(h)),

where `h` is that block's output and the mean is over its positions, `e(t)` are the sines and cosines that the network's
timestep embedding starts from, `W` and `G` are linear maps, and `*` is by channel. Both maps are zero at first, so that
training starts at the stock network, exactly.

The method, as descriptions of the paper have it: a state from inside the network is pooled, scaled with the noise
level, and added to the timestep condition of later blocks. The abstract of version 1 (May 2025) says that the network's
semantics guide its own decoding layers, at an overhead of 1 %; that of version 2 (November 2025), that intermediate
features are aggregated and rerouted to subsequent decoding layers. The formulas of neither version could be had, and
code of the authors was not read. So this was chosen here, and may differ from the paper:

- The scale is learned, by channel, of the fed timestep alone, by its sines and cosines. It needs no schedule, so it
  holds for every framework, whatever number stands for a noise level: VP's timestep, EDM's log(sigma) / 4, flow
  matching's 1000 s. Nothing says that it falls or rises with the noise; it starts as 1 at all levels.
- The map of the pooled state is linear, and zero at first. Without its zero, training would not start at the stock
  network.
- The default layer is the middle: `mid_block` of a U-Net, and of n blocks of a DiT the one that has as many before it
  as the rounded-down n / 2 - 1, where the authors' earlier paper (arXiv 2303.09769) finds the best features.
- A DiT's output layer, which is no block, is told `c` as before; a U-Net's is told nothing.

The stock classes' own `forward` runs on a view, and what one pass computes is kept in that pass. This module imports
nothing of the package: of a component with code of its own, diffusers takes one file from a repository.
"""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers import ModelMixin as ModelMixin  # where diffusers opens a component, it asks the class's module for it
from diffusers.models.embeddings import CombinedTimestepLabelEmbeddings
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor, nn

MIDDLE = "middle"  # the default of `self_condition_layer`: the layer in the middle of the network, whatever its name


class ZeroLinear(nn.Linear):
    """A linear map that is zero until it is trained; drawing it anew leaves random generators as they are."""

    def reset_parameters(self) -> None:
        """Set all weights to zero."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class SelfConditioning(nn.Module):
    """What a hidden state adds to the condition of the blocks after it; nothing before it is trained.

    Args:
        channels: Width of the hidden state.
        time_channels: Number of sines and cosines of the timestep.
        width: Width of the condition.
    """

    def __init__(self, channels: int, time_channels: int, width: int):
        super().__init__()
        self.features = ZeroLinear(channels, width)
        self.scale = ZeroLinear(time_channels, width)

    def forward(self, hidden: Tensor, times: Tensor) -> Tensor:
        """Return what is added, (B, width).

        Args:
            hidden: The hidden state, (B, C, H, W) or (B, N, C).
            times: Sines and cosines of the timesteps, (B, time channels) or (1, time channels).
        """
        pooled = hidden.mean((2, 3) if hidden.ndim == 4 else 1)
        return (1 + self.scale(times.to(pooled.dtype))) * self.features(pooled)


class Addition:
    """What is added to conditions in one pass: it is computed from the first hidden state that comes, and kept."""

    def __init__(self, conditioning: nn.Module, times: Tensor):
        self._conditioning = conditioning
        self._times = times
        self._added: Tensor | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return it, (B, width); `hidden` is the input of a block after the layer that is pooled."""
        if self._added is None:
            self._added = self._conditioning(hidden, self._times)
        return self._added


def chosen_layer(layer: Any, allowed: list[str], middle: int) -> str | None:
    """Return a `self_condition_layer` by its own name, or raise `ValueError`.

    Args:
        layer: What was given: a name, `"middle"`, or None for no self-conditioning.
        allowed: The names of the layers that have blocks after them.
        middle: Which of them is the middle.
    """
    if layer == MIDDLE and allowed:
        return allowed[middle]
    if layer is None or layer in allowed:
        return layer
    few = allowed if len(allowed) < 8 else [*allowed[:2], "...", allowed[-1]]
    known = f"Allowed are {', '.join([*few, MIDDLE])}, and None" if allowed else "Here is none, which leaves None"
    raise ValueError(
        f"self_condition_layer is {reprlib.repr(layer)}: it must be a layer of this network that has blocks after it. "
        f"{known}, which turns self-conditioning off."
    )


def with_options_of(stock: Any) -> Callable[[Any], Any]:
    """Let a constructor name the options of the stock class too, which it passes on: diffusers asks for their names."""

    def name_them(init: Any) -> Any:
        own = inspect.signature(init).parameters["self_condition_layer"]
        init.__signature__ = inspect.Signature([*inspect.signature(stock.__init__).parameters.values(), own])
        return init

    return name_them


class Seen:
    """A module, or a view of one, seen with some attributes replaced: what a stock `forward` may be run on."""

    def __init__(self, module: Any, **replaced: Any):
        self._module = module
        for name, value in replaced.items():
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class LaterUpBlock(Seen):
    """A block of a U-Net's decoder, seen whole, with more added to the embedding that it is told."""

    def __init__(self, block: Any, addition: Addition):
        super().__init__(block)
        self._addition = addition

    def __call__(self, hidden_states: Tensor, skips: tuple[Tensor, ...], temb: Tensor, *more: Any) -> Any:
        """Call the block."""
        return self._module(hidden_states, skips, temb + self._addition(hidden_states).to(temb.device), *more)


class SelfConditionedUNet2DModel(UNet2DModel):
    """diffusers' `UNet2DModel`, whose decoder is told what it holds itself: see this module.

    Args:
        self_condition_layer: Whose pooled output conditions the blocks of the decoder after it: `mid_block`, a block
            of the decoder but the last, such as `up_blocks.0`, or `"middle"`, which is `mid_block` where there is one.
            With None it is the stock network: the same weights, drawn alike, and the same answers.

    The other options are those of `UNet2DModel`.

    Raises:
        ValueError: Another layer.
    """

    config: Any
    time_embedding: Any
    up_blocks: Any
    self_conditioning: Any

    @with_options_of(UNet2DModel)
    def __init__(self, *args: Any, self_condition_layer: str | None = MIDDLE, **options: Any):
        super().__init__(*args, **options)
        sources: dict[str, Any] = {} if self.mid_block is None else {"mid_block": self.mid_block}
        sources |= {f"up_blocks.{i}": block for i, block in enumerate(self.up_blocks[:-1])}
        layer = chosen_layer(self_condition_layer, list(sources), middle=0)
        self.register_to_config(self_condition_layer=layer)
        self.self_conditioning = None
        if layer is not None:
            embedding = self.time_embedding
            channels = sources[layer].resnets[-1].out_channels
            widths = embedding.linear_1.in_features, embedding.linear_2.out_features
            self.self_conditioning = SelfConditioning(channels, *widths)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Run the stock forward, which is told more from the layer on; arguments and results are the stock ones."""
        seen = self if self.self_conditioning is None else _decoder_telling(self, sample, timestep)
        return UNet2DModel.forward(seen, sample, timestep, class_labels, return_dict)


def _decoder_telling(network: Any, sample: Tensor, timestep: Tensor | float | int) -> Seen:
    """Return a U-Net as one pass sees it: blocks after the layer add to their embedding.

    The network may be a view itself. This is no method, since in a compiled graph a view's would be the network's.
    """
    times = network.time_proj(torch.as_tensor(timestep, device=sample.device).reshape(-1))
    addition = Addition(network.self_conditioning, times)
    layer = network.config.self_condition_layer
    first = 0 if layer == "mid_block" else int(layer.rpartition(".")[2]) + 1
    later = [LaterUpBlock(block, addition) for block in network.up_blocks[first:]]
    return Seen(network, up_blocks=[*network.up_blocks[:first], *later])


class Told(NamedTuple):
    """What a later block of a DiT is told in place of its timestep."""

    timestep: Tensor
    added: Tensor  # to the condition, (B, width)


class LaterEmbeddings(CombinedTimestepLabelEmbeddings):
    """The embeddings of a later block of a DiT, with the stock ones' parts and names: more may be added to them."""

    def __init__(self, stock: CombinedTimestepLabelEmbeddings):
        nn.Module.__init__(self)
        for name, part in stock.named_children():
            self.add_module(name, part)

    def forward(self, timestep: Tensor | Told, class_labels: Tensor, hidden_dtype: torch.dtype | None = None) -> Tensor:
        """Return the condition (B, width)."""
        if not isinstance(timestep, Told):
            return super().forward(timestep, class_labels, hidden_dtype)
        condition = super().forward(timestep.timestep, class_labels, hidden_dtype)
        return condition + timestep.added.to(condition.device)


class LaterTransformerBlock(Seen):
    """A block of a DiT, seen whole, with more in the timestep that it is told.

    With a `checkpoint`, which takes the block and its arguments, hidden states inside are computed again for gradients.
    What is added is not: it is computed once, before.
    """

    def __init__(self, block: Any, addition: Addition, checkpoint: Any):
        super().__init__(block)
        self._addition = addition
        self._checkpoint = checkpoint

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        encoder_hidden_states: Any = None,
        encoder_attention_mask: Any = None,
        timestep: Any = None,
        cross_attention_kwargs: Any = None,
        class_labels: Any = None,
    ) -> Any:
        """Call the block."""
        told = Told(timestep, self._addition(hidden_states))
        attention = (attention_mask, encoder_hidden_states, encoder_attention_mask)
        arguments = (hidden_states, *attention, told, cross_attention_kwargs, class_labels)
        return self._module(*arguments) if self._checkpoint is None else self._checkpoint(self._module, *arguments)


class SelfConditionedDiTTransformer2DModel(DiTTransformer2DModel):
    """diffusers' `DiTTransformer2DModel`, whose later blocks are told what it holds itself: see this module.

    Args:
        self_condition_layer: Whose pooled output conditions the blocks after it: a block but the last, such as
            `transformer_blocks.5`, or `"middle"`. With None it is the stock network: the same weights, drawn alike, and
            the same answers.

    The other options are those of `DiTTransformer2DModel`.

    Raises:
        ValueError: Another layer.
    """

    config: Any
    transformer_blocks: Any
    self_conditioning: Any

    @with_options_of(DiTTransformer2DModel)
    def __init__(self, *args: Any, self_condition_layer: str | None = MIDDLE, **options: Any):
        super().__init__(*args, **options)
        count = len(self.transformer_blocks)
        sources = [f"transformer_blocks.{k}" for k in range(count - 1)]
        layer = chosen_layer(self_condition_layer, sources, middle=max(0, count // 2 - 1))
        self.register_to_config(self_condition_layer=layer)
        self.self_conditioning = None
        if layer is not None:
            for block in self.transformer_blocks[1 + sources.index(layer) :]:
                block.norm1.emb = LaterEmbeddings(block.norm1.emb)
            times = self.transformer_blocks[0].norm1.emb.time_proj.num_channels
            self.self_conditioning = SelfConditioning(self.inner_dim, times, self.inner_dim)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Run the stock forward, which is told more from the layer on; arguments and results are the stock ones."""
        seen = self if self.self_conditioning is None else _blocks_telling(self, timestep)
        return DiTTransformer2DModel.forward(
            seen, hidden_states, timestep, class_labels, cross_attention_kwargs, return_dict
        )


def _blocks_telling(network: Any, timestep: Any) -> Seen:
    """Return a DiT as one pass sees it: blocks after the layer add to their condition. It may be a view itself."""
    blocks = list(network.transformer_blocks)
    first = int(network.config.self_condition_layer.rpartition(".")[2]) + 1
    addition = Addition(network.self_conditioning, blocks[0].norm1.emb.time_proj(timestep))
    recompute = network._gradient_checkpointing_func
    checkpoint = recompute if torch.is_grad_enabled() and network.gradient_checkpointing else None
    later = [LaterTransformerBlock(block, addition, checkpoint) for block in blocks[first:]]

    def run(block: Any, *arguments: Any) -> Any:
        return block(*arguments) if isinstance(block, LaterTransformerBlock) else recompute(block, *arguments)

    return Seen(network, transformer_blocks=[*blocks[:first], *later], _gradient_checkpointing_func=run)
