"""Fine-tuning: a denoiser and a linear classifier on it are trained further as one network, by transformers' `Trainer`.

    from ddae_hf.experiments import Images, finetune
    result = finetune("runs/cifar10_ddpm_unet", Images.open("uoft-cs/cifar10"), label_fraction=0.1, layer_decay=0.75)
    print(result.table())
    result.classifier.push_to_hub("me/classifier")

Images get noise of the tap's level, fresh in every step. Nothing is chosen: the last weights, or their averages, are
tested once, with the model's fixed noise, which is what a user of the classifier gets, and with noise of its own for
every image. The VAE of a denoiser of latents is never trained, nor drawn at random. With `latents_dir` it does not even
run: every step draws one of the stored views of an image's latent.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import os
import signal
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, load_model, save_file
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..augment import mixup, random_changes
from ..checkpoints import load_vae, plain_config
from ..configuration_ddae import DDAEConfig
from ..hidden_states import parameters_behind
from ..image_processing_ddae import DDAEImageProcessor
from ..modeling_ddae import DDAEForImageClassification
from ..weights import fingerprint
from .arrays import read_json, write_json
from .devices import best_device, fast_layout, made_fast
from .draws import indexed_noise, separate_randomness
from .encoding import LatentInputs, one_view
from .images import ImageInputs, Images, Inputs, labelled_splits, noise_view
from .latent_folder import LatentFolder
from .metrics import classification_metrics
from .models import Model, check_null_class, open_processor
from .options import Options, option
from .probing import classify, draw_fraction
from .results import FineTuningReport
from .run_facts import base_model, machine
from .run_folder import (
    OPTIONS,
    check_same_run,
    checkpoint_to_resume,
    discard,
    note_files,
    read_options,
    saved_checkpoints,
    saving,
    step_of,
    what_is_wrong,
    write_options,
)
from .stopping import Interrupted, Stopping, check_weights, look, not_finite

PROGRESS = "progress.json"
AVERAGED = "averaged.safetensors"
WEIGHTS = "model.safetensors"
NEEDED = (WEIGHTS, "optimizer.pt", "scheduler.pt", "rng_state*.pth", "trainer_state.json", PROGRESS)
NUM_LOSSES = 100  # batches whose losses are looked at
KEPT = 2  # checkpoints


@dataclass(kw_only=True)
class FinetuningOptions(Options):
    """Options of `finetune`."""

    # What a resumed run may change, and is applied from then on; and what says only where things are.
    MAY_CHANGE: ClassVar[frozenset[str]] = frozenset(
        """learning_rate layer_decay lr_warmup_ratio weight_decay max_grad_norm num_train_epochs max_train_steps
        ema_decay noise_seed test_split max_test_samples torch_compile""".split()
    )
    PLACES: ClassVar[frozenset[str]] = frozenset(
        """output_dir resume_from_checkpoint checkpointing_steps cache_dir dataloader_num_workers report_to
        logging_dir""".split()
    )

    output_dir: str | None = option(None, "Folder of the classifier, its figures and checkpoints.")
    resume_from_checkpoint: str | None = option(None, "A checkpoint's folder, or `latest` for the newest that is whole.")
    train_split: str = option("train", "Split to train on.")
    test_split: str = option("test", "Split to test on.")
    max_train_samples: int | None = option(None, "Use N training images of all classes, always the same ones.")
    max_test_samples: int | None = option(None, "Use N test images of all classes, always the same ones.")
    label_fraction: float = option(1.0, "Part of each class's training images that is used.")
    latents_dir: str | None = option(None, "Folder of the images' latents, to train on in place of their pixels.")
    cache_dir: str | None = option(None, "Where downloads are kept.")
    layer: str | None = option(None, "Where the classifier reads the network; by default the checkpoint's layer.")
    sigma: float | None = option(None, "Noise level of the images; by default the checkpoint's.")
    null_class: int | None = option(None, "The label that stands for none, for a class-conditional denoiser.")
    from_scratch: bool = option(False, "Start from random weights, to compare.")
    batch_size: int = option(128, "Images that a device takes at a time.")
    gradient_accumulation_steps: int = option(1, "Batches of every device in a step.")
    num_train_epochs: int = option(10, "Passes over the training images.")
    max_train_steps: int | None = option(None, "Number of steps, in place of num_train_epochs.")
    learning_rate: float = option(5e-4, "Of the classifier; see layer_decay.")
    layer_decay: float = option(1.0, "Factor of the learning rate from one layer to the one before.")
    lr_warmup_ratio: float = option(0.05, "Part of the steps in which the learning rate rises.")
    weight_decay: float = option(0.05, "Of matrices and kernels.")
    max_grad_norm: float = option(1.0, "Largest norm of the gradient; 0 leaves it as it is.")
    label_smoothing: float = option(0.0, "Part of a label that is spread over all classes.")
    mixup: float = option(0.0, "alpha of mixup's Beta(alpha, alpha); 0 mixes nothing.")
    random_flip: bool = option(False, "Mirror half of the images.")
    random_crop: int = option(0, "Shift images by up to this many pixels.", metavar="PADDING")
    ema_decay: float | None = option(None, "Average the weights with this decay; by default they are not averaged.")
    seed: int = option(0, "Seed of everything that is random in training.")
    noise_seed: int | None = option(None, "Seed of the noise in evaluation; by default the checkpoint's.")
    mixed_precision: Literal["no", "fp16", "bf16"] = option("no", "Type that most operations compute in.")
    torch_compile: bool = option(False, "Compile the network first, which takes minutes.")
    dataloader_num_workers: int = option(0, "Processes that read images; with 0 they are decoded once, if they fit.")
    checkpointing_steps: int = option(500, "Save a checkpoint, ready to resume, every N steps.")
    report_to: str | None = option(None, "Tracker: tensorboard, wandb, ...")
    logging_dir: str = option("logs", "Folder of tensorboard's files, inside output_dir.")

    def check(self) -> None:
        """Refuse what several options forbid together."""
        for name in ("random_flip", "random_crop"):
            if self.latents_dir is not None and getattr(self, name):
                raise ValueError(f"{name}: images in latents_dir were changed before they were encoded: leave it out.")
        if self.mixup and self.batch_size < 2:
            raise ValueError("mixup mixes the images of a batch: batch_size must be at least 2.")
        if self.mixed_precision == "fp16" and not torch.cuda.is_available():
            raise ValueError("mixed_precision fp16 needs a GPU.")
        if self.output_dir is None and (self.resume_from_checkpoint or self.report_to):
            raise ValueError("output_dir is not given: without it there is nothing to resume and no place for logs.")


@dataclass(kw_only=True)
class FinetuningResult(FineTuningReport):
    """What `finetune` found: the figures of `eval_results.json`, and the classifier with its image processor."""

    classifier: DDAEForImageClassification = dataclasses.field(repr=False)
    processor: DDAEImageProcessor = dataclasses.field(repr=False)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a folder that `DDAEForImageClassification.from_pretrained` opens, with its figures."""
        self.classifier.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        self.write(folder)


