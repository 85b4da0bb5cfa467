"""What a training run keeps and leaves behind: how far it has come, checkpoints, samples, results."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import re
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from ddae_hf import DDAEImageProcessor, DDAEPipeline
from ddae_hf.experiments.arrays import write_json, write_text, written_whole
from ddae_hf.experiments.plots import image_grid
from ddae_hf.experiments.run_facts import base_model, machine
from ddae_hf.networks import network_of
from training_data import TrainingData

logger = get_logger(__name__)

PROGRESS, LATENTS = Path("state") / "progress.json", Path("state") / "latents.json"
OPTIONS = "training_options.yaml"
RESULTS = "train_results.json"
NUM_LOSSES = 100  # batches over which the loss is averaged


@dataclasses.dataclass
class Progress:
    """How far a run has come, with all that it was resumed from."""

    epoch: int = 0
    batch: int = 0  # batches of this epoch that are done
    batches: int = 0  # those of all epochs
    images: int = 0
    seconds: float = 0.0
    num_images: int | None = None  # of the data set; of a stream nobody knows it
    losses: list[float] = dataclasses.field(default_factory=list)  # of the last batches, as they were last looked at

    def count(self, images: int, last: bool) -> None:
        """Add a batch, which may be the last of its epoch."""
        self.batches, self.images = self.batches + 1, self.images + images
        self.epoch, self.batch = (self.epoch + 1, 0) if last else (self.epoch, self.batch + 1)

    def loss(self) -> float | None:
        """Return the mean of the last losses; a checkpoint of version 0.1.0 has kept none."""
        return fmean(self.losses) if self.losses else None

    def images_per_second(self, resumed: Progress) -> float:
        """Return the rate since `resumed`, or the rate until then if nothing was left to train."""
        if self.images == resumed.images:
            return round(resumed.images / resumed.seconds, 1)
        return round((self.images - resumed.images) / (self.seconds - resumed.seconds), 1)


def read_progress(checkpoint: Path) -> Progress:
    """Return how far a run had come when it wrote a checkpoint."""
    return Progress(**json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8")))


def read_options(checkpoint: Path) -> dict[str, Any]:
    """Return the options of the run that wrote a checkpoint."""
    return yaml.safe_load((checkpoint / OPTIONS).read_text(encoding="utf-8"))


def write_options(args: argparse.Namespace, folder: Path) -> None:
    """Write the options, from which a run can be repeated, complete or not at all."""
    write_text(folder / OPTIONS, yaml.safe_dump(vars(args), sort_keys=False))


def checkpoint_to_resume(args: argparse.Namespace) -> Path | None:
    """Return the folder to resume from, or None for a fresh start."""
    found = saved_checkpoints(args.output_dir)
    if args.resume_from_checkpoint is None:
        if found:
            raise SystemExit(
                f"{args.output_dir} holds checkpoints of an earlier run: resume it (--resume_from_checkpoint latest), "
                "or choose another --output_dir."
            )
        return None
    folder = Path(args.resume_from_checkpoint)
    if args.resume_from_checkpoint == "latest":
        if not found:
            logger.info(f"{args.output_dir} has no checkpoint yet: starting afresh.")
            return None
        folder = found[-1]
    if not (folder / PROGRESS).is_file():
        raise SystemExit(f"--resume_from_checkpoint {folder}: there is no checkpoint with a training state.")
    return folder


def saved_checkpoints(output_dir: str) -> list[Path]:
    """Return the folders `checkpoint-STEP`, oldest first."""
    # Others, such as a copy `checkpoint-9-best`, are the user's.
    folders = [f for f in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", f.name)]
    return sorted(folders, key=lambda f: int(f.name.split("-")[1]))


def check_batches(args: argparse.Namespace, checkpoint: Path, processes: int, num_images: int | None) -> None:
    """Stop unless this run cuts epochs into the checkpoint's batches, without which its place in one is another.

    As many images in a batch of all processes are enough: how many processes share it does not change their order.
    """
    options = read_options(checkpoint)
    before = len(list((checkpoint / "state").glob("random_states_*")))
    size = options["train_batch_size"] * before
    if args.train_batch_size * processes != size:
        advice = f"give --train_batch_size {size // processes}"
        if size % processes:
            advice = f"give a number of processes by which {size} can be divided"
        raise SystemExit(
            f"{checkpoint} was trained on batches of {size} images (--train_batch_size {options['train_batch_size']}, "
            f"processes: {before}), and this run would train on {args.train_batch_size * processes} "
            f"(--train_batch_size {args.train_batch_size}, processes: {processes}). Which images of its epoch are done "
            f"would not be known: {advice}{_or_begin_anew(args, checkpoint)}."
        )
    trained = read_progress(checkpoint).num_images
    if None not in (trained, num_images) and trained != num_images:
        raise SystemExit(
            f"{checkpoint} was trained on {trained} images, and here are {num_images}. Which of them are done would "
            f"not be known: give the same images{_or_begin_anew(args, checkpoint)}."
        )


def _or_begin_anew(args: argparse.Namespace, checkpoint: Path) -> str:
    """Return how another run can start from the same weights, if the script can do that."""
    return f", or begin another run from its weights (--init_from {checkpoint})" if hasattr(args, "init_from") else ""


def is_finished(args: argparse.Namespace, step: int) -> bool:
    """Return whether a run that is resumed has left all it leaves, after so many steps; its results come last."""
    path = Path(args.output_dir) / RESULTS
    if args.resume_from_checkpoint is None or not path.is_file():
        return False
    finished = json.loads(path.read_text(encoding="utf-8"))["steps"] == step
    if finished:
        logger.info(f"{args.output_dir} is complete, after {step} steps: there is nothing left to do.")
    return finished


def restore(accelerator: Accelerator, optimizer: Any, lr_scheduler: Any, checkpoint: Path) -> Progress:
    """Load accelerate's part of a checkpoint, and return how far it had come.

    The learning rate, and what else options say of the optimiser, are this run's: `not_finite` asks for a lower rate.
    """
    given = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    rates = lr_scheduler.scheduler.base_lrs
    schedule = lr_scheduler.scheduler
    accelerator.load_state(str(checkpoint / "state"))
    # accelerate advances a schedule once for every process, and their number may be another now.
    before = len(list((checkpoint / "state").glob("random_states_*")))
    schedule.last_epoch = schedule.last_epoch // before * accelerator.num_processes
    schedule.base_lrs = rates
    for group, options, rate, factor in zip(optimizer.param_groups, given, rates, schedule.lr_lambdas, strict=True):
        group.update(options | {"lr": rate * factor(schedule.last_epoch)})
    logger.info(f"Resuming from {checkpoint}.")
    return read_progress(checkpoint)


def largest(weights: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the largest magnitude of weights, which is finite if all are."""
    return torch.nn.utils.get_total_norm([w for w in weights if w.is_floating_point()], math.inf).float()


