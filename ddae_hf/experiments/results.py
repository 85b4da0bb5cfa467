"""Results: what every experiment found, as a dataclass that is written as JSON, printed as a table and put on a card.

| report | file | of |
|---|---|---|
| `PretrainingReport` | `train_results.json` | pretraining a denoiser |
| `VAEReport` | `train_results.json` | training a VAE |
| `ProbeReport` | `eval_results.json` | linear probes: one, or a sweep over layers and noise levels |
| `CurveReport` | `training_curve.json` | probes, loss and samples over a training run |
| `FineTuningReport` | `eval_results.json` | fine-tuning |
| `NoisyReport` | `eval_results.json` | classifying noisy images |
| `GenerationReport` | `generation_results.json` | generated images against real ones |

Files of versions 0.1.0 and 0.2.0 are read into the same classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .probe_results import CurveReport, Pair, Point, Probe, ProbeReport
from .report import Figure, Report, Section, many, number, percent, read_mapping

__all__ = [
    "CurveReport",
    "FineTuningReport",
    "GenerationReport",
    "NoisyReport",
    "Pair",
    "Point",
    "PretrainingReport",
    "Probe",
    "ProbeReport",
    "Report",
    "VAEReport",
    "read_reports",
]


@dataclass(kw_only=True)
class PretrainingReport(Report):
    """A denoiser's training; its options are in `training_options.yaml`, beside it."""

    kind = "pretraining"
    file = "train_results.json"
    telling = ("steps",)

    steps: int | None = None
    loss_last_100_batches: float | None = None
    images: int | None = None
    images_this_run: int | None = None
    parameters: int | None = None
    latents: dict[str, Any] = many()

    def complete(self) -> None:
        """Read the options."""
        path = Path(self.folder or "") / "training_options.yaml"
        if not self.options and path.is_file():
            self.options = read_mapping(path)
        super().complete()

    def to_dict(self) -> dict[str, Any]:
        """Return what the file holds, which is all but the options."""
        return {name: value for name, value in super().to_dict().items() if name != "options"}

    def section(self) -> Section:
        """Return how long it took and what loss it ended at."""
        names = ("steps", "images", "loss_last_100_batches", "parameters", "seconds", "images_per_second")
        return Section("Pretraining", "A denoiser was trained.", ["fact", "value"], _facts(self, names))


@dataclass(kw_only=True)
class VAEReport(PretrainingReport):
    """A VAE's training.

    Attributes:
        held_out: `psnr` (dB), `kl_nats_per_image`, `latent_mean`, `latent_std` and `num_images` of held-out images.
        scaling_factor: What latents are multiplied by.
    """

    kind = "vae"
    telling = ("scaling_factor",)

    held_out: dict[str, float]
    scaling_factor: float

    def section(self) -> Section:
        """Return what it does to held-out images."""
        names = ("steps", "images", "loss_last_100_batches", "scaling_factor", "parameters", "seconds")
        rows = [[f"held out: {name}", number(value)] for name, value in self.held_out.items()]
        return Section("VAE", "An autoencoder was trained.", ["fact", "value"], rows + _facts(self, names))


@dataclass(kw_only=True)
class FineTuningReport(Report):
    """A denoiser and a linear classifier that were trained as one network.

    Attributes:
        layer: Where the network is read.
        sigma: At which noise level.
        num_train_labels: Number of labelled images that it learnt from.
        num_test_images: Number of images that it was tested on.
        test_accuracy: With the model's fixed noise; as are loss, macro F1, precision and recall.
        test_own_noise_accuracy: With noise of each image's own, likewise.
        saved_classifier_test_accuracy: On pixels, where it learnt from latents.
        train_seconds: Of training alone, all runs together.
    """

    kind = "fine_tuning"
    telling = ("test_own_noise_accuracy",)

    layer: str
    sigma: float
    num_train_labels: int
    num_test_images: int
    steps: int
    images: int | None = None
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
        protocol = (
            f"In %, {self.num_test_images:,} test images. The whole network was trained from {start} weights on "
            f"{self.num_train_labels:,} labelled images in {self.steps:,} steps (seed {self.options['seed']}); it is "
            f"read at `{self.layer}`, sigma {self.sigma:.3g}."
        )
        if self.options.get("latents_dir"):
            protocol += " It learnt from latents that were encoded before, which are also what these figures are of."
        values = {f"{key}_{n}": getattr(self, f"{key}_{n}") for key in ("test", "test_own_noise") for n in METRICS}
        names = [name for name in METRICS if values[f"test_{name}"] is not None]
        rows = [
            [noise, *("" if (v := values[f"{key}_{name}"]) is None else percent(v) for name in names)]
            for noise, key in (("the model's fixed noise", "test"), ("each image's own", "test_own_noise"))
        ]
        where = {"layer": self.layer, "sigma": self.sigma, "num_train_labels": self.num_train_labels}
        titles = [name.replace("f1", "macro F1") for name in names]
        figures = [
            Figure(name, f"Test {title}", values[f"test_{name}"], where)
            for name, title in zip(names, titles, strict=True)
        ]
        saved = self.saved_classifier_test_accuracy
        return Section("Fine-tuning", protocol, ["noise", *titles], rows, figures, saved)


