"""Checks of the arguments of optimisers, with the message that a user is promised."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, TypeGuard


def require(valid: bool, operation: str, name: str, value: object, expected: str) -> None:
    """Refuse a value that is not what is expected.

    Args:
        valid: Whether it is.
        operation: What was called.
        name: The name of the argument.
        value: What was given.
        expected: What was expected.

    Raises:
        ValueError: It is not.

    Example:
        >>> require(False, "SAM", "rho", -1.0, "a length of at least 0")
        Traceback (most recent call last):
            ...
        ValueError: SAM(rho=-1.0): expected a length of at least 0, got -1.0; give a length of at \
least 0
    """
    if not valid:
        raise ValueError(
            f"{operation}({name}={value!r}): expected {expected}, got {value!r}; give {expected}"
        )


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number, not text, None or a truth value.

    Example:
        >>> [is_number(value) for value in (2, 0.5, "2", float("inf"), None)]
        [True, True, False, False, False]
    """
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def is_count(value: Any, least: int = 1) -> TypeGuard[int]:
    """Whether a value is a whole number of at least ``least``.

    Example:
        >>> [is_count(value) for value in (2, 2.0, 0, 1.5, "2")]
        [True, True, False, False, False]
    """
    return is_number(value) and value >= least and value == int(value)
