"""Read the options of methods: values of the type that a signature declares, often from text."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


def nearest_option(name: str, known: Iterable[str]) -> str:
    """Return what to do about an unknown option: take the nearest, or none."""
    near = get_close_matches(name, list(known), n=1, cutoff=0.0)
    return f"do you mean {near[0]!r}?" if near else "do leave it out"


def read_value(method: str, name: str, value: Any, option: inspect.Parameter) -> Any:
    """Return the value of an option in the type of its default; text comes from a command line.

    Args:
        method: The method's name, for the message.
        name: The option's name.
        value: What was given.
        option: Where the option is declared.

    Raises:
        ValueError: A value of another type.
    """
    default = option.default
    # A word that the annotation spells out, such as Literal["init"], stands for itself.
    if isinstance(value, str) and repr(value) in str(option.annotation):
        return value
    wanted: type | None = None if default is None else type(default)
    if isinstance(value, str) and wanted is not str:
        text = value.lower()
        if text in ("true", "false"):
            value = text == "true"
        elif text == "none":
            value = None
        else:
            for kind in (int, float):
                try:
                    value = kind(value)
                    break
                except ValueError:
                    pass
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    truth = isinstance(value, bool) and wanted is not bool  # Python counts it among the integers
    if wanted is not None and (truth or not isinstance(value, wanted)):
        raise ValueError(
            f"{method}({name}={value!r}): expected a value like the default {default!r}, got "
            f"{type(value).__name__}; give {_article(wanted.__name__)}"
        )
    return value


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
