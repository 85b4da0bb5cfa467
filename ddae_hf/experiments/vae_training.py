"""Training a small variational autoencoder on images, which need no labels, for denoisers that work on latents.

    from ddae_hf.experiments import Images, train_vae
    images = Images.open("uoft-cs/cifar10")
    result = train_vae(images, autoencoder={"block_out_channels": [32, 64]}, output_dir="runs/vae")
    print(result.table())

The folder opens with diffusers' `AutoencoderKL.from_pretrained`, and `encode` takes it; its `scaling_factor` is
measured. The loss of an image is the error of its reconstruction plus a small weight times the divergence of its
posterior from a standard normal distribution (Rombach et al. 2022, arXiv:2112.10752), without their perceptual and
adversarial terms: details that the latents have no room for come back blurred.
"""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from ..augment import random_flip
from ..image_processing_ddae import DDAEImageProcessor
from ..latents import SCALES
from ..pipeline_ddae import DDAEPipeline
from .batches import Batch, clean_images, image_batches, images_hash
from .draws import RowDraws, separate_randomness
from .images import Images, ImageSet
from .options import Table, option
from .plots import image_grid, save_picture
from .report import in_memory
from .results import VAEReport
from .run_folder import WEIGHTS, Progress, check_same_run, saving, write_options
from .sharing import refuse_fsdp
from .training_options import Schedule, TrainingOptions, check_resumed

logger = logging.getLogger(__name__)

DERIVED = {
    **dict.fromkeys(SCALES, "it is measured after the training"),
    **dict.fromkeys(("down_block_types", "up_block_types"), "there is one block for each of block_out_channels"),
    "sample_size": "resolution gives it",
    "out_channels": "they are as many as in_channels",
}
NUM_SCALED = 2000  # training images of which the scaling factor is measured
NUM_PAIRS = 32


@dataclass(kw_only=True)
class VAEOptions(TrainingOptions):
    """Options of `train_vae`."""

    default_batch: ClassVar[int] = 64

    autoencoder: Table = option({}, "Options of diffusers' AutoencoderKL, as YAML.")
    resolution: int = option(32, "Side of the square training images.")
    held_out: int = option(1000, "Training images that are kept out to measure on.")
    loss: Literal["l1", "l2"] = option("l2", "Absolute or squared error of the reconstruction.")
    kl_weight: float = option(1e-6, "Weight of the divergence, both terms summed over an image.")
    num_train_epochs: int = option(10, "Passes over all images.")
    learning_rate: float = option(1e-3, "Largest learning rate.")
    lr_scheduler: Schedule = option("cosine", "How the learning rate changes.")
    lr_warmup_steps: int = option(100, "Steps in which the learning rate rises from 0.")
    checkpointing_steps: int = option(1000, "Save a checkpoint, ready to resume, every N steps.")
    checkpoints_total_limit: int | None = option(2, "Keep only the newest N checkpoints.")

    def check(self) -> None:
        """Refuse an autoencoder that cannot be built, and accelerate's FSDP."""
        super().check()
        refuse_fsdp()
        self.center_crop = self.center_crop is not False
        if derived := sorted(set(self.autoencoder) & set(DERIVED)):
            raise ValueError(f"autoencoder has {derived[0]}: leave it out, {DERIVED[derived[0]]}.")
        if unknown := sorted(set(self.autoencoder) - set(inspect.signature(AutoencoderKL).parameters)):
            raise ValueError(f"autoencoder: AutoencoderKL has no options {unknown}.")
        widths = self.autoencoder.get("block_out_channels", [64])
        if not (isinstance(widths, (list, tuple)) and widths):
            raise ValueError(f"autoencoder has block_out_channels {widths!r}: it must be a list, such as [16, 32, 64].")
        factor = 2 ** (len(widths) - 1)
        if self.resolution % factor:
            raise ValueError(
                f"resolution is {self.resolution}: {len(widths)} block_out_channels make latents {factor} times "
                f"smaller, so it must be a multiple of {factor}."
            )


