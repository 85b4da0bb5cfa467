r"""Sampling: images a second at equal numbers of network calls, and how good images are after so many calls.

    python -m benchmarks.sample --model_name_or_path runs/cifar10_cpu --dataset_name uoft-cs/cifar10 \
        --edm_model_name_or_path runs/cifar10_edm --flow_model_name_or_path runs/cifar10_flow --num_images 5000 \
        --output runs/benchmarks/sample.json

- Speed: diffusers' `DDIMPipeline` as it comes (float32, contiguous) against `DDAEPipeline` in float32 and in bfloat16,
  in turn, each at the batch size that was fastest for it in this run. On a processor all of them keep the memory that
  they free, which the stock pipeline would not do by itself.
- Precision: samples of the bfloat16 network and of the float32 one from the same noise, by their Frechet distance to
  the data.
- Quality against calls: DDIM, DPM-Solver++ and UniPC on one checkpoint; on a checkpoint of EDM the second-order
  sampler of Karras et al. 2022 and EDM's DPM-Solver++; on one of flow matching Euler's and Heun's steps; all from the
  same noise in float32. Where the steps begin matters at few calls: `leading` timesteps, DDIM's own, leave the noisiest
  levels out, `trailing` ones begin there. DPM-Solver++ of order 1 is DDIM with one difference: it derives the noise
  anew from the clipped image, as all solvers of its kind do, where DDIM keeps the network's. Where it is much worse
  than DDIM, the network is not good enough at high noise for these solvers.
- Brightness: by how much the mean of an image varies from image to image, on the scale of [-1, 1]. A network that does
  not see the mean of the noise makes images that are far too bright and far too dark.

Distances are between features of `--extractor`, by default the sampled checkpoint's own, and can be compared only with
others of the same run. Writes a JSON file with every figure, and a picture beside it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import scipy.stats
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from matplotlib.figure import Figure
from torch import Tensor

from ddae_hf import DDAEPipeline
from ddae_hf.commands.parsing import parse
from ddae_hf.commands.running import sentences
from ddae_hf.experiments.arrays import write_json
from ddae_hf.experiments.devices import best_device, made_fast
from ddae_hf.experiments.draws import SAMPLING, indexed_noise
from ddae_hf.experiments.evaluation import GENERATED_VIEW, REFERENCE_VIEW, Compared, frechet_distance
from ddae_hf.experiments.extractors import Extractor, check_extractor, open_extractor
from ddae_hf.experiments.images import DataOptions
from ddae_hf.experiments.options import Options, option
from ddae_hf.networks import network_of
from ddae_hf.noise import change_scheduler, family_of, new_scheduler

from . import measure

# Frameworks' samplers: the scheduler that takes the steps, its options, and the pipeline's `sampler`.
SAMPLERS: dict[str, dict[str, tuple[Any, dict[str, Any], str | None]]] = {
    "ddpm": {
        "DDIM": (DDIMScheduler, {}, None),
        "DPM-Solver++, order 1": (DPMSolverMultistepScheduler, {"solver_order": 1}, None),
        "DPM-Solver++": (DPMSolverMultistepScheduler, {}, None),
        "UniPC": (UniPCMultistepScheduler, {}, None),
    },
    "edm": {
        "EDM, Heun": (type(new_scheduler("edm")), {}, "heun"),
        "EDM, DPM-Solver++": (EDMDPMSolverMultistepScheduler, {}, None),
    },
    "flow": {
        "Flow, Euler": (FlowMatchEulerDiscreteScheduler, {}, None),
        "Flow, Heun": (FlowMatchHeunDiscreteScheduler, {}, None),
    },
}
SEARCH_CALLS, SEARCH_REPEATS = 2, 2  # every call takes as long as the others: a few find the best batch size
GROUPS = 10  # of images, for the error of a ratio
SPACINGS = ("leading", "trailing", "linspace")


@dataclass(kw_only=True)
class Arguments(Options):
    """The options of the benchmark."""

    model_name_or_path: str = option(help="Unconditional U-Net trained under DDPM, in any layout.")
    edm_model_name_or_path: str | None = option(None, "Another one of the same images, trained with EDM.")
    flow_model_name_or_path: str | None = option(None, "Another one, trained with flow matching.")
    extractor: str | None = option(None, "As `ddae evaluate` takes it; by default ddae:MODEL_NAME_OR_PATH.")
    train_split: str = option("train", "Split of the images to compare with.")
    max_train_samples: int | None = option(None, "Use N images of that split, of all classes.")
    num_images: int = option(5000, "Images of every sampler and number of calls.")
    calls: list[int] = option([5, 10, 20, 50], "Calls of the network for an image.")
    timestep_spacings: list[str] = option(
        ["leading", "trailing"], "Timesteps of DDPM's samplers; precision is measured with the first."
    )
    speed_calls: int = option(10, "Calls for an image where speed is measured.")
    batch_sizes: list[int] = option([16, 32, 64, 128], "Batch sizes to try.")
    repeats: int = option(5, "Batches of each way that are timed.")
    device: Literal["cpu", "cuda"] = option(best_device(), "Where to compute.")
    seed: int = option(0, "Seed of the noise.")
    cache_dir: str | None = option(None, "Where downloads are kept.")
    output: str = option("runs/benchmarks/sample.json", "File of every figure.")

    def check(self) -> None:
        """Refuse what cannot work."""
        if self.num_images < 2 * GROUPS:
            raise ValueError(f"num_images is {self.num_images}: it must be at least {2 * GROUPS}.")
        for name in ("calls", "speed_calls", "batch_sizes", "repeats"):
            given = getattr(self, name)
            if min(given if isinstance(given, list) else [given]) < 1:
                raise ValueError(f"{name} is {given}: it must be at least 1.")
        if wrong := [spacing for spacing in self.timestep_spacings if spacing not in SPACINGS]:
            raise ValueError(f"timestep_spacings has {wrong[0]}: allowed are {', '.join(SPACINGS)}.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device is cuda: torch finds no such device; give cpu.")
        self.calls = sorted(set(self.calls))
        self.extractor = self.extractor or f"ddae:{self.model_name_or_path}"
        check_extractor(self.extractor)


def open_pipeline(args: Arguments, path: str, framework: str, dtype: torch.dtype) -> DDAEPipeline:
    """Return an unconditional U-Net's pipeline, or raise `ValueError` if it is not one or of another framework."""
    pipeline = DDAEPipeline.from_pretrained(path, dtype=dtype, cache_dir=args.cache_dir)
    if pipeline.unet is None or pipeline.vae is not None or network_of(pipeline.unet).is_conditional(pipeline.unet):
        raise ValueError(f"{path} is not an unconditional UNet2DModel of pixels, which DDIMPipeline needs.")
    if (found := family_of(pipeline.scheduler).name) != framework:
        raise ValueError(f"{path} was trained with {found}: give a checkpoint of {framework}.")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(args.device)


