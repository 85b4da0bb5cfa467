"""Checkpoints: which layout a folder or Hub repository has, and how its parts map to a denoiser and a scheduler.

- `transformers`: `config.json` (`model_type: ddae`) and `model.safetensors`, as our models save themselves. With
  `head.safetensors` in place of the latter it holds a classifier alone, and the denoiser's weights are those of its
  base: the pipeline in the same folder, or another checkpoint.
- `pipeline`: `model_index.json`, `unet/` or `transformer/`, `scheduler/`, and `vae/` where the denoiser works on
  latents, as `DDAEPipeline` and diffusers save.
- `flat`: `model_index.json`, `config.json`, `scheduler_config.json` and weights side by side, as in
  `google/ddpm-cifar10-32`.
- `model`: `config.json` (`_class_name`) and weights, as `UNet2DModel.save_pretrained` or DiT's saves.

Only safetensors weights are read: nothing is unpickled here. `conversion` reads published checkpoints in other formats.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
from dataclasses import dataclass, field
from typing import Any, Literal

import diffusers
import torch
from huggingface_hub import is_offline_mode
from safetensors import safe_open
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from .conditioning import FREQUENCIES, adjust_timestep_embedding

# Denoisers whose hidden states can be read, and the component that holds one in a diffusers pipeline.
COMPONENTS = {"UNet2DModel": "unet", "DiTTransformer2DModel": "transformer"}
VAES = ("AutoencoderKL",)
# The arguments of `from_pretrained` that say where files are.
HUB_ARGUMENTS = (
    "cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token"
)  # fmt: skip

HEAD_FILE = "head.safetensors"


def check_denoiser_class(name: str | None, where: str = "the denoiser") -> None:
    """Raise `ValueError` unless `name` is a denoiser class that this package supports."""
    if name not in COMPONENTS:
        raise ValueError(f"{where} is of class {name!r}, which is not supported: allowed are {', '.join(COMPONENTS)}.")


def check_vae_class(name: str | None, where: str = "the vae") -> None:
    """Raise `ValueError` unless `name` is a class of VAE that this package supports."""
    if name not in VAES:
        raise ValueError(f"{where} is of class {name!r}, which is not supported: allowed is {', '.join(VAES)}.")


def check_sample_size(config: Any) -> None:
    """Raise `ValueError` unless a denoiser, of which this is the complete config, can divide its images as it must."""
    side = config["sample_size"]
    if side is None:
        raise ValueError("The denoiser's config has no sample_size: set it to the side of its images or latents.")
    if "patch_size" in config:
        factor, reason = config["patch_size"], f"with patches of {config['patch_size']}"
    else:
        levels = len(config["down_block_types"])
        factor, reason = 2 ** (levels - 1), f"with {levels} levels, each half the size of the one before"
    if any(length % factor for length in ([side] if isinstance(side, int) else side)):
        raise ValueError(f"sample_size is {side}: {reason}, it must be a multiple of {factor}.")


def plain_config(config: Any) -> dict[str, Any]:
    """Return a diffusers config as JSON would hold it: its class name, no other private keys, lists for tuples.

    Args:
        config: The config, or the diffusers network or scheduler that has it.
    """
    if hasattr(config, "config"):
        config = {**config.config, "_class_name": type(config).__name__}
    kept = {k: v for k, v in dict(config).items() if not k.startswith("_") or k == "_class_name"}
    return json.loads(json.dumps(kept))


def build_denoiser(config: dict[str, Any]) -> Any:
    """Build a randomly initialised denoiser from its diffusers config (with `_class_name`)."""
    check_denoiser_class(config.get("_class_name"))
    # An option that no class of diffusers has, which it would log as ignored.
    own = {name: value for name, value in config.items() if name == FREQUENCIES}
    denoiser = getattr(diffusers, config["_class_name"]).from_config({k: v for k, v in config.items() if k not in own})
    denoiser.register_to_config(**own)
    adjust_timestep_embedding(denoiser)
    return denoiser


def build_vae(config: dict[str, Any]) -> Any:
    """Build a randomly initialised VAE from its diffusers config (with `_class_name`)."""
    check_vae_class(config.get("_class_name"))
    return getattr(diffusers, config["_class_name"]).from_config(config)


def computed_buffers(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return a denoiser's buffers that are computed from its config and that no checkpoint holds, on the CPU."""
    if config["_class_name"] != "DiTTransformer2DModel":
        return {}
    with torch.device("cpu"):
        # A DiT's positions do not depend on its blocks.
        return {"pos_embed.pos_embed": build_denoiser({**config, "num_layers": 0}).pos_embed.pos_embed}


def build_scheduler(config: dict[str, Any]) -> Any:
    """Build a scheduler from its diffusers config (with `_class_name`)."""
    name = config.get("_class_name")
    cls = getattr(diffusers, str(name), None)
    if not (isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin)):
        raise ValueError(f"The scheduler's `_class_name` is {name!r}: it must name a diffusers scheduler.")
    return cls.from_config(config)


