r"""Find the points of an image again in a warped copy of it, by `DDAEBackbone`'s maps, which were never taught to.

    python examples/correspondence.py --model_name_or_path runs/cifar10_ddpm_unet --dataset_name uoft-cs/cifar10 \
        --train_split test --num_images 64 --sigma 0.02 --output_dir runs/correspondence

Every image is turned, shifted and bent by a map whose inverse is exact; for each point, the most similar pixel of the
warped copy is compared with the true place. Maps are brought to the image's size and to length 1, each by itself, and
put side by side. The two images of a pair get different noise, as noise shared by both would stay in place while the
image moves. The same points are looked up by the same network with random weights (a VAE keeps its own), and by clean
colours: of single pixels, and of patches, which a gentle warp hardly changes and which are hard to beat. Figures go to
`results.json`, a picture to `correspondence.png`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from tqdm.auto import tqdm

from ddae_hf import DDAEBackbone, DDAEConfig, DDAEImageProcessor
from ddae_hf.commands.parsing import parse
from ddae_hf.commands.running import sentences
from ddae_hf.experiments.arrays import write_json
from ddae_hf.experiments.draws import indexed_noise, separate_randomness
from ddae_hf.experiments.images import DataOptions
from ddae_hf.experiments.models import check_null_class, ready
from ddae_hf.experiments.options import Options, option
from ddae_hf.experiments.report import markdown

ROTATION, SHIFT, BEND = 20.0, 3 / 32, 1.5 / 32  # of warps, at most: in degrees, and as parts of an image's side
RADII = (1, 2, 4)  # pixels within which a point counts as found
POINTS = 32  # at most so many in a row


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
    """A turn, a shift and a wave along each axis; places are complex, x + iy in pixels from 0 at the first's centre."""

    def __init__(self, size: Sequence[int], seed: int, index: int):
        rng = np.random.default_rng([seed, index])
        self.size = tuple(size)
        self.centre = complex(size[1] - 1, size[0] - 1) / 2
        self.turn = np.exp(1j * math.radians(rng.uniform(-1, 1) * ROTATION)).item()
        self.shift = complex(*rng.uniform(-1, 1, 2) * (SHIFT * max(size)))
        self.bend = rng.uniform(-1, 1, 2) * (BEND * max(size))
        self.phase = rng.uniform(0, 2 * math.pi, 2)

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
    """Return the places in the warped image whose features (C, H, W) are nearest to those of whole-numbered points."""
    wanted = original[:, points.imag.long(), points.real.long()]
    there = warped.flatten(1)
    return pixels(warped.shape[-2:])[(wanted.T @ there - there.square().sum(0) / 2).argmax(1)]


def open_backbones(args: Arguments) -> dict[str, DDAEBackbone]:
    """Return the network, and the same with random weights."""
    given = {"sigma": args.sigma, "null_class": args.null_class, "cache_dir": args.cache_dir}
    given = {name: value for name, value in given.items() if value is not None}
    config = DDAEConfig.from_pretrained(args.model_name_or_path, **given)
    names = config.stage_names
    layers = args.out_features or [*[name for name in names if name.startswith("down_blocks.1.")][-1:], config.layer]
    if unknown := [layer for layer in layers if layer not in names]:
        raise ValueError(f"out_features: there is no layer {', '.join(unknown)}; there are {', '.join(names)}.")
    given["out_features"] = sorted(set(layers), key=names.index)
    given["sample_posterior"] = False  # draws of latents would be the same for both images of a pair
    trained = DDAEBackbone.from_pretrained(args.model_name_or_path, **given)
    check_null_class(trained.ddae)
    with separate_randomness(args.seed):
        untrained = DDAEBackbone(trained.config)
    untrained.ddae.vae = trained.ddae.vae
    return {"denoiser": ready(trained.eval()), "random weights": ready(untrained.eval())}