def open_ours(args: Arguments, path: str, framework: str, dtype: torch.dtype) -> DDAEPipeline:
    """Return a pipeline as the commands sample with it."""
    pipeline = open_pipeline(args, path, framework, dtype)
    made_fast(pipeline.denoiser, args.device)
    return pipeline


def open_ways(args: Arguments) -> dict[str, Any]:
    """Return the pipelines whose speed is compared, all with DDIM's steps."""
    pipelines: dict[str, Any] = {}
    stock = open_pipeline(args, args.model_name_or_path, "ddpm", torch.float32)
    pipelines["plain"] = DDIMPipeline(stock.unet, DDIMScheduler.from_config(stock.scheduler.config))
    pipelines["plain"].set_progress_bar_config(disable=True)
    for name, dtype in {"float32": torch.float32, "bfloat16": torch.bfloat16}.items():
        pipelines[name] = open_ours(args, args.model_name_or_path, "ddpm", dtype)
        pipelines[name].scheduler = DDIMScheduler.from_config(stock.scheduler.config)
    return pipelines


def measure_speed(args: Arguments, pipelines: dict[str, Any], found: dict[str, float]) -> dict[str, Any]:
    """Return each way's best batch size, and its images a second there, taken in turn with the others."""
    report: dict[str, Any] = {}
    for name, pipeline in pipelines.items():
        calls = {n: partial(pipeline, batch_size=n, num_inference_steps=SEARCH_CALLS) for n in args.batch_sizes}
        seconds = measure.in_turn(calls, SEARCH_REPEATS, args.device)
        tried = {n: n * SEARCH_CALLS / measure.median(each) for n, each in seconds.items()}
        report[name] = {"batch_size": max(tried, key=tried.__getitem__), "images_called_per_second": tried}
    calls = {
        name: partial(pipeline, batch_size=report[name]["batch_size"], num_inference_steps=args.speed_calls)
        for name, pipeline in pipelines.items()
    }
    network = pipelines["plain"].unet
    shape = (1, network.config.in_channels, *sides(network))
    image = torch.zeros(shape, device=args.device)
    gflop = measure.gflop(torch.no_grad()(lambda: network(image, 0)))
    for name, seconds in measure.in_turn(calls, args.repeats, args.device).items():
        rates = measure.rates(report[name]["batch_size"], seconds)
        computed = gflop * args.speed_calls * rates["median"]
        limit = found[f"matrix_{'bfloat16' if name == 'bfloat16' else 'float32'}"]
        report[name] |= {"seconds": seconds, "images_per_second": rates}
        report[name] |= {"gflop_a_call": gflop, "gflops": computed, "share_of_matrix_rate": computed / limit}
    for row in report.values():
        row["ratio"] = row["images_per_second"]["median"] / report["plain"]["images_per_second"]["median"]
    return report


