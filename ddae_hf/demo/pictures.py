"""What the page shows, as HTML: small images enlarged without smoothing, feature maps, the sweep's table in colours."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..experiments.pairs import Pair

CSS = """
.html-container {padding: 0 !important;}
.figures {display: flex; flex-wrap: wrap; gap: 10px;}
.figures figure {margin: 0; width: var(--side); max-width: 100%;}
.figures img {width: 100%; display: block; border-radius: 4px; border: 1px solid var(--border-color-primary);}
.figures figcaption {font-size: 0.8rem; line-height: 1.3; padding-top: 3px; opacity: 0.75;}
.gradio-container img {image-rendering: pixelated;}
.upload img {width: 100%; height: 100%; object-fit: contain;}
.notice {padding: 10px 14px; border-left: 4px solid #c2410c; background: var(--block-background-fill);}
.steps {margin-bottom: 10px;}
.steps [role=progressbar] {height: 8px; margin: 6px 0; border-radius: 4px; background: var(--border-color-primary);}
.steps [role=progressbar] div {height: 100%; border-radius: 4px; background: var(--color-accent);}
.map {overflow-x: auto;}
.map table {border-collapse: separate; border-spacing: 2px; margin: 0;}
.map table, .map tr, .map th, .map td {border: none !important;}
.map th {font-weight: 500; font-size: 0.8rem; padding: 2px 8px; white-space: nowrap;}
.map thead th {text-align: center;}
.map tbody th {text-align: right; position: sticky; left: 0; background: var(--background-fill-primary);}
.map td {padding: 0;}
.map button {width: 100%; min-width: 52px; padding: 7px 4px; font-size: 0.85rem; border-radius: 3px;}
.map button:hover, .map button:focus-visible {outline: 2px solid var(--body-text-color);}
.map button[aria-pressed=true] {outline: 3px solid #ea580c;}
"""
# Sequential colours from low to high, readable under black text below the middle and under white above it.
LOW = np.array([236, 243, 250])
HIGH = np.array([8, 56, 120])


def to_pil(image: Tensor) -> Image.Image:
    """Return (C, H, W), C = 1 or 3, in [-1, 1] as a picture; where values go beyond, contrast is lowered."""
    image = image.detach().float().cpu()
    image = image / image.abs().max().clamp(min=1)
    array = ((image / 2 + 0.5) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array)


def figures(images: Sequence[Image.Image], captions: Sequence[str], side: int) -> str:
    """Return pictures in a row that wraps, each `side` pixels wide, with what is written below them."""
    cells = []
    for image, caption in zip(images, captions, strict=True):
        file = io.BytesIO()
        image.save(file, "PNG")
        data = base64.b64encode(file.getvalue()).decode()
        text = html.escape(caption)
        cells.append(
            f'<figure><img src="data:image/png;base64,{data}" alt="{text}"><figcaption>{text}</figcaption></figure>'
        )
    return f'<div class="figures" style="--side: {side}px">{"".join(cells)}</div>'


def notice(message: str) -> str:
    """Return a message that stands where the answer would."""
    return f'<p class="notice" role="alert">{html.escape(message)}</p>'


def progress(done: int, total: int, state: str) -> str:
    """Return a bar that is filled so far, and a line below it."""
    bar = f'<div role="progressbar" aria-valuemax="{total}" aria-valuenow="{done}" aria-label="Steps">'
    bar += f'<div style="width: {100 * done / total:.1f}%"></div></div>'
    return f'<div class="steps">{bar}{html.escape(f"Step {done} of {total}: {state}")}</div>'


def feature_maps(hidden: Tensor, num_channels: int) -> tuple[list[Image.Image], list[str]]:
    """Return pictures of a hidden state (C, H, W), with captions.

    The first is its three principal components over positions as red, green and blue, the second its mean over
    channels; then come the channels that vary most. Each fills its own range from dark to light.
    """
    hidden = hidden.detach().float().cpu()
    points = hidden.flatten(1).T
    left, strength, _ = torch.linalg.svd(points - points.mean(0), full_matrices=False)
    components = torch.zeros(3, *hidden.shape[1:])
    found = (left * strength)[:, :3].T
    components[: len(found)] = found.unflatten(1, hidden.shape[1:])
    most = points.std(0, correction=0).topk(min(num_channels, len(hidden))).indices.tolist()
    maps = [components, hidden.mean(0, keepdim=True), *(hidden[k : k + 1] for k in most)]
    captions = ["Principal components", f"Mean of {len(hidden)} channels", *(f"Channel {k}" for k in most)]
    return [to_pil(_full_range(x)) for x in maps], captions


def _full_range(image: Tensor) -> Tensor:
    """Stretch each channel of (C, H, W) to [-1, 1]."""
    low = image.amin((1, 2), keepdim=True)
    high = image.amax((1, 2), keepdim=True)
    return 2 * (image - low) / (high - low).clamp(min=1e-12) - 1


def heat_map(pairs: Sequence[Pair], chosen: Pair | None) -> str:
    """Return a sweep's validation accuracies as a table of buttons, layers by noise levels.

    Colours follow the logarithm of the error, as the best pairs lie close together. A button's `data-pair` is the
    number of its pair.
    """
    accuracies = np.array([pair.validation_accuracy for pair in pairs])
    quality = -np.log(np.maximum(1 - accuracies, 1e-3))
    shares = (quality - quality.min()) / max(np.ptp(quality), 1e-12)
    buttons = {}
    for i, (pair, accuracy, share) in enumerate(zip(pairs, 100 * accuracies, shares, strict=True)):
        red, green, blue = (LOW + share * (HIGH - LOW)).round().astype(int)
        style = f"background: rgb({red}, {green}, {blue}); color: {'white' if share > 0.5 else 'black'}"
        text = f"{html.escape(pair.layer)}, sigma {pair.sigma:g}: {accuracy:.2f} %"
        marks = f'data-pair="{i}" title="{text}" aria-label="{text}" aria-pressed="{str(pair == chosen).lower()}"'
        buttons[pair.layer, pair.sigma] = f'<button {marks} style="{style}">{accuracy:.1f}</button>'
    sigmas = sorted({pair.sigma for pair in pairs})
    head = "".join(f'<th scope="col">{sigma:g}</th>' for sigma in sigmas)
    rows = []
    for layer in dict.fromkeys(pair.layer for pair in pairs):
        cells = "".join(f"<td>{buttons.get((layer, sigma), '')}</td>" for sigma in sigmas)
        rows.append(f'<tr><th scope="row">{html.escape(layer)}</th>{cells}</tr>')
    return (
        f'<div class="map"><table><thead><tr><th scope="col">layer \\ sigma</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
