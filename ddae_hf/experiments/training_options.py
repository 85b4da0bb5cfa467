"""What trainings have in common: options, the loop that follows from them, resuming."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from diffusers.optimization import get_scheduler
from torch import nn

from .batches import BatchSizes
from .devices import PRECISION, has_bfloat16, made_fast, training_precision
from .options import Options, option
from .run_folder import OF_DATA, OF_PLACES, STATE, Progress, checkpoint_to_resume, read_options
from .sharding import Shards
from .sharing import this_process
from .training import Loop, accelerated

logger = logging.getLogger(__name__)

# diffusers' `piecewise_constant` needs rules that no option gives.
Schedule = Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]


@dataclass(kw_only=True)
class LoopOptions(Options):
    """What every training by `training.Loop` can be asked for."""

    # Options that may change when a run is resumed; they hold from then on.
    may_change: ClassVar[frozenset[str]] = (OF_DATA | OF_PLACES).union(
        """total_batch_size train_batch_size gradient_accumulation_steps num_train_epochs max_train_steps
        learning_rate scale_lr lr_scheduler lr_warmup_steps max_grad_norm mixed_precision allow_tf32
        checkpoints_total_limit""".split()
    )
    default_batch: ClassVar[int] = 128

    output_dir: str | None = option(None, "Folder of checkpoints and results; without one, none are written.")
    train_split: str = option("train", "Split to train on.")
    max_train_samples: int | None = option(None, "Use N images of all classes, always the same; a stream's first N.")
    cache_dir: str | None = option(None, "Where downloaded data is kept.")
    random_flip: bool = option(False, "Mirror half of the images.")
    seed: int = option(0, "Seed of everything that is random.")
    total_batch_size: int | None = option(
        None, "Images per step, of all devices together; by default 128, or what train_batch_size comes to."
    )
    train_batch_size: int | None = option(None, "Images of a forward pass on each device; by default its whole share.")
    gradient_accumulation_steps: int | None = option(None, "Forward passes per step; by default as many as are needed.")
    num_train_epochs: int = option(100, "Passes over all images.")
    max_train_steps: int | None = option(None, "Number of optimiser steps; overrides num_train_epochs.")
    learning_rate: float = option(1e-4, "Largest learning rate.")
    scale_lr: bool = option(False, "Multiply the learning rate by the images per step, as diffusers' scripts do.")
    lr_scheduler: Schedule = option("constant_with_warmup", "How the learning rate changes.")
    lr_warmup_steps: int = option(500, "Steps in which the learning rate rises from 0.")
    max_grad_norm: float = option(1.0, "Largest norm of the gradient; 0 leaves it as it is.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(None, PRECISION)
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
        """Refuse what needs a folder if there is none."""
        if self.output_dir is None and self.resume_from_checkpoint == "latest":
            raise ValueError("resume_from_checkpoint is latest: give an output_dir with it, or a checkpoint's folder.")

    def checkpoint(self, *weights: str) -> Path | None:
        """Return the checkpoint to resume, which must have these files too, or None for a fresh start."""
        where = self.output_dir or self.resume_from_checkpoint
        return checkpoint_to_resume(where, self.resume_from_checkpoint, (*STATE, *weights)) if where else None

    @cached_property
    def sizes(self) -> BatchSizes:
        """How many images a step has, and how they are shared out, or `ValueError` where they cannot be."""
        total, each, passes = self.total_batch_size, self.train_batch_size, self.gradient_accumulation_steps
        processes = this_process().num_processes
        shares = processes * (each or 1) * (passes or 1)
        total = total or (shares if each else self.default_batch)
        if total % shares if None in (each, passes) else total != shares:
            needed = f"a multiple of {shares}" if None in (each, passes) else f"{shares}, or one of the three left out"
            raise ValueError(
                f"total_batch_size is {total}: with train_batch_size {each}, gradient_accumulation_steps {passes} and "
                f"{processes} process(es) it must be {needed}."
            )
        each = each or total // shares
        passes = total // (each * processes)
        logger.info(f"A step has {total} images: {each} x {processes} device(s) x {passes} forward pass(es).")
        return BatchSizes(total, each, passes, processes)

    @contextlib.contextmanager
    def accelerated(self, resume: Path | None = None) -> Iterator[Accelerator]:
        """Give the run's `Accelerator`, or raise `ValueError` where the tracker or the precision is not available.

        A run that goes on from a checkpoint, `resume`, keeps its precision where none is given: `training_precision`.
        Afterwards TF32 and what `training.accelerated` names are as before, and the tracker has ended.
        """
        logs = self.output_dir and os.path.join(self.output_dir, self.logging_dir)
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        before = (matmul.allow_tf32, cudnn.allow_tf32) if self.allow_tf32 else None
        trained = {} if resume is None else read_options(resume)
        with accelerated(
            accumulation=self.sizes.accumulation,
            mixed_precision=training_precision(
                self.mixed_precision, trained.get("mixed_precision"), this_process().device
            ),
            log_with=self.report_to,
            project_config=ProjectConfiguration(self.output_dir, logs),
        ) as accelerator:
            if self.report_to and not accelerator.log_with:
                raise ValueError(f"report_to is {self.report_to}: that tracker is not installed.")
            if accelerator.mixed_precision == "bf16" and not has_bfloat16(accelerator.device):
                logger.warning("This hardware has no bfloat16 arithmetic: mixed_precision no will be faster.")
            try:
                if self.report_to:
                    accelerator.init_trackers("ddae_hf", {name: str(value) for name, value in self.to_dict().items()})
                if before is not None:
                    matmul.allow_tf32 = cudnn.allow_tf32 = True
                yield accelerator
            finally:
                for tracker in accelerator.trackers:
                    tracker.finish()
                if before is not None:
                    matmul.allow_tf32, cudnn.allow_tf32 = before

    def in_force(self, precision: str, opened_with: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options of a run, as plain data that `--config` takes again on any number of devices."""
        given = {**opened_with, **self.to_dict(), "total_batch_size": self.sizes.total, "mixed_precision": precision}
        if given["train_batch_size"] is not None:
            given["gradient_accumulation_steps"] = None  # it follows from the two sizes
        return given

    def loop(
        self, accelerator: Accelerator, module: nn.Module, loader: Any, data: Progress, resume: Path | None,
        adam: Mapping[str, Any], shard: bool = False, **more: Any,
    ) -> Loop:  # fmt: skip
        """Return a `Loop` as these options and `more` say, with AdamW, from the start or from a checkpoint.

        With `shard` each process keeps a part of the module and of `more`'s `average`.
        """
        made_fast(module, accelerator.device)
        if shard:
            more["shards"] = Shards(accelerator, module, more["average"])
        rate = self.learning_rate * (self.sizes.total if self.scale_lr else 1)
        beside = more.get("beside")
        weights = [*module.parameters(), *([] if beside is None else beside.parameters())]
        optimizer = torch.optim.AdamW(weights, rate, fused=True, **adam)
        steps = self.max_train_steps or self.num_train_epochs * max(1, (data.num_images or 0) // self.sizes.total)
        if self.lr_warmup_steps >= steps:
            logger.warning(f"lr_warmup_steps is {self.lr_warmup_steps} of {steps} steps: the rate rises to the end.")
        loop = Loop(
            accelerator, module, optimizer, loader, total_steps=steps, seed=self.seed,
            schedule=get_scheduler(self.lr_scheduler, optimizer, None, self.lr_warmup_steps, steps),
            max_grad_norm=self.max_grad_norm, output_dir=self.output_dir, checkpointing_steps=self.checkpointing_steps,
            checkpoints_total_limit=self.checkpoints_total_limit, **more,
        )  # fmt: skip
        loop.restore(resume)
        loop.progress.num_images = data.num_images
        loop.progress.images_hash = data.images_hash
        return loop


@dataclass(kw_only=True)
class TrainingOptions(LoopOptions):
    """What training a denoiser and training a VAE have in common."""

    resolution: int | None = option(None, "Side of the square training images; by default the network's sample_size.")
    center_crop: bool | None = option(
        None, "Resize images of another shape in their proportions and cut out the centre (the default); else squash."
    )


def check_resumed(given: Mapping[str, Any], data: Progress, checkpoint: Path) -> dict[str, Any]:
    """Return a checkpoint's options, or raise `ValueError` unless batches, images and precision are those of its run.

    `data` has this run's `num_images` and `images_hash`.
    """
    trained = {"center_crop": False, **read_options(checkpoint)}  # version 0.1.0 had no such option, and squashed
    before = Progress.read(checkpoint)
    now = given["total_batch_size"]
    total = trained.get("total_batch_size")
    if total is None:
        total = (before.batch_images or now) * (trained.get("gradient_accumulation_steps") or 1)
    was = f"{checkpoint} was trained on"
    anew = "or begin another run, in another output_dir"
    if total != now:
        here = f"but here there are {now}: give total_batch_size {total}, {anew}"
        raise ValueError(f"{was} {total} images a step (total_batch_size), {here}.")
    same = f"give the same images, {anew}."
    if data.num_images and before.num_images not in (None, data.num_images):
        raise ValueError(f"{was} {before.num_images} images, but here there are {data.num_images}: {same}")
    if data.images_hash and before.images_hash not in (None, data.images_hash):
        raise ValueError(f"{was} other images, as many as these: {same}")
    if given["mixed_precision"] == "fp16" and not (checkpoint / "state" / "scaler.pt").is_file():
        raise ValueError(
            f"mixed_precision was {trained.get('mixed_precision')} and is fp16: {checkpoint} has no scale of the "
            "losses. Give the precision that the run began with, or bf16."
        )
    return trained
