"""Find a denoiser's best layer and noise level: probe every pair of them, and make the best one a classifier.

One pass over the images for each noise level serves all layers. Layer, noise level and strength of regularisation are
chosen on a part of the training images; test images are looked at once, with the chosen pair. A grid of one pair is a
probe.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm.auto import tqdm

from ..image_processing_ddae import DDAEImageProcessor
from ..modeling_ddae import DDAEForImageClassification, DDAEModel
from ..weights import fingerprint
from .arrays import StrPath, kept_or_temporary, written_whole
from .classes import draw_labels
from .devices import HELP, machine
from .draws import separate_randomness
from .features import FeatureCache
from .fusing import add_taps, check_fusing, tested_taps
from .images import ImageInputs, Images, Inputs, SplitOptions, labelled_splits
from .models import Model, check_taps, chosen_layers, open_for, open_processor, path_of, ready, report_facts
from .noise_curve import curve_of
from .options import PROMPT, option
from .pairs import FusedProbe, Pair, Probe, kept_pairs
from .plots import accuracy_over_sigma, confusion_table, heat_map, reliability_diagram, save_picture
from .probing import NEIGHBOURS, Fitted, Prober, classify, make_classifier, save_classifier
from .report import in_memory
from .results import ProbeReport
from .run_folder import saving

MOST_PIXELS = 2**14  # numbers of an image, whose correlations take 2 GiB


@dataclass(kw_only=True)
class SweepOptions(SplitOptions):
    """Options of `sweep`."""

    encoded: ClassVar[bool] = False  # whether views are made beforehand, for every protocol
    classifier_dir: ClassVar[str] = "classifier"  # where in output_dir the classifier is

    layers: list[str] = option(["all"], "Names of layers, or `all`, `decoder`, or `own`, the checkpoint's.")
    sigmas: list[float] = option(
        [0.02, 0.03, 0.05, 0.08, 0.14, 0.25, 0.5, 1.0], "Noise levels; an empty list means the checkpoint's."
    )
    l2: list[float] = option([1e-5, 1e-4, 1e-3, 1e-2], "Strengths of regularisation.")
    protocol: Literal["logistic_regression", "paper", "batch_norm"] = option(
        "logistic_regression",
        "Kind of probe: full-batch logistic regression on standardised features that are computed once; a linear layer "
        "trained with Adam on fresh noise, flips and crops, as in the paper; the same behind a batch norm.",
    )
    num_train_epochs: int = option(15, "Epochs of the protocols that train online.")
    learning_rate: float = option(1e-3, "Learning rate of the protocols that train online.")
    train_batch_size: int = option(128, "Images per step of the protocols that train online.")
    validation_fraction: float = option(0.2, "Share of the training images that is held out for the choice.")
    max_selection_samples: int | None = option(None, "Training images used for choosing; by default all.")
    num_views: int = option(1, "Views of each image, each with its own noise: trained on, averaged over in tests.")
    random_flip: bool | None = option(None, "Mirror half of the images, in views after the first.")
    random_crop: int | None = option(None, "Crop them at random after this much padding.", metavar="PADDING")
    num_noise_seeds: int = option(3, "Noise seeds that the best pair is tested with.")
    fuse: int = option(
        1, "Then add taps to the best pair, up to so many in all: each time the one that helps most, features joined."
    )
    knn: bool = option(False, "Also classify by the nearest 20 images and, if there are as many, the nearest 200.")
    alignment: bool = option(False, "Also measure alignment and uniformity.")
    few_labels: list[int] = option([], "Also probe with this many labels a class, such as 1 5 10 100.")
    num_draws: int = option(5, "Draws of few_labels.")
    baselines: bool = option(False, "Also probe raw pixels, and the same network untrained.")
    pooling: Literal["mean", "max", "mean_2x2"] | None = option(
        None,
        "How hidden states become features: their mean, maximum, or the means of their four quarters, which tell "
        "where something is in images that are aligned; by default the checkpoint's.",
    )
    num_noise_samples: int | None = option(None, "Draws of noise that every view's features are averaged over.")
    null_class: int | None = option(None, "For a class-conditional denoiser: the label that stands for no class.")
    prompt: str | None = option(None, PROMPT)
    batch_size: int = option(250, "Images that the network is given at a time.")
    dtype: Literal["float32", "bfloat16"] | None = option(None, HELP)
    noise_seed: int = option(0, "First noise seed.")
    seed: int = option(0, "Seed of the validation split, the draws of labels and the untrained network.")
    output_dir: str | None = option(None, "Folder of the figures, the pictures and the best classifier.")
    features_dir: str | None = option(None, "Folder where features are kept; by default `features` in output_dir.")

    @property
    def online(self) -> bool:
        """Whether probes are trained by gradient descent."""
        return self.protocol != "logistic_regression"

    @property
    def flips(self) -> bool:
        """Whether half of the images are mirrored in views after the first."""
        return self.online if self.random_flip is None else self.random_flip

    @property
    def crop_padding(self) -> int:
        """After how much padding they are cropped."""
        return 4 * self.online if self.random_crop is None else self.random_crop

    @property
    def changes(self) -> dict[str, Any]:
        """What the features of views after the first depend on."""
        return {"flip": self.flips, "crop": self.crop_padding, "seed": self.seed}

    def check(self) -> None:
        """Refuse options that do not go together."""
        if not self.layers or not self.l2:
            raise ValueError(f"{'l2' if self.layers else 'layers'} is empty: give at least one.")
        if self.max_selection_samples is not None and self.max_selection_samples < 2:
            raise ValueError(f"max_selection_samples is {self.max_selection_samples}: it must be at least 2.")
        if not self.online and self.num_views == 1 and (self.flips or self.crop_padding):
            raise ValueError("random_flip and random_crop change the views after the first: give num_views 2 or more.")
        views = self.num_views > 1 and not self.encoded
        offline = {"few_labels": self.few_labels, "baselines": self.baselines, "num_views": views}
        for name, given in (offline | {"fuse": self.fuse > 1}).items():
            if self.online and given:
                raise ValueError(f"{name} is for logistic regression, not for the protocol {self.protocol}.")


@dataclass(kw_only=True)
class SweepResult(ProbeReport):
    """What a sweep found, with the classifier of the best pair, or of the fused taps, in evaluation mode.

    Attributes:
        classifier: Made of `source`, a path or a model; `processor` prepares its images.
        labels: The test images' classes (N,).
        predicted: The classes that its probe of the first noise seed gave them (N,).
        logits: What these were taken from (N, K).
    """

    classifier: DDAEForImageClassification = in_memory()
    processor: DDAEImageProcessor = in_memory()
    source: Model = in_memory()
    labels: Any = in_memory()
    predicted: np.ndarray = in_memory()
    logits: Tensor = in_memory()

    def heat_map(self) -> Figure:
        """Return a picture of the accuracy on held-out images over layers and noise levels."""
        return heat_map(self.pairs, self.best)

    def save(self, folder: StrPath) -> None:
        """Write all figures and the classifier, so that `from_pretrained` opens the folder: see `save_classifier`."""
        self.save_figures(folder)
        with saving(folder):
            save_classifier(folder, self.classifier, self.source, self.processor, self.options["cache_dir"])

    def save_figures(self, folder: StrPath) -> None:
        """Write `eval_results.json`, the pictures, and the test images' classes as they are and as predicted."""
        with saving(folder):
            path = self.write(folder).parent
            save_picture(self.heat_map(), path / "heat_map.png", dpi=120)
            curve = accuracy_over_sigma(self.pairs, self.best, self.images["held_out"])
            save_picture(curve, path / "accuracy_over_sigma.png", dpi=120)
            names = list((self.classifier.config.id2label or {}).values())
            table = confusion_table(self.labels, self.predicted, names)
            save_picture(table, path / "confusion.png", dpi=100, bbox_inches="tight")
            diagram = reliability_diagram(self.logits, self.labels, (self.fused or self).best.temperature)
            save_picture(diagram, path / "reliability.png", dpi=100)
            for name, classes in (("test_predictions", self.predicted), ("test_labels", self.labels)):
                with written_whole(path / f"{name}.npy") as partial, partial.open("wb") as file:
                    np.save(file, classes)


