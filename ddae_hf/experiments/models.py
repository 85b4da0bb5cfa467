"""Opening the model that an experiment reads: from a path or as an object, with the layers and levels asked for."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch

from ..building import short
from ..checkpoints import Checkpoint, load_vae, read_checkpoint
from ..configuration_ddae import DDAEConfig
from ..hidden_states import decoder_layer_names
from ..image_processing_ddae import DDAEImageProcessor
from ..modeling_ddae import DDAEForImageClassification, DDAEModel
from ..networks import network_of
from ..noise import family_of
from .arrays import StrPath
from .devices import best_device, made_fast
from .draws import separate_randomness
from .sharing import this_process

# A checkpoint's folder or Hub id, in any layout, or an open model.
Model = StrPath | DDAEModel


def open_model(
    model: Model, *, dtype: str | None = None, cache_dir: str | None = None, null_needed: bool = True, **config: Any
) -> DDAEModel:
    """Return a model: an object as it came, or one opened from a path, in evaluation mode on the best device.

    Args:
        model: The model, or where it is; `DDAEForImageClassification` gives its base model.
        dtype: Name of the type that it computes in, by default its checkpoint's.
        cache_dir: Where downloads are kept.
        null_needed: Whether something must say what the network is told of images of which nothing is said.
        **config: What its configuration is to say; None leaves it as it is. `vae=False` opens it without its VAE.

    Raises:
        ValueError: Not a model, an open one that is not as asked for, a prompt for a denoiser that is told no text, a
            class-conditional denoiser without a null class, or one that is told a text without text encoders.
        OSError: No such checkpoint.
    """
    given = {name: value for name, value in config.items() if value is not None}
    if given.get("vae") is False:
        given["vae"] = None
    kind = {} if dtype is None else {"dtype": getattr(torch, dtype)}
    if isinstance(model, (str, os.PathLike)):
        with separate_randomness():  # a DiT's positions are computed by a module that draws weights
            found = ready(DDAEModel.from_pretrained(model, **given, **kind, cache_dir=cache_dir).eval())
    else:
        found = base_of(model)
        _check_prompt(found, given.get("prompt"))
        there = {**vars(found.config), "dtype": found.dtype}
        if different := [name for name, value in (given | kind).items() if there[name] != value]:
            raise ValueError(
                f"The model is open already, with another {different[0]} than is asked for: open it with that, or give "
                "its path."
            )
    if null_needed:
        check_null_condition(found)
    return found


def open_for(model: Model, options: Any, **config: Any) -> DDAEModel:
    """Return the model that an experiment of features reads, as its options say: see `open_model`."""
    return open_model(
        model, dtype=options.dtype, cache_dir=options.cache_dir,
        null_class=options.null_class, prompt=options.prompt, num_noise_samples=options.num_noise_samples,
        pooling=options.pooling, **config,
    )  # fmt: skip


def untrained_classifier(path: str, *, cache_dir: str | None = None, **config: Any) -> DDAEForImageClassification:
    """Return a classifier on a checkpoint's network with random weights, but with its VAE and told the same text."""
    whole = DDAEConfig.from_pretrained(path, cache_dir=cache_dir, **config)
    whole.generator_fingerprint = None
    told = None
    if network_of(whole.denoiser).stock_pipelines:
        with separate_randomness():
            trained = DDAEModel.from_pretrained(path, cache_dir=cache_dir, dtype=torch.float32, **config)
        told = trained.condition
        whole.condition_shapes = trained.config.condition_shapes
    classifier = DDAEForImageClassification(whole)
    classifier.ddae.condition = told
    if whole.vae is not None:  # there are no latents to learn on without it
        classifier.ddae.vae.load_state_dict(load_vae(path, cache_dir=cache_dir).state_dict())
    return classifier


