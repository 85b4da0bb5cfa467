"""Heads of classifiers that read hidden states of several taps before they are pooled.

The head `"linear"` is none of them: a linear layer on the pooled features of all taps, joined. `"attention"` and
`"fusion"` make features of their own, on which that linear layer then stands. They are made for a frozen denoiser
(`freeze_denoiser()`), whose maps they are to combine. Hidden states are (B, C, H, W), or a transformer's (B, N, C).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .building import short
from .networks import network_of, skeleton, tap_of

HEADS = ("linear", "attention", "fusion")
# What of a configuration a head depends on; a file that does not say it means this.
DEFAULT_HEAD = {"taps": None, "head": "linear", "head_width": None}
ATTENTION_HEADS = 8  # of each attention layer
DEFAULT_WIDTH = 256
LARGEST_WIDTH = 4096
LARGEST_SIDE = 16  # of the grid that maps are pooled to before they are fused
NUM_BLOCKS = 2


def checked_width(width: Any, head: str) -> int | None:
    """Return the width of a head, by default `DEFAULT_WIDTH`, and None for `"linear"`, which has no width of its own.

    Raises:
        ValueError: A width that the head cannot have.
    """
    if head == "linear":
        if width is not None:
            raise ValueError(f"head_width is {short(width)}, but the head 'linear' has no width: leave it out.")
        return None
    width = DEFAULT_WIDTH if width is None else int(width)
    if width % ATTENTION_HEADS or not 0 < width <= LARGEST_WIDTH:
        wanted = f"a multiple of {ATTENTION_HEADS}, up to {LARGEST_WIDTH}"
        raise ValueError(f"head_width is {short(width)}: it must be {wanted}.")
    return width


def build_head(config: Any) -> AttentionPooling | Fusion | None:
    """Return what a `DDAEConfig` has between hidden states and the last linear layer; None for the head `"linear"`."""
    if config.head == "linear":
        return None
    return AttentionPooling(config) if config.head == "attention" else Fusion(config)


def head_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors that a classifier has beside its denoiser, by their names."""
    with torch.device("meta"):
        head = build_head(config)
    size, count = head_size(config, head), int(config.num_labels or 0)
    shapes: dict[str, tuple[int, ...]] = {"classifier.weight": (count, size), "classifier.bias": (count,)}
    if config.feature_norm == "batch_norm":
        shapes |= {"feature_norm.running_mean": (size,), "feature_norm.running_var": (size,)}
    state = {} if head is None else head.state_dict()
    return shapes | {f"head.{name}": tuple(value.shape) for name, value in state.items()}


def head_size(config: Any, head: AttentionPooling | Fusion | None) -> int:
    """Return the width of the features that the last linear layer takes."""
    return config.hidden_size if head is None else head.size


def same_head(described: Mapping[str, Any], config: Any) -> bool:
    """Return whether a checkpoint's configuration, as its file has it, describes the same head on the same taps."""
    return all(described.get(name, default) == getattr(config, name) for name, default in DEFAULT_HEAD.items())


def initialise(module: nn.Module) -> None:
    """Draw the parameters that a module has itself, as torch does when it is made."""
    reset: Any = getattr(module, "reset_parameters", None)
    if isinstance(module, nn.MultiheadAttention):
        reset = module._reset_parameters  # which also sets the bias of its projection, after that was drawn
    if reset is not None:
        reset()


def draw_anew(head: nn.Module) -> None:
    """Draw all parameters of a head, those inside of its parts first."""
    for part in head.children():
        draw_anew(part)
    initialise(head)


