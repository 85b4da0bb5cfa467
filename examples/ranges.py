"""Which numbers options may be: one table for all scripts, so that a name allows the same in each of them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import NamedTuple


class Range(NamedTuple):
    """What an option may be, in words and as a condition on finite numbers."""

    words: str
    holds: Callable[[float], bool]


COUNT = Range("at least 1", lambda x: x >= 1)
NOT_NEGATIVE = Range("at least 0", lambda x: x >= 0)
POSITIVE = Range("positive", lambda x: x > 0)
PROBABILITY = Range("between 0 and 1", lambda x: 0 <= x <= 1)
PART = Range("above 0 and at most 1", lambda x: 0 < x <= 1)
DECAY = Range("at least 0 and below 1", lambda x: 0 <= x < 1)
SEED = Range("at least 0 and below 2**32", lambda x: 0 <= x < 2**32)  # NumPy's global generator takes no other

NAMES = {
    COUNT: """batch_size train_batch_size wide_resnet_batch_size gradient_accumulation_steps num_train_epochs
        max_train_steps wide_resnet_steps checkpointing_steps checkpoints_total_limit held_out resolution
        low_resolution shuffle_buffer num_samples num_inference_steps num_views hidden_size num_hidden_layers""",
    NOT_NEGATIVE: """lr_warmup_steps adam_weight_decay weight_decay max_grad_norm kl_weight mixup sample_steps
        random_crop wide_resnet dataloader_num_workers null_class noise_seed""",
    POSITIVE: "learning_rate wide_resnet_learning_rate adam_epsilon sigma_min sigma_max",
    PROBABILITY: "augment label_dropout low_resolution_share",
    PART: "label_fraction layer_decay",
    DECAY: "adam_beta1 adam_beta2 ema_decay dropout label_smoothing lr_warmup_ratio",
    SEED: "seed",
}
RANGES = {name: allowed for allowed, names in NAMES.items() for name in names.split()}


def check_ranges(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Stop at an option outside its range, and at any that is no number, for which no range is known."""
    for name, given in vars(args).items():
        allowed = RANGES.get(name)
        for value in given if isinstance(given, list) else [given]:
            if allowed is None:
                if isinstance(value, float) and math.isnan(value):
                    parser.error(f"--{name} is {value}: it must be a number.")
            elif value is not None and not math.isfinite(value):
                parser.error(f"--{name} is {value}: it must be finite and {allowed.words}.")
            elif value is not None and not allowed.holds(value):
                parser.error(f"--{name} is {value}: it must be {allowed.words}.")
