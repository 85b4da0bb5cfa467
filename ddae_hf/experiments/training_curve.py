"""What training gives: the best probe, the loss and the quality of samples of every checkpoint of a run."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm.auto import tqdm

from ..configuration_ddae import DDAEConfig
from .classes import draw_images
from .evaluation import EvaluationOptions, compare_samples
from .extractors import open_extractor
from .images import Images, Inputs, labelled_splits
from .models import open_model, open_processor
from .options import option
from .plots import curves_of_points
from .results import CurveReport, Point
from .sweeping import SweepOptions, changed_inputs, open_for, sweep_inputs

LOSS_IMAGES = 5000
logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class CurveOptions(SweepOptions):
    """Options of `sweep_run`: those of a sweep, and of what else is measured."""

    quality_extractor: str | None = option(
        None, "Over a training run, also measure samples, by this extractor of evaluate_generation.py."
    )
    num_quality_images: int = option(5000, "Samples of each checkpoint.")
    num_inference_steps: int = option(50, "Sampling steps.")
    sampler: Literal["heun"] | None = option(None, "EDM's second-order sampler.")


def sweep_run(
    run: str | os.PathLike[str], images: Images, options: CurveOptions | None = None, **changes: Any
) -> CurveReport:
    """Sweep every checkpoint of a training run, and measure its loss on test images and its samples.

    Args:
        run: The run's folder, with a folder `checkpoint-STEP` for every checkpoint; a finished run is one itself.
        images: The labelled images.
        options: With `output_dir`, each checkpoint's results are in a folder of its name there, `training_curve.json`
            and `training_curve.png` beside them.
        **changes: Fields of the options that are to be others.

    Raises:
        ValueError: A folder without checkpoints, options that cannot work, or images that cannot be read.
        OSError: Not enough space on disk.
    """
    options = CurveOptions.of(options, changes)
    images = Images.open(images, cache_dir=options.cache_dir)
    checkpoints = training_checkpoints(run)
    for checkpoint in checkpoints.values():
        DDAEConfig.from_pretrained(checkpoint)  # refused now, and not after hours
    train, test = labelled_splits(images, options)
    processor = open_processor(next(iter(checkpoints.values())), options.cache_dir)
    learnt, tested = (changed_inputs(each, processor, options) for each in (train, test))
    kept = None if options.output_dir is None else Path(options.output_dir)
    features = options.features_dir or (None if kept is None else str(kept / "features"))
    quality = extractor = None
    if options.quality_extractor is not None:
        quality = EvaluationOptions(
            extractor=options.quality_extractor, num_images=options.num_quality_images,
            num_inference_steps=options.num_inference_steps, sampler=options.sampler, seed=options.seed,
            reference_split=options.train_split, features_dir=features, cache_dir=options.cache_dir,
        )  # fmt: skip
        extractor = open_extractor(quality.extractor, cache_dir=options.cache_dir)
    dataset = images.facts(train, test)
    points = []
    for step, checkpoint in tqdm(checkpoints.items(), desc="Checkpoints"):
        folder = None if kept is None else str(kept / f"checkpoint-{step}")
        own = dataclasses.replace(options, output_dir=folder, features_dir=features)
        found = sweep_inputs(
            str(checkpoint), open_for(checkpoint, own), learnt, tested, processor, own,
            dataset=dataset, given=images.opened_with,
        )  # fmt: skip
        accuracy, loss = found.test_accuracies[str(options.noise_seed)], test_loss(checkpoint, tested, options)
        point = Point(step=step, test_accuracy=accuracy, test_loss=loss, **dataclasses.asdict(found.best))
        if quality is not None:
            where = dataclasses.replace(quality, output_dir=None if folder is None else f"{folder}/generation")
            made: Any = compare_samples(str(checkpoint), images, where, extractor)
            point.frechet_distance = made.results["generated"]["frechet_distance"]
        points.append(point)
        logger.info("Step %s:\n%s", step, found.table())
    report = CurveReport(options={**images.opened_with, **options.to_dict()}, dataset=dataset, points=points)
    if kept is not None:
        report.write(kept)
        curves_of_points(points).savefig(kept / "training_curve.png", dpi=120)
    return report


def training_checkpoints(run: str | os.PathLike[str]) -> dict[int, Path]:
    """Return a training run's checkpoints by step, the final one included, or raise `ValueError` if it has none."""
    folder = Path(run)
    found = {int(path.name.split("-")[1]): path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()}
    results = folder / "train_results.json"
    if results.exists():
        found.setdefault(json.loads(results.read_text(encoding="utf-8"))["steps"], folder)
    if not found:
        raise ValueError(f"{run}: there is no folder `checkpoint-STEP` of a training run in it.")
    return dict(sorted(found.items()))


@torch.no_grad()
def test_loss(checkpoint: Path, test: Inputs, options: CurveOptions) -> float:
    """Return a checkpoint's mean denoising loss on test images, at the same noise for every checkpoint."""
    model = open_model(checkpoint, dtype="float32", null_class=options.null_class)
    generator = torch.Generator().manual_seed(options.seed)
    losses = []
    some = draw_images(test.labels, LOSS_IMAGES)
    for images in test.batches(options.batch_size, some, title="loss on test images"):
        clean = model.encode(images.to(model.device))
        sigma = model.diffusion.family.draw(len(images), None, generator).to(model.device)
        noise = torch.randn(clean.shape, generator=generator).to(model.device)
        losses.append(model.diffusion.loss(clean, sigma=sigma, noise=noise).cpu())
    return torch.cat(losses).mean().item()
