"""LoRA (Hu et al. 2021, arXiv 2106.09685): trained adapters on a frozen denoiser, as peft computes and stores them.

A linear layer or a convolution with the weight W computes `W x + (alpha / rank) B A x`, where A and B are of low rank.
B begins with zeros, so that adapters change nothing until they are trained. `DDAEConfig.lora` describes them, and a
model of this configuration has them: its `denoiser` has layers of peft in place of some of its own, which hold these as
`base_layer`. The generator, and what a checkpoint gives as its denoiser, is the network without them.

On disk, `adapters/` beside `head.safetensors` is what `peft.PeftModel.from_pretrained(denoiser, folder,
subfolder="adapters")` opens. A folder of its own keeps transformers, which looks for peft's files beside every
`config.json` and in every repository, from opening something else in place of the classifier.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .building import LARGEST, short
from .cut import is_compiled
from .hidden_states import learning_parameters
from .networks import build_denoiser, skeleton
from .weights import (
    ADAPTER,
    BELOW,
    find_file,
    inside,
    plain_state,
    read_json,
    refuse_missing,
    refuse_offline,
    refuse_other_shapes,
    refuse_unexpected,
    tensor_shapes,
)

TARGETS = ("attention", "convolutions")
HIGHEST_RANK = 1024
FOLDER = "adapters"
WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
_NAME = "default"  # under which peft keeps the adapters of a network
_STORED = "base_model.model."  # before the names of tensors in peft's files, which leave out `_NAME`


def import_peft() -> Any:
    """Return peft, or raise `ValueError` with the line that installs it."""
    try:
        return importlib.import_module("peft")  # an `import` would be asked for wherever remote code is opened
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise
        raise ValueError('LoRA needs peft, which is not installed: pip install "peft>=0.19.1"') from error


def check_lora(lora: Any, denoiser: nn.Module, needed: bool = False) -> None:
    """Raise `ValueError` unless a network, here one without adapters, can have those that `lora` describes.

    None describes no adapters, which is refused where they are `needed`.
    """
    if lora is None:
        if needed:
            raise ValueError("weights is 'adapters', but lora describes none: one of the two entries is damaged.")
        return
    if set(lora) != {"rank", "alpha", "modules"}:
        raise ValueError(f"lora is {short(lora)}: it must have the entries rank, alpha and modules, and no others.")
    rank = lora["rank"]
    alpha = lora["alpha"]
    if type(rank) is not int or not 1 <= rank <= HIGHEST_RANK:
        raise ValueError(f"lora: rank is {short(rank)}: it must be a whole number, 1 to {HIGHEST_RANK}.")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha <= LARGEST:
        raise ValueError(f"lora: alpha is {short(alpha)}: it must be a positive number, at most {LARGEST}.")
    names = lora["modules"]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"lora: modules is {short(names)}: it must be a list of one or more names.")
    if len(set(names)) < len(names):
        raise ValueError("lora: modules has a name twice.")
    known = {name: module for name, module in denoiser.named_modules() if _is_adaptable(module)}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"lora: there is no linear layer and no plain convolution {short(unknown[0])} in this denoiser."
        )


def _is_adaptable(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


def modules_to_adapt(denoiser_config: Mapping[str, Any], layers: Sequence[str], targets: Sequence[str]) -> list[str]:
    """Return the names of the modules that get adapters: those on which hidden states of `layers` depend.

    Args:
        denoiser_config: The denoiser's diffusers config, with `_class_name`.
        layers: The taps that are read.
        targets: `"attention"` for the projections of queries, keys, values and outputs, `"convolutions"`, or both.

    Raises:
        ValueError: Other targets, or a network that has none of them before these layers.
    """
    if isinstance(targets, str) or not targets or (unknown := sorted(set(targets) - set(TARGETS))):
        what = targets if isinstance(targets, str) or not targets else unknown[0]
        raise ValueError(f"targets has {what!r}: it must be a list of some of {', '.join(TARGETS)}.")
    network = skeleton(denoiser_config)
    parts = dict(network.named_modules())
    within = [name for name, module in parts.items() if isinstance(module, Attention)]
    learning = learning_parameters(_as_json(denoiser_config), tuple(layers))

    def is_target(name: str, module: nn.Module) -> bool:
        if isinstance(module, nn.Linear):
            return "attention" in targets and any(name.startswith(f"{attention}.") for attention in within)
        return "convolutions" in targets

    found = [name for name, module in parts.items() if _is_adaptable(module) and is_target(name, module)]
    found = [name for name in found if f"{name}.weight" in learning]
    if not found:
        others = ", ".join(target for target in TARGETS if target not in targets)
        hint = f"give {others} as targets too" if others else "read a deeper layer"
        raise ValueError(f"This denoiser has no {' and no '.join(targets)} before {', '.join(layers)}: {hint}.")
    return found


def _as_json(config: Mapping[str, Any]) -> str:
    return json.dumps(config, sort_keys=True)


def build_adapted(denoiser_config: Mapping[str, Any], lora: Mapping[str, Any] | None) -> Any:
    """Build a randomly initialised denoiser, with adapters where `lora` describes some."""
    denoiser = build_denoiser(denoiser_config)
    if lora is not None:
        attach(denoiser, lora)
    return denoiser


def attach(denoiser: Any, lora: Mapping[str, Any]) -> None:
    """Put adapters into a denoiser, whose own parameters ask for no gradients then."""
    peft = import_peft()
    peft.inject_adapter_in_model(_peft_config(peft, lora), denoiser, adapter_name=_NAME)
    denoiser.train(denoiser.training)  # new modules begin in training mode


def _peft_config(peft: Any, lora: Mapping[str, Any], **more: Any) -> Any:
    modules = list(lora["modules"])
    return peft.LoraConfig(r=lora["rank"], lora_alpha=lora["alpha"], target_modules=modules, **more)


def still_learns(name: str, learning: Collection[str], lora: Mapping[str, Any] | None) -> bool:
    """Return whether a denoiser's parameter is trained.

    `learning` are the names of a plain denoiser's parameters that get a gradient. Of one with adapters only these are
    trained, where the layer that they are of would get one.
    """
    if lora is None:
        return name in learning
    module, of_adapter, _ = name.partition(ADAPTER)
    return bool(of_adapter) and f"{module}.weight" in learning


def adapter_shapes(
    denoiser_config: Mapping[str, Any], lora: Mapping[str, Any] | None, prefix: str = ""
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the adapters' tensors, by the names that they have in a denoiser, behind a prefix."""
    if lora is None:
        return {}
    with torch.device("meta"):
        denoiser = build_adapted(denoiser_config, lora)
    return {prefix + name: tuple(value.shape) for name, value in denoiser.state_dict().items() if ADAPTER in name}


