"""The pictures of figures, as objects of matplotlib: a notebook shows them, and no window or backend is needed."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image as PILImage
from torch import Tensor

from ..image_values import as_rgb
from .arrays import written_whole
from .calibration import BINS, reliability
from .pairs import Pair, Point
from .report import accuracy_interval


class Picture(Figure):
    """A figure that a notebook shows, also where nobody has told matplotlib that it is in one."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()


def save_picture(picture: Figure | PILImage.Image, path: Path, **options: Any) -> None:
    """Write a figure or an image as a PNG file, complete or not at all; `options` are those of `Figure.savefig`."""
    with written_whole(path) as partial:
        if isinstance(picture, Figure):
            picture.savefig(partial, format="png", **options)
        else:
            picture.save(partial, format="PNG")


def heat_map(pairs: Sequence[Pair], best: Pair) -> Figure:
    """Return a picture of validation accuracy over layers and noise levels, the best pair framed."""
    accuracy = _accuracies(pairs)
    layers, sigmas = (list(dict.fromkeys(names)) for names in zip(*accuracy, strict=True))
    table = np.array([[accuracy[layer, sigma] for sigma in sigmas] for layer in layers])
    size = (max(6.0, 2.8 + 0.72 * len(sigmas)), max(2.4, 1.4 + 0.36 * len(layers)))
    figure = Picture(figsize=size, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(table, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(sigmas)), [f"{sigma:g}" for sigma in sigmas])
    axes.set_yticks(range(len(layers)), layers)
    middle = (table.min() + table.max()) / 2
    for (i, j), value in np.ndenumerate(table):
        colour = "black" if value > middle else "white"
        axes.text(j, i, f"{value:.1f}", ha="center", va="center", fontsize=9, color=colour)
    corner = (sigmas.index(best.sigma) - 0.5, layers.index(best.layer) - 0.5)
    axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="crimson", linewidth=2.5))
    axes.set(xlabel="noise level sigma", ylabel="layer")
    figure.suptitle("Linear probe: accuracy on held-out images (%)")
    figure.colorbar(image, ax=axes, pad=0.02)
    return figure


def accuracy_over_sigma(pairs: Sequence[Pair], best: Pair, num_images: int) -> Figure:
    """Return a picture of validation accuracy over noise levels, of the best layer of each and of the best pair's.

    The best pair's layer has its 95 % intervals, for an accuracy that was measured on `num_images` images.
    """
    accuracy = _accuracies(pairs)
    sigmas = sorted({sigma for _, sigma in accuracy})
    highest = [max(accuracy[key] for key in accuracy if key[1] == sigma) for sigma in sigmas]
    own = np.array([accuracy[best.layer, sigma] for sigma in sigmas])
    ends = 100 * np.array([accuracy_interval(value / 100, num_images) for value in own]).T
    name = f"{best.layer}, with 95 % intervals"
    return curves(
        sigmas, {"best layer of each level": highest, name: own}, errors={name: np.abs(ends - own)},
        title="Linear probe", xlabel="noise level sigma", ylabel="accuracy on held-out images (%)",
    )  # fmt: skip


def _accuracies(pairs: Sequence[Pair]) -> dict[tuple[str, float], float]:
    return {(pair.layer, pair.sigma): 100 * (pair.validation_accuracy or 0.0) for pair in pairs}


