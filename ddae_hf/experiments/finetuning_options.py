"""What `finetune` can be asked for, and which options go together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from transformers.integrations import get_available_reporting_integrations

from .devices import PRECISION
from .low_rank import LoRAOptions, check_low_rank
from .options import PROMPT, option
from .taps import read_taps, tap_word
from .trainer import IN_TRAINING


@dataclass(kw_only=True)
class FinetuningOptions(LoRAOptions):
    """Options of `finetune`."""

    # Options that a resumed run may change; they hold from then on.
    MAY_CHANGE: ClassVar[frozenset[str]] = IN_TRAINING | set(
        "num_train_epochs max_train_steps noise_seed test_split max_test_samples torch_compile merge_lora".split()
    )

    output_dir: str | None = option(None, "Folder of the classifier, its figures and checkpoints.")
    resume_from_checkpoint: str | None = option(None, "A checkpoint's folder, or `latest` for the newest whole one.")
    few_labels: int | None = option(
        None, "Train on this many images of each class, from a new classification head; by default on all."
    )
    latents_dir: str | None = option(None, "Folder of the images' latents, to train on in place of their pixels.")
    layer: str | None = option(None, "Where the classifier reads the network; by default the checkpoint's layer.")
    sigma: float | None = option(None, "Noise level of the images; by default the checkpoint's.")
    taps: list[str] | None = option(
        None, "Several layers, each at a noise level, in place of layer and sigma: words such as mid_block@0.14."
    )
    pooling: Literal["mean", "max", "mean_2x2"] | None = option(
        None, "How hidden states become features, as in `ddae probe`; by default the checkpoint's pooling."
    )
    head: Literal["linear", "attention", "fusion"] | None = option(
        None, "What classifies: linear, on pooled features, or attention or fusion; by default the checkpoint's head."
    )
    head_width: int | None = option(None, "Width of attention or fusion; by default the checkpoint's, or 256.")
    freeze_denoiser: bool = option(False, "Train the head alone, on the network as it is.")
    null_class: int | None = option(None, "For a class-conditional denoiser: the label that stands for no class.")
    prompt: str | None = option(None, PROMPT)
    from_scratch: bool = option(False, "Start from random weights, to compare.")
    train_batch_size: int = option(128, "Images of a forward pass on each device.")
    gradient_accumulation_steps: int = option(1, "Batches of every device in a step.")
    num_train_epochs: int = option(10, "Passes over the training images.")
    max_train_steps: int | None = option(None, "Number of steps, in place of num_train_epochs.")
    learning_rate: float = option(5e-4, "Learning rate of the classifier; see layer_decay.")
    layer_decay: float = option(1.0, "Factor of the learning rate from one layer to the one before.")
    lr_warmup_ratio: float = option(0.05, "Share of the steps in which the learning rate rises.")
    weight_decay: float = option(0.05, "Weight decay of matrices and kernels.")
    max_grad_norm: float = option(1.0, "Largest norm of the gradient; 0 leaves it as it is.")
    label_smoothing: float = option(0.0, "Share of a label that is spread over all classes.")
    mixup: float = option(
        0.0, "alpha of mixup's Beta(alpha, alpha): each image is mixed with another one; 0 mixes nothing."
    )
    random_flip: bool = option(False, "Mirror half of the images.")
    random_crop: int = option(0, "Shift images by up to this many pixels.", metavar="PADDING")
    ema_decay: float | None = option(None, "Average the weights with this decay; by default they are not averaged.")
    seed: int = option(0, "Seed of everything that is random in training.")
    noise_seed: int | None = option(None, "Seed of the noise in evaluation; by default the checkpoint's.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(None, PRECISION)
    torch_compile: bool = option(False, "Compile the network first, which takes minutes.")
    dataloader_num_workers: int = option(0, "Processes that read images; with 0 they are decoded once, if they fit.")
    checkpointing_steps: int = option(500, "Save a checkpoint, ready to resume, every N steps.")
    report_to: str | None = option(None, "Tracker: tensorboard, wandb, ...")
    logging_dir: str = option("logs", "Folder of tensorboard's files, inside output_dir.")

    def __post_init__(self) -> None:
        """Write taps that came as pairs as words too, in one spelling, by which runs are compared."""
        if self.taps is not None:
            self.taps = [tap_word(layer, sigma) for layer, sigma in read_taps(self.taps)]
        super().__post_init__()

    def check(self) -> None:
        """Refuse options that do not go together."""
        check_low_rank(self)
        self._check_reading()
        for name in ("random_flip", "random_crop"):
            if self.latents_dir is not None and getattr(self, name):
                raise ValueError(f"{name}: images in latents_dir were changed before they were encoded: leave it out.")
        if self.mixed_precision == "fp16" and not torch.cuda.is_available():
            raise ValueError("mixed_precision fp16 needs a GPU.")
        if self.output_dir is None and (self.resume_from_checkpoint or self.report_to):
            raise ValueError("output_dir is not given: without it there is nothing to resume and no place for logs.")
        trackers = ["all", "none", *get_available_reporting_integrations()]
        if self.report_to not in (None, *trackers):
            raise ValueError(f"report_to is {self.report_to}, which cannot be used: allowed are {', '.join(trackers)}.")

    def _check_reading(self) -> None:
        """Refuse what does not go together of taps, the head and what is trained."""
        if self.taps is not None and (self.layer is not None or self.sigma is not None):
            raise ValueError("taps came with layer or sigma, which are of a single tap: leave these out.")
        if self.head in ("attention", "fusion") and self.pooling is not None:
            raise ValueError(f"pooling is of the head linear, and head is {self.head}: leave one of them out.")
        if self.head == "linear" and self.head_width is not None:
            raise ValueError("head_width is of the heads attention and fusion, and head is linear: leave it out.")
        if self.freeze_denoiser and self.lora_rank is not None:
            raise ValueError("freeze_denoiser trains the head alone, and lora_rank adapters too: leave one out.")
        if self.freeze_denoiser and self.layer_decay != 1:
            raise ValueError("layer_decay is of the network's layers, and freeze_denoiser keeps them: leave one out.")
