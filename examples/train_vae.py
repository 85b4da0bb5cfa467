r"""Train a small variational autoencoder on images, which need no labels, for denoisers that work on latents.

    python examples/train_vae.py --config examples/configs/cifar10_vae.yaml \
        --dataset_name uoft-cs/cifar10 --output_dir runs/cifar10_vae

The output folder opens with diffusers' `AutoencoderKL.from_pretrained`, and `encode_latents.py --vae` takes it; its
`scaling_factor` is measured. The loss of an image is the error of its reconstruction plus a small weight times the
divergence of its posterior from a standard normal distribution (Rombach et al. 2022, arXiv:2112.10752), without their
perceptual and adversarial terms: details that the latents have no room for come back blurred.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.logging import get_logger
from datasets import Dataset
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.optimization import SchedulerType, get_scheduler
from torch import Tensor, nn
from tqdm.auto import tqdm

from data import (
    add_center_crop_argument,
    add_data_arguments,
    load_training_images,
    parse_with_config,
    training_batches,
    training_inputs,
)
from ddae_hf import DDAEImageProcessor, DDAEPipeline
from ddae_hf.experiments.arrays import write_json
from ddae_hf.experiments.devices import made_fast
from ddae_hf.experiments.pixels import read_images
from ddae_hf.experiments.plots import image_grid
from ddae_hf.experiments.run_facts import data_facts, machine
from pretrain import batches_from, make_accelerator, seed_step
from training_run import (
    NUM_LOSSES,
    RESULTS,
    Progress,
    check_batches,
    check_weights,
    checkpoint_to_resume,
    clear_rubbish,
    is_finished,
    last_checkpoint,
    look,
    not_finite,
    read_options,
    restore,
    write_checkpoint,
    write_options,
)

logger = get_logger(__name__)

MEASURED = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
DERIVED = {name: "it is measured after the training" for name in MEASURED}
DERIVED |= {"sample_size": "--resolution gives it", "out_channels": "they are as many as in_channels"}
DERIVED |= {f"{way}_block_types": "there is one block for each of block_out_channels" for way in ("down", "up")}
TRAINED = ("vae", "resolution", "center_crop", "loss", "kl_weight", "random_flip", "held_out", "seed")
NUM_SCALED = 2000  # training images of which the scaling factor is measured
NUM_PAIRS = 32


class Autoencoder(nn.Module):
    """Gives in one forward pass, which accelerate can distribute, what the loss needs."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return reconstructions (B, C, H, W) from draws of the posterior, and its divergence (B,) in nats."""
        # The divergence takes exponentials, which are kept out of half precision.
        posterior = DiagonalGaussianDistribution(self.vae.encode(images).latent_dist.parameters.float())
        return self.vae.decode(posterior.sample()).sample.float(), posterior.kl()


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the options, those of the command line over those of `--config`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    add_center_crop_argument(parser)
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    add("--vae", type=yaml.safe_load, default={}, help="Options of diffusers' AutoencoderKL, as YAML.")
    add("--output_dir", default="runs/vae", help="Folder of the autoencoder, its checkpoints and results.")
    add("--resolution", type=int, default=32, help="Side of the square training images.")
    add("--held_out", type=int, default=1000, help="Training images that are kept out to measure on.")
    add("--random_flip", action=flag, default=False, help="Mirror half of the images.")
    add("--loss", choices=["l1", "l2"], default="l2", help="Absolute or squared error of the reconstruction.")
    add("--kl_weight", type=float, default=1e-6, help="Weight of the divergence, both terms summed over an image.")
    add("--seed", type=int, default=0, help="Seed of everything that is random.")
    add("--train_batch_size", type=int, default=64, help="Images a step on each device.")
    add("--num_train_epochs", type=int, default=10)
    add("--max_train_steps", type=int, help="Number of optimiser steps; overrides --num_train_epochs.")
    add("--learning_rate", type=float, default=1e-3)
    add("--lr_scheduler", default="cosine", choices=[s.value for s in SchedulerType])
    add("--lr_warmup_steps", type=int, default=100)
    add("--max_grad_norm", type=float, default=1.0, help="Largest norm of the gradient; 0 leaves it as it is.")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="By default what accelerate is configured for.")
    add("--allow_tf32", action=flag, default=False)
    add("--dataloader_num_workers", type=int, default=0, help="Processes that decode images.")
    add("--checkpointing_steps", type=int, default=1000, help="Save a checkpoint, ready to resume, every N steps.")
    add("--resume_from_checkpoint", help="A checkpoint's folder, or `latest` for the newest in --output_dir.")
    # What the helpers of pretrain.py ask for, and this script has no use for.
    parser.set_defaults(streaming=False, class_conditional=False, augment=0.0, gradient_accumulation_steps=1)
    parser.set_defaults(report_to=None, logging_dir="logs")
    args = parse_with_config(parser, argv)
    widths = args.vae.get("block_out_channels", [64]) if isinstance(args.vae, dict) else None
    if not (isinstance(widths, list) and widths):
        parser.error(f"--vae is {args.vae!r}: it must be options, such as {{block_out_channels: [16, 32, 64]}}.")
    return args


