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

Weights are one file or several with an index; with a variant, its name is in theirs (`model.fp16.safetensors`). A
checkpoint that lacks a tensor is refused. Only safetensors weights are read: nothing is unpickled here. `conversion`
reads published checkpoints in other formats.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from huggingface_hub import is_offline_mode
from safetensors import safe_open
from transformers.utils.hub import cached_file

from .conditioning import FREQUENCIES, adjust_timestep_embedding

# Denoisers whose hidden states can be read, and the component that holds one in a diffusers pipeline.
COMPONENTS = {"UNet2DModel": "unet", "DiTTransformer2DModel": "transformer"}
VAES = ("AutoencoderKL",)
# The arguments of `from_pretrained` that say where files are.
HUB_ARGUMENTS = (
    "cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token"
)  # fmt: skip

HEAD_FILE = "head.safetensors"
WHOLE_FILE = "model.safetensors"
DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"
WEIGHTS = ("whole", "head")  # what `DDAEConfig.weights` may say
# The fingerprints of a generator that `DDAEConfig` has, and the type that each rounds to.
GENERATOR_FINGERPRINTS = {
    "generator_fingerprint": torch.bfloat16, "generator_fingerprint_float16": torch.float16
}  # fmt: skip
COMPILED = "_orig_mod."  # what `torch.compile` puts into the names of a network's tensors
# Names of attention weights in 2022, which diffusers reads under the present ones.
EARLY_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


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
        config = {**config.config, "_class_name": type(uncompiled(config)).__name__}
    kept = {k: v for k, v in dict(config).items() if not k.startswith("_") or k == "_class_name"}
    return json.loads(json.dumps(kept))


def uncompiled(network: Any) -> Any:
    """Return the network that `torch.compile` has wrapped, or the network itself."""
    return getattr(network, "_orig_mod", network)


