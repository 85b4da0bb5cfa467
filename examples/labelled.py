"""Labelled images, and classifiers on them: what the scripts that evaluate share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm

from data import image_column, images_hash, load_splits, pick_split
from ddae_hf import DDAEForImageClassification, DDAEImageProcessor, DDAEModel, DDAEPipeline
from ddae_hf.checkpoints import still_generates
from ddae_hf.experiments.classes import Classes, label_column, warn_of_missing
from ddae_hf.experiments.devices import best_device, made_fast
from ddae_hf.experiments.draws import indexed_noise
from ddae_hf.experiments.pixels import Pixels, read_images, scaled


def add_label_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which images are tested on, beside those of `add_data_arguments`."""
    group = parser.add_argument_group("test data")
    group.add_argument("--test_split", default="test", help="Split to test on.")
    group.add_argument("--max_test_samples", type=int, help="Use N test images of all classes, always the same ones.")


class Images:
    """Images of the splits of a data set: their pixels in batches, decoded once where they fit into memory."""

    def __init__(self, splits: dict[str, Dataset], column: str, processor: DDAEImageProcessor, batch_size: int):
        self.splits, self.images, self.processor, self.batch_size = splits, column, processor, batch_size
        self.decoded = {name: Pixels(split, column, processor) for name, split in splits.items()}
        self.hashes: dict[str, str] = {}

    def hash(self, split: str) -> str:
        """Return a SHA-256 of a split's image files, which are read once."""
        if split not in self.hashes:
            self.hashes[split] = images_hash(self.splits[split], self.images)
        return self.hashes[split]

    def batches(self, split: str, indices: np.ndarray, title: str) -> Iterator[torch.Tensor]:
        """Yield `pixel_values` (B, C, H, W) of the images at `indices`, in that order."""
        for start in tqdm(range(0, len(indices), self.batch_size), desc=title, leave=False):
            yield self.pixel_values(split, indices[start : start + self.batch_size])

    def pixel_values(self, split: str, indices: np.ndarray) -> torch.Tensor:
        """Return `pixel_values` (B, C, H, W) of the images at `indices`, in that order."""
        return scaled(self.decoded[split].read(indices), self.processor)


class LabelledImages(Images):
    """The labelled images: their pixels in batches, their labels, the names of classes.

    `sample_shape` is that of what noise is added to, where that is not the images.
    """

    def __init__(
        self, args: argparse.Namespace, processor: DDAEImageProcessor, sample_shape: tuple[int, ...] | None = None
    ):
        self.sample_shape = sample_shape
        found = load_splits(args)
        whole = {"train": pick_split(found, args.train_split), "test": pick_split(found, args.test_split)}
        classes = Classes(whole, label_column(whole["train"], args.label_column))
        limits = {"train": args.max_train_samples, "test": args.max_test_samples}
        splits = {name: pick_split(whole, name, limits[name], classes.column) for name in whole}
        super().__init__(splits, image_column(splits["train"], args.image_column), processor, args.batch_size)
        self.names = classes.names
        self.labels = {name: classes.labels(split) for name, split in splits.items()}
        warn_of_missing(self.names, self.labels)
        if len(np.unique(self.labels["train"])) < 2:
            raise SystemExit("The training images are all of one class: a classifier needs at least two.")

    @property
    def pixels(self) -> LabelledImages:
        """The images by their pixels: these themselves."""
        return self

    def dataset(self, split: str, noise: tuple[int, int] | None = None) -> Dataset:
        """Return a split as `pixel_values` and `labels`, and `noise` of each image's own if (draws, seed) came."""
        # datasets pickles what a transform holds: not all the pixels, which `self` may have.
        processor, column, sample_shape = self.processor, self.images, self.sample_shape
        images = self.splits[split].select_columns([column])

        def prepare(batch: dict[str, Any]) -> dict[str, Any]:
            pixels = processor(read_images(images, batch["index"], column), return_tensors="pt")["pixel_values"]
            row = {"pixel_values": pixels, "labels": torch.tensor(batch["labels"])}
            if noise is not None:
                shape = (noise[0], *(sample_shape or pixels.shape[1:]))
                row["noise"] = indexed_noise(shape, batch["index"], noise[1], noise_view(split, 0))
            return row

        dataset = Dataset.from_dict({"labels": self.labels[split], "index": np.arange(len(images))})
        return dataset.with_transform(prepare)