def new_vae(args: argparse.Namespace) -> AutoencoderKL:
    """Return the autoencoder, randomly initialised, that the options describe; stop if they cannot work."""
    if derived := sorted(set(args.vae) & set(DERIVED)):
        raise SystemExit(f"--vae has {derived[0]}: leave it out, {DERIVED[derived[0]]}.")
    if unknown := sorted(set(args.vae) - set(inspect.signature(AutoencoderKL).parameters)):
        raise SystemExit(f"--vae: AutoencoderKL has no options {unknown}.")
    levels = len(args.vae.get("block_out_channels", [64]))
    factor = 2 ** (levels - 1)
    if args.resolution % factor:
        raise SystemExit(
            f"--resolution is {args.resolution}: the {levels} block_out_channels of --vae make latents {factor} times "
            f"smaller, so it must be a multiple of {factor}."
        )
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    sizes = {"sample_size": args.resolution, "out_channels": args.vae.get("in_channels", 3)}
    torch.manual_seed(args.seed)
    try:
        vae = AutoencoderKL(**args.vae, **blocks, **sizes)
    except (TypeError, ValueError) as error:
        raise SystemExit(f"--vae: {error}") from error
    # Posteriors start narrow: with a deviation of one, their noise is what the first steps learn to overcome.
    last = vae.quant_conv if vae.config.use_quant_conv else vae.encoder.conv_out
    nn.init.constant_(last.bias.detach()[vae.config.latent_channels :], -6.0)
    return vae


def split_images(args: argparse.Namespace, processes: int) -> tuple[Dataset, Dataset]:
    """Return the images to train on and those to measure on, both shuffled once."""
    images, _ = load_training_images(args)
    needed = args.held_out + args.train_batch_size * processes
    if len(images) < needed:
        raise SystemExit(
            f"There are {len(images)} images: --held_out {args.held_out} and a --train_batch_size of "
            f"{args.train_batch_size} for each of {processes} processes need {needed}. Lower one of them."
        )
    order = np.random.default_rng(args.seed).permutation(len(images))
    return images.select(order[args.held_out :]), images.select(order[: args.held_out])


def reconstruction_loss(args: argparse.Namespace, clean: Tensor, reconstruction: Tensor, divergence: Tensor) -> Tensor:
    """Return the mean error of a pixel value plus the weighted divergence, which is shared among an image's values."""
    error = reconstruction - clean
    error = error.abs() if args.loss == "l1" else error.square()
    return error.mean() + args.kl_weight * divergence.mean() / clean[0].numel()


