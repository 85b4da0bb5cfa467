"""The report of classifying by denoising errors, beside a probe on the same images."""

from __future__ import annotations

from dataclasses import dataclass

from .report import Figure, Report, Section, accuracy_interval, many, percent


@dataclass(kw_only=True)
class SavedClassifier:
    """A saved classifier that saw the same images.

    Attributes:
        layer: Where it reads its denoiser, at noise level `sigma`.
        same_denoiser: Whether its denoiser is the one whose errors classified, to bfloat16.
        gflop: Operations of an image, in 10^9; a multiplication and an addition are two.
        accuracies: One for each of the options' `image_sigmas`.
    """

    layer: str
    sigma: float
    same_denoiser: bool
    gflop: float
    accuracies: list[float]


@dataclass(kw_only=True)
class DenoisingClassifierReport(Report):
    """A denoiser as a classifier, by its denoising error under each class.

    Attributes:
        num_images: Number of images that were classified.
        classes: The names of their classes.
        told: What the denoiser was told of each class: its label, or a text.
        levels: The noise levels of the draws, ascending.
        draws: After how many draws the answers were taken, of all classes that were left by then.
        calls: Evaluations of the network for an image up to each of `draws`.
        gflop_a_call: Operations of one evaluation, in 10^9; a multiplication and an addition are two.
        accuracies: For each of the options' `image_sigmas` the accuracy after each of `draws`.
        beside: A saved classifier on the same images, by its path, if one was given.
    """

    kind = "denoising_classifier"
    telling = ("gflop_a_call",)
    pictures = {"accuracy_over_calls.png": "Accuracy over evaluations of the network"}

    num_images: int
    classes: list[str]
    told: list[str]
    levels: list[float]
    draws: list[int]
    calls: list[int]
    gflop_a_call: float
    accuracies: list[list[float]]
    beside: dict[str, SavedClassifier] = many()

    def section(self) -> Section:
        """Return the accuracy over the number of draws, and the probe's."""
        sigmas = self.options["image_sigmas"]
        rows = []
        for place, (draws, calls) in enumerate(zip(self.draws, self.calls, strict=True)):
            cost = [f"{draws:,}", f"{calls:,}", f"{calls * self.gflop_a_call:.3g}"]
            rows.append(["denoising error", *cost, *(self._cell(each[place]) for each in self.accuracies)])
        for other in self.beside.values():
            name = "linear probe" if other.same_denoiser else "classifier on another denoiser"
            rows.append([name, "", "", f"{other.gflop:.3g}", *map(self._cell, other.accuracies)])
        head = ["read by", "draws", "calls an image", "GFLOP an image", *(self._column(sigma) for sigma in sigmas)]
        where = {"draws": self.draws[-1], "calls": self.calls[-1], "noise_seed": self.options["noise_seed"]}
        figures = [
            Figure("accuracy", "Accuracy of classifying by denoising errors", each[-1], where | {"image_sigma": sigma})
            for sigma, each in zip(sigmas, self.accuracies, strict=True)
        ]
        return Section("Classifying by denoising errors", self._protocol(), head, rows, figures)

    def _column(self, sigma: float) -> str:
        return f"noise {sigma:g} on the images" if sigma else "clean images"

    def _cell(self, accuracy: float) -> str:
        low, high = accuracy_interval(accuracy, self.num_images)
        return f"{percent(accuracy)} ({100 * low:.1f} to {100 * high:.1f})"

    def _protocol(self) -> str:
        options = self.options
        stages = zip(options["stage_draws"], options["stage_classes"], strict=True)
        left = ", ".join(f"{kept} after {draws:,} draws" for draws, kept in stages)
        text = (
            f"The table has the accuracy, in % with 95 % intervals, on {self.num_images:,} images of "
            f"{len(self.classes)} classes, of which the denoiser learnt no classifier. An image is of the class under "
            f"which its mean denoising error ({options['error']}) is the smallest. Each draw is of noise and a level, "
            f"from {self.levels[0]:.3g} to {self.levels[-1]:.3g}, which all classes share; of {len(self.classes)} "
            f"classes those with the smallest errors are left: {left} (noise seed {options['noise_seed']})."
        )
        for other in self.beside.values():
            text += f" The saved classifier reads its denoiser at `{other.layer}`, sigma {other.sigma:.3g}."
        if any(options["image_sigmas"]):
            text += " Noise on the images, in [-1, 1], was added before anything saw them, and not clipped."
        return text
