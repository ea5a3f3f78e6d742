"""The one list of all methods, and how to find one by the name a person types."""

from __future__ import annotations

import re
from difflib import get_close_matches

from normlab.activations import elementwise
from normlab.growth import gradmax, random_growth
from normlab.inits import bn_init, fixup, gradinit
from normlab.method import Method, compose
from normlab.norms import (
    batch_kalman_norm,
    batch_layer_norm,
    batch_norm,
    batchless_norm,
    class_norm,
    cross_iteration_batch_norm,
    filter_response_norm,
    ghost_batch_norm,
    group_norm,
    ic_layer,
    instance_norm,
    layer_norm,
    none,
)
from normlab.optim import (
    adaptive_clipping,
    asam,
    batch_growth,
    bn_preconditioning,
    gradient_noise_scale,
    lamb,
    lars,
    linear_scaling,
    lookahead,
    rmsprop_inside_root,
    sam,
    weight_rescaling,
)
from normlab.regularizers import dropout, label_smoothing, mixup, stochastic_depth
from normlab.weights import spectral_norm, target_space, weight_norm, weight_standardization

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
    bn_init.METHOD,
    class_norm.METHOD,
    batch_layer_norm.METHOD,
    cross_iteration_batch_norm.METHOD,
    batch_kalman_norm.METHOD,
    batchless_norm.METHOD,
    ghost_batch_norm.METHOD,
    weight_standardization.METHOD,
    adaptive_clipping.METHOD,
    spectral_norm.METHOD,
    spectral_norm.BIDIRECTIONAL,
    weight_norm.METHOD,
    bn_preconditioning.METHOD,
    linear_scaling.METHOD,
    batch_growth.METHOD,
    gradmax.METHOD,
    random_growth.METHOD,
    mixup.METHOD,
    target_space.METHOD,
    gradinit.METHOD,
    stochastic_depth.METHOD,
    label_smoothing.METHOD,
    rmsprop_inside_root.METHOD,
    lars.METHOD,
    lamb.METHOD,
    lookahead.METHOD,
    sam.METHOD,
    asam.METHOD,
    *elementwise.METHODS,
    gradient_noise_scale.METHOD,
)
"""Every method, once. New ones go to the end: the place decides a method's colour in reports."""


def find_method(text: str, besides: tuple[str, ...] = ()) -> Method:
    """Return the method that ``text`` names.

    Args:
        text: ``name``, ``name:option=value,option=value``, or several of these joined by ``+``.
        besides: Further names that the caller knows, for the message about an unknown one.

    Returns:
        The method with its options set.

    Raises:
        ValueError: An unknown name or option (the nearest is named), or an option without a value.

    Example:
        >>> find_method("filter-response-norm").card.source.arxiv
        '1911.09737'
    """
    # The plus of a number's exponent, 1e+3, is none between methods.
    parts = re.split(r"(?<!\d[eE])\+", text)
    return compose(_find_one(part.strip(), besides) for part in parts)


def _find_one(text: str, besides: tuple[str, ...]) -> Method:
    name, _, tail = text.partition(":")
    methods = {method.card.name: method for method in METHODS}
    if name not in methods:
        known = [*methods, *besides]
        near = get_close_matches(name.lower(), known, n=1, cutoff=0.4)
        raise ValueError(
            f"method({name!r}): expected one of {', '.join(known)}; got {name!r}; "
            f"{f'do you mean {near[0]!r}?' if near else 'take one of these'}"
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
