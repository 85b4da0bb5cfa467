"""Options from the command line and from YAML files."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from ..experiments.options import Options, Table, nearest, read_yaml, unknown
from ..experiments.run_folder import OPTIONS, with_present_names

CONFIGS = Path(__file__).parent / "configs"
# The groups that `--help` shows. An option that is in none of them is the experiment's own.
GROUPS = {
    "data": """dataset_name dataset_config_name train_data_dir image_column label_column mask_column class_names
        skip_bad_images split train_split test_split outside outside_split max_samples max_train_samples
        max_test_samples few_labels held_out latents_dir streaming shuffle_buffer images_dir reference_split
        baseline_split max_reference_samples cache_dir""",
    "images": """resolution center_crop random_flip random_crop mirror augment low_resolution low_resolution_share
        num_views view mixup""",
    "model": """model_name_or_path checkpoints lengths init_from denoiser scheduler vae autoencoder class_conditional
        label_dropout layer layers taps fuse pooling head head_width feature_norm null_class class_labels prompt
        prompt_template from_scratch classifier""",
    "noise": """sigma sigmas error_sigmas sigma_min sigma_max log_sigma image_sigmas loss_weighting min_snr_gamma
        num_noise_samples num_noise_seeds noise_seed sample_posterior""",
    "training": """total_batch_size train_batch_size gradient_accumulation_steps num_train_epochs max_train_steps
        learning_rate scale_lr lr_scheduler lr_warmup_steps lr_warmup_ratio layer_decay adam_beta1 adam_beta2
        adam_epsilon weight_decay max_grad_norm label_smoothing ema_decay average_lengths average_steps auxiliary
        seed freeze_denoiser lora_rank lora_alpha lora_targets merge_lora""",
    "generation": """num_images class_label guidance_scale num_inference_steps sampling_scheduler sampler grid_images
        sample_steps""",
    "speed and memory": """batch_size encode_batch_size dtype mixed_precision allow_tf32 torch_compile
        gradient_checkpointing shard dataloader_num_workers""",
    "files": """output_dir features_dir space_dir resume_from_checkpoint checkpointing_steps checkpoints_total_limit
        report_to logging_dir""",
    "Hub": "push_to_hub hub_model_id hub_private license",
}


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Shows descriptions as they are written, and options in one spelling, with their defaults where they have any."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        words = [word for word in action.option_strings if "-" not in word.lstrip("-")]
        shown = copy.copy(action)
        shown.option_strings = words[-1:] or action.option_strings
        return super()._format_action_invocation(shown)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.required:
            return f"{action.help} (required)"
        return action.help if action.default in (None, [], {}) else super()._get_help_string(action)


class _Parser(HfArgumentParser):
    """A parser that says what is wrong and where all options are listed, in place of listing them."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n`{self.prog} --help` lists all options.\n")


def parse(
    kinds: Sequence[type[Options]],
    description: str | None,
    argv: Sequence[str] | None = None,
    prog: str | None = None,
) -> Any:
    """Return options of several kinds; the command line goes before the YAML file that `--config` names.

    Options that cannot work end the program with a message. Options must be spelt out: argparse would take `--conf
    FILE` for `--config`, but the file's options would be left out.

    Args:
        kinds: Dataclasses of options, in which no name comes twice.
        description: What `--help` says of the command.
        argv: The words after the command's name; by default those of this process. If the first one is not an option,
            it is the value of the option that `first_word` names.
        prog: The command's name.
    """
    parser: Any = _Parser(
        cast(Any, kinds), description=description, formatter_class=_Help, allow_abbrev=False, prog=prog,
        usage="%(prog)s [options]",
    )  # fmt: skip
    known = list(parser._option_string_actions)
    fields = [field for kind in kinds for field in dataclasses.fields(kind)]
    many = {field.name for field in fields if field.metadata.get("nargs") == "*"}
    for action in list(parser._actions):
        if action.type is string_to_bool:
            action.nargs, action.const = "?", True  # also where the default is None
            for no in {f"--no-{action.dest}", f"--no-{action.dest.replace('_', '-')}"} - {*known}:
                hidden = argparse.SUPPRESS
                parser.add_argument(no, dest=action.dest, action="store_false", default=hidden, help=hidden)
        elif action.dest in many:  # the parser makes one value out of none
            action.nargs = "*"
        elif action.type is Table:
            action.type = str  # its dataclass reads it
    config = "YAML file of the options that differ from the defaults, or a name that `ddae configs` lists."
    parser.add_argument("--config", help=config)
    _group(parser)
    words = list(sys.argv[1:] if argv is None else argv)
    first_word = next((kind.first_word for kind in kinds if hasattr(kind, "first_word")), None)
    if first_word is not None and words and not words[0].startswith("-"):
        words = [f"--{first_word}", *words]
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    path = first.parse_known_args(words)[0].config
    try:
        of_file = {} if path is None else _of_file(find_config(path), parser)
        found, others = parser.parse_known_args(words, argparse.Namespace(**of_file))
        given = vars(found)
        if others:
            raise ValueError(unknown(others[0].removeprefix("--").partition("=")[0].replace("-", "_"), given))
        return [kind(**{field.name: given[field.name] for field in dataclasses.fields(kind)}) for kind in kinds]
    except ValueError as error:
        parser.error(str(error))


