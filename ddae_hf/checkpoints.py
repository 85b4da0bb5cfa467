"""Checkpoints: which layout a folder or Hub repository has, and how its parts map to a denoiser and a scheduler.

- `transformers`: `config.json` (`model_type: ddae`) and weights, as our models save themselves. `weights` in the config
  says which: `"whole"` are those of `model.safetensors`; `"head"` are those of `head.safetensors`, a classifier alone,
  whose denoiser has the weights of its base: the pipeline in the same folder, or another checkpoint. Version 0.1.0 did
  not say it, and meant a head wherever there was a `head.safetensors`.
- `pipeline`: `model_index.json`, `unet/` or `transformer/`, `scheduler/`, and `vae/` where the denoiser works on
  latents, as `DDAEPipeline` and diffusers save.
- `flat`: `model_index.json`, `config.json`, `scheduler_config.json` and weights side by side, as in
  `google/ddpm-cifar10-32`.
- `model`: `config.json` (`_class_name`) and weights, as `UNet2DModel.save_pretrained` or DiT's saves.

A checkpoint that lacks a tensor is refused. Only safetensors weights are read (`weights`): nothing is unpickled here.
`conversion` reads published checkpoints in other formats.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import diffusers
import torch
from safetensors import safe_open

from .cut import uncompiled
from .latents import VAES, build_vae, check_vae_class
from .networks import NETWORKS, build_denoiser, check_denoiser_class, network_of, present_config
from .weights import (
    COMPILED,
    DIFFUSERS_FILE,
    HEAD_FILE,
    HUB_ARGUMENTS,
    WHOLE_FILE,
    find_file,
    fingerprint,
    plain_state,
    refuse_missing,
    refuse_offline,
    refuse_unexpected,
    stored_dtype,
    tensor_names,
    variants,
    weight_files,
    with_variant,
)

WEIGHTS = ("whole", "head")  # what `DDAEConfig.weights` may say
# The fingerprints of a generator that `DDAEConfig` has, and the type that each rounds to.
GENERATOR_FINGERPRINTS = {
    "generator_fingerprint": torch.bfloat16, "generator_fingerprint_float16": torch.float16
}  # fmt: skip
# Names of attention weights in 2022, which diffusers reads under the present ones.
EARLY_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def plain_config(config: Any) -> dict[str, Any]:
    """Return a diffusers config as JSON would hold it: its class name, no other private keys, lists for tuples.

    Args:
        config: The config, or the diffusers network or scheduler that has it.
    """
    if hasattr(config, "config"):
        config = {**config.config, "_class_name": type(uncompiled(config)).__name__}
    kept = {k: v for k, v in dict(config).items() if not k.startswith("_") or k == "_class_name"}
    return json.loads(json.dumps(kept))


def skeleton(config: Mapping[str, Any]) -> Any:
    """Return the denoiser or VAE of a diffusers config (with `_class_name`) without memory for its weights.

    Whoever asks for the same config gets the same network: it is to be looked at, not to be changed.
    """
    return _skeleton(json.dumps(config, sort_keys=True))


@functools.lru_cache(maxsize=16)
def _skeleton(config: str) -> Any:
    described = json.loads(config)
    build = build_vae if described.get("_class_name") in VAES else build_denoiser
    with torch.device("meta"):
        return build(described)


def build_scheduler(config: dict[str, Any]) -> Any:
    """Build a scheduler from its diffusers config (with `_class_name`)."""
    name = config.get("_class_name")
    cls = getattr(diffusers, str(name), None)
    if not (isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin)):
        raise ValueError(f"The scheduler's `_class_name` is {name!r}: it must name a diffusers scheduler.")
    return cls.from_config(config)


def still_generates(denoiser: torch.nn.Module, config: Mapping[str, Any]) -> bool:
    """Return whether a denoiser is the generator that a configuration's fingerprints are of.

    It may have been stored in half precision since, by rounding it once to bfloat16 or to float16.
    """
    known = {dtype: config.get(name) for name, dtype in GENERATOR_FINGERPRINTS.items()}
    return any(value is not None and fingerprint(denoiser, dtype=dtype) == value for dtype, value in known.items())


@dataclass
class Checkpoint:
    """What a folder or repository holds, without its weights."""

    path: str
    layout: Literal["transformers", "pipeline", "flat", "model"]
    config: dict[str, Any]  # what is known of a DDAEConfig beside the denoiser and the scheduler
    denoiser: dict[str, Any]
    scheduler: dict[str, Any] | None
    vae: dict[str, Any] | None = None
    hub: dict[str, Any] = field(default_factory=dict)
    head: str | None = None  # the local path of a classifier without its denoiser, whose weights are in `base`
    base: Checkpoint | None = None
    variant: str | None = None  # which of several sets of weights, such as "fp16" or "ema"

    def load_denoiser(self, dtype: torch.dtype | None = None) -> Any:
        """Load the denoiser with its weights.

        Args:
            dtype: Type of the parameters; by default the one they are stored in.

        Raises:
            ValueError: No weights in safetensors, tensors missing, or a classifier's base whose weights are not those
                that it was trained on.
        """
        if self.base is not None:
            if self.variant is not None:
                raise ValueError(
                    f"variant is {self.variant!r}, but {self.path} is a classifier without its denoiser, which names "
                    f"the variant of its base {self.base.path} itself: leave `variant` out."
                )
            return self._checked(self.base.load_denoiser(), "fingerprint", dtype)
        files = self.check_denoiser()
        if self.layout == "transformers":
            return _fill(build_denoiser(self.denoiser), "denoiser", files, dtype)
        network = network_of(self.denoiser)
        dtype = dtype or stored_dtype(files[0])
        denoiser = self._diffusers_network(network.model, self._denoiser_folder(), self.variant, dtype)
        network.complete(denoiser)
        return denoiser

    def load_vae(self, dtype: torch.dtype | None = None) -> Any:
        """Load the VAE with its weights, or return None where there is none; see `load_denoiser`.

        A VAE without weights of the variant has those of none, as in diffusers' pipelines.
        """
        if self.base is not None:
            vae = self.base.load_vae()
            return vae if vae is None else self._checked(vae, "vae_fingerprint", dtype)
        if self.vae is None:
            return None
        files = self.check_vae()
        if self.layout == "transformers":
            return _fill(build_vae(self.vae), "vae", files, dtype)
        dtype = dtype or stored_dtype(files[0])
        model = getattr(diffusers, self.vae["_class_name"])
        return self._diffusers_network(model, self._vae_folder(), self._vae_variant(), dtype)

    def check_denoiser(self) -> list[str]:
        """Return the local paths of the files of the denoiser's weights, which hold every tensor of it.

        Raises:
            ValueError: No weights in safetensors, two sets of them that cannot be told apart, or tensors missing.
        """
        expected = plain_state(skeleton(self.denoiser))
        files = self.weight_files(self._denoiser_folder(), self.variant)
        refuse_missing(self.path, "denoiser", expected, self._stored_names("denoiser", files))
        return files

    def check_vae(self) -> list[str]:
        """Return the local paths of the files of the VAE's weights: see `check_denoiser`."""
        expected = plain_state(skeleton(self.vae or {}))
        files = self.weight_files(self._vae_folder(), self._vae_variant())
        refuse_missing(self.path, "vae", expected, self._stored_names("vae", files))
        return files

    def weight_files(self, inside: str = "", variant: str | None = None) -> list[str]:
        """Return the local paths of the files of weights in the sub-folder `inside`; at least one."""
        name, hub = self._weights_name(), self._inside(inside)
        if files := weight_files(self.path, name, hub, variant):
            return files
        wanted = with_variant(name, variant)
        refuse_offline(wanted, self.path, hub)
        known = ", ".join(variants(self.path, name, hub))
        there = f" (variants that are there: {known})" if known else ""
        raise ValueError(
            f"{self.path} has no {wanted} in {hub['subfolder'] or 'its root'}{there}. Only safetensors weights are "
            "read, never pickles (`.bin`): convert them with diffusers' `save_pretrained(safe_serialization=True)`."
        )

    def _weights_name(self) -> str:
        return WHOLE_FILE if self.layout == "transformers" else DIFFUSERS_FILE

    def _denoiser_folder(self) -> str:
        return network_of(self.denoiser).component if self.layout == "pipeline" else ""

    def _vae_folder(self) -> str:
        return "vae" if self.layout in ("pipeline", "flat") else ""

    def _vae_variant(self) -> str | None:
        has_own = weight_files(self.path, self._weights_name(), self._inside(self._vae_folder()), self.variant)
        return self.variant if has_own else None

    def _inside(self, folder: str) -> dict[str, Any]:
        """Return where the files of a sub-folder are."""
        return {**self.hub, "subfolder": "/".join(part for part in (self.hub.get("subfolder"), folder) if part)}

    def _stored_names(self, part: str, files: list[str]) -> set[str]:
        """Return the names that the tensors of `part`, `"denoiser"` or `"vae"`, have in the network."""
        if self.layout == "transformers":
            return {name for name, _ in _names_of(part, files)}
        names = set(tensor_names(files))
        if len(files) > 1:
            return names
        early = "|".join(EARLY_NAMES)
        return {re.sub(rf"\.({early})\.(?=\w+$)", lambda found: f".{EARLY_NAMES[found[1]]}.", name) for name in names}

    def _checked(self, network: Any, known: str, dtype: torch.dtype | None) -> Any:
        """Return a network of the base, if it is the one that the classifier in `head` was trained on."""
        check_base(str(self.head), self.base, network, known)
        # The network's own `to` would log a warning about an empty list.
        return network if dtype is None else torch.nn.Module.to(network, dtype)

    def _diffusers_network(self, model: Any, inside: str, variant: str | None, dtype: torch.dtype) -> Any:
        """Load a network as diffusers saves it, in the sub-folder `inside`."""
        # diffusers' own loading also renames the attention weights of early checkpoints.
        return model.from_pretrained(
            self.path, torch_dtype=dtype, variant=variant, use_safetensors=True, **self._inside(inside)
        )


