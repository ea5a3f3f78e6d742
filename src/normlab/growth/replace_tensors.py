"""Put tensors of another size in the place of parameters, in modules and in optimisers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_FOLLOWS_WEIGHT = ("slow_weight", "ax")
"""State that is a copy or an average of the weight: that of Lookahead and of averaged SGD."""

Key = tuple[nn.Module, str]
"""A parameter or buffer: the module that registers it, and its name there."""


def replace_tensors(
    tensors: Mapping[Key, Tensor], optimizers: Iterable[torch.optim.Optimizer] = ()
) -> None:
    """Put tensors in the place of parameters and buffers, in modules and optimisers.

    The optimisers' groups and their order stay; state in a parameter's shape is cut or filled up to
    the new one as `widen` says, all other state is kept.

    Args:
        tensors: The new values by module and name.
        optimizers: Optimisers that may hold the old parameters.
    """
    optimizers = tuple(optimizers)
    parameters: dict[nn.Parameter, nn.Parameter] = {}
    states: list[tuple[torch.optim.Optimizer, nn.Parameter, dict[str, Any]]] = []
    for (module, name), tensor in tensors.items():
        old = module._parameters.get(name)
        if old is None:
            continue
        parameters[old] = nn.Parameter(tensor, requires_grad=old.requires_grad)
        for optimizer in optimizers:
            if old in optimizer.state:
                buffers = buffers_of(optimizer, old).items()
                fitted = {
                    kind: fit(value, tensor.shape, _first_value(kind, optimizer, old, tensor))
                    for kind, value in buffers
                }
                states.append((optimizer, old, {**optimizer.state[old], **fitted}))
    # From here on nothing takes memory or can fail.
    for (module, name), tensor in tensors.items():
        if name in module._parameters:
            old = module._parameters[name]
            assert old is not None
            module._parameters[name] = parameters[old]
        else:
            module._buffers[name] = tensor
    for optimizer, old, state in states:
        del optimizer.state[old]
        optimizer.state[parameters[old]] = state
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [parameters.get(one, one) for one in group["params"]]


def _first_value(
    kind: str, optimizer: torch.optim.Optimizer, old: nn.Parameter, new: Tensor
) -> Tensor | float:
    """Return what a state holds for a weight before its first step."""
    if kind in _FOLLOWS_WEIGHT:
        return new
    group = next(
        group for group in optimizer.param_groups if any(one is old for one in group["params"])
    )
    if kind == "sum" and "initial_accumulator_value" in group:
        return group["initial_accumulator_value"]
    if kind == "step_size" and "step_sizes" in group:
        return float(group["lr"])
    return 0.0


def fit(values: Tensor, shape: Sequence[int], fill: Tensor | float = 0.0) -> Tensor:
    """Return values cut, or filled up at the ends, to a shape of as many dimensions."""
    result = like(values, shape)
    if isinstance(fill, Tensor) or fill != 0:
        result.copy_(fill if isinstance(fill, Tensor) else torch.tensor(fill))
    common = tuple(slice(0, min(one, two)) for one, two in zip(values.shape, shape, strict=True))
    result[common] = values[common]
    return result


def check_state(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimiser whose state is not in the shape of its parameters.

    Raises:
        ValueError: In the form of the house.
    """
    for parameter, state in optimizer.state.items():
        values = state.values() if isinstance(parameter, Tensor) else ()
        for value in values:
            if isinstance(value, Tensor) and value.numel() > 1 and value.shape != parameter.shape:
                raise ValueError(
                    f"widen(optimizer={type(optimizer).__name__}): expected state with one value "
                    f"for each entry of a parameter, got shape {tuple(value.shape)} for "
                    f"{tuple(parameter.shape)}; use SGD, Adam or AdamW"
                )


def buffers_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """Return the state of a parameter that has one value for each of its entries."""
    state = optimizer.state.get(parameter, {})
    return {
        name: value
        for name, value in state.items()
        if isinstance(value, Tensor) and value.dim() == parameter.dim() > 0
    }


def like(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Return zeros of another shape, with type, device and memory layout of a tensor."""
    zeros = tensor.new_zeros(tuple(shape))
    if tensor.dim() == 4 and not tensor.is_contiguous():
        return zeros.contiguous(memory_format=torch.channels_last)
    return zeros
