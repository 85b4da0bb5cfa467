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

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch
from torch import Tensor
from tqdm.auto import tqdm

from ddae_hf import DDAEBackbone, DDAEConfig, DDAEImageProcessor
from ddae_hf.commands.parsing import parse, sentences
from ddae_hf.experiments.arrays import write_json
from ddae_hf.experiments.draws import indexed_noise, separate_randomness
from ddae_hf.experiments.images import DataOptions
from ddae_hf.experiments.models import check_null_class, ready
from ddae_hf.experiments.options import Options, option
from ddae_hf.experiments.report import markdown

ROTATION, SHIFT, BEND = 20.0, 3 / 32, 1.5 / 32  # of warps, at most: in degrees, and as parts of an image's side
RADII = (1, 2, 4)  # pixels within which a point counts as found
POINTS = 32  # at most so many in a row
SHOWN = 2  # pairs in the picture


@dataclass(kw_only=True)
class Arguments(Options):
    """The options of the script."""

    model_name_or_path: str = option(help="Checkpoint, folder or Hub id, in any layout.")
    output_dir: str = option("runs/correspondence", "Folder of results.json and correspondence.png.")
    out_features: list[str] | None = option(None, "Layers; by default the encoder's at half size and the checkpoint's.")
    sigma: float | None = option(None, "Noise level; by default the checkpoint's.")
    null_class: int | None = option(None, "The label that stands for none, for a class-conditional denoiser.")
    train_split: str = option("train", "Split of the images.")
    num_images: int = option(64, "Use N images of the split, of all classes.")
    seed: int = option(0, "Seed of warps, noise and random weights.")
    cache_dir: str | None = option(None, "Where downloads are kept.")


class Warp:
    """A turn about the image's centre, a shift, and a wave along each axis: every step has an exact inverse.

    Places are complex128: x + iy in pixels, from 0 at the centre of the first one.
    """

    def __init__(self, size: Sequence[int], seed: int, index: int):
        """Draw the warp of an image of (height, width): a function of the seed and the image's index."""
        rng, side = np.random.default_rng([seed, index]), max(size)
        self.size, self.centre = tuple(size), complex(size[1] - 1, size[0] - 1) / 2
        self.turn = np.exp(1j * math.radians(rng.uniform(-1, 1) * ROTATION)).item()
        self.shift = complex(*rng.uniform(-1, 1, 2) * (SHIFT * side))
        self.bend, self.phase = rng.uniform(-1, 1, 2) * (BEND * side), rng.uniform(0, 2 * math.pi, 2)

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
        return F.grid_sample(image[None].double(), grid, padding_mode="border", align_corners=True)[0].to(image)


def pixels(size: Sequence[int], step: int = 1) -> Tensor:
    """Return the places of an image's pixels, row by row, or of every `step`-th of them."""
    y, x = torch.meshgrid(*(torch.arange(0, side, step).double() for side in size), indexing="ij")
    return torch.complex(x, y).flatten()


@torch.no_grad()
def dense_features(backbone: DDAEBackbone, images: Tensor, noise: Tensor) -> Tensor:
    """Return features (B, C, H, W) of images, of length 1 at every layer."""
    maps = backbone(images.to(backbone.device), noise=noise.to(backbone.device)).feature_maps
    maps = [F.interpolate(hidden.float(), images.shape[-2:], mode="bilinear") for hidden in maps]
    return torch.cat([F.normalize(hidden, dim=1) for hidden in maps], dim=1).cpu()


def match(original: Tensor, warped: Tensor, points: Tensor) -> Tensor:
    """Return the places in the warped image whose features (C, H, W) are nearest to those of whole-numbered points.

    Nearest by distance, which for features of one length is the highest cosine.
    """
    wanted, there = original[:, points.imag.long(), points.real.long()], warped.flatten(1)
    return pixels(warped.shape[-2:])[(wanted.T @ there - there.square().sum(0) / 2).argmax(1)]


