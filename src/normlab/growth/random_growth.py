"""Random growth: grow wider with units in random directions, the baseline of GradMax.

Everything but the directions is as in `normlab.growth.gradmax`: the network begins equally narrow,
grows at the same steps to the same width, and new units have the same norm.

Source: U. Evci, B. van Merrienboer, T. Unterthiner, M. Vladymyrov, F. Pedregosa, "GradMax: Growing
Neural Networks using Gradient Information", 2022, arXiv 2201.05125.

Departs:
    - Directions are Gaussian; the public code draws entries from 0 to 1 (``positive=True``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from normlab.growth.gradmax import SOURCE
from normlab.method import Card, Method, Setting

# What grows a network is loaded only by who grows one: the catalogue is to load quickly.
if TYPE_CHECKING:
    from normlab.growth.grower import Batch
    from normlab.growth.new_units import NormRule
    from normlab.growth.pairs import GrowthPair
    from normlab.growth.widen import NewUnits


def prepare(
    model: nn.Module, setting: Setting, *, width_fraction: float = 0.25, keep_norms: bool = False
) -> nn.Module:
    """Narrow the layers that can grow.

    Args:
        model: The model, changed in place.
        setting: Its first batch shows what the model computes.
        width_fraction: The share of the width to begin with, above 0 and at most 1.
        keep_norms: Whether normalisers between these layers stay. New units then have random
            incoming weights, and zero outgoing ones.

    Raises:
        Unsuitable: The model has no layers that can grow.
    """
    from normlab.growth.grower import prepare_narrow

    return prepare_narrow(
        model, setting, "random-growth", width_fraction=width_fraction, keep_norms=keep_norms
    )


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    setting: Setting,
    *,
    start: float = 0.2,
    end: float = 0.7,
    num_growths: int = 12,
    round_robin: bool = False,
    scale: float = 0.5,
    norm: NormRule = "mean",
    positive: bool = False,
) -> None:
    """Grow back to the full width on a schedule.

    Args:
        model: The model that `prepare` returned.
        optimizer: The optimiser of its parameters.
        setting: The number of steps.
        start: The share of training after which growth begins.
        end: The share after which it has ended.
        num_growths: How often each pair of layers grows.
        round_robin: Whether one pair grows at a time, in turn.
        scale: The norm of new units' weights, as a share of the mean norm of those there.
        norm: ``"fixed"``: the scale is the norm itself.
        positive: Whether entries are uniform from 0 to 1.
    """
    from normlab.growth.grower import attach_grower
    from normlab.growth.grown_widths import remembered_widths
    from normlab.growth.new_units import random_units

    widths = remembered_widths(model)
    outgoing_zero = widths is not None and any(pair.normalised for pair in widths.pairs)

    def make_units(
        model: nn.Module,
        wanted: Mapping[GrowthPair, int],
        batch: Batch,
        generator: torch.Generator,
    ) -> dict[GrowthPair, NewUnits]:
        return random_units(
            wanted,
            scale=scale,
            norm=norm,
            outgoing_zero=outgoing_zero,
            positive=positive,
            generator=generator,
        )

    attach_grower(
        model,
        optimizer,
        setting,
        "random-growth",
        make_units,
        start=start,
        end=end,
        num_growths=num_growths,
        round_robin=round_robin,
    )


CARD = Card(
    name="random-growth",
    title="Random growth",
    summary="Starts narrow and grows wider during training, with new units in random directions.",
    room="growth",
    source=SOURCE,
    batch_of_one="as the model",
    state=("the step counter; the widths are those of the weights",),
    best_for="Seeing what GradMax gains over any growth that keeps the function.",
    limits=(
        "Normalisers between layers that grow are taken out, as for GradMax (keep_norms=true).",
        "Layers whose outputs are added, or read by several others, keep their width.",
        "It is refused beside weight-rescaling and bn-preconditioning, which hold on to weights.",
    ),
    departures=("Directions are Gaussian, not positive uniform (positive=true).",),
)

METHOD = Method(card=CARD, prepare=prepare, attach=attach)
