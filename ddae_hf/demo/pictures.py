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

from ..experiments.correspondences import main_directions
from ..experiments.pairs import Pair
from ..image_values import as_rgb

# Sequential colours from low to high, readable under black text below the middle and under white above it.
LOW = np.array([236, 243, 250])
HIGH = np.array([8, 56, 120])
HEAT = np.array([255, 106, 0])  # of what is most like


def to_pil(image: Tensor) -> Image.Image:
    """Return (C, H, W), C = 1 or 3, in [-1, 1] as a picture; where values go beyond, contrast is lowered."""
    image = image.detach().float().cpu()
    image = image / image.abs().max().clamp(min=1)
    array = ((image / 2 + 0.5) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array)


def picture(image: Image.Image, text: str) -> str:
    """Return an image as an element that holds it, with a text for who cannot see it."""
    file = io.BytesIO()
    image.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(text)}">'


def figures(images: Sequence[Image.Image], captions: Sequence[str], side: int) -> str:
    """Return pictures in a row that wraps, each `side` pixels wide, with what is written below them."""
    cells = [
        f"<figure>{picture(image, caption)}<figcaption>{html.escape(caption)}</figcaption></figure>"
        for image, caption in zip(images, captions, strict=True)
    ]
    return f'<div class="figures" style="--side: {side}px">{"".join(cells)}</div>'


def choices(images: Sequence[Image.Image], chosen: int) -> str:
    """Return pictures to choose among, as buttons: `data-example` is the number of a button's picture."""
    buttons = [
        f'<button data-example="{i}" aria-pressed="{str(i == chosen).lower()}" aria-label="Test image {i + 1}">'
        f"{picture(image, '')}</button>"
        for i, image in enumerate(images)
    ]
    return f'<div class="choices">{"".join(buttons)}</div>'


def pad(examples: Sequence[Image.Image], chosen: int, drawing: bool, max_bytes: int, unseen: bool = True) -> str:
    """Return what an image is given on: paper to draw on if that is wanted, a file, and examples; see `pad.js`.

    `unseen` says that the network was not trained on the examples.
    """
    paper = (
        '<div class="paper"><canvas width="280" height="280" aria-label="Paper to draw on"></canvas>'
        "<span>Draw here</span></div>"
    )
    clear = '<button data-clear type="button">Clear</button>'
    return (
        f'<div class="pad" data-max-bytes="{max_bytes}">{paper * drawing}<div class="tools">{clear * drawing}'
        '<label>Open a file<input type="file" accept="image/*" aria-label="Image file"></label></div>'
        '<p class="notice" role="alert" hidden></p>'
        f"<p>Or click one of these images{', which the network was not trained on' * unseen}:</p>"
        f"{choices(examples, chosen)}</div>"
    )


def spots(
    images: Sequence[Image.Image], captions: Sequence[str], places: Sequence[tuple[int, int] | None],
    size: Sequence[int],
) -> str:  # fmt: skip
    """Return pictures of (height, width) pixels side by side, a ring around a pixel (x, y) of some; see `spots.js`."""
    cells = []
    for number, (image, caption, place) in enumerate(zip(images, captions, places, strict=True)):
        ring = ""
        if place is not None:
            left, top = (100 * (at + 0.5) / side for at, side in zip(place, (size[1], size[0]), strict=True))
            ring = f'<i style="left: {left:.2f}%; top: {top:.2f}%"></i>'
        ground = f'<div class="ground"{" data-clicked" * (number == 0)}>{picture(image, caption)}{ring}</div>'
        cells.append(f"<figure>{ground}<figcaption>{html.escape(caption)}</figcaption></figure>")
    return f'<div class="spots">{"".join(cells)}</div>'


def heated(image: Image.Image, likeness: Tensor, share: float = 0.1) -> Image.Image:
    """Return a picture on which the share of places of the highest likeness (H, W) glow, the more the higher."""
    low, high = likeness.quantile(1 - share), likeness.max()
    shares = ((likeness - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)[..., None].numpy()
    ground = 0.6 * np.asarray(as_rgb(image), float)
    return Image.fromarray((ground + 0.9 * shares * (HEAT - ground)).round().astype(np.uint8))


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

    The first is its three main directions over positions as red, green and blue, the second its mean over channels;
    then come the channels that vary most. Each fills its own range from dark to light.
    """
    hidden = hidden.detach().float().cpu()
    directions = 2 * main_directions(hidden[None])[0] - 1
    most = hidden.flatten(1).std(1, correction=0).topk(min(num_channels, len(hidden))).indices.tolist()
    maps = [directions, *(_full_range(x) for x in (hidden.mean(0, keepdim=True), *(hidden[k : k + 1] for k in most)))]
    captions = ["Main directions", f"Mean of {len(hidden)} channels", *(f"Channel {k}" for k in most)]
    return [to_pil(x) for x in maps], captions


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
