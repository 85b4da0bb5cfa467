"""The network, the scheduler and the batch that a denoiser's training starts with, and whether they can be trained.

Options describe the network, or else images and hardware suggest one, its resolution and the batch: on a GPU the U-Net
of Ho et al. 2020 (arXiv:2006.11239), whose number of levels follows from the side of the images; on a processor one
with about a fiftieth of its arithmetic. Both have attention where the side is at most 16.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import logging
import math
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checkpoints import build_scheduler, plain_config, read_checkpoint
from ..configuration_ddae import DDAEConfig
from ..families import Family
from ..networks import NETWORKS, build_denoiser, network_of
from ..noise import family_of
from .devices import best_device
from .draws import separate_randomness
from .images import Images
from .latent_folder import LatentFolder
from .objectives import shares_between
from .options import Table
from .pretraining_data import TrainingData
from .sharing import this_process

logger = logging.getLogger(__name__)

DENOISER = {"_class_name": "UNet2DModel", "in_channels": 3}
SCHEDULER = {"_class_name": "DDPMScheduler"}
SIDES = (8, 16, 28, 32, 64, 128, 256)
LARGEST = {"cpu": 32, "cuda": 64}  # what images are reduced to, where no resolution is asked for
LOOKED_AT = 64  # images
GREY = ("1", "L", "LA", "I", "I;16", "F")  # modes of Pillow
WIDTHS = {8: [32, 64], 16: [16, 48, 96], 28: [16, 48, 96]}  # on a processor, where a small image costs little
BATCH = 128
PIXEL_BYTES = 80 * 2**10  # of memory in training, a pixel of an image, for the network on GPUs: an estimate


def choose(images: Images | LatentFolder, options: Any) -> Any:
    """Return options of `pretrain` without a `denoiser`, with a network added, and log which one it is.

    A resolution and a batch are added too, where the options leave them open. The choice looks at the first images of a
    stream, otherwise at some of all images.

    Raises:
        ValueError: An image that cannot be read, no images, or a resolution that no such network has.
    """
    device = best_device()
    if isinstance(images, LatentFolder):
        channels, side, _ = images.shape
        count = images.index["splits"][options.train_split]["count"]
        seen = f"latents of {channels}x{side}x{side}"
    else:
        chosen = images[options.train_split].take(options.max_train_samples)
        if chosen.streaming:
            count = None
            some = [row["image"] for row in islice(chosen.stream(), LOOKED_AT)]
        else:
            count = len(chosen)
            some = chosen.pil(np.linspace(0, count - 1, min(count, LOOKED_AT)).round().astype(int))
        if not some:
            raise ValueError(f"The split {options.train_split!r} is empty.")
        channels = 1 if all(image.mode in GREY for image in some) else 3
        shorter = int(np.median([min(image.size) for image in some]))
        limit = min(shorter, LARGEST[device])
        side = options.resolution or max((known for known in SIDES if known <= limit), default=SIDES[0])
        options = dataclasses.replace(options, resolution=side)
        seen = f"{'grey' if channels == 1 else 'colour'} images of {shorter} pixels"
    if options.total_batch_size is options.train_batch_size is options.gradient_accumulation_steps is None:
        options = with_batch(options, side, count, device)
    denoiser = unet(side, channels, device)
    logger.info(
        f"No network is described. For {seen} on a {'GPU' if device == 'cuda' else 'CPU'}, the default is a U-Net of "
        f"{denoiser['block_out_channels']} channels at {side} pixels: denoiser, resolution or config give another."
    )
    return dataclasses.replace(options, denoiser=denoiser)


def chosen_before(options: Any, known: dict[str, Any]) -> Any:
    """Return options with the network and the batch of a run that is resumed, whatever the hardware is now."""
    options = dataclasses.replace(options, denoiser=known.get("denoiser") or {})
    if options.total_batch_size is options.train_batch_size is options.gradient_accumulation_steps is None:
        options = dataclasses.replace(options, total_batch_size=known.get("total_batch_size"))
    return options


def with_batch(options: Any, side: int, count: int | None, device: str) -> Any:
    """Return options with a batch that fits the number of images (None: unknown), their side and a GPU's memory."""
    processes = this_process().num_processes
    total = BATCH if count is None or count >= BATCH else count
    each = total // processes
    if device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
        each = min(each, int(0.7 * memory / (PIXEL_BYTES * side**2)))
    each = 2 ** int(math.log2(max(1, each)))
    total = max(1, total // (each * processes)) * each * processes
    return dataclasses.replace(options, total_batch_size=total, train_batch_size=each)


def unet(side: int, channels: int, device: str) -> Table:
    """Return the options of a U-Net, whose levels halve images down to a side of 4 to 7, or raise `ValueError`."""
    sides = [side]
    while sides[-1] % 2 == 0 and sides[-1] >= 8:
        sides.append(sides[-1] // 2)
    if len(sides) == 1:
        raise ValueError(f"resolution is {side}: give an even number of at least 8, or describe a denoiser for it.")
    if device == "cuda":
        widths = [128] + [256] * (len(sides) - 1)
    else:
        widths = WIDTHS.get(side) or ([8, 24, 64] + [96] * len(sides))[: len(sides)]
    attends = max(1, next(level for level, at in enumerate(sides) if at <= 16))
    down = ["AttnDownBlock2D" if level == attends else "DownBlock2D" for level in range(len(sides))]
    up = [kind.replace("Down", "Up") for kind in reversed(down)]
    return Table(
        {
            "_class_name": "UNet2DModel",
            "sample_size": side,
            "in_channels": channels,
            "out_channels": channels,
            "block_out_channels": widths,
            "layers_per_block": 2 if device == "cuda" else 1,
            "down_block_types": down,
            "up_block_types": up,
            "attention_head_dim": None,
            "norm_num_groups": 32 if device == "cuda" else 8,
        }
    )


def check_tells_no_text(denoiser: Mapping[str, Any], where: str) -> None:
    """Raise `ValueError` for the config of a denoiser that is told a text, which cannot be trained here."""
    network = NETWORKS.get(str(denoiser.get("_class_name")))
    if network is not None and network.stock_pipelines:
        allowed = ", ".join(name for name, known in NETWORKS.items() if not known.stock_pipelines)
        raise ValueError(
            f"{where} is a {network.model.__name__}, which is told a text, and training on texts is not supported: "
            f"allowed are {allowed}."
        )


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
    check_tells_no_text(source.denoiser, f"The denoiser of {start}")
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
                f"in_channels and sample_size, but has {config.in_channels} and {config.sample_size}."
            )
    network = network_of(denoiser)
    if data.num_classes and network.num_labels(config) != data.num_classes + 1:
        raise ValueError(
            f"The data set has {data.num_classes} classes: the network needs {data.num_classes + 1} labels with its "
            f"null class, but has {network.num_labels(config)}."
        )
    if not data.num_classes and network.is_conditional(denoiser):
        raise ValueError("This network is class-conditional: train it with class_conditional.")
    if config.get("out_channels") not in (None, config.in_channels):
        raise ValueError("Only networks with as many output as input channels can be trained.")
    # These calls refuse what cannot work.
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
    family_of(scheduler).draw(1, **levels_drawn(options, family_of(scheduler)))
    copy.deepcopy(scheduler).set_timesteps(options.num_inference_steps)
    if options.resolution not in (None, config.sample_size):
        raise ValueError(f"resolution is {options.resolution}, but the network's sample_size is {config.sample_size}.")


def levels_drawn(options: Any, family: Family) -> dict[str, Any]:
    """Return which noise levels these options have a family draw, as arguments of `Family.draw`, or raise `ValueError`.

    `log_sigma` is refused where it is no distribution, and a cut where it leaves next to nothing of one.
    """
    log_normal = None if options.log_sigma is None else (options.log_sigma[0], options.log_sigma[1])
    return {
        "log_normal": log_normal,
        "shares": shares_between(family, options.sigma_min, options.sigma_max, log_normal),
    }
