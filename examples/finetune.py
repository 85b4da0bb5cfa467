r"""Fine-tune a denoiser and a linear classifier on it as one network.

    python examples/finetune.py --model_name_or_path runs/cifar10_ddpm_unet --dataset_name uoft-cs/cifar10 \
        --label_fraction 0.1 --layer_decay 0.75 --random_flip --random_crop 4 --ema_decay 0.999

Images get noise of the tap's level, fresh in every step. Nothing is chosen: the last weights, averaged with
`--ema_decay`, are tested once. The output folder opens with `DDAEForImageClassification.from_pretrained`;
`eval_results.json` holds the accuracy with the model's fixed noise, which is what a user of the folder gets, and with
noise of its own for every image. `--from_scratch` trains the same network from random weights, to compare.

The VAE of a denoiser of latents is never trained, nor drawn at random. With `--latents_dir` it does not even run: the
folder has the images' latents, as `latent_transfer.py` writes them, and every step draws one of their views. The saved
classifier has the VAE again, and its accuracy on pixels is reported too.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from collections import deque
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from datasets import Dataset
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, load_model, save_file
from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.utils import logging

from data import add_data_arguments, parse_with_config
from ddae_hf import DDAEConfig, DDAEForImageClassification, DDAEImageProcessor
from ddae_hf.augment import mixup, random_changes
from ddae_hf.checkpoints import load_vae, plain_config
from ddae_hf.experiments.arrays import write_json, written_whole
from ddae_hf.experiments.devices import best_device, fast_layout, made_fast
from ddae_hf.experiments.latent_folder import LatentFolder
from ddae_hf.experiments.metrics import classification_metrics
from ddae_hf.experiments.publishing import add_hub_arguments, prepare, publish
from ddae_hf.experiments.run_facts import base_model, data_facts, machine
from ddae_hf.hidden_states import parameters_behind
from labelled import LabelledImages, add_label_arguments, classify, draw_fraction
from latents import EncodedImages, one_view
from training_run import NUM_LOSSES, OPTIONS, check_weights, look, not_finite, saved_checkpoints, write_options

PROGRESS = "progress.json"
AVERAGED = "averaged.safetensors"
RESULTS = "eval_results.json"
FREE = {"output_dir", "resume_from_checkpoint", "checkpointing_steps", "cache_dir", "config"}  # may differ in resuming
FREE |= {"push_to_hub", "hub_model_id", "hub_private", "license"}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    add_label_arguments(parser)
    add_hub_arguments(parser)
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    add("--model_name_or_path", required=True, help="Checkpoint, folder or Hub id, in any layout.")
    add("--output_dir", default="runs/finetuned", help="Folder of the classifier, its figures and checkpoints.")
    add("--layer", help="Where the classifier reads the network; by default the checkpoint's layer.")
    add("--sigma", type=float, help="Noise level of the images; by default the checkpoint's.")
    add("--null_class", type=int, help="The label that stands for none, for a class-conditional denoiser.")
    add("--latents_dir", help="Folder of the images' latents, to train on in place of their pixels.")
    add("--from_scratch", action=flag, default=False, help="Start from random weights.")
    add("--label_fraction", type=float, default=1.0, help="Part of each class's training images that is used.")
    add("--batch_size", type=int, default=128, help="Images a step on each device.")
    add("--num_train_epochs", type=int, default=10)
    add("--max_train_steps", type=int, help="Number of steps; overrides --num_train_epochs.")
    add("--learning_rate", type=float, default=5e-4, help="Of the classifier; see --layer_decay.")
    add("--layer_decay", type=float, default=1.0, help="Factor of the learning rate from one layer to the one before.")
    add("--lr_warmup_ratio", type=float, default=0.05, help="Part of the steps in which the learning rate rises.")
    add("--weight_decay", type=float, default=0.05, help="Of matrices and kernels.")
    add("--max_grad_norm", type=float, default=1.0, help="Largest norm of the gradient; 0 leaves it as it is.")
    add("--label_smoothing", type=float, default=0.0)
    add("--mixup", type=float, default=0.0, help="alpha of mixup's Beta(alpha, alpha); 0 mixes nothing.")
    add("--random_flip", action=flag, default=False, help="Mirror half of the images.")
    add("--random_crop", type=int, default=0, metavar="PADDING", help="Shift images by up to this many pixels.")
    add("--ema_decay", type=float, help="Average the weights with this decay; by default they are not averaged.")
    add("--seed", type=int, default=0, help="Seed of everything that is random in training.")
    add("--noise_seed", type=int, help="Seed of the noise in evaluation; by default the checkpoint's.")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], default="no")
    add("--checkpointing_steps", type=int, default=500, help="Save a checkpoint, ready to resume, every N steps.")
    add("--resume_from_checkpoint", help="A checkpoint's folder, or `latest` for the newest in --output_dir.")
    return checked(parser, parse_with_config(parser, argv))


def checked(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """Return the options, or stop at those that cannot work."""
    for name in ("random_flip", "random_crop"):
        if args.latents_dir is not None and getattr(args, name):
            parser.error(f"--{name}: images in --latents_dir were changed before they were encoded: leave it out.")
    if args.mixup and args.batch_size < 2:
        parser.error("--mixup mixes the images of a batch: --batch_size must be at least 2.")
    if args.mixed_precision == "fp16" and not torch.cuda.is_available():
        parser.error("--mixed_precision fp16 needs a GPU.")
    return args


def checkpoint_to_resume(args: argparse.Namespace) -> Path | None:
    """Return the folder to resume from, or None for a fresh start."""
    folder, wanted = Path(args.output_dir), args.resume_from_checkpoint
    found = saved_checkpoints(args.output_dir)
    if wanted is None and found:
        raise SystemExit(
            f"{folder} holds checkpoints of an earlier run: resume it (--resume_from_checkpoint latest), or choose "
            "another --output_dir."
        )
    folders = [Path(wanted)] if wanted not in (None, "latest") else found
    options = [f.parent / OPTIONS for f in folders if (f.parent / OPTIONS).is_file()]
    if options:
        check_same_run(args, options[-1])
    complete = [f for f in folders if options and is_complete(args, f)]
    if folders and not complete:
        raise SystemExit(
            f"--resume_from_checkpoint {wanted}: there is no checkpoint with a training state that is complete."
        )
    return complete[-1] if complete else None


def is_complete(args: argparse.Namespace, checkpoint: Path) -> bool:
    """Return whether a checkpoint was written to its end: what comes last is missing where that was interrupted."""
    needed = [PROGRESS] if args.ema_decay is None else [PROGRESS, AVERAGED]
    return all((checkpoint / name).is_file() for name in needed)


def is_own(args: argparse.Namespace, checkpoint: Path) -> bool:
    """Return whether a checkpoint is of the run that `--output_dir` holds."""
    return checkpoint.parent.resolve() == Path(args.output_dir).resolve()


def clear_rubbish(args: argparse.Namespace) -> None:
    """Remove checkpoints whose writing was interrupted: Trainer counts them among those that it keeps."""
    for folder in saved_checkpoints(args.output_dir):
        if not is_complete(args, folder) and not folder.is_symlink():
            shutil.rmtree(folder)


def check_same_run(args: argparse.Namespace, path: Path) -> None:
    """Stop if the options differ from those of the run that is resumed."""
    trained = yaml.safe_load(path.read_text(encoding="utf-8"))
    different = sorted(name for name, value in vars(args).items() if name not in FREE and value != trained.get(name))
    if different:
        raise SystemExit(f"The checkpoint to resume was trained with other options: {', '.join(different)} differ.")


def open_data(args: argparse.Namespace, processor: DDAEImageProcessor, config: DDAEConfig) -> LabelledImages:
    """Return the images by their pixels or, with --latents_dir, by their latents, checked against the checkpoint."""
    if args.latents_dir is None:
        return LabelledImages(args, processor, config.sample_shape)
    folder = LatentFolder(args.latents_dir)
    folder.check_vae(load_vae(args.model_name_or_path, cache_dir=args.cache_dir))
    if folder.shape != config.sample_shape:
        raise ValueError(f"{args.latents_dir} has latents {folder.shape}: the denoiser takes {config.sample_shape}.")
    return EncodedImages(LabelledImages(args, processor), folder)


def build_model(args: argparse.Namespace, names: list[str]) -> DDAEForImageClassification:
    """Return the classifier, on the pretrained denoiser or on one of random weights; of latents without its VAE."""
    given = {"layer": args.layer, "sigma": args.sigma, "null_class": args.null_class, "noise_seed": args.noise_seed}
    options = {name: value for name, value in given.items() if value is not None}
    options |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    options |= {} if args.latents_dir is None else {"vae": None, "sample_posterior": False}
    source, where = args.model_name_or_path, {"cache_dir": args.cache_dir}
    torch.manual_seed(args.seed)
    if args.from_scratch:
        config = DDAEConfig.from_pretrained(source, **options, **where)
        config.generator_fingerprint = None
        model = DDAEForImageClassification(config)
        if config.vae is not None:  # without which there are no latents to learn on
            model.ddae.vae.load_state_dict(load_vae(source, **where).state_dict())
        return model
    options |= {"dtype": torch.float32, "ignore_mismatched_sizes": True}
    return DDAEForImageClassification.from_pretrained(source, **options, **where)


def with_vae(
    args: argparse.Namespace, model: DDAEForImageClassification, folder: LatentFolder
) -> DDAEForImageClassification:
    """Return a classifier of latents with the VAE that they were made by, so that it takes images."""
    vae = load_vae(args.model_name_or_path, cache_dir=args.cache_dir)
    latents = {"vae": plain_config(vae), "sample_posterior": folder.index["sample_posterior"]}
    whole = DDAEForImageClassification(DDAEConfig.from_dict(model.config.to_dict() | latents))
    whole.load_state_dict(model.state_dict() | {f"ddae.vae.{k}": v for k, v in vae.state_dict().items()})
    return whole


def check_sizes(args: argparse.Namespace, config: DDAEConfig, count: int) -> None:
    """Stop at options that do not go with the images' size or number."""
    if args.random_crop >= min(config.image_size):
        raise SystemExit(f"--random_crop is {args.random_crop}: the images' sides are {config.image_size}.")
    if config.feature_norm == "batch_norm" and count % args.batch_size == 1:
        raise SystemExit(f"{count} images leave a batch of one, which has no variance: change --batch_size.")
    if config.feature_norm == "batch_norm" and args.ema_decay is not None:
        raise SystemExit("The checkpoint has a batch norm, whose statistics are not averaged: leave out --ema_decay.")


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


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack a batch; of noise, the model takes the draws first, (draws, B, C, H, W)."""
    batch = default_collate(rows)
    return batch | {"noise": batch["noise"].transpose(0, 1)} if "noise" in batch else batch


class AveragedWeights(TrainerCallback):
    """An exponential moving average of the weights, kept beside Trainer's checkpoints."""

    def __init__(self, model: nn.Module, decay: float):
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.ema = EMAModel(self.parameters.values(), decay=decay, foreach=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Average."""
        self.ema.step(self.parameters.values())

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the averages to the checkpoint that Trainer has written."""
        if state.is_world_process_zero:
            path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / AVERAGED
            averages = [value.contiguous() for value in self.ema.shadow_params]
            with written_whole(path) as partial:
                save_file(dict(zip(self.parameters, averages, strict=True)), partial)

    def load(self, checkpoint: Path) -> None:
        """Restore the averages of a checkpoint."""
        saved = load_file(checkpoint / AVERAGED)
        for name, value in zip(self.parameters, self.ema.shadow_params, strict=True):
            value.copy_(saved[name])
        self.ema.optimization_step = int(checkpoint.name.split("-")[1])


class Progress(TrainerCallback):
    """Images and seconds of training, kept beside Trainer's checkpoints, so that resumed runs add up."""

    def __init__(self, trainer: FineTuner, resume: Path | None):
        self.trainer, self.started = trainer, time.monotonic()
        self.before = json.loads((resume / PROGRESS).read_text()) if resume else {"images": 0, "seconds": 0.0}

    def total(self) -> dict[str, float]:
        """Return the images and seconds of all runs."""
        seconds = self.before["seconds"] + time.monotonic() - self.started
        images = self.before["images"] + self.trainer.images_seen
        return {"images": images, "seconds": seconds, "num_images": len(self.trainer.train_dataset)}

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add them to the checkpoint that Trainer has written."""
        if state.is_world_process_zero:
            write_json(Path(args.output_dir) / f"checkpoint-{state.global_step}" / PROGRESS, self.total())


class FiniteWeights(TrainerCallback):
    """Stops a training before Trainer saves a loss or weights, or their averages, that are not finite."""

    def __init__(self, trainer: FineTuner, averages: list[Tensor]):
        self.trainer = trainer
        self.averages = averages

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at them if they are about to be saved."""
        if control.should_save:
            weights = [*self.trainer.model.state_dict().values(), *self.averages]
            losses, finite = look(self.trainer.accelerator, self.trainer.losses, weights)
            if not finite:
                raise self.trainer.not_finite(fmean(losses))


class FineTuner(Trainer):
    """Trainer with this script's learning rates and changes of images; with --latents_dir, images are latents.

    What is random in a step depends on (seed, step, process) alone, so that a resumed run repeats it.
    """

    def __init__(self, options: argparse.Namespace, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.options, self.images_seen = options, 0
        self.losses: deque[Tensor] = deque(maxlen=NUM_LOSSES)  # of the last batches
        groups = parameter_groups(self.model, options.learning_rate, options.layer_decay, options.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, fused=True)

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Return the loss, in training on changed images and targets."""
        if model.training:
            state = [self.options.seed, self.state.global_step, self.args.process_index]
            torch.manual_seed(int(np.random.SeedSequence(state).generate_state(1, np.uint64)[0]))
            inputs = inputs | self.change(one_view(inputs["pixel_values"]), inputs["labels"])
            self.images_seen += len(inputs["labels"]) * self.args.world_size
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            self.losses.append(loss.detach())
            return loss
        return super().compute_loss(model, inputs, *args, **kwargs)

    def change(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return flipped, cropped and mixed images, and their classes as smoothed probabilities (B, K)."""
        images = random_changes(images, self.options.random_flip, self.options.random_crop)
        targets = F.one_hot(labels, len(self.model.config.id2label)).float()
        if self.options.mixup:
            images, targets = mixup(images, targets, self.options.mixup)
        images = images.contiguous(memory_format=fast_layout(images.device))
        # Label smoothing (Szegedy et al. 2016, arXiv 1512.00567).
        targets = torch.lerp(targets, torch.full_like(targets, 1 / targets.shape[1]), self.options.label_smoothing)
        return {"pixel_values": images, "labels": targets}

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, and stop if the loss is no number."""
        if not math.isfinite(logs.get("loss", 0.0)):
            raise self.not_finite(logs["loss"])
        super().log(logs, *args, **kwargs)

    def not_finite(self, loss: float) -> SystemExit:
        """Return what stops a training that has failed; the learning rate is the classifier's, the largest."""
        step = self.state.global_step
        rate = max(group["lr"] for group in self.optimizer.param_groups)
        found = [f for f in saved_checkpoints(self.args.output_dir) if is_complete(self.options, f)]
        last = found[-1] if found else None
        return not_finite(step, loss, rate, last, "it keeps its options, so start again in another --output_dir")


def make_trainer(args: argparse.Namespace, model: DDAEForImageClassification, dataset: Dataset) -> FineTuner:
    """Return Trainer, ready to train."""
    arguments = TrainingArguments(
        args.output_dir, per_device_train_batch_size=args.batch_size, per_device_eval_batch_size=args.batch_size,
        num_train_epochs=args.num_train_epochs, max_steps=args.max_train_steps or -1, lr_scheduler_type="cosine",
        warmup_steps=args.lr_warmup_ratio, max_grad_norm=args.max_grad_norm, seed=args.seed, data_seed=args.seed,
        fp16=args.mixed_precision == "fp16", bf16=args.mixed_precision == "bf16",
        save_steps=args.checkpointing_steps, save_total_limit=2, logging_steps=50, disable_tqdm=False, report_to="none",
        logging_nan_inf_filter=False,  # it would hide them
        remove_unused_columns=False,  # the columns are what the pixels are made from
        ddp_find_unused_parameters=False,  # they are frozen
        dataloader_pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    if arguments.n_gpu > 1:  # Trainer would split batches along the draws of noise
        raise SystemExit(f"{arguments.n_gpu} GPUs in one process: start with `accelerate launch`, one process each.")

    def compute_metrics(found: Any) -> dict[str, float]:
        return classification_metrics().compute(predictions=found.predictions.argmax(-1), references=found.label_ids)

    return FineTuner(args, model, arguments, collate, dataset, compute_metrics=compute_metrics)


def train(args: argparse.Namespace, trainer: FineTuner, resume: Path | None) -> dict[str, Any]:
    """Train, leave the last weights or their averages in the model, and return how long it took."""
    progress, average = Progress(trainer, resume), None
    trainer.add_callback(progress)
    if resume is not None:
        check_batches(trainer, resume)
        for name in ("model.safetensors", AVERAGED) if args.ema_decay is not None else ("model.safetensors",):
            check_weights(resume, load_file(resume / name).values())
    if args.ema_decay is not None:
        average = AveragedWeights(trainer.model, args.ema_decay)
        trainer.add_callback(average)
        if resume is not None:
            average.load(resume)
    trainer.add_callback(FiniteWeights(trainer, average.ema.shadow_params if average else []))
    if trainer.is_world_process_zero():
        write_options(args, Path(args.output_dir))
        if resume is not None and is_own(args, resume):
            clear_rubbish(args)
    state = TrainerState.load_from_json(str(resume / "trainer_state.json")) if resume else TrainerState()
    if resume and state.global_step == state.max_steps:
        trainer.state = state  # Trainer would go one step too far
        load_model(trainer.model, resume / "model.safetensors")
    else:
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    total = progress.total()
    if average is not None:
        average.ema.copy_to(average.parameters.values())
    seconds = total["seconds"] - progress.before["seconds"]
    timed = (trainer.images_seen, seconds) if trainer.images_seen else (total["images"], progress.before["seconds"])
    return {
        "steps": trainer.state.global_step,
        "images": total["images"],
        "train_seconds": round(total["seconds"], 1),
        "train_seconds_this_run": round(seconds, 1),
        "images_per_second": round(timed[0] / timed[1], 1),
    }


def test(trainer: FineTuner, data: LabelledImages) -> dict[str, float]:
    """Return figures of the test images, with the model's fixed noise and with noise of every image's own."""
    own = (trainer.model.config.num_noise_samples, trainer.model.config.noise_seed)
    figures = trainer.evaluate(data.dataset("test"), metric_key_prefix="test")
    figures |= trainer.evaluate(data.dataset("test", own), metric_key_prefix="test_own_noise")
    wanted = ("_loss", "_accuracy", "_f1", "_precision", "_recall")
    return {name: value for name, value in figures.items() if name.endswith(wanted)}


def check_batches(trainer: FineTuner, resume: Path) -> None:
    """Stop if steps are of other batches than before: Trainer would go on at another place, or not at all."""
    processes = len(list(resume.glob("rng_state*.pth")))
    now = trainer.args.world_size
    images = json.loads((resume / PROGRESS).read_text()).get("num_images")  # which version 0.1.0 did not note
    if processes != now:
        raise SystemExit(f"{resume} was trained by {processes} process(es), and here are {now}: start as many as then.")
    if images not in (None, len(trainer.train_dataset)):
        raise SystemExit(
            f"{resume} was trained on {images} images, and here are {len(trainer.train_dataset)}: give the same images."
        )


def table(report: dict[str, Any]) -> str:
    """Return the figures as a Markdown table."""
    start = "random" if report["options"]["from_scratch"] else "pretrained"
    saved = report.get("saved_classifier_test_accuracy")
    on = "" if saved is None else f" by their latents; the saved classifier has {100 * saved:.2f} on their pixels"
    return f"""Test accuracy in %, {report["num_test_images"]:,} test images{on}:\n
| start | labels | layer, sigma | fixed noise | its macro F1 | each image's own noise | training images/s |
|---|---|---|---|---|---|---|
| {start} | {report["num_train_labels"]:,} | {report["layer"]}, {report["sigma"]:.3g} \
| {100 * report["test_accuracy"]:.2f} | {100 * report["test_f1"]:.2f} | {100 * report["test_own_noise_accuracy"]:.2f} \
| {report["images_per_second"]:.0f} |"""


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    args = parse_arguments(argv)
    logging.set_verbosity_error()  # a new classifier is what is wanted here
    logging.disable_progress_bar()
    prepare(args)
    started = time.monotonic()
    resume = checkpoint_to_resume(args)
    output = Path(args.output_dir)
    if resume is not None and is_own(args, resume) and (output / RESULTS).is_file():  # which is written last
        if os.environ.get("RANK", "0") == "0":
            print(f"{output} is complete, its figures are in {RESULTS}: there is nothing left to do.")
            publish(args, output, "Fine-tune")
        return
    try:
        processor = DDAEImageProcessor.from_pretrained(args.model_name_or_path, cache_dir=args.cache_dir)
        data = open_data(args, processor, DDAEConfig.from_pretrained(args.model_name_or_path, cache_dir=args.cache_dir))
        model = made_fast(build_model(args, data.names), best_device())
        chosen = draw_fraction(data.labels["train"], args.label_fraction, args.seed)
        check_sizes(args, model.config, len(chosen))
        trainer = make_trainer(args, model, data.dataset("train").select(chosen))
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error
    report = {"options": vars(args), "layer": model.config.layer, "sigma": model.config.sigma}
    report |= {"num_train_labels": len(chosen), "num_test_images": len(data.labels["test"])}
    report |= train(args, trainer, resume) | test(trainer, data)
    seconds = time.monotonic() - started
    report["seconds_this_run"] = round(seconds, 1)
    report["seconds"] = round(seconds + report["train_seconds"] - report["train_seconds_this_run"], 1)
    report |= {"dataset": data_facts(args, len(chosen)), **base_model(args.model_name_or_path)}
    report |= machine(trainer.args.device.type, trainer.args.world_size)
    if trainer.is_world_process_zero():
        whole = with_vae(args, model, data.folder) if isinstance(data, EncodedImages) else model
        whole.save_pretrained(output)
        processor.save_pretrained(output)
        if whole is not model:
            right = classify(output, data.pixels) == data.labels["test"]
            report["saved_classifier_test_accuracy"] = float(right.mean())
        write_json(output / RESULTS, report)
        print(f"{table(report)}\n\nThe classifier is in {output}.")
        publish(args, output, "Fine-tune")


if __name__ == "__main__":
    main()
