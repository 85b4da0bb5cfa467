r"""Train a denoiser on images, which need no labels, or on the latents that `encode_latents.py` made of them.

    accelerate launch examples/pretrain.py --config examples/configs/cifar10_ddpm_unet.yaml \
        --dataset_name uoft-cs/cifar10 --output_dir runs/cifar10_ddpm_unet
    accelerate launch examples/pretrain.py --config examples/configs/cifar10_latent_dit.yaml \
        --latents_dir runs/cifar10_latents --output_dir runs/cifar10_latent_dit

The output folder opens with `DDAEPipeline.from_pretrained` and `DDAEForImageClassification.from_pretrained` as the
network of averaged (EMA) weights; the weights that the optimiser left are in its sub-folder `raw`, which opens alike.
Both hold the VAE of the latents that they were trained on.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import inspect
import json
import logging
import math
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration
from diffusers.optimization import SchedulerType, get_scheduler
from latents import one_view
from tqdm.auto import tqdm

from data import (
    add_center_crop_argument,
    add_data_arguments,
    add_input_arguments,
    add_loading_arguments,
    check_input_arguments,
    check_loading_arguments,
    check_stream,
    parse_with_config,
    training_batches,
    training_inputs,
)
from ddae_hf import DDAEConfig
from ddae_hf.augment import NUM_LABELS, reduced
from ddae_hf.checkpoints import build_scheduler, plain_config, read_checkpoint
from ddae_hf.diffusion import Diffusion
from ddae_hf.experiments.devices import has_bfloat16, made_fast
from ddae_hf.experiments.latent_folder import LatentFolder
from ddae_hf.experiments.publishing import PRIVATE, add_hub_arguments, prepare, publish
from ddae_hf.networks import NETWORKS, build_denoiser, network_of
from ddae_hf.noise import family_of
from training_data import TrainingData, add_latent_arguments, check_latent_arguments, load_training_data
from training_run import (
    LATENTS,
    NUM_LOSSES,
    Progress,
    Run,
    check_batches,
    checkpoint_to_resume,
    is_finished,
    read_options,
)

logger = get_logger(__name__)

DENOISER = {"_class_name": "UNet2DModel", "in_channels": 3}
SCHEDULER = {"_class_name": "DDPMScheduler"}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the options, those of the command line over those of `--config`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    add_center_crop_argument(parser, default=None)  # which tells whether it was given: latents want it not to be
    add_latent_arguments(parser)
    add_loading_arguments(parser)
    add_input_arguments(parser)
    add_hub_arguments(parser)
    add = parser.add_argument
    add("--denoiser", type=yaml.safe_load, default={}, help="Options of the network and its `_class_name`, as YAML.")
    add("--scheduler", type=yaml.safe_load, default={}, help="Options of the scheduler and its `_class_name`.")
    add("--init_from", help="Checkpoint (any layout) whose network and scheduler to start from.")
    add("--output_dir", default="runs/pretrain", help="Folder of checkpoints, samples and logs.")
    add("--resolution", type=int, help="Side of the square training images; by default the network's sample_size.")
    add(
        "--log_sigma", type=float, nargs=2, metavar=("MEAN", "STD"),
        help="Draw log sigma from a normal distribution: for flow matching 0 1 are logit-normal times. By default each "
        "framework's own: uniform timesteps, EDM's -1.2 1.2, uniform times.",
    )  # fmt: skip
    add(
        "--low_resolution", type=int, metavar="SIDE",
        help="Begin with images reduced to this side, by means of pixels: such steps cost less.",
    )  # fmt: skip
    add("--low_resolution_share", type=float, default=0.9, help="Share of the steps that are of --low_resolution.")
    add("--seed", type=int, default=0, help="Seed of everything that is random.")
    add("--train_batch_size", type=int, default=128, help="Images a step on each device.")
    add("--num_train_epochs", type=int, default=100)
    add("--max_train_steps", type=int, help="Number of optimiser steps; overrides --num_train_epochs.")
    add("--gradient_accumulation_steps", type=int, default=1)
    add("--gradient_checkpointing", action=argparse.BooleanOptionalAction, default=False)
    add_optimizer_arguments(parser)
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="By default what accelerate is configured for.")
    add("--allow_tf32", action=argparse.BooleanOptionalAction, default=False)
    add("--checkpointing_steps", type=int, default=5000, help="Save a checkpoint, ready to resume, every N steps.")
    add("--checkpoints_total_limit", type=int, help="Keep only the newest N checkpoints; by default all.")
    add("--resume_from_checkpoint", help="A checkpoint's folder, or `latest` for the newest in --output_dir.")
    add("--sample_steps", type=int, default=5000, help="Draw a grid of samples every N steps; 0 draws none.")
    add("--num_samples", type=int, default=64, help="Images in the grid.")
    add("--num_inference_steps", type=int, default=50, help="Sampling steps of the grid.")
    add(
        "--sampler",
        choices=["heun"],
        help="EDM's second-order sampler for the grid, in place of the scheduler's steps.",
    )
    add("--report_to", help="Tracker: tensorboard, wandb, ...; none by default.")
    add("--logging_dir", default="logs", help="Folder of the tracker's files, inside --output_dir.")
    args = parse_with_config(parser, argv)
    own = {name for network in NETWORKS.values() for name in network.label_options(1)}
    if labels := sorted(own & set(args.denoiser)):
        parser.error(f"--denoiser has {labels[0]}: leave it out, --class_conditional takes it from the data set.")
    if args.init_from and (args.denoiser or args.scheduler):
        parser.error("--init_from brings its own network and scheduler: leave out --denoiser and --scheduler.")
    check_latent_arguments(parser, args)
    if args.latents_dir is None and args.center_crop is None:
        args.center_crop = True
    check_loading_arguments(parser, args)
    check_input_arguments(parser, args)
    return args


def add_optimizer_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the optimiser, its schedule and the averaged weights."""
    add = parser.add_argument
    add("--learning_rate", type=float, default=1e-4)
    add("--scale_lr", action=argparse.BooleanOptionalAction, default=False, help="Multiply it by the devices.")
    add("--lr_scheduler", default="constant_with_warmup", choices=[s.value for s in SchedulerType])
    add("--lr_warmup_steps", type=int, default=500)
    add("--adam_beta1", type=float, default=0.9)
    add("--adam_beta2", type=float, default=0.999)
    add("--adam_weight_decay", type=float, default=0.0)
    add("--adam_epsilon", type=float, default=1e-8)
    add("--max_grad_norm", type=float, default=1.0, help="Largest norm of the gradient; 0 leaves it as it is.")
    add("--ema_decay", type=float, default=0.9999, help="Decay of the averaged weights after its ramp.")


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """Set up devices, precision, logging and trackers."""
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=args.report_to,
        project_config=ProjectConfiguration(args.output_dir, os.path.join(args.output_dir, args.logging_dir)),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed, non_blocking=True),
    )
    if args.report_to and not accelerator.log_with:
        raise SystemExit(f"--report_to {args.report_to}: that tracker is not installed.")
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    for name in ("accelerate", "httpx", "httpx2", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if accelerator.mixed_precision == "bf16" and not has_bfloat16(accelerator.device):
        logger.warning("This hardware has no bfloat16 arithmetic: --mixed_precision no will be faster.")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
    return accelerator


def new_networks(args: argparse.Namespace, num_classes: int, latents: LatentFolder | None = None) -> tuple[Any, Any]:
    """Return the denoiser, randomly initialised, and the scheduler that the options describe."""
    inputs: dict[str, Any] = {"sample_size": args.resolution or 32}
    if latents is not None:
        channels, side, _ = latents.shape
        inputs = {"in_channels": channels, "out_channels": channels, "sample_size": side}
    options = {**DENOISER, **inputs, **args.denoiser}
    denoiser = build_denoiser({**options, **network_of(options).label_options(num_classes)})
    scheduler = build_scheduler({**SCHEDULER, **args.scheduler})
    for given, built in ((args.denoiser, denoiser), (args.scheduler, scheduler)):
        if unknown := sorted(set(given) - set(inspect.signature(type(built)).parameters) - {"_class_name"}):
            raise SystemExit(f"{type(built).__name__} has no options {unknown}.")
    return denoiser, scheduler


def check_same_run(args: argparse.Namespace, resume: Path, data: TrainingData, denoiser: Any, scheduler: Any) -> None:
    """Stop if the options describe another network, scheduler or objective than those of the run that is resumed."""
    trained = read_options(resume)
    latents = json.loads((resume / LATENTS).read_text(encoding="utf-8")) if (resume / LATENTS).is_file() else None
    # Version 0.1.0 had no such option, and squashed.
    (trained if latents is None else latents).setdefault("center_crop", False)
    objective = (
        "init_from",
        "center_crop",
        "random_flip",
        "augment",
        "class_conditional",
        "label_dropout",
        "log_sigma",
    )
    objective += ("low_resolution", "low_resolution_share") if args.low_resolution else ("low_resolution",)
    objective += ("seed", "streaming")  # and with a stream what its order depends on
    objective += ("shuffle_buffer", "dataloader_num_workers") if args.streaming else ()
    pairs = [({name: getattr(args, name) for name in objective}, trained)]
    pairs.append(({"latents": data.described}, {"latents": latents}))
    if not args.init_from and not trained.get("init_from"):
        built = zip(new_networks(args, data.num_classes, data.latents), (denoiser, scheduler), strict=True)
        pairs += [(plain_config(wanted), plain_config(saved)) for wanted, saved in built]
    different = sorted({name for wanted, saved in pairs for name in wanted if wanted[name] != saved.get(name)})
    if different:
        raise SystemExit(f"The checkpoint to resume was trained with other options: {', '.join(different)} differ.")


def build_networks(args: argparse.Namespace, resume: Path | None, data: TrainingData) -> tuple[Any, Any, Any]:
    """Return the denoiser in training, the one of averaged weights, and the scheduler."""
    num_classes = data.num_classes
    if resume is not None:
        raw, averaged = read_checkpoint(resume / "raw"), read_checkpoint(resume)
        denoiser, ema_denoiser = raw.load_denoiser(torch.float32), averaged.load_denoiser(torch.float32)
        scheduler = build_scheduler(averaged.scheduler)
        check_same_run(args, resume, data, denoiser, scheduler)
        data.check_vae_of(averaged)
    elif args.init_from:
        source = read_checkpoint(args.init_from, cache_dir=args.cache_dir)
        data.check_vae_of(source)
        denoiser = source.load_denoiser(torch.float32)
        scheduler = build_scheduler(source.scheduler or SCHEDULER)
        ema_denoiser = copy.deepcopy(denoiser)
        null_class = source.config.get("null_class", num_classes)
        if num_classes and null_class != num_classes:
            raise SystemExit(f"The null class of {args.init_from} is {null_class}: it must be the last, {num_classes}.")
    else:
        torch.manual_seed(args.seed)
        denoiser, scheduler = new_networks(args, num_classes, data.latents)
        ema_denoiser = copy.deepcopy(denoiser)
    check_networks(args, denoiser, scheduler, num_classes, data.latents)
    network = network_of(denoiser)
    network.stop_own_dropping(denoiser)
    if args.augment:
        network.accept_vectors(denoiser, NUM_LABELS)
    if args.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    return denoiser, ema_denoiser.requires_grad_(False).eval(), scheduler


def check_networks(
    args: argparse.Namespace, denoiser: Any, scheduler: Any, num_classes: int, latents: LatentFolder | None = None
) -> None:
    """Stop if the network and the scheduler cannot be trained with these options."""
    config = denoiser.config
    if latents is not None:
        channels, side, _ = latents.shape
        if (config.in_channels, config.sample_size) != (channels, side):
            raise SystemExit(
                f"The latents have {channels} channels and a side of {side}: the network must have them as its "
                f"in_channels and sample_size, and has {config.in_channels} and {config.sample_size}."
            )
    null_class = num_classes or None
    network = network_of(denoiser)
    if num_classes and network.num_labels(config) != num_classes + 1:
        raise SystemExit(
            f"The data set has {num_classes} classes: the network needs {num_classes + 1} labels with its null class, "
            f"and has {network.num_labels(config)}."
        )
    if not num_classes and network.is_conditional(denoiser):
        raise SystemExit("This network is class-conditional: train it with --class_conditional.")
    if config.out_channels not in (None, config.in_channels):
        raise SystemExit("Only networks with as many output as input channels can be trained.")
    # These refuse what cannot work.
    family_of(scheduler).check_sampler(args.sampler)
    described = {"denoiser": plain_config(denoiser), "scheduler": plain_config(scheduler)}
    if latents is not None:
        described["vae"] = latents.index["vae"]
    DDAEConfig(**described, timestep=0, null_class=null_class)
    if args.low_resolution is not None:
        check_low_resolution(args.low_resolution, described, null_class)
    family_of(scheduler).draw(1, log_normal=args.log_sigma)
    copy.deepcopy(scheduler).set_timesteps(args.num_inference_steps)
    if args.resolution not in (None, config.sample_size):
        raise SystemExit(f"--resolution is {args.resolution}, but the network's sample_size is {config.sample_size}.")


def check_low_resolution(side: int, described: dict[str, Any], null_class: int | None) -> None:
    """Raise `ValueError` unless the described network can be trained on images of this side, smaller than its own."""
    whole = described["denoiser"]["sample_size"]
    if not (isinstance(whole, int) and 1 <= side < whole):
        raise ValueError(f"--low_resolution is {side}: it must be at least 1 and below the sample_size, {whole}.")
    try:
        reduced = {**described["denoiser"], "sample_size": side}
        DDAEConfig(**{**described, "denoiser": reduced}, timestep=0, null_class=null_class)
    except ValueError as error:
        raise ValueError(f"--low_resolution {side} cannot work. {error}") from error


def seed_step(args: argparse.Namespace, accelerator: Accelerator, batch_index: int) -> None:
    """Make what is random in a step depend on (seed, step, process) alone, so that resuming repeats it exactly."""
    sequence = np.random.SeedSequence([args.seed, batch_index, accelerator.process_index])
    torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))


