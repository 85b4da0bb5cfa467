r"""Find the points of an image again in a warped copy of it, by feature maps of a denoiser that was never taught to.

    python examples/correspondence.py --model_name_or_path runs/cifar10_ddpm_unet --dataset_name uoft-cs/cifar10 \
        --train_split test --num_images 64 --sigma 0.02 --output_dir runs/correspondence

Every image is turned, shifted and bent by a map whose inverse is exact; for each point, the most similar pixel of the
warped copy is compared with the true place. `DDAEBackbone`'s maps are brought to the image's size and to length 1,
each by itself, and put side by side: similarity is the mean cosine over layers. Two images of a pair get different
noise, as noise shared by both would stay in place while the image moves. The same points are looked up by the same
network with random weights (a VAE keeps its own), and by clean colours: of single pixels, and of patches, which a warp
as gentle as this one hardly changes and which are hard to beat. `results.json` holds the figures, `correspondence.png`
shows them.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import logging

from ddae_hf import DDAEBackbone, DDAEConfig, DDAEImageProcessor
from ddae_hf.commands.parsing import parse, sentences
from ddae_hf.experiments.draws import indexed_noise
from ddae_hf.experiments.images import DataOptions
from ddae_hf.experiments.models import check_null_class, ready
from ddae_hf.experiments.options import Options, option

RADII = (1, 2, 4)  # pixels within which a point counts as found
POINTS = 32  # at most so many in a row
SHOWN = 2  # pairs in the picture
METHODS = ("denoiser", "random weights", "5x5 patches", "pixel colours")


@dataclass(kw_only=True)
class Arguments(Options):
    """The options of the script."""

    model_name_or_path: str = option(help="Checkpoint, folder or Hub id, in any layout.")
    output_dir: str = option("runs/correspondence", "Folder of results.json and correspondence.png.")
    out_features: list[str] | None = option(
        None, "Layers; by default the encoder's at half size and the checkpoint's one."
    )
    sigma: float | None = option(None, "Noise level; by default the checkpoint's.")
    null_class: int | None = option(None, "The label that stands for none, for a class-conditional denoiser.")
    train_split: str = option("train", "Split of the images.")
    num_images: int = option(64, "Use N images of the split, of all classes.")
    max_rotation: float = option(20.0, "Largest angle of a warp, in degrees.")
    max_shift: float = option(3.0, "Largest shift along each axis, in pixels.")
    max_bend: float = option(1.5, "Largest height of the waves along each axis, in pixels.")
    seed: int = option(0, "Seed of warps, noise and random weights.")
    cache_dir: str | None = option(None, "Where downloads are kept.")

    def check(self) -> None:
        """Refuse warps of a negative size."""
        for name in ("max_rotation", "max_shift", "max_bend"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 0.")


class Warp:
    """A turn about the image's centre, a shift, and a wave along each axis: every step has an exact inverse.

    Places are complex128: x + iy in pixels, from 0 at the centre of the first one. Training images are never warped:
    their changes, in `ddae_hf.augment`, need no inverse.
    """

    def __init__(self, size: tuple[int, int], args: Arguments, index: int):
        """Draw the warp of an image of (height, width): a function of the seed and the image's index."""
        rng = np.random.default_rng([args.seed, index])
        self.size, self.centre = size, complex(size[1] - 1, size[0] - 1) / 2
        self.turn = np.exp(1j * math.radians(rng.uniform(-1, 1) * args.max_rotation)).item()
        self.shift = complex(*rng.uniform(-1, 1, 2) * args.max_shift)
        self.bend, self.phase = rng.uniform(-1, 1, 2) * args.max_bend, rng.uniform(0, 2 * math.pi, 2)

    def _wave(self, axis: int, at: Tensor) -> Tensor:
        return self.bend[axis] * torch.sin(2 * math.pi * at / max(self.size) + self.phase[axis])

    def places(self, original: Tensor) -> Tensor:
        """Return where points of the original are in the warped image."""
        moved = (original - self.centre) * self.turn + self.centre + self.shift
        x = moved.real + self._wave(0, moved.imag)
        return torch.complex(x, moved.imag + self._wave(1, x))

    def origins(self, warped: Tensor) -> Tensor:
        """Return where points of the warped image come from: the inverse of `places`."""
        y = warped.imag - self._wave(1, warped.real)
        x = warped.real - self._wave(0, y)
        return (torch.complex(x, y) - self.shift - self.centre) / self.turn + self.centre

    def __call__(self, image: Tensor) -> Tensor:
        """Return the warped image (C, H, W); what comes from outside repeats the border."""
        grid = torch.view_as_real(self.origins(pixels(self.size))) * 2 / (torch.tensor(self.size[::-1]) - 1) - 1
        grid = grid.reshape(1, *self.size, 2)
        found = F.grid_sample(image[None].double(), grid, padding_mode="border", align_corners=True)
        return found[0].to(image)