@torch.no_grad()
def measure(
    args: argparse.Namespace, vae: AutoencoderKL, images: Dataset, path: Path | None = None
) -> dict[str, float]:
    """Return what the autoencoder does to images, in float32; write some pairs of image and reconstruction to `path`.

    Reconstructions are of the posterior's mean, clipped to [-1, 1]; their peak signal-to-noise ratio is averaged over
    images. The latents' statistics are of a draw of each posterior, over all their values.
    """
    processor = DDAEImageProcessor.for_denoiser(vae.config, do_center_crop=args.center_crop)
    generator = torch.Generator().manual_seed(args.seed)
    ratios, divergences, latents, pairs = [], [], [], []
    for start in range(0, len(images), 100):
        batch = read_images(images, [*range(len(images))[start : start + 100]], "image")
        clean = processor(batch, return_tensors="pt")["pixel_values"].to(vae.device)
        posterior = vae.encode(clean).latent_dist
        restored = vae.decode(posterior.mode()).sample.clamp(-1, 1)
        ratios.append(-10 * ((restored - clean) / 2).square().mean((1, 2, 3)).clamp(min=1e-10).log10())
        divergences.append(posterior.kl())
        latents.append(posterior.sample(generator).flatten())
        pairs += list(torch.stack([clean, restored], dim=1)[: NUM_PAIRS - len(pairs)])
    if path is not None:
        shades = torch.cat(pairs)[:, : 3 if vae.config.in_channels >= 3 else 1]
        images_of_pairs = DDAEPipeline.numpy_to_pil((shades / 2 + 0.5).permute(0, 2, 3, 1).cpu().numpy())
        image_grid(images_of_pairs, columns=8).save(path)
    drawn, divergence = torch.cat(latents), torch.cat(divergences).mean().item()
    return {
        "psnr": torch.cat(ratios).mean().item(),
        "kl_nats_per_image": divergence,
        "latent_mean": drawn.mean().item(),
        "latent_std": drawn.std().item(),
        "num_images": len(images),
    }


def check_same_run(args: argparse.Namespace, checkpoint: Path) -> None:
    """Stop if the options describe another autoencoder or objective than those of the run that is resumed."""
    trained = read_options(checkpoint)
    trained.setdefault("center_crop", False)  # version 0.1.0 had no such option, and squashed
    if different := [name for name in TRAINED if getattr(args, name) != trained[name]]:
        raise SystemExit(f"The checkpoint to resume was trained with other options: {', '.join(different)} differ.")


def finish(args: argparse.Namespace, vae: AutoencoderKL, images: Dataset, held_out: Dataset) -> dict[str, Any]:
    """Write the autoencoder, with its scaling factor, and some reconstructions; return what was measured."""
    scale = 1 / measure(args, vae, images.select(range(min(NUM_SCALED, len(images)))))["latent_std"]
    # A shift would go unheard: DiTPipeline, for one, only scales.
    vae.register_to_config(scaling_factor=scale)
    vae.save_pretrained(args.output_dir)
    write_options(args, Path(args.output_dir))
    return {
        "held_out": measure(args, vae, held_out, Path(args.output_dir, "reconstructions.png")),
        "scaling_factor": scale,
        "parameters": vae.num_parameters(),
        "dataset": data_facts(args, len(images)),
    }


@dataclasses.dataclass
class Training:
    """What a training step works on, ready for the device, and how far the training is."""

    vae: AutoencoderKL
    autoencoder: Any
    optimizer: Any
    lr_scheduler: Any
    dataloader: Any
    progress: Progress
    total_steps: int
    losses: deque[Tensor]  # the last batches'


