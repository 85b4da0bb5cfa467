"""A training run over its steps, or over lengths of the averages of its weights: each is swept, with loss and samples.

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
from .arrays import StrPath, kept_or_temporary, read_json
from .classes import draw_images
from .evaluation import EvaluationOptions, compare_samples
from .extractors import Extractor, open_extractor
from .images import Images, Inputs, Part, labelled_splits, parts_of
from .loading import to_device
from .models import open_for, open_model, open_processor
from .options import option
from .pairs import Point
from .plots import curves_of_points, save_picture
from .rebuilding import Plan, check_output, made, planned
from .results import CurveReport, PretrainingReport
from .run_folder import saved_checkpoints, step_of
from .sharing import Team, is_first_process, this_process
from .sweeping import SweepOptions, changed_inputs, sweep_inputs

LOSS_IMAGES = 5000
logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class CurveOptions(SweepOptions):
    """Options of `sweep_run`: those of a sweep, and of what else is measured."""

    lengths: list[float] = option(
        [], "Sweep averages of these lengths of a training run's weights, made of those that it kept: see `ddae ema`."
    )
    extractor: str | None = option(
        None, "Over a training run, also measure samples, by this extractor of `ddae evaluate`."
    )
    num_images: int = option(5000, "Samples of each checkpoint or average.")
    num_inference_steps: int = option(50, "Sampling steps.")
    sampler: Literal["heun"] | None = option(None, "EDM's second-order sampler.")


@dataclass(frozen=True)
class Stage:
    """A checkpoint of a training run, or an average of its weights: where it is, and what it is called in folders."""

    name: str
    path: Path
    step: int
    length: float | None = None


def sweep_run(run: StrPath, images: Images, options: CurveOptions | None = None, **changes: Any) -> CurveReport | None:
    """Sweep every checkpoint of a training run, and measure its loss on test images and its samples.

    The run's folder has a folder `checkpoint-STEP` for every checkpoint; a finished run is one itself. With `lengths`,
    averages of these lengths at the run's last snapshot are swept in place of checkpoints: see `rebuild_average`. With
    `output_dir`, the results of each are in a folder of its name there, `checkpoint-STEP` or `length-LENGTH`, and
    `training_curve.json` and `training_curve.png` beside them. All processes of `accelerate launch` call this, and
    share the images of each sweep, of the loss and of the samples. The first one gets the report, the others get None.

    Raises:
        ValueError: A folder without checkpoints or snapshots, options that cannot work, images that cannot be read, or
            several processes that are to draw samples or to make averages without a folder.
        OSError: Not enough space on disk.
    """
    options = CurveOptions.of(options, changes)
    count = this_process().num_processes
    shares = "samples" if options.extractor is not None else "averages"
    if (options.extractor is not None or options.lengths) and options.output_dir is None and count > 1:
        raise ValueError(f"output_dir is None: {count} processes share {shares} through a folder.")
    images = Images.open(images, cache_dir=options.cache_dir)
    plans = [planned(run, length) for length in sorted(set(options.lengths))]
    stages = [] if plans else checkpoints_of(run)
    parts = labelled_splits(images, options)
    quality = None if options.extractor is None else sample_options(options)
    extractor = None
    if quality is not None and is_first_process():
        extractor = open_extractor(quality.extractor, cache_dir=options.cache_dir)
    with kept_or_temporary(options.output_dir) as folder:
        stages = stages or averages_of(run, plans, folder)
        points = sweep_stages(stages, images, parts, options, quality, extractor)
    if not is_first_process():
        return None
    dataset = images.facts(*parts)
    report = CurveReport(options={**images.opened_with, **options.to_dict()}, dataset=dataset, points=points)
    if options.output_dir is not None:
        report.write(options.output_dir)
        save_picture(curves_of_points(points), Path(options.output_dir, "training_curve.png"), dpi=120)
    return report


def checkpoints_of(run: StrPath) -> list[Stage]:
    """Return a training run's checkpoints, or raise `ValueError` where it has none, or one that cannot be opened."""
    stages = [Stage(f"checkpoint-{step}", path, step) for step, path in training_checkpoints(run).items()]
    for stage in stages:
        DDAEConfig.from_pretrained(stage.path)  # it is refused now, not after hours
    return stages


def averages_of(run: StrPath, plans: Sequence[Plan], folder: Path) -> list[Stage]:
    """Make averages of a training run's weights as checkpoints in a folder; the first process does so for all."""
    stages = []
    for plan in plans:
        name = f"length-{plan.wanted.length!r}"
        stages.append(Stage(name, folder / name / "checkpoint", plan.wanted.step, plan.wanted.length))
    if is_first_process():
        for plan, stage in zip(plans, stages, strict=True):
            check_output(stage.path)
            made(run, plan).save(stage.path)
    this_process().wait_for_everyone()
    return stages


def sweep_stages(
    stages: Sequence[Stage], images: Images, parts: Sequence[Any], options: CurveOptions,
    quality: EvaluationOptions | None, extractor: Extractor | None,
) -> list[Point]:  # fmt: skip
    """Return what was measured of every stage, in the first process; `parts` are the images of the two splits."""
    processor = open_processor(stages[0].path, options.cache_dir)
    learnt, tested = (changed_inputs(each, processor, options) for each in parts)
    kept = options.output_dir
    features = features_folder(options)
    points = []
    title = "Checkpoints" if stages[0].length is None else "Lengths"
    for stage in tqdm(stages, desc=title, disable=None if is_first_process() else True):
        folder = kept and f"{kept}/{stage.name}"
        own = dataclasses.replace(options, output_dir=folder, features_dir=features)
        model = open_for(stage.path, own)
        found = sweep_inputs(str(stage.path), model, images, learnt, tested, processor, own)
        loss = test_loss(stage.path, tested, options)
        samples: Any = None
        if quality is not None:
            where = dataclasses.replace(quality, output_dir=folder and f"{folder}/generation")
            samples = compare_samples(str(stage.path), images, where, extractor)
        if found is None or loss is None:  # the first process has them
            continue
        point = Point(
            step=stage.step, length=stage.length, test_accuracy=found.test_accuracies[str(options.noise_seed)],
            test_loss=loss, **dataclasses.asdict(found.best),
        )  # fmt: skip
        if samples is not None:
            point.frechet_distance = samples.results["generated"]["frechet_distance"]
        points.append(point)
        logger.info("%s:\n%s", stage.name, found.table())
    return points


def features_folder(options: CurveOptions) -> str | None:
    """Return the folder of features that all checkpoints or averages share, if any is kept."""
    return options.features_dir or (options.output_dir and f"{options.output_dir}/features")


def sample_options(options: CurveOptions) -> EvaluationOptions:
    """Return how samples of every checkpoint or average are drawn and compared."""
    return EvaluationOptions(
        extractor=str(options.extractor), num_images=options.num_images,
        num_inference_steps=options.num_inference_steps, sampler=options.sampler, seed=options.seed,
        reference_split=options.train_split, features_dir=features_folder(options), cache_dir=options.cache_dir,
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
