"""Find points of an image again in a warped copy of it, by the maps of a denoiser that never learnt to do so.

    from ddae_hf.experiments import Images, find_correspondences

    result = find_correspondences("runs/cifar10_ddpm_unet", Images.open("uoft-cs/cifar10"), split="test", sigma=0.02)
    print(result.table())
    result.picture().savefig("correspondence.png")

Every image is turned, shifted and bent by a map whose inverse is exact; for each point, the most similar pixel of the
warped copy is compared with the true place. Each map is resized to the image and scaled to length 1 by itself; then
they are put side by side. The two images of a pair get different noise, because shared noise would stay in place while
the image moves. The same points are also looked up by the same network with random weights (a VAE keeps its own), and
by clean colours: of single pixels, and of patches. A gentle warp hardly changes patches, so they are hard to beat.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from tqdm.auto import tqdm

from ..backbone_ddae import DDAEBackbone
from ..configuration_ddae import DDAEConfig
from ..hidden_states import layer_names
from .arrays import StrPath
from .devices import machine, made_fast
from .draws import indexed_noise, separate_randomness
from .features import evaluating
from .images import Images
from .models import Model, check_taps, open_model, open_processor, report_facts
from .options import PROMPT, Options, option
from .plots import Picture, save_picture
from .report import in_memory
from .results import CorrespondenceReport
from .run_folder import saving

ROTATION = 20.0  # of warps, at most, in degrees
SHIFT = 3 / 32  # likewise, as a share of an image's side
BEND = 1.5 / 32  # likewise
RADII = (1, 2, 4)  # pixels within which a point counts as found
POINTS = 32  # at most so many in a row


@dataclass(kw_only=True)
class CorrespondenceOptions(Options):
    """Options of `find_correspondences`."""

    output_dir: str | None = option(None, "Folder of the figures and the picture.")
    split: str = option("train", "Split of the images.")
    max_samples: int = option(64, "Use N images of the split, of all classes.")
    layers: list[str] | None = option(None, "Layers; by default the encoder's at half size and the checkpoint's.")
    sigma: float | None = option(None, "Noise level; by default the checkpoint's.")
    null_class: int | None = option(None, "For a class-conditional denoiser: the label that stands for no class.")
    prompt: str | None = option(None, PROMPT)
    seed: int = option(0, "Seed of warps, noise and random weights.")
    cache_dir: str | None = option(None, "Where downloads are kept.")


class Matches(NamedTuple):
    """Points of an image, looked up in its warped copy; places are complex numbers x + iy (P,), in pixels from 0."""

    pair: Tensor  # the image and the copy (2, C, H, W), in [-1, 1]
    points: Tensor  # places in the image, whole numbers
    places: Tensor  # the true places in the copy
    found: dict[str, Tensor]  # the places that each method finds, by its name


@dataclass(kw_only=True)
class CorrespondenceResult(CorrespondenceReport):
    """What `find_correspondences` found: the figures and, in memory, what the picture shows."""

    shown: list[Matches] = in_memory()  # of the first two images
    errors: dict[str, Tensor] = in_memory()  # by method: pixels from the true places (num_points,), float64

    def picture(self) -> Figure:
        """Return a picture of two pairs, and of how many points are found within a distance."""
        figure = Picture(figsize=(11, 3), layout="constrained")
        *panels, last = figure.subplots(1, len(self.shown) + 1)
        for axes, matches in zip(panels, self.shown, strict=True):
            draw_pair(axes, matches)
        radii = np.linspace(0, max(self.shown[0].pair.shape[-2:]) / 4, 81)
        for name, error in self.errors.items():
            last.plot(radii, [100 * share_within(error, radius) for radius in radii], label=name)
        last.set(xlabel="distance from the true place (pixels)", ylabel="points found within it (%)")
        last.legend()
        return figure

    def save(self, folder: StrPath) -> None:
        """Write `eval_results.json` and `correspondence.png`."""
        with saving(folder):
            save_picture(self.picture(), self.write(Path(folder)).parent / "correspondence.png", dpi=90)


def find_correspondences(
    model: Model, images: Images, options: CorrespondenceOptions | None = None, **changes: Any
) -> CorrespondenceResult:
    """Look up points of images, which need no labels, in warped copies of them.

    Raises:
        ValueError: Options that cannot work, or images that cannot be read.
        OSError: No such checkpoint, or no room on the disk.
    """
    options = CorrespondenceOptions.of(options, changes)
    started = time.monotonic()
    images = Images.open(images, cache_dir=options.cache_dir)
    chosen = images[options.split].take(options.max_samples)
    backbones = open_backbones(model, options)
    processor = open_processor(model, options.cache_dir)
    pixel_values = processor(chosen.pil(range(len(chosen))), return_tensors="pt")["pixel_values"]
    shown: list[Matches] = []
    distances = []
    for index, image in enumerate(tqdm(pixel_values, desc="Pairs")):
        matches = look_up(backbones, image, options.seed, index)
        distances.append({way: (places - matches.places).abs() for way, places in matches.found.items()})
        if index < 2:
            shown.append(matches)
    errors = {way: torch.cat([each[way] for each in distances]) for way in distances[0]}
    results = {}
    for way, error in errors.items():
        results[way] = {f"pck@{radius}": share_within(error, radius) for radius in RADII}
        results[way]["mean_error"] = error.mean().item()
    config = backbones["denoiser"].config
    result = CorrespondenceResult(
        layers=config.out_features, sigma=config.sigma, num_images=len(chosen), num_points=len(error), results=results,
        seconds=round(time.monotonic() - started, 1), shown=shown, errors=errors,
        **report_facts(model, images, options, chosen), **machine(backbones["denoiser"].device.type),
    )  # fmt: skip
    if options.output_dir is not None:
        result.save(options.output_dir)
    return result


def open_backbones(model: Model, options: CorrespondenceOptions) -> dict[str, DDAEBackbone]:
    """Return the network, and the same network with random weights."""
    # Draws of latents would be the same for both images of a pair.
    network = open_model(
        model, cache_dir=options.cache_dir, sigma=options.sigma, null_class=options.null_class, prompt=options.prompt,
        sample_posterior=False,
    )  # fmt: skip
    names = network.layer_names()
    half_size = [name for name in names if name.startswith("down_blocks.1.")][-1:]
    layers = options.layers or [*half_size, network.config.layer]
    check_taps(network, layers, ())
    order = layer_names(network.denoiser, inner=True)
    config = DDAEConfig.from_dict(network.config.to_dict(), out_features=sorted(set(layers), key=order.index))
    with separate_randomness():
        trained = DDAEBackbone(config)
    trained.ddae = network
    with separate_randomness(options.seed):
        untrained: Any = DDAEBackbone(config)
    untrained.ddae.vae = network.vae
    untrained.ddae.condition = network.condition
    return {"denoiser": trained, "random weights": made_fast(untrained, network.device).to(network.device)}


def look_up(backbones: dict[str, DDAEBackbone], image: Tensor, seed: int, index: int) -> Matches:
    """Look up points of an image (C, H, W) in its warped copy, by networks and by colours."""
    warp = Warp(image.shape[-2:], seed, index)
    shape = backbones["denoiser"].config.sample_shape
    noise = torch.cat([indexed_noise(shape, [index], seed, view) for view in (0, 1)])
    pair = torch.stack([image, warp(image)])
    ways = {name: dense_features(backbone, pair, noise) for name, backbone in backbones.items()}
    ways["5x5 patches"] = F.unfold(F.pad(pair, [2] * 4, mode="replicate"), 5).unflatten(2, warp.size)
    ways["pixel colours"] = pair
    points = pixels(warp.size, math.ceil(max(warp.size) / POINTS))
    from_centre = torch.view_as_real(warp.places(points) - warp.centre).abs()
    points = points[(from_centre <= (torch.tensor(warp.size[::-1]) - 1) / 2).all(1)]  # the others have left the picture
    found = {way: match(each[0], each[1], points) for way, each in ways.items()}
    return Matches(pair, points, warp.places(points), found)


class Warp:
    """A turn, a shift and a wave along each axis; places are complex, x + iy, in pixels from the first's centre."""

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


