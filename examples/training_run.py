"""What a training run keeps and leaves behind: how far it has come, checkpoints, samples, results."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import shutil
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from data import image_grid, write_json
from ddae_hf import DDAEImageProcessor, DDAEPipeline
from ddae_hf.conditioning import default_null_class, num_labels
from facts import base_model, machine
from training_data import TrainingData

logger = get_logger(__name__)

PROGRESS, LATENTS = Path("state") / "progress.json", Path("state") / "latents.json"


@dataclasses.dataclass
class Progress:
    """How far a run has come, with all that it was resumed from."""

    epoch: int = 0
    batch: int = 0  # batches of this epoch that are done
    batches: int = 0  # those of all epochs
    images: int = 0
    seconds: float = 0.0

    def count(self, images: int, last: bool) -> None:
        """Add a batch, which may be the last of its epoch."""
        self.batches, self.images = self.batches + 1, self.images + images
        self.epoch, self.batch = (self.epoch + 1, 0) if last else (self.epoch, self.batch + 1)


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
    folders = [f for f in Path(output_dir).glob("checkpoint-*") if f.name.split("-")[1].isdigit()]
    return sorted(folders, key=lambda f: int(f.name.split("-")[1]))


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

    def start(self, checkpoint: Path | None) -> int:
        """Restore a checkpoint's optimiser and schedule if there is one, and return the step that training is at."""
        if checkpoint is not None:
            self.accelerator.load_state(str(checkpoint / "state"))
            self.ema.optimization_step = int(checkpoint.name.split("-")[1])
            self.progress = Progress(**json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8")))
            logger.info(f"Resuming from {checkpoint}.")
        self.resumed, self.started = dataclasses.replace(self.progress), time.monotonic()
        return self.ema.optimization_step

    def log(self, step: int, losses: deque[torch.Tensor], rate: float, progress: tqdm) -> None:
        """Show the mean of the last losses, and stop if it is no number."""
        loss = mean(losses)
        if not math.isfinite(loss):
            raise SystemExit(f"The loss is {loss} at step {step}: lower --learning_rate, or train in higher precision.")
        progress.set_postfix(loss=f"{loss:.4f}", lr=f"{rate:.1e}")
        self.accelerator.log({"loss": loss, "lr": rate}, step=step)

    def pipeline(self, denoiser: Any) -> DDAEPipeline:
        """Return a pipeline of the network, which knows its null class, its classes and the VAE of its latents."""
        config, null_class = self.ema_denoiser.config, None
        if self.args.class_conditional and default_null_class(config) is None:
            null_class = num_labels(config) - 1
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
        options = yaml.safe_dump(vars(self.args), sort_keys=False)
        (folder / "training_options.yaml").write_text(options, encoding="utf-8")

    def checkpoint(self, denoiser: Any, step: int) -> None:
        """Write `checkpoint-STEP`, complete or not at all, and drop the oldest beyond the limit."""
        partial, final = self.folder / "partial-checkpoint", self.folder / f"checkpoint-{step}"
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(partial / "state"))
        self.accelerator.wait_for_everyone()  # every process has written its random state: the folder can be renamed
        if self.accelerator.is_main_process:
            seconds = self.resumed.seconds + time.monotonic() - self.started
            write_json(partial / PROGRESS, dataclasses.asdict(self.progress) | {"seconds": seconds})
            if self.data.described is not None:
                write_json(partial / LATENTS, self.data.described)
            self.save(denoiser, partial)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            for old in saved_checkpoints(self.args.output_dir)[: -(self.args.checkpoints_total_limit or 10**9)]:
                shutil.rmtree(old)
            logger.info(f"Saved {final}.")
        self.accelerator.wait_for_everyone()

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
        path = self.folder / "samples" / f"step-{step:07d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image_grid(pipeline.numpy_to_pil(shades)).save(path)

    def finish(self, denoiser: Any, step: int, loss: float) -> None:
        """Write the final network, its samples and the results."""
        seconds = time.monotonic() - self.started
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.save(denoiser, self.folder)
            if self.args.sample_steps and step % self.args.sample_steps:
                self.sample(step)
            images = self.progress.images - self.resumed.images
            results = {
                "steps": step,
                "loss_last_100_batches": loss,
                "images": self.progress.images,
                "seconds": round(self.resumed.seconds + seconds, 1),
                "images_this_run": images,
                "seconds_this_run": round(seconds, 1),
                "images_per_second": round(images / seconds, 1),
                "parameters": sum(p.numel() for p in self.ema_denoiser.parameters()),
                "dataset": self.data.facts,
                **({"latents": self.data.described} if self.data.described else {}),
                **machine(self.accelerator.device.type, self.accelerator.num_processes),
                **base_model(self.args.init_from),
            }
            write_json(self.folder / "train_results.json", results)
            logger.info(f"{results['images_per_second']} images/s, loss {loss:.4f}; saved {self.folder}.")
        self.accelerator.end_training()


def mean(losses: deque[torch.Tensor]) -> float:
    """Return the mean of the last losses."""
    return torch.stack(list(losses)).mean().item()
