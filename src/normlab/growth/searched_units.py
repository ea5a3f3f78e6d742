"""New units that are searched for: the slow rivals of GradMax, for one pair of layers at a time.

`gradmax_opt` looks for the same units as GradMax by gradient ascent, and also where no singular
vectors give them: with zero outgoing weights, behind batch normalisation or any activation.
`firefly` trains the new units alone before they join.

Source: U. Evci, B. van Merrienboer, T. Unterthiner, M. Vladymyrov, F. Pedregosa, "GradMax: Growing
Neural Networks using Gradient Information", 2022, arXiv 2201.05125; after L. Wu, B. Liu, P. Stone,
Q. Liu, "Firefly Neural Architecture Descent", 2020, arXiv 2102.08574.

Departs:
    - Adam is given the part of the gradient that is orthogonal to the weights of each unit; the
      other part is lost in the projection, but not on Adam.
    - The step size of the search is not stated in the paper: 0.1 of the norm of the weights.
    - `firefly` neither splits units nor keeps a pool of candidates, as in the paper on GradMax. The
      side that starts at zero may grow to the norm that random units have there; without a bound
      the search would train the network on its one batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from normlab.growth.directions import Loss
from normlab.growth.new_units import (
    NormRule,
    Side,
    check_grows_from_zero,
    norm_of_new,
    units_of,
    vectors,
)
from normlab.growth.pairs import GrowthPair
from normlab.growth.widen import NewUnits, widen


def gradmax_opt(
    model: nn.Module,
    pair: GrowthPair,
    count: int,
    inputs: Tensor,
    targets: Tensor,
    loss: Loss = nn.functional.cross_entropy,
    *,
    outgoing_zero: bool = False,
    num_steps: int = 100,
    lr: float = 0.1,
    scale: float = 0.5,
    norm: NormRule = "mean",
    generator: torch.Generator | None = None,
) -> NewUnits:
    """Search for the new units whose zero weights get the largest gradient.

    With several units this drifts towards copies of the first singular vector: each unit has its
    own norm, and nothing keeps them apart.

    Args:
        model: The model of the pair; it is not changed.
        pair: The pair.
        count: How many units.
        inputs: A batch.
        targets: Its targets.
        loss: Maps ``(outputs, targets)`` to a scalar.
        outgoing_zero: Whether the outgoing weights are zero and the incoming ones searched for.
        num_steps: Steps of Adam.
        lr: Its step size, as a share of the norm.
        scale: See `normlab.growth.new_units.norm_of_new`.
        norm: See there.
        generator: For the start, on the CPU.

    Raises:
        ValueError: Zero incoming weights, and batch normalisation or an unclamped ReLU between.
    """
    if not outgoing_zero:
        check_grows_from_zero(pair, "gradmax_opt")
    side: Side = "incoming" if outgoing_zero else "outgoing"
    size = norm_of_new(pair, scale=scale, norm=norm, side=side)
    loss_of = _loss_of_units(model, pair, count, inputs, targets, loss)
    other: Side = "outgoing" if outgoing_zero else "incoming"
    zeros = torch.zeros(count, vectors(pair, other).shape[1]).to(pair.first.weight)

    def objective(direction: Tensor) -> Tensor:
        still = zeros.clone().requires_grad_()
        found = _sides(size * _unit(direction), still, outgoing_zero)
        (gradient,) = torch.autograd.grad(loss_of(*found), still, create_graph=True)
        return -gradient.norm()

    direction = _start(pair, side, count, generator).requires_grad_()
    optimizer = torch.optim.Adam([direction], lr=lr)
    for _ in range(num_steps):
        with torch.enable_grad():
            (direction.grad,) = torch.autograd.grad(objective(direction), direction)
        optimizer.step()
        _project(direction)
    return units_of(pair, count, *_sides(size * direction.detach(), None, outgoing_zero))


def firefly(
    model: nn.Module,
    pair: GrowthPair,
    count: int,
    inputs: Tensor,
    targets: Tensor,
    loss: Loss = nn.functional.cross_entropy,
    *,
    outgoing_zero: bool = False,
    num_steps: int = 100,
    lr: float = 0.1,
    scale: float = 0.5,
    norm: NormRule = "mean",
    generator: torch.Generator | None = None,
) -> NewUnits:
    """Search for the new units that lower the loss most; they change the function at once.

    Args:
        model: The model of the pair; it is not changed.
        pair: The pair.
        count: How many units.
        inputs: A batch.
        targets: Its targets.
        loss: Maps ``(outputs, targets)`` to a scalar.
        outgoing_zero: Whether the outgoing weights are those that start at zero.
        num_steps: Steps of Adam.
        lr: Its step size, as a share of the norm.
        scale: See `normlab.growth.new_units.norm_of_new`.
        norm: See there; the side that starts at zero has at most the norm that it gives.
        generator: For the start, on the CPU.

    Raises:
        ValueError: Zero incoming weights, and batch normalisation or an unclamped ReLU between.
    """
    if not outgoing_zero:
        check_grows_from_zero(pair, "firefly")
    side: Side = "incoming" if outgoing_zero else "outgoing"
    other: Side = "outgoing" if outgoing_zero else "incoming"
    sizes = [norm_of_new(pair, scale=scale, norm=norm, side=one) for one in (side, other)]
    loss_of = _loss_of_units(model, pair, count, inputs, targets, loss)
    direction = _start(pair, side, count, generator).requires_grad_()
    shape = (count, vectors(pair, other).shape[1])
    bounded = torch.zeros(shape).to(direction).requires_grad_()
    optimizer = torch.optim.Adam([direction, bounded], lr=lr)
    for _ in range(num_steps):
        optimizer.zero_grad()
        with torch.enable_grad():
            found = _sides(sizes[0] * _unit(direction), sizes[1] * bounded, outgoing_zero)
            value = loss_of(*found)
            direction.grad, bounded.grad = torch.autograd.grad(value, [direction, bounded])
        optimizer.step()
        _project(direction)
        with torch.no_grad():
            bounded /= bounded.norm(dim=1, keepdim=True).clamp_min(1)
    found = _sides(sizes[0] * direction.detach(), sizes[1] * bounded.detach(), outgoing_zero)
    return units_of(pair, count, *found)


def _sides(
    chosen: Tensor, other: Tensor | None, outgoing_zero: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return incoming and outgoing weights."""
    return (chosen, other) if outgoing_zero else (other, chosen)


