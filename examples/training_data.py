"""What a denoiser is trained on: images of a data set, or the latents that `encode_latents.py` made of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import ClassLabel, IterableDataset
from latents import latent_dataset

from data import load_training_images, pick_split
from ddae_hf.checkpoints import Checkpoint, load_vae
from ddae_hf.experiments.classes import warn_of_missing
from ddae_hf.experiments.latent_folder import LatentFolder
from ddae_hf.experiments.run_facts import data_facts
from ddae_hf.latents import freeze

# Options of images that latents have no use for, and what to do in their place.
OF_IMAGES = dict.fromkeys(
    ("dataset_name", "dataset_config_name", "train_data_dir", "image_column", "label_column", "resolution"),
    "encode_latents.py takes it, and the folder says what it was",
)
OF_IMAGES |= {
    "streaming": "latents are read from the disk",
    "low_resolution": "means of latents are no latents",
    "center_crop": "encode_latents.py takes it, and the folder says what it was",
    "augment": "latents are not changed; encode_latents.py --mirror makes a second, mirrored view of each",
    "random_flip": "latents are not changed; encode_latents.py --mirror makes a second, mirrored view of each",
}


@dataclass
class TrainingData:
    """What a denoiser is trained on, and what is known of it.

    Attributes:
        dataset: Rows of `image`, or of an image's `pixel_values`, all views; and of `labels` where classes are used.
        facts: What result files say of it.
        num_classes: Number of classes, 0 where they are not used.
        names: Their names, where they have any.
        latents: Where latents come from, if the denoiser is trained on those.
        vae: The VAE that made them.
        described: What tells these latents from others of the same images.
        center_crop: Whether images of another shape were cut, not squashed.
    """

    dataset: Any
    facts: dict[str, Any]
    num_classes: int = 0
    names: Sequence[str] | None = None
    latents: LatentFolder | None = None
    vae: Any = None
    described: dict[str, Any] | None = None
    center_crop: bool = True

    def describe(self, side: int) -> str:
        """Return in words what a network with inputs of this side is trained on."""
        if self.described is not None:
            shape, views = "x".join(map(str, self.described["shape"])), self.described["views"]
            return f"latents of {len(self.dataset)} images, {shape} each, in {views} view{'s' * (views > 1)}"
        count = "a stream of" if isinstance(self.dataset, IterableDataset) else len(self.dataset)
        return f"{count} images of {side} pixels"

    def check_vae_of(self, source: Checkpoint) -> None:
        """Raise `ValueError` unless a checkpoint's denoiser works on what it is to be trained on."""
        if self.latents is None and source.vae is not None:
            raise ValueError(f"The denoiser of {source.path} works on latents: give a folder of them, --latents_dir.")
        if self.latents is not None and source.vae is None:
            raise ValueError(
                f"{source.path} has no vae, so what its denoiser works on is not known: give a pipeline that has one."
            )
        if self.latents is not None:
            try:
                self.latents.check_vae(source.load_vae())
            except ValueError as error:
                raise ValueError(f"{source.path} cannot be trained on these latents. {error}") from error


def add_latent_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where latents come from."""
    group = parser.add_argument_group("latents")
    group.add_argument("--latents_dir", help="Folder that encode_latents.py wrote, in place of a data set of images.")
    group.add_argument("--vae", help="Folder or Hub id of the latents' VAE, if it is not where it was then.")


def check_latent_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Stop at options that do not go with those of `add_latent_arguments`."""
    if args.latents_dir is None:
        if args.vae is not None:
            parser.error("--vae is the VAE of latents: give --latents_dir with it.")
        return
    for name, reason in OF_IMAGES.items():
        if getattr(args, name) or (name == "center_crop" and args.center_crop is not None):
            parser.error(f"--{name} does not go with --latents_dir, leave it out: {reason}.")


def load_training_data(args: argparse.Namespace) -> TrainingData:
    """Return what the options say to train on, or stop if it cannot be read."""
    if args.latents_dir is not None:
        try:
            return _load_latents(args)
        except (ValueError, OSError) as error:
            raise SystemExit(str(error)) from error
    dataset, num_classes = load_training_images(args)
    feature = dataset.features.get("labels")
    names = feature.names if isinstance(feature, ClassLabel) else None
    facts = data_facts(args, None if args.streaming else len(dataset))
    return TrainingData(dataset, facts, num_classes, names, center_crop=args.center_crop)


def _load_latents(args: argparse.Namespace) -> TrainingData:
    folder, split = LatentFolder(args.latents_dir), args.train_split
    views = folder.views(split)
    if "vae_source" not in folder.index:
        raise ValueError(f"{folder.folder} was not made by encode_latents.py, which says of what the latents are.")
    if args.class_conditional and not folder.has_labels(split):
        raise ValueError(
            f"{folder.folder} has no labels of the split {split!r}. Leave out --class_conditional, or encode images of "
            "a data set with a --label_column."
        )
    labels = folder.labels(split) if folder.has_labels(split) else None
    dataset = latent_dataset(folder, split, labels if args.class_conditional else None, views)
    dataset = pick_split({split: dataset}, split, args.max_train_samples, labels=labels)
    try:
        vae = load_vae(args.vae or folder.index["vae_source"], cache_dir=args.cache_dir)
    except (ValueError, OSError) as error:
        hint = "" if args.vae else " If the VAE of the latents is elsewhere now, say where with --vae."
        raise ValueError(f"{error}{hint}") from error
    folder.check_vae(vae)
    freeze(vae)
    vae.enable_slicing()  # pictures are decoded one by one
    names = folder.index["names"] if args.class_conditional else None
    if names:
        warn_of_missing(names, {split: dataset.with_format(None)["labels"][:]})
    center_crop = folder.index["splits"][split]["preprocessing"].get("do_center_crop", False)  # 0.1.0 squashed
    described = {"shape": list(folder.shape), "views": views, "sample_posterior": folder.index["sample_posterior"]}
    described["center_crop"] = center_crop
    facts = {**folder.index["dataset"], "num_images": len(dataset)}
    return TrainingData(dataset, facts, len(names or ()), names, folder, vae, described, center_crop)
