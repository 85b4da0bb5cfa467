"""The report of a head that gives every pixel a class, beside what it is compared with."""

from __future__ import annotations

from dataclasses import dataclass

from .report import Figure, Report, Section, many, percent

DENOISER = "DDAE"  # what the scores of the saved head stand under


@dataclass(kw_only=True)
class MaskScores:
    """How well maps of classes agree with the masks of all test images together.

    Attributes:
        mean_iou: Mean over classes of the intersection over union, of one confusion matrix of all test pixels. Classes
            that neither a mask nor a map has are left out.
        pixel_accuracy: Share of pixels of the right class.
        iou: That of each class, by its name; None for those that are left out.
        trained: Numbers that were trained.
    """

    mean_iou: float
    pixel_accuracy: float
    iou: dict[str, float | None]
    trained: int


@dataclass(kw_only=True)
class SegmentationReport(Report):
    """A head on feature maps that gives every pixel a class.

    Attributes:
        layers: Whose maps it reads, in forward order, at noise level `sigma`.
        classes: The names of the classes.
        num_train_images: Number of images with masks that it was trained on; `num_test_images` likewise.
        steps: Of training; `images` that were gone through in them, and `loss_last_100_batches`, are of it, too.
        scores: The head's, as `DDAE`, and those of what it is compared with.
    """

    kind = "segmentation"
    telling = ("scores",)
    pictures = {"masks.png": "Test images, their masks, and the classes that were found"}

    layers: list[str]
    sigma: float
    classes: list[str]
    num_train_images: int
    num_test_images: int
    steps: int
    images: int | None = None
    images_this_run: int | None = None
    loss_last_100_batches: float | None = None
    scores: dict[str, MaskScores] = many()

    def section(self) -> Section:
        """Return the scores of all that were trained, and the IoU of each class."""
        shown = self.classes if len(self.classes) <= 20 else []
        rows = [
            [
                name,
                percent(found.mean_iou),
                percent(found.pixel_accuracy),
                *(percent(found.iou[each]) for each in shown),
            ]
            for name, found in self.scores.items()
        ]
        where = {"layers": self.layers, "sigma": self.sigma}
        own = self.scores[DENOISER]
        figures = [
            Figure("mean_iou", "Mean IoU of all test pixels", own.mean_iou, where),
            Figure("pixel_accuracy", "Share of pixels of the right class", own.pixel_accuracy, where),
        ]
        head = ["features", "mean IoU", "pixels right", *(f"IoU of {name}" for name in shown)]
        return Section("Masks", self._protocol(), head, rows, figures)

    def _protocol(self) -> str:
        options = self.options
        start = "random" if options.get("from_scratch") else "pretrained"
        trained = f"A linear head was trained on the frozen network of {start} weights"
        if not options.get("freeze_denoiser", True):
            trained = f"A linear head and the network were trained from {start} weights"
        text = (
            f"Figures are in %, of all pixels of {self.num_test_images:,} test images together. {trained}, on "
            f"{self.num_train_images:,} images with masks in {self.steps:,} steps (seed {options['seed']}); it reads "
            f"{', '.join(f'`{layer}`' for layer in self.layers)} at sigma {self.sigma:.3g}."
        )
        if len(self.scores) > 1:
            text += " The others were trained in the same way: the same head on the network with random weights, and "
            text += "on clean pixels, alone and in patches."
        return text