def plain_state(state: torch.nn.Module | Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a network's tensors, or a state dict, under the names that they have where nothing is compiled."""
    tensors = state.state_dict() if isinstance(state, torch.nn.Module) else state
    return {name.replace(COMPILED, ""): value for name, value in tensors.items()}


@contextmanager
def uncompiled_names(network: torch.nn.Module) -> Iterator[None]:
    """Let a network with compiled parts save its tensors under the names that they have without."""

    def rename(module: Any, found: dict[str, torch.Tensor], *args: Any) -> None:
        for name in list(found):  # all, which keeps their order
            found[name.replace(COMPILED, "")] = found.pop(name)

    handle = uncompiled(network).register_state_dict_post_hook(rename)
    try:
        yield
    finally:
        handle.remove()


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
        for name, value in sorted(plain_state(module).items()) if module is not None else []:
            if dtype is not None and value.is_floating_point():
                value = value.to(dtype)
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


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
        inside, name = self._denoiser_folder(), self.denoiser["_class_name"]
        denoiser = self._diffusers_network(name, inside, self.variant, dtype or _stored_dtype(files[0]))
        adjust_timestep_embedding(denoiser)
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
        dtype = dtype or _stored_dtype(files[0])
        return self._diffusers_network(self.vae["_class_name"], self._vae_folder(), self._vae_variant(), dtype)

    def check_denoiser(self) -> list[str]:
        """Return the local paths of the files of the denoiser's weights, which hold every tensor of it.

        Raises:
            ValueError: No weights in safetensors, two sets of them that cannot be told apart, or tensors missing.
        """
        with torch.device("meta"):
            expected = plain_state(build_denoiser(self.denoiser))
        files = self.weight_files(self._denoiser_folder(), self.variant)
        refuse_missing(self.path, "denoiser", expected, self._stored_names("denoiser", files))
        return files

    def check_vae(self) -> list[str]:
        """Return the local paths of the files of the VAE's weights: see `check_denoiser`."""
        with torch.device("meta"):
            expected = plain_state(build_vae(self.vae or {}))
        files = self.weight_files(self._vae_folder(), self._vae_variant())
        refuse_missing(self.path, "vae", expected, self._stored_names("vae", files))
        return files

    def weight_files(self, inside: str = "", variant: str | None = None) -> list[str]:
        """Return the local paths of the files of weights in the sub-folder `inside`; at least one."""
        name, hub = self._weights_name(), self._inside(inside)
        if files := _weight_files(self.path, name, hub, variant):
            return files
        wanted = _with_variant(name, variant)
        refuse_offline(wanted, self.path, hub)
        known = ", ".join(_variants(self.path, name, hub))
        there = f" (variants that are there: {known})" if known else ""
        raise ValueError(
            f"{self.path} has no {wanted} in {hub['subfolder'] or 'its root'}{there}. Only safetensors weights are "
            "read, never pickles (`.bin`): convert them with diffusers' `save_pretrained(safe_serialization=True)`."
        )

    def _weights_name(self) -> str:
        return WHOLE_FILE if self.layout == "transformers" else DIFFUSERS_FILE

    def _denoiser_folder(self) -> str:
        return COMPONENTS[self.denoiser["_class_name"]] if self.layout == "pipeline" else ""

    def _vae_folder(self) -> str:
        return "vae" if self.layout in ("pipeline", "flat") else ""

    def _vae_variant(self) -> str | None:
        has_own = _weight_files(self.path, self._weights_name(), self._inside(self._vae_folder()), self.variant)
        return self.variant if has_own else None

    def _inside(self, folder: str) -> dict[str, Any]:
        """Return where the files of a sub-folder are."""
        return {**self.hub, "subfolder": "/".join(part for part in (self.hub.get("subfolder"), folder) if part)}

    def _stored_names(self, part: str, files: list[str]) -> set[str]:
        """Return the names that the tensors of `part`, `"denoiser"` or `"vae"`, have in the network."""
        if self.layout == "transformers":
            return {name for name, _ in _names_of(part, files)}
        names = set(_stored(files))
        if len(files) > 1:
            return names
        early = "|".join(EARLY_NAMES)
        return {re.sub(rf"\.({early})\.(?=\w+$)", lambda found: f".{EARLY_NAMES[found[1]]}.", name) for name in names}

    def _checked(self, network: Any, known: str, dtype: torch.dtype | None) -> Any:
        """Return a network of the base, if it is the one that the classifier in `head` was trained on."""
        check_base(str(self.head), self.base, network, known)
        # The network's own `to` would log a warning about an empty list.
        return network if dtype is None else torch.nn.Module.to(network, dtype)

    def _diffusers_network(self, class_name: str, inside: str, variant: str | None, dtype: torch.dtype) -> Any:
        """Load a network as diffusers saves it, in the sub-folder `inside`."""
        # diffusers' own loading also renames the attention weights of early checkpoints.
        return getattr(diffusers, class_name).from_pretrained(
            self.path, torch_dtype=dtype, variant=variant, use_safetensors=True, **self._inside(inside)
        )


def refuse_missing(where: str, what: str, expected: Iterable[str], found: Iterable[str]) -> None:
    """Raise `ValueError`, with some of their names, if expected tensors are not among those found."""
    expected = list(expected)
    if missing := sorted(set(expected) - set(found)):
        names = ", ".join(missing[:4]) + (", ..." if len(missing) > 4 else "")
        raise ValueError(
            f"{where} lacks {len(missing)} of the {len(expected)} tensors of its {what}: {names}. Its weights are "
            "incomplete, or its config.json describes another network: save or download it again."
        )


def refuse_unexpected(where: str, what: str, unexpected: Iterable[str]) -> None:
    """Raise `ValueError`, with some of their names, if there are tensors that a network has no place for."""
    if found := sorted(unexpected):
        names = ", ".join(found[:4]) + (", ..." if len(found) > 4 else "")
        raise ValueError(
            f"{where} has {len(found)} tensors that its {what} has no place for: {names}. Its config.json, or the "
            "configuration that was given, describes another network."
        )


def _stored(files: Iterable[str]) -> Iterator[str]:
    """Yield the names of the tensors in files."""
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            yield from tensors.keys()


def holds_compiled_names(files: Iterable[str]) -> bool:
    """Return whether files have the names of a network that was compiled, as version 0.1.0 wrote them."""
    return any(COMPILED in name for name in _stored(files))


def _names_of(part: str, files: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield the names that the tensors of `part` have in its network, and in files of transformers' layout."""
    for key in _stored(files):
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


def _with_variant(name: str, variant: str | None) -> str:
    """Return the name of a variant's file of weights, or of its index, as transformers and diffusers write it."""
    stem, _, ending = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{ending}"


def _weight_files(path: str, name: str, hub: dict[str, Any], variant: str | None = None) -> list[str]:
    """Return the local paths of safetensors weights: one file, its shards, or nothing."""
    single = find_file(path, _with_variant(name, variant), **hub)
    index = find_file(path, _with_variant(f"{name}.index.json", variant), **hub)
    if index is None:
        return [] if single is None else [single]
    with open(index, encoding="utf-8") as file:
        shards = sorted(set(json.load(file)["weight_map"].values()))
    found = [find_file(path, shard, **hub) for shard in shards]
    if single is not None:
        if None not in found:
            raise ValueError(
                f"{path} has weights twice: {os.path.basename(single)}, and those that {os.path.basename(index)} names."
                " Nothing says which were saved last: delete the others."
            )
        return [single]
    if missing := [shard for shard, file in zip(shards, found, strict=True) if file is None]:
        refuse_offline(missing[0], path, hub)
        raise ValueError(f"{path} lacks {missing[0]}, which {os.path.basename(index)} names: download it again.")
    return [file for file in found if file is not None]


def _variants(path: str, name: str, hub: dict[str, Any]) -> list[str]:
    """Return the variants of weights that a folder holds; of a repository nobody is asked."""
    stem = re.escape(name.removesuffix(".safetensors"))
    pattern = re.compile(
        rf"{stem}\.(?:([^.]+?)(?:-\d{{5}}-of-\d{{5}})?\.safetensors|safetensors\.index\.([^.]+)\.json)"
    )
    folder = Path(path, hub.get("subfolder") or "")
    found = (pattern.fullmatch(file.name) for file in (folder.iterdir() if folder.is_dir() else ()))
    return sorted({match[1] or match[2] for match in found if match})


@contextmanager
def replaced_weights(folder: str | os.PathLike[str], name: str, variant: str | None = None) -> Iterator[None]:
    """Let what is saved inside take the place of the weights that a folder has: as one file, of shards, or the reverse.

    transformers and diffusers write over the one and leave the other, which would be the one that opens.
    """
    files = [Path(folder, _with_variant(each, variant)) for each in (name, f"{name}.index.json")]
    before = [_stamp(file) for file in files]
    yield
    written = [stamp is not None and stamp != old for stamp, old in zip(map(_stamp, files), before, strict=True)]
    if any(written):
        for file, is_new in zip(files, written, strict=True):
            if not is_new:
                file.unlink(missing_ok=True)


def _stamp(file: Path) -> tuple[int, int, int] | None:
    if not file.exists():
        return None
    stat = file.stat()
    return stat.st_mtime_ns, stat.st_ino, stat.st_size


def _stored_dtype(file: str) -> torch.dtype:
    with safe_open(file, framework="pt") as tensors:
        dtypes = (tensors.get_tensor(key).dtype for key in tensors.keys())  # noqa: SIM118 (not a mapping)
        return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)


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
        config = _present_class(plain_config(config))
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
