"""Results: what every experiment found, as a dataclass that is written as JSON, printed as a table and put on a card.

Files of version 0.2.0 are read into the same classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .correspondence_report import CorrespondenceReport
from .denoising_report import DenoisingClassifierReport
from .noise_curve import NoiseCurve
from .outlier_report import OutlierReport
from .pairs import FusedProbe, Pair, Probe, words_of_neighbours
from .report import Figure, Report, Section, many, number, percent, spread
from .run_folder import OPTIONS, read_options
from .run_results import AverageReport, CurveReport
from .segmentation_report import SegmentationReport
from .taps import read_taps

__all__ = [
    "AverageReport", "CorrespondenceReport", "CurveReport", "DenoisingClassifierReport", "FineTuningReport",
    "GenerationReport", "NoisyReport", "OutlierReport", "PretrainingReport", "ProbeReport", "Report",
    "SegmentationReport", "VAEReport",
]  # fmt: skip

METRICS = {"accuracy": "accuracy", "f1": "macro F1", "precision": "precision", "recall": "recall"}  # by their titles


@dataclass(kw_only=True)
class PretrainingReport(Report):
    """A denoiser's training; its options are in `training_options.yaml`, beside it."""

    kind = "pretraining"
    file = "train_results.json"
    telling = ("steps",)

    steps: int | None = None
    loss_last_100_batches: float | None = None
    parts_last_100_batches: dict[str, float] = many()  # where the loss is a sum, of each term times its weight
    images: int | None = None
    images_this_run: int | None = None
    parameters: int | None = None
    latents: dict[str, Any] = many()

    def complete(self) -> None:
        """Read the options too."""
        if self.folder is not None and (self.folder / OPTIONS).is_file():
            self.options = read_options(self.folder)
        super().complete()

    def to_dict(self) -> dict[str, Any]:
        """Return what the file holds, which is all but the options."""
        return {name: value for name, value in super().to_dict().items() if name != "options"}

    def section(self) -> Section:
        """Return how long it took and what loss it ended at."""
        facts = self._facts("steps", "images", "loss_last_100_batches", "parameters", "seconds", "images_per_second")
        return Section("Pretraining", "A denoiser was trained.", ["fact", "value"], facts)

    def _facts(self, *names: str) -> list[list[str]]:
        values = ((name, getattr(self, name)) for name in names)
        return [[name.replace("_", " "), number(value)] for name, value in values if value is not None]


@dataclass(kw_only=True)
class VAEReport(PretrainingReport):
    """A VAE's training, with figures of held-out images and what latents are multiplied by, `scaling_factor`.

    `held_out` has `psnr` (dB), `kl_nats_per_image`, `latent_mean`, `latent_std` and `num_images`.
    """

    kind = "vae"
    telling = ("scaling_factor",)

    held_out: dict[str, float]
    scaling_factor: float

    def section(self) -> Section:
        """Return what it does to held-out images."""
        rows = [[f"held out: {name}", number(value)] for name, value in self.held_out.items()]
        rows += self._facts("steps", "images", "loss_last_100_batches", "scaling_factor", "parameters", "seconds")
        return Section("VAE", "An autoencoder was trained.", ["fact", "value"], rows)


