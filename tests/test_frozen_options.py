"""Every command's options and their defaults: a change of one is seen here.

`options.txt` is what `python -m tests.test_frozen_options` prints. A name that goes belongs into `options.RENAMED`.
"""

import dataclasses
import importlib
from pathlib import Path

import pytest

from ddae_hf.commands.main import COMMANDS
from ddae_hf.commands.parsing import GROUPS, find_config, parse, read_config
from ddae_hf.experiments.options import RENAMED

FROZEN = Path(__file__).with_name("options.txt")


def module(command):
    return importlib.import_module(f"ddae_hf.commands.{command.replace('-', '_')}")


def fields_of(command):
    return [field for kind in module(command).KINDS for field in dataclasses.fields(kind)]


def line(field):
    if field.default_factory is not dataclasses.MISSING:
        return f"{field.name} = {field.default_factory()!r}"
    return field.name if field.default is dataclasses.MISSING else f"{field.name} = {field.default!r}"


def described():
    """Return the options of all commands, one a line, those without a default alone."""
    parts = []
    for command in COMMANDS:
        parts.append("\n    ".join([command, *(line(field) for field in fields_of(command))]))
    return "\n\n".join(parts) + "\n"


def test_options_and_defaults_are_those_that_are_written_down():
    assert described() == FROZEN.read_text()


def test_every_option_says_what_it_is_and_no_old_name_is_one():
    for command in COMMANDS:
        for field in fields_of(command):
            assert field.metadata["help"].endswith("."), f"{command}: {field.name}"
    every = {field.name for command in COMMANDS for field in fields_of(command)}
    # Old names of some commands that others have.
    elsewhere = {"batch_size", "checkpoint", "max_train_samples", "num_images", "scheduler", "train_split", "vae"}
    assert every & RENAMED.keys() == elsewhere
    grouped = [name for names in GROUPS.values() for name in names.split()]
    assert len(grouped) == len(set(grouped)) and set(grouped) <= every


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_grouped_and_shows_defaults(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(module(command).KINDS, module(command).__doc__, ["--help"], f"ddae {command}")
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: ddae {command} [options]")
    for field in fields_of(command):
        assert shown.count(f"\n  --{field.name} ") + shown.count(f"\n  --{field.name}\n") == 1
    assert "(default: None)" not in shown and "\nfiles:\n" in shown or command == "configs"


def test_configurations_are_found_by_name_and_hold_options_of_pretraining(tmp_path, monkeypatch):
    known = {field.name for command in COMMANDS for field in fields_of(command)}
    for path in find_config("digits").parent.glob("*.yaml"):
        assert read_config(find_config(path.stem)).keys() <= known, path.stem
    with pytest.raises(ValueError, match="no configuration of this name; the nearest are .*cifar10_cpu"):
        find_config("cifar10_cpus")
    with pytest.raises(ValueError, match="there is no such file. Give another, or a name"):
        find_config("configs/nothing.yaml")
    monkeypatch.chdir(tmp_path)
    Path("digits").write_text("seed: 3")  # a file that is there comes first
    assert find_config("digits") == Path("digits")


if __name__ == "__main__":
    print(described(), end="")