def look(
    accelerator: Accelerator, losses: Iterable[torch.Tensor], weights: Iterable[torch.Tensor]
) -> tuple[list[float], bool]:
    """Return the last losses, as means over all processes, and whether these and all weights are finite.

    Every process must ask, and all get the same answer: none waits for one that has stopped.
    """
    seen = accelerator.reduce(torch.stack([*(loss.float() for loss in losses), largest(weights)]), "mean")
    return seen[:-1].tolist(), bool(seen.isfinite().all())


def check_weights(checkpoint: Path, weights: Iterable[torch.Tensor]) -> None:
    """Stop if a checkpoint to resume, as version 0.1.0 could write it, is not finite."""
    if not largest(weights).isfinite():
        raise SystemExit(f"{checkpoint} holds weights that are no finite numbers: resume an earlier one.")


def not_finite(
    step: int, loss: float | None, rate: float, checkpoint: Path | None, how: str, option: str = "--learning_rate"
) -> SystemExit:
    """Return what stops a run whose loss or weights are not finite.

    Args:
        step: The step at which that was seen.
        loss: The last loss, or the mean of the last ones.
        rate: Learning rate then.
        checkpoint: The last good checkpoint, if there is any.
        how: What can be done with it.
        option: Name of the learning rate's option.
    """
    what = f"The loss is {loss}"
    if loss is not None and math.isfinite(loss):
        what = f"Some weights are no finite numbers, after a loss of {loss:.4g},"
    last = (
        f"{checkpoint} is the last good checkpoint: {how}" if checkpoint else "There is no checkpoint yet: start again"
    )
    return SystemExit(
        f"{what} at step {step}, at a learning rate of {rate:.3g}; none of it is saved. {last} with a lower "
        f"{option}, or in higher precision."
    )


