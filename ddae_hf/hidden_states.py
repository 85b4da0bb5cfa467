"""Hidden states of a denoiser: naming its layers, reading them, stopping after the deepest one asked for.

In a U-Net a tap is the output of a residual block, or of the attention that follows it: the paper's `out_k` is the k-th
decoder tap. In a DiT it is the output of a transformer block. Layers are named by their dotted path in
`named_modules()`.

Two ways of stopping early give bit-equal results:

- The network's own `forward` runs on a view whose block lists end at the tap (`_Cut`). It needs no hooks and goes
  through `torch.compile(fullgraph=True)` and `torch.export`.
- A hook on the tap raises `_Reached`. It works on any network, and on one whose modules do more than run their
  `forward` when they are called (hooks, those of accelerate among them), which a view would go around.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Blocks whose forward is a plain walk over `resnets` and `attentions`, so that shorter lists stop it early.
_WALKS = {
    "DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D",
    "UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D",
}  # fmt: skip
POOLINGS = ("mean", "max")


def layer_names(denoiser: Any) -> list[str]:
    """Return the name of every tap, in the order in which the network computes them.

    For `UNet2DModel`: encoder (`down_blocks.0.resnets.0`, ...), `mid_block`, decoder (`up_blocks.0.attentions.0`, ...).
    For `DiTTransformer2DModel`: `transformer_blocks.0`, ...
    """
    if _is_transformer(denoiser):
        return decoder_layer_names(denoiser)
    names = [f"down_blocks.{i}.{tap}" for i, block in enumerate(denoiser.down_blocks) for tap in _taps(block)]
    if denoiser.mid_block is not None:
        names.append("mid_block")
    return names + decoder_layer_names(denoiser)


def decoder_layer_names(denoiser: Any) -> list[str]:
    """Return the names of the decoder's taps, the paper's `out_1`, `out_2`, ...; of a DiT, which has none, all taps."""
    if _is_transformer(denoiser):
        return [f"transformer_blocks.{k}" for k in range(len(denoiser.transformer_blocks))]
    return [f"up_blocks.{i}.{tap}" for i, block in enumerate(denoiser.up_blocks) for tap in _taps(block)]


def default_layer(denoiser: Any) -> str:
    """Return the middle tap of the decoder or the DiT.

    There the paper finds the best features: `out_6` of 12, `out_7` of 15, block 13 (from 0) of 28.
    """
    decoder = decoder_layer_names(denoiser)
    return decoder[max(0, len(decoder) // 2 - 1)]


def _is_transformer(denoiser: Any) -> bool:
    return hasattr(denoiser, "transformer_blocks")


def _taps(block: Any) -> list[str]:
    # Attention j follows residual block j; a skip block's only attention follows its last one.
    first = len(block.resnets) - len(getattr(block, "attentions", None) or [])
    return [f"resnets.{j}" if j < first else f"attentions.{j - first}" for j in range(len(block.resnets))]


def check_layers(denoiser: Any, layers: Sequence[str]) -> None:
    """Raise `ValueError`, naming the nearest ones, unless all `layers` are taps of the denoiser."""
    if isinstance(layers, str) or not layers:
        raise ValueError(f"layers is {layers!r}: it must be a list of one or more layer names.")
    known = layer_names(denoiser)
    for layer in layers:
        if layer not in known:
            nearest = difflib.get_close_matches(str(layer), known, n=3, cutoff=0.0)
            raise ValueError(
                f"There is no layer {layer!r} in this denoiser. The nearest are {', '.join(nearest)}; "
                "`layer_names(denoiser)` lists all."
            )


def hidden_size(denoiser: Any, layer: str) -> int:
    """Return the number of channels of a layer's hidden state."""
    check_layers(denoiser, [layer])
    if _is_transformer(denoiser):
        return denoiser.inner_dim
    if layer == "mid_block":
        return denoiser.mid_block.resnets[-1].out_channels
    side, i, _, j = layer.split(".")
    return getattr(denoiser, side)[int(i)].resnets[int(j)].out_channels