def open_processor(model: Model, cache_dir: str | None = None) -> DDAEImageProcessor:
    """Return the image processor of a checkpoint or, of an open model, the one that its network asks for."""
    if isinstance(model, (str, os.PathLike)):
        return DDAEImageProcessor.from_pretrained(model, cache_dir=cache_dir)
    base: Any = base_of(model)
    return DDAEImageProcessor.for_denoiser(base.denoiser.config, base.config.vae)


def base_of(model: Any) -> DDAEModel:
    """Return the base model of an open one, or raise `ValueError` for anything else."""
    base = getattr(model, "base_model", None)
    if not isinstance(base, DDAEModel):
        raise ValueError(
            f"model is of type {type(model).__name__}: allowed are a checkpoint's folder or Hub id, a DDAEModel and a "
            "DDAEForImageClassification."
        )
    return base


def path_of(model: Any) -> str | None:
    """Return a checkpoint's folder or Hub id; None for an open model."""
    return os.fspath(model) if isinstance(model, (str, os.PathLike)) else None


def stock_pipeline_of(model: Any, cache_dir: str | None = None) -> Checkpoint | None:
    """Return the pipeline of a denoiser that is told a text, where a path leads to one, if by way of heads on it."""
    if path_of(model) is None:
        return None
    found = read_checkpoint(model, cache_dir=cache_dir).chain()[-1]
    return found if found.index is not None and network_of(found.denoiser).stock_pipelines else None


def base_model(checkpoint: Any) -> dict[str, Any]:
    """Return the Hub repository that a run began with, as `base_model`; empty for a folder, an object or None."""
    return {"base_model": checkpoint} if isinstance(checkpoint, str) and not os.path.exists(checkpoint) else {}


def report_facts(model: Model, images: Any, options: Any, *used: Any) -> dict[str, Any]:
    """Return what a report says of its origin: `options`, `dataset` with the splits that were used, `base_model`.

    `images` are `Images`, and `used` are one or two of its splits.
    """
    path = path_of(model)
    given = {"model_name_or_path": path, **images.opened_with, **options.to_dict()}
    return {"options": given, "dataset": images.facts(*used), **base_model(path)}


def ready(model: Any) -> Any:
    """Return a model on the best device there is, in the layout that is fastest there."""
    this_process()  # of several processes each has a GPU of its own
    return made_fast(model, best_device()).to(best_device())


def check_null_condition(model: DDAEModel) -> None:
    """Raise `ValueError` if nothing says what a network is told of images: no null class, or no embedded text."""
    try:
        model.diffusion.conditions(None, 1, "cpu")
    except ValueError as error:
        if network_of(model.denoiser).stock_pipelines:
            pipelines = ", ".join(network_of(model.denoiser).stock_pipelines)
            raise ValueError(
                "The network is told a text, and came without text encoders: give the folder or Hub id of the whole "
                f"pipeline ({pipelines}), or a DDAEModel that was opened with a `condition`."
            ) from error
        raise ValueError("The network is class-conditional, without a null class: give null_class.") from error


def _check_prompt(model: DDAEModel, prompt: str | None) -> None:
    """Refuse a prompt for an open network that is told no text."""
    if prompt is not None and not network_of(model.denoiser).stock_pipelines:
        raise ValueError(f"prompt is {short(prompt)}, but this denoiser is told no text: leave it out.")


def chosen_layers(model: DDAEModel, wanted: Iterable[str]) -> list[str]:
    """Return the layers that names stand for, each once: `all`, `decoder`, `own` (the configuration's), or layers."""
    groups = {"all": model.layer_names(), "decoder": decoder_layer_names(model.denoiser), "own": [model.config.layer]}
    return list(dict.fromkeys(name for entry in wanted for name in groups.get(entry, [entry])))


def check_taps(model: DDAEModel, layers: Iterable[str], sigmas: Iterable[float]) -> None:
    """Raise `ValueError` for a layer that the network does not have, or a noise level outside its schedule."""
    for layer in layers:
        model.config.from_dict(model.config.to_dict(), layer=layer)
    for sigma in sigmas:
        family_of(model.scheduler).check_sigma(sigma)
