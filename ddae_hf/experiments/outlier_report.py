"""The report of telling images of other data sets from those that a denoiser knows, by several scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .outlier_scores import RESAMPLES, Separation
from .report import Report, Section, percent


@dataclass(kw_only=True)
class OutlierReport(Report):
    """Scores of images of the known data set, and of images of others.

    Attributes:
        layer: Where features were read, at noise level `sigma`; none where no score is made of them.
        num_features: Their number.
        num_train_images: Images whose features the others' were compared with.
        num_images: Known images that were scored, none of which is among these.
        outside: By name, each of the other data sets: `num_images`, `split` and where it came from.
        separations: By score and by the other data set, how well the one tells the other from known images.
    """

    kind = "outlier_detection"
    telling = ("separations",)
    pictures = {"scores.png": "Scores of known images and of others"}

    layer: str | None = None
    sigma: float | None = None
    num_features: int | None = None
    num_train_images: int | None = None
    num_images: int
    outside: dict[str, dict[str, Any]]
    separations: dict[str, dict[str, Separation]]

    def section(self) -> Section:
        """Return every score's figures of every other data set."""
        rows = [
            [name, score, _cell(found.auroc, found.auroc_interval), _cell(found.fpr95, found.fpr95_interval)]
            for name in self.outside
            for score, found in ((score, found[name]) for score, found in self.separations.items())
        ]
        head = ["outside images", "score", "AUROC", "FPR at 95 % TPR"]
        return Section("Out-of-distribution detection", self._protocol(), head, rows)

    def _protocol(self) -> str:
        options = self.options
        others = ", ".join(f"{found['num_images']:,} of {name}" for name, found in self.outside.items())
        text = (
            f"Scores, of which a higher one says that an image is from elsewhere, of {self.num_images:,} known images "
            f"and of {others}. AUROC is the share, in %, of pairs of images in which the outside one has the higher "
            "score: 50 is chance, and below it the score takes outside images for the more familiar ones. The other "
            "column is the share, in %, of outside images that are taken for known where 95 % of the known ones are. "
            f"In brackets are 95 % intervals, over {RESAMPLES:,} bootstrap resamples of images (seed "
            f"{options['seed']})."
        )
        if "error" in options["scores"]:
            text += (
                " The denoising error is the mean square of the network's answer less its target, as in training, "
                f"over {options['num_draws']} draws of noise for each image (noise seed {options['noise_seed']})."
            )
        if self.layer is not None:
            text += (
                f" Distances are between {self.num_features:,} features at `{self.layer}`, sigma {self.sigma:.3g}, "
                f"and those of {self.num_train_images:,} training images."
            )
        return text


def _cell(value: float, interval: list[float]) -> str:
    low, high = interval
    return f"{percent(value)} ({percent(low)} to {percent(high)})"
