"""GradMax: grow wider with the units whose new weights get the largest gradient at once.

New units start with zero incoming weights, so the function of the network stays as it is. Their
outgoing weights are the first singular vectors of a matrix of inputs and gradients, see
`normlab.growth.directions`, with the norm that `normlab.growth.new_units` states.

Source: U. Evci, B. van Merrienboer, T. Unterthiner, M. Vladymyrov, F. Pedregosa, "GradMax: Growing
Neural Networks using Gradient Information", 2022, arXiv 2201.05125.

Departs:
    - The matrix is exact for convolutions; the public code's form is ``cross_term="aux"``.
    - Units beyond the rank of the matrix get random directions.
    - A convolution before a flatten and a linear layer is grown exactly; the public code takes
      random directions there.
    - As a method of a comparison the network has its full width at the end: what a growth adds is
      spread, where the public code adds a fixed ``max(1, int(width / 4))``.
    - The first units of the drawn wide layer make the narrow one, and the layer behind is scaled
      so that its outputs keep their variance.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from normlab.method import Card, Method, Setting, Source

# What grows a network is loaded only by who grows one: the catalogue is to load quickly.
if TYPE_CHECKING:
    from normlab.growth.directions import CrossTerm
    from normlab.growth.grower import Batch
    from normlab.growth.new_units import NormRule
    from normlab.growth.pairs import GrowthPair
    from normlab.growth.widen import NewUnits

SOURCE = Source(
    authors="U. Evci, B. van Merrienboer, T. Unterthiner, M. Vladymyrov, F. Pedregosa",
    title="GradMax: Growing Neural Networks using Gradient Information",
    year=2022,
    arxiv="2201.05125",
    venue="ICLR 2022",
)


def prepare(model: nn.Module, setting: Setting, *, width_fraction: float = 0.25) -> nn.Module:
    """Narrow the layers that can grow, and take normalisers between them out.

    Args:
        model: The model, changed in place.
        setting: Its first batch shows what the model computes.
        width_fraction: The share of the width to begin with, above 0 and at most 1.

    Raises:
        Unsuitable: The model has no layers that can grow.
    """
    from normlab.growth.grower import prepare_narrow

    return prepare_narrow(model, setting, "gradmax", width_fraction=width_fraction)


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
    cross_term: CrossTerm = "exact",
) -> None:
    """Grow back to the full width on a schedule.

    Args:
        model: The model that `prepare` returned.
        optimizer: The optimiser of its parameters.
        setting: Loss, number of steps, and the batches to look at.
        start: The share of training after which growth begins.
        end: The share after which it has ended.
        num_growths: How often each pair of layers grows.
        round_robin: Whether one pair grows at a time, in turn.
        scale: The norm of new units' weights, as a share of the mean norm of those there.
        norm: ``"fixed"``: the scale is the norm itself.
        cross_term: ``"aux"`` for the public code's approximation at convolutions.
    """
    from normlab.growth.grower import attach_grower
    from normlab.growth.new_units import gradmax_units

    def make_units(
        model: nn.Module,
        wanted: Mapping[GrowthPair, int],
        batch: Batch,
        generator: torch.Generator,
    ) -> dict[GrowthPair, NewUnits]:
        return gradmax_units(
            model,
            wanted,
            *batch,
            setting.loss,
            scale=scale,
            norm=norm,
            kind=cross_term,
            generator=generator,
        )

    attach_grower(
        model,
        optimizer,
        setting,
        "gradmax",
        make_units,
        start=start,
        end=end,
        num_growths=num_growths,
        round_robin=round_robin,
    )


CARD = Card(
    name="gradmax",
    title="GradMax",
    summary="Starts narrow and grows wider during training, with new units whose weights get the "
    "largest gradient.",
    room="growth",
    source=SOURCE,
    batch_of_one="as the model",
    state=("the step counter; the widths are those of the weights",),
    best_for="Growing the width of a network on a schedule, where training from the start at full "
    "width costs too much.",
    limits=(
        "It helps the moment of growth; over a long training random growth comes close.",
        "Normalisers between layers that grow are taken out, because behind zero incoming weights "
        "they have nothing to normalise. Those elsewhere stay; a plain network has none left.",
        "Layers whose outputs are added, or read by several others, keep their width.",
        "It is refused beside weight-rescaling and bn-preconditioning, which hold on to weights.",
    ),
    departures=(
        "The cross term of convolutions is exact (cross_term=aux for the public code's).",
        "Units beyond the rank of the cross term get random directions.",
        "Growth ends exactly at the model's own width.",
        "ReLUs between layers that grow have derivative 1 at zero.",
    ),
)

METHOD = Method(card=CARD, prepare=prepare, attach=attach)
