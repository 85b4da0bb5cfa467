"""The pictures that scripts draw of their figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image as PILImage

from ..image_processing_ddae import as_rgb

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (after the choice of a backend without windows)


def draw_sweep(
    folder: Path, rows: list[dict[str, Any]], layers: list[str], sigmas: list[float], best: dict[str, Any]
) -> None:
    """Draw validation accuracy over layers and noise levels, and over noise levels alone."""
    accuracy = {(row["layer"], row["sigma"]): 100 * row["validation_accuracy"] for row in rows}
    values = [[accuracy[layer, sigma] for sigma in sigmas] for layer in layers]
    heat_map(
        folder / "heat_map.png", values, layers, [f"{sigma:g}" for sigma in sigmas],
        title="Linear probe: accuracy on held-out images (%)", xlabel="noise level sigma", ylabel="layer",
        framed=(layers.index(best["layer"]), sigmas.index(best["sigma"])),
    )  # fmt: skip
    order = sorted(sigmas)
    lines = {
        "best layer of each level": [max(accuracy[layer, sigma] for layer in layers) for sigma in order],
        best["layer"]: [accuracy[best["layer"], sigma] for sigma in order],
    }
    path, label = folder / "accuracy_over_sigma.png", "accuracy on held-out images (%)"
    curves(path, order, lines, title="Linear probe", xlabel="noise level sigma", ylabel=label, log=True)


def heat_map(
    path: Path,
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    framed: tuple[int, int],
) -> None:
    """Draw a table as colours with its figures, one cell of it framed."""
    table = np.asarray(values)
    size = (max(6.0, 2.8 + 0.72 * len(columns)), 1.4 + 0.36 * len(rows))
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    image = axes.imshow(table, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    middle = (table.min() + table.max()) / 2
    for (i, j), value in np.ndenumerate(table):
        colour = "black" if value > middle else "white"
        axes.text(j, i, f"{value:.1f}", ha="center", va="center", fontsize=9, color=colour)
    corner = (framed[1] - 0.5, framed[0] - 0.5)
    axes.add_patch(plt.Rectangle(corner, 1, 1, fill=False, edgecolor="crimson", linewidth=2.5))
    axes.set(xlabel=xlabel, ylabel=ylabel)
    figure.suptitle(title)
    figure.colorbar(image, ax=axes, pad=0.02)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def curves(
    path: Path,
    x: Sequence[float],
    lines: Mapping[str, Sequence[float]],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    log: bool = False,
) -> None:
    """Draw lines over a common axis, which has a tick at every point."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for (label, y), style in zip(lines.items(), ("o-", "s--", "^-.", "D:") * len(lines), strict=False):
        axes.plot(x, y, style, label=label)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel, xscale="log" if log else "linear")
    axes.set_xticks(x, [f"{value:g}" for value in x])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def stacked_curves(
    path: Path,
    x: Sequence[float],
    panels: Mapping[str, Sequence[float]],
    marked: Mapping[str, int],
    *,
    title: str,
    xlabel: str,
) -> None:
    """Draw one curve a panel over a common axis, with one point of each marked."""
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(6, 0.8 + 2 * len(panels)), sharex=True, squeeze=False, layout="constrained"
    )
    for (label, y), axis in zip(panels.items(), axes[:, 0], strict=True):
        best = marked[label]
        axis.plot(x, y, "o-")
        axis.plot(x[best], y[best], "*", markersize=15, color="crimson", label=f"best: {y[best]:.4g} at {x[best]:g}")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.legend()
    axes[-1, 0].set_xlabel(xlabel)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


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