def _start(pair: GrowthPair, side: Side, count: int, generator: torch.Generator | None) -> Tensor:
    drawn = torch.randn(count, vectors(pair, side).shape[1], generator=generator)
    return nn.functional.normalize(drawn, dim=1).to(pair.first.weight)


def _unit(direction: Tensor) -> Tensor:
    # Of unit norm already: this takes the part of the gradient along the direction away, which
    # Adam, that scales every entry by itself, would turn into a pull towards equal entries.
    return nn.functional.normalize(direction, dim=1)


@torch.no_grad()
def _project(direction: Tensor) -> None:
    direction /= direction.norm(dim=1, keepdim=True)


def _loss_of_units(
    model: nn.Module,
    pair: GrowthPair,
    count: int,
    inputs: Tensor,
    targets: Tensor,
    loss: Loss,
) -> Callable[[Tensor | None, Tensor | None], Tensor]:
    """Return the loss as a function of the new units' weights, on a copy of the model."""
    # The copy's own statistics may move.
    twin, own = copy.deepcopy((model, pair))
    first, second = own.first.weight.detach(), own.second.weight.detach()
    widen(twin, {own: units_of(own, count, None, None)})
    names = {module: name for name, module in twin.named_modules()}
    keys = [f"{names[layer]}.weight".removeprefix(".") for layer in (own.first, own.second)]

    def compute(incoming: Tensor | None, outgoing: Tensor | None) -> Tensor:
        assert incoming is not None
        assert outgoing is not None
        # A unit's outgoing weights stand behind those of the units before it.
        read = outgoing.view(count, second.shape[0], -1).transpose(0, 1)
        read = read.reshape(second.shape[0], -1, *second.shape[2:])
        weights = (
            torch.cat([first, incoming.view(count, *first.shape[1:])]),
            torch.cat([second, read], 1),
        )
        with torch.random.fork_rng([inputs.device] if inputs.device.type == "cuda" else []):
            outputs = functional_call(twin, dict(zip(keys, weights, strict=True)), (inputs,))
        return loss(outputs[0] if isinstance(outputs, tuple) else outputs, targets)

    return compute
