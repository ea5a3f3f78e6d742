"""The one list of all methods, and how to find one by the name a person types."""

from __future__ import annotations

from difflib import get_close_matches

from normlab.inits import fixup
from normlab.method import Method, compose
from normlab.norms import (
    batch_norm,
    filter_response_norm,
    group_norm,
    ic_layer,
    instance_norm,
    layer_norm,
    none,
)
from normlab.optim import weight_rescaling
from normlab.regularizers import dropout

METHODS: tuple[Method, ...] = (
    batch_norm.METHOD,
    none.METHOD,
    layer_norm.METHOD,
    group_norm.METHOD,
    instance_norm.METHOD,
    ic_layer.METHOD,
    filter_response_norm.METHOD,
    fixup.METHOD,
    weight_rescaling.METHOD,
    dropout.METHOD,
)
"""Every method, once. New ones go to the end: the place decides a method's colour in reports."""


def find_method(text: str) -> Method:
    """Return the method that ``text`` names.

    Args:
        text: ``name``, ``name:option=value,option=value``, or several of these joined by ``+``.

    Returns:
        The method with its options set.

    Raises:
        ValueError: An unknown name or option (the nearest is named), or an option without a value.

    Example:
        >>> find_method("filter-response-norm").card.source.arxiv
        '1911.09737'
    """
    return compose(_find_one(part.strip()) for part in text.split("+"))


def _find_one(text: str) -> Method:
    name, _, tail = text.partition(":")
    methods = {method.card.name: method for method in METHODS}
    if name not in methods:
        near = get_close_matches(name, methods, n=1, cutoff=0.0)
        raise ValueError(
            f"method({name!r}): expected one of {', '.join(methods)}; got {name!r}; "
            f"do you mean {near[0]!r}?"
        )
    options = {}
    for option in filter(None, tail.split(",")):
        key, equals, value = option.partition("=")
        if not equals:
            raise ValueError(
                f"method({text!r}): expected options as name=value, got {option!r}; "
                f"write {name}:{key}=VALUE"
            )
        options[key.strip()] = value.strip()
    return methods[name].with_options(**options)