class AttentionPooling(nn.Module):
    """One trained query attends over all positions of all taps.

    Each tap's positions are normalised (LayerNorm over channels) and projected to the width of the head; then they are
    the keys and values of one attention layer of eight heads. They carry no position: where something is, counts only
    as far as the network's own maps say it.
    """

    def __init__(self, config: Any):
        super().__init__()
        denoiser = skeleton(config.denoiser)
        width = config.head_width
        channels = [tap_of(denoiser, layer).channels for layer, _ in config.pairs]
        self.size = width
        self.norms = nn.ModuleList(nn.LayerNorm(count) for count in channels)
        self.projections = nn.ModuleList(nn.Linear(count, width) for count in channels)
        self.query = nn.Parameter(torch.empty(width))
        self.attention = nn.MultiheadAttention(width, ATTENTION_HEADS, batch_first=True)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the query."""
        nn.init.normal_(self.query, std=0.02)

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """Return features (B, width) of the hidden states of all taps, in their order."""
        tokens = [
            project(norm(as_tokens(state).to(self.query.dtype)))
            for state, norm, project in zip(states, self.norms, self.projections, strict=True)
        ]
        positions = torch.cat(tokens, dim=1)
        query = self.query.expand(len(positions), 1, -1)
        pooled, _ = self.attention(query, positions, positions, need_weights=False)
        return pooled[:, 0]


class Fusion(nn.Module):
    """The fusion head of Mukhopadhyay et al. 2023 (arXiv 2311.17921), as their published code has it.

    Each map is pooled to a grid of 16 x 16, or keeps its own if that is smaller, is normalised as a whole (LayerNorm
    over channels and positions, with a gain and an offset for each) and projected to the width of the head. The
    positions of all maps of one noise level and a trained class token go through two transformer blocks with eight
    heads each. A layer's projection and the blocks are the same for all levels; the class tokens of the levels, in the
    order of their first taps, are joined. Nothing else says where a position is.

    Ours are the smaller default width, a class token that begins with small numbers in place of zeros, biases of
    queries, keys and values, and that levels may read different layers.
    """

    def __init__(self, config: Any):
        super().__init__()
        denoiser, network = skeleton(config.denoiser), network_of(config.denoiser)
        width: int = config.head_width
        sides: tuple[int, int] = config.sample_shape[1:]
        self.pairs = config.pairs
        self.levels = list(config.levels)
        self.layers = list(dict.fromkeys(layer for layer, _ in self.pairs))
        self.size = width * len(self.levels)
        taps = [tap_of(denoiser, layer) for layer in self.layers]
        self.on_grid = [partial(network.on_grid, tap=tap, size=sides) for tap in taps]
        self.grids = [_grid(tap.stride, *sides) for tap in taps]
        self.norms = nn.ModuleList(
            nn.LayerNorm([tap.channels, *grid]) for tap, grid in zip(taps, self.grids, strict=True)
        )
        self.projections = nn.ModuleList(nn.Conv2d(tap.channels, width, kernel_size=1) for tap in taps)
        self.class_token = nn.Parameter(torch.empty(width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, ATTENTION_HEADS, 4 * width, dropout=0.0, activation=F.gelu, batch_first=True, norm_first=True
            )
            for _ in range(NUM_BLOCKS)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the class token."""
        nn.init.normal_(self.class_token, std=0.02)

    def _tokens(self, layer: str, state: Tensor) -> Tensor:
        """Return the positions of a layer's map (B, N, width)."""
        number = self.layers.index(layer)
        on_grid = self.on_grid[number](state.to(self.class_token.dtype))
        pooled = F.adaptive_avg_pool2d(on_grid, self.grids[number])
        return as_tokens(self.projections[number](self.norms[number](pooled)))

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """Return features (B, width x levels) of the hidden states of all taps, in their order."""
        found = []
        for level in self.levels:
            read = zip(self.pairs, states, strict=True)
            maps = [self._tokens(layer, state) for (layer, sigma), state in read if sigma == level]
            tokens = torch.cat([self.class_token.expand(len(maps[0]), 1, -1), *maps], dim=1)
            for block in self.blocks:
                tokens = block(tokens)
            found.append(tokens[:, 0])
        return torch.cat(found, dim=1)


def _grid(stride: int, height: int, width: int) -> tuple[int, int]:
    """Return the height and width that a map is pooled to, of a network whose inputs have this height and width."""
    return min(LARGEST_SIDE, height // stride), min(LARGEST_SIDE, width // stride)


def as_tokens(state: Tensor) -> Tensor:
    """Return a hidden state, (B, C, H, W) or (B, N, C), by positions, (B, N, C)."""
    return state.flatten(2).transpose(1, 2) if state.ndim == 4 else state
