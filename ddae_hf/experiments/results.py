"""What runs left behind: the files of a training or an evaluation, read into tables and figures.

- `train_results.json`, `training_options.yaml`, `samples/step-*.png`: pretraining.
- `eval_results.json`: a linear probe, a sweep or fine-tuning; `heat_map.png`, `confusion.png` beside it.
- `generation_results.json`, `grid.png`: generated images against real ones.

Nothing is computed here but means and spreads of what a file lists.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

# How each script's results are told from the others': the file, and a key that only they have.
KINDS = {
    "linear_probe": ("eval_results.json", "results"),
    "sweep": ("eval_results.json", "pairs"),
    "fine_tuning": ("eval_results.json", "test_own_noise_accuracy"),
    "generation": ("generation_results.json", "generator"),
}
PICTURES = {
    "heat_map.png": "Accuracy on held-out training images, of every layer at every noise level",
    "confusion.png": "Confusion table of the test images",
    "grid.png": "Generated images beside real ones",
}
# Options that say where things are and how a run is watched, not how a network is trained.
PLUMBING = re.compile(
    "dataset_|image_column|label_column|train_data_dir|latents_dir|output_dir|cache_dir|logging_dir|model_name|config$|vae$|init_from"
    "|.*checkpoint|sampl|num_sampl|num_inference_steps|report_to|dataloader_|hub_|push_to|license|streaming|shuffle_|.*_split|.*seconds"
)


@dataclass
class Run:
    """One file of results, and what was beside it."""

    kind: str
    report: dict[str, Any]
    options: dict[str, Any]
    folder: Path

    @property
    def dataset(self) -> dict[str, Any]:
        """What is known of the data: `name`, `id` on the Hub, `config`, `train_split`, `test_split`, `num_images`.

        A path on some machine is known by its last part alone.
        """
        known = {name: self.options.get(name) for name in ("train_split", "test_split")}
        known["config"] = self.options.get("dataset_config_name")
        known |= self.report.get("dataset", {})
        source = known.get("id") or self.options.get("dataset_name") or self.options.get("train_data_dir")
        if not known.get("name") and source:
            known["name"] = Path(source).name
        return {name: value for name, value in known.items() if value is not None}

    @property
    def pictures(self) -> dict[Path, str]:
        """The run's pictures, and what they show."""
        return {self.folder / name: text for name, text in PICTURES.items() if (self.folder / name).is_file()}

    @cached_property
    def summary(self) -> Summary:
        """The figures of an evaluation or a fine-tuning, or `ValueError` if its report lacks what its script writes."""
        try:
            return _SUMMARIES[self.kind](self.report, self.options)
        except KeyError as error:
            file = self.folder / KINDS[self.kind][0]
            raise ValueError(f"{file} lacks {error}: run the script that wrote it again.") from error


@dataclass
class Figure:
    """A number that a run measured."""

    metric: str  # its id on the Hub
    name: str
    value: float  # as in the file: accuracies are fractions
    conditions: dict[str, Any]


@dataclass
class Summary:
    """A run's figures: how they were measured, all of them as a table, and the main ones."""

    title: str
    protocol: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    figures: list[Figure]
    # The classifier that was saved with the run, as its users load it.
    saved: float | None = None


def _read(path: Path) -> dict[str, Any]:
    load: Callable[[str], Any] = json.loads if path.suffix == ".json" else yaml.safe_load
    try:
        content = load(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"{path} cannot be read: {error}. Run the script that wrote it again, or remove it."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}: it must hold names and values.")
    return content


def read_runs(folders: Iterable[Path]) -> tuple[Run | None, list[Run]]:
    """Return the pretraining, of the first folder that has it, and every evaluation and fine-tuning.

    Raises:
        ValueError: A file that cannot be read, or whose results none of this project's scripts wrote.
    """
    training: Run | None = None
    runs: list[Run] = []
    for folder in folders:
        if training is None and (path := folder / "train_results.json").is_file():
            options = folder / "training_options.yaml"
            training = Run("pretraining", _read(path), _read(options) if options.is_file() else {}, folder)
        for name in sorted({name for name, _ in KINDS.values()}):
            if not (path := folder / name).is_file():
                continue
            report = _read(path)
            kind = next((kind for kind, (file, key) in KINDS.items() if file == name and key in report), None)
            if kind is None or "options" not in report:
                raise ValueError(
                    f"{path} holds {', '.join(report) or 'nothing'}: allowed are the results of linear_probe.py, "
                    "sweep.py, finetune.py and evaluate_generation.py. Remove it, or name another folder."
                )
            if all(report != known.report for known in runs):  # a copy beside another checkpoint is no second run
                runs.append(Run(kind, report, report["options"], folder))
    return training, runs


