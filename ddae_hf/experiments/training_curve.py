"""A training run over its steps: every checkpoint is swept, and its loss and its samples are measured.

from ddae_hf.experiments import Images, sweep_run
report = sweep_run("runs/cifar10", Images.open("uoft-cs/cifar10"), layers=["decoder"], output_dir="runs/curve")
print(report.table())
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..configuration_ddae import DDAEConfig
from ..modeling_ddae import DDAEModel
from .arrays import StrPath, read_json
from .classes import draw_images
from .evaluation import EvaluationOptions, compare_samples
from .extractors import open_extractor
from .images import Images, Inputs, Part, labelled_splits, parts_of
from .loading import to_device
from .models import open_for, open_model, open_processor
from .options import option
from .pairs import Point
from .plots import curves_of_points, save_picture
from .results import CurveReport, PretrainingReport
from .run_folder import saved_checkpoints, step_of
from .sharing import Team, is_first_process, this_process
from .sweeping import SweepOptions, changed_inputs, sweep_inputs

LOSS_IMAGES = 5000
logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class CurveOptions(SweepOptions):
    """Options of `sweep_run`: those of a sweep, and of what else is measured."""

    extractor: str | None = option(
        None, "Over a training run, also measure samples, by this extractor of `ddae evaluate`."
    )
    num_images: int = option(5000, "Samples of each checkpoint.")
    num_inference_steps: int = option(50, "Sampling steps.")
    sampler: Literal["heun"] | None = option(None, "EDM's second-order sampler.")


def sweep_run(run: StrPath, images: Images, options: CurveOptions | None = None, **changes: Any) -> CurveReport | None:
    """Sweep every checkpoint of a training run, and measure its loss on test images and its samples.

    The run's folder has a folder `checkpoint-STEP` for every checkpoint; a finished run is one itself. With
    `output_dir`, each checkpoint's results are in a folder of its name there, `training_curve.json` and
    `training_curve.png` beside them. All processes of `accelerate launch` call this, and share the images of each
    sweep, of the loss and of the samples. The first one gets the report, the others get None.

    Raises:
        ValueError: A folder without checkpoints, options that cannot work, images that cannot be read, or several
            processes that are to draw samples without a folder.
        OSError: Not enough space on disk.
    """
    options = CurveOptions.of(options, changes)
    count = this_process().num_processes
    if options.extractor is not None and options.output_dir is None and count > 1:
        raise ValueError(f"output_dir is None: {count} processes share samples through a folder.")
    images = Images.open(images, cache_dir=options.cache_dir)
    checkpoints = training_checkpoints(run)
    for checkpoint in checkpoints.values():
        DDAEConfig.from_pretrained(checkpoint)  # it is refused now, not after hours
    train, test = labelled_splits(images, options)
    processor = open_processor(next(iter(checkpoints.values())), options.cache_dir)
    learnt, tested = (changed_inputs(each, processor, options) for each in (train, test))
    kept = options.output_dir
    features = options.features_dir or (kept and f"{kept}/features")
    quality = extractor = None
    if options.extractor is not None:
        quality = sample_options(options, features)
        extractor = open_extractor(quality.extractor, cache_dir=options.cache_dir) if is_first_process() else None
    points = []
    for step, checkpoint in tqdm(checkpoints.items(), desc="Checkpoints", disable=None if is_first_process() else True):
        folder = kept and f"{kept}/checkpoint-{step}"
        own = dataclasses.replace(options, output_dir=folder, features_dir=features)
        found = sweep_inputs(str(checkpoint), open_for(checkpoint, own), images, learnt, tested, processor, own)
        loss = test_loss(checkpoint, tested, options)
        made: Any = None
        if quality is not None:
            where = dataclasses.replace(quality, output_dir=folder and f"{folder}/generation")
            made = compare_samples(str(checkpoint), images, where, extractor)
        if found is None or loss is None:  # the first process has them
            continue
        accuracy = found.test_accuracies[str(options.noise_seed)]
        point = Point(step=step, test_accuracy=accuracy, test_loss=loss, **dataclasses.asdict(found.best))
        if made is not None:
            point.frechet_distance = made.results["generated"]["frechet_distance"]
        points.append(point)
        logger.info("Step %s:\n%s", step, found.table())
    if not is_first_process():
        return None
    dataset = images.facts(train, test)
    report = CurveReport(options={**images.opened_with, **options.to_dict()}, dataset=dataset, points=points)
    if kept is not None:
        report.write(kept)
        save_picture(curves_of_points(points), Path(kept, "training_curve.png"), dpi=120)
    return report


def sample_options(options: CurveOptions, features_dir: str | None) -> EvaluationOptions:
    """Return how samples of every checkpoint are drawn and compared, with features of images in a folder."""
    return EvaluationOptions(
        extractor=str(options.extractor), num_images=options.num_images,
        num_inference_steps=options.num_inference_steps, sampler=options.sampler, seed=options.seed,
        reference_split=options.train_split, features_dir=features_dir, cache_dir=options.cache_dir,
    )  # fmt: skip


def training_checkpoints(run: StrPath) -> dict[int, Path]:
    """Return a training run's checkpoints by step, the final one included, or raise `ValueError` if it has none."""
    found = {step_of(path): path for path in saved_checkpoints(run)}
    results = Path(run, PretrainingReport.file)
    if results.exists():
        found.setdefault(read_json(results)["steps"], Path(run))
    if not found:
        raise ValueError(f"{run} has no folder `checkpoint-STEP` of a training run: give another.")
    return dict(sorted(found.items()))


@torch.no_grad()
def test_loss(checkpoint: Path, test: Inputs, options: CurveOptions) -> float | None:
    """Return a checkpoint's mean denoising loss on test images, at the same noise for every checkpoint.

    All launched processes share the images, and the first one gets the loss.
    """
    model = open_model(checkpoint, dtype="float32", null_class=options.null_class)
    team = Team({"loss": partial(losses_of_parts, model, test, options)})
    if team.helps:
        team.serve()
        return None
    with team:
        parts = parts_of(draw_images(test.labels, LOSS_IMAGES), options.batch_size)
        losses = [found["loss"] for found in team.each("loss", parts)]
    return torch.cat(losses).cpu().mean().item()


def losses_of_parts(
    model: DDAEModel, test: Inputs, options: CurveOptions, parts: Sequence[Part]
) -> Iterator[dict[str, Tensor]]:
    """Yield the losses of some parts of the images, with the draws that they would have among all parts."""
    generator = torch.Generator().manual_seed(options.seed)
    drawn = 0
    batches = test.parts(parts, title="loss on test images", device=model.device)
    for (_, numbers), images in zip(parts, batches, strict=True):
        for first in range(drawn, numbers.stop, options.batch_size):  # other processes' parts are drawn, too
            count = min(options.batch_size, numbers.stop - first)
            levels = model.diffusion.family.draw(count, None, generator)
            noise = torch.randn((count, *model.config.sample_shape), generator=generator)
        drawn = numbers.stop
        clean = model.encode(images)
        sigma = to_device(levels, model.device)
        yield {"loss": model.diffusion.loss(clean, sigma=sigma, noise=to_device(noise, model.device))}