@dataclass(kw_only=True)
class ProbeReport(Report, Probe):
    """Linear probes of a frozen network, and of what it is compared with.

    Attributes:
        fingerprint: `weights.fingerprint` of the denoiser that was probed.
        images: Their numbers: `fitted` and `held_out` for the choice, `train` (all training images) and `test`.
        pairs: Every layer at every level.
        noise_curve: Accuracy of the best layer over the noise levels, where there are at least three.
        fused: Several taps joined, if they were asked for.
        baselines: The same for `raw pixels` and for the `untrained network`.
    """

    kind = "linear_probe"
    telling = ("pairs", "results")
    pictures = {
        "heat_map.png": "Accuracy on held-out training images, of every layer at every noise level",
        "confusion.png": "Confusion table of the test images",
        "reliability.png": "How often the probe is right on test images, over how sure it is",
    }

    checkpoint: str | None = None
    fingerprint: str | None = None
    images: dict[str, int]
    pairs: list[Pair]
    noise_curve: NoiseCurve | None = None
    fused: FusedProbe | None = None
    baselines: dict[str, Probe] = many()
    saved_classifier_test_accuracy: float | None = None

    @classmethod
    def upgraded(cls, content: dict[str, Any]) -> dict[str, Any]:
        """Return the content of a probe's file of version 0.2.0 as a sweep would have written it."""
        images = content.get("images", {})
        if "results" not in content:  # a sweep of 0.1.0 did not say how many images it trained on
            return content | {"images": {"train": images.get("fitted", 0) + images.get("held_out", 0)} | images}
        options, found = content["options"], {}
        train, few = content["num_train_images"], options["labels_per_class"]
        for name, result in content["results"].items():
            found[name] = {"best": result, "test_accuracies": {str(options["noise_seed"]): result["test_accuracy"]}}
            found[name]["test_f1"] = result.get("test_f1")
            found[name]["few_label_test_accuracies"] = {str(few): result["few_label_test_accuracies"]} if few else {}
        tried = content["results"]["DDAE"].get("tried", [content["results"]["DDAE"]])
        tried = sorted(tried, key=lambda pair: pair.get("validation_accuracy", 0))
        chosen_on = min(train, options["max_selection_samples"])
        held_out = max(1, chosen_on // 5)
        test = content["num_test_images"]
        images = {"fitted": chosen_on - held_out, "held_out": held_out, "train": train, "test": test}
        pairs = list({(pair["layer"], pair["sigma"]): pair for pair in tried}.values())
        return {**content, **found.pop("DDAE"), "pairs": pairs, "images": images, "baselines": found}

    def section(self) -> Section:
        """Return the best pair's test figures, beside the baselines'."""
        probes = {"DDAE": self, **(self.fused.joined if self.fused else {}), **self.baselines}
        rows = [row for name, probe in probes.items() for row in self._rows(name, probe)]
        head = ["features", "tap", "labels", "test accuracy", "macro F1", *["gain of DDAE"] * bool(self.baselines)]
        seed, value = next(iter(self.test_accuracies.items()))
        where = {"layer": self.best.layer, "sigma": self.best.sigma, "noise_seed": int(seed)}
        figures = [Figure("accuracy", "Test accuracy of a linear probe", value, where)]
        if self.test_f1 is not None:
            figures.append(Figure("f1", "Macro F1 of a linear probe", self.test_f1, where))
        if self.fused is not None:
            head, rows = self.fused.with_steps(head, rows)
            figures += self.fused.figures(seed)
        return Section("Linear probe", self._protocol(), head, rows, figures, self.saved_classifier_test_accuracy)

    def _rows(self, name: str, probe: Probe) -> list[list[str]]:
        ours, theirs = [*self.test_accuracies.values()], [*probe.test_accuracies.values()]
        row = [name, probe.words, f"all {self.images['train']:,}", spread(theirs), percent(probe.test_f1)]
        found = [(row, ours, theirs)]
        for count, theirs in probe.few_label_test_accuracies.items():
            row = [name, probe.words, f"{count} a class", spread(theirs), ""]
            found.append((row, self.few_label_test_accuracies.get(count, []), theirs))
        for row, ours, theirs in found if self.baselines else ():
            paired = name in self.baselines and len(ours) == len(theirs)
            row.append(spread(np.subtract(ours, theirs).tolist()) if paired else "")
        return [row for row, _, _ in found]

    def _protocol(self) -> str:
        options, images = self.options, self.images
        probe = options.get("protocol", "logistic_regression").replace("_", " ")
        text = f"The table has the test accuracy, in %, of linear probes ({probe}) on the frozen network, on "
        text += f"{images['test']:,} test images. "
        if len(self.pairs) > 1:
            text += (
                f"The best of {len(self.pairs)} pairs of layer and noise level was chosen on {images['held_out']:,} "
                f"held-out training images (seed {options['seed']}) after fitting on {images['fitted']:,}, and fitted "
                f"again on all {images['train']:,}."
            )
        else:
            chosen = f"; their regularisation was chosen on {images['held_out']:,} of them that were held out (seed "
            chosen = f"{chosen}{options['seed']})" if probe == "logistic regression" else ""
            text += f"They were fitted on {images['train']:,} training images{chosen}."
        text += f" {self.fused.said}" if self.fused is not None else ""
        if options.get("latents_dir"):
            text += " The network read latents of the images that were encoded beforehand."
        if options.get("num_views", 1) > 1:
            changes = ["mirrored"] * options["random_flip"] + ["cropped"] * (options["random_crop"] > 0)
            others = f", the others {' and '.join(changes)} at random" if changes else ""
            text += f" Each image came in {options['num_views']} views, the first as it is{others}; in tests, "
            text += "predictions are averaged over the views."
        if options.get("pooling") == "mean_2x2":
            text += " Features are the means of the four quarters of a hidden state."
        if options.get("num_noise_samples", 1) > 1:
            text += f" Features are averaged over {options['num_noise_samples']} draws of noise per image."
        draws = max(map(len, self.few_label_test_accuracies.values()), default=0)
        counts = {"noise seeds": len(self.test_accuracies), "draws of few labels": draws}
        if spreads := [f"{count} {name}" for name, count in counts.items() if count > 1]:
            text += f" Figures with ± are mean ± standard deviation over {', or '.join(spreads)}."
        if draws and len(self.pairs) > 1:
            text += " Where labels are few, layer and noise level were chosen with all labels."
        text += words_of_neighbours(self.pairs)
        if self.noise_curve is not None:
            text += f" {self.noise_curve.words(images['held_out'])}"
        if self.calibration is not None:
            text += f" {self.calibration.words(images['held_out'], self.best.validation_accuracy)}"
        return text


@dataclass(kw_only=True)
class FineTuningReport(Report):
    """A denoiser and a classifier that were trained as one network, on `num_train_labels` labelled images.

    Attributes:
        layer: Where the network is read; of several taps, the deepest layer. `sigma` likewise.
        taps: All taps where there are several, as words `layer@sigma`.
        head: What classifies in place of a linear layer on pooled features: `attention` or `fusion`.
        num_trained_parameters: Numbers that were trained: of the network or its adapters, and of the classifier.
        train_seconds: Seconds of training alone, in all runs together.
        test_accuracy: With the model's fixed noise, like loss, macro F1, precision and recall.
        test_own_noise_accuracy: The same with each image's own noise.
        saved_classifier_test_accuracy: Accuracy on pixels, for a classifier that learnt from latents.
    """

    kind = "fine_tuning"
    telling = ("test_own_noise_accuracy",)

    layer: str
    sigma: float
    taps: list[str] | None = None
    head: str | None = None
    num_train_labels: int
    num_test_images: int
    steps: int
    images: int | None = None
    num_trained_parameters: int | None = None
    train_seconds: float | None = None
    train_seconds_this_run: float | None = None
    test_loss: float | None = None
    test_accuracy: float
    test_f1: float | None = None
    test_precision: float | None = None
    test_recall: float | None = None
    test_own_noise_loss: float | None = None
    test_own_noise_accuracy: float
    test_own_noise_f1: float | None = None
    test_own_noise_precision: float | None = None
    test_own_noise_recall: float | None = None
    saved_classifier_test_accuracy: float | None = None

    def section(self) -> Section:
        """Return the test figures."""
        start = "random" if self.options.get("from_scratch") else "pretrained"
        trained = f"The whole network was trained from {start} weights"
        if rank := self.options.get("lora_rank"):
            trained = f"A classifier and LoRA adapters of rank {rank} on the frozen network were trained"
        if self.options.get("freeze_denoiser"):
            trained = f"A classifier on the frozen network, with its {start} weights, was trained"
        if self.head is not None:
            trained += f", with the head {self.head},"
        taps = [(self.layer, self.sigma)] if not self.taps else read_taps(self.taps)
        places = "; ".join(f"`{layer}`, sigma {sigma:.3g}" for layer, sigma in taps)
        protocol = (
            f"Figures are in %, on {self.num_test_images:,} test images. {trained} on {self.num_train_labels:,} "
            f"labelled images in {self.steps:,} steps (seed {self.options['seed']}); the network is read at {places}."
        )
        if self.options.get("latents_dir"):
            protocol += " It learnt from latents that were encoded beforehand, and was also tested on latents."
        names = [name for name in METRICS if getattr(self, f"test_{name}") is not None]
        noises = {"the model's fixed noise": "test", "each image's own": "test_own_noise"}
        rows = [[noise, *(percent(getattr(self, f"{key}_{name}")) for name in names)] for noise, key in noises.items()]
        where = {"layer": self.layer, "sigma": self.sigma, "num_train_labels": self.num_train_labels}
        figures = [Figure(name, f"Test {METRICS[name]}", getattr(self, f"test_{name}"), where) for name in names]
        head = ["noise", *(METRICS[name] for name in names)]
        return Section("Fine-tuning", protocol, head, rows, figures, self.saved_classifier_test_accuracy)


@dataclass(kw_only=True)
class NoisyReport(Report):
    """Classifiers of noisy images.

    Attributes:
        chance: Accuracy of guessing.
        noise_on: What the noise was added to, in words.
        trained_parameters: Number of parameters by classifier.
        test_accuracies: By classifier, one accuracy for each of the options' `sigmas`.
    """

    kind = "noisy_classification"
    telling = ("trained_parameters",)
    pictures = {"accuracy.png": "Accuracy over noise levels"}

    num_train_images: int
    num_test_images: int
    chance: float
    noise_on: str = "images in [-1, 1]"
    trained_parameters: dict[str, int] = many()
    test_accuracies: dict[str, list[float]]

    def section(self) -> Section:
        """Return every classifier's accuracy at every level."""
        rows = [
            [f"{sigma:.3g}", *(percent(values[i]) for values in self.test_accuracies.values())]
            for i, sigma in enumerate(self.options["sigmas"])
        ]
        protocol = f"The table has the accuracy, in %, on {self.num_test_images:,} test images, with noise of level "
        return Section("Noisy images", f"{protocol}sigma on {self.noise_on}.", ["sigma", *self.test_accuracies], rows)


@dataclass(kw_only=True)
class GenerationReport(Report):
    """Generated images against real ones.

    Attributes:
        generator: What made the images: checkpoint, sampling options, weights; or `images_dir`.
        extractor: What made the features: `name`, `width`, and what `evaluation` notes of the network.
        reference: `name`, `source` and `num_images` of the real images.
        results: Figures by set of images (`generated`, and perhaps other real ones), each by name: `num_images`,
            `frechet_distance`, `kernel_distance`, `precision`, `recall`, ...
    """

    kind = "generation"
    file = "generation_results.json"
    telling = ("generator",)
    pictures = {"grid.png": "Generated images beside real ones"}

    generator: dict[str, Any]
    extractor: dict[str, Any]
    reference: dict[str, Any]
    results: dict[str, dict[str, Any]]

    @property
    def features(self) -> str:
        """The extractor's name; of a folder on some machine, only the last part is named."""
        kind, _, source = self.extractor["name"].partition(":")
        return f"{kind}:{source if source.count('/') == 1 else Path(source).name}" if source else kind

    def section(self) -> Section:
        """Return every figure of every set."""
        generator, where = self.generator, {"features": self.features}
        if "num_inference_steps" in generator:
            where["sampler"] = generator["sampler"] or generator["scheduler"]
            where |= {"num_inference_steps": generator["num_inference_steps"], "seed": generator["seed"]}
        metric = "fid" if self.features.startswith("inception") else "frechet_distance"
        figures = []
        if made := self.results.get("generated"):
            where["num_images"] = made["num_images"]
            figures = [Figure(metric, "Frechet distance", made["frechet_distance"], where)]
        hidden = ("kernel_distance_std_over_subsets", "kernel_distance_subset_size")
        names = dict.fromkeys(name for found in self.results.values() for name in found if name not in hidden)
        heads = {"num_images": "number", "kernel_distance": "kernel distance x 1000"}
        head = ["images", *(heads.get(name, name.replace("_", " ").replace("frechet", "Frechet")) for name in names)]
        rows = [[which, *(self._cell(found, name) for name in names)] for which, found in self.results.items()]
        return Section("Generated images", self._protocol(), head, rows, figures)

    def _cell(self, found: Mapping[str, Any], name: str) -> str:
        if name == "kernel_distance":
            deviation = found.get("kernel_distance_std_over_subsets")
            return f"{1000 * found[name]:.3g}" + ("" if deviation is None else f" ± {1000 * deviation:.2g}")
        return f"{found[name]:.3f}" if name in ("precision", "recall") else number(found.get(name))

    def _protocol(self) -> str:
        generator, extractor = self.generator, self.extractor
        tap = f"`{extractor['layer']}` at sigma {extractor['sigma']:.3g}, " if "layer" in extractor else ""
        text = (
            f"Images are compared with {self.reference['num_images']:,} real ones ({self.reference['name']}), by the "
            f"features of `{self.features}` ({tap}{extractor['width']} numbers per image{_weights(extractor)}). "
            "Figures can be compared only on the same features, for as many images and with the same reference."
        )
        if any(found.get("kernel_distance_std_over_subsets") for found in self.results.values()):
            text += " The kernel distance is a mean ± standard deviation over subsets."
        if "num_inference_steps" in generator:
            sampler = generator["sampler"] or generator["scheduler"]
            text += f" The images were sampled by {sampler} in {generator['num_inference_steps']} steps, "
            text += f"with seeds from {generator['seed']}{_weights(generator)}"
            if generator.get("class_label") is not None:
                labels, (made, asked) = generator["class_label"], generator["num_classes"]
                names = ", ".join(map(str, labels)) if isinstance(labels, list) else labels
                few = "" if made == asked else f" (images of the first {made:,} of {asked:,})"
                text += f", of the classes {names}{few}, guidance {generator['guidance_scale']:g}"
            text += "."
        return text


def _weights(made_by: Mapping[str, Any]) -> str:
    return f", weights `{made_by['weights'][:16]}`" if "weights" in made_by else ""
