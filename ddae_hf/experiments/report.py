"""What all reports share: they are read and written as JSON, printed as Markdown tables, and state figures once.

A `Section` holds the figures in words: `Report.table` prints it, and cards render it. Accuracies are fractions in files
and percent in tables. Several values are shown as mean ± standard deviation (over n - 1).
"""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np

from .arrays import StrPath, write_json

NORMAL = 1.959964  # deviations on either side of the mean between which 95 % of a normal distribution lie


class Figure(NamedTuple):
    """A number for the Hub's lists of results, `metric` being its id there."""

    metric: str
    name: str
    value: float
    conditions: dict[str, Any]


class Section(NamedTuple):
    """A report's figures: how they were measured, all of them as a table, the main ones, the saved classifier's."""

    title: str
    protocol: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    figures: Sequence[Figure] = ()
    saved: float | None = None  # accuracy of the classifier that was saved, as its users load it


def in_memory() -> Any:
    """Return a field of a report that its file does not hold, such as a model."""
    return dataclasses.field(default=None, repr=False, compare=False, metadata={"in_memory": True})


def many() -> Any:
    """Return a field that is an empty dictionary by default, and then not in the file."""
    return dataclasses.field(default_factory=dict)


@dataclass(kw_only=True)
class Report:
    """What an experiment found, and what is known of its data and its machine.

    Attributes:
        options: The options that it ran with, by name.
        dataset: `name`, `id` on the Hub, `config`, `train_split`, `test_split`, `num_images`, as far as they are known.
        base_model: The Hub repository that it began with.
        seconds: How long it took, in all its runs; or the seconds of its parts and `in_all`.
        images_per_second: Images that were trained on, over the seconds of training of all runs together.
        hardware: Like `processes`, `threads` and `versions`, a part of what `devices.machine` returns.
        folder: Where it was read or written.
    """

    kinds: ClassVar[list[type[Report]]] = []  # of all experiments; a later one may be a special case of an earlier
    kind: ClassVar[str]
    file: ClassVar[str] = "eval_results.json"
    telling: ClassVar[Sequence[str]]  # keys that its file alone holds, of those of its name: now, then in old versions
    pictures: ClassVar[Mapping[str, str]] = {}  # files beside it that a card shows, and what they show

    options: dict[str, Any] = many()
    dataset: dict[str, Any] = many()
    base_model: str | None = None
    seconds: Any = None
    seconds_this_run: float | None = None
    images_per_second: float | None = None
    hardware: Any = None
    processes: int | None = None
    threads: int | None = None
    versions: dict[str, str] = many()
    folder: Path | None = in_memory()

    def __init_subclass__(cls) -> None:
        if "kind" in vars(cls):
            Report.kinds.append(cls)

    @classmethod
    def read(cls, path: StrPath) -> Self:
        """Return the report of a file, or of the first of a folder's that is of this class.

        Raises:
            ValueError: A file that cannot be read, or that none of this project's experiments wrote.
            OSError: There is no such file.
        """
        path = Path(path)
        kinds = [kind for kind in reversed(Report.kinds) if issubclass(kind, cls) or issubclass(cls, kind)]
        if path.is_dir():
            path /= next((kind.file for kind in kinds if (path / kind.file).is_file()), kinds[0].file)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} cannot be read: {error}. Run the experiment again, or remove it.") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path} holds a {type(content).__name__}: it must hold names and values.")
        kinds = [kind for kind in kinds if kind.file == path.name] or kinds
        told = [(kind.telling[:1], kind) for kind in kinds] + [(kind.telling[1:], kind) for kind in kinds]
        found = next((kind for keys, kind in told if any(key in content for key in keys)), None)
        if found is None:
            raise ValueError(
                f"{path} holds {', '.join(content) or 'nothing'}: allowed are the results of "
                f"{', '.join(kind.kind.replace('_', ' ') for kind in kinds)}. Remove it, or name another folder."
            )
        try:
            report = _built(cls if issubclass(cls, found) else found, found.upgraded(content))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} cannot be understood: {error}. Run the experiment again.") from error
        report.folder = path.parent
        report.complete()
        return report

    @classmethod
    def upgraded(cls, content: dict[str, Any]) -> dict[str, Any]:
        """Return a file's content as this version would have written it."""
        return content

    def complete(self) -> None:
        """Add what is known from elsewhere: the data's name, which is the last part of a path, and its splits."""
        known = {name: self.options.get(name) for name in ("train_split", "test_split")}
        known |= {"config": self.options.get("dataset_config_name"), **self.dataset}
        source = known.get("id") or self.options.get("dataset_name") or self.options.get("train_data_dir")
        known["name"] = known.get("name") or (source and Path(source).name)
        self.dataset = {name: value for name, value in known.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """Return what the file holds; what is not known is left out."""
        return _plain(self)

    def write(self, folder: StrPath) -> Path:
        """Write the report, complete or not at all, and return its path."""
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / self.file, self.to_dict())
        return self.folder / self.file

    def section(self) -> Section:
        """Return the figures, as tables and cards show them."""
        raise NotImplementedError

    def table(self) -> str:
        """Return what was measured, and the figures as a Markdown table."""
        section = self.section()
        parts = [section.protocol, markdown(section.head, section.rows)]
        if section.saved is not None:
            parts.append(f"The saved classifier's test accuracy, with its fixed noise, is {percent(section.saved)} %.")
        return "\n\n".join(parts)

    def pictures_there(self) -> dict[Path, str]:
        """Return the pictures beside the file, and what they show."""
        places = ((Path(self.folder or "", name), text) for name, text in self.pictures.items() if self.folder)
        return {path: text for path, text in places if path.is_file()}


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def percent(value: float | None) -> str:
    """Return a fraction in percent, with two decimals; an empty text for None."""
    return "" if value is None else f"{100 * value:.2f}"


