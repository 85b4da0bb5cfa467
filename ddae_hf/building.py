"""Building what a configuration describes: a `ValueError` with a sentence where that cannot be done.

A configuration may come from a file that is damaged, or that was made up to do harm. So numbers that would fill the
memory or take hours are refused before anything is built, and whatever a library raises because of a value of another
type becomes a `ValueError`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

LARGEST = 2**20  # of a number in a config: a width, a side, a number of timesteps or of classes
# Numbers of layers, each of which takes a while to build.
OF_LAYERS = ("layers_per_block", "num_layers", "transformer_layers_per_block", "num_hidden_layers")
MOST_LAYERS = 1000


@contextmanager
def building(what: str, config: Mapping[str, Any], cls: Any) -> Iterator[None]:
    """Let any error in building a diffusers class from its config be a `ValueError`.

    Numbers that are too large, and values that are no numbers where the class has a number by default, are refused
    before that.
    """
    sentence = f"{what}: {config.get('_class_name')} cannot be built from this config"
    check_numbers(what, config)
    for name, parameter in inspect.signature(cls).parameters.items():
        number = isinstance(parameter.default, (int, float)) and not isinstance(parameter.default, bool)
        lists = "tuple" in str(parameter.annotation)  # one number for each level may be given, too
        value = config.get(name)
        if number and not (_is_numbers(value) if lists else isinstance(value, (int, float, type(None)))):
            raise ValueError(f"{sentence}: {name} is {short(config[name])}, and must be a number.")
    with refusing(sentence):
        yield


def _is_numbers(value: Any) -> bool:
    """Whether a value is None, a number, or a list of such values."""
    if isinstance(value, (list, tuple)):
        return all(_is_numbers(each) for each in value)
    return isinstance(value, (int, float, type(None)))


@contextmanager
def refusing(sentence: str) -> Iterator[None]:
    """Raise a `ValueError` that says this and the reason in place of any other error of a library."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # values of another type can raise anything
        # Subclasses, such as those for damaged text, and a few words say nothing of what cannot be used.
        if type(error) is ValueError and len(str(error).split()) > 3:
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{sentence}: {reason[:300]}") from error


def check_numbers(what: str, config: Any, name: str = "") -> None:
    """Raise `ValueError` for a whole number in a config, however deep, that no network and no schedule has."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            check_numbers(what, value, str(key))
    elif isinstance(config, (list, tuple)):
        for value in config:
            check_numbers(what, value, name)
    elif isinstance(config, int):
        most = MOST_LAYERS if name in OF_LAYERS else LARGEST
        if abs(config) > most:
            raise ValueError(f"{what}: {name} is {short(config)}, which is too large: allowed are at most {most}.")


def short(value: Any) -> str:
    """Return a value as an error message shows it, without the rest of a long one."""
    if isinstance(value, int) and abs(value) >= 10**30:
        return "a number of more than 30 digits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