def dense_features(backbone: DDAEBackbone, images: Tensor, noise: Tensor) -> Tensor:
    """Return features (B, C, H, W) of images, of length 1 at every layer."""
    with evaluating(backbone):
        maps = backbone(images.to(backbone.device), noise=noise.to(backbone.device)).feature_maps
    return torch.cat([at_pixels(hidden, images.shape[-2:]) for hidden in maps], dim=1)


def at_pixels(hidden: Tensor, size: Sequence[int]) -> Tensor:
    """Return a layer's feature maps (B, C, h, w) at every pixel of images of a size, of length 1, on the CPU."""
    return F.normalize(F.interpolate(hidden.float(), tuple(size), mode="bilinear"), dim=1).cpu()


def main_directions(maps: Tensor) -> Tensor:
    """Project feature maps (B, C, H, W) on their three main directions over all places: (B, 3, H, W), in [0, 1].

    The directions are principal components of all images together, so that places of like features have like colours
    in each; of each component the lowest and the highest 2 % of places are cut off.
    """
    places = maps.detach().float().cpu().movedim(1, -1).flatten(0, -2)
    places = places - places.mean(0)
    directions = torch.linalg.svd(places, full_matrices=False).Vh[:3]
    shares = torch.zeros(len(places), 3)
    signs = directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()  # which the decomposition leaves open
    shares[:, : len(directions)] = places @ (directions * signs).T
    low, high = shares.quantile(0.02, 0), shares.quantile(0.98, 0)
    shares = ((shares - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return shares.reshape(len(maps), *maps.shape[-2:], 3).movedim(-1, 1)


def match(original: Tensor, warped: Tensor, points: Tensor) -> Tensor:
    """Return the places in the warped image whose features (C, H, W) are most like those at `points`, whole numbers."""
    wanted = original[:, points.imag.long(), points.real.long()]
    there = warped.flatten(1)
    return pixels(warped.shape[-2:])[(wanted.T @ there - there.square().sum(0) / 2).argmax(1)]


def share_within(error: Tensor, radius: float) -> float:
    """Return the share of points that are at most `radius` pixels off."""
    return (error <= radius).double().mean().item()


def draw_pair(axes: Any, matches: Matches) -> None:
    """Show an image beside its warped copy, with lines from some points to where the denoiser finds them."""
    width = matches.pair.shape[-1]
    colours = torch.cat(list(matches.pair), dim=2).permute(1, 2, 0).expand(-1, -1, 3) / 2 + 0.5
    axes.imshow(colours.clamp(0, 1).numpy(), interpolation="nearest")
    axes.set_axis_off()
    ends = matches.found["denoiser"]
    near = (ends - matches.places).abs() <= RADII[1]
    step = math.ceil(max(matches.pair.shape[-2:]) / POINTS) * 8
    for start, end, good in zip(matches.points.tolist(), ends.tolist(), near.tolist(), strict=True):
        if start.real % step == step // 2 and start.imag % step == step // 2:
            line = ([start.real, end.real + width], [start.imag, end.imag])
            axes.plot(*line, "o-" if good else "X-", color="lime" if good else "red", markeredgecolor="black")
