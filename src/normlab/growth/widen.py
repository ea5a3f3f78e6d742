"""Make a layer wider in the middle of training, together with the state of its optimiser.

Parameters are replaced by larger ones: the old ones, in which an autograd graph may still be
alive, are left as they are. All new tensors are built before the first one is put in place, so a
growth that is refused or runs out of memory leaves model and optimiser as they were.

What holds references to the old parameters does not follow: `DistributedDataParallel` has to wrap
the model anew after a growth, and hooks on single parameters are gone. Hooks on modules and on
the optimiser stay.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from normlab.growth.pairs import Convolution, GrowthPair, centre
from normlab.growth.replace_tensors import Key, buffers_of, check_state, fit, like, replace_tensors
from normlab.parameter_groups import check_held


class NewUnits(NamedTuple):
    """The weights of k new units of a pair.

    Attributes:
        incoming: What the first layer makes them of: ``(k, in, *kernel)``.
        outgoing: How the second layer reads them: ``(out, k, *taps)``.
    """

    incoming: Tensor
    outgoing: Tensor

    @property
    def num_units(self) -> int:
        """The number k."""
        return len(self.incoming)


class Slot(NamedTuple):
    """A tensor that has an entry, or several, for each unit of a pair.

    Attributes:
        module: The module that registers it.
        name: Its name there.
        dim: The dimension along which the units lie.
        per_unit: How many positions along it a unit has.
        fill: The value for new units; ``"incoming"``, ``"outgoing"``, or ``"centre"`` for a kernel
            that returns its middle value.
    """

    module: nn.Module
    name: str
    dim: int
    per_unit: int
    fill: float | str

    @property
    def key(self) -> Key:
        """Module and name."""
        return self.module, self.name

    @property
    def tensor(self) -> Tensor:
        """The tensor as it is now, apart from any graph."""
        return getattr(self.module, self.name).detach()


def slots(pair: GrowthPair) -> list[Slot]:
    """Return every parameter and buffer of a model that depends on a pair's width."""
    positions = 1 if isinstance(pair.second, Convolution) else pair.num_taps
    found = [
        Slot(pair.first, "weight", 0, 1, "incoming"),
        Slot(pair.first, "bias", 0, 1, 0.0),
        Slot(pair.second, "weight", 1, positions, "outgoing"),
    ]
    for norm in pair.norms:
        found += [
            Slot(norm, "weight", 0, 1, 1.0),
            Slot(norm, "bias", 0, 1, 0.0),
            Slot(norm, "running_mean", 0, 1, 0.0),
            Slot(norm, "running_var", 0, 1, 1.0),
        ]
    for layer in pair.depthwise:
        found += [Slot(layer, "weight", 0, 1, "centre"), Slot(layer, "bias", 0, 1, 0.0)]
    return [slot for slot in found if getattr(slot.module, slot.name, None) is not None]


def widen(
    model: nn.Module,
    growths: Mapping[GrowthPair, NewUnits],
    optimizers: Iterable[torch.optim.Optimizer] = (),
    *,
    max_parameters: int | None = None,
    max_bytes: int | None = None,
) -> None:
    """Add units to pairs of layers; what lies between grows as the identity.

    Biases of new units are 0, normalisers have gain 1, shift 0, running mean 0 and variance 1, and
    depth-wise kernels are 1 in the middle. The optimisers' groups and state are kept; entries for
    new weights are what a first step finds: 0, the weight itself in averages and slow copies of it,
    the initial value of Adagrad, the rate of Rprop.

    Args:
        model: The model of the pairs, changed in place.
        growths: For each pair that grows its new units. Where neighbouring pairs grow at once, the
            new weights between new units of both are 0 and need not be given.
        optimizers: Optimisers of its parameters, changed in place.
        max_parameters: The most parameters that the model may have after it.
        max_bytes: The most memory that the growth may take, see `growth_bytes`.

    Raises:
        ValueError: A limit would be passed, new units have another shape, or an optimiser does not
            hold the weights or keeps state that cannot grow. Nothing is changed then.

    Example:
        >>> from normlab.growth.pairs import find_pairs
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        >>> (pair,) = find_pairs(model, torch.zeros(2, 4)).pairs
        >>> widen(model, {pair: NewUnits(torch.zeros(5, 4), torch.randn(2, 5))})
        >>> model
        Sequential(
          (0): Linear(in_features=4, out_features=8, bias=True)
          (1): Tanh()
          (2): Linear(in_features=8, out_features=2, bias=True)
        )
    """
    optimizers = tuple(optimizers)
    counts = {pair: units.num_units for pair, units in growths.items()}
    _check_shapes(growths)
    for optimizer in optimizers:
        check_state(optimizer)
    if optimizers:
        check_holds(optimizers, growths, "widen")
    check_limits(model, counts, optimizers, max_parameters=max_parameters, max_bytes=max_bytes)
    planned: dict[Key, Tensor] = {}
    for pair, units in growths.items():
        for slot in slots(pair):
            old = planned.get(slot.key, slot.tensor)
            planned[slot.key] = _grown(old, slot, units)
    replace_tensors(planned, optimizers)
    for pair in growths:
        sync_sizes(pair)