def sides(network: Any) -> tuple[int, int]:
    """Return the height and the width of a network's images."""
    size = network.config.sample_size
    return (size, size) if isinstance(size, int) else tuple(size)


def noted(batches: Iterable[list[Any]], brightness: list[float]) -> Iterator[list[Any]]:
    """Yield batches of images as they are, and note the mean of each on the scale of [-1, 1]."""
    for batch in batches:
        brightness += [float(np.asarray(image).mean()) / 127.5 - 1 for image in batch]
        yield batch


def sampled(
    args: Arguments, pipeline: DDAEPipeline, extractor: Extractor, batch_size: int, steps: int, sampler: Any
) -> tuple[Tensor, float]:
    """Return features (N, C) of images, and the deviation of their brightness.

    They start from noise which depends on the seed and their numbers alone.
    """
    shape = (pipeline.denoiser.config.in_channels, *sides(pipeline.denoiser))
    brightness: list[float] = []

    def batches() -> Iterator[list[Any]]:
        for start in range(0, args.num_images, batch_size):
            numbers = range(start, min(start + batch_size, args.num_images))
            noise = indexed_noise(shape, numbers, args.seed, purpose=SAMPLING)
            yield pipeline(len(numbers), latents=noise, num_inference_steps=steps, sampler=sampler).images

    features = extractor.compute(noted(batches(), brightness), GENERATED_VIEW)
    return features, float(np.std(brightness))


def variants(args: Arguments, trained: Any, framework: str) -> Iterator[tuple[str, Any, str | None]]:
    """Yield the samplers of a framework: their names, their schedulers and the pipeline's `sampler`."""
    for name, (kind, options, sampler) in SAMPLERS[framework].items():
        if "timestep_spacing" not in inspect.signature(kind).parameters:
            yield name, change_scheduler(trained, kind, **options), sampler
            continue
        for spacing in args.timestep_spacings:
            scheduler = change_scheduler(trained, kind, timestep_spacing=spacing, **options)
            yield f"{name}, {spacing}", scheduler, sampler


def steps_for(calls: int, scheduler: Any, sampler: str | None) -> tuple[int, int]:
    """Return the most steps that so many calls allow, and the calls that they take: N steps of Heun's are 2 N - 1."""
    if sampler == "heun" or scheduler.order == 2:
        steps = (calls + 1) // 2
        return steps, 2 * steps - 1
    return calls, calls


