"""List the configurations that `--config` takes by name, or show one.

    ddae configs
    ddae configs cifar10_ddpm_unet

A configuration is shown with all its options, those of its `base` too. Save it as a file to change it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import yaml

from ..experiments.options import Options, option
from .parsing import CONFIGS, find_config, read_config


@dataclass(kw_only=True)
class Arguments(Options):
    """What is shown."""

    first_word: ClassVar[str] = "name"
    name: str | None = option(None, "The configuration to show; the name alone is enough. By default all are listed.")


KINDS = (Arguments,)


def main(options: Arguments) -> None:
    """Run the command."""
    if options.name is not None:
        path = find_config(options.name)
        print(f"# {path}\n{yaml.safe_dump(read_config(path), sort_keys=False, default_flow_style=None)}", end="")
        return
    files = sorted(CONFIGS.glob("*.yaml"))
    width = max(len(file.stem) for file in files) + 2
    for file in files:
        print(f"{file.stem:{width}}{summary(file.read_text(encoding='utf-8'))}")


def summary(text: str) -> str:
    """Return the first sentence of a configuration's comment."""
    lines = [line.removeprefix("#").strip() for line in text.splitlines()]
    comment = " ".join(lines[: next(i for i, line in enumerate(text.splitlines()) if not line.startswith("#"))])
    return comment.partition(". ")[0].rstrip(".") + "."