def finetune(
    model: Model, images: Images, options: FinetuningOptions | None = None, **changes: Any
) -> FinetuningResult:
    """Train a denoiser further as a classifier, and test it once.

    With `output_dir` everything is left there, with checkpoints: SIGTERM and Ctrl-C save one. Every process of
    `accelerate launch` calls this; one of them writes.

    Args:
        model: The checkpoint, or an open model, which stays as it is.
        images: The data set, whose images have labels.
        options: Options, by default those of `FinetuningOptions`.
        **changes: Fields of the options that are to be others.

    Raises:
        ValueError: Options that cannot work, a run to resume that would become another, or a training that diverges.
        OSError: No such checkpoint, or no room on the disk.
        Interrupted: A signal came, and there is a checkpoint to go on from.
    """
    options = FinetuningOptions.of(options, changes)
    source = os.fspath(model) if isinstance(model, (str, os.PathLike)) else None
    given = images.opened_with | {"model_name_or_path": source or f"weights {fingerprint(model, dtype=None)}"}
    given |= options.to_dict()
    with contextlib.ExitStack() as stack:
        stack.enter_context(separate_randomness())
        resume = to_resume(options, given)
        if resume is not None and (finished := finished_run(options, given, resume)):
            return finished
        folder = options.output_dir or stack.enter_context(tempfile.TemporaryDirectory())
        return _finetune(model, images, dataclasses.replace(options, output_dir=folder), given, resume)


