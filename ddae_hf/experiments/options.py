"""Options of experiments: flat dataclasses that refuse what cannot work, before any long work.

An option has one name, one meaning and one range wherever it stands: `RANGES` has the ranges of numbers. A dataclass of
options declares its fields with `option`, and refuses fields that do not go together in `check`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import yaml

from .run_folder import SUCCESSORS, check_folder


class Range(NamedTuple):
    """What an option may be, in words and as a condition on finite numbers."""

    words: str
    holds: Callable[[float], bool]


NAMES = {
    Range("at least 1", lambda x: x >= 1): """batch_size train_batch_size total_batch_size
        wide_resnet_batch_size encode_batch_size extractor_batch_size gradient_accumulation_steps num_train_epochs
        max_train_steps wide_resnet_steps checkpointing_steps checkpoints_total_limit held_out resolution low_resolution
        shuffle_buffer grid_images num_inference_steps num_views num_draws num_noise_seeds num_noise_samples num_images
        hidden_size num_hidden_layers few_labels max_samples max_train_samples max_test_samples max_selection_samples
        max_reference_samples num_heads num_classes average_steps step stage_draws stage_classes output_size
        neighbour""",
    Range("at least 0", lambda x: x >= 0): """lr_warmup_steps weight_decay max_grad_norm kl_weight mixup
        weight sample_steps random_crop wide_resnet dataloader_num_workers null_class view guidance_scale sigma sigmas
        extractor_sigma encoder_sigma image_sigmas class_labels""",
    Range("between 1 and 1024", lambda x: 1 <= x <= 1024): "lora_rank",
    Range("between 1 and 100", lambda x: 1 <= x <= 100): "fuse",  # a classifier may have as many taps
    Range("a multiple of 8, 8 to 4096", lambda x: x % 8 == 0 and 8 <= x <= 4096): "head_width",
    Range("positive", lambda x: x > 0): """learning_rate wide_resnet_learning_rate adam_epsilon sigma_min sigma_max l2
        min_snr_gamma temperature lora_alpha error_sigmas""",
    Range("between 0 and 1", lambda x: 0 <= x <= 1): "augment label_dropout low_resolution_share lowered mean_share",
    Range("between 0.001 and 0.28", lambda x: 0.001 <= x <= 0.28): "length lengths average_lengths",
    Range("above 0 and below 1", lambda x: 0 < x < 1): "validation_fraction",
    Range("above 0 and at most 1", lambda x: 0 < x <= 1): "layer_decay until",
    Range("at least 0 and below 1", lambda x: 0 <= x < 1): """adam_beta1 adam_beta2 ema_decay dropout label_smoothing
        lr_warmup_ratio""",
    Range("at least 0 and below 2**32", lambda x: 0 <= x < 2**32): "seed noise_seed",  # as for NumPy's
}
RANGES = {name: allowed for allowed, names in NAMES.items() for name in names.split()}
PROMPT = (
    "For a denoiser that is told a text: the prompt for all images; by default the checkpoint's, or the null prompt."
)
FOLDERS = ("output_dir", "features_dir", "latents_dir", "space_dir")
# What to give in place of options of earlier versions, for commands that have the new option.
RENAMED = {
    **SUCCESSORS, "batch_size": "train_batch_size", "checkpoint": "model_name_or_path",
    "label_fraction": "few_labels, the number a class", "labels_per_class": "few_labels",
    "max_train_samples": "max_samples", "num_epochs": "num_train_epochs", "num_images": "max_samples",
    "num_quality_images": "num_images", "online_batch_size": "train_batch_size", "out_features": "layers",
    "quality_extractor": "extractor", "sample_size": "resolution", "scheduler": "sampling_scheduler",
    "train_split": "split",
    "regularisation": "l2, 1 / (C N) for each C, with N training images", "vae": "autoencoder",
}  # fmt: skip


class Table(dict[str, Any]):
    """A mapping of options, such as a network's, which a command line gives as YAML; all else raises `ValueError`."""

    def __init__(self, value: Mapping[str, Any] | str = ""):
        given = read_yaml(value) if isinstance(value, str) else value
        if not isinstance(given, Mapping):
            raise ValueError(f"{value!r} is not a mapping: give options, such as '{{num_layers: 4}}'.")
        super().__init__(given)


