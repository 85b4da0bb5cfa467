"""A module seen with some of its parts replaced, and what stands between a module and a plain call of its `forward`.

A network's own `forward` runs on a `Cut`, a small object that shows the network with other attributes: shorter block
lists, output layers that do nothing. No code is repeated, no module is copied and no hook is set, so that the view
works with `torch.compile(fullgraph=True)` and `torch.export`.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Cut:
    """A module seen with some attributes replaced: runs the module's own forward on them."""

    def __init__(self, module: nn.Module, replaced: dict[str, Any]):
        self._module = uncompiled(module)
        for name, value in replaced.items():
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if getattr(value, "__self__", None) is self._module:  # a method sees what is replaced, too
            return types.MethodType(value.__func__, self)
        return value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward on what is seen."""
        # As the instance has it: the classes that diffusers lets into graphs whole cannot be asked in one.
        return self._module.forward.__func__(self, *args, **kwargs)


class Recorder(Cut):
    """A module seen whole, whose output is kept under a name; of an output in a tuple, its first entry."""

    def __init__(self, module: nn.Module, name: str, found: dict[str, Tensor]):
        self._module = module
        self._name = name
        self._found = found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module and keep its output."""
        output = self._module(*args, **kwargs)
        self._found[self._name] = first_of(output)
        return output


def recorded(module: Any, name: str, layers: Sequence[str], found: dict[str, Tensor]) -> Any:
    """Return a module as it is, or so that its output is kept where its name is among `layers`."""
    return Recorder(module, name, found) if name in layers else module


def first_of(output: Any) -> Any:
    """Return a module's output, or its first entry where it is a tuple, as that of a block of transformers is."""
    return output[0] if isinstance(output, tuple) else output


def identity(hidden: Tensor, *args: Any) -> Tensor:
    """Return the first input."""
    return hidden


def in_float32(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a module's function, computed in float32 on a copy: other threads may be using the module."""
    exact = copy.deepcopy(module).float()
    return lambda hidden: exact(hidden.float())


def uncompiled(module: Any) -> Any:
    """Return the module that `torch.compile` has wrapped, or the module itself."""
    return getattr(module, "_orig_mod", module)


def unwrapped(module: Any) -> Any:
    """Return the module that was compiled or distributed (DistributedDataParallel), or the module itself."""
    own = uncompiled(module)
    return uncompiled(getattr(own, "module", own))


def is_compiled(module: nn.Module) -> bool:
    """Whether a module was compiled, by `torch.compile` or in place."""
    return uncompiled(module) is not module or module._compiled_call_impl is not None


def runs_forward_alone(module: nn.Module) -> bool:
    """Whether calling a module gives the result of its class's `forward`, which is all that a `Cut` runs.

    It does not where there are hooks: torch's hooks on this module or on all modules, or those of accelerate and
    diffusers, which give the instance a `forward` of its own. A compiled module gives the result of its `forward`,
    unless accelerate has wrapped that.
    """
    if torch.nn.modules.module._has_any_global_hook():
        return False
    own = uncompiled(module)
    hooks = [
        getattr(m, f"_{kind}_hooks")
        for m in (module, own)
        for kind in ("forward", "forward_pre", "backward", "backward_pre")
    ]
    wrapped = "forward" in vars(own) or "_original_forward" in vars(own)
    return not any(hooks) and not wrapped and not hasattr(own, "_hf_hook")