def measure_quality(
    args: Arguments,
    pipeline: DDAEPipeline,
    extractor: Extractor,
    reference: Tensor,
    batch_size: int,
) -> tuple[list[dict[str, Any]], Tensor]:
    """Return the distance of every sampler at every number of calls, and the features of the first at the most."""
    rows: list[dict[str, Any]] = []
    kept: list[Tensor] = []
    trained = pipeline.scheduler
    for name, scheduler, sampler in variants(args, trained, family_of(trained).name):
        pipeline.scheduler = scheduler
        for calls in args.calls:
            steps, taken = steps_for(calls, scheduler, sampler)
            features, brightness = sampled(args, pipeline, extractor, batch_size, steps, sampler)
            distance = frechet_distance(reference, features)
            print(f"{name}, {taken} calls: {distance:.4g}, brightness ± {brightness:.3f}", flush=True)
            row = {"sampler": name, "calls": calls, "calls_taken": taken, "steps": steps}
            rows.append(row | {"distance": distance, "brightness": brightness})
        kept = kept or [features]
    return rows, kept[0]


def ratio_with_error(reference: Tensor, base: Tensor, other: Tensor) -> tuple[float, float]:
    """Return how the distance of `other` compares with that of `base`, and its 95 % interval's half-width.

    The error over the images is the jackknife's: the ratio is taken without one group of images after the other. Both
    sets start a group from the same noise.
    """

    def ratio(keep: Tensor) -> float:
        return frechet_distance(reference, other[keep]) / frechet_distance(reference, base[keep])

    number = torch.arange(len(base))
    without = torch.tensor([ratio(number % GROUPS != group) for group in range(GROUPS)], dtype=torch.float64)
    error = ((GROUPS - 1) / GROUPS * (without - without.mean()).square().sum()).sqrt().item()
    return ratio(number >= 0), float(scipy.stats.t.ppf(0.975, GROUPS - 1)) * error


def measure_precision(
    args: Arguments,
    pipeline: DDAEPipeline,
    extractor: Extractor,
    reference: Tensor,
    float32: Tensor,
    batch_size: int,
) -> dict[str, float]:
    """Return the distances of float32 and bfloat16 samples from the same noise, and what sets their scale."""
    _, pipeline.scheduler, _ = next(variants(args, pipeline.scheduler, "ddpm"))
    bfloat16, _ = sampled(args, pipeline, extractor, batch_size, args.calls[-1], None)
    ratio, error = ratio_with_error(reference, float32, bfloat16)
    middle = len(reference) // 2
    return {
        "calls": args.calls[-1],
        "float32": frechet_distance(reference, float32),
        "bfloat16": frechet_distance(reference, bfloat16),
        "ratio": ratio,
        "ratio_half_width": error,
        "halves_of_the_data": frechet_distance(reference[:middle], reference[middle:]),
    }


def speed_table(speed: dict[str, Any]) -> str:
    """Return the speeds as a Markdown table."""
    titles = {"plain": "DDIMPipeline, float32", "float32": "DDAEPipeline, float32"}
    titles["bfloat16"] = "DDAEPipeline, bfloat16"
    rows = []
    for name, r in speed.items():
        rate, share = r["images_per_second"], f"{100 * r['share_of_matrix_rate']:.0f} %"
        spread = f"{rate['median']:.1f} ({rate['least']:.1f} to {rate['most']:.1f})"
        rows.append([titles[name], r["batch_size"], spread, f"{r['ratio']:.2f}", f"{r['gflops']:,.0f}", share])
    columns = ["way", "batch", "images/s", "ratio", "GFLOP/s", "of the type's matrix rate"]
    return measure.table(columns, rows)


def precision_table(found: dict[str, float]) -> str:
    """Return the distances of both types as a Markdown table."""
    ratio = f"{found['ratio']:.4f} ± {found['ratio_half_width']:.4f}"
    cells = [f"{found[name]:.4g}" for name in ("float32", "bfloat16", "halves_of_the_data")]
    columns = ["calls", "float32", "bfloat16", "halves of the data", "bfloat16 / float32 (95 %)"]
    return measure.table(columns, [[found["calls"], *cells, ratio]])


