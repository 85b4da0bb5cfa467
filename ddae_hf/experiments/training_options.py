"""The options that every training loop has, the size of its batches on any number of devices, and resuming."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler

from .accelerating import accelerated
from .options import Options, option
from .progress import Progress
from .run_folder import read_options

logger = logging.getLogger(__name__)

Precision = Literal["no", "fp16", "bf16"]
# diffusers' `piecewise_constant` needs rules that no option gives.
Schedule = Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
# What may be another when a run is resumed; it holds from then on.
MAY_CHANGE = frozenset(
    """output_dir cache_dir dataset_name dataset_config_name train_data_dir latents_dir image_column label_column
    skip_bad_images train_split max_train_samples total_batch_size train_batch_size gradient_accumulation_steps
    num_train_epochs max_train_steps learning_rate scale_lr lr_scheduler lr_warmup_steps max_grad_norm
    mixed_precision allow_tf32 dataloader_num_workers checkpointing_steps checkpoints_total_limit
    resume_from_checkpoint report_to logging_dir""".split()
)


@dataclass(kw_only=True)
class TrainingOptions(Options):
    """What training a denoiser and training a VAE have in common."""

    may_change: ClassVar[frozenset[str]] = MAY_CHANGE
    default_batch: ClassVar[int] = 128

    output_dir: str | None = option(None, "Folder of checkpoints and results; without one there are none on disk.")
    train_split: str = option("train", "Split to train on.")
    max_train_samples: int | None = option(
        None, "Use N training images of all classes, always the same ones; of a stream the first N."
    )
    cache_dir: str | None = option(None, "Where downloaded data is kept.")
    resolution: int | None = option(None, "Side of the square training images; by default the network's sample_size.")
    center_crop: bool | None = option(
        None, "Resize images of another shape in their proportions and cut out the centre (the default); else squash."
    )
    random_flip: bool = option(False, "Mirror half of the images.")
    seed: int = option(0, "Seed of everything that is random.")
    total_batch_size: int | None = option(
        None, "Images a step, of all devices together; by default 128, or what train_batch_size comes to."
    )
    train_batch_size: int | None = option(
        None, "Images of a forward pass on each device; by default total_batch_size divided among them."
    )
    gradient_accumulation_steps: int | None = option(None, "Forward passes a step; by default as many as are needed.")
    num_train_epochs: int = option(100, "Times that all images are gone through.")
    max_train_steps: int | None = option(None, "Number of optimiser steps; overrides num_train_epochs.")
    learning_rate: float = option(1e-4, "Largest learning rate.")
    scale_lr: bool = option(False, "Multiply it by the images of a step, as diffusers' scripts do.")
    lr_scheduler: Schedule = option("constant_with_warmup", "How the learning rate changes.")
    lr_warmup_steps: int = option(500, "Steps in which it rises from 0.")
    max_grad_norm: float = option(1.0, "Largest norm of the gradient; 0 leaves it as it is.")
    mixed_precision: Precision | None = option(None, "By default what accelerate is configured for.")
    allow_tf32: bool | None = option(None, "Compute float32 in TF32 on GPUs; by default as torch does.")
    dataloader_num_workers: int = option(
        0, "Processes that decode images, anew in each epoch; with 0 images that fit into memory are decoded once."
    )
    checkpointing_steps: int = option(5000, "Save a checkpoint, ready to resume, every N steps.")
    checkpoints_total_limit: int | None = option(None, "Keep only the newest N checkpoints; by default all.")
    resume_from_checkpoint: str | None = option(None, "A checkpoint, or `latest` for the newest whole one.")
    report_to: str | None = option(None, "Tracker: tensorboard, wandb, ...; none by default.")
    logging_dir: str = option("logs", "Folder of the tracker's files, inside output_dir.")

    def check(self) -> None:
        """Refuse what needs a folder without one."""
        if self.output_dir is None and self.resume_from_checkpoint == "latest":
            raise ValueError("resume_from_checkpoint is latest, of output_dir: give that, or a checkpoint's folder.")

    def accelerated(self, sizes: BatchSizes) -> AbstractContextManager[Accelerator]:
        """Return what gives the run's `Accelerator`: see `accelerating.accelerated`."""
        return accelerated(
            mixed_precision=self.mixed_precision,
            accumulation=sizes.accumulation,
            allow_tf32=self.allow_tf32,
            report_to=self.report_to,
            output_dir=self.output_dir,
            logging_dir=self.logging_dir,
            tracked=self.to_dict(),
        )

    def schedule(self, total_steps: int) -> Callable[[torch.optim.Optimizer], Any]:
        """Return what makes the schedule of an optimiser's learning rate."""
        return lambda optimizer: get_scheduler(
            self.lr_scheduler, optimizer, num_warmup_steps=self.lr_warmup_steps, num_training_steps=total_steps
        )


