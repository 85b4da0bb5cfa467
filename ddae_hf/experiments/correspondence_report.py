"""The report of looking up points of images in warped copies of these."""

from __future__ import annotations

from dataclasses import dataclass

from .report import Report, Section, percent


@dataclass(kw_only=True)
class CorrespondenceReport(Report):
    """Points of images that were looked up in warped copies of these.

    Attributes:
        layers: The layers whose maps were compared, in forward order, at noise level `sigma`.
        num_images: Number of images; `num_points` likewise, of all images together.
        results: Figures of every method of looking up points: `pck@N`, the share that was found within N pixels of the
            true place, and `mean_error`, in pixels.
    """

    kind = "correspondence"
    telling = ("num_points",)
    pictures = {"correspondence.png": "Points of images looked up in warped copies, and how far off they are found"}

    layers: list[str]
    sigma: float
    num_images: int
    num_points: int
    results: dict[str, dict[str, float]]

    def section(self) -> Section:
        """Return every method's figures."""
        protocol = (
            f"The table has the share, in %, of {self.num_points:,} points of {self.num_images:,} images that were "
            "found in warped copies of the images, within so many pixels of their true places. The denoiser is read at "
            f"{', '.join(f'`{layer}`' for layer in self.layers)}, sigma {self.sigma:.3g}."
        )
        radii = [name for name in next(iter(self.results.values())) if name.startswith("pck@")]
        head = ["looked up by", *(name.replace("pck@", "within ") for name in radii), "mean error (pixels)"]
        rows = [
            [way, *(percent(found[name]) for name in radii), f"{found['mean_error']:.2f}"]
            for way, found in self.results.items()
        ]
        return Section("Points found again", protocol, head, rows)