def adapted_state(
    state: dict[str, Tensor], config: Any, path: str, hub: dict[str, Any], stored: bool
) -> dict[str, Tensor]:
    """Return the tensors of a denoiser with the adapters of a configuration, of those of a denoiser without.

    Args:
        state: The tensors of the denoiser without adapters.
        config: The model's `DDAEConfig`; without `lora` the tensors stay as they are.
        path: The checkpoint's folder or repository, which holds the adapters.
        hub: Which sub-folder and revision, and how they are reached.
        stored: Whether the checkpoint has adapters at all.

    Raises:
        ValueError: Adapters that are missing, damaged, or not those that the configuration describes.
    """
    if config.lora is None:
        return state
    if not stored:
        raise ValueError(f"lora describes adapters, which {path} does not have: open it without, and call `add_lora`.")
    modules = set(config.lora["modules"])
    renamed = {}
    for name, value in state.items():
        module, _, last = name.rpartition(".")
        renamed[f"{module}{BELOW}{last}" if module in modules else name] = value
    return renamed | _read_adapters(path, hub, config)


def _read_adapters(path: str, hub: dict[str, Any], config: Any) -> dict[str, Tensor]:
    """Return the stored adapters by the names that they have in a denoiser."""
    there = inside(hub, FOLDER)
    file = find_file(path, WEIGHTS_FILE, **there)
    described = read_json(path, CONFIG_FILE, there)
    for name, found in {WEIGHTS_FILE: file, CONFIG_FILE: described}.items():
        if found is None:
            refuse_offline(f"{FOLDER}/{name}", path, hub)
            raise ValueError(f"{path} says that it has adapters, but its {FOLDER}/{name} is missing.")
    lora = config.lora
    expected = {"peft_type": "LORA", "r": lora["rank"], "lora_alpha": lora["alpha"], "use_rslora": False}
    given: Any = described
    modules = given.get("target_modules")
    same = isinstance(modules, list) and sorted(map(str, modules)) == sorted(lora["modules"])
    if not same or any(given.get(name) != value for name, value in expected.items()):
        raise ValueError(
            f"{path} has a {FOLDER}/{CONFIG_FILE} that describes other adapters than its config.json: both must be "
            "those that `save_head` wrote."
        )
    stored = {_name_in_network(name): shape for name, shape in tensor_shapes([str(file)]).items()}
    shapes = adapter_shapes(config.denoiser, lora)
    refuse_missing(path, "adapters", shapes, stored)
    refuse_unexpected(path, "adapters", stored.keys() - shapes.keys())
    refuse_other_shapes(path, "adapters", shapes, stored)
    return {_name_in_network(name): value for name, value in load_file(str(file)).items()}


