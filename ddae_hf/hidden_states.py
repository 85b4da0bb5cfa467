"""Hidden states of a denoiser: naming its layers, reading them, stopping after the deepest one asked for.

Layers are named by their dotted path in `named_modules()`. Two ways of reading give bit-equal results:

- The network's own `forward` runs on a view whose block lists end at the tap (`ddae_hf.cut`).
- Hooks keep the hidden states, and the deepest one raises `_Reached`. This works on any network, even on one whose
  modules do more than run their `forward` when they are called, because they have hooks of their own or accelerate's. A
  view would bypass these.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .building import refusing
from .cut import first_of, is_compiled, uncompiled, unwrapped
from .networks import build_denoiser, network_of, tap_of
from .weights import COMPILED

POOLINGS = ("mean", "max", "mean_2x2")


def layer_names(denoiser: Any, *, inner: bool = False) -> list[str]:
    """Return the name of every tap, in the order in which the network computes them.

    For U-Nets: encoder (`down_blocks.0.resnets.0`, ...), `mid_block`, decoder (`up_blocks.0.attentions.0`, ...). For
    transformers: `transformer_blocks.0`, ... With `inner`, also those that are read only where they are named: the
    transformer blocks of attentions (`up_blocks.1.attentions.0.transformer_blocks.0`); of each transformer block,
    queries and keys of its self-attention (`transformer_blocks.0.attn1.to_q`, `.to_k`); and whole blocks of a U-Net's
    decoder that end with an upsampling (`up_blocks.1`), as work on correspondences reads them.
    """
    return [tap.name for tap in network_of(denoiser).taps(denoiser) if inner or not tap.inner]


def decoder_layer_names(denoiser: Any) -> list[str]:
    """Return the names of the decoder's taps, the paper's `out_1`, `out_2`, ...; for a transformer, of all taps."""
    return [tap.name for tap in network_of(denoiser).taps(denoiser) if tap.part == "decoder" and not tap.inner]


def default_layer(denoiser: Any) -> str:
    """Return the middle tap of the decoder or the DiT.

    There the paper finds the best features: `out_6` of 12, `out_7` of 15, block 13 (from 0) of 28.
    """
    decoder = decoder_layer_names(denoiser)
    if not decoder:
        raise ValueError("The denoiser has no layers whose hidden states could be read: its config must describe some.")
    return decoder[max(0, len(decoder) // 2 - 1)]


def check_layers(denoiser: Any, layers: Sequence[str]) -> None:
    """Raise `ValueError`, naming the nearest ones, unless all `layers` are taps of the denoiser."""
    if isinstance(layers, str) or not layers:
        raise ValueError(f"layers is {layers!r}: it must be a list of one or more layer names.")
    for layer in layers:
        tap_of(denoiser, layer)


def hidden_size(denoiser: Any, layer: str, pooling: str = "mean") -> int:
    """Return the number of a layer's pooled features: its channels, times four with `"mean_2x2"`."""
    return tap_of(denoiser, layer).channels * (4 if pooling == "mean_2x2" else 1)


def collect_hidden_states(
    denoiser: Any, sample: Tensor, timestep: Tensor, layers: Sequence[str], *, stop_early: bool = True, **kwargs: Any
) -> dict[str, Tensor]:
    """Run the denoiser and return its hidden states.

    Hooks on the denoiser and its parts are in force, and several threads may read one denoiser. A denoiser or a part
    that was compiled by itself runs uncompiled here, since compiled code leaves out hooks that are set after
    compilation. For compiled reading, compile the whole function that calls this one: it becomes one graph, unless
    there are hooks.

    Args:
        denoiser: A network of a class that is supported, such as `UNet2DModel` or `DiTTransformer2DModel`.
        sample: The denoiser's input (B, C, H, W), as `add_noise` makes it.
        timestep: What the denoiser is fed, (B,).
        layers: Some of the names in `layer_names(denoiser, inner=True)`.
        stop_early: Whether to compute nothing after the deepest of `layers` (except a DiT's small output layer).
        **kwargs: Further arguments of the denoiser's forward, such as `class_labels` or `encoder_hidden_states`.

    Returns:
        Raw activations, (B, C, H, W) or a transformer's (B, N, C), by layer name, in the order of `layers`.

    Raises:
        ValueError: A name that is not a layer's; the message gives the nearest ones.
    """
    return run_with_hidden_states(denoiser, sample, timestep, layers, kwargs, stop_early)[1]


