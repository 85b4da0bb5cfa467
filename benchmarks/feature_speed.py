r"""Pooled features in images a second: the plain way against ours, and against what the machine can do.

    python -m benchmarks.feature_speed --compile
    python -m benchmarks.feature_speed --probe_checkpoint runs/cifar10_cpu --probe_layer up_blocks.0.resnets.1 \
        --probe_sigma 0.02 --dataset_name uoft-cs/cifar10 --max_train_samples 20000

Networks, with random weights: the paper's U-Net of 35.7 M parameters up to `up_blocks.1.resnets.2`, and DiT-XL/2 up to
its middle block (on the CPU it has fewer). The plain way is `PlainFeatures`: float32, contiguous, a full forward with a
hook. Ours is `DDAEModel`, in the faster layout and in inference mode. Every way takes the batch size that is fastest
for it, and the same images and noise. All keep the memory that they free, which the plain way would not do by itself.
The machine's limits are measured before and after each network, and the higher ones count.

`--probe_checkpoint` also compares linear probes on the float32 and the bfloat16 features of a trained network.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from ddae_hf import DDAEConfig, DDAEImageProcessor, DDAEModel, DDAEPipeline, layer_names
from ddae_hf.commands.parsing import CONFIGS, parse, read_config
from ddae_hf.commands.running import sentences
from ddae_hf.experiments.arrays import write_json
from ddae_hf.experiments.devices import best_device
from ddae_hf.experiments.features import extract_features
from ddae_hf.experiments.images import DataOptions, ImageInputs, labelled_splits, noise_view
from ddae_hf.experiments.logistic_regression import fit_logistic_regression
from ddae_hf.experiments.models import ready
from ddae_hf.experiments.options import Options, option
from ddae_hf.networks import build_denoiser

from .measure import (
    describe_limits,
    facts,
    gflop,
    highest,
    in_turn,
    interval,
    limits,
    rates,
    seconds_of,
    signed,
    table,
)
from .plain_features import PlainFeatures

TITLES = {"unet": "The paper's U-Net", "dit": "DiT-XL/2"}
DIT_XL_2 = {
    "_class_name": "DiTTransformer2DModel",
    "sample_size": 32,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "num_embeds_ada_norm": 1000,
}
DIT_BLOCKS = {"cpu": 8, "cuda": 28}
BATCH_SIZES = {"cpu": [16, 32, 64, 128], "cuda": [64, 128, 256, 512, 1024]}
PASSES = {"cpu": 1, "cuda": 8}  # over the largest batch, which are timed together
TRAIN, TEST = "train", "test"


@dataclass
class Way:
    """A way of computing features (B, C) of images and noise (B, C, H, W), at its batch size."""

    dtype: str
    features: Callable[[Tensor, Tensor], Tensor]
    batch_size: int = 0

    def __call__(self, images: Tensor, noise: Tensor) -> Tensor:
        """Return the features of all images."""
        parts = zip(images.split(self.batch_size), noise.split(self.batch_size), strict=True)
        return torch.cat([self.features(*part) for part in parts])


@dataclass(kw_only=True)
class Arguments(Options):
    """The options, besides those of the data."""

    networks: list[str] = option(list(TITLES), f"With random weights: {', '.join(TITLES)}.")
    checkpoint: str | None = option(None, "A generative checkpoint in place of networks: folder or Hub id.")
    dit_blocks: int = option(DIT_BLOCKS[best_device()], "Blocks of the DiT.")
    batch_sizes: list[int] = option(BATCH_SIZES[best_device()], "Batch sizes tried for every way.")
    num_images: int | None = option(None, "Images timed together, a multiple of every batch size.")
    repeats: int = option(5, "How often every way is timed, in turn.")
    compile: bool = option(False, "Also time ours in bfloat16 under torch.compile.")
    seed: int = option(0, "Seed of random weights and images.")
    output: str = option("runs/benchmarks/features.json", "JSON of every figure.")
    probe_checkpoint: str | None = option(None, "Trained checkpoint whose features are probed in both types.")
    probe_layer: str | None = option(None, "The layer to probe; by default the middle of the decoder.")
    probe_sigma: float | None = option(None, "The noise level to probe at; by default 0.05.")
    l2: float = option(1e-4, "Strength of regularisation.")
    batch_size: int = option(250, "Images that the probed network is given at a time.")
    train_split: str = option("train", "Split to train on.")
    test_split: str = option("test", "Split to test on.")
    max_train_samples: int | None = option(None, "Use N training images of all classes, always the same ones.")
    max_test_samples: int | None = option(None, "Use N test images of all classes, always the same ones.")
    cache_dir: str | None = option(None, "Where downloads are kept.")

    def check(self) -> None:
        """Refuse options that cannot work."""
        if unknown := set(self.networks) - set(TITLES):
            raise ValueError(f"networks has {sorted(unknown)}: allowed are {', '.join(TITLES)}.")
        for name in ("dit_blocks", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1.")
        self.num_images = self.num_images or PASSES[best_device()] * max(self.batch_sizes)
        if wrong := [size for size in self.batch_sizes if size < 1 or self.num_images % size]:
            raise ValueError(f"batch_sizes has {wrong}: {self.num_images} images must be a multiple of each.")


def parse_arguments(argv: list[str] | None = None) -> tuple[DataOptions, Arguments]:
    """Return the options."""
    return tuple(parse([DataOptions, Arguments], __doc__, argv))


def make_checkpoint(network: str, args: Arguments, folder: str) -> str:
    """Write a network with random weights as a generative checkpoint, and return its folder."""
    config = DIT_XL_2 | {"num_layers": args.dit_blocks}
    if network == "unet":
        config = read_config(CONFIGS / "networks" / "unet.yaml")["denoiser"]
    torch.manual_seed(args.seed)
    path = f"{folder}/{network}"
    DDAEPipeline.for_denoiser(build_denoiser(config), DDPMScheduler()).save_pretrained(path)
    return path


def open_model(checkpoint: str, dtype: str, cache_dir: str | None, **options: Any) -> DDAEModel:
    """Return our model in a type, on the device, in the faster layout."""
    dtype = getattr(torch, dtype)
    return ready(DDAEModel.from_pretrained(checkpoint, dtype=dtype, vae=None, cache_dir=cache_dir, **options))


def our_features(model: Any, images: Tensor, noise: Tensor) -> Tensor:
    """Return the features (B, C) that a model outputs."""
    with torch.inference_mode():
        return model(images, noise=noise).pooler_output


def open_ways(
    checkpoint: str, layer: str, sigma: float, device: str, cache_dir: str | None
) -> tuple[dict[str, Way], dict[str, Any]]:
    """Return the ways by name, at one layer and noise level, and facts about the network."""
    plain = PlainFeatures(checkpoint, [layer], device, cache_dir=cache_dir)
    timestep = plain.nearest_timestep(sigma)
    ways = {"plain": Way("float32", lambda images, noise: plain(images, noise, timestep)[layer])}
    for dtype in ("float32", "bfloat16"):
        model = open_model(checkpoint, dtype, cache_dir, layer=layer, timestep=timestep)
        ways[dtype] = Way(dtype, partial(our_features, model))
    described = {
        "denoiser": type(plain.denoiser).__name__,
        "parameters": sum(p.numel() for p in plain.denoiser.parameters()),
        "taps": len(layer_names(plain.denoiser)),
        "layer": layer,
        "timestep": timestep,
        "shape": list(model.config.sample_shape),
    }
    return ways, described


def choose_batch_size(way: Way, images: Tensor, noise: Tensor, sizes: list[int], device: str) -> dict[int, Any]:
    """Give a way its fastest batch size, and return the seconds by batch size; None where memory runs out."""
    seconds: dict[int, Any] = {}
    for way.batch_size in sizes:
        try:
            way.features(images[: way.batch_size], noise[: way.batch_size])
            seconds[way.batch_size] = seconds_of(lambda: way(images, noise), device)
        except torch.OutOfMemoryError:
            seconds[way.batch_size] = None
    if not any(seconds.values()):
        raise SystemExit(f"There is too little memory for any of --batch_sizes {sizes}: give smaller ones.")
    way.batch_size = min((s, size) for size, s in seconds.items() if s is not None)[1]
    return seconds


def add_compiled(ways: dict[str, Way], images: Tensor, noise: Tensor, device: str) -> dict[str, float]:
    """Add ours compiled in bfloat16, at the batch size of the uncompiled one; return how long compiling took."""
    eager = ways["bfloat16"]
    (model,) = eager.features.args  # type: ignore[attr-defined]
    way = Way("bfloat16", partial(our_features, torch.compile(model)), eager.batch_size)
    part = slice(way.batch_size)
    ways["bfloat16 compiled"] = way
    return {"bfloat16 compiled": seconds_of(lambda: way.features(images[part], noise[part]), device)}


def figures(seconds: list[float], way: Way, count: int, cost: float, found: dict[str, float]) -> dict[str, Any]:
    """Return a way's figures: `count` images per call, `cost` GFLOP per image, `found` the machine's limits."""
    speed = rates(count, seconds)
    rate = speed["median"] * cost
    return {
        "dtype": way.dtype,
        "batch_size": way.batch_size,
        "seconds": seconds,
        "images_per_second": speed,
        "gflop_per_image": cost,
        "gflop_per_second": rate,
        "of_matrix_rate": rate / found[f"matrix_{way.dtype}"],
        "of_convolution_rate": rate / found[f"convolution_{way.dtype}"],
    }


def difference(features: Tensor, reference: Tensor) -> dict[str, float]:
    """Return how far features (N, C) are from others: the largest difference over their root mean square, and norms."""
    error, reference = features.double() - reference.double(), reference.double()
    return {
        "largest_difference": (error.abs().max() / reference.square().mean().sqrt()).item(),
        "difference_in_norm": (error.norm() / reference.norm()).item(),
    }


def measure_network(checkpoint: str, args: Arguments) -> dict[str, Any]:
    """Return the figures of one network: every way's, by name, and the machine's limits meanwhile."""
    device = best_device()
    before = limits(device, args.repeats)
    try:
        config = DDAEConfig.from_pretrained(checkpoint, cache_dir=args.cache_dir)
        chosen = (str(config.layer), float(config.sigma or 0))
        ways, described = open_ways(checkpoint, *chosen, device, args.cache_dir)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error
    generator = torch.Generator().manual_seed(args.seed)
    shape = (args.num_images, *described["shape"])
    images = (torch.rand(shape, generator=generator) * 2 - 1).to(device)
    noise = torch.randn(shape, generator=generator).to(device)
    tried = {name: choose_batch_size(way, images, noise, args.batch_sizes, device) for name, way in ways.items()}
    costs = {name: gflop(partial(way.features, images[:1], noise[:1])) for name, way in ways.items()}
    compiling = add_compiled(ways, images, noise, device) if args.compile else {}
    reference = ways["plain"](images, noise)
    differences = {name: difference(way(images, noise), reference) for name, way in ways.items()}
    seconds = in_turn({name: partial(way, images, noise) for name, way in ways.items()}, args.repeats, device)
    after = limits(device, args.repeats)
    found = highest(before, after)
    rows = {}
    for name, way in ways.items():
        cost = costs[name.removesuffix(" compiled")]
        rows[name] = figures(seconds[name], way, len(images), cost, found) | differences[name]
        rows[name]["seconds_by_batch_size"] = tried.get(name)
        rows[name]["compile_seconds"] = compiling.get(name)
    for row in rows.values():
        row["ratio"] = row["images_per_second"]["median"] / rows["plain"]["images_per_second"]["median"]
    return described | {"limits": found, "limits_before": before, "limits_after": after, "ways": rows}


def probe(args: Arguments, images: DataOptions) -> dict[str, Any]:
    """Fit a linear probe on the features of the same images and noise in both types, and return the figures."""
    options = {"layer": args.probe_layer, "sigma": args.probe_sigma}
    options = {name: value for name, value in options.items() if value is not None}
    try:
        processor = DDAEImageProcessor.from_pretrained(args.probe_checkpoint, cache_dir=args.cache_dir)
        if DDAEConfig.from_pretrained(args.probe_checkpoint, cache_dir=args.cache_dir).vae is not None:
            raise ValueError(f"{args.probe_checkpoint} works on latents: give --probe_checkpoint a denoiser of pixels.")
        types = ("float32", "bfloat16")
        models = {t: open_model(args.probe_checkpoint, t, args.cache_dir, **options) for t in types}
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error
    config = models["float32"].config
    layer, sigma = str(config.layer), float(config.sigma)
    splits = labelled_splits(images.open(args.cache_dir), args)
    data = {split: ImageInputs(part, processor) for split, part in zip((TRAIN, TEST), splits, strict=True)}
    labels = {split: inputs.labels for split, inputs in data.items()}
    right, test, report = {}, {}, {"layer": layer, "sigma": sigma, "l2": args.l2}
    count = sum(len(split) for split in labels.values())
    for split, inputs in data.items():  # images that fit into memory are decoded when first read
        for _ in inputs.batches(args.batch_size, title=f"decoding {split} images"):
            pass
    for dtype, model in models.items():
        started, features = time.perf_counter(), {}
        for split in (TRAIN, TEST):
            batches = data[split].batches(args.batch_size, title=f"{dtype}, {split} images")
            found = extract_features(model, batches, [layer], sigma, view=noise_view(split == TEST, 0))
            features[split] = found[layer].numpy()
        speed = count / (time.perf_counter() - started)
        fit = {"num_classes": len(data[TRAIN].names), "device": best_device()}
        fitted = fit_logistic_regression({layer: [features[TRAIN]]}, labels[TRAIN], [args.l2], **fit)
        right[dtype] = fitted[layer].predict([features[TEST]])[0] == labels[TEST]
        test[dtype] = torch.from_numpy(features[TEST])
        report[dtype] = {"images_per_second": speed, "test_accuracy": 100 * float(right[dtype].mean())}
    changed = difference(test["bfloat16"], test["float32"])
    centred = difference(*(test[dtype] - test["float32"].mean(0) for dtype in ("bfloat16", "float32")))
    report |= {"test_images": len(labels[TEST]), "train_images": len(labels[TRAIN]), **changed}
    report["centred_difference_in_norm"] = centred["difference_in_norm"]
    report["gain"] = interval(100 * (right["bfloat16"].astype(float) - right["float32"]))
    return report


def network_table(name: str, network: dict[str, Any]) -> str:
    """Return a network's figures as text."""
    taps = f"{network['taps']} layers"
    title = (
        f"{TITLES.get(name, name)} ({network['denoiser']}, {taps}, {network['parameters'] / 1e6:,.1f} M parameters) "
    )
    title += f"up to `{network['layer']}`, timestep {network['timestep']}:\n\n"
    columns = ["way", "batch", "images/s (least to most)", "ratio", "GFLOP an image", "GFLOP/s", "of the matrix rate"]
    columns += ["of the 3x3 convolution rate", "largest difference", "difference in norm"]
    rows = []
    for way, row in network["ways"].items():
        compiled = row["compile_seconds"]
        speed = row["images_per_second"]
        cells = [way + (f" in {compiled:.0f} s" if compiled else ""), row["batch_size"]]
        cells += [f"{speed['median']:,.1f} ({speed['least']:,.1f} to {speed['most']:,.1f})", f"{row['ratio']:.2f}"]
        cells += [f"{row['gflop_per_image']:.3g}", f"{row['gflop_per_second']:,.0f}"]
        cells += [f"{100 * row[f'of_{kind}_rate']:.0f} %" for kind in ("matrix", "convolution")]
        plain = way == "plain"
        cells += ["" if plain else f"{row['largest_difference']:.1e}"]
        cells += ["" if plain else f"{100 * row['difference_in_norm']:.2g} %"]
        rows.append(cells)
    return f"{title}{table(columns, rows)}\n{describe_limits(network['limits'])}\n"


