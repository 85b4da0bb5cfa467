"""A denoiser as a classifier without training: an image is of the class under which it is denoised best.

    from ddae_hf.experiments import Images, classify_by_denoising

    result = classify_by_denoising("runs/conditional", Images.open("uoft-cs/cifar10"), max_samples=500)
    print(result.table())

For each draw of noise and of its level, a denoiser that is told a class, as a label or a text, answers once for every
class. All classes share the draws, so that their errors differ by the class alone; classes with large errors are left
out in stages, while the others get more draws (Li et al. 2023, arXiv 2303.16203). There is no guidance, and an error is
that of the denoiser's own answer, as in training.

Levels are evenly spaced in shares of the distribution that the framework trains at: a mean error then is, but for the
kind of error, the training loss of a class, and no level counts at which a network has learnt little. For DDPM these
are evenly spaced timesteps, as in the paper, for flow matching evenly spaced times, and for EDM quantiles of its
log-normal distribution.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..building import short
from ..checkpoints import still_generates
from ..modeling_ddae import DDAEForImageClassification, DDAEModel
from ..weights import fingerprint
from .arrays import StrPath, described_folder, fill, kept_or_temporary
from .class_errors import ClassErrors, calls_of, planned, spaced_levels
from .classes import warn_of_missing
from .denoising_report import DenoisingClassifierReport, SavedClassifier
from .devices import HELP, machine
from .draws import CORRUPTION, GENERATOR, POSTERIOR, indexed_noise, separate_randomness
from .features import evaluating
from .images import ImageInputs, Images, Part, noise_view, parts_of
from .models import Model, open_model, open_processor, path_of, ready, report_facts
from .options import Options, option
from .plots import curves, save_picture
from .report import accuracy_interval, in_memory
from .run_folder import saving
from .sharing import Team
from .told_classes import PROMPT_TEMPLATE, ToldClasses, tell_classes


@dataclass(kw_only=True)
class DenoisingClassifierOptions(Options):
    """Options of `classify_by_denoising`."""

    output_dir: str | None = option(None, "Folder of the figures, the picture and the errors; the same options resume.")
    split: str = option("test", "Split of the images.")
    max_samples: int | None = option(None, "Use N images of the split, of all classes.")
    stage_draws: list[int] = option([50, 500], "Draws of noise for an image that are made by the end of each stage.")
    stage_classes: list[int] = option([5, 1], "Classes, those of the smallest errors, that are left after each stage.")
    error: Literal["l1", "l2"] = option("l1", "Whether errors are means of absolute values or of squares.")
    sigmas: list[float] | None = option(
        None, "Noise levels that the draws have in equal shares; by default as many as draws, spaced as in training."
    )
    image_sigmas: list[float] = option([0.0], "Levels of noise on the images, in [-1, 1], before anything sees them.")
    class_labels: list[int] | None = option(
        None,
        "The denoiser's label of each class of the data set; by default matched by name or, without names, by number.",
    )
    prompt_template: str | None = option(
        None, f"For a denoiser that is told a text: the text of a class, by default {PROMPT_TEMPLATE!r}."
    )
    classifier: str | None = option(None, "A saved classifier, such as a probe, to be tested on the same images.")
    batch_size: int = option(250, "Noisy images, each with a class, that the network is given at a time.")
    dtype: Literal["float32", "bfloat16"] | None = option(None, HELP)
    noise_seed: int = option(0, "Seed of all noise.")
    cache_dir: str | None = option(None, "Where downloads are kept.")

    def check(self) -> None:
        """Refuse stages that make no sense."""
        draws = self.stage_draws
        left = self.stage_classes
        if not draws or len(draws) != len(left):
            raise ValueError(
                f"stage_draws are {draws} and stage_classes {left}: give one of each for every stage, at least one."
            )
        if any(later <= earlier for earlier, later in zip(draws, draws[1:], strict=False)):
            raise ValueError(
                f"stage_draws are {draws}: they count all draws so far, so each must exceed the one before."
            )
        if left[-1] != 1 or any(later >= earlier for earlier, later in zip(left, left[1:], strict=False)):
            raise ValueError(f"stage_classes are {left}: each must be below the one before, and the last must be 1.")
        if self.sigmas is not None and not 1 <= len(self.sigmas) <= draws[-1]:
            raise ValueError(f"sigmas are {len(self.sigmas)}: give 1 to {draws[-1]}, the number of draws.")
        if not self.image_sigmas:
            raise ValueError("image_sigmas is empty: give at least one, 0 for clean images.")


@dataclass(kw_only=True)
class DenoisingClassifierResult(DenoisingClassifierReport):
    """What `classify_by_denoising` found: the figures and, in memory, what they were made of.

    Attributes:
        errors: For each of `image_sigmas`, mean errors (N, draws, K) of N images under K classes after each of `draws`,
            float64; NaN for classes that were left out.
        labels: The images' classes (N,).
    """

    errors: list[np.ndarray] = in_memory()
    labels: np.ndarray = in_memory()

    def curves(self) -> Figure:
        """Return a picture of accuracies over evaluations of the network, with their 95 % intervals."""
        lines: dict[str, Any] = {}
        reach: dict[str, Any] = {}
        for sigma, accuracies in zip(self.options["image_sigmas"], self.accuracies, strict=True):
            name = f"denoising error, noise {sigma:g}" if sigma else "denoising error, clean"
            lines[name] = 100 * np.array(accuracies)
            ends = 100 * np.array([accuracy_interval(each, self.num_images) for each in accuracies]).T
            reach[name] = np.maximum([lines[name] - ends[0], ends[1] - lines[name]], 0)
        for other in self.beside.values():
            for sigma, accuracy in zip(self.options["image_sigmas"], other.accuracies, strict=True):
                name = f"saved classifier, noise {sigma:g}" if sigma else "saved classifier, clean"
                lines[name] = np.full(len(self.calls), 100 * accuracy)
        figure = curves(
            self.calls, lines, title=f"A denoiser as a classifier, {self.num_images:,} images",
            xlabel="evaluations of the network an image", ylabel="accuracy (%)", errors=reach,
        )  # fmt: skip
        figure.axes[0].set_xticks(self.calls, [f"{calls:,}" for calls in self.calls], rotation=45)
        return figure

    def save(self, folder: StrPath) -> None:
        """Write `eval_results.json` and `accuracy_over_calls.png`."""
        with saving(folder):
            save_picture(self.curves(), self.write(Path(folder)).parent / "accuracy_over_calls.png", dpi=120)


def classify_by_denoising(
    model: Model, images: Images, options: DenoisingClassifierOptions | None = None, **changes: Any
) -> DenoisingClassifierResult | None:
    """Classify labelled images by a denoiser's error under each class, and compare the answers with the labels.

    With `output_dir` the errors are kept there, and an interrupted run goes on; without, they lie in a temporary
    folder. All processes of `accelerate launch` call this: they share the images. The first one gets the result, the
    others get None.

    Raises:
        ValueError: Options that cannot work, a denoiser that is told no classes, classes that cannot be matched with
            the data set's, images that cannot be read, or a damaged file.
        OSError: No such checkpoint, or no room on the disk.
    """
    options = DenoisingClassifierOptions.of(options, changes)
    images = Images.open(images, cache_dir=options.cache_dir)
    started = time.monotonic()
    kept = None if options.output_dir is None else Path(options.output_dir, "errors")
    with separate_randomness(), kept_or_temporary(kept) as folder, contextlib.ExitStack() as stack:
        study = open_study(model, images, options)
        if study.team.helps:
            study.team.serve()
            return None
        stack.enter_context(study.team)
        errors = [study.kept_errors(folder, sigma) for sigma in options.image_sigmas]
        result = DenoisingClassifierResult(
            num_images=len(study.inputs), classes=study.inputs.names, told=study.told.words,
            levels=study.levels.tolist(), draws=[end for stage in study.stages for end in stage.ends],
            calls=calls_of(study.stages), gflop_a_call=study.gflop_a_call(),
            accuracies=[accuracies_of(each, study.inputs.labels) for each in errors], beside=study.beside(),
            seconds_this_run=round(time.monotonic() - started, 1), errors=errors, labels=study.inputs.labels,
            **report_facts(model, images, options, study.inputs.images), **machine(study.model.device.type),
        )  # fmt: skip
        if kept is None:
            result.errors = [np.array(each) for each in errors]  # the folder of these goes
    if options.output_dir is not None:
        result.save(options.output_dir)
    return result


def accuracies_of(errors: np.ndarray, labels: np.ndarray) -> list[float]:
    """Return the accuracy of the smallest errors (N, draws, K) after each number of draws."""
    return (np.nanargmin(errors, axis=2) == labels[:, None]).mean(0).tolist()


def open_study(model: Model, images: Images, options: DenoisingClassifierOptions) -> Study:
    """Return what classifies the images, or raise `ValueError` where model, images and options do not go together."""
    chosen = images[options.split].labelled()
    if chosen.streaming:
        raise ValueError("A stream knows its labels only row by row: leave out streaming.")
    chosen = chosen.take(options.max_samples)
    names = chosen.names or []
    network = open_model(model, dtype=options.dtype, cache_dir=options.cache_dir, null_needed=False)
    check_denoises(model, network)
    told = tell_classes(model, network, names, options.class_labels, options.prompt_template, options.cache_dir)
    if options.stage_classes[0] >= len(names):
        raise ValueError(
            f"stage_classes are {options.stage_classes}: the first must be below {len(names)}, the number of classes."
        )
    family = network.diffusion.family
    for sigma in options.sigmas or ():
        family.check_sigma(sigma)
    warn_of_missing(names, {chosen.split: chosen.labels})
    classifier = None if options.classifier is None else open_classifier(options.classifier, network, names, options)
    inputs = ImageInputs(chosen, open_processor(model, options.cache_dir))
    return Study(network, told, inputs, options, classifier)


def check_denoises(model: Model, network: DDAEModel) -> None:
    """Refuse a network whose output is known to be wrong; warn of one that was fine-tuned as a classifier."""
    if reason := network.config.features_only:
        raise ValueError(f"The model has features, but its denoising errors mean nothing: {reason}")
    known = network.config.generator_fingerprint
    if path_of(model) is not None and known is not None and not still_generates(network.denoiser, vars(network.config)):
        warnings.warn(
            f"The denoiser in {path_of(model)} was trained as a classifier and is no longer the generator that was "
            "pretrained: its denoising errors may mean nothing. Give the generative checkpoint instead.",
            stacklevel=4,
        )


def open_classifier(
    path: str, network: DDAEModel, names: Sequence[str], options: DenoisingClassifierOptions
) -> DDAEForImageClassification:
    """Return a saved classifier, or raise `ValueError` if it reads other images or knows other classes."""
    found = DDAEForImageClassification.from_pretrained(path, cache_dir=options.cache_dir).eval()
    known = [name for _, name in sorted((found.config.id2label or {}).items())]
    if known != list(names):
        raise ValueError(f"The classes of {path} are {short(known)}, and those of the data set {short(list(names))}.")
    taken = (found.config.num_channels, *found.config.image_size)
    wanted = (network.config.num_channels, *network.config.image_size)
    if taken != wanted:
        raise ValueError(f"{path} takes images of {taken} (channels, height, width), and the denoiser of {wanted}.")
    return ready(found)


class Study:
    """Classifies images by a denoiser's errors, and by a saved classifier."""

    def __init__(
        self, model: DDAEModel, told: ToldClasses, inputs: ImageInputs, options: DenoisingClassifierOptions,
        classifier: DDAEForImageClassification | None,
    ):  # fmt: skip
        self.model = model
        self.told = told
        self.inputs = inputs
        self.options = options
        self.classifier = classifier
        draws = options.stage_draws
        self.stages = planned(draws, options.stage_classes, len(inputs.names))
        self.levels = spaced_levels(model.diffusion.family, draws[-1], options.sigmas)
        self.errors = ClassErrors(
            model.diffusion, told, self.stages, self.levels, options.error, options.batch_size, options.noise_seed
        )
        size = max(1, options.batch_size // len(inputs.names))
        self.parts = partial(parts_of, np.arange(len(inputs)), size)
        self.team = Team({"errors": self.computed})

    def changed(self, images: Tensor, numbers: Sequence[int], image_sigma: float) -> Tensor:
        """Return images (B, C, H, W) with noise of a level, drawn by their numbers alone, whatever the level."""
        if not image_sigma:
            return images
        drawn = partial(indexed_noise, seed=self.options.noise_seed, view=noise_view(True, 0), purpose=CORRUPTION)
        return images + image_sigma * drawn(tuple(images.shape[1:]), numbers, device=images.device)

    def noisy_images(self, parts: Sequence[Part], image_sigma: float, title: str) -> Iterator[tuple[Any, Tensor]]:
        """Yield the numbers of the images of each part, and the images with noise of a level, on the device."""
        device = self.model.device
        # The images have no name here, as their thread then ends at an error: see `Inputs.parts`.
        for (_, numbers), batch in zip(parts, self.inputs.parts(parts, title=title, device=device), strict=True):
            yield numbers, self.changed(batch, numbers, image_sigma)

    def computed(self, parts: Sequence[Part], image_sigma: float) -> Iterator[dict[str, Tensor]]:
        """Yield the errors of the images of each part, with noise of a level on them: see `ClassErrors`."""
        config = self.model.config
        for numbers, batch in self.noisy_images(parts, image_sigma, f"Errors, noise {image_sigma:g}"):
            own = None
            if config.sample_posterior:
                own = indexed_noise(
                    config.sample_shape, numbers, self.options.noise_seed, noise_view(True, 0), POSTERIOR, batch.device
                )
            with evaluating(self.model):
                found = self.errors.under_classes(self.model.encode(batch, own), numbers)
            yield {"errors": found}

    @property
    def identity(self) -> dict[str, Any]:
        """What the errors depend on besides the noise on the images, as JSON."""
        model = self.model
        names = ["denoiser", "scheduler", *(["vae", "sample_posterior"] if model.vae is not None else [])]
        shared = ("stage_draws", "stage_classes", "error", "noise_seed")
        return {name: getattr(model.config, name) for name in names} | {
            "weights": fingerprint(model.denoiser, model.vae, dtype=None),
            "dtype": str(model.denoiser.dtype),
            "told": self.told.identity,
            "levels": self.levels.tolist(),
            **{name: getattr(self.options, name) for name in shared},
            "generator": GENERATOR,
            "data": self.inputs.identity,
            "count": len(self.inputs),
        }

    def kept_errors(self, folder: Path, image_sigma: float) -> np.ndarray:
        """Return the errors (N, ends, K) of all images, mapped from disk, computing those that are not there yet."""

        def batches(start: int, missing: list[str]) -> Iterator[dict[str, Tensor]]:
            return self.team.each("errors", self.parts(start), image_sigma=image_sigma)

        shape = (sum(len(stage.ends) for stage in self.stages), self.stages[0].told)
        where = described_folder(folder, self.identity | {"image_sigma": image_sigma})
        return fill(where, {"errors": shape}, len(self.inputs), batches, "float64")["errors"]

    def gflop_a_call(self) -> float:
        """Return the operations of an evaluation of the network, in 10^9."""
        diffusion = self.model.diffusion
        clean = torch.zeros(1, *self.model.config.sample_shape, device=self.model.device)
        noisy, timestep = diffusion.family.noisy(clean, clean, self.levels[:1])
        conditions = diffusion.conditions(self.told.condition(torch.zeros(1, dtype=torch.int64)), 1, clean.device)
        with evaluating(self.model), FlopCounterMode(display=False) as counter:
            diffusion.predict(noisy, timestep, conditions)
        return counter.get_total_flops() / 1e9

    def beside(self) -> dict[str, SavedClassifier]:
        """Return how the saved classifier, if there is one, did on the same images."""
        classifier = self.classifier
        if classifier is None:
            return {}
        config = classifier.config
        shape = (1, config.num_channels, *config.image_size)
        with evaluating(classifier), FlopCounterMode(display=False) as counter:
            classifier(torch.zeros(shape, device=classifier.device))
        found = SavedClassifier(
            layer=str(config.layer), sigma=float(config.sigma or 0.0), gflop=counter.get_total_flops() / 1e9,
            same_denoiser=fingerprint(classifier.ddae.denoiser) == fingerprint(self.model.denoiser),
            accuracies=[self.accuracy_of(classifier, sigma) for sigma in self.options.image_sigmas],
        )  # fmt: skip
        return {str(self.options.classifier): found}

    def accuracy_of(self, classifier: Any, image_sigma: float) -> float:
        """Return the accuracy of a classifier, as its users load it, on images with noise of a level."""
        answers = []
        parts = parts_of(np.arange(len(self.inputs)), self.options.batch_size)
        with evaluating(classifier):
            for _, batch in self.noisy_images(parts, image_sigma, f"Classifier, noise {image_sigma:g}"):
                answers.append(classifier(batch.to(classifier.device)).logits.argmax(1))
        return float((torch.cat(answers).cpu().numpy() == self.inputs.labels).mean())
