r"""Layer normalisation: each sample is standardised over its channels and its space.

A sample's output depends on no other sample, and evaluation equals training.

Source: J. L. Ba, J. R. Kiros, G. E. Hinton, "Layer Normalization", 2016, arXiv 1607.06450.

Departs:
    - On maps, mean and variance are taken over channels and space together and there is one scale
      and shift per channel, as is usual in convolutional networks (torch's ``GroupNorm`` with one
      group). The paper has one of each per unit, which ties the layer to one map size.
"""

from __future__ import annotations

import math

from torch import nn

from normlab.method import Card, Method, Setting, Source, Unsuitable
from normlab.surgery.flow import trace_flow
from normlab.surgery.swap import keep_affine, swap_batch_norms


def from_batch_norm(norm: nn.Module, *, flat: bool) -> nn.LayerNorm | nn.GroupNorm:
    r"""Return the layer that takes a BatchNorm's place; eps, scale and shift are kept.

    .. math::
        y = \gamma_c (x - \mu_n) / \sqrt{v_n + \epsilon} + \beta_c

    with mean and biased variance of each sample n over channels and space.

    Args:
        norm: One of torch's BatchNorm layers.
        flat: Whether its input is ``(N, C)``.

    Returns:
        ``nn.LayerNorm`` for flat input, ``nn.GroupNorm`` with one group for maps.

    Example:
        >>> from_batch_norm(nn.BatchNorm2d(8), flat=False)
        GroupNorm(1, 8, eps=1e-05, ...)
    """
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    channels = norm.num_features
    layer = nn.LayerNorm(channels, norm.eps) if flat else nn.GroupNorm(1, channels, norm.eps)
    keep_affine(layer, norm)
    return layer


def prepare(model: nn.Module, setting: Setting) -> nn.Module:
    """Replace each BatchNorm; which layer takes its place is seen from one forward pass."""
    flow = trace_flow(model, setting.batches[0][0][:2])
    flats: list[str] = []

    def layer(name: str, norm: nn.Module) -> nn.Module:
        shapes = [call.input_shape for call in flow.of(norm) if call.input_shape is not None]
        if any(math.prod(shape[1:]) == 1 for shape in shapes):
            raise Unsuitable(
                f"layer-norm(model): expected more than one value per sample at {name!r}, got "
                "one; widen the layer, because a single value minus its mean is zero"
            )
        # One group gives the same on flat input, and is safe where the pass did not come by.
        flat = bool(shapes) and all(len(shape) == 2 for shape in shapes)
        if flat:
            flats.append(name)
        return from_batch_norm(norm, flat=flat)

    model = swap_batch_norms(model, layer, "layer-norm")
    setting.say(f"BatchNorm layers became layer normalisation, {len(flats)} of them on flat input")
    return model


CARD = Card(
    name="layer-norm",
    title="Layer normalisation",
    summary="Standardises each sample over its channels and its space.",
    room="norms",
    source=Source(
        authors="J. L. Ba, J. R. Kiros, G. E. Hinton",
        title="Layer Normalization",
        year=2016,
        arxiv="1607.06450",
    ),
    best_for="Recurrent and fully connected networks, any batch size, one included.",
    limits=("The paper itself found it behind batch normalisation in convolutional networks.",),
    departures=(
        "On maps the statistics cover channels and space, with one scale and shift per channel "
        "instead of one per unit.",
    ),
)

METHOD = Method(card=CARD, prepare=prepare)
