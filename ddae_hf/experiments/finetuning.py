"""Fine-tuning: a denoiser and a classifier on it are trained further as one network, or the classifier alone.

    from ddae_hf.experiments import Images, finetune
    result = finetune("runs/cifar10_ddpm_unet", Images.open("uoft-cs/cifar10"), few_labels=500, layer_decay=0.75)
    print(result.table())
    result.classifier.push_to_hub("me/classifier")

Images get noise of the taps' levels, fresh in every step. No weights are selected: the last ones, or their averages,
are tested once, with the model's fixed noise, which is what a user of the classifier gets, and with each image's own.
The VAE of a denoiser of latents is never trained, and never gets random weights. With `latents_dir` it does not run at
all, and every step draws one of the stored views of each latent.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import logging
import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_model
from transformers import TrainerState, TrainingArguments

from ..checkpoints import load_vae, plain_config
from ..classification_heads import DEFAULT_HEAD
from ..configuration_ddae import DDAEConfig
from ..cut import uncompiled
from ..image_processing_ddae import DDAEImageProcessor
from ..modeling_ddae import DDAEForImageClassification
from ..weights import fingerprint
from .arrays import StrPath, kept_or_temporary
from .classes import draw_labels
from .devices import best_device, compiling_by_blocks, machine, made_fast, products_as_before
from .devices import training_precision as precision_of
from .draws import indexed_noise, separate_randomness
from .features import FeatureCache
from .finetuning_options import FinetuningOptions
from .images import DataOptions, ImageInputs, Images, Inputs, labelled_splits, noise_view
from .latent_folder import LatentFolder, LatentInputs
from .low_rank import OPEN_MODEL, settled, with_adapters, write_classifier
from .models import Model, base_model, base_of, check_null_condition, untrained_classifier
from .probing import classify
from .report import in_memory
from .results import FineTuningReport
from .run_folder import (
    OF_PLACES,
    OPTIONS,
    check_same_run,
    checkpoint_to_resume,
    clear_rubbish,
    read_options,
    saved_checkpoints,
    saving,
    step_of,
    write_options,
)
from .sharing import this_process
from .stopping import interrupted
from .taps import read_taps, tap_word
from .trainer import AVERAGED, BY_HASH, PROGRESS, WEIGHTS, FineTuner, LabelledRows

logger = logging.getLogger(__name__)

SIZES = {"train_batch_size", "gradient_accumulation_steps"}
NEEDED = (WEIGHTS, "optimizer.pt", "scheduler.pt", "rng_state*.pth", "trainer_state.json", PROGRESS)


@dataclass(kw_only=True)
class FinetuningResult(FineTuningReport):
    """What `finetune` found: the figures, and in memory the classifier with its image processor."""

    classifier: DDAEForImageClassification = in_memory()
    processor: DDAEImageProcessor = in_memory()

    def save(self, folder: StrPath) -> None:
        """Write a folder that `DDAEForImageClassification.from_pretrained` opens, with `eval_results.json`."""
        write_classifier(self.classifier, folder, self.options)
        self.processor.save_pretrained(folder)
        self.write(Path(folder))


def finetune(
    model: Model, images: Images, options: FinetuningOptions | None = None, **changes: Any
) -> FinetuningResult:
    """Train a denoiser further as a classifier of labelled images, and test it once.

    With `output_dir` everything is written there, checkpoints included; SIGTERM and Ctrl-C write one too. All processes
    of `accelerate launch` call this, and the first one writes.

    Raises:
        ValueError: Options that cannot work, or would turn a resumed run into another; more processes than GPUs; or a
            training that diverges.
        OSError: No such checkpoint, or no room on the disk.
        Interrupted: A signal came, and there is a checkpoint to go on from.
    """
    options = FinetuningOptions.of(options, changes)
    this_process()
    images = Images.open(images, cache_dir=options.cache_dir)
    run = run_to_resume(options)
    before = None if run is None else read_options(run).get("mixed_precision")
    precision: Any = precision_of(options.mixed_precision, before, torch.device(best_device()))
    options = dataclasses.replace(options, mixed_precision=precision)
    given = DataOptions().to_dict() | images.opened_with | options.to_dict()
    with separate_randomness(), kept_or_temporary(options.output_dir) as folder, contextlib.ExitStack() as stack:
        stack.enter_context(products_as_before())
        if isinstance(model, (str, os.PathLike)):
            path = given["model_name_or_path"] = os.fspath(model)
        else:  # it is written to disk, and opened like all others
            base_of(model)
            given["model_name_or_path"] = OPEN_MODEL + fingerprint(model, dtype=None)
            path = str(stack.enter_context(kept_or_temporary(None)))
            saved = copy.copy(uncompiled(model))
            saved.config = copy.deepcopy(model.config)  # saving writes into it
            saved.save_pretrained(path)
        resume = to_resume(options, given)
        return _finetune(path, images, dataclasses.replace(options, output_dir=str(folder)), given, resume)


def _finetune(
    path: str, images: Images, options: FinetuningOptions, given: dict[str, Any], resume: Path | None
) -> FinetuningResult:
    started = time.monotonic()
    processor = DDAEImageProcessor.from_pretrained(path, cache_dir=options.cache_dir)
    train, test = open_inputs(path, images, options, processor)
    classifier = made_fast(build_classifier(path, options, train.names), best_device())
    chosen = check_finetuning(options, classifier.config, train.labels)
    views = train.folder.views("train") if isinstance(train, LatentInputs) else None
    device = best_device() if options.dataloader_num_workers == 0 else "cpu"  # a GPU cannot be used in workers
    rows = LabelledRows(train, chosen, views, device=device)
    keeps = given["output_dir"] is not None
    trainer = FineTuner(options, training_arguments(options, keeps), classifier, rows)
    trainer.known = beginning(classifier, rows) | {"options": given}
    if resume is not None:
        trainer.restore(resume)
        if finished := finished_run(options, given):
            return finished
    found: dict[str, Any] = train_further(trainer, given, resume) | figures_of(trainer, test, device)
    if isinstance(train, LatentInputs):
        classifier = with_vae(path, options, classifier, train.folder)
        right = classify(classifier, test.images, processor) == test.labels
        found["saved_classifier_test_accuracy"] = float(right.mean())
    seconds = time.monotonic() - started
    result = FinetuningResult(
        options=given,
        **reading_of(classifier.config),
        num_train_labels=len(rows),
        num_test_images=len(test),
        seconds_this_run=round(seconds, 1),
        seconds=round(seconds + found["train_seconds"] - found["train_seconds_this_run"], 1),
        dataset=images.facts(train.images, test.images) | {"num_images": len(rows)},
        classifier=settled(classifier, options),
        processor=processor,
        **found,
        **base_model(path if path == given["model_name_or_path"] else None),
        **machine(trainer.args.device.type, trainer.args.world_size),
    )
    if keeps and trainer.is_world_process_zero():
        with saving(trainer.args.output_dir):
            result.save(trainer.args.output_dir)
    return result


def run_to_resume(options: FinetuningOptions) -> Path | None:
    """Return the folder of the run that is to go on, if there is one that says its options."""
    wanted = options.resume_from_checkpoint
    if options.output_dir is None or wanted is None:
        return None
    run = Path(options.output_dir) if wanted == "latest" else Path(wanted).parent
    return run if (run / OPTIONS).is_file() else None


def to_resume(options: FinetuningOptions, given: dict[str, Any]) -> Path | None:
    """Return the checkpoint to resume, or None for a fresh start; `given` are all options, the data's among them."""
    if options.output_dir is None:
        return None
    run = run_to_resume(options)
    if run is not None:
        trained = read_options(run)
        if "label_fraction" in trained:
            was = f"{run} was trained on a label_fraction of {trained['label_fraction']}, which is no longer an option"
            raise ValueError(f"{was}: begin another run, with few_labels, in another output_dir.")
        begins = {"ema_decay"} if trained.get("ema_decay") is None else set()  # averages are of all steps
        check_same_run(given, trained, (options.MAY_CHANGE | OF_PLACES | BY_HASH | SIZES) - begins, run)
    needed = NEEDED if options.ema_decay is None else (*NEEDED, AVERAGED)
    checkpoint = checkpoint_to_resume(options.output_dir, options.resume_from_checkpoint, needed)
    if checkpoint is not None and run is None:
        lacks = f"{checkpoint.parent} has no {OPTIONS}, which says how {checkpoint.name} was trained"
        raise ValueError(f"{lacks}: resume another.")
    return checkpoint


