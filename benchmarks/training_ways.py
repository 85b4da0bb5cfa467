"""Ways of training one denoiser, each in a process of its own: the plain loop, and `ddae pretrain` as it trains.

A process waits until it is asked for some steps, so that ways can be timed in turn though each goes on with its own
training; they share no state of accelerate's and no allocator.
"""

from __future__ import annotations

import copy
import itertools
import logging
import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ddae_hf import DDAEPipeline
from ddae_hf.commands import pretrain
from ddae_hf.commands.parsing import parse
from ddae_hf.experiments.arrays import write_json
from ddae_hf.experiments.images import DataOptions, ImageSet
from ddae_hf.experiments.new_networks import new_networks
from ddae_hf.experiments.pretraining import Pretraining
from ddae_hf.experiments.pretraining_data import TrainingData, training_data
from ddae_hf.experiments.run_folder import PROGRESS

from . import measure

# What tells `new_networks` to build networks for images without classes.
IMAGES = TrainingData(rows=None, facts={}, opened_with={}, count=None, hash=None)


@dataclass
class Way:
    """How to train: options of `ddae pretrain` and what to set for accelerate, or the plain loop.

    Attributes:
        title: What tables call it.
        options: Options besides those that all ways share.
        environment: Variables that `accelerate launch` would set.
        plain: Whether it is the plain loop.
    """

    title: str
    options: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    plain: bool = False


WAYS = {
    "plain": Way("plain loop, float32", plain=True),
    "float32": Way("ddae pretrain, float32", ["--mixed_precision", "no"]),
    "configured": Way("ddae pretrain as its configuration says"),
    "tf32": Way("ddae pretrain, float32 with TF32", ["--mixed_precision", "no", "--allow_tf32"]),
    "bfloat16": Way("ddae pretrain, bfloat16", ["--mixed_precision", "bf16"]),
    "compiled": Way(
        "ddae pretrain, bfloat16, compiled", ["--mixed_precision", "bf16"], {"ACCELERATE_DYNAMO_BACKEND": "inductor"}
    ),
}


class Process:
    """A way of training in its own process, which `steps` moves on.

    Args:
        way: The way.
        argv: The options of `ddae pretrain` that all ways share.
        device: `cpu` or `cuda`.
        workers: Processes that load the plain loop's images.
    """

    def __init__(self, way: Way, argv: list[str], device: str, workers: int):
        context = multiprocessing.get_context("spawn")
        self.title, (self.connection, theirs) = way.title, context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, way, argv, device, workers))
        self.process.start()
        theirs.close()

    def steps(self, count: int) -> tuple[float, list[float]]:
        """Train for some steps, and return the seconds that they took and their losses."""
        try:
            self.connection.send(count)
            return self.connection.recv()
        except (EOFError, OSError) as error:
            raise SystemExit(f"The training by {self.title} ended with an error, which it has printed.") from error

    def close(self) -> None:
        """End the process."""
        self.connection.close()
        self.process.join()


def serve(connection: Connection, way: Way, argv: list[str], device: str, workers: int) -> None:
    """Train as many steps as are asked for, each time some are, until nobody asks for more."""
    os.environ.update(way.environment, **({"ACCELERATE_USE_CPU": "true"} if device == "cpu" else {}))
    multiprocessing.set_start_method(None, force=True)  # loaders start their workers as they do everywhere
    logging.disable(logging.INFO)
    data, options = read_options([*argv, *way.options])
    losses = Plain(data, options, device, workers).losses() if way.plain else our_losses(data, options)
    found: list[Tensor] = []

    def train(count: int) -> None:
        found[:] = itertools.islice(losses, count)

    while True:
        try:
            count = connection.recv()
        except EOFError:
            return
        seconds = measure.seconds_of(partial(train, count), device)
        connection.send((seconds, torch.stack(found).tolist()))


def read_options(argv: list[str]) -> tuple[DataOptions, pretrain.Arguments]:
    """Return the options of `ddae pretrain`."""
    return parse([DataOptions, pretrain.Arguments], None, argv)


def our_losses(data: DataOptions, options: pretrain.Arguments) -> Iterator[Tensor]:
    """Train as `ddae pretrain` does, and yield the loss of every step."""
    images = training_data(data.open(options.cache_dir), options)
    with options.accelerated() as accelerator:
        run = Pretraining(options, accelerator, images, None)
        for _ in run.loop.steps(run.loss):
            yield run.loop.losses[-1]