def _name_in_network(stored: str) -> str:
    """Return the name that a tensor of peft's file has in a network: `X.lora_A.default.weight`."""
    module, _, last = stored.removeprefix(_STORED).rpartition(".")
    return f"{module}.{_NAME}.{last}"


def write_adapters(folder: Path, denoiser: nn.Module, lora: Mapping[str, Any], base: str | None) -> None:
    """Write a denoiser's adapters into `adapters/` of a folder, in peft's format; `base` is what they stand on."""
    peft = import_peft()
    place = folder / FOLDER
    place.mkdir(parents=True, exist_ok=True)
    tensors = {
        _STORED + name.replace(f".{_NAME}.", "."): value.detach().cpu().contiguous()
        for name, value in plain_state(denoiser).items()
        if ADAPTER in name
    }
    save_file(tensors, place / WEIGHTS_FILE, {"format": "pt"})
    described = _peft_config(peft, lora, base_model_name_or_path=base, inference_mode=True)
    described.target_modules = list(lora["modules"])  # a set would be written in another order every time
    described.save_pretrained(str(place))


class Adapted:
    """What every model can do with adapters on its denoiser."""

    config: Any
    base_model: Any
    restrict_gradients: Any

    def add_lora(self, rank: int = 8, alpha: float | None = None, targets: Sequence[str] = ("attention",)) -> None:
        """Put LoRA adapters on the denoiser, up to the layer that is read; all else of the denoiser is frozen.

        A is drawn from torch's global generator, B is zero: the model computes what it did. `save_head` then writes the
        adapters beside the head, `save_pretrained` everything.

        Args:
            rank: The rank of the adapters, 1 to 1024.
            alpha: They are scaled by `alpha / rank`; by default alpha is the rank.
            targets: `"attention"`, its linear projections, `"convolutions"`, or both.

        Raises:
            ValueError: peft is not installed, other targets, a network without any, a rank or an alpha out of range, a
                compiled network, or one that has adapters already.
        """
        if self.config.lora is not None:
            raise ValueError("This model has adapters already: merge them first, with `merge_lora()`.")
        inner = self.base_model
        _refuse_compiled(inner.denoiser)
        layers = list(inner._restricted_to) or [str(self.config.layer)]
        modules = modules_to_adapt(self.config.denoiser, layers, targets)
        lora = {"rank": rank, "alpha": float(rank if alpha is None else alpha), "modules": modules}
        check_lora(lora, inner.denoiser)
        attach(inner.denoiser, lora)
        self.config.lora = lora

    def merge_lora(self) -> None:
        """Add the adapters to the weights that they stand on, which makes a plain model of this one.

        It computes the same up to rounding, needs no peft, and is saved with `save_pretrained`. It asks for gradients
        as a model that has just been opened. A model without adapters stays as it is.
        """
        if self.config.lora is None:
            return
        inner = self.base_model
        denoiser = inner.denoiser
        _refuse_compiled(denoiser)
        for name in self.config.lora["modules"]:
            layer = denoiser.get_submodule(name)
            layer.merge(safe_merge=True)
            denoiser.set_submodule(name, layer.get_base_layer())
        del denoiser.peft_config
        self.config.lora = None
        denoiser.requires_grad_(not inner._frozen)
        self.restrict_gradients()


def _refuse_compiled(denoiser: nn.Module) -> None:
    if any(is_compiled(module) for module in denoiser.modules()):
        raise ValueError("The denoiser is compiled: adapters are added and merged before it is.")