def _names_of(part: str, files: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield the names that the tensors of `part` have in its network, and in files of transformers' layout."""
    for key in tensor_names(files):
        prefix, _, name = key.replace(COMPILED, "").partition(f"{part}.")
        if prefix in ("", "ddae.") and name:
            yield name, key


def _fill(network: Any, part: str, files: list[str], dtype: torch.dtype | None) -> Any:
    """Fill a network with the weights that files of transformers' layout have under the name `part`."""
    state: dict[str, torch.Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            state |= {name: tensors.get_tensor(key) for name, key in _names_of(part, [file])}
    refuse_unexpected(os.path.dirname(files[0]), part, state.keys() - network.state_dict().keys())
    network.load_state_dict(state, assign=True)
    return (network if dtype is None else network.to(dtype)).eval()


def head_metadata(head: str) -> dict[str, str]:
    """Return what a classifier without its denoiser says of its base: `base`, `revision`, `fingerprint`."""
    with safe_open(head, framework="pt") as tensors:
        return dict(tensors.metadata() or {})


def check_base(head: str, base: Any, network: torch.nn.Module, known: str = "fingerprint") -> None:
    """Raise `ValueError` unless a base's network has exactly the weights that the classifier in `head` was trained on.

    `known` is the name of what the head knows of it: `"fingerprint"` of the denoiser, `"vae_fingerprint"` of the VAE.
    """
    if fingerprint(network, dtype=None) != head_metadata(head).get(known):
        raise ValueError(
            f"The weights of {base.path} are not those that the classifier in {head} was trained on: they have changed "
            "since. Bring back the base as it was, or train a classifier on it as it is."
        )


def _read_base(found: Checkpoint, behind: tuple[Any, ...]) -> Checkpoint:
    """Return the checkpoint that holds the denoiser of a classifier without one; `behind` lists heads that led here."""
    known = head_metadata(str(found.head))
    if not {"base", "fingerprint"} <= set(known):
        raise ValueError(f"{found.path} has a {HEAD_FILE} that does not name its base: write it with `save_head`.")
    if known["base"] == ".":
        return read_pipeline(found.path, known.get("variant"), **found.hub)
    if (here := location(found.path, **found.hub)) in behind:
        raise ValueError(
            f"The classifier in {found.path} is its own base, directly or by way of others: none of them holds the "
            "denoiser. Bring back the generative checkpoint that was the base, or train the classifier again."
        )
    where = {name: value for name, value in found.hub.items() if name not in ("revision", "subfolder")}
    where |= {"revision": known.get("revision"), "subfolder": known.get("subfolder")}
    return _read_checkpoint(known["base"], known.get("variant"), _where(where), (*behind, here))


def location(path: str | os.PathLike[str], **hub: Any) -> tuple[str, str, str | None]:
    """Return what tells apart the places of checkpoints: two paths to one folder have one."""
    folder = hub.get("subfolder") or ""
    if os.path.isdir(path):
        return os.path.realpath(os.path.join(path, folder)), "", None
    return os.fspath(path), folder, hub.get("revision")


def _read_json(path: str, filename: str, hub: dict[str, Any]) -> dict[str, Any] | None:
    found = find_file(path, filename, **hub)
    if found is None:
        return None
    with open(found, encoding="utf-8") as file:
        return json.load(file)


def _where(hub: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that say where files are."""
    known = {name: value for name, value in hub.items() if name in HUB_ARGUMENTS and value is not None}
    return {**known, "subfolder": known.get("subfolder") or ""}


def read_checkpoint(path: str | os.PathLike[str], variant: str | None = None, **hub: Any) -> Checkpoint:
    """Find out a checkpoint's layout and read its configurations, not its weights.

    Args:
        path: A folder or a Hub repository id.
        variant: Which of several sets of weights, such as `"fp16"` or `"ema"`.
        **hub: `revision`, `token`, `cache_dir`, `subfolder` and the other arguments that say where files are.

    Raises:
        ValueError: No known layout, or a denoiser that is not supported.
        OSError: The folder or repository does not exist or cannot be reached.
    """
    return _read_checkpoint(os.fspath(path), variant, _where(hub))


def _read_checkpoint(path: str, variant: str | None, hub: dict[str, Any], behind: tuple[Any, ...] = ()) -> Checkpoint:
    """Read a checkpoint that is the base of the heads at `behind`, if any."""
    config = _read_json(path, "config.json", hub)
    if config and config.get("model_type") == "ddae":
        found = Checkpoint(
            path, "transformers", config, config["denoiser"], config["scheduler"], config.get("vae"), hub
        )
        found.variant = variant
        found.head = _find_head(path, config.get("weights"), hub)
        if found.head is not None:
            found.base = _read_base(found, behind)
        return found
    index = _read_json(path, "model_index.json", hub)
    if index is not None:
        return replace(_read_pipeline(path, index, config, hub), variant=variant)
    if config and "_class_name" in config:
        config = present_config(plain_config(config))
        check_denoiser_class(config["_class_name"], f"The network in {path}")
        return Checkpoint(path, "model", {}, config, None, hub=hub, variant=variant)
    refuse_offline("A configuration", path, hub)
    raise ValueError(
        f"{path} is no checkpoint that ddae_hf can open: it has neither a model_index.json (a diffusers pipeline) nor "
        "a config.json of a DDAE model or of a diffusers denoiser "
        f"(found: {config.get('model_type', 'another config.json') if config else 'no config.json'})."
    )


def _find_head(path: str, weights: str | None, hub: dict[str, Any]) -> str | None:
    """Return the local path of a classifier's own weights, if the config says that they are all that there is."""
    if weights not in (None, *WEIGHTS):
        raise ValueError(f"{path} says `weights: {weights!r}`: known are {', '.join(WEIGHTS)}.")
    head = None if weights == "whole" else find_file(path, HEAD_FILE, **hub)
    if weights == "head" and head is None:
        refuse_offline(HEAD_FILE, path, hub)
        raise ValueError(f"{path} says that it is a classifier without its denoiser, but its {HEAD_FILE} is missing.")
    return head


def read_pipeline(path: str | os.PathLike[str], variant: str | None = None, **hub: Any) -> Checkpoint:
    """Return the generative checkpoint in a folder or repository that may hold a classifier too."""
    path, where = os.fspath(path), _where(hub)
    index = _read_json(path, "model_index.json", where)
    if index is None:
        raise ValueError(f"{path} holds no pipeline: it has no model_index.json.")
    return replace(_read_pipeline(path, index, None, where), variant=variant)


def _read_pipeline(
    path: str, index: dict[str, Any], root_config: dict[str, Any] | None, hub: dict[str, Any]
) -> Checkpoint:
    """Read a diffusers pipeline whose parts are in sub-folders or side by side."""
    where = f"The pipeline {index.get('_class_name')} in {path}"
    parts = {k: v for k, v in index.items() if isinstance(v, list) and v and v[0] is not None}
    classes = {k: v[-1] for k, v in parts.items()}
    networks = [k for k in classes if k in ("unet", "transformer", "prior", "decoder")]
    if not networks:
        raise ValueError(f"{where} has no denoiser: its components are {', '.join(classes) or 'none'}.")

    def read(inside: str, filename: str) -> dict[str, Any] | None:
        folder = "/".join(part for part in (hub["subfolder"], inside) if part)
        return _read_json(path, filename, {**hub, "subfolder": folder})

    denoiser = read(networks[0], "config.json")
    layout: Literal["pipeline", "flat"] = "pipeline" if denoiser else "flat"
    denoiser = denoiser or root_config
    denoiser = denoiser and present_config({**plain_config(denoiser), "_class_name": classes[networks[0]]})
    check_denoiser_class(
        (denoiser or {"_class_name": classes[networks[0]]})["_class_name"], f"{where}: its `{networks[0]}`"
    )
    if others := sorted(set(parts) - {networks[0], "scheduler", "vae"}):
        raise ValueError(
            f"{where} has components beside its denoiser, scheduler and vae ({', '.join(others)}), which are not "
            "supported: allowed are pipelines such as DDPMPipeline, DDIMPipeline, DiTPipeline and DDAEPipeline."
        )
    scheduler = read("scheduler" if layout == "pipeline" else "", "scheduler_config.json")
    vae = read("vae", "config.json") if "vae" in parts else None
    if denoiser is None or scheduler is None or (vae is None and "vae" in parts):
        missing = "vae's config.json" if denoiser and scheduler else "scheduler_config.json"
        missing = missing if denoiser else f"{networks[0]}'s config.json"
        raise ValueError(f"{where} is incomplete: {missing} is missing.")
    scheduler = {**plain_config(scheduler), "_class_name": classes.get("scheduler", scheduler.get("_class_name"))}
    if vae is not None:
        check_vae_class(classes["vae"], f"{where}: its `vae`")
        vae = {**plain_config(vae), "_class_name": classes["vae"]}
    known = {} if index.get("null_class") is None else {"null_class": index["null_class"]}
    return Checkpoint(path, layout, known, denoiser, scheduler, vae, hub)


def load_vae(path: str | os.PathLike[str], **hub: Any) -> Any:
    """Load a VAE: the `AutoencoderKL` that a folder or Hub repository holds itself or in `vae/`, or a checkpoint's.

    Raises:
        ValueError: None of these is there, or its weights are not in safetensors.
        OSError: The folder or repository does not exist or cannot be reached.
    """
    path = os.fspath(path)
    hub = {k: v for k, v in hub.items() if k in HUB_ARGUMENTS and v is not None}
    own = hub.get("subfolder") or ""
    for inside in (f"{own}/vae" if own else "vae", own):
        config = _read_json(path, "config.json", {**hub, "subfolder": inside}) or {}
        if "_class_name" in config and (inside != own or config["_class_name"] not in NETWORKS):
            check_vae_class(config["_class_name"], f"The network in {path}")
            return Checkpoint(path, "model", {}, {}, None, config, {**hub, "subfolder": inside}).load_vae()
    vae = read_checkpoint(path, **hub).load_vae()
    if vae is None:
        raise ValueError(
            f"{path} has no vae. If its denoiser works on latents, save it with the VAE that it was trained with: "
            "`DDAEPipeline.from_pretrained(path, vae=...).save_pretrained(...)`."
        )
    return vae


def commit_of(path: str | os.PathLike[str], **hub: Any) -> str | None:
    """Return the commit that a Hub repository's files are of, or None for a folder."""
    if os.path.isdir(path):
        return None
    found = find_file(path, "model_index.json", **hub) or find_file(path, "config.json", **hub)
    commit = re.search(r"[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]", found or "")
    return commit[1] if commit else None