def by_sampler(quality: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return each sampler's figures in the order of its calls."""
    return {name: [row for row in quality if row["sampler"] == name] for name in {r["sampler"]: 0 for r in quality}}


def quality_table(args: Arguments, quality: list[dict[str, Any]], figure: str) -> str:
    """Return the distances, or another figure, as a Markdown table, with the calls where they are not the column's."""

    def cell(row: dict[str, Any]) -> str:
        fewer = "" if row["calls_taken"] == row["calls"] else f" ({row['calls_taken']})"
        return f"{row[figure]:.4g}{fewer}"

    lines = [[name, *map(cell, rows)] for name, rows in by_sampler(quality).items()]
    return measure.table(["sampler", *args.calls], lines)


def draw(path: Path, quality: list[dict[str, Any]]) -> None:
    """Draw the distance of every sampler over its calls."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, rows) in enumerate(by_sampler(quality).items()):
        line = {"EDM": "--", "Flow": ":"}.get(name.split(",")[0], "-")
        style = {"marker": "os^Dv*Xp<>h"[i % 11], "linestyle": line}
        axes.plot([row["calls_taken"] for row in rows], [row["distance"] for row in rows], label=name, **style)
    axes.set(title="Samplers", xlabel="network calls for an image", ylabel="Frechet distance to the data")
    axes.set(xscale="log", yscale="log")
    ticks = sorted({row["calls"] for row in quality})
    axes.set_xticks(ticks, [str(calls) for calls in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def summary(args: Arguments, report: dict[str, Any]) -> str:
    """Return what was measured, in words and tables."""
    parts = [
        f"{measure.describe_limits(report['limits'])} Images/s at {args.speed_calls} calls of the network an image:\n",
        speed_table(report["speed"]),
        f"Frechet distance of {args.num_images:,} samples to {report['reference']['num_images']:,} images of the data, "
        f"{report['reference']['name']}, in features of {args.extractor}. DDIM, {args.timestep_spacings[0]} timesteps, "
        "from the same noise:\n",
        precision_table(report["precision"]),
        "By calls of the network for an image (in brackets where fewer), in float32:\n",
        quality_table(args, report["quality"], "distance"),
        f"Deviation of the images' brightness, which is {report['reference']['brightness']:.4g} for the data:\n",
        quality_table(args, report["quality"], "brightness"),
    ]
    return "\n".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    data, args = parse([DataOptions, Arguments], __doc__, argv)
    with sentences():
        pipelines = open_ways(args)
        most = pipelines["float32"].scheduler.config.num_train_timesteps
        if max(*args.calls, args.speed_calls) > most:
            raise ValueError(f"{args.model_name_or_path} has {most} timesteps: calls and speed_calls allow no more.")
        paths = {"edm": args.edm_model_name_or_path, "flow": args.flow_model_name_or_path}
        others = [open_ours(args, path, framework, torch.float32) for framework, path in paths.items() if path]
        real = data.open(args.cache_dir)[args.train_split].take(args.max_train_samples)
        images = Compared(f"real ({args.train_split})", real, REFERENCE_VIEW)
        extractor = open_extractor(args.extractor, cache_dir=args.cache_dir)
    report: dict[str, Any] = {"options": {**data.to_dict(), **args.to_dict()}}
    report |= {"facts": measure.facts(args.device), "limits": measure.limits(args.device)}
    report["speed"] = speed = measure_speed(args, pipelines, report["limits"])
    brightness: list[float] = []
    reference = extractor.compute(noted(images.batches(250), brightness), images.view)
    report["reference"] = {"name": images.name, "num_images": len(real), "features": reference.shape[1]}
    report["reference"]["brightness"] = float(np.std(brightness))
    shared = (args, pipelines["float32"], extractor, reference, speed["float32"]["batch_size"])
    report["quality"], float32 = measure_quality(*shared)
    for other in others:
        report["quality"] += measure_quality(args, other, *shared[2:])[0]
    batch_size = speed["bfloat16"]["batch_size"]
    report["precision"] = measure_precision(args, pipelines["bfloat16"], extractor, reference, float32, batch_size)
    write_json(Path(args.output), report)
    picture = Path(args.output).with_suffix(".png")
    draw(picture, report["quality"])
    print(f"\n{summary(args, report)}\nEvery figure: {args.output}; picture: {picture}.")


if __name__ == "__main__":
    main()