def last_checkpoint(args: argparse.Namespace, step: int) -> Path | None:
    """Return the newest checkpoint until a step, be it the one that was resumed."""
    found = [f for f in saved_checkpoints(args.output_dir) if int(f.name.split("-")[1]) <= step]
    resumed = args.resume_from_checkpoint
    return found[-1] if found else Path(resumed) if resumed not in (None, "latest") else None


def discard(folder: Path) -> None:
    """Remove a checkpoint: even where this is interrupted it is whole or not there."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder.rename(folder.with_name(f"partial-{folder.name}")))


def clear_rubbish(output_dir: str) -> None:
    """Remove what interrupted writing has left."""
    for rubbish in Path(output_dir).glob("partial-checkpoint*"):
        shutil.rmtree(rubbish)
    for rubbish in Path(output_dir).glob(f"*.{'[0-9a-f]' * 12}.partial"):  # the names that `written_whole` gives
        rubbish.unlink()


def write_checkpoint(
    args: argparse.Namespace,
    accelerator: Accelerator,
    progress: Progress,
    step: int,
    limit: int | None,
    save: Callable[[Path], None],
) -> None:
    """Write `checkpoint-STEP`, complete or not at all, and drop the oldest others beyond the limit.

    Args:
        args: Options, which say where.
        accelerator: What holds the training state, of all processes.
        progress: How far training has come.
        step: Number of steps that are done.
        limit: How many checkpoints to keep, all if None. The one that is written is always among them.
        save: Writes the rest into a folder, the options among it.
    """
    folder = Path(args.output_dir)
    partial = folder / "partial-checkpoint"
    final = folder / f"checkpoint-{step}"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial / "state"))
    accelerator.wait_for_everyone()  # every process has written its random state: the folder can be renamed
    if accelerator.is_main_process:
        write_json(partial / PROGRESS, dataclasses.asdict(progress))
        save(partial)
        if final.exists():
            discard(final)
        partial.rename(final)
        others = [old for old in saved_checkpoints(args.output_dir) if old != final]
        for old in others[: max(0, len(others) + 1 - limit)] if limit else []:
            discard(old)
        logger.info(f"Saved {final}.")
    accelerator.wait_for_everyone()


class Run:
    """Writes what a training run leaves behind: checkpoints, samples, results."""

    def __init__(
        self, args: argparse.Namespace, accelerator: Accelerator, ema_denoiser: Any, scheduler: Any, data: TrainingData
    ):
        self.args, self.accelerator, self.scheduler, self.data = args, accelerator, scheduler, data
        self.ema_denoiser = ema_denoiser.to(accelerator.device)
        self.ema = EMAModel(self.ema_denoiser.parameters(), decay=args.ema_decay, foreach=True)
        self.folder = Path(args.output_dir)
        self.progress = self.resumed = Progress()
        # The weights are saved as pipelines; accelerate keeps the rest of the training state.
        accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
        accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())
        if args.report_to:
            accelerator.init_trackers("ddae_hf", {k: str(v) for k, v in vars(args).items()})

    def start(self, checkpoint: Path | None, optimizer: Any, lr_scheduler: Any) -> int:
        """Restore a checkpoint's optimiser and schedule if there is one, and return the step that training is at."""
        if self.accelerator.is_main_process:
            clear_rubbish(self.args.output_dir)
        if checkpoint is not None:
            self.progress = restore(self.accelerator, optimizer, lr_scheduler, checkpoint)
            check_weights(checkpoint, self.ema.shadow_params)  # to which all weights have come
            self.ema.optimization_step = int(checkpoint.name.split("-")[1])
        if not self.args.streaming:
            self.progress.num_images = len(self.data.dataset)
        self.resumed, self.started = dataclasses.replace(self.progress), time.monotonic()
        return self.ema.optimization_step

    def look(self, denoiser: Any, step: int, losses: deque[torch.Tensor], rate: float, bar: tqdm) -> None:
        """Show the mean of the last losses, and stop unless these and all weights are finite."""
        self.progress.losses, finite = look(
            self.accelerator, losses, [*denoiser.state_dict().values(), *self.ema.shadow_params]
        )
        loss = self.progress.loss()
        if not finite:
            raise not_finite(step, loss, rate, last_checkpoint(self.args, step), "resume from it")
        bar.set_postfix(loss=f"{loss:.4f}", lr=f"{rate:.1e}")
        self.accelerator.log({"loss": loss, "lr": rate}, step=step)

    def count_seconds(self) -> None:
        """Bring the seconds of all runs up to now."""
        self.progress.seconds = self.resumed.seconds + time.monotonic() - self.started

    def pipeline(self, denoiser: Any) -> DDAEPipeline:
        """Return a pipeline of the network, which knows its null class, its classes and the VAE of its latents."""
        network = network_of(self.ema_denoiser)
        config = self.ema_denoiser.config
        null_class = None
        if self.args.class_conditional and network.default_null_class(config) is None:
            null_class = network.num_labels(config) - 1
        parts = {"vae": self.data.vae, "id2label": dict(enumerate(self.data.names)) if self.data.names else None}
        return DDAEPipeline.for_denoiser(denoiser, copy.deepcopy(self.scheduler), null_class, **parts)

    def save(self, denoiser: Any, folder: Path) -> None:
        """Write the averaged network, the raw one in `raw`, how their images are prepared, and the options."""
        self.ema.copy_to(self.ema_denoiser.parameters())
        raw = self.accelerator.unwrap_model(denoiser, keep_torch_compile=False)
        self.pipeline(self.ema_denoiser).save_pretrained(folder)
        self.pipeline(raw).save_pretrained(folder / "raw")
        vae = None if self.data.vae is None else self.data.vae.config
        config, crop = self.ema_denoiser.config, self.data.center_crop
        for place in (folder, folder / "raw"):
            DDAEImageProcessor.for_denoiser(config, vae, do_center_crop=crop).save_pretrained(place)
        write_options(self.args, folder)

    def checkpoint(self, denoiser: Any, step: int) -> None:
        """Write `checkpoint-STEP`, complete or not at all, and drop the oldest others beyond the limit."""
        self.count_seconds()

        def save(folder: Path) -> None:
            if self.data.described is not None:
                write_json(folder / LATENTS, self.data.described)
            self.save(denoiser, folder)

        write_checkpoint(self.args, self.accelerator, self.progress, step, self.args.checkpoints_total_limit, save)

    def picture(self, step: int) -> Path:
        """Return the file of a step's samples."""
        return self.folder / "samples" / f"step-{step:07d}.png"

    def sample(self, step: int) -> None:
        """Draw a grid from the averaged network, always from the same noise."""
        if not self.accelerator.is_main_process:
            return
        self.ema.copy_to(self.ema_denoiser.parameters())
        pipeline = self.pipeline(self.ema_denoiser).to(self.accelerator.device)
        pipeline.set_progress_bar_config(desc="Sampling", leave=False)
        generator = torch.Generator("cpu").manual_seed(self.args.seed)
        count, steps = self.args.num_samples, self.args.num_inference_steps
        labels = torch.arange(count) % pipeline.null_class if self.args.class_conditional else None
        options = {"num_inference_steps": steps, "sampler": self.args.sampler, "output_type": "np"}
        images = pipeline(count, labels, generator, **options).images
        if self.data.vae is not None:  # its place is left to the training
            self.data.vae.to("cpu")
        shades = images[..., :3] if images.shape[-1] >= 3 else images[..., :1]
        path = self.picture(step)
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as partial:
            image_grid(pipeline.numpy_to_pil(shades)).save(partial, format="PNG")

    def finish(self, denoiser: Any, step: int) -> None:
        """Write the final network, its samples and, last of all, the results."""
        self.count_seconds()
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.save(denoiser, self.folder)
            if self.args.sample_steps and step % self.args.sample_steps:
                self.sample(step)
            loss = self.progress.loss()
            results = {
                "steps": step,
                "loss_last_100_batches": loss,
                "images": self.progress.images,
                "seconds": round(self.progress.seconds, 1),
                "images_this_run": self.progress.images - self.resumed.images,
                "seconds_this_run": round(self.progress.seconds - self.resumed.seconds, 1),
                "images_per_second": self.progress.images_per_second(self.resumed),
                "parameters": sum(p.numel() for p in self.ema_denoiser.parameters()),
                "dataset": self.data.facts,
                **({"latents": self.data.described} if self.data.described else {}),
                **machine(self.accelerator.device.type, self.accelerator.num_processes),
                **base_model(self.args.init_from),
            }
            write_json(self.folder / RESULTS, results)
            logger.info(f"{results['images_per_second']} images/s, loss {loss}; saved {self.folder}.")
        self.accelerator.end_training()
