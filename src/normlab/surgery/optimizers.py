"""Let optimisers made before a surgery go on with the parameters that the model has after it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import inf
from typing import Any, NamedTuple

import torch
from torch import nn


def repoint(
    optimizers: Iterable[torch.optim.Optimizer],
    before: Mapping[str, nn.Parameter],
    model: nn.Module,
) -> None:
    """Give each new parameter the group of the one in whose place it stands; drop those gone.

    A parameter that is still in the model keeps its group, its place and its state. A new one joins
    the group of the old parameter of the same name, else that of a parameter of the module that it
    replaces or lies in, else the one group that held all that is gone, or the only group.

    Args:
        optimizers: Optimisers whose groups are changed in place.
        before: The model's parameters before the surgery, by qualified name.
        model: The model after it.

    Raises:
        ValueError: There are several groups and nothing says which one a new parameter belongs to.
            No optimiser is changed then.
    """
    optimizers = tuple(optimizers)
    after = dict(model.named_parameters())
    mine = {id(parameter) for parameter in before.values()}
    new = {name: parameter for name, parameter in after.items() if id(parameter) not in mine}
    present = {id(parameter) for parameter in after.values()}
    places = {
        id(parameter): _Place(which, number, position)
        for which, optimizer in enumerate(optimizers)
        for number, group in enumerate(optimizer.param_groups)
        for position, parameter in enumerate(group["params"])
    }
    named = {name: places[id(p)] for name, p in before.items() if id(p) in places}
    if not named:
        return
    gone = {places[id(p)][:2] for p in before.values() if id(p) in places and id(p) not in present}
    joined = {name: _place_of(name, named, gone) for name in new}
    for which, optimizer in enumerate(optimizers):
        for number, group in enumerate(optimizer.param_groups):
            into = {n: place for n, place in joined.items() if place[:2] == (which, number)}
            _rebuild(group, optimizer, into, new, mine - present)


class _Place(NamedTuple):
    """Where a parameter stands: number of the optimiser, of the group, and position in it."""

    optimizer: int
    group: int
    position: float


def _place_of(name: str, named: Mapping[str, _Place], gone: set[tuple[int, int]]) -> _Place:
    """Return the place after which a new parameter goes."""
    if name in named:
        return named[name]
    module = name.rpartition(".")[0]
    near: list[_Place] = []
    # The module itself, then the containers around it, up to the first that held anything.
    while module and not near:
        near = [place for old, place in named.items() if old.startswith(f"{module}.")]
        module = module.rpartition(".")[0]
    for fitting in ({place[:2] for place in near}, gone, {place[:2] for place in named.values()}):
        if len(fitting) == 1:
            (group,) = fitting
            return _Place(*group, max((p.position for p in near if p[:2] == group), default=inf))
    raise ValueError(
        f"convert(optimizers): expected one group for the new parameter {name!r}, got several that "
        "fit; make the optimiser after the conversion"
    )


def _rebuild(
    group: dict[str, Any],
    optimizer: torch.optim.Optimizer,
    into: Mapping[str, _Place],
    new: Mapping[str, nn.Parameter],
    gone: set[int],
) -> None:
    """Put new parameters into a group and take those that are gone out of it."""
    names = {id(parameter): name for name, parameter in new.items()}
    if "param_names" in group:
        names |= dict(zip(map(id, group["params"]), group["param_names"], strict=True))
    places = [(float(position), old) for position, old in enumerate(group["params"])]
    places += [(place.position, new[name]) for name, place in into.items()]
    ordered = [parameter for _, parameter in sorted(places, key=lambda pair: pair[0])]
    for parameter in ordered:
        if id(parameter) in gone:
            optimizer.state.pop(parameter, None)
    group["params"] = [parameter for parameter in ordered if id(parameter) not in gone]
    if "param_names" in group:
        group["param_names"] = [names[id(parameter)] for parameter in group["params"]]