def run_with_hidden_states(
    denoiser: Any,
    sample: Tensor,
    timestep: Tensor,
    layers: Sequence[str],
    told: dict[str, Any],
    stop_early: bool = False,
) -> tuple[Any, dict[str, Tensor]]:
    """Return the denoiser's output and, of the same pass, its hidden states; see `collect_hidden_states`.

    The denoiser may be distributed; its gradients are synchronised if the output is in the loss. With `stop_early` the
    output is None. `told` are further arguments of the denoiser's forward.
    """
    own = unwrapped(denoiser)
    network = network_of(own)
    check_layers(own, layers)
    distributed = uncompiled(denoiser) is not own
    if distributed and stop_early and torch.is_grad_enabled():
        raise ValueError(
            "The denoiser is distributed, and a pass that ends early would not synchronise its gradients. Read hidden "
            "states from a whole pass, with its answer in the loss, or distribute a DDAEModel, which reads them itself."
        )
    if not distributed and network.runs_as_seen(denoiser, layers):
        found: dict[str, Tensor] = {}
        view = network.view(own, layers, found, stop_early)
        output = network.call(view, sample, timestep, return_dict=False, **told)[0]
    else:
        last = max(layers, key=layer_names(own, inner=True).index) if stop_early else None
        output, found = run_with_hooks(denoiser, sample, timestep, layers, last, told)
    return None if stop_early else output, {layer: found[layer] for layer in layers}


class _Reached(Exception):
    """The deepest layer has been computed."""