@dataclass(kw_only=True)
class VAEResult(VAEReport):
    """An autoencoder's training and what came of it."""

    vae: Any = in_memory()  # the autoencoder, with its scaling factor
    reconstructions: Any = in_memory()  # held-out images and what comes back of them, side by side

    def save(self, folder: str | Path) -> None:
        """Write the autoencoder, some reconstructions, the options and the report, or raise `OSError`."""
        with saving(folder) as path:
            self.vae.save_pretrained(path)
            write_options(self.options, path)
            if self.reconstructions is not None:
                save_picture(self.reconstructions, path / "reconstructions.png")
            self.write(path)


class Autoencoder(nn.Module):
    """Gives in one forward pass, which accelerate can distribute, what the loss needs."""

    def __init__(self, vae: Any):
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor, draws: RowDraws) -> tuple[Tensor, Tensor]:
        """Return reconstructions (B, C, H, W) from draws of the posterior, and its divergence (B,) in nats."""
        # The divergence takes exponentials, which are kept out of half precision.
        posterior = DiagonalGaussianDistribution(self.vae.encode(images).latent_dist.parameters.float())
        latents = posterior.mean + posterior.std * draws.normal(tuple(posterior.mean.shape))
        return self.vae.decode(latents).sample.float(), posterior.kl()


def train_vae(images: Images, options: VAEOptions | None = None, **changes: Any) -> VAEResult:
    """Train an autoencoder, and measure it on images that it never saw.

    Returns:
        What was measured, with the autoencoder; `output_dir` has it too, with checkpoints, some reconstructions and the
        options.

    Raises:
        ValueError: Options, images or a checkpoint that cannot work, or a loss that is not finite (`NotFinite`).
        OSError: A file that cannot be read, or a folder that cannot be written to.
        Interrupted: A signal came, and a checkpoint was written.
    """
    options = VAEOptions.of(options, changes)
    images = Images.open(images, cache_dir=options.cache_dir)
    resume = options.checkpoint(WEIGHTS)
    train, held_out = split_images(images, options)
    data = Progress(num_images=len(train), images_hash=images_hash(train))
    with options.accelerated(resume) as accelerator:
        given = options.in_force(accelerator.mixed_precision, images.opened_with)
        if resume is not None:
            trained = check_resumed(given, data, resume)
            check_same_run(given, trained, options.may_change, resume)
        vae = new_vae(options)
        processor = DDAEImageProcessor.for_denoiser(vae.config, do_center_crop=bool(options.center_crop))
        loader = image_batches(train, processor, options, device=accelerator.device)
        loop = options.loop(
            accelerator, Autoencoder(vae), loader, data, resume, {"weight_decay": 0.0},
            save=partial(write_options, given), keep_weights=True,
        )  # fmt: skip
        if finished := loop.finished(VAEResult):
            finished.vae = AutoencoderKL.from_pretrained(options.output_dir)
            return finished
        logger.info(f"Training on {len(train)} images of {options.resolution} pixels, {len(held_out)} are held out.")

        def loss(batch: Batch, draws: RowDraws) -> Tensor:
            clean = clean_images(batch["pixel_values"], vae.config)
            clean = random_flip(clean, draws) if options.random_flip else clean
            return reconstruction_loss(options, clean, *loop.module(clean, draws))

        loop.run(loss)
        accelerator.wait_for_everyone()
        some, _ = measure(vae, train.select(range(min(NUM_SCALED, len(train)))), options)
        # A shift would have no effect: DiTPipeline, for one, only scales.
        vae.register_to_config(scaling_factor=1 / some["latent_std"])
        found, pairs = measure(vae, held_out, options)
        shades = torch.cat(pairs)[:, : 3 if vae.config.in_channels >= 3 else 1] / 2 + 0.5
        result = VAEResult(
            options=given,
            dataset=images.facts(train),
            held_out=found,
            scaling_factor=vae.config.scaling_factor,
            parameters=vae.num_parameters(),
            vae=vae,
            reconstructions=image_grid(DDAEPipeline.numpy_to_pil(shades.permute(0, 2, 3, 1).cpu().numpy()), columns=8),
            **loop.facts(),
        )
        if accelerator.is_main_process and options.output_dir:
            result.save(options.output_dir)
            logger.info(f"PSNR {result.held_out['psnr']:.2f} dB on held-out images; saved {options.output_dir}.")
        return result