def _finetune(
    model: Model, images: Images, options: FinetuningOptions, given: dict[str, Any], resume: Path | None
) -> FinetuningResult:
    started = time.monotonic()
    processor = open_processor(model, options.cache_dir)
    train, test = open_inputs(model, images, options, processor)
    classifier = made_fast(build_classifier(model, options, train.names), best_device())
    rows = draw_fraction(train.labels, options.label_fraction, options.seed)
    check_sizes(options, classifier.config, len(rows))
    trainer = FineTuner(options, classifier, Rows(train, rows, one_of_views=options.latents_dir is not None))
    report = {"options": given, "layer": classifier.config.layer, "sigma": classifier.config.sigma}
    report |= {"num_train_labels": len(rows), "num_test_images": len(test)}
    report |= train_further(trainer, given, resume) | figures_of(trainer, test)
    seconds = time.monotonic() - started
    report["seconds_this_run"] = round(seconds, 1)
    report["seconds"] = round(seconds + report["train_seconds"] - report["train_seconds_this_run"], 1)
    facts = images.facts(train.images, test.images) | {"num_images": len(rows)}
    report |= {"dataset": facts, **base_model(given["model_name_or_path"])}
    report |= machine(trainer.args.device.type, trainer.args.world_size)
    if isinstance(train, LatentInputs):
        classifier = with_vae(model, options, classifier, train.folder)
        right = classify(classifier, test.images, processor) == test.labels
        report["saved_classifier_test_accuracy"] = float(right.mean())
    result = FinetuningResult(**report, classifier=classifier, processor=processor)
    if given["output_dir"] is not None and trainer.is_world_process_zero():
        with saving(options.output_dir):
            result.save(options.output_dir)
    return result


# What a run is resumed from


def to_resume(options: FinetuningOptions, given: dict[str, Any]) -> Path | None:
    """Return the checkpoint to resume, or None for a fresh start; `given` are all options, the data's among them."""
    if options.output_dir is None:
        return None
    wanted = options.resume_from_checkpoint
    run = Path(options.output_dir) if wanted in (None, "latest") else Path(wanted).parent
    if wanted is not None and (run / OPTIONS).is_file():
        trained = {"gradient_accumulation_steps": 1} | read_options(run)  # which version 0.2.0 did not have
        # Averages begin with the first step.
        fixed = {"ema_decay"} if trained.get("ema_decay") is None else set()
        check_same_run(given, trained, (options.MAY_CHANGE | options.PLACES) - fixed, run)
    checkpoint = checkpoint_to_resume(options.output_dir, wanted, needed_files(options))
    if checkpoint is not None and not (run / OPTIONS).is_file():
        raise ValueError(f"{run} has no {OPTIONS}, which says how {checkpoint.name} was trained: it is not resumed.")
    return checkpoint


def needed_files(options: FinetuningOptions) -> tuple[str, ...]:
    """Return the patterns of files without which a run would not go on as it was."""
    return NEEDED if options.ema_decay is None else (*NEEDED, AVERAGED)


def finished_run(options: FinetuningOptions, given: dict[str, Any], checkpoint: Path) -> FinetuningResult | None:
    """Return what a run has left that is complete, by the same options; its figures are written last."""
    folder = checkpoint.parent
    path = folder / FineTuningReport.file
    if folder.resolve() != Path(str(options.output_dir)).resolve() or not path.is_file():
        return None
    report = FineTuningReport.read(path)
    if any(report.options.get(name) != given[name] for name in options.MAY_CHANGE):
        return None
    logger.info("%s is complete: there is nothing left to do.", folder)
    classifier = DDAEForImageClassification.from_pretrained(folder)
    processor = DDAEImageProcessor.from_pretrained(folder)
    return FinetuningResult(**vars(report), classifier=classifier, processor=processor)


def check_place(trainer: FineTuner, resume: Path) -> None:
    """Raise `ValueError` if steps are of other batches than before: Trainer would go on at another place."""
    processes = len(list(resume.glob("rng_state*.pth")))
    now = trainer.args.world_size
    if processes != now:
        raise ValueError(f"{resume} was trained by {processes} process(es), and here are {now}: start as many as then.")
    known, count = trainer.before.get("num_images"), len(trainer.train_dataset)  # which version 0.1.0 did not note
    if known not in (None, count):
        raise ValueError(f"{resume} was trained on {known} images, and here are {count}: give the same images.")
    if trainer.before.get("data") not in (None, trainer.train_dataset.hash):
        raise ValueError(f"{resume} was trained on other images, or other labels of them: give the same.")
    if step_of(resume) > trainer.args.max_steps:
        raise ValueError(f"{resume} is past the {trainer.args.max_steps} steps that are asked for: give more.")


# The data and the network


