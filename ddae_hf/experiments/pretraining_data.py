"""What a denoiser is trained on: images of a data set, or the latents that `encode` made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, default_collate

from ..checkpoints import Checkpoint, load_vae
from ..image_processing_ddae import DDAEImageProcessor
from .batches import image_batches, images_hash, row_batches
from .classes import draw_images, warn_of_missing
from .images import Images, ImageSet
from .latent_folder import LatentFolder, latent_dataset

BY_ENCODE = "it is an option of `encode`, and the folder says what it was"
BY_VIEWS = "latents are not changed; `encode` with mirror makes a second, mirrored view of each"
# Options of images that latents have no use for, and what to do in their place.
OF_IMAGES = {"resolution": BY_ENCODE, "center_crop": BY_ENCODE, "low_resolution": "means of latents are no latents"}
OF_IMAGES |= {"augment": BY_VIEWS, "random_flip": BY_VIEWS}


@dataclass
class TrainingData:
    """What a denoiser is trained on, and what is known of it."""

    rows: Any  # the images; or, of latents, a data set of `pixel_values`, all views, and of `labels` if used
    facts: Callable[[], dict[str, Any]]  # what reports say of it; of a stream, also how many images were left out
    opened_with: dict[str, Any]  # the options that open it again
    count: int | None  # number of images; None for a stream, whose length is not known
    hash: str | None  # by which the images or latents are recognised
    num_classes: int = 0  # 0 where classes are not used
    names: Sequence[str] | None = None  # of the classes
    latents: LatentFolder | None = None
    vae: Any = None  # the one that made the latents
    described: dict[str, Any] | None = None  # what tells these latents from others of the same images
    center_crop: bool = True  # whether images of another shape are (or were) cut, not squashed

    def check_vae_of(self, source: Checkpoint) -> None:
        """Raise `ValueError` unless a checkpoint's denoiser works on what it is to be trained on."""
        if self.latents is None and source.vae is not None:
            raise ValueError(f"The denoiser of {source.path} works on latents: give a folder of them (latents_dir).")
        if self.latents is not None and source.vae is None:
            raise ValueError(
                f"{source.path} has no vae, so what its denoiser works on is not known: give a pipeline that has one."
            )
        if self.latents is not None:
            try:
                self.latents.check_vae(source.load("vae"))
            except ValueError as error:
                raise ValueError(f"{source.path} cannot be trained on these latents. {error}") from error

    def batches(self, config: Any, options: Any, device: torch.device | str = "cpu") -> DataLoader[Any]:
        """Return shuffled batches for a network of this configuration, on this device: see `image_batches`."""
        if isinstance(self.rows, ImageSet):
            processor = DDAEImageProcessor.for_denoiser(config, do_center_crop=self.center_crop)
            return image_batches(self.rows, processor, options, self.num_classes > 0, device)
        return row_batches(self.rows, options, default_collate)


def training_data(images: Images | LatentFolder, options: Any) -> TrainingData:
    """Return what a denoiser is to be trained on: a data set, or a folder of its latents.

    Raises:
        ValueError: Data that cannot be read or lack the labels asked for, or options of images with latents.
        OSError: The VAE of the latents is not where it was.
    """
    if isinstance(images, LatentFolder):
        return _of_latents(images, options)
    images = Images.open(images, cache_dir=options.cache_dir)
    if options.vae is not None:
        raise ValueError("vae is the VAE of latents: give a folder of latents (latents_dir) with it.")
    chosen = images[options.train_split]
    if options.class_conditional:
        chosen = chosen.labelled()
    if chosen.streaming and options.max_train_steps is None:
        raise ValueError("A stream needs max_train_steps: how many images an epoch has is not known.")
    if chosen.streaming and options.max_train_samples and options.dataloader_num_workers > 1:
        raise ValueError(
            "max_train_samples: workers share a stream's files, so that none knows its first N images: give "
            "dataloader_num_workers 1, or leave max_train_samples out."
        )
    chosen = chosen.take(options.max_train_samples)
    names = chosen.names if options.class_conditional else None
    if names and chosen.labels is not None:
        warn_of_missing(names, {chosen.split: chosen.labels})
    return TrainingData(
        rows=chosen,
        facts=lambda: images.facts(chosen),
        opened_with={**images.opened_with, **({"streaming": True} if chosen.streaming else {})},
        count=None if chosen.streaming else len(chosen),
        hash=images_hash(chosen),
        num_classes=len(names or ()),
        names=names,
        center_crop=options.center_crop is not False,
    )


def _of_latents(folder: LatentFolder, options: Any) -> TrainingData:
    for name, reason in OF_IMAGES.items():
        if getattr(options, name) or (name == "center_crop" and options.center_crop is not None):
            raise ValueError(f"{name} does not go with latents, so leave it out: {reason}.")
    split = options.train_split
    views = folder.views(split)
    if "vae_source" not in folder.index:
        raise ValueError(f"{folder.folder} was not made by `encode`, which notes the VAE: encode the images with it.")
    labels = folder.labels(split)
    if options.class_conditional and labels is None:
        raise ValueError(
            f"{folder.folder} has no labels of the split {split!r}. Leave out class_conditional, or encode images of a "
            "data set with a label_column."
        )
    rows = latent_dataset(folder, split, labels if options.class_conditional else None)
    if options.max_train_samples is not None and options.max_train_samples < len(rows):
        rows = rows.select(draw_images(len(rows) if labels is None else labels, options.max_train_samples))
    try:
        vae = load_vae(options.vae or folder.index["vae_source"], cache_dir=options.cache_dir)
    except (ValueError, OSError) as error:
        hint = "" if options.vae else " If the VAE of the latents is elsewhere now, give its place (vae)."
        raise ValueError(f"{error}{hint}") from error
    folder.check_vae(vae)
    vae.requires_grad_(False).eval()
    vae.enable_slicing()  # pictures are decoded one by one
    names = folder.index["names"] if options.class_conditional else None
    if names:
        warn_of_missing(names, {split: rows.with_format(None)["labels"][:]})
    known = folder.index["splits"][split]
    described = {"shape": list(folder.shape), "views": views, "sample_posterior": folder.index["sample_posterior"]}
    center_crop = described["center_crop"] = known["preprocessing"].get("do_center_crop", False)  # 0.1.0 squashed
    return TrainingData(
        rows=rows,
        facts=lambda: {**folder.index["dataset"], "num_images": len(rows)},
        opened_with={"latents_dir": str(folder.folder)},
        count=len(rows),
        hash=known["images"],
        num_classes=len(names or ()),
        names=names,
        latents=folder,
        vae=vae,
        described=described,
        center_crop=center_crop,
    )