@torch.compiler.disable(reason="Hidden states are read by hooks where the denoiser has hooks or is not a plain walk.")
def run_with_hooks(
    denoiser: Any, sample: Tensor, timestep: Tensor, layers: Sequence[str], last: str | None, told: dict[str, Any]
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Run the denoiser with hooks on its layers, or on any of its modules, and return its output and theirs.

    The hooks act only in this thread. The one on `last` ends the run, and the denoiser's output is then None.
    """
    thread = threading.get_ident()
    found: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == thread:
            found[name] = first_of(output)
            if name == last:
                raise _Reached

    own = unwrapped(denoiser)
    network = network_of(own)
    taps = {name: own.get_submodule(name) for name in layers}
    handles = [module.register_forward_hook(functools.partial(keep, name)) for name, module in taps.items()]
    compiled = any(is_compiled(module) for module in denoiser.modules())
    try:
        with _eager if compiled else contextlib.nullcontext():
            return network.call(denoiser, sample, timestep, return_dict=False, **told)[0], found
    except _Reached:
        return None, found
    finally:
        for handle in handles:
            handle.remove()


class _Eager:
    """torch's mode in which compiled modules run uncompiled; the first thread enters it, and the last one leaves it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.threads = 0
        self.stance = contextlib.ExitStack()

    def __enter__(self) -> None:
        with self.lock:
            if self.threads == 0:
                self.stance.enter_context(torch.compiler.set_stance("force_eager"))
            self.threads += 1

    def __exit__(self, *error: Any) -> None:
        with self.lock:
            self.threads -= 1
            if self.threads == 0:
                self.stance.close()


_eager = _Eager()


def pool_hidden_states(hidden: Tensor, pooling: str = "mean") -> Tensor:
    """Pool a hidden state, (B, C, H, W) or (B, N, C), over its positions: features (B, C), float32.

    Args:
        hidden: The hidden state. For `"mean_2x2"`, the N tokens must form a square, row by row.
        pooling: `"mean"` (the paper's), `"max"`, or `"mean_2x2"`: the means of the four quarters, which share the
            middle row or column where a side is odd. These features, (B, 4 C), say where in the image something is.
            Where images are aligned, as digits and faces are, that is worth more than the width costs.

    Raises:
        ValueError: Another pooling, another shape, or tokens that do not form a square.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling is {pooling!r}: allowed are {', '.join(POOLINGS)}.")
    if hidden.ndim not in (3, 4):
        raise ValueError(f"A hidden state of shape {tuple(hidden.shape)} came: it must be (B, C, H, W) or (B, N, C).")
    hidden = hidden.float()
    if pooling == "mean_2x2":
        return _mean_of_quarters(hidden if hidden.ndim == 4 else _square(hidden))
    positions = (2, 3) if hidden.ndim == 4 else (1,)
    return hidden.mean(positions) if pooling == "mean" else hidden.amax(positions)


def _square(tokens: Tensor) -> Tensor:
    side = math.isqrt(tokens.shape[1])
    if side**2 != tokens.shape[1]:
        count = tokens.shape[1]
        raise ValueError(f"pooling is 'mean_2x2', but {count} tokens do not form a square: use 'mean' or 'max'.")
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def _mean_of_quarters(hidden: Tensor) -> Tensor:
    height, width = hidden.shape[2:]
    rows = (hidden[:, :, : (height + 1) // 2], hidden[:, :, height // 2 :])
    quarters = [part for row in rows for part in (row[..., : (width + 1) // 2], row[..., width // 2 :])]
    return torch.stack([quarter.mean((2, 3)) for quarter in quarters], 2).flatten(1)


@functools.lru_cache(maxsize=16)
def learning_parameters(config: str, layers: tuple[str, ...]) -> frozenset[str]:
    """Return the names of a denoiser's parameters that get a gradient where `layers` are read, or of all without any.

    They are read off the graph of a forward pass, without memory for its tensors. `config` is the denoiser's config as
    JSON.
    """
    with torch.inference_mode(False), torch.enable_grad(), torch.device("meta"):
        denoiser = build_denoiser(json.loads(config)).eval()
        names = {p: name for name, p in denoiser.named_parameters() if p.requires_grad}
        if not layers:
            return frozenset(names.values())
        network = network_of(denoiser)
        shape = (1, denoiser.config.in_channels, *network.size(denoiser.config))
        sample = torch.empty(shape, dtype=denoiser.dtype)
        conditions = network.conditions(denoiser, network.example_condition(denoiser), 1, "meta")
        timestep = network.fed_timestep(denoiser, torch.zeros(1))
        with refusing(f"denoiser: a {type(denoiser).__name__} of this config cannot be run"):
            told = network.keywords(conditions)
            _, states = run_with_hidden_states(denoiser, sample, timestep, layers, told, stop_early=True)
    return frozenset(parameters_behind(states.values(), names, set()))


def check_learning(denoiser: Any, config: str, restricted_to: Sequence[str], layers: Sequence[str]) -> None:
    """Refuse to train with hidden states of `layers` whose gradients are left out after those of `restricted_to`.

    `config` is the denoiser's config as JSON. Where nothing before `restricted_to` learns either, as in a frozen
    denoiser, everything may be read.
    """
    known = layer_names(denoiser, inner=True)
    deepest = max(restricted_to, key=known.index)
    kept = learning_parameters(config, tuple(restricted_to))

    def learns(layer: str, without: Collection[str] = ()) -> bool:
        named = denoiser.get_submodule(layer).named_parameters()
        names = ((f"{layer}.{name}".replace(COMPILED, ""), parameter) for name, parameter in named)
        return any(parameter.requires_grad for name, parameter in names if name not in without)

    beyond = [layer for layer in layers if known.index(layer) > known.index(deepest)]
    if learns(deepest) and (still := [layer for layer in beyond if not learns(layer, kept)]):
        raise ValueError(
            f"Hidden states of {', '.join(still)} are asked for in training, but the parameters after {deepest} "
            "ask for no gradients, since the model's own output does not depend on them. To train them, call "
            "`requires_grad_(True)` on the denoiser; to look at them, use evaluation mode or `torch.no_grad()`."
        )


def parameters_behind(states: Iterable[Tensor], names: Mapping[nn.Parameter, str], seen: set[Any]) -> set[str]:
    """Return the names of the parameters that a gradient of tensors would reach, by following their graph.

    Nodes of the graph in `seen` are passed over, and those that are visited are added to it.
    """
    found = set()
    nodes = [state.grad_fn for state in states]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [parent for parent, _ in node.next_functions]
            parameter: Any = getattr(node, "variable", None)
            if name := names.get(parameter):
                found.add(name)
    return found
