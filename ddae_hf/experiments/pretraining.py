"""Pretraining: a denoiser is trained on images, which need no labels, or on latents that `encode` made of them.

    from ddae_hf.experiments import Images, pretrain
    result = pretrain(Images.open("uoft-cs/cifar10"), max_train_steps=1000, output_dir="runs/mine")
    result.pipeline(16).images

The folder opens as the network of averaged (EMA) weights; the weights that the optimiser left are in its sub-folder
`raw`, which opens in the same way. Both hold the VAE of the latents that they were trained on.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import Tensor

from ..augment import NUM_LABELS, augment, embed_labels, random_flip, reduced
from ..diffusion import Denoised, Diffusion
from ..image_processing_ddae import DDAEImageProcessor
from ..labels import drop_labels
from ..networks import network_of
from ..pipeline_ddae import DDAEPipeline
from .arrays import read_json, write_json, written_whole
from .auxiliary import DENOISING, Seen, Setting, Terms, lasting, less_noisy
from .averages import PowerAverages
from .batches import Batch, clean_images
from .draws import RowDraws
from .images import Images
from .latent_folder import LatentFolder, one_view
from .models import base_model
from .new_networks import (
    check_networks,
    choose,
    chosen_before,
    levels_drawn,
    networks_to_train,
    new_networks,
    trained_on,
)
from .objectives import weighting
from .plots import image_grid
from .pretraining_data import TrainingData, training_data
from .pretraining_options import PretrainingOptions
from .report import in_memory
from .results import PretrainingReport
from .run_folder import OF_DATA, Progress, check_same_run, read_options, saving, write_options
from .sharding import check_sharding, fsdp_taken_over
from .training_options import check_resumed

logger = logging.getLogger(__name__)

LATENTS = Path("state") / "latents.json"
WEIGHTS = ("model_index.json", "raw/model_index.json", "*/diffusion_pytorch_model*", "raw/*/diffusion_pytorch_model*")


@dataclass(kw_only=True)
class PretrainingResult(PretrainingReport):
    """A denoiser's training and what came of it."""

    pipeline: DDAEPipeline = in_memory()  # of averaged weights; of a sharded run in the first process alone
    run: Pretraining | None = in_memory()

    def save(self, folder: str | Path) -> None:
        """Write the networks, options and report (`OSError`); refuse a run that was complete before (`ValueError`).

        Of a sharded run every process has to call this.
        """
        if self.run is None:
            raise ValueError(f"This run was complete before: its files are in {self.folder}.")
        with saving(folder) as path:
            self.run.write(path)
            self.write(path)


def pretrain(
    images: Images | LatentFolder, options: PretrainingOptions | None = None, **changes: Any
) -> PretrainingResult:
    """Train a denoiser on images or a folder of latents; under `accelerate launch` every process calls this.

    Where accelerate was told to use its FSDP, of version 2, that is taken for `shard`.

    Returns:
        What was measured, with the network; `output_dir` has it too, with checkpoints, samples and the options.

    Raises:
        ValueError: Options, data or a checkpoint that cannot work, or a loss that is not finite (`NotFinite`).
        OSError: A file that cannot be read, or a folder that cannot be written to.
        Interrupted: A signal came, and a checkpoint was written.
    """
    options = PretrainingOptions.of(options, changes)
    resume = options.checkpoint(*WEIGHTS)
    with contextlib.ExitStack() as stack:
        if stack.enter_context(fsdp_taken_over()):
            options = dataclasses.replace(options, shard=True)
        if not options.denoiser and options.init_from is None:
            if not isinstance(images, LatentFolder):
                images = Images.open(images, cache_dir=options.cache_dir)
            options = choose(images, options) if resume is None else chosen_before(options, read_options(resume))
        accelerator = stack.enter_context(options.accelerated(resume))
        if options.shard:
            check_sharding(accelerator)
        if options.auxiliary and accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
            raise ValueError("auxiliary does not go with compiling: launch with --dynamo_backend no.")
        run = Pretraining(options, accelerator, training_data(images, options), resume)
        if result := run.loop.finished(PretrainingResult):
            result.pipeline = run.trained()
            return result
        return run.train()


