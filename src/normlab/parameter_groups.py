"""What methods ask of an optimiser's parameter groups: split them, check what they hold."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

Group = dict[str, Any]
"""One parameter group as torch's optimisers take it: ``params``, ``lr``, ``weight_decay``, ..."""

GROWTH = "growth"
"""The key of the first group under which a grower keeps its step counter."""


def split_groups(groups: list[Group], chosen: Iterable[Tensor], **changes: Any) -> list[Group]:
    """Move chosen parameters into groups of their own, with some of the group's values changed.

    Args:
        groups: Parameter groups.
        chosen: The parameters to move; those in no group are passed over.
        changes: Values for the new groups. A function is called with the old value, so
            ``lr=lambda lr: 0.1 * lr`` divides each group's own rate.

    Returns:
        New groups that hold every parameter of ``groups`` once, in which the order of the
        parameters is kept; none is empty.
    """
    wanted = {id(parameter) for parameter in chosen}
    result = []
    for group in groups:
        parameters = list(group["params"])  # torch takes a generator as well
        kept = [parameter for parameter in parameters if id(parameter) not in wanted]
        moved = [parameter for parameter in parameters if id(parameter) in wanted]
        if kept:
            result.append({**group, "params": kept})
        if moved:
            values = {
                name: change(group[name]) if callable(change) else change
                for name, change in changes.items()
            }
            result.append({**group, **values, "params": moved})
    return result


def check_no_growth(operation: str, optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimiser under which the network grows: what holds on to parameters loses them.

    Args:
        operation: The method that holds on to them.
        optimizer: The optimiser.

    Raises:
        ValueError: The network grows.
    """
    if GROWTH in optimizer.param_groups[0]:
        raise ValueError(
            f"{operation}(optimizer): expected parameters that stay, got an optimiser under which "
            f"the network grows; train without growth, or without {operation}"
        )


def check_held(
    operation: str, parameters: Iterable[Tensor], *optimizers: torch.optim.Optimizer
) -> None:
    """Refuse optimisers that, together, miss a parameter that trains.

    Args:
        operation: The method that put the parameters into the model.
        parameters: The parameters; those that do not train are passed over.
        optimizers: All optimisers of the model.

    Raises:
        ValueError: The optimisers were built before the method changed the model.
    """
    held = {id(p) for one in optimizers for group in one.param_groups for p in group["params"]}
    if any(parameter.requires_grad and id(parameter) not in held for parameter in parameters):
        raise ValueError(
            f"{operation}(optimizer): expected an optimiser of the model's present parameters, got "
            f"one built before {operation} changed them; build it after"
        )