def probe_table(report: dict[str, Any]) -> str:
    """Return the probes' figures as text."""
    rows = [
        [dtype, f"{report[dtype]['images_per_second']:,.1f}", f"{report[dtype]['test_accuracy']:.2f}"]
        for dtype in ("float32", "bfloat16")
    ]
    title = f"Linear probe at `{report['layer']}`, sigma {report['sigma']:.3g}, fitted on {report['train_images']:,}"
    return (
        f"{title} images:\n\n{table(['features', 'images/s', 'test accuracy'], rows)}\n"
        f"bfloat16 against float32 on the same {report['test_images']:,} test images: {signed(report['gain'])} points "
        f"(95 % interval); features differ by {100 * report['difference_in_norm']:.2g} % in norm, "
        f"{100 * report['centred_difference_in_norm']:.2g} % of what varies between images."
    )


def report(results: dict[str, Any]) -> str:
    """Return what was found, as text."""
    parts = [network_table(name, network) for name, network in results["networks"].items()]
    parts += [probe_table(results["probe"])] if results["probe"] else []
    parts.append(
        f"{results['device']}, {results['threads']} thread(s). Differences are between features and the plain "
        "way's, relative to their root mean square and in norm.\nProducts inside attention count on GPUs only."
    )
    return "\n".join(parts)


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    data, args = parse_arguments(argv)
    given = data.dataset_name is not None or data.train_data_dir is not None
    if (args.probe_checkpoint is not None) != given:
        raise SystemExit("probe_checkpoint goes with one of dataset_name and train_data_dir, whose images it probes.")
    options = {**data.to_dict(), **args.to_dict()}
    results: dict[str, Any] = {"options": options, "device": best_device(), **facts(best_device()), "networks": {}}
    # The probe runs first, as it may refuse what the options name.
    with sentences():
        results["probe"] = probe(args, data) if args.probe_checkpoint else None
    with tempfile.TemporaryDirectory() as folder:
        for name in [Path(args.checkpoint).name] if args.checkpoint else args.networks:
            checkpoint = args.checkpoint or make_checkpoint(name, args, folder)
            results["networks"][name] = measure_network(checkpoint, args)
            write_json(Path(args.output), results)
    print(report(results))
    print(f"Every figure is in {args.output}.")


if __name__ == "__main__":
    main()
