"""The reports of linear probes: of one checkpoint, and over the checkpoints of a training run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .report import Figure, Report, Section, many, number, percent, spread


@dataclass(kw_only=True)
class Pair:
    """A layer at a noise level, and the figures of its probe on held-out training images.

    Attributes:
        layer: The layer, or `pixels`.
        sigma: The noise level.
        validation_accuracy: With the best strength of regularisation.
        l2: That strength; None of probes that are trained online.
        by_l2: Accuracy by strength.
        knn_20: Accuracy by the nearest 20 images; `knn_200` likewise.
        alignment: See `logistic_regression.alignment`; `uniformity` likewise.
    """

    layer: str
    sigma: float
    validation_accuracy: float | None = None
    l2: float | None = None
    by_l2: dict[str, float] = many()
    knn_20: float | None = None
    knn_200: float | None = None
    alignment: float | None = None
    uniformity: float | None = None

    @property
    def words(self) -> str:
        """Layer and level, for tables."""
        return "" if self.layer == "pixels" else f"`{self.layer}`, sigma {self.sigma:.3g}"


@dataclass(kw_only=True)
class Probe:
    """How the probe of the best pair did in tests.

    Attributes:
        best: The pair that was chosen, on held-out training images.
        test_accuracies: By noise seed, fitted on all training images.
        test_f1: Macro F1, with the first noise seed.
        few_label_test_accuracies: By labels a class, one accuracy a draw of them.
        few_label_pairs: By labels a class, the pair of each draw; empty where it is always `best`.
    """

    best: Pair
    test_accuracies: dict[str, float]
    test_f1: float | None = None
    few_label_test_accuracies: dict[str, list[float]] = many()
    few_label_pairs: dict[str, list[Pair]] = many()


@dataclass(kw_only=True)
class ProbeReport(Report, Probe):
    """Linear probes of a frozen network, and of what it is compared with.

    Attributes:
        checkpoint: What was probed.
        images: Numbers of images: `fitted` and `held_out` in choosing, `train` (both, and what was not chosen on) and
            `test`.
        pairs: Every layer at every level.
        baselines: The same of `raw pixels` and of the `untrained network`.
        saved_classifier_test_accuracy: Of the saved classifier, with its fixed noise.
    """

    kind = "linear_probe"
    telling = ("pairs", "results")
    pictures = {
        "heat_map.png": "Accuracy on held-out training images, of every layer at every noise level",
        "confusion.png": "Confusion table of the test images",
    }

    checkpoint: str | None = None
    images: dict[str, int]
    pairs: list[Pair]
    baselines: dict[str, Probe] = many()
    saved_classifier_test_accuracy: float | None = None

    @classmethod
    def upgraded(cls, content: dict[str, Any]) -> dict[str, Any]:
        """Return what `linear_probe.py` of 0.2.0 wrote as a sweep would have written it."""
        content = super().upgraded(content)
        if "results" not in content:
            images = content["images"]
            return content | {"images": {"train": images["fitted"] + images["held_out"]} | images}
        options, results = content["options"], content.pop("results")
        few, noise_seed, train = options["labels_per_class"], str(options["noise_seed"]), content["num_train_images"]
        chosen_on = min(train, options["max_selection_samples"])
        held_out = max(1, chosen_on // 5)
        found = {}
        for name, result in results.items():
            found[name] = {"best": result, "test_accuracies": {noise_seed: result["test_accuracy"]}}
            found[name]["test_f1"] = result.get("test_f1")
            found[name]["few_label_test_accuracies"] = {str(few): result["few_label_test_accuracies"]} if few else {}
        tried = sorted(results["DDAE"].get("tried", [results["DDAE"]]), key=lambda t: t.get("validation_accuracy", 0))
        images = {"fitted": chosen_on - held_out, "held_out": held_out, "train": train}
        return {
            **content,
            **found.pop("DDAE"),
            "pairs": list({(pair["layer"], pair["sigma"]): pair for pair in tried}.values()),
            "images": images | {"test": content["num_test_images"]},
            "baselines": found,
        }

    def section(self) -> Section:
        """Return the best pair's test figures, beside the baselines'."""
        rows = [row for name, probe in {"DDAE": self, **self.baselines}.items() for row in self._rows(name, probe)]
        head = ["features", "tap", "labels", "test accuracy", "macro F1"]
        head += ["gain of DDAE"] * bool(self.baselines)
        seed, value = next(iter(self.test_accuracies.items()))
        where = {"layer": self.best.layer, "sigma": self.best.sigma, "noise_seed": int(seed)}
        figures = [Figure("accuracy", "Test accuracy of a linear probe", value, where)]
        if self.test_f1 is not None:
            figures.append(Figure("f1", "Macro F1 of a linear probe", self.test_f1, where))
        return Section("Linear probe", self._protocol(), head, rows, figures, self.saved_classifier_test_accuracy)

    def _rows(self, name: str, probe: Probe) -> list[list[str]]:
        f1 = "" if probe.test_f1 is None else percent(probe.test_f1)
        scores = [*probe.test_accuracies.values()]
        rows = [[name, probe.best.words, f"all {self.images['train']:,}", spread(scores), f1]]
        own = [[*self.test_accuracies.values()]]
        for count, draws in probe.few_label_test_accuracies.items():
            pairs = probe.few_label_pairs.get(count) or [probe.best]
            words = [pair.words for pair in pairs]
            rows.append([name, max(words, key=words.count), f"{count} a class", spread(draws), ""])
            own.append(self.few_label_test_accuracies.get(count, []))
        if self.baselines:
            others = [scores, *probe.few_label_test_accuracies.values()]
            for row, ours, theirs in zip(rows, own, others, strict=True):
                paired = probe is not self and len(ours) == len(theirs)
                row.append(spread(np.subtract(ours, theirs).tolist()) if paired else "")
        return rows

    def _protocol(self) -> str:
        options, images = self.options, self.images
        probe = options.get("protocol", "logistic_regression").replace("_", " ")
        text = f"Test accuracy in %, {images['test']:,} test images, of linear probes ({probe}) on the frozen network. "
        if len(self.pairs) > 1:
            text += (
                f"The best of {len(self.pairs)} pairs of layer and noise level was chosen on {images['held_out']:,} "
                f"held-out training images (seed {options['seed']}) after fitting on {images['fitted']:,}, and fitted "
                f"again on all {images['train']:,}."
            )
        else:
            chosen = f"; its regularisation was chosen on {images['held_out']:,} of them that were held out (seed "
            regularised = probe == "logistic regression"
            text += f"It was fitted on {images['train']:,} training images"
            text += f"{chosen}{options['seed']})." if regularised else "."
        if options.get("latents_dir"):
            text += " Images were given by their latents, encoded beforehand."
        if options.get("num_views", 1) > 1:
            changes = ["mirrored"] * options["random_flip"] + ["cropped"] * (options["random_crop"] > 0)
            others = f", the others {' and '.join(changes)} at random" if changes else ""
            text += f" Each image came in {options['num_views']} views, the first as it is{others}"
            text += "; those of test images are averaged over."
        if options.get("num_noise_samples", 1) > 1:
            text += f" Features are averaged over {options['num_noise_samples']} draws of noise an image."
        spreads = [f"{len(self.test_accuracies)} noise seeds"] * (len(self.test_accuracies) > 1)
        draws = max(map(len, self.few_label_test_accuracies.values()), default=0)
        spreads += [f"{draws} draws of few labels"] * (draws > 1)
        if spreads:
            text += f" Mean ± standard deviation over {', or '.join(spreads)}."
        if draws and len(self.pairs) > 1:
            chosen = "with the few labels alone" if self.few_label_pairs else "with all labels"
            text += f" Where labels are few, layer and noise level were chosen {chosen}."
        return text


@dataclass(kw_only=True)
class Point(Pair):
    """A checkpoint of a training run: its best pair, and what else was measured of it."""

    step: int
    test_accuracy: float
    test_loss: float | None = None
    frechet_distance: float | None = None


@dataclass(kw_only=True)
class CurveReport(Report):
    """Probes, loss and samples over the checkpoints of a training run."""

    kind = "training_curve"
    file = "training_curve.json"
    telling = ("points",)
    pictures = {"training_curve.png": "Accuracy, loss and samples over a training run"}

    points: list[Point]

    def section(self) -> Section:
        """Return every checkpoint's figures."""
        rows = [
            [f"{p.step:,}", p.words, percent(p.test_accuracy), number(p.test_loss), number(p.frechet_distance)]
            for p in self.points
        ]
        head = ["step", "tap", "test accuracy", "loss on test images", "Frechet distance"]
        protocol = "Of every checkpoint of a training run: the best pair's probe, test accuracy in %."
        return Section("While training", protocol, head, rows)