def look_up(backbones: dict[str, DDAEBackbone], image: Tensor, warp: Warp, noise: Tensor) -> dict[str, Tensor]:
    """Return points of an image, their true places in its warped copy, and the places that every way finds."""
    pair = torch.stack([image, warp(image)])
    ways = {name: dense_features(backbone, pair, noise) for name, backbone in backbones.items()}
    ways["5x5 patches"] = F.unfold(F.pad(pair, [2] * 4, mode="replicate"), 5).unflatten(2, warp.size)
    ways["pixel colours"] = pair
    points = pixels(warp.size, math.ceil(max(warp.size) / POINTS))
    from_centre = torch.view_as_real(warp.places(points) - warp.centre).abs()
    points = points[(from_centre <= (torch.tensor(warp.size[::-1]) - 1) / 2).all(1)]  # others have left the picture
    return {"points": points, "places": warp.places(points)} | {k: match(*v, points) for k, v in ways.items()}


def draw_pair(axes: Any, pair: Tensor, found: dict[str, Tensor]) -> None:
    """Show an image beside its warped copy, with lines from some points to where the network finds them."""
    colours = torch.cat(list(pair), dim=2).permute(1, 2, 0).expand(-1, -1, 3) / 2 + 0.5
    axes.imshow(colours.clamp(0, 1).numpy(), interpolation="nearest")
    axes.set_axis_off()
    near = (found["denoiser"] - found["places"]).abs() <= RADII[1]
    step = math.ceil(max(pair.shape[-2:]) / POINTS) * 8
    for start, end, good in zip(found["points"].tolist(), found["denoiser"].tolist(), near.tolist(), strict=True):
        if start.real % step == step // 2 and start.imag % step == step // 2:
            ends = ([start.real, end.real + pair.shape[-1]], [start.imag, end.imag])
            axes.plot(*ends, "o-" if good else "X-", color="lime" if good else "red", markeredgecolor="black")


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    data, args = parse([DataOptions, Arguments], __doc__, argv)
    with sentences():
        images = data.open(args.cache_dir)[args.train_split].take(args.num_images)
        backbones = open_backbones(args)
        processor = DDAEImageProcessor.from_pretrained(args.model_name_or_path, cache_dir=args.cache_dir)
        pixel_values = processor(images.pil(range(len(images))), return_tensors="pt")["pixel_values"]
    config = backbones["denoiser"].config
    figure = Figure(figsize=(11, 3), layout="constrained")
    panels = figure.subplots(1, 3)
    errors: dict[str, list[Tensor]] = {}
    for index, image in enumerate(tqdm(pixel_values, desc="Pairs")):
        warp = Warp(image.shape[-2:], args.seed, index)
        noise = torch.cat([indexed_noise(config.sample_shape, [index], args.seed, view) for view in (0, 1)])
        found = look_up(backbones, image, warp, noise)
        for name in list(found)[2:]:
            errors.setdefault(name, []).append((found[name] - found["places"]).abs())
        if index < 2:
            draw_pair(panels[index], torch.stack([image, warp(image)]), found)
    results = {}
    radii = np.linspace(0, max(config.image_size) / 4, 81)
    for name, parts in errors.items():
        error = torch.cat(parts)
        results[name] = {f"pck@{radius}": (error <= radius).double().mean().item() for radius in RADII}
        results[name]["mean_error"] = error.mean().item()
        panels[2].plot(radii, [100 * (error <= radius).double().mean().item() for radius in radii], label=name)
    panels[2].set(xlabel="distance from the true place (pixels)", ylabel="points found within it (%)")
    panels[2].legend()
    rows = [
        [name, *(f"{100 * r[f'pck@{n}']:.1f}" for n in RADII), f"{r['mean_error']:.2f}"] for name, r in results.items()
    ]
    print(markdown(["points found (%)", *(f"within {radius}" for radius in RADII), "mean error (pixels)"], rows))
    about = {"layers": config.out_features, "sigma": config.sigma, "images": len(images), "points": len(error)}
    folder = Path(args.output_dir)
    write_json(folder / "results.json", {"options": data.to_dict() | args.to_dict(), **about, "results": results})
    figure.savefig(folder / "correspondence.png", dpi=90)
    print(f"{len(error):,} points of {len(images)} images; look at {folder / 'correspondence.png'}.")


if __name__ == "__main__":
    main()