def set_up(args: argparse.Namespace, accelerator: Accelerator, images: Dataset, resume: Path | None) -> Training:
    """Return a training, from the start or from a checkpoint, or stop if it cannot be."""
    vae = new_vae(args)
    processes = accelerator.num_processes
    if resume is not None:
        check_same_run(args, resume)
        check_batches(args, resume, processes, len(images))
    optimizer = torch.optim.AdamW(vae.parameters(), args.learning_rate, weight_decay=0.0, fused=True)
    batches = training_batches(args, images, vae, 0)
    made_fast(vae, accelerator.device)
    autoencoder, optimizer, dataloader = accelerator.prepare(Autoencoder(vae), optimizer, batches)
    total_steps = args.max_train_steps or args.num_train_epochs * len(dataloader)
    # accelerate advances the schedule once for every process.
    schedule = {"num_warmup_steps": args.lr_warmup_steps * processes, "num_training_steps": total_steps * processes}
    lr_scheduler = accelerator.prepare(get_scheduler(args.lr_scheduler, optimizer, **schedule))
    progress = Progress()
    if resume is not None:
        progress = restore(accelerator, optimizer, lr_scheduler, resume)
        check_weights(resume, vae.state_dict().values())
    if progress.batches > total_steps:
        raise SystemExit(
            f"{resume} is at step {progress.batches}, beyond the {total_steps} asked for: resume an earlier one."
        )
    progress.num_images = len(images)
    losses = deque(torch.tensor(progress.losses, device=accelerator.device), maxlen=NUM_LOSSES)
    return Training(vae, autoencoder, optimizer, lr_scheduler, dataloader, progress, total_steps, losses)


def training_steps(args: argparse.Namespace, accelerator: Accelerator, training: Training) -> Iterator[int]:
    """Train, and yield the number of every step that is done, up to the last."""
    progress = training.progress
    before = training.progress.seconds
    started = time.monotonic()
    if progress.batches == training.total_steps:
        return
    for batch in batches_from(accelerator, training.dataloader, progress):
        seed_step(args, accelerator, progress.batches)
        clean, _ = training_inputs(args, batch, training.vae)
        loss = reconstruction_loss(args, clean, *training.autoencoder(clean))
        accelerator.backward(loss)
        if args.max_grad_norm:
            accelerator.clip_grad_norm_(training.autoencoder.parameters(), args.max_grad_norm)
        training.optimizer.step()
        training.lr_scheduler.step()
        training.optimizer.zero_grad()
        training.losses.append(loss.detach())
        progress.count(len(clean) * accelerator.num_processes, accelerator.gradient_state.end_of_dataloader)
        progress.seconds = before + time.monotonic() - started
        yield progress.batches
        if progress.batches == training.total_steps:
            return


def train(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Train, and leave checkpoints, the result and what was measured in `--output_dir`."""
    resume = checkpoint_to_resume(args)
    images, held_out = split_images(args, accelerator.num_processes)
    training = set_up(args, accelerator, images, resume)
    if accelerator.is_main_process:
        clear_rubbish(args.output_dir)
    if is_finished(args, training.total_steps):
        accelerator.end_training()
        return
    progress = training.progress
    first = dataclasses.replace(training.progress)
    logger.info(f"Training on {len(images)} images of {args.resolution} pixels, {len(held_out)} are held out.")
    bar = tqdm(initial=first.batches, total=training.total_steps, disable=not accelerator.is_local_main_process)
    for step in training_steps(args, accelerator, training):
        bar.update()
        saved = step % args.checkpointing_steps == 0
        if step % 10 == 0 or saved or step == training.total_steps:
            rate = training.lr_scheduler.get_last_lr()[0]
            progress.losses, finite = look(accelerator, training.losses, training.vae.state_dict().values())
            if not finite:
                raise not_finite(step, progress.loss(), rate, last_checkpoint(args, step), "resume from it")
            bar.set_postfix(loss=f"{progress.loss():.5f}", lr=f"{rate:.1e}")
        if saved:
            write_checkpoint(args, accelerator, progress, step, 1, lambda folder: write_options(args, folder))
    bar.close()
    if accelerator.is_main_process:
        results = {
            "steps": progress.batches,
            "loss_last_100_batches": progress.loss(),
            **finish(args, training.vae, images, held_out),
            "images": progress.images,
            "seconds": round(progress.seconds, 1),
            "images_per_second": progress.images_per_second(first),
            **machine(accelerator.device.type, accelerator.num_processes),
        }
        write_json(Path(args.output_dir, RESULTS), results)
        logger.info(f"PSNR {results['held_out']['psnr']:.2f} dB on held-out images; saved {args.output_dir}.")
    accelerator.end_training()


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    args = parse_arguments(argv)
    train(args, make_accelerator(args))


if __name__ == "__main__":
    main()