class Pretraining:
    """A denoiser's training: its networks, data and loop, and what it leaves behind."""

    def __init__(self, options: PretrainingOptions, accelerator: Accelerator, data: TrainingData, resume: Path | None):
        self.options, self.accelerator, self.data = options, accelerator, data
        self.main = accelerator.is_main_process
        self.given = options.in_force(accelerator.mixed_precision, data.opened_with)
        self.given["center_crop"] = None if data.latents else data.center_crop
        known = Progress(num_images=data.count, images_hash=data.hash)
        network, self.average, self.scheduler = networks_to_train(options, data, resume)
        setting = Setting(network, data.latents, accelerator.device, options.seed, options.cache_dir)
        self.terms = Terms(options.auxiliary, setting)
        if resume is not None:
            self._check_same_run(check_resumed(self.given, known, resume), network, resume)
            self.terms.restore(resume)
        check_networks(options, network, self.scheduler, data)
        kind = network_of(network)
        kind.stop_own_dropping(network)
        if options.augment:
            kind.accept_vectors(network, NUM_LABELS)
        if options.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        self.average.requires_grad_(False).eval()
        what = "images" if data.described is None else f"latents, {data.described['views']} view(s) of each,"
        logger.info(f"Training on {data.count or 'a stream of'} {what} with a side of {network.config.sample_size}.")
        loader = data.batches(network.config, options, accelerator.device)
        adam = {"betas": (options.adam_beta1, options.adam_beta2), "eps": options.adam_epsilon}
        adam["weight_decay"] = options.weight_decay
        lengths = options.average_lengths if self.main else ()
        self.loop = options.loop(
            accelerator, network, loader, known, resume, adam,
            options.shard, save=self.write, average=self.average, ema_decay=options.ema_decay,
            beside=self.terms if self.terms.trained else None,
            averages=PowerAverages(lengths, options.output_dir, options.average_steps),
        )  # fmt: skip
        self.diffusion = Diffusion(self.loop.module, self.scheduler)
        family = self.diffusion.family
        self.levels = levels_drawn(options, family)
        self.weighting = weighting(family, options.loss_weighting, options.min_snr_gamma)
        self.averaged = Diffusion(told_as_in_training(self.average, options), self.scheduler)

    def _check_same_run(self, trained: dict[str, Any], network: Any, resume: Path) -> None:
        """Raise `ValueError` if the options describe another network, scheduler, objective or data than the run's."""
        options, data = self.options, self.data
        latents = {"center_crop": False, **read_json(resume / LATENTS)} if (resume / LATENTS).is_file() else None
        used = {"label_dropout": options.class_conditional, "low_resolution_share": options.low_resolution}
        used |= {"center_crop": data.latents is None, "shuffle_buffer": data.count is None}
        used |= {"min_snr_gamma": options.loss_weighting == "min_snr"}
        may_change = options.may_change.union(name for name in used if not used[name])
        if data.count is None:  # a stream has no hash, and its order depends on more
            may_change -= OF_DATA | {"dataloader_num_workers"}
        now = {**self.given, "latents": data.described, "streaming": data.count is None}
        trained |= {"latents": latents, "streaming": bool(trained.get("streaming"))}
        turns = data.count is None and options.dataloader_num_workers > 1  # they take turns by the batches of a device
        if turns or self.terms.compares_images:
            may_change -= {"train_batch_size"}
            now["train_batch_size"] = options.sizes.per_device
            processes = len(list((resume / "state").glob("random_states_*")))
            trained["train_batch_size"] = (Progress.read(resume).batch_images or 0) // processes
        if not options.init_from and not trained.get("init_from"):
            now |= trained_on(*new_networks(options, data))
            trained |= trained_on(network, self.scheduler)
        for name in ("dataset_name", "train_data_dir"):  # these may lie elsewhere now
            now[name], trained[name] = (Path(known.get(name) or "").name for known in (now, trained))
        for known in (now, trained):
            known["auxiliary"] = lasting(known.get("auxiliary") or [])
        check_same_run(now, trained, may_change, resume)

    def loss(self, batch: Batch, draws: RowDraws) -> Tensor | dict[str, Tensor]:
        """Return the loss of a batch; with auxiliary terms its parts, by name."""
        options, loop = self.options, self.loop
        batch["pixel_values"] = one_view(batch["pixel_values"], draws)
        clean, labels = training_inputs(options, batch, self.diffusion.own, draws)
        if options.low_resolution and loop.progress.steps < options.low_resolution_share * loop.total_steps:
            clean = reduced(clean, options.low_resolution)
        names = self.terms.active(loop.progress.steps / loop.total_steps)
        found = self.diffusion.denoising(
            clean, self.terms.layers(names), condition=labels, generator=draws, weighting=self.weighting, **self.levels
        )
        loss = found.losses.mean()
        if not names:
            return {DENOISING: loss} if options.auxiliary else loss
        averaged = self.averaged_states(clean, found, labels, names, draws)
        seen = Seen(clean, found.noise, found.sigma, found.hidden_states, averaged, draws)
        return {DENOISING: loss} | (loop.beside or self.terms)(seen, names)

    def averaged_states(
        self, clean: Tensor, found: Denoised, labels: Tensor | None, names: list[str], draws: RowDraws
    ) -> dict[str, Tensor]:
        """Return what terms read of the averaged network, for a batch as the network in training found it.

        It is not asked at levels below `sigma_min`, which nothing has learned.
        """
        if not (layers := self.terms.averaged_layers(names)):
            return {}
        lowest = max(self.averaged.family.sigma_range()[0], self.options.sigma_min or 0.0)
        sigma = less_noisy(found.sigma, lowest, self.terms.lowered, draws)
        with torch.no_grad(), self.accelerator.autocast():
            return self.averaged.hidden_states(clean, found.noise[None], sigma, layers, labels)

    def pipeline(self, denoiser: Any) -> DDAEPipeline:
        """Return a pipeline of a network, which knows its null class, its classes and the VAE of its latents."""
        network = network_of(self.average)
        config = self.average.config
        null_class = None
        if self.options.class_conditional and network.default_null_class(config) is None:
            null_class = network.num_labels(config) - 1
        names = dict(enumerate(self.data.names)) if self.data.names else None
        scheduler = copy.deepcopy(self.scheduler)
        return DDAEPipeline.for_denoiser(denoiser, scheduler, null_class, vae=self.data.vae, id2label=names)

    def trained(self) -> Any:
        """Return the pipeline of averaged weights; of a sharded run in the first process alone, elsewhere None."""
        denoiser = self.loop.whole(self.loop.averaged())
        return None if denoiser is None else self.pipeline(denoiser)

    def write(self, folder: Path) -> None:
        """Write the averaged network, the raw one in `raw`, how their images are prepared, and the options.

        The first process does so; where the networks are sharded all call this, to hand it their parts.
        """
        if self.data.described is not None and (folder / "state").is_dir() and self.main:
            write_json(folder / LATENTS, self.data.described)
        if self.main:
            self.terms.save(folder)
        vae = None if self.data.vae is None else self.data.vae.config
        processor = DDAEImageProcessor.for_denoiser(self.average.config, vae, do_center_crop=self.data.center_crop)
        for place, network in ((folder, self.loop.averaged()), (folder / "raw", self.loop.raw())):
            denoiser = self.loop.whole(network)
            if self.main:
                self.pipeline(denoiser).save_pretrained(place)
                processor.save_pretrained(place)
            del denoiser  # memory has room for one
        if self.main:
            write_options(self.given, folder)

    def picture(self, step: int) -> Path:
        """Return the file of a step's samples."""
        return Path(self.options.output_dir or ".") / "samples" / f"step-{step:07d}.png"

    def sample(self, step: int) -> None:
        """Draw a grid from the averaged network, always from the same noise; where it is sharded, all processes do."""
        options = self.options
        if not (self.main or options.shard):
            return
        pipeline = self.pipeline(self.loop.averaged()).to(self.accelerator.device)
        pipeline.set_progress_bar_config(desc="Sampling", leave=False, disable=None if self.main else True)
        found: Any = pipeline(
            options.grid_images,
            torch.arange(options.grid_images) % (pipeline.null_class or 1) if options.class_conditional else None,
            torch.Generator("cpu").manual_seed(options.seed),
            num_inference_steps=options.num_inference_steps,
            sampler=options.sampler,
            output_type="np",
        )
        if self.main:
            self.save_grid(pipeline, found.images, step)

    def save_grid(self, pipeline: DDAEPipeline, images: Any, step: int) -> None:
        """Write samples (B, H, W, C) in [0, 1] as one picture, and hand it to trackers that take images."""
        if self.data.vae is not None:  # its memory is left to the training
            self.data.vae.to("cpu")
        grid = image_grid(pipeline.numpy_to_pil(images[..., :3] if images.shape[-1] >= 3 else images[..., :1]))
        path = self.picture(step)
        with saving(self.options.output_dir or "."):
            path.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(path) as partial:
                grid.save(partial, format="PNG")
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                more = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"samples": np.asarray(grid)[None]}, step=step, **more)

    def train(self) -> PretrainingResult:
        """Train, and leave checkpoints and samples, the final network and, last of all, the report."""
        options, loop, folder = self.options, self.loop, self.options.output_dir
        every = options.sample_steps if folder else 0
        step = loop.progress.steps
        if every and step and step % every == 0 and not self.picture(step).is_file():  # interrupted before it was drawn
            self.sample(step)
        loop.run(self.loss, self.sample, every)
        self.accelerator.wait_for_everyone()
        if folder and (self.main or options.shard):
            with saving(folder) as path:
                self.write(path)
        if every and loop.progress.steps % every:
            self.sample(loop.progress.steps)
        result = PretrainingResult(
            options=self.given,
            parameters=sum(p.numel() for p in self.average.parameters()),
            dataset=self.data.facts(),
            latents=self.data.described or {},
            pipeline=self.trained(),
            run=self,
            **loop.facts(),
            **base_model(options.init_from),
        )
        if self.main and folder:
            with saving(folder) as path:
                result.write(path)
            logger.info(
                f"{result.images_per_second} images/s, loss {result.loss_last_100_batches:.4f}; saved {folder}."
            )
        return result


def told_as_in_training(average: Any, options: PretrainingOptions) -> Any:
    """Return the averaged network, or one of the same weights that takes the vectors of augmentation.

    What samples are drawn from, and what is saved, takes none.
    """
    if not options.augment:
        return average
    told = copy.deepcopy(average, {id(weight): weight for weight in average.parameters()})  # which are not copied
    network_of(told).accept_vectors(told, NUM_LABELS)
    return told


def training_inputs(
    options: PretrainingOptions, batch: Batch, network: Any, draws: RowDraws
) -> tuple[Tensor, Tensor | None]:
    """Return clean images as floats, augmented if asked for, and what the network is told of them."""
    clean = clean_images(batch["pixel_values"], network.config)
    labels = batch.get("labels")
    if options.augment:
        clean, numbers = augment(clean, options.augment, draws)
        return clean, embed_labels(numbers, network_of(network).vector_width(network))
    if labels is not None:
        null_class = network_of(network).num_labels(network.config) - 1
        labels = drop_labels(labels, null_class, options.label_dropout, draws)
    return random_flip(clean, draws) if options.random_flip else clean, labels
