"""The networks and schedulers that options describe, and whether they can be trained."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import torch

from ..checkpoints import build_scheduler, plain_config, read_checkpoint
from ..configuration_ddae import DDAEConfig
from ..networks import build_denoiser, network_of
from ..noise import family_of
from .draws import separate_randomness
from .pretraining_data import TrainingData

DENOISER = {"_class_name": "UNet2DModel", "in_channels": 3}
SCHEDULER = {"_class_name": "DDPMScheduler"}


def new_networks(options: Any, data: TrainingData) -> tuple[Any, Any]:
    """Return the denoiser, randomly initialised, and the scheduler that options describe, or raise `ValueError`."""
    inputs: dict[str, Any] = {"sample_size": options.resolution or 32}
    if data.latents is not None:
        channels, side, _ = data.latents.shape
        inputs = {"in_channels": channels, "out_channels": channels, "sample_size": side}
    described = {**DENOISER, **inputs, **options.denoiser}
    denoiser = build_denoiser({**described, **network_of(described).label_options(data.num_classes)})
    scheduler = build_scheduler({**SCHEDULER, **options.scheduler})
    for given, built in ((options.denoiser, denoiser), (options.scheduler, scheduler)):
        if unknown := sorted(set(given) - set(inspect.signature(type(built)).parameters) - {"_class_name"}):
            raise ValueError(f"{type(built).__name__} has no options {unknown}.")
    return denoiser, scheduler


def networks_to_train(options: Any, data: TrainingData, resume: Path | None) -> tuple[Any, Any, Any]:
    """Return the denoiser in training, the one of averaged weights, and the scheduler, or raise `ValueError`."""
    start = resume or options.init_from
    if start is None:
        with separate_randomness(options.seed):
            network, scheduler = new_networks(options, data)
        return network, copy.deepcopy(network), scheduler
    source = read_checkpoint(start, cache_dir=options.cache_dir)
    data.check_vae_of(source)
    average = source.load("denoiser", torch.float32)
    scheduler = build_scheduler(source.scheduler or SCHEDULER)
    if resume is not None:
        return read_checkpoint(resume / "raw").load("denoiser", torch.float32), average, scheduler
    null_class = source.config.get("null_class", data.num_classes)
    if data.num_classes and null_class != data.num_classes:
        raise ValueError(f"The null class of {start} is {null_class}: it must be the last, {data.num_classes}.")
    return copy.deepcopy(average), average, scheduler


def trained_on(denoiser: Any, scheduler: Any) -> dict[str, Any]:
    """Return what tells a network and a scheduler from others, by names such as `denoiser.num_layers`."""
    parts = {"denoiser": denoiser, "scheduler": scheduler}
    return {f"{part}.{name}": value for part, built in parts.items() for name, value in plain_config(built).items()}


def check_networks(options: Any, denoiser: Any, scheduler: Any, data: TrainingData) -> None:
    """Raise `ValueError` if the network and the scheduler cannot be trained with these options on these data."""
    config = denoiser.config
    if data.latents is not None:
        channels, side, _ = data.latents.shape
        if (config.in_channels, config.sample_size) != (channels, side):
            raise ValueError(
                f"The latents have {channels} channels and a side of {side}: the network must have them as its "
                f"in_channels and sample_size, and has {config.in_channels} and {config.sample_size}."
            )
    network = network_of(denoiser)
    if data.num_classes and network.num_labels(config) != data.num_classes + 1:
        raise ValueError(
            f"The data set has {data.num_classes} classes: the network needs {data.num_classes + 1} labels with its "
            f"null class, and has {network.num_labels(config)}."
        )
    if not data.num_classes and network.is_conditional(denoiser):
        raise ValueError("This network is class-conditional: train it with class_conditional.")
    if config.out_channels not in (None, config.in_channels):
        raise ValueError("Only networks with as many output as input channels can be trained.")
    # These refuse what cannot work.
    family_of(scheduler).check_sampler(options.sampler)
    sides = [config.sample_size]
    if (side := options.low_resolution) is not None:
        if not (isinstance(config.sample_size, int) and 1 <= side < config.sample_size):
            raise ValueError(
                f"low_resolution is {side}: it must be at least 1 and below the sample_size, {config.sample_size}."
            )
        sides.append(side)
    for side in sides:
        described: dict[str, Any] = {"denoiser": {**plain_config(denoiser), "sample_size": side}, "timestep": 0}
        if data.latents is not None:
            described["vae"] = data.latents.index["vae"]
        try:
            DDAEConfig(scheduler=plain_config(scheduler), null_class=data.num_classes or None, **described)
        except ValueError as error:
            if side == config.sample_size:
                raise
            raise ValueError(f"low_resolution {side} cannot work. {error}") from error
    family_of(scheduler).draw(1, log_normal=options.log_sigma)
    copy.deepcopy(scheduler).set_timesteps(options.num_inference_steps)
    if options.resolution not in (None, config.sample_size):
        raise ValueError(f"resolution is {options.resolution}, but the network's sample_size is {config.sample_size}.")
