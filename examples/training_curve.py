"""What `sweep.py --checkpoints` measures beside accuracy: a training run's loss and the quality of its samples."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import evaluate_generation
from ddae_hf import DDAEConfig, DDAEModel
from ddae_hf.experiments.classes import draw_images
from ddae_hf.experiments.plots import stacked_curves
from labelled import LabelledImages, ready

LOSS_IMAGES = 5000


def add_curve_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the measurements over a training run."""
    group = parser.add_argument_group("over a training run")
    group.add_argument("--checkpoints", metavar="RUN", help="Sweep every checkpoint of a training run's folder.")
    group.add_argument(
        "--quality_extractor", help="Also measure samples, by this --extractor of evaluate_generation.py."
    )
    group.add_argument("--num_quality_images", type=int, default=5000, help="Samples of each checkpoint.")
    group.add_argument("--num_inference_steps", type=int, default=50, help="Sampling steps.")
    group.add_argument("--sampler", choices=["heun"], help="EDM's second-order sampler.")


def training_checkpoints(run: str) -> dict[int, Path]:
    """Return a training run's checkpoints by step, the final one included, or stop."""
    folder = Path(run)
    found = {int(path.name.split("-")[1]): path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()}
    results = folder / "train_results.json"
    if results.exists():
        found.setdefault(json.loads(results.read_text(encoding="utf-8"))["steps"], folder)
    if not found:
        raise SystemExit(f"--checkpoints {run}: there is no folder `checkpoint-STEP` of a training run in it.")
    return dict(sorted(found.items()))


@torch.no_grad()
def test_loss(args: argparse.Namespace, checkpoint: Path, data: LabelledImages) -> float:
    """Return a checkpoint's mean denoising loss on test images, at the same noise for every checkpoint."""
    options = {} if args.null_class is None else {"null_class": args.null_class}
    model = ready(DDAEModel.from_pretrained(checkpoint, dtype=torch.float32, **options))
    diffusion = model.diffusion
    generator = torch.Generator().manual_seed(args.seed)
    losses = []
    for images in data.batches("test", draw_images(data.labels["test"], LOSS_IMAGES), "loss on test images"):
        clean = model.encode(images.to(model.device))
        sigma = diffusion.family.draw(len(images), None, generator)
        noise = torch.randn(clean.shape, generator=generator)
        noise, sigma = noise.to(model.device), sigma.to(model.device)
        losses.append(diffusion.loss(clean, sigma=sigma, noise=noise).cpu())
    return torch.cat(losses).mean().item()


def check_run(args: argparse.Namespace, checkpoints: dict[int, Path]) -> None:
    """Open what the measurements over a run need, so that what cannot work ends it before any long work."""
    for checkpoint in checkpoints.values():
        try:
            DDAEConfig.from_pretrained(checkpoint)
        except (ValueError, OSError) as error:
            raise SystemExit(str(error)) from error
    if args.quality_extractor:
        options = quality_options(args, next(iter(checkpoints.values())), Path(args.output_dir))
        quality = evaluate_generation.parse_arguments(options)
        images = evaluate_generation.real_images(quality, quality.num_images)["reference"]
        evaluate_generation.open_extractor(quality, images)


def sample_quality(args: argparse.Namespace, checkpoint: Path, folder: Path) -> float:
    """Return the Frechet distance of a checkpoint's samples to the training images, by `evaluate_generation.py`."""
    evaluate_generation.main(quality_options(args, checkpoint, folder))
    report = json.loads((folder / "generation_results.json").read_text(encoding="utf-8"))
    return report["results"]["generated"]["frechet_distance"]


def quality_options(args: argparse.Namespace, checkpoint: Path, folder: Path) -> list[str]:
    """Return the options of `evaluate_generation.py` for a checkpoint's samples."""
    options = ["--model_name_or_path", str(checkpoint), "--output_dir", str(folder)]
    options += ["--extractor", args.quality_extractor, "--features_dir", args.features_dir, "--seed", str(args.seed)]
    options += ["--num_images", str(args.num_quality_images), "--num_inference_steps", str(args.num_inference_steps)]
    options += ["--reference_split", args.train_split]
    for name in ("sampler", "dataset_name", "dataset_config_name", "train_data_dir", "image_column", "cache_dir"):
        if getattr(args, name) is not None:
            options += [f"--{name}", str(getattr(args, name))]
    return options


def draw_training_curve(path: Path, points: list[dict[str, Any]]) -> None:
    """Draw accuracy, loss and sample quality over training steps, the best of each marked."""
    panels = {"test accuracy (%)": [100 * point["test_accuracy"] for point in points]}
    panels["loss on test images"] = [point["test_loss"] for point in points]
    if "frechet_distance" in points[0]:
        panels["Frechet distance"] = [point["frechet_distance"] for point in points]
    best = {name: (max if name == "test accuracy (%)" else min)(values) for name, values in panels.items()}
    marked = {name: values.index(best[name]) for name, values in panels.items()}
    steps = [point["step"] for point in points]
    stacked_curves(
        path, steps, panels, marked, title="Best probe, loss and samples while training", xlabel="training step"
    )


def points_table(points: list[dict[str, Any]]) -> str:
    """Return what was found over a training run, as a Markdown table."""
    lines = ["| step | layer, sigma | test accuracy | loss on test images | Frechet distance |", "|---" * 5 + "|"]
    for point in points:
        where, distance = f"{point['layer']}, {point['sigma']:g}", point.get("frechet_distance")
        figures = f"{100 * point['test_accuracy']:.2f} | {point['test_loss']:.4f}"
        lines.append(f"| {point['step']} | {where} | {figures} | {'' if distance is None else f'{distance:.4g}'} |")
    return "\n".join(lines)
