"""Options: ranges, types, nearest names, mappings, and that every option of every experiment has what it needs."""

import dataclasses
import importlib
import inspect
import math
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from ddae_hf import experiments
from ddae_hf.experiments import options as room
from ddae_hf.experiments.options import RANGES, Options, Table, option, read_yaml

# A number without a range: a mean of logarithms, which may be negative, and a standard deviation, which may not.
FREE = ["log_sigma"]


@dataclass(kw_only=True)
class Some(Options):
    batch_size: int = option(250, "Images at a time.")
    learning_rate: float = option(1e-3, "Rate.")
    sigmas: list[float] = option([0.1, 0.2], "Levels.")
    dtype: Literal["float32", "bfloat16"] | None = option(None, "Type.")
    push: bool = option(False, "100 % of it.")
    name: str | None = option(None, "Name.")
    denoiser: Table = option(Table(), "Network.")
    wanted: str = option(help="There is no default.")

    def check(self):
        if self.name == "wrong":
            raise ValueError("name is 'wrong': give another.")


@dataclass(kw_only=True)
class Others(Options):
    batch_size: int = option(1, "")


def some(**given):
    return Some(**{"wanted": "it", **given})


@pytest.mark.parametrize("name", RANGES)
def test_every_number_that_is_named_has_its_range(name):
    kind = dataclasses.make_dataclass("One", [(name, float)], bases=(Options,))
    allowed = RANGES[name]
    for value in (-1.0, -1e-9, 0.0, 1e-9, 0.5, 1.0, 1.5, 2.0**32):
        if allowed.holds(value):
            assert getattr(kind(value), name) == value
        else:
            with pytest.raises(ValueError, match=f"^{name} is .*: it must be {allowed.words.replace('*', '.')}"):
                kind(value)
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=f"^{name} is {value}: it must be finite and"):
            kind(value)


def test_ranges_are_those_that_the_words_say():
    for name, low, high in (("ema_decay", 0, 0.9999), ("augment", 0, 1), ("layer_decay", 1e-6, 1)):
        assert RANGES[name].holds(low) and RANGES[name].holds(high)
    for name, wrong in (("ema_decay", 1), ("adam_beta1", 1.0), ("validation_fraction", 1), ("seed", 2**32), ("l2", 0)):
        assert not RANGES[name].holds(wrong)
    assert len([name for names in room.NAMES.values() for name in names.split()]) == len(RANGES)  # each in one range


@pytest.mark.parametrize(
    "given, message",
    [
        ({"batch_size": 0}, "batch_size is 0: it must be at least 1."),
        ({"batch_size": 2.5}, "batch_size is 2.5: it must be a whole number."),
        ({"batch_size": "3"}, "batch_size is '3': it must be a whole number."),
        ({"batch_size": True}, "batch_size is True: it must be a whole number."),
        ({"batch_size": math.inf}, "batch_size is inf: it must be a whole number."),
        ({"batch_size": None}, "batch_size is None: it must be a whole number."),
        ({"learning_rate": math.nan}, "learning_rate is nan: it must be finite and positive."),
        ({"learning_rate": 10**400}, "learning_rate has 401 digits: it must be finite."),
        ({"learning_rate": -1}, "learning_rate is -1.0: it must be positive."),
        ({"learning_rate": "1e-4"}, "learning_rate is '1e-4': it must be a number."),
        ({"sigmas": 0.1}, "sigmas is 0.1: it must be a list."),
        ({"sigmas": "0.1"}, "sigmas is '0.1': it must be a list."),
        ({"sigmas": [0.1, math.nan]}, "sigmas is nan: it must be finite and at least 0."),
        ({"sigmas": [0, -0.1, math.nan]}, "sigmas is -0.1: it must be at least 0."),
        ({"sigmas": [None]}, "sigmas is None: it must be a number."),
        ({"dtype": "float64"}, "dtype is 'float64': allowed are float32, bfloat16."),
        ({"push": 1}, "push is 1: it must be true or false."),
        ({"push": "no"}, "push is 'no': it must be true or false."),
        ({"name": 3}, "name is 3: it must be text."),
        ({"wanted": None}, "wanted is None: it must be text."),
        ({"denoiser": [1]}, r"\[1\] is not a mapping"),
        ({"denoiser": "a: 1\na: 2"}, "'a' comes twice"),
        ({"name": "wrong"}, "name is 'wrong': give another."),
    ],
)
def test_what_an_option_cannot_be_is_refused_by_its_name(given, message):
    with pytest.raises(ValueError, match=message):
        some(**given)
    with pytest.raises(ValueError, match=message):
        Some.of(some(), given)