def ready(model: Any) -> Any:
    """Return a model on the best device there is; its VAE takes one image at a time, which bounds what it needs."""
    if model.base_model.vae is not None:
        model.base_model.vae.enable_slicing()
    return made_fast(model, best_device()).to(best_device())


def check_null_class(model: DDAEModel) -> None:
    """Stop if a network is class-conditional and nothing says which of its labels stands for none."""
    try:
        model.diffusion.conditions(None, 1, "cpu")
    except ValueError as error:
        raise SystemExit("The network is class-conditional, without a null class: give --null_class.") from error


def noise_view(split: str, view: int) -> int:
    """Return the number of a view's draw of noise: training and test images never share one."""
    return 2 * view + (split == "test")


def draw_labels(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Return the indices of `per_class` images of every class that has any."""
    rng = np.random.default_rng(seed)
    classes, counts = np.unique(labels, return_counts=True)
    if not 1 <= per_class <= counts.min():
        raise SystemExit(
            f"{per_class} labels a class are asked for: allowed are 1 to {counts.min()}, which the smallest class has."
        )
    return np.concatenate([rng.choice(np.flatnonzero(labels == k), per_class, replace=False) for k in classes])


def draw_fraction(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Return the sorted indices of this part of every class, at least one image of each; small parts lie in large."""
    rng = np.random.default_rng(seed)
    classes = [rng.permutation(np.flatnonzero(labels == k)) for k in np.unique(labels)]
    return np.sort(np.concatenate([indices[: max(1, round(fraction * len(indices)))] for indices in classes]))


def save_classifier(
    folder: str | os.PathLike[str],
    checkpoint: str,
    processor: DDAEImageProcessor,
    names: Sequence[str],
    weight: torch.Tensor,
    bias: torch.Tensor,
    **options: Any,
) -> None:
    """Write a checkpoint's denoiser with a linear classifier, weights (K, C) and biases (K,), as one folder.

    It holds the generator as a pipeline, with its VAE where it has one, and beside it the classifier without their
    weights; of a denoiser that was fine-tuned, and generates no more, the whole classifier. `options` are those of its
    configuration, such as `layer` and `sigma`, and of `from_pretrained`.
    """
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise SystemExit("The classifier's weights are no finite numbers: it is not saved. Regularise it more.")
    model = DDAEForImageClassification.from_pretrained(
        checkpoint,
        feature_norm="none",
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
        ignore_mismatched_sizes=True,
        **options,
    )
    with torch.no_grad():
        model.classifier.weight.copy_(weight)
        model.classifier.bias.copy_(bias)
    if model.config.features_only is None and still_generates(model.ddae.denoiser, vars(model.config)):
        DDAEPipeline.from_pretrained(checkpoint, cache_dir=options.get("cache_dir")).save_pretrained(folder)
        model.save_head(folder)
    else:
        model.save_pretrained(folder)
    processor.save_pretrained(folder)


@torch.no_grad()
def classify(folder: str | os.PathLike[str], data: LabelledImages, split: str = "test", **options: Any) -> np.ndarray:
    """Return the classes that a saved classifier, opened with `options`, gives the images of a split."""
    model = ready(DDAEForImageClassification.from_pretrained(folder, **options))
    batches = data.batches(split, np.arange(len(data.labels[split])), "saved classifier")
    return np.concatenate([model(images.to(model.device)).logits.argmax(-1).cpu().numpy() for images in batches])