def sweep(model: Model, images: Images, options: SweepOptions | None = None, **changes: Any) -> SweepResult | None:
    """Probe every pair of layer and noise level on labelled images, test the best, and make it a classifier.

    With `output_dir` everything is kept there, and an interrupted sweep goes on; without, features lie in a temporary
    folder. All processes of `accelerate launch` call this: they share the images. The first one gets the result, the
    others get None.

    Raises:
        ValueError: Options that cannot work, images that cannot be read, or a damaged file.
        OSError: No such checkpoint, or not enough space on disk.
    """
    options = SweepOptions.of(options, changes)
    images = Images.open(images, cache_dir=options.cache_dir)
    train, test = labelled_splits(images, options)
    opened = open_for(model, options)
    processor = open_processor(model, options.cache_dir)
    learnt, tested = (changed_inputs(each, processor, options) for each in (train, test))
    return sweep_inputs(model, opened, images, learnt, tested, processor, options)


def changed_inputs(images: Any, processor: DDAEImageProcessor, options: SweepOptions) -> ImageInputs:
    """Return images as a network's inputs, whose views after the first are changed as the options say."""
    return ImageInputs(images, processor, flip=options.flips, crop_padding=options.crop_padding, seed=options.seed)


def check_sweep(
    model: DDAEModel, train: Inputs, test: Inputs, processor: DDAEImageProcessor, options: SweepOptions,
    folder: StrPath = "", selection_views: Sequence[int] | None = None,
) -> Prober:  # fmt: skip
    """Return the probes of a sweep with features in `folder`, or raise `ValueError` where model or images forbid it."""
    layers = chosen_layers(model, options.layers)
    sigmas = list(dict.fromkeys(options.sigmas or [model.config.sigma]))
    check_taps(model, layers, sigmas)
    prober = Prober(model, train, test, options, layers, sigmas, folder, selection_views)
    for per_class in options.few_labels:
        draw_labels(prober.labels["train"], per_class, options.seed)
    sides = dict(processor.size)
    if options.crop_padding >= min(sides.values()):
        raise ValueError(f"random_crop is {options.crop_padding}: it must be below the sides of the images, {sides}.")
    numbers = model.config.num_channels * math.prod(model.config.image_size)
    if options.baselines and numbers > MOST_PIXELS:
        raise ValueError(
            f"baselines: {numbers:,} numbers per image are too many to be probed as they are: leave it out."
        )
    check_fusing(prober)
    fewest = min(NEIGHBOURS) if options.knn else 1
    if len(prober.fitted) < fewest or (options.alignment and len(prober.held_out) < 2):
        raise ValueError(
            f"{len(prober.rows)} of the {len(train)} training images leave {len(prober.fitted)} to fit on and "
            f"{len(prober.held_out)} to choose on: {fewest} and {1 + options.alignment} are needed. Give more, or "
            "another validation_fraction."
        )
    return prober


