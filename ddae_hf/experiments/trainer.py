"""transformers' `Trainer` as fine-tuning needs it: learning rates by layer, changed images, checkpoints that are whole.

Besides Trainer's files, a checkpoint has `averaged.safetensors` with `ema_decay`, `progress.json` (images, seconds, and
what it was trained with) and, written last, `files.json`, by which `run_folder` knows that it is whole.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from time import monotonic
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..augment import mixup, random_changes
from ..hidden_states import layer_names, parameters_behind
from ..modeling_ddae import DDAEForImageClassification
from .arrays import read_json, write_json
from .batches import whole
from .devices import fast_layout
from .draws import RowDraws, seed_by
from .images import Inputs
from .latent_folder import one_view
from .loading import to_device
from .metrics import classification_metrics
from .run_folder import OF_DATA, check_same_run, discard, note_files, read_options, saved_checkpoints, saving, step_of
from .stopping import Stopping, check_weights, look, not_finite

WEIGHTS = "model.safetensors"
AVERAGED = "averaged.safetensors"
PROGRESS = "progress.json"
# Options that may be others if the same images and network come of them, as hashes in a checkpoint tell.
BY_HASH = OF_DATA | {"model_name_or_path"}
STEP = "train_batch_size x gradient_accumulation_steps x processes"  # the images of a step, which are what counts
# Options that a run can no longer take over once it has reached its last step.
IN_TRAINING = frozenset(
    "learning_rate layer_decay lr_warmup_ratio weight_decay max_grad_norm ema_decay mixed_precision".split()
)


def parameter_groups(
    model: DDAEForImageClassification, learning_rate: float, layer_decay: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Return the optimiser's groups.

    The learning rate falls by `layer_decay` with every layer that lies between a parameter and the logits (Clark et al.
    2020, arXiv 2003.10555; Bao et al. 2022, arXiv 2106.08254). A parameter in a block belongs to the first layer,
    in the order of `layer_names`, whose hidden state has a gradient for it; what stands outside the blocks (first
    convolution, embeddings) comes before all layers, and the classifier with its whole head after them. With several
    taps layers are counted up to the deepest, along the longest way to the logits. Biases, gains and other vectors are
    not decayed.
    """
    config = model.config
    blank = torch.zeros(1, config.num_channels, *config.image_size, device=model.device)
    names = {p: name for name, p in model.ddae.denoiser.named_parameters(prefix="ddae.denoiser")}
    own = {layer for layer, _ in config.pairs}
    order = layer_names(model.ddae.denoiser, inner=True)
    before = {*model.ddae.layer_names()} & {*order[: order.index(str(config.layer))]}
    taps = [name for name in order if name in before | own]
    inner = model.eval().ddae
    states = inner.read_layers(inner.encode(blank), taps).values()
    blocks = {layer.split(".")[0] for layer in model.ddae.layer_names()}
    depths: dict[str, int] = {}
    seen: set[Any] = set()  # what earlier layers have seen
    for number, state in enumerate(states, start=1):
        for name in parameters_behind([state], names, seen):
            depths[name] = number if name.split(".")[2] in blocks else 0
    top = len(states) + 1
    depths |= {name: top for name, _ in model.named_parameters() if not name.startswith("ddae.")}
    gains = {p for part in model.modules() if isinstance(part, nn.LayerNorm) for p in part.parameters()}
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:  # what the logits depend on
            kind = depths[name], parameter.ndim > 1 and parameter not in gains
            rate = learning_rate * layer_decay ** (top - kind[0])
            group = groups.setdefault(kind, {"params": [], "lr": rate, "weight_decay": weight_decay * kind[1]})
            group["params"].append(parameter)
    return list(groups.values())