def percent(value: float) -> str:
    """Return a fraction in percent, with two decimals."""
    return f"{100 * value:.2f}"


def spread(values: Sequence[float], of_mean: bool = False) -> str:
    """Return mean and standard deviation (or standard error of the mean) in percent; of one value that value."""
    if len(values) == 1:
        return percent(values[0])
    error = np.std(values, ddof=1) / (len(values) ** 0.5 if of_mean else 1)
    return f"{percent(float(np.mean(values)))} ± {percent(float(error))}"


def _tap(row: Mapping[str, Any]) -> str:
    return "" if row["layer"] == "pixels" else f"`{row['layer']}`, sigma {row['sigma']:.3g}"


def _linear_probe(report: dict[str, Any], options: dict[str, Any]) -> Summary:
    results, per_class = report["results"], options["labels_per_class"]
    chosen_on = min(report["num_train_images"], options["max_selection_samples"])
    protocol = (
        f"Test accuracy in %, {report['num_test_images']:,} test images. Logistic regression on pooled hidden states "
        f"of the frozen network, each image with noise of its own (noise seed {options['noise_seed']}, draws an image: "
        f"{options['num_noise_samples']}). Layer, noise level and strength of regularisation were chosen on a fifth of "
        f"{chosen_on:,} training images (seed {options['seed']}), never on test images."
    )
    head = ["features", "tap", f"all {report['num_train_images']:,} labels"]
    if per_class:
        protocol += f" With few labels: mean and standard error over {options['num_draws']} draws of them."
        head.append(f"{per_class} label{'' if per_class == 1 else 's'} a class")
    scored = "test_f1" in results["DDAE"]
    head += ["macro F1"] * scored
    rows = []
    for name, result in results.items():
        row = [name, _tap(result), percent(result["test_accuracy"])]
        row += [spread(result["few_label_test_accuracies"], of_mean=True)] if per_class else []
        rows.append(row + ([percent(result["test_f1"])] if scored else []))
    best = results["DDAE"]
    where = {"layer": best["layer"], "sigma": best["sigma"], "noise_seed": options["noise_seed"]}
    figures = [Figure("accuracy", "Test accuracy of a linear probe", best["test_accuracy"], where)]
    figures += [Figure("f1", "Macro F1 of a linear probe", best["test_f1"], where)] if scored else []
    return Summary("Linear probe", protocol, head, rows, figures, report["saved_classifier_test_accuracy"])


def _sweep(report: dict[str, Any], options: dict[str, Any]) -> Summary:
    best, images, accuracies = report["best"], report["images"], report["test_accuracies"]
    probe = options["protocol"].replace("_", " ")
    protocol = (
        f"Test accuracy in %, {images['test']:,} test images, of linear probes ({probe}) on the frozen "
        f"network. The best of {len(report['pairs'])} pairs of layer and noise level was chosen on "
        f"{images['held_out']:,} held-out training images (seed {options['seed']}) after fitting on "
        f"{images['fitted']:,}, and fitted again on all {images.get('train', images['fitted'] + images['held_out']):,}."
    )
    if options.get("latents_dir"):
        protocol += " Images were given by their latents, encoded beforehand."
    if options["num_views"] > 1:
        changes = ["mirrored"] * options["random_flip"] + ["cropped"] * (options["random_crop"] > 0)
        others = f", the others {' and '.join(changes)} at random" if changes else ""
        protocol += f" Each image came in {options['num_views']} views, the first as it is{others}"
        protocol += "; those of test images are averaged over."
    if report["few_label_test_accuracies"]:
        protocol += f" With few labels: mean and standard deviation over {options['num_draws']} draws of them."
    rows = [[f"noise seed {seed}", _tap(best), percent(value)] for seed, value in accuracies.items()]
    for count, values in report["few_label_test_accuracies"].items():
        rows.append([f"{count} label{'' if int(count) == 1 else 's'} a class", _tap(best), spread(values)])
    seed, value = next(iter(accuracies.items()))
    where = {"layer": best["layer"], "sigma": best["sigma"], "noise_seed": int(seed)}
    figures = [Figure("accuracy", "Test accuracy of the best pair's linear probe", value, where)]
    if "test_f1" in report:
        figures.append(Figure("f1", "Macro F1 of the best pair's linear probe", report["test_f1"], where))
        rows.append([f"macro F1, noise seed {seed}", _tap(best), percent(report["test_f1"])])
    title, saved = "Layers and noise levels", report["saved_classifier_test_accuracy"]
    return Summary(title, protocol, ["the best pair", "tap", "accuracy"], rows, figures, saved)


