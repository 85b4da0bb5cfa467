"""Latents of a data set: `encode` makes them once, and denoisers of latents train on them without their VAE.

folder = encode("runs/cifar10_vae", Images.open("uoft-cs/cifar10"), mirror=True, output_dir="runs/latents")
"""

from __future__ import annotations

import contextlib
import copy
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..augment import mirror
from ..checkpoints import load_vae
from ..image_processing_ddae import DDAEImageProcessor
from ..latents import downsampling
from . import arrays
from .devices import best_device, made_fast
from .images import ImageInputs, Images, Part, parts_of
from .latent_folder import DTYPE, FLOAT32, LatentFolder, latents_of
from .models import path_of
from .options import Options, option
from .sharing import Team, this_process

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class EncodingOptions(Options):
    """Options of `encode`."""

    output_dir: str = option("runs/latents", "Folder of the latents.")
    split: str = option("train", "Split to encode.")
    max_samples: int | None = option(None, "Use N images of all classes, always the same ones.")
    resolution: int | None = option(None, "Side of the square images; by default the VAE's sample_size.")
    center_crop: bool = option(True, "Cut the centre of images of another shape; without it they are squashed.")
    mirror: bool = option(False, "Encode every image's mirror image too, as a second view.")
    sample_posterior: bool = option(False, "Draw latents from the VAE's distribution.")
    batch_size: int = option(16, "Images that are encoded at a time.")
    dtype: Literal["float32", "bfloat16"] = option(
        "float32",
        "Type that the VAE computes in. bfloat16 is two to three times as fast on GPUs and on processors with bfloat16 "
        "arithmetic (AVX512-BF16, AMX), and slower on others; latents have two to three digits then.",
    )
    seed: int = option(0, "Seed of the draws.")
    cache_dir: str | None = option(None, "Where downloads are kept.")


def encode(vae: Any, images: Images, options: EncodingOptions | None = None, **changes: Any) -> LatentFolder | None:
    """Encode a split's images with a VAE once, with their labels beside them where they have any; return the folder.

    The VAE is an `AutoencoderKL`, or a folder or Hub id of one, or of a checkpoint that has one. The folder's split is
    `train`, whatever its name in the data set. An interrupted run goes on where it stopped, and existing latents
    are not computed again. The processes of `accelerate launch` share the images; the first one gets the folder, the
    others None.

    Raises:
        ValueError: Options that cannot work, images that cannot be read, a folder of other latents, or a damaged file.
        OSError: No such VAE, or not enough space on disk.
    """
    options = EncodingOptions.of(options, changes)
    images = Images.open(images, cache_dir=options.cache_dir)
    source = path_of(vae)
    if source is not None:
        vae = load_vae(source, cache_dir=options.cache_dir)
    side = options.resolution or vae.config.sample_size
    if side % (factor := downsampling(vae.config)):
        raise ValueError(f"resolution is {side}: it must be a multiple of {factor}, by which the VAE divides it.")
    processor = DDAEImageProcessor(
        size={"height": side, "width": side}, num_channels=vae.config.in_channels, do_center_crop=options.center_crop
    )
    train = images[options.split].take(options.max_samples)
    inputs = {"train": _Mirrored(train, processor)}
    with encoding_team(vae, inputs, options.dtype) as team:
        if team.helps:
            team.serve()
            return None
        with team:
            folder = LatentFolder.create(
                options.output_dir, vae, (side, side),
                describe_splits(inputs, 1 + options.mirror, {"mirror": options.mirror}),
                sample_posterior=options.sample_posterior, seed=options.seed, dtype=options.dtype, names=train.names,
                vae_source=source or vae.config.get("_name_or_path"), dataset=images.facts(train),
            )  # fmt: skip
            encode_views(folder, inputs, options.batch_size, team)
            return folder


def describe_splits(inputs: Mapping[str, ImageInputs], views: int, changes: dict[str, Any]) -> dict[str, Any]:
    """Return what a `LatentFolder` is told of splits: their number of views, and how the later ones are changed."""
    splits = {}
    for name, known in inputs.items():
        described = known.identity
        if not described["preprocessing"]["do_center_crop"]:
            del described["preprocessing"]["do_center_crop"]  # it is left out, as before there was a choice
        splits[name] = {**described, "count": len(known), "views": views, "changes": changes}
    return splits


def encode_views(folder: LatentFolder, inputs: Mapping[str, ImageInputs], batch_size: int, team: Team) -> None:
    """Compute the latents that a folder lacks, by the processes of `encoding_team`, and keep the labels.

    The folder is one that `LatentFolder.create` made for these images.
    """
    for split, known in inputs.items():
        if known.labels is not None:
            folder.write_labels(split, known.labels)
    splits = folder.index["splits"]
    count = sum(known["count"] * known["views"] for known in splits.values())
    given = {name: known.images.split for name, known in inputs.items()}  # what the data set calls them
    of = ", ".join(
        f"{known['count']:,} {given[name]} images x {known['views']} views" for name, known in splits.items()
    )
    logger.info(
        f"Latents of {of}: {count:,} of {'x'.join(map(str, folder.shape))}, "
        f"{arrays.size(arrays.num_bytes(folder.shape, count, DTYPE))} on disk in {folder.folder}, "
        f"{arrays.size(folder.missing_bytes())} of them still to be computed, {batch_size} images at a time."
    )
    if folder.complete:
        return
    started = time.monotonic()
    for split, described in splits.items():
        for view in range(described["views"]):
            details = {"split": split, "image_view": view, "seed": folder.index["seed"]}
            details["view"] = folder.number(split, view)
            rows = np.arange(described["count"])

            def latents(start: int, rows: Any = rows, details: dict[str, Any] = details) -> Iterator[Tensor]:
                return team.each("latents", parts_of(rows, batch_size, start), **details)

            folder.keep(split, view, latents)
    logger.info("Encoded in %.0f s.", time.monotonic() - started)


def latents_of_parts(
    vae: Any, inputs: Mapping[str, ImageInputs], parts: Sequence[Part], *, split: str, image_view: int,
    seed: int | None, view: int,
) -> Iterator[Tensor]:  # fmt: skip
    """Yield the latents of parts of a split's view: see `latents_of` and `Inputs.parts`."""
    title = f"Encoding {inputs[split].images.split} images, view {image_view}"
    images = inputs[split].parts(parts, view=image_view, title=title, device=vae.device)
    for (_, indices), pixels in zip(parts, images, strict=True):
        yield latents_of(vae, pixels, indices, seed=seed, view=view)


@contextlib.contextmanager
def encoding_team(vae: Any, inputs: Mapping[str, ImageInputs], dtype: str) -> Iterator[Team]:
    """Give the processes that encode, with the VAE in a type on the best device; afterwards it is as it was."""
    if dtype != FLOAT32:
        vae = copy.deepcopy(vae)  # casting it back would not undo the rounding
    this_process()  # of several processes each has a GPU of its own
    device, before = vae.device, vae.dtype
    made_fast(vae, best_device()).to(best_device()).type(getattr(torch, dtype))
    try:
        yield Team({"latents": partial(latents_of_parts, vae, inputs)})
    finally:
        vae.to(device).type(before)


class _Mirrored(ImageInputs):
    """Images whose second view is the mirror image."""

    def made(self, fetched: Tensor, view: int, numbers: Any) -> Tensor:
        pixels = super().made(fetched, 0, numbers)
        return mirror(pixels) if view else pixels
