r"""Group normalisation: each sample is standardised over groups of channels and their space.

A sample's output depends on no other sample, and evaluation equals training.

Source: Y. Wu, K. He, "Group Normalization", 2018, arXiv 1803.08494.

Departs:
    - The paper's number of groups, 32, is a ceiling: a layer gets the largest divisor of its
      channels up to it that leaves enough channels in a group (see `fitting_groups`). From 64
      channels on, in powers of two, that is the paper's 32.
"""

from __future__ import annotations

import math

from torch import nn

from normlab.method import Card, Method, Setting, Source, Unsuitable
from normlab.surgery.flow import trace_flow
from normlab.surgery.swap import keep_affine, swap_batch_norms


def fitting_groups(num_channels: int, num_groups: int, *, has_space: bool) -> int:
    """Return the number of groups for a layer.

    It is the largest divisor of the channels that is at most ``num_groups`` and leaves two
    channels in a group, or four where a channel has one position, because two values standardised
    with each other are little more than their signs. Where no divisor does, it is one group.

    Args:
        num_channels: The number of channels C.
        num_groups: The number of groups wanted, at least 1.
        has_space: Whether a channel of one sample has more than one position.

    Returns:
        A divisor of ``num_channels``.

    Raises:
        ValueError: ``num_groups`` is below 1.

    Example:
        >>> [fitting_groups(channels, 32, has_space=True) for channels in (3, 16, 48, 64, 256)]
        [1, 8, 24, 32, 32]
        >>> [fitting_groups(channels, 32, has_space=False) for channels in (3, 16, 48, 64, 256)]
        [1, 4, 12, 16, 32]
    """
    if num_groups < 1:
        raise ValueError(
            f"group-norm(num_groups={num_groups}): expected at least 1, got {num_groups}; use 32"
        )
    fewest = 2 if has_space else 4
    return max(
        groups
        for groups in range(1, num_channels + 1)
        if groups == 1
        or (
            groups <= num_groups and num_channels % groups == 0 and num_channels // groups >= fewest
        )
    )


def from_batch_norm(norm: nn.Module, num_groups: int) -> nn.GroupNorm:
    r"""Return the layer that takes a BatchNorm's place; eps, scale and shift are kept.

    .. math::
        y = \gamma_c (x - \mu_{ng}) / \sqrt{v_{ng} + \epsilon} + \beta_c

    with mean and biased variance of each sample n over the channels of group g and space.

    Args:
        norm: One of torch's BatchNorm layers.
        num_groups: A divisor of its number of channels.

    Returns:
        A fresh ``nn.GroupNorm``.
    """
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    layer = nn.GroupNorm(num_groups, norm.num_features, norm.eps)
    keep_affine(layer, norm)
    return layer


def prepare(model: nn.Module, setting: Setting, *, num_groups: int = 32) -> nn.Module:
    """Replace each BatchNorm by ``nn.GroupNorm`` with at most ``num_groups`` groups."""
    flow = trace_flow(model, setting.batches[0][0][:2])
    chosen: list[int] = []

    def layer(name: str, norm: nn.Module) -> nn.GroupNorm:
        assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
        shapes = [call.input_shape for call in flow.of(norm) if call.input_shape is not None]
        has_space = all(math.prod(shape[2:]) > 1 for shape in shapes)
        groups = fitting_groups(norm.num_features, num_groups, has_space=has_space)
        if not has_space and groups == norm.num_features:
            raise Unsuitable(
                f"group-norm(model): expected at least two values in a group at {name!r}, got one "
                "channel with one position; widen the layer, because a single value minus its "
                "mean is zero"
            )
        chosen.append(groups)
        return from_batch_norm(norm, groups)

    model = swap_batch_norms(model, layer, "group-norm")
    counts = ", ".join(f"{chosen.count(groups)} with {groups}" for groups in sorted(set(chosen)))
    setting.say(f"BatchNorm layers became GroupNorm; numbers of groups: {counts}")
    return model


CARD = Card(
    name="group-norm",
    title="Group normalisation",
    summary="Standardises each sample over groups of channels and their space.",
    room="norms",
    source=Source(
        authors="Y. Wu, K. He",
        title="Group Normalization",
        year=2018,
        arxiv="1803.08494",
        venue="ECCV 2018",
    ),
    best_for="Convolutional networks whose batches are too small for batch normalisation.",
    limits=(
        "At large batches the paper found it somewhat behind batch normalisation on ImageNet.",
        "On flat input a group is a handful of numbers, and much of their magnitude is lost.",
    ),
    departures=(
        "num_groups is a ceiling: a layer gets the largest divisor of its channels up to it that "
        "leaves two channels in a group, four where a channel has one position.",
    ),
)

METHOD = Method(card=CARD, prepare=prepare)