class BatchSizes(NamedTuple):
    """How a step's images are shared out.

    Attributes:
        total: Images of a step.
        per_device: Those of a forward pass on each device.
        accumulation: Forward passes of a step.
        processes: Number of devices.
    """

    total: int
    per_device: int
    accumulation: int
    processes: int

    def rate(self, options: Any) -> float:
        """Return the learning rate, which `scale_lr` multiplies by the images of a step."""
        return options.learning_rate * (self.total if options.scale_lr else 1)


def batch_sizes(options: Any, processes: int, default: int = 128) -> BatchSizes:
    """Return how many images a step has, and how they are shared out among devices and forward passes.

    Args:
        options: Has `total_batch_size`, `train_batch_size` and `gradient_accumulation_steps`, None where not given.
        processes: Number of devices.
        default: Images of a step where neither size is given.

    Raises:
        ValueError: Sizes that contradict each other, or that cannot be shared out.
    """
    total, each, passes = options.total_batch_size, options.train_batch_size, options.gradient_accumulation_steps
    if total is None:
        total = default if each is None else each * processes * (passes or 1)
    what = f"total_batch_size is {total}"
    if each is None:
        passes = passes or 1
        shares = processes * passes
        if total % shares:
            raise ValueError(
                f"{what}, which {processes} processes of {passes} forward passes (gradient_accumulation_steps) cannot "
                f"share: give a multiple of {shares}, or another number of either."
            )
        each = total // shares
    elif passes is None:
        if total % (each * processes):
            raise ValueError(
                f"{what}, which is no multiple of a train_batch_size of {each} on each of {processes} processes: give "
                f"a multiple of {each * processes}, or another train_batch_size."
            )
        passes = total // (each * processes)
    elif each * processes * passes != total:
        raise ValueError(
            f"{what}, and train_batch_size {each} x {processes} processes x gradient_accumulation_steps {passes} are "
            f"{each * processes * passes}: leave out one of the three."
        )
    sizes = BatchSizes(total, each, passes, processes)
    logger.info(f"A step has {total} images: {each} x {processes} device(s) x {passes} forward pass(es).")
    return sizes


def check_data(progress: Progress, trained: Mapping[str, Any], sizes: BatchSizes, now: Progress, where: Path) -> None:
    """Raise `ValueError` unless a run that is resumed has the images and the batches that it began with.

    Else which images of its epoch are done would not be known.

    Args:
        progress: What the checkpoint says.
        trained: Its options.
        sizes: Batches of this run.
        now: Has this run's `num_images` and `images_hash`, as far as they are known.
        where: The checkpoint.
    """
    before = trained.get("total_batch_size")
    if before is None:
        before = (progress.batch_images or sizes.total) * (trained.get("gradient_accumulation_steps") or 1)
    anew = "or begin another run, in another output_dir"
    if before != sizes.total:
        raise ValueError(
            f"{where} was trained on {before} images a step (total_batch_size), and here are {sizes.total}: give "
            f"total_batch_size {before}, {anew}."
        )
    if None not in (progress.num_images, now.num_images) and progress.num_images != now.num_images:
        raise ValueError(
            f"{where} was trained on {progress.num_images} images, and here are {now.num_images}: give the same "
            f"images, {anew}."
        )
    if None not in (progress.images_hash, now.images_hash) and progress.images_hash != now.images_hash:
        raise ValueError(f"{where} was trained on other images, as many as these: give the same images, {anew}.")


def check_precision(options: Mapping[str, Any], trained: Mapping[str, Any], where: Path) -> None:
    """Raise `ValueError` if a run is to go on in fp16 from a checkpoint that has no scale for its losses."""
    if options["mixed_precision"] == "fp16" and not (where / "state" / "scaler.pt").is_file():
        raise ValueError(
            f"mixed_precision was {trained.get('mixed_precision')} and is fp16: {where} has no scale of the losses. "
            "Give the precision that the run began with, or bf16."
        )


def in_force(options: Options, sizes: BatchSizes, precision: str, opened_with: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that a run has, plain data that `--config` takes again on any number of devices."""
    given = {**opened_with, **options.to_dict(), "total_batch_size": sizes.total, "mixed_precision": precision}
    if given["train_batch_size"] is not None:
        given["gradient_accumulation_steps"] = None  # it follows from the two sizes
    return given


def trained_with(checkpoint: Path) -> dict[str, Any]:
    """Return the options of a checkpoint's run, those added that its version did not have."""
    options = read_options(checkpoint)
    options.setdefault("center_crop", False)  # version 0.1.0 had no such option, and squashed
    return options