def collect_hidden_states(
    denoiser: Any,
    sample: Tensor,
    timestep: Tensor,
    layers: Sequence[str],
    *,
    stop_early: bool = True,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """Run the denoiser and return its hidden states.

    Hooks on the denoiser and its parts are in force, and several threads may read one denoiser. Where it was compiled
    by itself, or blocks of it that are read were, these run uncompiled here, since compiled code leaves out the hooks
    that are set after compilation. To read compiled, compile what calls this function as a whole, `DDAEModel` or a
    classifier: it is one graph, unless there are hooks.

    Args:
        denoiser: A `UNet2DModel` or `DiTTransformer2DModel`.
        sample: The denoiser's input (B, C, H, W), as `add_noise` makes it.
        timestep: What the denoiser is fed, (B,).
        layers: Names out of `layer_names(denoiser)`.
        stop_early: Whether to compute nothing after the deepest of `layers` (but a DiT's small output layer).
        **kwargs: Further arguments of the denoiser's forward, such as `class_labels`.

    Returns:
        Raw activations, (B, C, H, W) or a DiT's (B, N, C), by layer name, in the order of `layers`.

    Raises:
        ValueError: A name that is no layer; the message gives the nearest ones.
    """
    check_layers(denoiser, layers)
    if stop_early and _can_be_cut(denoiser, layers):
        found = _collect_by_cutting(denoiser, sample, timestep, layers, kwargs)
    else:
        found = _collect_by_hooks(denoiser, sample, timestep, layers, stop_early, kwargs)
    return {layer: found[layer] for layer in layers}


def _deepest(denoiser: Any, layers: Iterable[str]) -> str:
    known = layer_names(denoiser)
    return max(layers, key=known.index)


class _Cut:
    """A module seen with some attributes replaced: runs the module's own forward on them."""

    def __init__(self, module: nn.Module, replaced: dict[str, Any]):
        self._module = uncompiled(module)
        for name, value in replaced.items():
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return type(self._module).forward(self, *args, **kwargs)  # type: ignore[arg-type]


def with_float32_output(denoiser: Any) -> Any:
    """Return a U-Net of a shorter type seen with its last norm and convolution computed in float32; others as they are.

    These few operations make most of what sampling in bfloat16 loses. Where the network has hooks (offloading) or is
    compiled, as a whole or in these layers, it stays as it is too: its hooks and its compiled graphs run.
    """
    if _is_transformer(denoiser) or denoiser.dtype == torch.float32:
        return denoiser
    layers = {name: getattr(denoiser, name) for name in ("conv_norm_out", "conv_out")}
    if any(_is_compiled(module) or not _runs_forward_alone(module) for module in (denoiser, *layers.values())):
        return denoiser
    return _Cut(denoiser, {name: _in_float32(layer) for name, layer in layers.items()})


def _in_float32(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a module's function, computed in float32 on a copy: other threads may be using the module."""
    exact = copy.deepcopy(module).float()
    return lambda hidden: exact(hidden.float())


class _Recorder:
    """A module that also keeps its output under a name."""

    def __init__(self, module: nn.Module, name: str, found: dict[str, Tensor]):
        self._module, self._name, self._found = module, name, found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self._module(*args, **kwargs)
        self._found[self._name] = output
        return output


def _identity(hidden: Tensor) -> Tensor:
    return hidden


def _can_be_cut(denoiser: Any, layers: Sequence[str]) -> bool:
    """Whether a view of the denoiser that ends at the deepest of `layers` computes what a call of it does."""
    if not _is_transformer(denoiser):
        blocks = [*denoiser.down_blocks, *denoiser.up_blocks]
        if not all(type(uncompiled(block)).__name__ in _WALKS for block in blocks):
            return False
    seen = [denoiser.get_submodule(name) for name in _blocks_around(layers)]
    return all(_runs_forward_alone(module) for module in (denoiser, *seen))


def _blocks_around(layers: Iterable[str]) -> set[str]:
    """Return the names of a U-Net's blocks that have one of `layers` inside; other layers are blocks themselves."""
    return {layer.rsplit(".", 2)[0] for layer in layers if layer.count(".") == 3}


def _runs_forward_alone(module: nn.Module) -> bool:
    """Whether a call of a module has the result of its class's `forward`, which a view runs by hand.

    Not with hooks, be they torch's on this module or on all, or accelerate's and diffusers', which give the instance a
    `forward` of its own. A compiled module's result is that of its `forward`.
    """
    if torch.nn.modules.module._has_any_global_hook():
        return False
    own = uncompiled(module)
    hooks = [
        getattr(m, f"_{kind}_hooks")
        for m in (module, own)
        for kind in ("forward", "forward_pre", "backward", "backward_pre")
    ]
    return not any(hooks) and "forward" not in vars(own) and not hasattr(own, "_hf_hook")


def uncompiled(module: Any) -> Any:
    """Return the module that `torch.compile` has wrapped, or the module itself."""
    return getattr(module, "_orig_mod", module)


def _is_compiled(module: nn.Module) -> bool:
    return uncompiled(module) is not module or module._compiled_call_impl is not None


def _cut_block(block: Any, prefix: str, layers: Sequence[str], found: dict[str, Tensor], stop: int | None) -> Any:
    """Return a view of a down or up block that records its taps and, if `stop` is given, ends after that many."""
    replaced: dict[str, Any] = {}
    if stop is not None:
        replaced.update(upsamplers=None) if prefix.startswith("up") else replaced.update(downsamplers=None)
    for kind in ("resnets", "attentions"):
        modules = getattr(block, kind, None)
        if modules is not None:
            replaced[kind] = [
                _Recorder(m, f"{prefix}.{kind}.{j}", found) if f"{prefix}.{kind}.{j}" in layers else m
                for j, m in enumerate(modules)
            ][:stop]
    return _Cut(block, replaced)


def _collect_by_cutting(
    denoiser: Any, sample: Tensor, timestep: Tensor, layers: Sequence[str], kwargs: dict[str, Any]
) -> dict[str, Tensor]:
    """Run the denoiser's forward on a view whose block lists end at the deepest layer."""
    found: dict[str, Tensor] = {}
    last = _deepest(denoiser, layers)
    if _is_transformer(denoiser):
        blocks = list(denoiser.transformer_blocks)[: int(last.rpartition(".")[2]) + 1]
        names = [f"transformer_blocks.{k}" for k in range(len(blocks))]
        recorded = [_Recorder(b, n, found) if n in layers else b for b, n in zip(blocks, names, strict=True)]
        _Cut(denoiser, {"transformer_blocks": recorded})(sample, timestep, return_dict=False, **kwargs)
        return found
    side, _, rest = last.partition(".")
    block, _, tap = rest.partition(".")
    depth = int(block) if block else 0
    stop = int(tap.rpartition(".")[2]) + 1 if tap else None

    seen = _blocks_around(layers)

    def views(kind: str, blocks: Iterable[nn.Module], count: int | None) -> list[Any]:
        kept = list(blocks)[:count]
        ends = [stop if kind == side and i == depth else None for i in range(len(kept))]
        names = [f"{kind}.{i}" for i in range(len(kept))]
        return [
            _cut_block(block, name, layers, found, end) if name in seen else block
            for block, name, end in zip(kept, names, ends, strict=True)
        ]

    mid = denoiser.mid_block
    if mid is not None and "mid_block" in layers:
        mid = _Recorder(mid, "mid_block", found)
    view = _Cut(
        denoiser,
        {
            "down_blocks": views("down_blocks", denoiser.down_blocks, depth + 1 if side == "down_blocks" else None),
            "mid_block": None if side == "down_blocks" else mid,
            "up_blocks": views("up_blocks", denoiser.up_blocks, depth + 1) if side == "up_blocks" else [],
            "conv_norm_out": _identity,
            "conv_act": _identity,
            "conv_out": _identity,
        },
    )
    view(sample, timestep, return_dict=False, **kwargs)
    return found


class _Reached(Exception):
    """The deepest layer has been computed."""


@torch.compiler.disable(reason="Hidden states are read by hooks where the denoiser has hooks or is not a plain walk.")
def _collect_by_hooks(
    denoiser: Any,
    sample: Tensor,
    timestep: Tensor,
    layers: Sequence[str],
    stop_early: bool,
    kwargs: dict[str, Any],
) -> dict[str, Tensor]:
    """Run the denoiser with hooks on its layers, which answer to this thread alone; the deepest one's ends the run."""
    thread = threading.get_ident()
    found: dict[str, Tensor] = {}
    last = _deepest(denoiser, layers) if stop_early else None

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if threading.get_ident() != thread:
                return
            found[name] = output
            if name == last:
                raise _Reached

        return hook

    handles = [denoiser.get_submodule(name).register_forward_hook(keep(name)) for name in layers]
    try:
        with _uncompiled_calls(denoiser):
            denoiser(sample, timestep, return_dict=False, **kwargs)
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found


class _Eager:
    """torch's mode in which compiled modules run uncompiled: entered with the first thread, left with the last."""

    def __init__(self) -> None:
        self.lock, self.threads, self.stance = threading.Lock(), 0, contextlib.ExitStack()

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


def _uncompiled_calls(denoiser: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Return a context in which the denoiser's compiled parts run uncompiled, where it has any."""
    compiled = any(_is_compiled(module) for module in denoiser.modules())
    return _eager if compiled else contextlib.nullcontext()


def pool_hidden_states(hidden: Tensor, pooling: str = "mean") -> Tensor:
    """Pool a hidden state over its positions.

    Args:
        hidden: (B, C, H, W) or (B, N, C).
        pooling: `"mean"` (the paper's) or `"max"`.

    Returns:
        Features (B, C), float32.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling is {pooling!r}: allowed are {', '.join(POOLINGS)}.")
    if hidden.ndim not in (3, 4):
        raise ValueError(f"A hidden state of shape {tuple(hidden.shape)} came: it must be (B, C, H, W) or (B, N, C).")
    positions = (2, 3) if hidden.ndim == 4 else (1,)
    hidden = hidden.float()
    return hidden.mean(positions) if pooling == "mean" else hidden.amax(positions)