def new_vae(options: VAEOptions) -> Any:
    """Return the autoencoder, randomly initialised, that the options describe, or raise `ValueError`."""
    levels = len(options.autoencoder.get("block_out_channels", [64]))
    try:
        with separate_randomness(options.seed):
            vae: Any = AutoencoderKL(
                **options.autoencoder,
                down_block_types=["DownEncoderBlock2D"] * levels,
                up_block_types=["UpDecoderBlock2D"] * levels,
                sample_size=options.resolution,
                out_channels=options.autoencoder.get("in_channels", 3),
            )
    except (TypeError, ValueError) as error:
        raise ValueError(f"autoencoder: {error}") from error
    # Posteriors start narrow: with a deviation of one, their noise is what the first steps learn to overcome.
    last = vae.quant_conv if vae.config.use_quant_conv else vae.encoder.conv_out
    nn.init.constant_(last.bias.detach()[vae.config.latent_channels :], -6.0)
    return vae


def split_images(images: Images, options: VAEOptions) -> tuple[ImageSet, ImageSet]:
    """Return the images to train on and those to measure on, both shuffled once."""
    chosen = images[options.train_split].take(options.max_train_samples)
    total = options.sizes.total
    if len(chosen) < options.held_out + total:
        raise ValueError(
            f"There are {len(chosen)} images: held_out {options.held_out} and a total_batch_size of {total} need "
            f"{options.held_out + total}. Lower one of them."
        )
    order = np.random.default_rng(options.seed).permutation(len(chosen))
    held_out = chosen.select(order[: options.held_out])
    for row in range(len(held_out)):
        held_out.pil([row])  # this names a damaged one now, not after the training
    return chosen.select(order[options.held_out :]), held_out


def reconstruction_loss(options: VAEOptions, clean: Tensor, reconstruction: Tensor, divergence: Tensor) -> Tensor:
    """Return the mean error of a pixel value plus the weighted divergence, which is shared among an image's values."""
    error = reconstruction - clean
    error = error.abs() if options.loss == "l1" else error.square()
    return error.mean() + options.kl_weight * divergence.mean() / clean[0].numel()


@torch.no_grad()
def measure(vae: Any, images: ImageSet, options: VAEOptions) -> tuple[dict[str, float], list[Tensor]]:
    """Return what the autoencoder does to images, in float32, and some pairs (2, C, H, W) of image and reconstruction.

    Reconstructions are of the posterior's mean, clipped to [-1, 1]. The latents' statistics are of a draw of each.
    """
    processor = DDAEImageProcessor.for_denoiser(vae.config, do_center_crop=bool(options.center_crop))
    generator = torch.Generator().manual_seed(options.seed)
    ratios, divergences, latents = [], [], []
    pairs: list[Tensor] = []
    for rows in torch.arange(len(images)).split(100):
        clean = processor(images.pil(rows.tolist()), return_tensors="pt")["pixel_values"].to(vae.device)
        posterior = vae.encode(clean).latent_dist
        restored = vae.decode(posterior.mode()).sample.clamp(-1, 1)
        ratios.append(-10 * ((restored - clean) / 2).square().mean((1, 2, 3)).clamp(min=1e-10).log10())
        divergences.append(posterior.kl())
        latents.append(posterior.sample(generator).flatten())
        pairs += list(torch.stack([clean, restored], dim=1)[: NUM_PAIRS - len(pairs)])
    drawn = torch.cat(latents)
    found = {
        "psnr": torch.cat(ratios).mean().item(),
        "kl_nats_per_image": torch.cat(divergences).mean().item(),
        "latent_mean": drawn.mean().item(),
        "latent_std": drawn.std().item(),
        "num_images": len(images),
    }
    return found, pairs