class _SafeLoader(yaml.SafeLoader):
    """YAML without repeated keys and without aliases, which readers overlook."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not allowed", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            word = isinstance(key, yaml.ScalarNode)
            if not word or key.value in seen:
                problem = f"{key.value!r} comes twice" if word else "a name must be one word"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# YAML 1.2's numbers: PyYAML, which reads 1.1, takes `5e-4` for text.
_SafeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(text: str) -> Any:
    """Return what YAML says, `{}` where it says nothing, or raise `ValueError`, also for repeated keys and aliases."""
    try:
        content = yaml.load(text, _SafeLoader)  # noqa: S506 (derived from SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that no calendar has is a `ValueError`
        raise ValueError(" ".join(str(error).split())) from error
    return {} if content is None else content


def option(default: Any = dataclasses.MISSING, help: str = "", **more: Any) -> Any:
    """Return a field of options; a default that is a list or a mapping is copied for every object.

    `help` says what it is, and `more` has further arguments of argparse's `add_argument`, such as `metavar`.
    """
    metadata = {"help": help.replace("%", "%%"), **more}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class Options:
    """What all dataclasses of options share: types, ranges and folders are checked when one is made or copied."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = _typed(field.name, getattr(self, field.name), hints[field.name])
            if value == "" and field.name in FOLDERS:  # `Path("")` is the working directory
                raise ValueError(f"{field.name} is empty: give a folder, or leave it out.")
            if field.name in FOLDERS and value is not None:
                check_folder(value, field.name)
            setattr(self, field.name, value)
        self.check()

    def check(self) -> None:
        """Raise `ValueError` where options do not go together, and settle those that depend on others."""

    @classmethod
    def of(cls, options: Self | None, changes: Mapping[str, Any]) -> Self:
        """Return options with some of them changed; if no options are given, the defaults are changed.

        Raises:
            ValueError: An unknown option, another type or range, or a required option that is missing.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if wrong := [name for name in changes if name not in names]:
            raise ValueError(unknown(wrong[0], names))
        if options is not None and not isinstance(options, cls):
            raise ValueError(f"options are {type(options).__name__}: give {cls.__name__}, or its fields by name.")
        if options is not None:
            return dataclasses.replace(options, **changes)
        for field in dataclasses.fields(cls):
            needed = field.default is dataclasses.MISSING is field.default_factory
            if needed and field.name not in changes:
                raise ValueError(f"{field.name} is not given: {field.metadata['help']}")
        return cls(**changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the options by name, as plain data."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}


def unknown(name: Any, names: Iterable[str]) -> str:
    """Return that there is no such option, and which ones are like it, or what it is called now."""
    names = sorted(names)
    if name in RENAMED and RENAMED[name].partition(",")[0] in names:
        return f"there is no option {name!r} any more: give {RENAMED[name]}."
    near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    return f"there is no option {name!r}: {nearest(near) or 'allowed are ' + ', '.join(names)}."


def nearest(near: Sequence[str]) -> str:
    """Return in words which names are the nearest to an unknown one; an empty text if there are none."""
    return f"the nearest {'is' if len(near) == 1 else 'are'} {', '.join(near)}" if near else ""


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _typed(name: str, value: Any, hint: Any) -> Any:
    """Return a value in its hint's type and within its range, with its meaning unchanged, or raise `ValueError`."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in parts:
            return None
        return _typed(name, value, next(part for part in parts if part is not type(None)))
    if origin is typing.Literal:
        if value not in parts:
            raise ValueError(f"{name} is {value!r}: allowed are {', '.join(map(str, parts))}.")
        return value
    if origin is list:
        if isinstance(value, str) or not isinstance(value, (Sequence, np.ndarray)):
            raise ValueError(f"{name} is {value!r}: it must be a list.")
        return [_typed(name, item, parts[0]) for item in value]
    if isinstance(hint, type) and issubclass(hint, Table):
        try:
            return hint(value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    if hint is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    if number and isinstance(value, int) and abs(value) >= 2**1023:  # more than a float can hold
        raise ValueError(f"{name} has {1 + int(abs(value).bit_length() * math.log10(2))} digits: it must be finite.")
    if number and (hint is float or (hint is int and value % 1 == 0)):
        return _in_range(name, hint(value))
    if hint in (str, bool) and isinstance(value, hint):
        return value
    words = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}
    raise ValueError(f"{name} is {value!r}: it must be {words.get(hint, hint)}.")


def _in_range(name: str, value: float) -> float:
    """Return a number, or raise `ValueError` for one outside its option's range, and for any that is not finite."""
    allowed = RANGES.get(name)
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}: it must be finite{f' and {allowed.words}' if allowed else ''}.")
    if allowed is not None and not allowed.holds(value):
        raise ValueError(f"{name} is {value}: it must be {allowed.words}.")
    return value
