r"""Instance normalisation: each map of each sample is standardised over its space.

A sample's output depends on no other sample, and evaluation equals training.

Source: D. Ulyanov, A. Vedaldi, V. Lempitsky, "Instance Normalization: The Missing Ingredient for
Fast Stylization", 2016, arXiv 1607.08022.

Departs:
    - A scale and a shift per channel are learnt; the paper's equation has none.
"""

from __future__ import annotations

import math

from torch import nn

from normlab.method import Card, Method, Setting, Source, Unsuitable
from normlab.surgery.flow import trace_flow
from normlab.surgery.swap import keep_affine, swap_batch_norms

_LAYERS = {
    nn.BatchNorm1d: nn.InstanceNorm1d,
    nn.BatchNorm2d: nn.InstanceNorm2d,
    nn.BatchNorm3d: nn.InstanceNorm3d,
}


def from_batch_norm(norm: nn.Module) -> nn.Module:
    r"""Return the layer that takes a BatchNorm's place; eps, scale and shift are kept.

    .. math::
        y = \gamma_c (x - \mu_{nc}) / \sqrt{v_{nc} + \epsilon} + \beta_c

    with mean and biased variance of each map over its space.

    Args:
        norm: One of torch's BatchNorm layers.

    Returns:
        A fresh ``nn.InstanceNorm`` of as many axes, without running statistics.

    Example:
        >>> from_batch_norm(nn.BatchNorm2d(8)).affine
        True
    """
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    layer = _LAYERS[type(norm)](norm.num_features, norm.eps, affine=True)
    keep_affine(layer, norm)
    return layer


def prepare(model: nn.Module, setting: Setting) -> nn.Module:
    """Replace each BatchNorm by torch's InstanceNorm; refuses where a map has one position."""
    flow = trace_flow(model, setting.batches[0][0][:2])

    def layer(name: str, norm: nn.Module) -> nn.Module:
        for call in flow.of(norm):
            if call.input_shape is not None and math.prod(call.input_shape[2:]) == 1:
                raise Unsuitable(
                    f"instance-norm(model): expected maps of more than one position at {name!r}, "
                    f"got shape (N, {', '.join(map(str, call.input_shape[1:]))}); choose "
                    "layer-norm, because a single value minus its mean is zero"
                )
        return from_batch_norm(norm)

    model = swap_batch_norms(model, layer, "instance-norm")
    kinds = tuple(_LAYERS.values())
    count = sum(type(module) in kinds for module in model.modules())
    setting.say(f"{count} layers are InstanceNorm now")
    return model


CARD = Card(
    name="instance-norm",
    title="Instance normalisation",
    summary="Standardises each map of each sample over its own space.",
    room="norms",
    source=Source(
        authors="D. Ulyanov, A. Vedaldi, V. Lempitsky",
        title="Instance Normalization: The Missing Ingredient for Fast Stylization",
        year=2016,
        arxiv="1607.08022",
    ),
    best_for="Images generated or restyled, where the contrast of an input should not matter.",
    limits=(
        "Flat input and maps of one position, which it would turn into zeros.",
        "A map's mean and strength are removed, which a classifier may need.",
        "torch's layer does not keep the channels-last layout.",
    ),
    departures=("A scale and a shift per channel are learnt; the paper's equation has none.",),
)

METHOD = Method(card=CARD, prepare=prepare)