def spread(values: Sequence[float]) -> str:
    """Return mean ± standard deviation (over n - 1) in percent; a single value is returned alone."""
    if len(values) == 1:
        return percent(values[0])
    return f"{percent(float(np.mean(values)))} ± {percent(float(np.std(values, ddof=1)))}"


def accuracy_interval(accuracy: float, count: int) -> tuple[float, float]:
    """Return the ends of the 95 % interval of an accuracy on `count` images (Wilson 1927, doi:10.2307/2276774)."""
    spread = NORMAL**2 / count
    centre = (accuracy + spread / 2) / (1 + spread)
    reach = math.sqrt(spread * (accuracy * (1 - accuracy) + spread / 4)) / (1 + spread)
    return centre - reach, centre + reach


def number(value: float | None) -> str:
    """Return a count with its thousands apart, another number with four digits, and an empty text for None."""
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _in_file(kind: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(kind) if "in_memory" not in field.metadata]


def _built(hint: Any, value: Any) -> Any:
    """Return what a file's value stands for: dataclasses, also in lists and dictionaries, or where None may be."""
    parts = typing.get_args(hint)
    if type(None) in parts:  # which a file leaves out
        return _built(parts[0], value)
    if dataclasses.is_dataclass(hint):
        hints, kind = typing.get_type_hints(hint), typing.cast(Any, hint)
        return kind(**{name: _built(hints[name], value[name]) for name in _in_file(hint) if name in value})
    if typing.get_origin(hint) is list:
        return [_built(parts[0], item) for item in value]
    if typing.get_origin(hint) is dict:
        return {name: _built(parts[1], item) for name, item in value.items()}
    return value


def _plain(value: Any) -> Any:
    """Return dataclasses as dictionaries, without what is not known and what lives in memory alone."""
    if dataclasses.is_dataclass(value):
        found = {name: _plain(getattr(value, name)) for name in _in_file(value)}
        return {name: item for name, item in found.items() if item not in (None, {}, [])}
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value