def _fine_tuning(report: dict[str, Any], options: dict[str, Any]) -> Summary:
    start = "random" if options["from_scratch"] else "pretrained"
    protocol = (
        f"In %, {report['num_test_images']:,} test images. The whole network was trained from {start} weights on "
        f"{report['num_train_labels']:,} labelled images in {report['steps']:,} steps (seed {options['seed']}); it is "
        f"read at {_tap(report)}."
    )
    if options.get("latents_dir"):
        protocol += " It learnt from latents that were encoded before, which are also what these figures are of."
    names = [name for name in ("accuracy", "f1", "precision", "recall") if f"test_{name}" in report]
    rows = []
    for noise, key in (("the model's fixed noise", "test"), ("each image's own", "test_own_noise")):
        values = (report.get(f"{key}_{name}") for name in names)
        rows.append([noise, *("" if value is None else percent(value) for value in values)])
    where = {"layer": report["layer"], "sigma": report["sigma"], "num_train_labels": report["num_train_labels"]}
    figures = [Figure(name, f"Test {name.replace('f1', 'macro F1')}", report[f"test_{name}"], where) for name in names]
    head = ["noise", *(name.replace("f1", "macro F1") for name in names)]
    return Summary("Fine-tuning", protocol, head, rows, figures, report.get("saved_classifier_test_accuracy"))


def _generation(report: dict[str, Any], options: dict[str, Any]) -> Summary:
    generator, extractor, reference = report["generator"], report["extractor"], report["reference"]
    # An extractor may be a folder of some machine.
    kind, _, source = extractor["name"].partition(":")
    features = f"{kind}:{source if source.count('/') == 1 else Path(source).name}" if source else kind
    where = {"features": features}
    protocol = (
        f"Against {reference['num_images']:,} real images ({reference['name']}), on the features of `{features}`, "
        f"{extractor['width']} numbers an image. Figures compare only on the same features, for as many images and "
        "against the same reference."
    )
    if "num_inference_steps" in generator:
        sampler = generator["sampler"] or generator["scheduler"]
        steps = generator["num_inference_steps"]
        where |= {"sampler": sampler, "num_inference_steps": steps, "seed": generator["seed"]}
        protocol += f" Sampled by {sampler} in {steps} steps, seeds from {generator['seed']}."
    metric = "fid" if kind.startswith("inception") else "frechet_distance"
    rows, figures = [], []
    for name, r in report["results"].items():
        distances = [f"{r['frechet_distance']:.4g}", f"{1000 * r['kernel_distance']:.3g}"]
        rows.append([name, f"{r['num_images']:,}", *distances, f"{r['precision']:.3f}", f"{r['recall']:.3f}"])
        if name == "generated":
            conditions = where | {"num_images": r["num_images"]}
            figures.append(Figure(metric, "Frechet distance", r["frechet_distance"], conditions))
    head = ["images", "number", "Frechet distance", "kernel distance x 1000", "precision", "recall"]
    return Summary("Generated images", protocol, head, rows, figures)


_SUMMARIES = {"linear_probe": _linear_probe, "sweep": _sweep, "fine_tuning": _fine_tuning, "generation": _generation}


def option_rows(options: Mapping[str, Any], prefix: str = "") -> list[list[str]]:
    """Return the options that a training depends on, without those that are off; nested ones by dotted names."""
    rows = []
    for name, value in options.items():
        off = value is None or value is False or (isinstance(value, float) and value == 0)
        without_effect = (name == "num_train_epochs" and options.get("max_train_steps")) or (
            name == "label_dropout" and not options.get("class_conditional")
        )
        if off or without_effect or (not prefix and PLUMBING.match(name)):
            continue
        if isinstance(value, Mapping):
            rows += option_rows(value, f"{prefix}{name}.")
        else:
            rows.append([f"`{prefix}{name}`", f"`{value if isinstance(value, str) else json.dumps(value)}`"])
    return rows


def environment_rows(runs: Iterable[Run]) -> list[list[str]]:
    """Return what runs say of the machine, the time and the versions."""
    rows = []
    for run in runs:
        title = "pretraining" if run.kind == "pretraining" else run.summary.title.lower()
        report = run.report
        seconds = report.get("seconds", report.get("seconds_this_run"))
        if isinstance(seconds, Mapping):
            seconds = seconds.get("in_all")
        last = "" if "seconds" in report else " (its last run)"
        found = {
            "hardware": report.get("hardware") or report.get("device"),
            "processes": report.get("processes"),
            "threads": report.get("threads"),
            "time": None if seconds is None else f"{seconds:,.0f} s, {seconds / 3600:.2f} h{last}",
            "images/s": report.get("images_per_second"),
            "versions": report.get("versions") or {name: report[name] for name in ("torch",) if name in report},
        }
        rows += [[title, name, words] for name, value in found.items() if (words := _words(value))]
    return rows


def _words(value: Any) -> str:
    """Return a value of a file as text, names and values of a mapping one after the other."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_words(inner)}" for name, inner in value.items())
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