def fingerprint(*modules: torch.nn.Module | None, dtype: torch.dtype | None = torch.bfloat16) -> str:
    """Return a SHA-256 of networks' parameters and persistent buffers.

    Args:
        *modules: The networks; `None` stands for one that is not there.
        dtype: Type that values are rounded to first: with bfloat16, storing a checkpoint in bfloat16 leaves it the
            same. `None` takes them as they are, so that no two networks share a hash.
    """
    digest = hashlib.sha256()
    for module in modules:
        for name, value in sorted(module.state_dict().items()) if module is not None else []:
            if dtype is not None and value.is_floating_point():
                value = value.to(dtype)
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


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

    def load_denoiser(self, dtype: torch.dtype | None = None) -> Any:
        """Load the denoiser with its weights.

        Args:
            dtype: Type of the parameters; by default the one they are stored in.

        Raises:
            ValueError: No weights in safetensors, or a classifier's base whose weights are not those that it was
                trained on.
        """
        if self.base is not None:
            return self._checked(self.base.load_denoiser(), "fingerprint", dtype)
        if self.layout == "transformers":
            return self._network_of_transformers_layout("denoiser", build_denoiser(self.denoiser), dtype)
        name = self.denoiser["_class_name"]
        denoiser = self._diffusers_network(name, COMPONENTS[name] if self.layout == "pipeline" else "", dtype)
        adjust_timestep_embedding(denoiser)
        return denoiser

    def load_vae(self, dtype: torch.dtype | None = None) -> Any:
        """Load the VAE with its weights, or return None where there is none; see `load_denoiser`."""
        if self.base is not None:
            vae = self.base.load_vae()
            return vae if vae is None else self._checked(vae, "vae_fingerprint", dtype)
        if self.vae is None:
            return None
        if self.layout == "transformers":
            return self._network_of_transformers_layout("vae", build_vae(self.vae), dtype)
        return self._diffusers_network(self.vae["_class_name"], "" if self.layout == "model" else "vae", dtype)

    def _checked(self, network: Any, known: str, dtype: torch.dtype | None) -> Any:
        """Return a network of the base, if it is the one that the classifier in `head` was trained on."""
        check_base(str(self.head), self.base, network, known)
        # The network's own `to` would log a warning about an empty list.
        return network if dtype is None else torch.nn.Module.to(network, dtype)

    def _diffusers_network(self, class_name: str, inside: str, dtype: torch.dtype | None) -> Any:
        """Load a network as diffusers saves it, in the sub-folder `inside`."""
        folder = "/".join(part for part in (self.hub.get("subfolder"), inside) if part)
        hub = {**self.hub, "subfolder": folder}
        name = "diffusion_pytorch_model.safetensors"
        files = _weight_files(self.path, name, hub)
        if not files:
            refuse_offline(name, self.path, hub)
            raise ValueError(
                f"{self.path} has no {name} in {folder or 'its root'}. Only safetensors weights are "
                "read, never pickles (`.bin`): convert them with diffusers' `save_pretrained(safe_serialization=True)`."
            )
        cls = getattr(diffusers, class_name)
        # diffusers' own loading also renames the attention weights of early checkpoints.
        return cls.from_pretrained(self.path, torch_dtype=dtype or _stored_dtype(files[0]), use_safetensors=True, **hub)

    def _network_of_transformers_layout(self, part: str, network: Any, dtype: torch.dtype | None) -> Any:
        """Fill a network with the weights that a model of transformers' layout has under the name `part`."""
        state: dict[str, torch.Tensor] = {}
        hub = {**self.hub, "subfolder": self.hub.get("subfolder") or ""}
        for file in _weight_files(self.path, "model.safetensors", hub):
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 (not a mapping)
                    prefix, _, name = key.partition(f"{part}.")
                    if prefix in ("", "ddae.") and name:
                        state[name] = tensors.get_tensor(key)
        if not state:
            refuse_offline("model.safetensors", self.path, hub)
            raise ValueError(f"{self.path} has no {part} weights in model.safetensors.")
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


def _read_base(path: str, head: str, hub: dict[str, Any]) -> Checkpoint:
    """Return the checkpoint that holds the denoiser of a classifier without one."""
    known = head_metadata(head)
    if not {"base", "fingerprint"} <= set(known):
        raise ValueError(f"{path} has a {HEAD_FILE} that does not name its base: write it with `save_head`.")
    if known["base"] == ".":
        return read_pipeline(path, **hub)
    where = {k: v for k, v in hub.items() if k not in ("revision", "subfolder")}
    return read_checkpoint(known["base"], revision=known.get("revision"), subfolder=known.get("subfolder"), **where)


