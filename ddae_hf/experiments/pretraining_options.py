"""Options of training a denoiser, and which of them go together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ..networks import NETWORKS
from . import alignment, terms  # noqa: F401 (imported to be known)
from .auxiliary import term_options
from .averages import check_lengths
from .new_networks import check_tells_no_text
from .objectives import Weighting
from .options import Table, option
from .sharding import check_fsdp
from .training_options import TrainingOptions


@dataclass(kw_only=True)
class PretrainingOptions(TrainingOptions):
    """Options of `pretrain`."""

    # Besides these, the network and its scheduler are compared as they were built, and the data by number and hash.
    may_change: ClassVar[frozenset[str]] = TrainingOptions.may_change.union(
        """denoiser scheduler vae resolution gradient_checkpointing adam_beta1 adam_beta2 weight_decay
        adam_epsilon ema_decay average_steps shard sample_steps grid_images num_inference_steps sampler""".split()
    )

    denoiser: Table = option({}, "Options of the network and its `_class_name`, as YAML.")
    scheduler: Table = option({}, "Options of the scheduler and its `_class_name`, as YAML.")
    init_from: str | None = option(None, "Checkpoint (any layout) whose network and scheduler to start from.")
    vae: str | None = option(None, "Folder or Hub id of the latents' VAE, if it has moved since they were made.")
    augment: float = option(0.0, "Probability of EDM's augmentations, such as 0.12.")
    class_conditional: bool = option(False, "Tell the network each image's class.")
    label_dropout: float = option(0.1, "Share of images for which it is told the null class instead.")
    log_sigma: list[float] | None = option(
        None,
        "Mean and standard deviation of log sigma, drawn from a normal distribution: for flow matching 0 1 are "
        "logit-normal times. By default each framework has its own: uniform timesteps, EDM's -1.2 1.2, uniform times.",
    )
    sigma_min: float | None = option(None, "Lowest noise level to learn at; by default all that the framework draws.")
    sigma_max: float | None = option(None, "Highest noise level to learn at, likewise.")
    loss_weighting: Weighting | None = option(
        None,
        "What the denoised image's error weighs at noise levels: min_snr, 1 / sigma^2 but at most min_snr_gamma, or "
        "velocity, as much as flow matching's velocity. By default each framework has its own loss.",
    )
    min_snr_gamma: float = option(5.0, "Largest weight of min_snr.")
    auxiliary: list[Table] = option(
        [],
        "What to train for besides denoising: terms, each as YAML such as '{term: dispersive, layer: mid_block}'.",
    )
    low_resolution: int | None = option(None, "Begin on images reduced to this side by averaging pixels, to save time.")
    low_resolution_share: float = option(0.9, "Share of the steps that use low_resolution.")
    shuffle_buffer: int = option(10000, "Images of a stream among which the next one is drawn.")
    gradient_checkpointing: bool = option(False, "Compute hidden states twice, to save memory.")
    shard: bool = option(
        False,
        "Keep a part of the weights, of the optimiser and of the averages on each device, for networks that are too "
        "large for one.",
    )
    adam_beta1: float = option(0.9, "Decay of AdamW's mean of the gradient.")
    adam_beta2: float = option(0.999, "Decay of AdamW's mean of the gradient's square.")
    weight_decay: float = option(0.0, "Weight decay of AdamW.")
    adam_epsilon: float = option(1e-8, "What is added to AdamW's divisor.")
    ema_decay: float = option(0.9999, "Decay of the averaged weights after its ramp.")
    average_lengths: list[float] = option(
        [],
        "Also keep power-function averages of these lengths (EDM2's sigma_rel), of which `ddae ema` makes one of any "
        "length afterwards: 0.05 0.1 is recommended. Each takes the memory of the weights.",
    )
    average_steps: int | None = option(
        None, "Keep a snapshot of average_lengths every N steps; by default 32 over the training."
    )
    sample_steps: int = option(5000, "Draw a grid of samples every N steps; 0 draws none.")
    grid_images: int = option(64, "Images in the grid.")
    num_inference_steps: int = option(50, "Sampling steps of the grid.")
    sampler: Literal["heun"] | None = option(None, "EDM's second-order sampler for the grid, not the scheduler's own.")

    def check(self) -> None:
        """Refuse options that do not go together, and FSDP of another kind than `shard`."""
        super().check()
        check_fsdp()
        check_tells_no_text(self.denoiser, "denoiser")
        own = {name for network in NETWORKS.values() for name in network.label_options(1)}
        if labels := sorted(own & set(self.denoiser)):
            raise ValueError(f"denoiser has {labels[0]}: leave it out; class_conditional takes it from the data.")
        check_lengths(self.average_lengths, self.output_dir, self.shard)
        if self.init_from and (self.denoiser or self.scheduler):
            raise ValueError("init_from brings its own network and scheduler: leave out denoiser and scheduler.")
        if self.augment and (self.random_flip or self.class_conditional):
            other = "random_flip" if self.random_flip else "class_conditional"
            raise ValueError(f"augment mirrors images itself, and takes the place of a class: leave out {other}.")
        if self.class_conditional and self.label_dropout in (0, 1):
            raise ValueError(
                f"label_dropout is {self.label_dropout:g}: the network must see both its classes and the null class."
            )
        for each in self.auxiliary:
            term_options(each)
        if self.auxiliary and self.shard:
            raise ValueError("auxiliary does not go with shard: hidden states of a divided network are not read.")
        if self.log_sigma is not None and len(self.log_sigma) != 2:
            raise ValueError(f"log_sigma is {self.log_sigma}: give two numbers, a mean and a standard deviation.")