def test_values_are_taken_as_their_types():
    found = some(
        batch_size=np.int64(3), learning_rate=1, sigmas=(1, np.float32(0.5)), denoiser={"a": {"b": [1]}}, name=Path("x")
    )
    assert found.batch_size == 3 and type(found.batch_size) is int and type(found.learning_rate) is float
    assert found.sigmas == [1.0, 0.5] and all(type(sigma) is float for sigma in found.sigmas)
    assert found.name == "x" and isinstance(found.denoiser, Table)
    assert some(sigmas=np.array([0.25])).sigmas == [0.25] and some(batch_size=4.0).batch_size == 4
    plain = found.to_dict()
    assert plain["denoiser"] == {"a": {"b": [1]}} and type(plain["denoiser"]) is dict
    assert Some.of(None, plain) == found
    with pytest.raises(TypeError, match="wanted"):
        Some()
    with pytest.raises(ValueError, match="^wanted is not given: There is no default.$"):
        Some.of(None, {"batch_size": 3})


def test_options_are_copied_not_shared():
    first = some()
    first.sigmas.append(9.0)
    first.denoiser["x"] = 1
    assert some().sigmas == [0.1, 0.2] and some().denoiser == {}
    changed = Some.of(first, {"batch_size": 7})
    assert (changed.batch_size, changed.sigmas, first.batch_size) == (7, [0.1, 0.2, 9.0], 250)


def test_a_wrong_name_gets_the_nearest_right_one():
    with pytest.raises(ValueError, match="there is no option 'sigma': the nearest is sigmas.$"):
        Some.of(some(), {"sigma": [0.1]})
    with pytest.raises(ValueError, match="no option 'learning_rat': the nearest is learning_rate.$"):
        Some.of(None, {"learning_rat": 0.1})
    with pytest.raises(ValueError, match="no option 'dename': the nearest are name, denoiser.$"):
        Some.of(None, {"dename": 0.1})
    with pytest.raises(ValueError, match="no option 'zzzz': allowed are batch_size, denoiser"):
        Some.of(None, {"zzzz": 0.1})
    with pytest.raises(ValueError, match="options are Others: give Some, or its fields by name"):
        Some.of(Others(), {})


def test_options_may_be_those_of_a_command():
    """Which has more of them than the experiment that it calls."""

    @dataclass(kw_only=True)
    class Arguments(Some):
        model: str = option("a", "Model.")

    changed = Some.of(Arguments(wanted="it"), {"batch_size": 3})
    assert isinstance(changed, Arguments) and changed.batch_size == 3


def test_yaml_is_read_safely():
    assert read_yaml("a: 5e-4\nb: [1E3, -.5e+2, 1.e1]\nc: e5\nd: '5e-4'\ne: 1e") == {
        "a": 5e-4,
        "b": [1000.0, -50.0, 10.0],
        "c": "e5",
        "d": "5e-4",
        "e": "1e",
    }
    assert read_yaml("") == {} and read_yaml("# nothing") == {} and Table("{x: 1e-4}") == {"x": 1e-4}
    for text, message in (
        ("a: 1\na: 2", "'a' comes twice"),
        ("denoiser: {x: 1, x: 2}", "'x' comes twice"),
        ("a: &x {b: 1}\nc: *x", "aliases"),
        ("a: &x {b: 1}\nc:\n  <<: *x", "aliases"),
        ("a: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("? [a, b]\n: 1", "a name must be one word"),
        ("a: [1", "expected"),
    ):
        with pytest.raises(ValueError, match=message):
            read_yaml(text)


def every_kind():
    """Every class of options in the package."""
    for path in sorted(Path(experiments.__file__).parent.glob("[!_]*.py")):
        module = importlib.import_module(f"ddae_hf.experiments.{path.stem}")
        for _, kind in inspect.getmembers(module, inspect.isclass):
            if issubclass(kind, Options) and kind is not Options and kind.__module__ == module.__name__:
                yield kind


EVERY = list(every_kind())


def types_in(hint):
    """The types and values that a hint is made of, but for None."""
    inner = typing.get_args(hint)
    return {hint} - {type(None)} if not inner else {found for part in inner for found in types_in(part)}


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
def test_every_option_is_documented_and_every_number_has_a_range(kind):
    hints = typing.get_type_hints(kind)
    assert kind.__doc__ and not kind.__doc__.startswith(f"{kind.__name__}(")
    for field in dataclasses.fields(kind):
        text = field.metadata.get("help", "").replace("%%", "%")
        assert len(text) > 5 and text.endswith("."), f"{kind.__name__}.{field.name}: {text!r}"
        if {int, float} & types_in(hints[field.name]):
            assert field.name in RANGES or field.name in FREE, f"{kind.__name__}.{field.name} has no range"


def test_one_name_means_one_thing_everywhere():
    """The same type; and every range is of an option that there is."""
    kinds = {}
    for kind in EVERY:
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            kinds.setdefault(field.name, set()).add(frozenset(types_in(hints[field.name])))
    assert not {name for name, found in kinds.items() if len(found) > 1}
    assert not (set(RANGES) | set(FREE)) - set(kinds)