class Plain:
    """Training as diffusers' example of unconditional training does it.

    Everything is float32, contiguous, and as torch and diffusers have it by default.

    Args:
        data: Where images come from.
        args: Options of `ddae pretrain`.
        device: `cpu` or `cuda`.
        workers: Processes that load the images.
    """

    def __init__(self, data: DataOptions, args: pretrain.Arguments, device: str, workers: int):
        self.data, self.args, self.device, self.workers = data, args, device, workers
        torch.manual_seed(args.seed)
        self.network, self.scheduler = new_networks(args, IMAGES)
        self.network.to(device).train()
        self.ema = EMAModel(self.network.parameters(), decay=args.ema_decay)

    def losses(self) -> Iterator[Tensor]:
        """Train, and yield the loss of every step."""
        args, network, scheduler = self.args, self.network, self.scheduler
        betas = (args.adam_beta1, args.adam_beta2)
        adam = {"betas": betas, "eps": args.adam_epsilon, "weight_decay": args.weight_decay}
        optimizer = torch.optim.AdamW(network.parameters(), args.learning_rate, **adam)
        schedule = {"num_warmup_steps": args.lr_warmup_steps, "num_training_steps": args.max_train_steps}
        lr_scheduler = get_scheduler(args.lr_scheduler, optimizer, **schedule)
        for clean in plain_batches(training_images(self.data, args), args, network.config, self.workers):
            clean = clean.to(self.device)
            noise = torch.randn_like(clean)
            timesteps = torch.randint(0, len(scheduler.alphas_cumprod), (len(clean),), device=self.device)
            output = network(scheduler.add_noise(clean, noise, timesteps), timesteps).sample
            loss = F.mse_loss(output, plain_target(scheduler, clean, noise, timesteps))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), args.max_grad_norm)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
            self.ema.step(network.parameters())
            yield loss.detach()

    def train(self, folder: Path) -> None:
        """Train as many steps as the options say, and leave checkpoints and results as `ddae pretrain` does."""
        args, seconds, losses = self.args, 0.0, []
        steps = self.losses()
        for step in tqdm(range(1, args.max_train_steps + 1), desc="Training, plain loop"):
            seconds += measure.seconds_of(lambda: losses.append(next(steps)), self.device)
            if step % args.checkpointing_steps == 0:
                self.save(folder / f"checkpoint-{step}")
                write_json(folder / f"checkpoint-{step}" / PROGRESS, {"seconds": seconds})
        self.save(folder)
        images = args.max_train_steps * args.sizes.total
        loss = torch.stack(losses[-100:]).mean().item()
        results = {"steps": args.max_train_steps, "images": images, "seconds": seconds, "loss_last_100_batches": loss}
        write_json(folder / "train_results.json", results)

    def save(self, folder: Path) -> None:
        """Write the network of averaged weights."""
        self.ema.store(self.network.parameters())
        self.ema.copy_to(self.network.parameters())
        DDAEPipeline.for_denoiser(self.network, copy.deepcopy(self.scheduler)).save_pretrained(folder)
        self.ema.restore(self.network.parameters())


def plain_target(scheduler: Any, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Return what the network should predict."""
    kind = scheduler.config.prediction_type
    if kind == "v_prediction":
        return scheduler.get_velocity(clean, noise, timesteps)
    return {"epsilon": noise, "sample": clean}[kind]


def training_images(data: DataOptions, args: pretrain.Arguments) -> ImageSet:
    """Return the images to train on."""
    return data.open(args.cache_dir)[args.train_split].take(args.max_train_samples)


def plain_batches(images: ImageSet, args: pretrain.Arguments, config: Any, workers: int) -> Iterator[Tensor]:
    """Yield shuffled batches without end, whose images Pillow opens and changes every time."""
    dataset = images.dataset.select_columns([images.image_column])
    mode = {1: "L", 3: "RGB"}[config.in_channels]
    dataset = dataset.with_transform(partial(prepare, mode, config.sample_size, args.random_flip))
    options: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0, "drop_last": True}
    loader = DataLoader(dataset, args.sizes.total, shuffle=True, **options)
    while True:
        yield from (batch["pixels"] for batch in loader)


def prepare(mode: str, side: int, mirror: bool, rows: dict[str, list[Any]]) -> dict[str, list[Tensor]]:
    """Return images as tensors (C, H, W) in [-1, 1], half of them mirrored if asked for."""
    images = [
        image.convert(mode).resize((side, side), Image.Resampling.BILINEAR) for image in next(iter(rows.values()))
    ]
    images = [ImageOps.mirror(image) if mirror and torch.rand(()) < 0.5 else image for image in images]
    arrays = [np.array(image, dtype=np.float32).reshape(side, side, -1) for image in images]
    return {"pixels": [torch.from_numpy(array).permute(2, 0, 1) / 127.5 - 1 for array in arrays]}