def pixels(size: tuple[int, int], step: int = 1) -> Tensor:
    """Return the places of an image's pixels, row by row, or of every `step`-th of them."""
    y, x = torch.meshgrid(*(torch.arange(0, side, step).double() for side in size), indexing="ij")
    return torch.complex(x, y).flatten()


@torch.no_grad()
def dense_features(backbone: DDAEBackbone, images: Tensor, noise: Tensor) -> Tensor:
    """Return features (B, C, H, W) of images, of length 1 at every layer."""
    maps = backbone(images.to(backbone.device), noise=noise.to(backbone.device)).feature_maps
    maps = [F.interpolate(hidden.float(), images.shape[-2:], mode="bilinear") for hidden in maps]
    return torch.cat([F.normalize(hidden, dim=1) for hidden in maps], dim=1).cpu()


def patches(images: Tensor) -> Tensor:
    """Return the colours of the 5x5 pixels around each, (B, 25 C, H, W)."""
    return F.unfold(F.pad(images, [2] * 4, mode="replicate"), 5).unflatten(2, images.shape[-2:])


def match(original: Tensor, warped: Tensor, points: Tensor) -> Tensor:
    """Return the places in the warped image whose features (C, H, W) are nearest to those of whole-numbered points.

    Nearest by distance, which for features of one length is the highest cosine.
    """
    wanted, there = original[:, points.imag.long(), points.real.long()], warped.flatten(1)
    nearest = (wanted.T @ there - there.square().sum(0) / 2).argmax(1)
    return pixels(tuple(warped.shape[-2:]))[nearest]


def open_backbones(args: Arguments) -> list[DDAEBackbone]:
    """Return the network and the same with random weights."""
    own = {name: value for name in ("sigma", "null_class") if (value := getattr(args, name)) is not None}
    config = DDAEConfig.from_pretrained(args.model_name_or_path, cache_dir=args.cache_dir, **own)
    names, reach, side = config.stage_names, args.max_shift + args.max_bend, min(config.image_size)
    layers = args.out_features or [*[name for name in names if name.startswith("down_blocks.1.")][-1:], config.layer]
    if unknown := [layer for layer in layers if layer not in names]:
        raise ValueError(f"out_features: there is no layer {', '.join(unknown)}; there are {', '.join(names)}.")
    if reach >= (side - 1) / 2:
        raise ValueError(f"max_shift and max_bend are {reach:g} together: take less than {(side - 1) / 2:g}.")
    trained = DDAEBackbone.from_pretrained(
        args.model_name_or_path,
        sample_posterior=False,  # draws of latents would be the same for both images of a pair
        out_features=sorted(set(layers), key=names.index),
        cache_dir=args.cache_dir,
        **own,
    )
    check_null_class(trained.ddae)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        untrained = DDAEBackbone(trained.config)
    untrained.ddae.vae = trained.ddae.vae  # only the denoiser has random weights
    return [ready(backbone.eval()) for backbone in (trained, untrained)]


def look_up(
    args: Arguments, images: Tensor, backbones: list[DDAEBackbone]
) -> tuple[dict[str, Tensor], list[tuple[Tensor, ...]]]:
    """Return the errors in pixels of every way to look points up, and the network's answers for the first pairs."""
    size = (images.shape[2], images.shape[3])
    step = math.ceil(max(size) / POINTS)
    points = pixels(size, step)
    errors: dict[str, list[Tensor]] = {name: [] for name in METHODS}
    shown: list[tuple[Tensor, ...]] = []
    for index, image in enumerate(tqdm(images, desc="Pairs")):
        warp = Warp(size, args, index)
        pair = torch.stack([image, warp(image)])
        shape = backbones[0].config.sample_shape
        noise = torch.cat([indexed_noise(shape, [index], args.seed, view) for view in (0, 1)])
        places = warp.places(points)
        from_centre = torch.view_as_real(places - warp.centre).abs()
        inside = (from_centre <= (torch.tensor(size[::-1]) - 1) / 2).all(1)  # what left the picture is not looked for
        ways = [*(dense_features(backbone, pair, noise) for backbone in backbones), patches(pair), pair]
        for name, features in zip(METHODS, ways, strict=True):
            found = match(*features, points[inside])
            errors[name].append((found - places[inside]).abs())
            if name == METHODS[0] and index < SHOWN:
                some = (points[inside].real / step % 8 == 3) & (points[inside].imag / step % 8 == 3)
                shown.append((*pair, points[inside][some], found[some], errors[name][-1][some]))
    return {name: torch.cat(values) for name, values in errors.items()}, shown