def sweep_inputs(
    source: Model, model: DDAEModel, images: Images, train: Inputs, test: Inputs, processor: DDAEImageProcessor,
    options: SweepOptions, selection_views: Sequence[int] | None = None, **config: Any,
) -> SweepResult | None:  # fmt: skip
    """Sweep over images or latents with an open model: see `sweep`.

    The classifier is made of `source`; `config` is what its configuration says besides the pair. The pair is chosen on
    `selection_views` of the training images, by default on all.
    """
    started = time.monotonic()
    kept = None if options.output_dir is None else Path(options.output_dir)
    where = options.features_dir or (kept and kept / "features")
    with separate_randomness(), kept_or_temporary(where) as folder, contextlib.ExitStack() as stack:
        prober = check_sweep(model, train, test, processor, options, folder, selection_views)
        if prober.team.helps:
            prober.team.serve()
            return None
        stack.enter_context(prober.team)
        levels = kept and kept / "levels"
        pairs = sweep_levels(prober, levels)
        levels_done = time.monotonic()
        found, fitted = prober.tested(pairs, options.num_noise_seeds)
        fused = None
        if options.fuse > 1:
            fused, fitted = tested_taps(prober, add_taps(prober, pairs, levels, known_of(prober)), fitted)
        baselines = prober.baselines() if options.baselines else {}
        device = model.device.type
        if path_of(source) is not None:
            model.cpu()  # the whole classifier takes its place
        config |= {"noise_seed": options.noise_seed, **tap_of(fused or found)}
        shared = ("num_noise_samples", "null_class", "prompt", "pooling")
        config |= {name: getattr(model.config, name) for name in shared}
        classifier, accuracy = _classifier(source, prober, processor, fitted, config)
    settled = dataclasses.replace(
        options, random_flip=options.flips, random_crop=options.crop_padding, pooling=model.config.pooling,
        num_noise_samples=model.config.num_noise_samples,
    )  # fmt: skip
    result = SweepResult(
        **vars(found), **machine(device), checkpoint=path_of(source), fingerprint=fingerprint(model.denoiser),
        **report_facts(source, images, settled, train.images, test.images),
        images={"fitted": len(prober.fitted), "held_out": len(prober.held_out), "train": len(train), "test": len(test)},
        pairs=pairs, noise_curve=curve_of(pairs, found.best.layer, len(prober.held_out)), fused=fused,
        baselines=baselines, saved_classifier_test_accuracy=accuracy,
        seconds={"levels": round(levels_done - started, 1), "in_all": round(time.monotonic() - started, 1)},
        classifier=classifier, processor=processor, source=source, labels=test.labels,
        predicted=fitted.predicted, logits=fitted.logits,
    )  # fmt: skip
    if kept is not None:
        folder = kept / options.classifier_dir
        if folder != kept:
            result.save_figures(kept)
        result.save(folder)
    return result