def confusion_table(labels: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> Figure:
    """Return a picture of true classes, the rows, by predicted ones, in percent of the row."""
    from sklearn.metrics import ConfusionMatrixDisplay

    side = max(5.0, 0.6 * min(len(names), 40))
    figure = Picture(figsize=(side, side))
    axes = figure.subplots()
    ConfusionMatrixDisplay.from_predictions(
        labels, predicted, labels=np.arange(len(names)), display_labels=names, normalize="true", ax=axes, cmap="Blues",
        include_values=len(names) <= 20, values_format=".0%", xticks_rotation="vertical", colorbar=False,
    )  # fmt: skip
    axes.set(xlabel="Predicted", ylabel="True", title=f"Test accuracy {(labels == predicted).mean():.1%}")
    return figure


def reliability_diagram(logits: Tensor, labels: np.ndarray, temperature: float | None = None) -> Figure:
    """Return a picture of accuracy over confidence in bins, with 95 % intervals, above the images of each bin.

    It shows logits (N, K) as they are and, if a temperature is given, divided by it; labels are (N,).
    """
    shown = {"as it is": reliability(logits, labels)}
    if temperature is not None:
        shown[f"at temperature {temperature:.3g}"] = reliability(logits / temperature, labels)
    figure = Picture(figsize=(5, 5.5), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True, height_ratios=[3, 1])
    upper.plot([0, 100], [0, 100], color="grey", linewidth=1)
    edges = np.linspace(0, 100, BINS + 1)
    for (name, bins), marker, line in zip(shown.items(), "os", ("-", "--"), strict=False):
        some = bins.count > 0
        confidence, accuracy, count = 100 * bins.confidence[some], 100 * bins.accuracy[some], bins.count[some]
        ends = 100 * np.array([accuracy_interval(*each) for each in zip(bins.accuracy[some], count, strict=True)]).T
        label = f"{name}: calibration error {100 * bins.error:.2f} %"
        upper.errorbar(confidence, accuracy, np.abs(ends - accuracy), fmt=marker, capsize=3, label=label)
        lower.stairs(bins.count, edges, linestyle=line, linewidth=1.5)
    upper.set(title="Linear probe on test images", ylabel="accuracy (%)", xlim=(0, 102), ylim=(0, 102))
    lower.set(xlabel="confidence (%)", ylabel="images", yscale="log")
    upper.grid(alpha=0.3)
    figure.legend(loc="outside lower center")
    return figure


def curves(
    x: Sequence[float], lines: Mapping[str, Any], *, title: str, xlabel: str, ylabel: str,
    errors: Mapping[str, Any] | None = None,
) -> Figure:  # fmt: skip
    """Return a picture of lines (N,), with the errors (N,) or (2, N) of some, over noise levels, with a tick at each.

    Errors (2, N) are how far down and how far up they reach.
    """
    figure = Picture(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for (label, y), style in zip(lines.items(), ("o-", "s--", "^-.", "D:") * len(lines), strict=False):
        axes.errorbar(x, y, (errors or {}).get(label), fmt=style, capsize=3, label=label)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel, xscale="log")
    axes.set_xticks(x, [f"{value:.2g}" for value in x])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def histograms(panels: Mapping[str, Mapping[str, np.ndarray]], *, title: str) -> Figure:
    """Return a picture of how numbers are spread: by a panel's title, the numbers (N,) of each set by its name.

    The axes are in units of the first set: 0 is its median, and 1 its 95th percentile. They are linear near 0 and
    logarithmic far from it, so that sets far away fit in. Each curve has an area of 1 there.
    """
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    figure = Picture(figsize=(4.2 * columns, 0.8 + 2.6 * rows), layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (name, sets) in zip(places, panels.items(), strict=False):
        first = next(iter(sets.values()))
        middle, end = np.percentile(first, [50, 95])
        scale = (end - middle) or 1.0
        scaled = {which: np.arcsinh((values - middle) / scale / 2) for which, values in sets.items()}
        edges = np.histogram_bin_edges(np.concatenate(list(scaled.values())), bins=60)
        for which, values in scaled.items():
            axes.hist(values, edges, density=True, histtype="step", linewidth=1.4, label=which)
        low, high = np.sinh(edges[[0, -1]]) * 2
        ticks = [tick for tick in (-1000, -100, -10, -3, -1, 0, 1, 3, 10, 100, 1000, 10000) if low <= tick <= high]
        axes.set_xticks(np.arcsinh(np.array(ticks) / 2), [f"{tick:,}" for tick in ticks])
        axes.set_yticks([])
        axes.set_title(name, fontsize=10)
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    handles, labels = places[0].get_legend_handles_labels()
    figure.suptitle(f"{title}\n0 is the median of {labels[0]}, 1 its 95th percentile", fontsize=12)
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6))
    return figure