def finished_run(options: FinetuningOptions, given: dict[str, Any]) -> FinetuningResult | None:
    """Return the result of a complete run of the same options, those of tests included; its figures come last."""
    folder = Path(str(options.output_dir))
    if not (folder / FinetuningResult.file).is_file():
        return None
    found = FinetuningResult.read(folder)
    if any(found.options.get(name) != given[name] for name in given.keys() - OF_PLACES - SIZES):
        return None
    logger.info(f"{folder} is complete: there is nothing left to do.")
    found.classifier = DDAEForImageClassification.from_pretrained(folder)
    found.processor = DDAEImageProcessor.from_pretrained(folder)
    return found


def open_inputs(
    path: str, images: Images, options: FinetuningOptions, processor: DDAEImageProcessor
) -> tuple[Inputs, Inputs]:
    """Return training and test images by their pixels or, with `latents_dir`, by latents of the model's own VAE."""
    train, test = labelled_splits(images, options)
    if options.latents_dir is None:
        inputs = ImageInputs(train, processor), ImageInputs(test, processor)
        for each in inputs:  # workers have their own memory, and each would keep there what it happens to decode
            each.pixels.keep = options.dataloader_num_workers == 0
        return inputs
    folder = LatentFolder(options.latents_dir)
    folder.check_vae(load_vae(path, cache_dir=options.cache_dir))
    shape = DDAEConfig.from_pretrained(path, cache_dir=options.cache_dir).sample_shape
    if folder.shape != shape:
        raise ValueError(f"{options.latents_dir} has latents {folder.shape}, but the denoiser takes {shape}.")
    return LatentInputs(train, folder, "train"), LatentInputs(test, folder, "test")