def check_limits(
    model: nn.Module,
    counts: Mapping[GrowthPair, int],
    optimizers: Iterable[torch.optim.Optimizer] = (),
    *,
    max_parameters: int | None = None,
    max_bytes: int | None = None,
) -> None:
    """Refuse a growth beyond a limit, before anything is computed for it.

    Args:
        model: The model.
        counts: For each pair the number of new units.
        optimizers: Optimisers of its parameters.
        max_parameters: The most parameters that the model may have after it.
        max_bytes: The most memory that the growth may take, see `growth_bytes`.

    Raises:
        ValueError: In the form of the house.
    """
    total = sum(p.numel() for p in model.parameters()) + added_parameters(counts)
    if max_parameters is not None and total > max_parameters:
        raise ValueError(
            f"widen(max_parameters={max_parameters}): expected at most {max_parameters} "
            f"parameters, got a growth to {total}; add fewer units or raise the limit"
        )
    needed = growth_bytes(counts, optimizers)
    if max_bytes is not None and needed > max_bytes:
        raise ValueError(
            f"widen(max_bytes={max_bytes}): expected a growth that takes at most {max_bytes} "
            f"bytes, got one of {needed}; add fewer units or raise the limit"
        )


def narrow(pair: GrowthPair, width: int) -> None:
    r"""Keep the first units of a pair, and what the second layer's outputs vary by.

    What the second layer reads of each unit is multiplied by :math:`\sqrt{C / width}`, so that for
    freshly drawn weights its outputs have the variance that they had with all C units.

    Args:
        pair: The pair; its layers are changed in place, before an optimiser is made for them.
        width: How many units to keep, from 1 to all.

    Raises:
        ValueError: Another width.
    """
    if not 1 <= width <= pair.width:
        raise ValueError(
            f"narrow({pair.name}, width={width}): expected 1 to {pair.width} units, got {width}; "
            "give a smaller width"
        )
    factor = math.sqrt(pair.width / width)
    planned: dict[Key, Tensor] = {}
    for slot in slots(pair):
        old = slot.tensor
        kept = old.narrow(slot.dim, 0, width * slot.per_unit)
        planned[slot.key] = like(old, kept.shape).copy_(
            kept * factor if slot.fill == "outgoing" else kept
        )
    replace_tensors(planned)
    sync_sizes(pair)


def added_parameters(counts: Mapping[GrowthPair, int]) -> int:
    """Return how many parameters a growth adds.

    Args:
        counts: For each pair the number of new units.
    """
    return sum(
        math.prod(shape) - getattr(module, name).numel()
        for (module, name), shape in _planned_shapes(counts).items()
        if name in module._parameters
    )


def growth_bytes(
    counts: Mapping[GrowthPair, int], optimizers: Iterable[torch.optim.Optimizer] = ()
) -> int:
    """Return how much memory a growth takes while it happens: old and new tensors are both there.

    Args:
        counts: For each pair the number of new units.
        optimizers: Optimisers, of whose state the same holds.
    """
    optimizers = tuple(optimizers)
    total = 0
    for (module, name), shape in _planned_shapes(counts).items():
        old = getattr(module, name)
        sizes = [old.element_size()]
        for optimizer in optimizers:
            sizes += [value.element_size() for value in buffers_of(optimizer, old).values()]
        total += math.prod(shape) * sum(sizes)
    return total


def sync_sizes(pair: GrowthPair) -> None:
    """Set the sizes that the modules of a pair keep as numbers, after their tensors changed."""
    for layer in (pair.first, pair.second):
        if isinstance(layer, nn.Linear):
            layer.out_features, layer.in_features = layer.weight.shape
        else:
            layer.out_channels, layer.in_channels = layer.weight.shape[:2]
    for norm in pair.norms:
        norm.num_features = pair.width  # pyright: ignore[reportArgumentType]
    for layer in pair.depthwise:
        layer.in_channels = layer.out_channels = layer.groups = pair.width


def check_holds(
    optimizers: Iterable[torch.optim.Optimizer], pairs: Iterable[GrowthPair], operation: str
) -> None:
    """Refuse optimisers that do not hold the trained weights of pairs, with the operation's name.

    Raises:
        ValueError: In the form of the house.
    """
    found = [
        module._parameters.get(name)
        for pair in pairs
        for module, name in {slot.key for slot in slots(pair)}
    ]
    check_held(operation, (one for one in found if one is not None), *optimizers)


def _planned_shapes(counts: Mapping[GrowthPair, int]) -> dict[Key, list[int]]:
    shapes: dict[Key, list[int]] = {}
    for pair, count in counts.items():
        for slot in slots(pair):
            shape = shapes.setdefault(slot.key, list(slot.tensor.shape))
            shape[slot.dim] += count * slot.per_unit
    return shapes


def _grown(old: Tensor, slot: Slot, units: NewUnits) -> Tensor:
    """Return a tensor with entries for new units behind those it has."""
    shape = list(old.shape)
    shape[slot.dim] += units.num_units * slot.per_unit
    new = fit(old, shape)
    added = new.narrow(slot.dim, old.shape[slot.dim], units.num_units * slot.per_unit)
    if slot.fill == "centre":
        assert isinstance(slot.module, Convolution)
        added[(slice(None), 0, *centre(slot.module))] = 1
    elif isinstance(slot.fill, str):
        incoming = slot.fill == "incoming"
        block = units.incoming if incoming else units.outgoing
        if not incoming and slot.per_unit > 1:
            block = block.flatten(1)
        # A neighbouring pair may have grown this layer's other side before.
        added.copy_(fit(block.to(added), added.shape))
    else:
        added.fill_(slot.fill)
    return new


def _check_shapes(growths: Mapping[GrowthPair, NewUnits]) -> None:
    for pair, units in growths.items():
        first, second = pair.first.weight.shape, pair.second.weight.shape
        for name, block, wanted in (
            ("incoming", units.incoming, (units.num_units, *first[1:])),
            ("outgoing", units.outgoing, (second[0], units.num_units, *pair.taps)),
        ):
            if tuple(block.shape) != tuple(wanted):
                raise ValueError(
                    f"widen({pair.name}, {name}): expected shape {tuple(wanted)}, got "
                    f"{tuple(block.shape)}; give weights of as many new units on both sides"
                )