class LabelledRows(Dataset[Any]):
    """Labelled inputs by whole batches: by default all of them, only the first view of each, and without `noise`.

    They are read onto the device, which must be the processor where workers of a loader read them.
    """

    def __init__(
        self,
        inputs: Inputs,
        rows: np.ndarray | None = None,
        views: int | None = None,
        noise: Callable[..., Tensor] | None = None,
        device: torch.device | str = "cpu",
    ):
        self.inputs, self.views, self.noise, self.device = inputs, views, noise, device
        self.rows = np.arange(len(inputs)) if rows is None else rows
        self.partners: np.ndarray | None = None
        self.shares = np.ones(len(self.rows), np.float32)

    def __len__(self) -> int:
        return len(self.rows)

    def mix(self, alpha: float, seed: int, epoch: int) -> None:
        """Give each input a partner among all of them, and its share in their mixture, from Beta(alpha, alpha).

        They depend on the input's number, the seed and the epoch alone, not on the batch or the process that it comes
        to. In an epoch each input is the partner of one.
        """
        generator = np.random.default_rng([seed, epoch])
        self.partners = generator.permutation(len(self))
        self.shares = generator.beta(alpha, alpha, len(self)).astype(np.float32)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Return `pixel_values` (B, C, H, W) or (B, views, c, h, w), `labels` (B,) and `noise` (draws, B, C, H, W).

        After `mix` there are `shares` (B,) too, and `partner_pixel_values` and `partner_labels` as for the inputs.
        """
        rows = self.rows[indices]
        batch = self._read(rows)
        if self.partners is not None:
            partners = self._read(self.rows[self.partners[indices]])
            batch |= {f"partner_{name}": values for name, values in partners.items()}
            batch["shares"] = to_device(torch.from_numpy(self.shares[indices]), self.device)
        return batch if self.noise is None else batch | {"noise": self.noise(rows, device=self.device).transpose(0, 1)}

    def _read(self, rows: np.ndarray) -> dict[str, Tensor]:
        views = [self.inputs.read(rows, view, device=self.device) for view in range(self.views or 1)]
        batch = {"pixel_values": torch.stack(views, dim=1) if self.views else views[0]}
        return batch | {"labels": to_device(torch.from_numpy(self.inputs.labels[rows]), self.device)}


class Progress(ProgressCallback):
    """Trainer's progress bar, which prints nothing here, and what is done around every step."""

    def __init__(self, trainer: FineTuner):
        super().__init__()
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put this run's options in the place of those that Trainer has restored from a checkpoint."""
        super().on_train_begin(args, state, control, **kwargs)
        state.compute_steps(args, state.max_steps)
        schedule = kwargs["lr_scheduler"]
        groups = kwargs["optimizer"].param_groups
        schedule.base_lrs = [rate for rate, _ in self.trainer.given]
        for group, (rate, weight_decay), factor in zip(groups, self.trainer.given, schedule.lr_lambdas, strict=True):
            group.update(lr=rate * factor(schedule.last_epoch), weight_decay=weight_decay)
        schedule._last_lr = [group["lr"] for group in groups]

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw the epoch's mixtures, before workers get the data set."""
        super().on_epoch_begin(args, state, control, **kwargs)
        trainer = self.trainer
        if trainer.options.mixup:
            trainer.rows.mix(trainer.options.mixup, trainer.options.seed, state.global_step // trainer.epoch_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Average the weights; save and stop if a signal came."""
        super().on_step_end(args, state, control, **kwargs)
        self.trainer.batch = 0
        if self.trainer.average is not None:
            self.trainer.average.step(self.trainer.learning.values())
        if self.trainer.stopping.agreed(self.trainer.accelerator):
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the loss, and stop if it is not finite."""
        if "loss" in logs:
            self.trainer.look()
            if self.training_bar is not None:
                self.training_bar.set_postfix(loss=f"{logs['loss']:.4f}")


class FineTuner(Trainer):
    """Trainer of a classifier, on `LabelledRows`.

    What is drawn for an image in training depends on (seed, its place in the step) alone, however the images of a step
    are shared out, and so does its weight; what it is mixed with depends on (seed, epoch, its number), and dropout on
    (seed, step, process, batch). So a resumed run repeats all of it.
    """

    model: Any
    optimizer: Any
    args: Any

    def __init__(self, options: Any, arguments: TrainingArguments, model: DDAEForImageClassification, dataset: Any):
        super().__init__(model, arguments, cast(Any, whole), dataset, compute_metrics=_metrics)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback):
                callback.logging_dir = str(Path(str(arguments.output_dir)) / options.logging_dir)
        self.remove_callback(PrinterCallback)
        self.add_callback(Progress(self))
        self.epoch_steps = math.ceil(len(self.get_train_dataloader()) / options.gradient_accumulation_steps)
        arguments.max_steps = options.max_train_steps or options.num_train_epochs * self.epoch_steps
        groups = parameter_groups(model, options.learning_rate, options.layer_decay, options.weight_decay)
        self.given = [(group["lr"], group["weight_decay"]) for group in groups]
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        self.learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.average = None
        if options.ema_decay is not None:
            self.average = EMAModel(self.learning.values(), decay=options.ema_decay, foreach=True)
        self.options = options
        self.rows = dataset
        self.stopping = Stopping()
        self.losses: deque[Tensor] = deque(maxlen=100)  # of batches
        self.batch = 0  # of this step
        self.images_seen = 0  # in this run
        self.known: dict[str, Any] = {}  # what checkpoints note too: hashes of images and start, options
        self.before: dict[str, Any] = {"images": 0, "seconds": 0.0}  # how far the resumed run had come
        self.started = monotonic()

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Return the loss, in training on changed images and targets."""
        if not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        seed_by(self.options.seed, self.state.global_step, self.args.process_index, self.batch)
        counted, own, weight = self.shares()
        inputs = {name: value[: own or None] for name, value in inputs.items()}
        inputs = self.change(inputs, self.draws(len(inputs["labels"])))
        loss: Any = super().compute_loss(model, inputs, *args, **kwargs)
        loss = loss * weight
        self.batch += 1
        self.images_seen += counted
        self.losses.append(loss.detach())
        return loss

    def shares(self) -> tuple[int, int, float]:
        """Return how many images count of this pass of all processes, and of this one's batch, and the batch's weight.

        At the end of an epoch, accelerate fills up the batches of several processes with images from its beginning,
        which do not count. With the weights, the mean over a step's batches is that over its images.
        """
        size = self.args.train_batch_size
        together = size * self.args.world_size  # in a pass of all processes
        full = together * self.args.gradient_accumulation_steps
        left = len(self.rows) - self.state.global_step % self.epoch_steps * full  # of the epoch, when the step began
        in_step = min(left, full)
        counted = min(left - self.batch * together, together)
        own = min(max(counted - self.args.process_index * size, 0), size)
        return counted, own, own * math.ceil(in_step / together) * self.args.world_size / in_step

    def draws(self, count: int) -> RowDraws:
        """Return draws for the batch that is trained on now, of so many images."""
        batches = self.state.global_step * self.args.gradient_accumulation_steps + self.batch  # of every process
        first = (batches * self.args.world_size + self.args.process_index) * self.args.train_batch_size
        return RowDraws(self.options.seed, range(first, first + count), self.args.device)

    def change(self, inputs: dict[str, Tensor], draws: RowDraws) -> dict[str, Tensor]:
        """Return flipped, cropped and mixed images, their noise, and their classes as smoothed probabilities (B, K)."""
        config = self.model.config
        options = self.options
        images = one_view(inputs["pixel_values"], draws)
        noise = draws.normal((len(images), config.num_noise_samples, *config.sample_shape)).transpose(0, 1)
        images = random_changes(images, options.random_flip, options.random_crop, draws)
        count = len(config.id2label)
        targets = F.one_hot(inputs["labels"], count).float()
        if options.mixup:
            others = one_view(inputs["partner_pixel_values"], draws)
            others = random_changes(others, options.random_flip, options.random_crop, draws)
            other_targets = F.one_hot(inputs["partner_labels"], count).float()
            images, targets = mixup(images, targets, others, other_targets, inputs["shares"])
        images = images.contiguous(memory_format=fast_layout(images.device))
        # Label smoothing (Szegedy et al. 2016, arXiv 1512.00567).
        targets = torch.lerp(targets, torch.full_like(targets, 1 / targets.shape[1]), options.label_smoothing)
        return {"pixel_values": images, "labels": targets, "noise": noise}

    def restore(self, checkpoint: Path) -> None:
        """Take over progress and averages, of which Trainer does not know; raise `ValueError` if it is another run.

        With other images, or another number of them in a step, Trainer would go on at another place.
        """
        self.before = read_json(checkpoint / PROGRESS)
        averages = {} if self.average is None else load_file(checkpoint / AVERAGED)
        check_weights(checkpoint, [*load_file(checkpoint / WEIGHTS).values(), *averages.values()])
        if self.average is not None:
            for name, value in zip(self.learning, self.average.shadow_params, strict=True):
                value.copy_(averages[name])
            self.average.optimization_step = step_of(checkpoint)
        self._check_step(checkpoint)
        trained = f"{checkpoint} was trained"
        # Versions before 0.3.0 noted the number of images alone, or nothing.
        different = {name for name, value in self.known.items() if self.before.get(name, value) != value}
        if different & {"num_images", "data"}:
            images = f"on {self.before['num_images']} images, but here there are {self.known['num_images']}, or others"
            raise ValueError(f"{trained} {images}: give the same images, with the same labels.")
        if step_of(checkpoint) > self.args.max_steps:
            raise ValueError(f"{checkpoint} is past the {self.args.max_steps} steps that are asked for: give more.")
        if "start" in different:
            start = "from another model_name_or_path, or on images or latents that were made otherwise"
            raise ValueError(f"{trained} {start}: give those that the run began with.")
        self._check_options(checkpoint)

    def _check_step(self, checkpoint: Path) -> None:
        """Raise `ValueError` unless a step has as many images as it had, on however many processes."""
        options = self.before.get("options") or read_options(checkpoint.parent)
        processes = len(list(checkpoint.glob("rng_state*.pth")))
        now, before = (
            {STEP: each["train_batch_size"] * each.get("gradient_accumulation_steps", 1) * count}  # 0.2.0 had no passes
            for each, count in ((self.known["options"], self.args.world_size), (options, processes))
        )
        check_same_run(now, before, (), checkpoint)

    def _check_options(self, checkpoint: Path) -> None:
        """Raise `ValueError` for options that may change, but would have no effect here."""
        trained = self.before.get("options") or read_options(checkpoint.parent)
        names = set() if "start" in self.before else set(BY_HASH)
        if not (checkpoint / "scaler.pt").is_file() and self.args.fp16:  # it has no scale of the losses
            names.add("mixed_precision")
        finished = step_of(checkpoint) == self.args.max_steps
        now = {name: self.known["options"][name] for name in names | (IN_TRAINING if finished else set())}
        if finished:
            now["max_train_steps"] = self.args.max_steps
            trained = trained | {"max_train_steps": read_json(checkpoint / "trainer_state.json")["max_steps"]}
        check_same_run(now, trained, (), checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Load the scale of the losses where it is needed."""
        if self.args.fp16:
            super()._load_scaler(checkpoint)

    def total(self) -> dict[str, Any]:
        """Return the images and seconds of all runs."""
        images = self.before["images"] + self.images_seen
        return {"images": images, "seconds": self.before["seconds"] + monotonic() - self.started}

    def _get_output_dir(self, trial: Any) -> str:
        """Return where Trainer writes checkpoints: they come to their place when they are whole."""
        return str(Path(self.args.output_dir) / "partial-checkpoint")

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        """Write a checkpoint, finite and whole or not at all, and drop the oldest others."""
        self.look()
        place = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        folder = Path(self._get_output_dir(trial)) / place.name
        with saving(place.parent):
            try:
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()  # every process has written its random state
                if self.is_world_process_zero():
                    if self.average is not None:
                        averages = (value.contiguous() for value in self.average.shadow_params)
                        save_file(dict(zip(self.learning, averages, strict=True)), folder / AVERAGED)
                    write_json(folder / PROGRESS, self.total() | self.known)
                    note_files(folder)
                    if place.exists():
                        discard(place)
                    folder.rename(place)
                    folder.parent.rmdir()
                    for old in [other for other in saved_checkpoints(place.parent) if other != place][:-1]:
                        discard(old)
            except BaseException:
                if self.is_world_process_zero() and folder.exists():
                    discard(folder)
                raise

    def look(self) -> None:
        """Raise `NotFinite` unless the last losses and all weights are finite."""
        averages = self.average.shadow_params if self.average else []
        losses, finite = look(self.accelerator, self.losses, [*self.model.state_dict().values(), *averages])
        if not finite:
            rate = max(group["lr"] for group in self.optimizer.param_groups)  # the classifier's
            found = saved_checkpoints(self.args.output_dir)
            raise not_finite(self.state.global_step, fmean(losses), rate, found[-1] if found else None)


def _metrics(found: Any) -> dict[str, float]:
    """Return the figures of all images; Trainer's own loss is of batches that several processes fill up."""
    figures = classification_metrics().compute(predictions=found.predictions.argmax(-1), references=found.label_ids)
    logits = torch.from_numpy(found.predictions)
    return {"loss": F.cross_entropy(logits, torch.from_numpy(found.label_ids)).item(), **figures}