def find_file(path: str | os.PathLike[str], filename: str, **hub: Any) -> str | None:
    """Return the local path of a checkpoint's file, downloaded if need be, or None where it has no such file."""
    path = os.fspath(path)
    if not os.path.isdir(path) and (os.path.exists(path) or os.path.isabs(path) or path.count("/") > 1):
        raise OSError(f"{path} is not a folder; give a checkpoint's folder or a Hub repository id (`owner/name`).")
    hub = {k: v for k, v in hub.items() if k in HUB_ARGUMENTS and v is not None}
    return cached_file(path, filename, _raise_exceptions_for_missing_entries=False, **hub)


def refuse_offline(what: str, path: str, hub: dict[str, Any]) -> None:
    """Raise `OSError` if what a repository has may be missing only because the Hub is not asked."""
    if not os.path.isdir(path) and (hub.get("local_files_only") or is_offline_mode()):
        revision = f" at revision {hub['revision']}" if hub.get("revision") else ""
        raise OSError(
            f"{what} of {path}{revision} is not in the Hub's cache (nor is there such a folder), and the Hub is not "
            "asked in offline mode."
        )


def _read_json(path: str, filename: str, hub: dict[str, Any]) -> dict[str, Any] | None:
    found = find_file(path, filename, **hub)
    if found is None:
        return None
    with open(found, encoding="utf-8") as file:
        return json.load(file)


def _weight_files(path: str, name: str, hub: dict[str, Any]) -> list[str]:
    """Return the local paths of safetensors weights: one file, its shards, or nothing."""
    single = find_file(path, name, **hub)
    if single is not None:
        return [single]
    index = find_file(path, f"{name}.index.json", **hub)
    return [] if index is None else get_checkpoint_shard_files(path, index, **hub)[0]


def _stored_dtype(file: str) -> torch.dtype:
    with safe_open(file, framework="pt") as tensors:
        dtypes = (tensors.get_tensor(key).dtype for key in tensors.keys())  # noqa: SIM118 (not a mapping)
        return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)


def read_checkpoint(path: str | os.PathLike[str], **hub: Any) -> Checkpoint:
    """Find out a checkpoint's layout and read its configurations, not its weights.

    Args:
        path: A folder or a Hub repository id.
        **hub: `revision`, `token`, `cache_dir`, `subfolder` and the other arguments that say where files are.

    Raises:
        ValueError: No known layout, or a denoiser that is not supported.
        OSError: The folder or repository does not exist or cannot be reached.
    """
    path = os.fspath(path)
    hub = {k: v for k, v in hub.items() if k in HUB_ARGUMENTS and v is not None}
    hub["subfolder"] = hub.get("subfolder") or ""
    config = _read_json(path, "config.json", hub)
    if config and config.get("model_type") == "ddae":
        found = Checkpoint(
            path, "transformers", config, config["denoiser"], config["scheduler"], config.get("vae"), hub
        )
        found.head = find_file(path, HEAD_FILE, **hub)
        if found.head is not None:
            found.base = _read_base(path, found.head, hub)
        return found
    index = _read_json(path, "model_index.json", hub)
    if index is not None:
        return _read_pipeline(path, index, config, hub)
    if config and "_class_name" in config:
        config = _present_class(plain_config(config))
        check_denoiser_class(config["_class_name"], f"The network in {path}")
        return Checkpoint(path, "model", {}, config, None, hub=hub)
    refuse_offline("A configuration", path, hub)
    raise ValueError(
        f"{path} is no checkpoint that ddae_hf can open: it has neither a model_index.json (a diffusers pipeline) nor "
        "a config.json of a DDAE model or of a diffusers denoiser "
        f"(found: {config.get('model_type', 'another config.json') if config else 'no config.json'})."
    )


def read_pipeline(path: str | os.PathLike[str], **hub: Any) -> Checkpoint:
    """Return the generative checkpoint in a folder or repository that may hold a classifier too."""
    index = _read_json(os.fspath(path), "model_index.json", hub)
    if index is None:
        raise ValueError(f"{path} holds no pipeline: it has no model_index.json.")
    return _read_pipeline(os.fspath(path), index, None, {**hub, "subfolder": hub.get("subfolder") or ""})


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
    denoiser = denoiser and _present_class({**plain_config(denoiser), "_class_name": classes[networks[0]]})
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


def _present_class(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a DiT from the time when diffusers had it in a class of many kinds, as its present class's.

    `facebook/DiT-XL-2-256` is one.
    """
    if config["_class_name"] != "Transformer2DModel" or config.get("norm_type") != "ada_norm_zero":
        return config
    known = inspect.signature(diffusers.DiTTransformer2DModel).parameters
    return {k: v for k, v in config.items() if k in known} | {"_class_name": "DiTTransformer2DModel"}


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
        if "_class_name" in config and (inside != own or config["_class_name"] not in COMPONENTS):
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