def batches_from(accelerator: Accelerator, dataloader: Any, progress: Progress) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches without end, from where `progress` is, which whoever takes them counts; stop if none come."""
    while True:
        dataloader.set_epoch(progress.epoch)
        done = progress.batch
        came = False
        for batch in accelerator.skip_first_batches(dataloader, done) if done else dataloader:
            came = True
            yield batch
        if not came:
            raise SystemExit(
                f"Epoch {progress.epoch + 1} has no batch after the {done} that are done, and needs more than those: "
                "give the images, the --train_batch_size and the number of processes that the run began with."
            )


@dataclasses.dataclass
class Training:
    """What a training step works on, ready for the device, and how far the training is."""

    denoiser: Any
    scheduler: Any
    optimizer: Any
    lr_scheduler: Any
    dataloader: Any
    run: Run
    total_steps: int
    step: int
    losses: deque[torch.Tensor]  # the last batches'


def set_up(args: argparse.Namespace, accelerator: Accelerator) -> Training:
    """Return a training, from the start or from a checkpoint, or stop if it cannot be."""
    resume = checkpoint_to_resume(args)
    data = load_training_data(args)
    if resume is not None:
        check_batches(args, resume, accelerator.num_processes, None if args.streaming else len(data.dataset))
    try:
        network, ema_denoiser, scheduler = build_networks(args, resume, data)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    dataloader = training_batches(args, data.dataset, network, data.num_classes)
    if args.streaming:
        check_stream(args, data.dataset, accelerator.num_processes)
    logger.info(f"Training on {data.describe(network.config.sample_size)}.")
    processes = accelerator.num_processes
    rate = args.learning_rate * (processes if args.scale_lr else 1)
    adam = (rate, (args.adam_beta1, args.adam_beta2), args.adam_epsilon, args.adam_weight_decay)
    optimizer = torch.optim.AdamW(network.parameters(), *adam, fused=True)
    made_fast(network, accelerator.device)
    denoiser, optimizer, dataloader = accelerator.prepare(network, optimizer, dataloader)
    if not args.streaming and len(dataloader) == 0:
        raise SystemExit(f"There are fewer images than --train_batch_size x {processes} processes: lower it.")
    total_steps = args.max_train_steps
    if total_steps is None:
        total_steps = args.num_train_epochs * math.ceil(len(dataloader) / args.gradient_accumulation_steps)
    # accelerate advances the schedule once for every process.
    schedule = {"num_warmup_steps": args.lr_warmup_steps * processes, "num_training_steps": total_steps * processes}
    lr_scheduler = accelerator.prepare(get_scheduler(args.lr_scheduler, optimizer, **schedule))
    run = Run(args, accelerator, ema_denoiser, scheduler, data)
    step = run.start(resume, optimizer, lr_scheduler)
    if step > total_steps:
        raise SystemExit(f"{resume} is at step {step}, beyond the {total_steps} asked for: resume an earlier one.")
    losses = deque(torch.tensor(run.progress.losses, device=accelerator.device), maxlen=NUM_LOSSES)
    return Training(denoiser, scheduler, optimizer, lr_scheduler, dataloader, run, total_steps, step, losses)


def training_steps(args: argparse.Namespace, accelerator: Accelerator, training: Training) -> Iterator[int]:
    """Train, and yield the number of every step that is done, up to the last."""
    denoiser, run = training.denoiser, training.run
    diffusion = Diffusion(denoiser, training.scheduler)
    denoiser.train()
    if training.step == training.total_steps:
        return
    for batch in batches_from(accelerator, training.dataloader, run.progress):
        seed_step(args, accelerator, run.progress.batches)
        with accelerator.accumulate(denoiser):
            batch["pixel_values"] = one_view(batch["pixel_values"])
            clean, labels = training_inputs(args, batch, diffusion.own)
            if args.low_resolution and training.step < args.low_resolution_share * training.total_steps:
                clean = reduced(clean, args.low_resolution)
            loss = diffusion.loss(clean, class_labels=labels, log_normal=args.log_sigma).mean()
            accelerator.backward(loss)
            if accelerator.sync_gradients and args.max_grad_norm:
                accelerator.clip_grad_norm_(denoiser.parameters(), args.max_grad_norm)
            training.optimizer.step()
            training.lr_scheduler.step()
            training.optimizer.zero_grad()
        training.losses.append(loss.detach())
        run.progress.count(len(clean) * accelerator.num_processes, accelerator.gradient_state.end_of_dataloader)
        if not accelerator.sync_gradients:
            continue
        training.step += 1
        run.ema.step(denoiser.parameters())
        yield training.step
        if training.step == training.total_steps:
            return


def train(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Train, and leave checkpoints, samples and the result in `--output_dir`."""
    training = set_up(args, accelerator)
    denoiser, run, total = training.denoiser, training.run, training.total_steps
    if is_finished(args, total):
        accelerator.end_training()
        return
    if sampled(args, training.step) and not run.picture(training.step).is_file():  # interrupted before it was drawn
        run.sample(training.step)
    hidden = not accelerator.is_local_main_process
    bar = tqdm(initial=training.step, total=total, desc="Training", disable=hidden)
    for step in training_steps(args, accelerator, training):
        bar.update()
        saved = step % args.checkpointing_steps == 0
        if step % 10 == 0 or saved or sampled(args, step) or step == total:
            run.look(denoiser, step, training.losses, training.lr_scheduler.get_last_lr()[0], bar)
        if saved:
            run.checkpoint(denoiser, step)
        if sampled(args, step):
            run.sample(step)
    bar.close()
    run.finish(denoiser, training.step)


def sampled(args: argparse.Namespace, step: int) -> bool:
    """Return whether a grid of samples is drawn after a step."""
    return step > 0 and args.sample_steps > 0 and step % args.sample_steps == 0


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    args = parse_arguments(argv)
    accelerator = make_accelerator(args)
    if accelerator.is_main_process:
        prepare(args)
    train(args, accelerator)
    if accelerator.is_main_process:
        publish(args, Path(args.output_dir), "Pretrain", (*PRIVATE, f"{args.logging_dir}/*"))


if __name__ == "__main__":
    main()
