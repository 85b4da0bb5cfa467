"""The network, its resolution and the batch that images and hardware suggest, where nobody describes them.

On a GPU the network is the U-Net of Ho et al. 2020 (arXiv:2006.11239), its number of levels by the side of the images;
on a processor one with some fiftieth of its arithmetic. Both attend where the side is at most 16.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image

from .devices import best_device
from .encoding import LatentFolder
from .image_set import ImageSet
from .images import Images
from .options import Table
from .training import this_process

logger = logging.getLogger(__name__)

SIDES = (8, 16, 28, 32, 64, 128, 256)
LARGEST = {"cpu": 32, "cuda": 64}  # what images are reduced to, where no resolution is asked for
LOOKED_AT = 64  # images
GREY = ("1", "L", "LA", "I", "I;16", "F")  # modes of Pillow
WIDTHS = {8: [32, 64], 16: [16, 48, 96], 28: [16, 48, 96]}  # on a processor, where a small image costs little
BATCH = 128
PIXEL_BYTES = 80 * 2**10  # of memory in training, a pixel of an image, for the network on GPUs: an estimate


def choose(images: Images | LatentFolder, options: Any) -> Any:
    """Return options of `pretrain` with a network, a resolution and a batch, and say which in the log.

    Args:
        images: What is trained on; of images, the first ones are looked at, or some of all that are there.
        options: Options without a `denoiser`; what they say of resolution and batches stays.

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
        count = None if chosen.streaming else len(chosen)
        some = looked_at(chosen)
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
        f"No network is described. For {seen} on {'a GPU' if device == 'cuda' else 'a processor'} it is a U-Net of "
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
    """Return options with a batch that images of this number (None: not known) and side, and a GPU's memory, allow."""
    total = BATCH if count is None or count >= BATCH else 2 ** int(math.log2(count))
    if device == "cpu":
        return dataclasses.replace(options, total_batch_size=total)
    memory = torch.cuda.get_device_properties(0).total_memory
    fitting = max(1, int(0.7 * memory / (PIXEL_BYTES * side**2)))
    each = min(total // this_process().num_processes, 2 ** int(math.log2(fitting)))
    return dataclasses.replace(options, total_batch_size=total, train_batch_size=max(1, each))


def looked_at(images: ImageSet) -> list[Image.Image]:
    """Return some images: of a stream the first."""
    if images.streaming:
        return [row["image"] for row in islice(images.stream(), LOOKED_AT)]
    return images.pil(np.linspace(0, len(images) - 1, min(len(images), LOOKED_AT)).round().astype(int))


def unet(side: int, channels: int, device: str) -> Table:
    """Return the options of a U-Net for images of this side: levels are halved down to a side of 4 to 7.

    Raises:
        ValueError: A side that cannot be halved.
    """
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