def build_classifier(path: str, options: FinetuningOptions, names: list[str]) -> DDAEForImageClassification:
    """Return the classifier, on the pretrained denoiser or one with random weights; with `latents_dir` without VAE.

    With `few_labels` its head is new: one that a checkpoint brings may have been fitted on more labels than these.
    """
    names_of_config = "layer sigma pooling head head_width null_class prompt noise_seed cache_dir".split()
    given = {name: getattr(options, name) for name in names_of_config}
    given["taps"] = options.taps and read_taps(options.taps)
    given["feature_norm"] = None if options.head in (None, "linear") else "none"  # that of a linear head is left behind
    config = {name: value for name, value in given.items() if value is not None}
    config |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    config |= {} if options.latents_dir is None else {"vae": None, "sample_posterior": False}
    torch.manual_seed(options.seed)
    if options.from_scratch:
        classifier = untrained_classifier(path, **config)
    else:
        config |= {"dtype": torch.float32, "ignore_mismatched_sizes": True}
        classifier = DDAEForImageClassification.from_pretrained(path, **config)
        if options.few_labels is not None:
            classifier.reset_head()
    check_null_condition(classifier.ddae)
    classifier = with_adapters(classifier, path, options)
    if options.freeze_denoiser:
        classifier.freeze_denoiser()
    return classifier


def reading_of(config: DDAEConfig) -> dict[str, Any]:
    """Return what a report says of the taps and the head of a classifier."""
    taps = [tap_word(layer, sigma) for layer, sigma in config.pairs] if config.taps else None
    head = None if config.head == "linear" else config.head
    return {"layer": config.layer, "sigma": config.sigma, "taps": taps, "head": head}


def beginning(classifier: DDAEForImageClassification, rows: LabelledRows) -> dict[str, Any]:
    """Return hashes of what a run begins with, wherever it lies: its images, its network, and what that reads."""
    inputs = rows.inputs
    config = classifier.config
    start = FeatureCache("", classifier.ddae).identity | {"layer": config.layer, "sigma": config.sigma}
    start |= {name: value for name in DEFAULT_HEAD if (value := getattr(config, name)) != DEFAULT_HEAD[name]}
    data = repr([inputs.images.hash, rows.rows.tolist(), inputs.labels[rows.rows].tolist()])
    texts = {"data": data, "start": json.dumps([start, inputs.identity], sort_keys=True)}
    return {"num_images": len(rows)} | {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}


def with_vae(
    path: str, options: FinetuningOptions, classifier: DDAEForImageClassification, folder: LatentFolder
) -> DDAEForImageClassification:
    """Return a classifier of latents with the VAE that they were made by, so that it takes images."""
    vae = load_vae(path, cache_dir=options.cache_dir)
    latents = {"vae": plain_config(vae), "sample_posterior": folder.index["sample_posterior"]}
    whole: Any = DDAEForImageClassification(DDAEConfig.from_dict(classifier.config.to_dict() | latents))
    whole.load_state_dict(classifier.state_dict() | {f"ddae.vae.{k}": v for k, v in vae.state_dict().items()})
    return whole.to(classifier.device).eval()