def _classifier(
    source: Model, prober: Prober, processor: DDAEImageProcessor, fitted: Fitted, config: Mapping[str, Any]
) -> tuple[DDAEForImageClassification, float]:
    """Return the classifier, and its accuracy on the test images as its users load it, but in the type asked for."""
    options, names = prober.options, prober.train.names or []
    make = partial(make_classifier, source, names, *fitted[:2], cache_dir=options.cache_dir, **config)
    classifier = make()
    user = classifier if options.dtype is None else make(dtype=getattr(torch, options.dtype))
    if path_of(source) is not None:
        user = ready(user)
    predicted = classify(user, prober.test.images, processor, options.batch_size)
    return classifier, float((predicted == prober.labels["test"]).mean())


def tap_of(chosen: Probe) -> dict[str, Any]:
    """Return what a configuration says of the taps that were chosen: one, or several in their order."""
    if isinstance(chosen, FusedProbe) and len(chosen.taps) > 1:
        return {"taps": [[tap.layer, tap.sigma] for tap in chosen.taps]}
    return {"layer": chosen.best.layer, "sigma": chosen.best.sigma}


def sweep_levels(prober: Prober, folder: Path | None) -> list[Pair]:
    """Probe every noise level, and keep each one's figures in a folder, if any: an interrupted sweep goes on there."""
    known = known_of(prober)
    pairs: list[Pair] = []
    for sigma in tqdm(prober.sigmas, desc="Noise levels", disable=None):
        path = None if folder is None else folder / f"sigma-{sigma}.json"
        pairs += kept_pairs(path, known, partial(prober.level, sigma))
    return pairs


def known_of(prober: Prober) -> dict[str, Any]:
    """Return what the figures of every noise level depend on, as JSON, besides the level."""
    options = prober.options
    names = ("protocol", "validation_fraction", "knn", "alignment", "changes", "max_selection_samples")
    known: dict[str, Any] = {name: getattr(options, name) for name in names}
    if options.online:  # under their first names, so that results that were kept are found
        known |= {"num_epochs": options.num_train_epochs, "online_batch_size": options.train_batch_size}
        known["learning_rate"] = options.learning_rate
    else:
        known |= {"l2": options.l2, "num_views": options.num_views}
    known |= {"data": prober.train.identity, "layers": prober.layers, "chosen_on": len(prober.chosen_on)}
    known["features"] = FeatureCache("", prober.model, options.noise_seed).identity
    known["labels"] = hashlib.sha256(prober.labels["train"].tobytes()).hexdigest()
    return known