def _group(parser: Any) -> None:
    """Put options together by what they are about, for `--help`."""
    found = [action for action in parser._optionals._group_actions if action.dest not in ("help", "config")]
    named = {name: title for title, names in GROUPS.items() for name in names.split()}
    for title in (*GROUPS, "this experiment"):
        if actions := [action for action in found if named.get(action.dest, "this experiment") == title]:
            parser.add_argument_group(title)._group_actions.extend(actions)
    parser._optionals._group_actions = [action for action in parser._optionals._group_actions if action not in found]


def find_config(name: str) -> Path:
    """Return the file of a configuration: an existing file, or one of the package's by its name.

    Raises:
        ValueError: There is neither; the message gives the nearest names.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.suffix or len(path.parts) > 1:
        raise ValueError(f"config is {name}: there is no such file. Give another, or a name that `ddae configs` lists.")
    known = {file.stem: file for file in CONFIGS.glob("*.yaml")}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = nearest(near) or "`ddae configs` lists them"
        raise ValueError(f"config is {name}: there is no such file, and no configuration of this name; {hint}.")
    return known[name]


def read_config(path: Path, inside: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return a YAML file's options, which go before those of the files beside it that its `base` names, the last first.

    A mapping (`denoiser`, `scheduler`) is merged with the base's, unless it names another class.

    Raises:
        ValueError: No such file, a file that is its own base, or one that holds something other than options.
    """
    if path in inside or not path.is_file():
        what = "names itself as its base" if path in inside else "there is no such file"
        raise ValueError(f"{path}: {what}{f' (named as the base of {inside[-1]})' if inside else ''}.")
    try:
        own = read_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error
    if not isinstance(own, dict):
        raise ValueError(f"{path} must hold options, `name: value`, but holds a {type(own).__name__}.")
    bases = own.pop("base", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(name, str) for name in bases):
        raise ValueError(f"{path}: base is {bases!r}: it must name files beside this one.")
    options: dict[str, Any] = {}
    for layer in [*(read_config(path.parent / name, (*inside, path)) for name in bases), own]:
        for name, value in layer.items():
            old = options.get(name)
            if isinstance(old, dict) and isinstance(value, dict):
                known = old.get("_class_name")
                value = {**old, **value} if value.get("_class_name", known) == known else value
            options[name] = value
    return options


def _of_file(path: Path, parser: Any) -> dict[str, Any]:
    """Return a file's options as their dataclasses take them; the command line then need not give these."""
    options = read_config(path)
    if path.name == OPTIONS:
        options = with_present_names(options)
        options.pop("config", None)  # a run of 0.2.0 noted it, with all options that it held
    actions = {action.dest: action for action in reversed(parser._actions) if action.dest not in ("help", "config")}
    found = {}
    for name, value in options.items():
        if name not in actions:
            raise ValueError(f"{path}: {unknown(name, actions)}")
        if value is not None:
            actions[name].required = False
            found[name] = _as_meant(actions[name], value)
    return found


def _as_meant(action: argparse.Action, value: Any) -> Any:
    """Return what a file means by an option's value, where YAML reads it otherwise or one item stands for a list."""
    if isinstance(value, bool) and action.choices:
        return "yes" if value else "no"  # words that YAML takes, unquoted, for true and false
    if action.nargs in ("+", "*"):
        items = value if isinstance(value, list) else [value]
        return [str(item) if action.type is str and type(item) is int else item for item in items]
    return str(value) if action.type is str and type(value) is int else value