def check_finetuning(options: FinetuningOptions, config: Any, labels: np.ndarray) -> np.ndarray:
    """Return which images, of labels (N,), to train on, or raise `ValueError` if the model cannot be trained so."""
    rows = np.arange(len(labels))
    if options.few_labels is not None:
        rows = np.sort(draw_labels(labels, options.few_labels, options.seed))
    if options.random_crop >= min(config.image_size):
        raise ValueError(f"random_crop is {options.random_crop}: it must be below the sides, {config.image_size}.")
    if config.feature_norm == "batch_norm" and len(rows) % options.train_batch_size == 1:
        raise ValueError(f"{len(rows)} images leave a batch of one, which has no variance: change train_batch_size.")
    if config.feature_norm == "batch_norm" and options.ema_decay is not None:
        raise ValueError("The checkpoint has a batch norm, whose statistics are not averaged: leave out ema_decay.")
    training_arguments(options, keeps=True)
    return rows


def training_arguments(options: FinetuningOptions, keeps: bool) -> TrainingArguments:
    """Return Trainer's arguments, with checkpoints if it `keeps` them."""
    arguments = TrainingArguments(
        str(options.output_dir), per_device_train_batch_size=options.train_batch_size,
        per_device_eval_batch_size=options.train_batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        lr_scheduler_type="cosine", warmup_steps=options.lr_warmup_ratio, max_grad_norm=options.max_grad_norm,
        seed=options.seed, data_seed=options.seed, fp16=options.mixed_precision == "fp16",
        bf16=options.mixed_precision == "bf16", torch_compile=options.torch_compile, logging_steps=50,
        use_cpu=best_device() == "cpu",  # it refuses bf16 there otherwise
        save_strategy="steps" if keeps else "no", save_steps=options.checkpointing_steps,
        report_to=options.report_to or "none",
        disable_tqdm=True,  # `Progress` is a bar that prints nothing
        logging_nan_inf_filter=False,  # it would hide such losses
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,  # they are frozen
        dataloader_num_workers=options.dataloader_num_workers,
        dataloader_pin_memory=torch.cuda.is_available() and options.dataloader_num_workers > 0,
    )  # fmt: skip
    if arguments.n_gpu > 1:  # Trainer would split batches along the draws of noise
        raise ValueError(f"{arguments.n_gpu} GPUs in one process: start with `accelerate launch`, one process each.")
    return arguments


def train_further(trainer: FineTuner, given: dict[str, Any], resume: Path | None) -> dict[str, Any]:
    """Train, leave the last weights or their averages in the model, and return how long it took."""
    output = Path(trainer.args.output_dir)
    keeps = given["output_dir"] is not None
    if keeps and trainer.is_world_process_zero():
        clear_rubbish(output)
        with saving(output):
            write_options(given, output)
    if resume is not None and step_of(resume) == trainer.args.max_steps:  # Trainer would go one step too far
        trainer.state = TrainerState.load_from_json(str(resume / "trainer_state.json"))
        load_model(trainer.model, resume / WEIGHTS)
    else:
        stopping = trainer.stopping if keeps else contextlib.nullcontext()
        with compiling_by_blocks(trainer.accelerator), stopping:
            trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    if number := trainer.stopping.agreed(trainer.accelerator):
        raise interrupted(number, trainer.state.global_step, trainer.args.max_steps, saved_checkpoints(output)[-1])
    trainer.look()
    if trainer.average is not None:
        trainer.average.copy_to(trainer.learning.values())
    total = trainer.total()
    return {
        "steps": trainer.state.global_step,
        "images": total["images"],
        "num_trained_parameters": sum(parameter.numel() for parameter in trainer.learning.values()),
        "train_seconds": round(total["seconds"], 1),
        "train_seconds_this_run": round(total["seconds"] - trainer.before["seconds"], 1),
        "images_per_second": round(total["images"] / total["seconds"], 1),  # of the whole training
    }


def figures_of(trainer: FineTuner, test: Inputs, device: str) -> dict[str, float]:
    """Return figures of the test images, with the model's fixed noise and with noise of every image's own."""
    config = trainer.model.config
    shape = (config.num_noise_samples, *config.sample_shape)
    own = partial(indexed_noise, shape, seed=config.noise_seed, view=noise_view(True, 0))
    figures = trainer.evaluate(LabelledRows(test, device=device), metric_key_prefix="test")
    figures |= trainer.evaluate(LabelledRows(test, noise=own, device=device), metric_key_prefix="test_own_noise")
    wanted = ("_loss", "_accuracy", "_f1", "_precision", "_recall")
    return {name: value for name, value in figures.items() if name.endswith(wanted)}