class Rows(Dataset):
    """Labelled inputs as Trainer's loader asks for them, by whole batches.

    Args:
        inputs: The inputs.
        rows: Which of them, by default all.
        one_of_views: Whether batches have every stored view of a latent, (B, views, c, h, w): see `one_view`.
        noise: Draws and seed of noise of every image's own, (draws, B, C, H, W), for tests; None leaves it out.
        shape: Shape of that noise of an image.
    """

    def __init__(
        self,
        inputs: Inputs,
        rows: np.ndarray | None = None,
        *,
        one_of_views: bool = False,
        noise: tuple[int, int] | None = None,
        shape: tuple[int, ...] = (),
    ):
        self.inputs, self.noise, self.shape = inputs, noise, shape
        self.rows = np.arange(len(inputs)) if rows is None else rows
        self.views = inputs.folder.views(inputs.split) if one_of_views else None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        rows = self.rows[indices]
        pixels = [self.inputs.read(rows, view) for view in range(self.views or 1)]
        batch = {"pixel_values": torch.stack(pixels, dim=1) if self.views else pixels[0]}
        batch["labels"] = torch.from_numpy(self.inputs.labels[rows])
        if self.noise is not None:
            own = indexed_noise((self.noise[0], *self.shape), rows, self.noise[1], noise_view(True, 0))
            batch["noise"] = own.transpose(0, 1)
        return batch

    @property
    def hash(self) -> str:
        """A SHA-256 of what is learnt from."""
        content = [self.inputs.images.hash, self.rows.tolist(), self.inputs.labels[self.rows].tolist()]
        return hashlib.sha256(repr(content).encode()).hexdigest()


def open_inputs(
    model: Model, images: Images, options: FinetuningOptions, processor: DDAEImageProcessor
) -> tuple[Inputs, Inputs]:
    """Return training and test images by their pixels or, with `latents_dir`, by latents of the model's own VAE."""
    train, test = labelled_splits(images, options)
    if options.latents_dir is None:
        return ImageInputs(train, processor), ImageInputs(test, processor)
    folder = LatentFolder(options.latents_dir)
    folder.check_vae(vae_of(model, options))
    config = config_of(model, options)
    if folder.shape != config.sample_shape:
        raise ValueError(f"{options.latents_dir} has latents {folder.shape}: the denoiser takes {config.sample_shape}.")
    return LatentInputs(train, folder, "train"), LatentInputs(test, folder, "test")


def vae_of(model: Model, options: FinetuningOptions) -> Any:
    """Return a model's VAE, or raise `ValueError` where it has none."""
    if isinstance(model, (str, os.PathLike)):
        return load_vae(model, cache_dir=options.cache_dir)
    if model.base_model.vae is None:
        raise ValueError("latents_dir: the model has no VAE to compare them with; give one, or give its path.")
    return model.base_model.vae


def config_of(model: Model, options: FinetuningOptions, **changes: Any) -> DDAEConfig:
    """Return a model's configuration with changes."""
    if isinstance(model, (str, os.PathLike)):
        return DDAEConfig.from_pretrained(model, **changes, cache_dir=options.cache_dir)
    return DDAEConfig.from_dict(model.config.to_dict() | changes)


def build_classifier(model: Model, options: FinetuningOptions, names: list[str]) -> DDAEForImageClassification:
    """Return the classifier, on the pretrained denoiser or on one of random weights; of latents without its VAE."""
    given = {name: getattr(options, name) for name in ("layer", "sigma", "null_class", "noise_seed")}
    config = {name: value for name, value in given.items() if value is not None}
    config |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    config |= {} if options.latents_dir is None else {"vae": None, "sample_posterior": False}
    where = {"cache_dir": options.cache_dir}
    torch.manual_seed(options.seed)
    if options.from_scratch:
        found = config_of(model, options, **config)
        found.generator_fingerprint = None
        classifier = DDAEForImageClassification(found)
        if found.vae is not None:  # without which there are no latents to learn on
            classifier.ddae.vae.load_state_dict(vae_of(model, options).state_dict())
    elif isinstance(model, (str, os.PathLike)):
        classifier = DDAEForImageClassification.from_pretrained(
            model, **config, dtype=torch.float32, ignore_mismatched_sizes=True, **where
        )
    else:
        prefix = "" if isinstance(model, DDAEForImageClassification) else "ddae."
        classifier = DDAEForImageClassification.from_pretrained(
            None, config=config_of(model, options, **config), dtype=torch.float32, ignore_mismatched_sizes=True,
            state_dict={f"{prefix}{name}": value for name, value in model.state_dict().items()},
        )  # fmt: skip
    check_null_class(classifier.ddae)
    return classifier