METRICS = ("accuracy", "f1", "precision", "recall")  # of a classifier


@dataclass(kw_only=True)
class NoisyReport(Report):
    """Classifiers of noisy images.

    Attributes:
        num_train_images: Number of training images; `num_test_images` likewise.
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
        protocol = (
            f"Test accuracy in %, {self.num_test_images:,} test images under noise of level sigma on {self.noise_on}."
        )
        return Section("Noisy images", protocol, ["sigma", *self.test_accuracies], rows)


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
        """The extractor's name; one in a folder of some machine is known by its last part."""
        kind, _, source = self.extractor["name"].partition(":")
        return f"{kind}:{source if source.count('/') == 1 else Path(source).name}" if source else kind

    def section(self) -> Section:
        """Return every figure of every set."""
        generator, where = self.generator, {"features": self.features}
        if "num_inference_steps" in generator:
            where["sampler"] = generator["sampler"] or generator["scheduler"]
            where |= {"num_inference_steps": generator["num_inference_steps"], "seed": generator["seed"]}
        metric = "fid" if self.features.startswith("inception") else "frechet_distance"
        figures = [
            Figure(metric, "Frechet distance", found["frechet_distance"], where | {"num_images": found["num_images"]})
            for name, found in self.results.items()
            if name == "generated"
        ]
        hidden = ("kernel_distance_std_over_subsets", "kernel_distance_subset_size")
        names = dict.fromkeys(name for found in self.results.values() for name in found if name not in hidden)
        head = ["images", *(GENERATION_HEADS.get(name, name.replace("_", " ")) for name in names)]
        rows = [[which, *(self._cell(found, name) for name in names)] for which, found in self.results.items()]
        return Section("Generated images", self._protocol(), head, rows, figures)

    def _cell(self, found: Mapping[str, Any], name: str) -> str:
        if name == "kernel_distance":
            deviation = found.get("kernel_distance_std_over_subsets")
            return f"{1000 * found[name]:.3g}" + ("" if deviation is None else f" ± {1000 * deviation:.2g}")
        return f"{found[name]:.3f}" if name in ("precision", "recall") else number(found.get(name))

    def _protocol(self) -> str:
        generator, extractor, reference = self.generator, self.extractor, self.reference
        tap = f"`{extractor['layer']}` at sigma {extractor['sigma']:.3g}, " if "layer" in extractor else ""
        text = (
            f"Against {reference['num_images']:,} real images ({reference['name']}), on the features of "
            f"`{self.features}` ({tap}{extractor['width']} numbers an image{_weights(extractor)}). Figures compare "
            "only on the same features, for as many images and against the same reference."
        )
        if any(found.get("kernel_distance_std_over_subsets") for found in self.results.values()):
            text += " The kernel distance is a mean ± standard deviation over subsets."
        if "num_inference_steps" in generator:
            sampler = generator["sampler"] or generator["scheduler"]
            text += f" Sampled by {sampler} in {generator['num_inference_steps']} steps, seeds from {generator['seed']}"
            text += _weights(generator)
            if generator.get("class_label") is not None:
                labels, (made, asked) = generator["class_label"], generator["num_classes"]
                names = ", ".join(map(str, labels)) if isinstance(labels, list) else labels
                few = "" if made == asked else f" (images of the first {made:,} of {asked:,})"
                text += f", of the classes {names}{few}, guidance {generator['guidance_scale']:g}"
            text += "."
        return text


GENERATION_HEADS = {
    "num_images": "number",
    "frechet_distance": "Frechet distance",
    "kernel_distance": "kernel distance x 1000",
}


def read_reports(folders: Iterable[Path]) -> tuple[PretrainingReport | None, list[Report]]:
    """Return the pretraining, of the first folder that has it, and every evaluation and fine-tuning.

    Raises:
        ValueError: A file that cannot be read, or that none of this project's experiments wrote.
    """
    training: PretrainingReport | None = None
    reports: list[Report] = []
    for folder in folders:
        if training is None and (folder / PretrainingReport.file).is_file():
            training = PretrainingReport.read(folder / PretrainingReport.file)
        for name in dict.fromkeys(kind.file for kind in Report.kinds if not issubclass(kind, PretrainingReport)):
            if (folder / name).is_file():
                report = Report.read(folder / name)
                if report not in reports:  # a copy beside another checkpoint is no second run
                    reports.append(report)
    return training, reports


def _facts(report: Report, names: Iterable[str]) -> list[list[str]]:
    values = ((name, getattr(report, name)) for name in names)
    return [[name.replace("_", " "), number(value)] for name, value in values if value is not None]


def _weights(made_by: Mapping[str, Any]) -> str:
    """Return which weights made images or features, in words."""
    return f", weights `{made_by['weights'][:16]}`" if "weights" in made_by else ""
