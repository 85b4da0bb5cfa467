"""What the site adds to the files of docs/: options, as their dataclasses say them. Links out of docs/ become text."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddae_hf import experiments
from ddae_hf.commands.main import COMMANDS
from ddae_hf.commands.parsing import GROUPS

OTHERS = "this experiment"


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Return a page's text with options in place of its marks, and without links to files that the site has not."""
    markdown = markdown.replace("<!-- options of all commands -->", "\n\n".join(map(_command, COMMANDS)))
    markdown = re.sub(r"<!-- options: (\w+) -->", lambda mark: _options(mark[1]), markdown)
    markdown = markdown.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")
    folder, root = Path(page.file.abs_src_path).parent, Path(config.docs_dir)

    def inside(link: re.Match[str]) -> str:
        path = (folder / link[2].partition("#")[0]).resolve()
        return link[0] if path.is_relative_to(root) else link[1]

    return re.sub(r"(?<!!)\[([^]]+)\]\(((?!https?:|#)[^)\s]+)\)", inside, markdown)


def _command(name: str) -> str:
    """Return a section of a command: what `--help` says of it, and its options by what they are about."""
    module = importlib.import_module(f"ddae_hf.commands.{name.replace('-', '_')}")
    named = {option: title for title, options in GROUPS.items() for option in options.split()}
    fields = [field for kind in module.KINDS for field in dataclasses.fields(kind)]
    parts = [f"### ddae {name}", inspect.cleandoc(module.__doc__ or "")]
    for title in (*GROUPS, OTHERS):
        if found := [field for field in fields if named.get(field.name, OTHERS) == title]:
            parts += [f"**{title[0].upper()}{title[1:]}**", _table(found, "--")]
    return "\n\n".join(parts)


def _options(name: str) -> str:
    """Return a section of a dataclass of options, which signatures link to."""
    kind = getattr(experiments, name)
    return f"### {name} {{#{kind.__module__}.{name}}}\n\n{_table(dataclasses.fields(kind))}"


def _table(fields: Sequence[dataclasses.Field[Any]], before: str = "") -> str:
    """Return options as a table, with what stands before their names."""
    rows = [f"| `{before}{field.name}` | {_default(field)} | {_help(field)} |" for field in fields]
    return "\n".join(["| option | default | what it is |", "|---|---|---|", *rows])


def _default(field: dataclasses.Field[Any]) -> str:
    """Return an option's default as it is typed, nothing where there is none."""
    given = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if given is dataclasses.MISSING:
        return "*needed*"
    words = " ".join(map(str, given)) if isinstance(given, list) else str(given)
    return f"`{words}`" if given not in (None, [], {}) else ""


def _help(field: dataclasses.Field[Any]) -> str:
    """Return what an option's help says, as text of a table."""
    return str(field.metadata.get("help", "")).replace("%%", "%").replace("|", r"\|")