def with_vae(
    model: Model, options: FinetuningOptions, classifier: DDAEForImageClassification, folder: LatentFolder
) -> DDAEForImageClassification:
    """Return a classifier of latents with the VAE that they were made by, so that it takes images."""
    vae = vae_of(model, options)
    latents = {"vae": plain_config(vae), "sample_posterior": folder.index["sample_posterior"]}
    whole = DDAEForImageClassification(DDAEConfig.from_dict(classifier.config.to_dict() | latents))
    whole.load_state_dict(classifier.state_dict() | {f"ddae.vae.{k}": v for k, v in vae.state_dict().items()})
    return whole.eval().to(classifier.device)


def check_sizes(options: FinetuningOptions, config: DDAEConfig, count: int) -> None:
    """Raise `ValueError` at options that do not go with the images' size or number."""
    if options.random_crop >= min(config.image_size):
        raise ValueError(f"random_crop is {options.random_crop}: the images' sides are {config.image_size}.")
    if config.feature_norm == "batch_norm" and count % options.batch_size == 1:
        raise ValueError(f"{count} images leave a batch of one, which has no variance: change batch_size.")
    if config.feature_norm == "batch_norm" and options.ema_decay is not None:
        raise ValueError("The checkpoint has a batch norm, whose statistics are not averaged: leave out ema_decay.")


def parameter_depths(model: DDAEForImageClassification) -> dict[str, int]:
    """Return how many layers lie before each parameter that the logits depend on.

    The depth of a parameter in a block is the number (from 1) of the first layer, in the order of `layer_names`, whose
    hidden state has a gradient for it; what stands outside the blocks (first convolution, embeddings) has depth 0. The
    classifier comes after the last layer. Parameters that are missing have no part in the logits.
    """
    blank = torch.zeros(1, model.config.num_channels, *model.config.image_size, device=model.device)
    names = {p: name for name, p in model.ddae.denoiser.named_parameters(prefix="ddae.denoiser")}
    states = model.eval().ddae(blank, output_hidden_states=True).hidden_states
    blocks = {layer.split(".")[0] for layer in model.ddae.layer_names()}
    depths: dict[str, int] = {}
    seen: set[Any] = set()  # what earlier layers have seen
    for number, state in enumerate(states, start=1):
        for name in parameters_behind([state], names, seen):
            depths[name] = number if name.split(".")[2] in blocks else 0
    return depths | {name: len(states) + 1 for name, _ in model.classifier.named_parameters(prefix="classifier")}


def parameter_groups(
    model: DDAEForImageClassification, learning_rate: float, layer_decay: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Return the optimiser's groups.

    The learning rate falls by `layer_decay` with every layer that lies between a parameter and the logits (Clark et al.
    2020, arXiv 2003.10555; Bao et al. 2022, arXiv 2106.08254). Biases, gains and other vectors are not decayed.
    """
    depths = parameter_depths(model)
    top = max(depths.values())
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:  # what the logits depend on
            depth, decayed = depths[name], parameter.ndim > 1
            group = {"params": [], "lr": learning_rate * layer_decay ** (top - depth)}
            group = groups.setdefault((depth, decayed), group | {"weight_decay": weight_decay * decayed})
            group["params"].append(parameter)
    return list(groups.values())


# The training


def training_arguments(options: FinetuningOptions, count: int) -> TrainingArguments:
    """Return Trainer's arguments for so many images."""
    arguments = TrainingArguments(
        str(options.output_dir), per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size, gradient_accumulation_steps=options.gradient_accumulation_steps,
        lr_scheduler_type="cosine", warmup_steps=options.lr_warmup_ratio, max_grad_norm=options.max_grad_norm,
        seed=options.seed, data_seed=options.seed, fp16=options.mixed_precision == "fp16",
        bf16=options.mixed_precision == "bf16", torch_compile=options.torch_compile,
        save_steps=options.checkpointing_steps, logging_steps=50, report_to=options.report_to or "none",
        disable_tqdm=True,  # a bar of our own writes nothing between its lines
        logging_nan_inf_filter=False,  # it would hide them
        remove_unused_columns=False,  # the columns are what the pixels are made from
        ddp_find_unused_parameters=False,  # they are frozen
        dataloader_num_workers=options.dataloader_num_workers, dataloader_pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    if arguments.n_gpu > 1:  # Trainer would split batches along the draws of noise
        raise ValueError(f"{arguments.n_gpu} GPUs in one process: start with `accelerate launch`, one process each.")
    batches = math.ceil(math.ceil(count / options.batch_size) / arguments.world_size)
    epoch = math.ceil(batches / options.gradient_accumulation_steps)
    arguments.max_steps = options.max_train_steps or options.num_train_epochs * epoch
    return arguments
