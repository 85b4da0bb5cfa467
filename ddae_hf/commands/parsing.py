"""Options from the command line and from YAML files, and how a command ends."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from ..experiments.options import Options, Table, read_yaml, unknown
from ..experiments.run_folder import OPTIONS
from ..experiments.stopping import Interrupted

logger = logging.getLogger(__name__)
INTERRUPTED = "Interrupted: the same command goes on from what is kept, or starts again where nothing is."


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Descriptions as they are written, options with their defaults."""


def parse(kinds: Sequence[type[Options]], description: str | None, argv: Sequence[str] | None = None) -> Any:
    """Return options of several kinds, those of the command line over those of the YAML file that `--config` names.

    What cannot work ends the program with a message. Options are spelt out: argparse would take `--conf FILE` for
    `--config`, whose options had then been left out.

    Args:
        kinds: Dataclasses of options, with no two names alike.
        description: What `--help` says of the command.
        argv: The words after the command's name; by default those of this process.
    """
    parser: Any = HfArgumentParser(cast(Any, kinds), description=description, formatter_class=_Help, allow_abbrev=False)
    known = list(parser._option_string_actions)
    for action in list(parser._actions):
        if action.type is string_to_bool:
            action.nargs, action.const = "?", True  # also where the default is None
            for no in {f"--no-{action.dest}", f"--no-{action.dest.replace('_', '-')}"} - {*known}:
                hidden = argparse.SUPPRESS
                parser.add_argument(no, dest=action.dest, action="store_false", default=hidden, help=hidden)
        elif action.type is Table:
            action.type = _table
    parser.add_argument(
        "--config", help="YAML file of options: what differs from those of its `base` and the defaults."
    )
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    path = first.parse_known_args(argv)[0].config
    try:
        if path is not None:
            _take_defaults(parser, Path(path))
        found, others = parser.parse_known_args(argv)
        given = vars(found)
        if others:
            raise ValueError(unknown(others[0].removeprefix("--").partition("=")[0].replace("-", "_"), given))
        return [kind(**{field.name: given[field.name] for field in dataclasses.fields(kind)}) for kind in kinds]
    except ValueError as error:
        parser.error(str(error))


def _table(text: str) -> Table:
    """Return a mapping given as YAML; argparse shows the reasons of no other kind of error."""
    try:
        return Table(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def read_config(path: Path, inside: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return a YAML file's options over those of the files beside it that its `base` names, later ones first.

    A mapping (`denoiser`, `scheduler`) is merged with the base's, unless it names another class.

    Raises:
        ValueError: No such file, one that is its own base, or one that holds something else than options.
    """
    if path in inside or not path.is_file():
        what = "names itself as its base" if path in inside else "there is no such file"
        raise ValueError(f"{path}: {what}{f' (named as the base of {inside[-1]})' if inside else ''}.")
    try:
        own = read_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error
    if not isinstance(own, dict):
        raise ValueError(f"{path} must hold options, `name: value`, and holds a {type(own).__name__}.")
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


def _take_defaults(parser: Any, path: Path) -> None:
    """Make a file's options the defaults, each converted by the parser's own type."""
    options = read_config(path)
    if path.name == OPTIONS:
        options.pop("config", None)  # which a run of 0.2.0 noted, with all that this file had said
    actions = {action.dest: action for action in reversed(parser._actions) if action.dest not in ("help", "config")}
    for name, value in options.items():
        if name not in actions:
            raise ValueError(f"{path}: {unknown(name, actions)}")
        if value is not None:
            parser.set_defaults(**{name: _converted(parser, actions[name], value)})
            actions[name].required = False


def _converted(parser: Any, action: argparse.Action, value: Any) -> Any:
    """Return a YAML value as the command line would have given it: `1e-4`, which YAML reads as text, is a number."""
    if isinstance(value, bool) and action.choices:
        return "yes" if value else "no"  # YAML takes these words, unquoted, for true and false
    if action.const is True:
        if not isinstance(value, bool):
            raise ValueError(f"{action.dest} is {value!r}: allowed are true and false.")
        return value
    if isinstance(value, bool):
        raise ValueError(f"{action.dest} is {value!r}: it is neither true nor false.")
    if isinstance(value, dict):
        return Table(value)
    many = action.nargs == "+"
    if isinstance(value, list) and not many:
        raise ValueError(f"{action.dest} is {value!r}: it takes one value.")
    items = value if isinstance(value, list) else [value]
    if action.type is str and not all(isinstance(item, (str, int)) for item in items):
        raise ValueError(f"{action.dest} is {value!r}: put text in quotes.")
    try:
        converted = [parser._get_value(action, str(item)) for item in items]
    except argparse.ArgumentError as error:
        raise ValueError(f"{action.dest}: {error.message}.") from error
    return converted if many else converted[0]


def show_log(main_process: bool = True) -> None:
    """Show what experiments say of their progress; of several processes one does."""
    level = logging.INFO if main_process else logging.ERROR
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=level)
    for name in ("accelerate", "httpx", "httpx2", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def sentences() -> Iterator[None]:
    """End the program with a sentence, and no traceback, at what its user can mend: wrong options, files, disks.

    What stopped on a signal ends with that signal's status, once what it leaves behind is put in order.
    """
    try:
        with _terminable():
            yield
    except (ValueError, OSError) as error:
        logger.debug("Where this was raised:", exc_info=True)
        raise SystemExit(str(error)) from error
    except KeyboardInterrupt as error:
        print(str(error) or INTERRUPTED, file=sys.stderr)
        raise SystemExit(128 + getattr(error, "signal", signal.SIGINT)) from error  # which `Interrupted` knows


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Raise `Interrupted` at SIGTERM, where nobody else takes it, as Python does at Ctrl-C; only the first counts."""

    def stop(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)
        raise Interrupted("", number)

    ours = threading.current_thread() is threading.main_thread()
    ours = ours and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
