r"""The weights of new units that leave the function of a network as it is.

Either a unit starts with zero incoming weights and any outgoing ones, or with zero outgoing weights
and any incoming ones. The vector that is not zero has the norm

.. math::
    c = s \, \tfrac{1}{C} \sum_j \lVert w_j \rVert \;\text{("mean")}, \quad c = s \;\text{("fixed")}

with w_j the vectors of the C units that are there, on the same side, and s the scale.

Source: U. Evci, B. van Merrienboer, T. Unterthiner, M. Vladymyrov, F. Pedregosa, "GradMax: Growing
Neural Networks using Gradient Information", 2022, arXiv 2201.05125.

Departs:
    - Random directions are Gaussian. The authors' public code draws entries from 0 to 1, so that
      all are positive (``positive=True``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, distributed, nn

from normlab.growth.directions import CrossTerm, Loss, best_directions, cross_term, observe
from normlab.growth.pairs import GrowthPair
from normlab.growth.widen import NewUnits
from normlab.moments import group_of_several

NormRule = Literal["mean", "fixed"]
Side = Literal["incoming", "outgoing"]


def vectors(pair: GrowthPair, side: Side) -> Tensor:
    """Return the weights of the units of a pair on one side, ``(units, weights)``.

    Args:
        pair: The pair.
        side: ``"incoming"`` or ``"outgoing"``.
    """
    if side == "incoming":
        return pair.first.weight.detach().flatten(1)
    outgoing = pair.second.weight.detach().flatten(1)
    return outgoing.unflatten(1, (pair.width, -1)).transpose(0, 1).flatten(1)


def norm_of_new(
    pair: GrowthPair, *, scale: float = 0.5, norm: NormRule = "mean", side: Side = "outgoing"
) -> float:
    """Return the norm of the weights of one new unit on one side.

    Args:
        pair: The pair.
        scale: The scale s, above 0.
        norm: ``"mean"``: s times the mean norm of the units that are there; ``"fixed"``: s.
        side: ``"incoming"`` or ``"outgoing"``.

    Raises:
        ValueError: A value out of its range, or weights there that are all 0, behind which a unit
            with zeros on its other side would never learn.
    """
    if not scale > 0 or norm not in ("mean", "fixed"):
        name, value = ("scale", scale) if not scale > 0 else ("norm", norm)
        expected = "a number above 0" if not scale > 0 else "'mean' or 'fixed'"
        raise ValueError(
            f"norm_of_new({name}={value!r}): expected {expected}, got {value!r}; give {expected}"
        )
    if norm == "fixed":
        return scale
    average = vectors(pair, side).double().norm(dim=1).mean().item()
    if average == 0:
        raise ValueError(
            f"norm_of_new({pair.name}): expected {side} weights that are not all 0, got zeros, "
            "whose mean norm would leave new units without gradient; use norm='fixed'"
        )
    return scale * average


def gradmax_units(
    model: nn.Module,
    wanted: Mapping[GrowthPair, int],
    inputs: Tensor,
    targets: Tensor,
    loss: Loss = nn.functional.cross_entropy,
    *,
    scale: float = 0.5,
    norm: NormRule = "mean",
    kind: CrossTerm = "exact",
    generator: torch.Generator | None = None,
) -> dict[GrowthPair, NewUnits]:
    """Return new units with zero incoming weights whose gradient in them is the largest.

    Args:
        model: The model of the pairs; it is not changed.
        wanted: How many units for each pair.
        inputs: A batch, on which the gradient is the largest.
        targets: Its targets.
        loss: Maps ``(outputs, targets)`` to a scalar.
        scale: See `norm_of_new`.
        norm: See `norm_of_new`.
        kind: See `normlab.growth.directions.cross_term`.
        generator: For directions beyond the rank.

    Returns:
        The weights of new units, the same on all processes.

    Raises:
        ValueError: A pair with batch normalisation or an unclamped ReLU between, or a count that is
            not 1, 2, 3, ...

    Example:
        >>> from normlab.growth.pairs import find_pairs
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        >>> x, y = torch.randn(8, 4), torch.zeros(8, dtype=torch.long)
        >>> (pair,) = find_pairs(model, x).pairs
        >>> units = gradmax_units(model, {pair: 2}, x, y)[pair]
        >>> units.incoming.any().item(), units.outgoing.shape
        (False, torch.Size([2, 2]))
    """
    _check_counts(wanted, "gradmax_units")
    for pair in wanted:
        check_grows_from_zero(pair, "gradmax_units")
    seen = observe(model, wanted, inputs, targets, loss)
    units = {}
    for pair, count in wanted.items():
        matrix = cross_term(pair, seen[pair], kind=kind)
        directions, _ = best_directions(matrix, count, generator)
        size = norm_of_new(pair, scale=scale, norm=norm)
        units[pair] = units_of(pair, count, None, size * directions.T)
        if (group := group_of_several(None)) is not None:
            # Equal on equal hardware without it; a difference would part the replicas for good.
            distributed.broadcast(units[pair].outgoing, src=0, group=group)
    return units


def random_units(
    wanted: Mapping[GrowthPair, int],
    *,
    scale: float = 0.5,
    norm: NormRule = "mean",
    outgoing_zero: bool = False,
    positive: bool = False,
    generator: torch.Generator | None = None,
) -> dict[GrowthPair, NewUnits]:
    """Return new units with a random direction on one side and zeros on the other.

    Args:
        wanted: How many units for each pair.
        scale: See `norm_of_new`.
        norm: See `norm_of_new`.
        outgoing_zero: Whether the outgoing weights are the zeros. Behind zero incoming weights
            batch normalisation has nothing to normalise.
        positive: Whether entries are uniform from 0 to 1, in place of Gaussian.
        generator: For the draws, on the CPU; torch's own by default.

    Raises:
        ValueError: ``outgoing_zero=False`` and a pair with batch normalisation or an unclamped
            ReLU between, or a count that is not 1, 2, 3, ...
    """
    _check_counts(wanted, "random_units")
    side: Side = "incoming" if outgoing_zero else "outgoing"
    draw = torch.rand if positive else torch.randn
    units = {}
    for pair, count in wanted.items():
        if not outgoing_zero:
            check_grows_from_zero(pair, "random_units")
        size = norm_of_new(pair, scale=scale, norm=norm, side=side)
        shape = (count, vectors(pair, side).shape[1])
        drawn = draw(shape, generator=generator, dtype=torch.float64)
        drawn = size * drawn / drawn.norm(dim=1, keepdim=True)
        incoming, outgoing = (drawn, None) if outgoing_zero else (None, drawn)
        units[pair] = units_of(pair, count, incoming, outgoing)
    return units


def units_of(
    pair: GrowthPair, count: int, incoming: Tensor | None, outgoing: Tensor | None
) -> NewUnits:
    """Return new units from the vectors of their weights.

    Args:
        pair: The pair.
        count: How many units.
        incoming: ``(count, weights)``, as `vectors` gives them; None for zeros.
        outgoing: ``(count, weights)``; None for zeros.
    """
    first, second = pair.first.weight, pair.second.weight
    made = first.new_zeros(count, *first.shape[1:])
    read = second.new_zeros(second.shape[0], count, *pair.taps)
    if incoming is not None:
        made = incoming.to(made).view_as(made)
    if outgoing is not None:
        read = outgoing.to(read).view(count, second.shape[0], *pair.taps).transpose(0, 1)
    return NewUnits(made, read.contiguous())


def _check_counts(wanted: Mapping[GrowthPair, int], operation: str) -> None:
    for pair, count in wanted.items():
        if count < 1 or count != int(count):
            raise ValueError(
                f"{operation}(wanted={{{pair.name}: {count!r}}}): expected 1, 2, 3, ... new units, "
                f"got {count!r}; leave out pairs that do not grow"
            )


def check_grows_from_zero(pair: GrowthPair, operation: str) -> None:
    """Refuse a pair in which units with zero incoming weights would not learn.

    Raises:
        ValueError: In the form of the house.
    """
    if pair.normalised:
        raise ValueError(
            f"{operation}({pair.name}): expected no batch normalisation between the layers, got "
            "one, which would divide new units by a deviation of 0; take it out, or use "
            "random_units(outgoing_zero=True)"
        )
    if any(isinstance(step, nn.ReLU | nn.ReLU6) for step in pair.steps):
        raise ValueError(
            f"{operation}({pair.name}): expected an activation with a derivative at zero, got "
            "ReLU, for which torch takes 0; call clamp_relus(model, pairs) and find the pairs anew"
        )