def picture(shown: list[tuple[Tensor, ...]], errors: dict[str, Tensor], furthest: float) -> Figure:
    """Return pairs of images with some points and what the network found for them, and the part found over distance."""
    figure = Figure(figsize=(10.5, 2.75 * max(len(shown), 2)), layout="constrained")
    grid = figure.add_gridspec(len(shown), 3, width_ratios=(1, 1, 1.6))
    for row, (*pair, points, found, error) in enumerate(shown):
        panels = [figure.add_subplot(grid[row, column], xticks=[], yticks=[]) for column in (0, 1)]
        for axes, title, image in zip(panels, ("original", "warped"), pair, strict=True):
            axes.set_title(title if row == 0 else "")
            colours = (image.permute(1, 2, 0).expand(-1, -1, 3) / 2 + 0.5).clamp(0, 1).numpy()
            axes.imshow(colours, interpolation="nearest")
        for start, end, distance in zip(points.tolist(), found.tolist(), error, strict=True):
            colour, marker = ("lime", "o") if distance <= RADII[1] else ("red", "X")
            for axes, place in zip(panels, (start, end), strict=True):
                axes.plot(place.real, place.imag, marker, color=colour, markersize=7, markeredgecolor="black")
            ends = ((start.real, start.imag), (end.real, end.imag))
            figure.add_artist(ConnectionPatch(*ends, "data", "data", axesA=panels[0], axesB=panels[1], color=colour))
    axes, radii = figure.add_subplot(grid[:, 2]), np.linspace(0, furthest, 81)
    for (name, error), style in zip(errors.items(), ("-", "--", "-.", ":"), strict=True):
        part = [100 * (error <= radius).double().mean().item() for radius in radii]
        axes.plot(radii, part, style, label=name, linewidth=2)
    axes.set(xlabel="distance from the true place (pixels)", ylabel="points found within it (%)", ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.suptitle(f"Points looked up in a warped copy: found within {RADII[1]} pixels (green), further off (red)")
    return figure


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    data, args = parse([DataOptions, Arguments], __doc__, argv)
    logging.disable_progress_bar()
    with sentences():
        images = data.open(args.cache_dir)[args.train_split].take(args.num_images)
        backbones = open_backbones(args)
        processor = DDAEImageProcessor.from_pretrained(args.model_name_or_path, cache_dir=args.cache_dir)
        pixel_values = processor(images.pil(range(len(images))), return_tensors="pt")["pixel_values"]
    errors, shown = look_up(args, pixel_values, backbones)
    rows, config, folder = {}, backbones[0].config, Path(args.output_dir)
    print(f"{'%, error in pixels':20}" + "".join(f"{f'PCK@{radius}':>8}" for radius in RADII) + f"{'error':>8}")
    for name, error in errors.items():
        pck = {f"pck@{radius}": (error <= radius).double().mean().item() for radius in RADII}
        rows[name] = {**pck, "mean_error": error.mean().item()}
        print(f"{name:20}" + "".join(f"{100 * value:8.1f}" for value in pck.values()) + f"{error.mean():8.2f}")
    about = {"layers": config.out_features, "sigma": config.sigma, "images": len(images), "points": len(error)}
    folder.mkdir(parents=True, exist_ok=True)
    report = {"options": {**data.to_dict(), **args.to_dict()}, **about, "results": rows}
    (folder / "results.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    picture(shown, errors, max(config.image_size) / 4).savefig(folder / "correspondence.png", dpi=90)
    print(f"{len(error):,} points of {len(images)} images; look at {folder / 'correspondence.png'}.")


if __name__ == "__main__":
    main()