def curves_of_points(points: Sequence[Point]) -> Figure:
    """Return a picture of accuracy, loss and sample quality over training steps or lengths, the best of each marked."""
    lengths = points[0].length is not None
    places = [point.length if lengths else point.step for point in points]
    panels: dict[str, list[Any]] = {"test accuracy (%)": [100 * point.test_accuracy for point in points]}
    panels["loss on test images"] = [point.test_loss for point in points]
    if points[0].frechet_distance is not None:
        panels["Frechet distance"] = [point.frechet_distance for point in points]
    figure = Picture(figsize=(6, 0.8 + 2 * len(panels)), layout="constrained")
    for (title, y), axis in zip(panels.items(), figure.subplots(len(panels), sharex=True), strict=True):
        best = y.index((max if title == "test accuracy (%)" else min)(y))
        axis.plot(places, y, "o-")
        label = f"best: {y[best]:.4g} at {places[best]}"
        axis.plot(places[best], y[best], "*", markersize=15, color="crimson", label=label)
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
        axis.legend()
    if lengths:
        axis.set_xscale("log")
        axis.set_xticks(places, [f"{place:g}" for place in places])
        axis.minorticks_off()
    axis.set_xlabel("length of the average of weights (sigma_rel)" if lengths else "training step")
    figure.suptitle(f"Best probe, loss and samples {'over lengths of averages' if lengths else 'while training'}")
    return figure


def mask_rows(
    images: Sequence[PILImage.Image], masks: Sequence[Sequence[np.ndarray]], titles: Sequence[str], names: Sequence[str]
) -> Figure:
    """Return a picture with a row for each image: the image, and beside it its maps of classes (H, W).

    `titles` are those of the columns of maps. Classes have a colour each, as the legend says where there are at most 20
    `names`; numbers beyond them are of no class, and black.
    """
    columns = 1 + len(titles)
    figure = Picture(figsize=(1.6 * columns + 1.4, 1.6 * len(images) + 0.3), layout="constrained")
    panels = figure.subplots(len(images), columns, squeeze=False)
    colours = np.array([colormaps["tab20"](number % 20)[:3] for number in range(len(names))] + [(0.0, 0.0, 0.0)])
    for row, image, maps in zip(panels, images, masks, strict=True):
        row[0].imshow(np.asarray(as_rgb(image)))
        for axes, found in zip(row[1:], maps, strict=True):
            axes.imshow(colours[np.minimum(found, len(names))], interpolation="nearest")
        for axes in row:
            axes.set_axis_off()
    for axes, title in zip(panels[0], ("image", *titles), strict=True):
        axes.set_title(title, fontsize=9)
    if len(names) <= 20:
        handles = [Rectangle((0, 0), 1, 1, color=colour) for colour in colours[:-1]]
        figure.legend(handles, names, loc="outside right upper", fontsize=8)
    return figure


def image_grid(images: Sequence[PILImage.Image], columns: int | None = None, min_side: int = 64) -> PILImage.Image:
    """Return images of one size as one picture, enlarged without smoothing to `min_side` pixels each."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    width, height = images[0].size
    scale = max(1, math.ceil(min_side / max(width, height)))
    width, height = width * scale, height * scale
    rows = math.ceil(len(images) / columns)
    grid = PILImage.new("RGB", (columns * (width + 1) - 1, rows * (height + 1) - 1), "white")
    for i, image in enumerate(images):
        place = (i % columns * (width + 1), i // columns * (height + 1))
        grid.paste(as_rgb(image).resize((width, height), PILImage.Resampling.NEAREST), place)
    return grid
