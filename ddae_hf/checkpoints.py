"""Checkpoints: which layout a folder or Hub repository has, and how its parts map to a denoiser and a scheduler.

- *whole*: `config.json` (`model_type: ddae`, `weights: whole`) and `model.safetensors`, as our models save themselves.
- *head*: the same with `weights: head` and `head.safetensors`, a classifier alone. Its denoiser takes its weights from
  a base, which is the pipeline in the same folder or another checkpoint. With `weights: adapters` the denoiser's are
  beside it (see `adapters`). Version 0.1.0 wrote no `weights`, and meant a head where there was a `head.safetensors`.
- *pipeline*: `model_index.json`, `unet/` or `transformer/`, `scheduler/`, and `vae/` where the denoiser works on
  latents (and text encoders, see `prompts`), as `DDAEPipeline` and diffusers save.
- *flat*: `model_index.json`, `config.json`, `scheduler_config.json` and weights side by side, as in
  `google/ddpm-cifar10-32`.
- *model*: `config.json` (`_class_name`) and weights, as `save_pretrained` of a `UNet2DModel` or a DiT writes them.

Only safetensors are read: nothing is unpickled here. `conversion` reads published checkpoints in other formats.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file

from .building import LARGEST, building, refusing, short
from .cut import uncompiled
from .labels import checked_names
from .latents import check_vae_class
from .networks import (
    NETWORKS,
    TEXTS,
    build_network,
    check_components,
    check_denoiser_class,
    component_classes,
    network_of,
    present_config,
    present_name,
    skeleton,
)
from .noise import family_of, new_scheduler
from .weights import (
    COMPILED,
    DIFFUSERS_FILE,
    HEAD_FILE,
    LOADING_ARGUMENTS,
    WHOLE_FILE,
    find_file,
    fingerprint,
    head_metadata,
    inside,
    location,
    names_of_part,
    open_weights,
    plain_state,
    read_json,
    refuse_missing,
    refuse_offline,
    refuse_other_shapes,
    refuse_unexpected,
    stored_dtype,
    tensor_names,
    tensor_shapes,
    weight_files,
    where_files_are,
)

WEIGHTS = ("whole", "head", "adapters")  # what `DDAEConfig.weights` may say
# The fingerprints of a generator that `DDAEConfig` has, and the type that each rounds to.
GENERATOR_FINGERPRINTS = {"generator_fingerprint": torch.bfloat16, "generator_fingerprint_float16": torch.float16}


def plain_config(config: Any) -> dict[str, Any]:
    """Return a diffusers config, or a network's or scheduler's, as JSON would hold it, without private keys."""
    if hasattr(config, "config"):
        config = {**config.config, "_class_name": type(uncompiled(config)).__name__}
    if not isinstance(config, Mapping):
        raise ValueError(f"A config is {short(config)}: it must be a mapping, as diffusers writes it.")
    kept = {k: v for k, v in config.items() if not str(k).startswith("_") or k == "_class_name"}
    with refusing("A config cannot be written as JSON"):
        return json.loads(json.dumps(kept))


def build_scheduler(config: dict[str, Any]) -> Any:
    """Build a scheduler from its diffusers config (with `_class_name`), or raise `ValueError`."""
    name = config.get("_class_name")
    cls = getattr(diffusers, name, None) if isinstance(name, str) and name.endswith("Scheduler") else None
    if not (isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin)):
        raise ValueError(f"The scheduler's `_class_name` is {short(name)}: it must name a diffusers scheduler.")
    with building("scheduler", config, cls):
        family_of(scheduler := cls.from_config(config)).sigma_range()  # where numbers of another type are found out
    return scheduler


def still_generates(denoiser: torch.nn.Module, config: Mapping[str, Any]) -> bool:
    """Return whether a denoiser is the generator whose fingerprints a configuration holds.

    It may have been rounded once since then, to bfloat16 or to float16, to be stored in half precision.
    """
    known = {dtype: config.get(name) for name, dtype in GENERATOR_FINGERPRINTS.items()}
    return any(value is not None and fingerprint(denoiser, dtype=dtype) == value for dtype, value in known.items())


@dataclass(kw_only=True)
class Checkpoint:
    """What a folder or repository holds, without its weights. This class is for what diffusers saves.

    Subclasses are for what this package's models save. A `part` is what has weights: `"denoiser"` or `"vae"`.
    """

    path: str
    hub: dict[str, Any]  # which sub-folder and revision, and how they are reached
    config: dict[str, Any]  # the entries of a `DDAEConfig` that are known
    variant: str | None = None  # which of several sets of weights, such as "fp16" or "ema"
    folders: dict[str, str] = field(default_factory=dict)  # where each part's weights are, if in a sub-folder
    texts: dict[str, str] = field(default_factory=dict)  # classes of text encoders and tokenizers, by sub-folder
    index: dict[str, Any] | None = None  # its `model_index.json`, which diffusers' pipelines open
    head: str | None = None  # the local path of a classifier's own weights, where the others are in `base`
    base: Checkpoint | None = None
    holds_model = False  # whether it is a model of this package, in transformers' layout and not in diffusers'
    keeps_dtype = False  # whether a model opens in the type that its config says, not in the type of its weights
    opens_in_transformers = False  # whether transformers can open it by itself
    weights_name = DIFFUSERS_FILE

    def __post_init__(self) -> None:
        """Give each part's config an attribute of its own."""
        self.denoiser: dict[str, Any] = self.config.get("denoiser", {})
        self.scheduler: dict[str, Any] | None = self.config.get("scheduler")
        self.vae: dict[str, Any] | None = self.config.get("vae")

    @property
    def opens_in_diffusers(self) -> bool:
        """Whether diffusers can open it by itself: variants only in sub-folders, and no class of this package."""
        missed = ("denoiser" not in self.folders and self.variant is not None) or network_of(self.denoiser).own_module
        return not (missed or self.index is None or self.hub.get("subfolder"))

    def chain(self) -> list[Checkpoint]:
        """Return this checkpoint, its base, the base of that, and so on."""
        return [self, *([] if self.base is None else self.base.chain())]

    def generator(self, given: Collection[str]) -> Checkpoint:
        """Return the checkpoint that a pipeline opens; the components in `given` come from elsewhere."""
        return self

    def compiled_state(self) -> dict[str, torch.Tensor] | None:
        """Return a model's tensors under their present names if version 0.1.0 saved it compiled, otherwise None."""
        return None

    def scheduler_or_default(self, of_latents: bool) -> Any:
        """Return its scheduler or, with a warning, DDPM's where it holds a network alone."""
        if self.scheduler is not None:
            return build_scheduler(self.scheduler)
        warnings.warn(
            f"{self.path} holds a network without its scheduler: DDPM's defaults are taken (linear betas from 1e-4 to "
            "0.02, 1000 timesteps, noise prediction). If it was trained otherwise, pass `scheduler=`.",
            stacklevel=4,
        )
        return new_scheduler("ddpm", clip_sample=not of_latents)  # latents have no bounds

    def load(self, part: str, dtype: torch.dtype | None = None) -> Any:
        """Load a part with its weights, by default in the type that they are stored in; None if there is no such part.

        It raises what `check` raises, and `ValueError` for a classifier's base whose weights have changed.
        """
        return None if self.config.get(part) is None else self._read(part, dtype, *self.check(part))

    def check(self, part: str) -> tuple[list[str], str | None]:
        """Return the local paths of a part's files of weights, which hold all of its tensors, and their variant.

        Raises:
            ValueError: No weights in safetensors, two sets of them that cannot be told apart, or tensors that are
                missing or have other shapes.
        """
        expected = {name: tuple(value.shape) for name, value in plain_state(skeleton(self.config[part])).items()}
        files, variant = self.weight_files(part)
        stored = self._stored_shapes(part, files)
        refuse_missing(self.path, part, expected, stored)
        refuse_other_shapes(self.path, part, expected, stored)
        return files, variant

    def weight_files(self, part: str = "denoiser") -> tuple[list[str], str | None]:
        """Return the local paths of a part's files of weights, and their variant."""
        # A VAE that lacks the variant is opened with its plain weights, as in diffusers' pipelines.
        wanted = [self.variant] if part == "denoiser" else [self.variant, None]
        return weight_files(self.path, self.weights_name, inside(self.hub, self.folders.get(part, "")), *wanted)

    def _stored_shapes(self, part: str, files: list[str]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the stored tensors of a part by the names that they have in its network."""
        shapes = tensor_shapes(files)
        return {present_name(name): shape for name, shape in shapes.items()} if len(files) == 1 else shapes

    def _read(self, part: str, dtype: torch.dtype | None, files: list[str], variant: str | None) -> Any:
        """Return the network of a part with the weights of these files."""
        config = self.config[part]
        model = getattr(diffusers, config["_class_name"]) if part == "vae" else network_of(config).model
        where = inside(self.hub, self.folders.get(part, ""))
        dtype = dtype or stored_dtype(files[0])
        # diffusers' own loading also renames the attention weights of early checkpoints.
        network = model.from_pretrained(self.path, torch_dtype=dtype, variant=variant, use_safetensors=True, **where)
        if part == "denoiser":
            network_of(config).complete(network)
        return network


class WholeCheckpoint(Checkpoint):
    """A model as `save_pretrained` of this package writes it."""

    holds_model = opens_in_transformers = True
    weights_name = WHOLE_FILE

    def compiled_state(self) -> dict[str, torch.Tensor] | None:
        """Return its tensors under their present names if any was saved under a compiled network's, otherwise None."""
        files, _ = self.weight_files()
        if not any(COMPILED in name for name in tensor_names(files)):
            return None
        return plain_state({name: value for file in files for name, value in load_file(file).items()})

    def _stored_shapes(self, part: str, files: list[str]) -> dict[str, tuple[int, ...]]:
        shapes = tensor_shapes(files)
        return {name: shapes[key] for name, key in names_of_part(part, files)}

    def _read(self, part: str, dtype: torch.dtype | None, files: list[str], variant: str | None) -> Any:
        network = build_network(self.config[part])
        state: dict[str, torch.Tensor] = {}
        for file in files:
            with open_weights(file) as tensors:
                state |= {name: tensors.get_tensor(key) for name, key in names_of_part(part, [file])}
        refuse_unexpected(os.path.dirname(files[0]), part, state.keys() - network.state_dict().keys())
        network.load_state_dict(state, assign=True)
        return (network if dtype is None else network.to(dtype)).eval()


class HeadCheckpoint(Checkpoint):
    """A classifier without its denoiser."""

    holds_model = True
    head: str
    base: Checkpoint

    @property
    def keeps_dtype(self) -> bool:  # type: ignore[override]
        """Whether its config says its type, which version 0.1.0 did not write."""
        return self.config.get("weights") is not None

    def generator(self, given: Collection[str]) -> Checkpoint:
        """Return its base, which opens as it would without a classifier beside it.

        A base elsewhere must be the one that the classifier was trained on, except for the components in `given`.
        """
        if location(self.base.path, **self.base.hub) == location(self.path, **self.hub):
            return replace(self.base, variant=self.variant)
        if network_of(self.denoiser).component not in given:
            self.load("denoiser")
        if "vae" not in given:
            self.load("vae")
        return self.chain()[-1]

    def load(self, part: str, dtype: torch.dtype | None = None) -> Any:
        """Load a network of the base, if it is the one that the classifier was trained on."""
        if part == "denoiser" and self.variant is not None:
            raise ValueError(
                f"variant is {self.variant!r}, but {self.path} is a classifier without its denoiser, and it "
                f"names the variant of its base {self.base.path} itself: leave `variant` out."
            )
        network = self.base.load(part)
        if network is None:
            return None
        known = "fingerprint" if part == "denoiser" else "vae_fingerprint"
        if fingerprint(network, dtype=None) != head_metadata(self.head).get(known):
            raise ValueError(
                f"The weights of {self.base.path} are not those that the classifier in {self.head} was trained on: "
                "they have changed since. Restore the base as it was, or train a new classifier on it as it is now."
            )
        # The network's own `to` would log a warning about an empty list.
        return network if dtype is None else torch.nn.Module.to(network, dtype)


def take_checkpoint(path: Any, arguments: dict[str, Any]) -> tuple[Checkpoint, Any]:
    """Remove from the arguments of a `from_pretrained` those on loading; return the checkpoint and the type wanted."""
    given = {name: arguments.pop(name, None) for name in LOADING_ARGUMENTS}
    if given["use_safetensors"] is False:
        raise ValueError("use_safetensors is False, but only safetensors weights are read: leave it out.")
    types = [given[name] for name in ("dtype", "torch_dtype") if given[name] is not None]
    if len(types) > 1:
        raise ValueError("You have passed both `dtype` and `torch_dtype`, its older name: pass `dtype` alone.")
    return read_checkpoint(path, **given), next(iter(types), None)


def read_checkpoint(
    path: str | os.PathLike[str], variant: str | None = None, *, behind: tuple[Any, ...] = (), **hub: Any
) -> Checkpoint:
    """Find out the layout of a checkpoint in a folder or Hub repository, and read its configurations, not its weights.

    `hub` holds `revision`, `token`, `cache_dir`, `subfolder` and the other arguments that say where files are. `behind`
    holds the places of the heads whose base this checkpoint is.

    Raises:
        ValueError: No known layout, or a denoiser that is not supported.
        OSError: The folder or repository does not exist or cannot be reached.
    """
    path, hub = os.fspath(path), where_files_are(hub)
    config = read_json(path, "config.json", hub)
    if config and config.get("model_type") == "ddae":
        return _read_model(path, variant, hub, config, behind)
    if (index := read_json(path, "model_index.json", hub)) is not None:
        return _read_pipeline(path, variant, hub, index, config)
    if config and "_class_name" in config:
        denoiser = present_config(plain_config(config))
        check_denoiser_class(denoiser["_class_name"], f"The network in {path}")
        return Checkpoint(path=path, hub=hub, config={"denoiser": denoiser}, variant=variant)
    refuse_offline("A configuration", path, hub)
    raise ValueError(
        f"{path} is not a checkpoint that ddae_hf can open: it has neither a model_index.json (a diffusers pipeline) "
        "nor a config.json of a DDAE model or of a diffusers denoiser "
        f"(found: {config.get('model_type', 'another config.json') if config else 'no config.json'})."
    )


def _read_model(
    path: str, variant: str | None, hub: dict[str, Any], config: dict[str, Any], behind: tuple[Any, ...]
) -> Checkpoint:
    """Read a model of this package, whole or without its denoiser."""
    if missing := [part for part in ("denoiser", "scheduler") if not config.get(part)]:
        raise ValueError(f"{path} is incomplete: its config.json describes no {missing[0]}.")
    for name in ("denoiser", "scheduler", "vae", "architectures"):
        if not isinstance(config.get(name), (list if name == "architectures" else dict, type(None))):
            raise ValueError(f"{path} is damaged: its config.json says that {name} is {short(config[name])}.")
    weights = config.get("weights")
    if weights not in (None, *WEIGHTS):
        raise ValueError(f"{path} says `weights: {weights!r}`: allowed are {', '.join(WEIGHTS)}.")
    head = None if weights == "whole" else find_file(path, HEAD_FILE, **hub)
    if weights in ("head", "adapters") and head is None:
        refuse_offline(HEAD_FILE, path, hub)
        raise ValueError(f"{path} says that it is a classifier without its denoiser, but its {HEAD_FILE} is missing.")
    if head is None:
        return WholeCheckpoint(path=path, hub=hub, config=config, variant=variant)
    known, here = head_metadata(head), location(path, **hub)
    if not {"base", "fingerprint"} <= set(known):
        raise ValueError(f"{path} has a {HEAD_FILE} that does not name its base: write it with `save_head`.")
    if known["base"] == ".":
        base = read_pipeline(path, known.get("variant"), **hub)
    elif here in behind:
        raise ValueError(
            f"The classifier in {path} is its own base, directly or by way of others: none of them holds the "
            "denoiser. Restore the generative checkpoint that was the base, or train the classifier again."
        )
    else:
        there = {**hub, "revision": known.get("revision"), "subfolder": known.get("subfolder")}
        base = read_checkpoint(known["base"], known.get("variant"), behind=(*behind, here), **there)
    return HeadCheckpoint(path=path, hub=hub, config=config, variant=variant, head=head, base=base)


def read_pipeline(path: str | os.PathLike[str], variant: str | None = None, **hub: Any) -> Checkpoint:
    """Return the generative checkpoint in a folder or repository that may hold a classifier too."""
    path, hub = os.fspath(path), where_files_are(hub)
    index = read_json(path, "model_index.json", hub)
    if index is None:
        raise ValueError(f"{path} holds no pipeline: it has no model_index.json.")
    return _read_pipeline(path, variant, hub, index, None)


def _read_pipeline(
    path: str, variant: str | None, hub: dict[str, Any], index: dict[str, Any], root_config: dict[str, Any] | None
) -> Checkpoint:
    """Read a diffusers pipeline whose parts are in sub-folders or side by side."""
    where = f"The pipeline {index.get('_class_name')} in {path}"
    classes = component_classes(path, index)
    name = next((k for k in classes if k in ("unet", "transformer", "prior", "decoder")), None)
    if name is None:
        raise ValueError(f"{where} has no denoiser: its components are {', '.join(classes) or 'none'}.")
    own_config = read_json(path, "config.json", inside(hub, name))
    denoiser = own_config or root_config
    denoiser = denoiser and present_config({**plain_config(denoiser), "_class_name": classes[name]})
    check_denoiser_class((denoiser or {"_class_name": classes[name]})["_class_name"], f"{where}: its `{name}`")
    texts = {component: kind for component, kind in classes.items() if component in TEXTS}
    check_components(where, index, network_of(denoiser or {"_class_name": classes[name]}), classes, {name, *texts})
    scheduler = read_json(path, "scheduler_config.json", inside(hub, "scheduler" if own_config else ""))
    vae = read_json(path, "config.json", inside(hub, "vae")) if "vae" in classes else None
    files = {f"{name}'s config.json": denoiser, "scheduler_config.json": scheduler}
    files |= {"vae's config.json": vae} if "vae" in classes else {}
    if missing := [file for file, content in files.items() if content is None]:
        raise ValueError(f"{where} is incomplete: {missing[0]} is missing.")
    config: dict[str, Any] = {"denoiser": denoiser, "scheduler": plain_config(scheduler)}
    if "scheduler" in classes:
        config["scheduler"]["_class_name"] = classes["scheduler"]
    if "vae" in classes:
        check_vae_class(classes["vae"], f"{where}: its `vae`")
        config["vae"] = {**plain_config(vae), "_class_name": classes["vae"]}
    checked_names(index.get("id2label"), LARGEST)
    if type(index.get("null_class", 0)) not in (int, type(None)):
        raise ValueError(f"{where}: its null_class is {short(index['null_class'])}, and must be a whole number.")
    if index.get("null_class") is not None:
        config["null_class"] = index["null_class"]
    folders = {"denoiser": name, "vae": "vae"} if own_config else {"vae": "vae"}
    return Checkpoint(path=path, hub=hub, config=config, variant=variant, folders=folders, texts=texts, index=index)


def load_vae(path: str | os.PathLike[str], **hub: Any) -> Any:
    """Load a VAE: the `AutoencoderKL` in a folder or Hub repository, in its `vae/`, or in the checkpoint that it is.

    It raises what `read_checkpoint` raises, and `ValueError` where there is no VAE.
    """
    path, hub = os.fspath(path), where_files_are(hub)
    for folder in ("vae", ""):
        there = inside(hub, folder)
        config = read_json(path, "config.json", there) or {}
        if "_class_name" in config and (folder or config["_class_name"] not in NETWORKS):
            check_vae_class(config["_class_name"], f"The network in {path}")
            return Checkpoint(path=path, hub=there, config={"vae": config}).load("vae")
    vae = read_checkpoint(path, **hub).load("vae")
    if vae is None:
        raise ValueError(
            f"{path} has no vae. If its denoiser works on latents, save it with the VAE that it was trained with: "
            "`DDAEPipeline.from_pretrained(path, vae=...).save_pretrained(...)`."
        )
    return vae