def open_backbones(args: Arguments) -> dict[str, DDAEBackbone]:
    """Return the network, and the same with random weights."""
    own = {name: value for name in ("sigma", "null_class") if (value := getattr(args, name)) is not None}
    config = DDAEConfig.from_pretrained(args.model_name_or_path, cache_dir=args.cache_dir, **own)
    names = config.stage_names
    layers = args.out_features or [*[name for name in names if name.startswith("down_blocks.1.")][-1:], config.layer]
    if unknown := [layer for layer in layers if layer not in names]:
        raise ValueError(f"out_features: there is no layer {', '.join(unknown)}; there are {', '.join(names)}.")
    trained = DDAEBackbone.from_pretrained(
        args.model_name_or_path,
        sample_posterior=False,  # draws of latents would be the same for both images of a pair
        out_features=sorted(set(layers), key=names.index),
        cache_dir=args.cache_dir,
        **own,
    )
    check_null_class(trained.ddae)
    with separate_randomness(args.seed):
        untrained = DDAEBackbone(trained.config)
    untrained.ddae.vae = trained.ddae.vae
    return {"denoiser": ready(trained.eval()), "random weights": ready(untrained.eval())}


def look_up(
    backbones: dict[str, DDAEBackbone], images: Tensor, seed: int
) -> tuple[dict[str, Tensor], list[tuple[Tensor, ...]]]:
    """Return the errors in pixels of every way to look points up, and the network's answers for the first pairs."""
    size = images.shape[-2:]
    step = math.ceil(max(size) / POINTS)
    points = pixels(size, step)
    errors: dict[str, list[Tensor]] = {}
    shown: list[tuple[Tensor, ...]] = []
    for index, image in enumerate(tqdm(images, desc="Pairs")):
        warp = Warp(size, seed, index)
        pair = torch.stack([image, warp(image)])
        shape = backbones["denoiser"].config.sample_shape
        noise = torch.cat([indexed_noise(shape, [index], seed, view) for view in (0, 1)])
        ways = {name: dense_features(backbone, pair, noise) for name, backbone in backbones.items()}
        ways["5x5 patches"] = F.unfold(F.pad(pair, [2] * 4, mode="replicate"), 5).unflatten(2, size)
        ways["pixel colours"] = pair
        places = warp.places(points)
        from_centre = torch.view_as_real(places - warp.centre).abs()
        inside = (from_centre <= (torch.tensor(size[::-1]) - 1) / 2).all(1)  # what left the picture is not looked for
        found = {name: match(*features, points[inside]) for name, features in ways.items()}
        for name, answers in found.items():
            errors.setdefault(name, []).append((answers - places[inside]).abs())
        if index < SHOWN:
            some = (points[inside].real / step % 8 == 3) & (points[inside].imag / step % 8 == 3)
            shown.append((*pair, points[inside][some], found["denoiser"][some], errors["denoiser"][-1][some]))
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
        for *ends, distance in zip(
            *(torch.view_as_real(each).tolist() for each in (points, found)), error, strict=True
        ):
            colour, marker = ("lime", "o") if distance <= RADII[1] else ("red", "X")
            for axes, end in zip(panels, ends, strict=True):
                axes.plot(*end, marker, color=colour, markersize=7, markeredgecolor="black")
            line = ConnectionPatch(*ends, "data", "data", axesA=panels[0], axesB=panels[1], color=colour, alpha=0.7)
            figure.add_artist(line)
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
    with sentences():
        images = data.open(args.cache_dir)[args.train_split].take(args.num_images)
        backbones = open_backbones(args)
        processor = DDAEImageProcessor.from_pretrained(args.model_name_or_path, cache_dir=args.cache_dir)
        pixel_values = processor(images.pil(range(len(images))), return_tensors="pt")["pixel_values"]
    errors, shown = look_up(backbones, pixel_values, args.seed)
    results = {}
    for name, error in errors.items():
        found = {f"pck@{radius}": (error <= radius).double().mean().item() for radius in RADII}
        results[name] = {**found, "mean_error": error.mean().item()}
    cells = [[f"{100 * r[f'pck@{radius}']:.1f}" for radius in RADII] for r in results.values()]
    rows = [[name, *each, f"{r['mean_error']:.2f}"] for (name, r), each in zip(results.items(), cells, strict=True)]
    print(markdown(["points found (%)", *(f"within {radius}" for radius in RADII), "mean error (pixels)"], rows))
    config, folder, count = backbones["denoiser"].config, Path(args.output_dir), len(errors["denoiser"])
    about = {"layers": config.out_features, "sigma": config.sigma, "images": len(images), "points": count}
    options = {**data.to_dict(), **args.to_dict()}
    write_json(folder / "results.json", {"options": options, **about, "results": results})
    picture(shown, errors, max(config.image_size) / 4).savefig(folder / "correspondence.png", dpi=90)
    print(f"{count:,} points of {len(images)} images; look at {folder / 'correspondence.png'}.")


if __name__ == "__main__":
    main()
