"""Passes that show how the units of a pair of layers are read, whatever operations do it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from normlab.surgery.flow import evaluating, tensors_in, uncompiled

if TYPE_CHECKING:
    from normlab.growth.pairs import GrowthPair

FLATTENING = ("flatten", "view", "reshape")
"""The functions that may hand a linear layer all positions of a unit."""


def read_elsewhere(model: nn.Module, inputs: tuple[Any, ...], pair: GrowthPair) -> bool:
    """Return whether the outputs depend on the units in another way than through the pair."""
    units: list[Tensor] = []

    def begin(module: nn.Module, given: Any, output: Tensor) -> Tensor:
        units.append(output.detach().requires_grad_())
        return units[-1].clone()

    handles = [
        pair.first.register_forward_hook(begin),
        pair.second.register_forward_hook(lambda module, given, output: output.detach()),
    ]
    try:
        with evaluating(model), uncompiled(), torch.enable_grad():
            outputs = [one for one in tensors_in(model(*inputs)) if one.requires_grad]
            total = sum(one.double().sum() for one in outputs)
            if not isinstance(total, Tensor) or not units:
                return False
            return torch.autograd.grad(total, units[0], allow_unused=True)[0] is not None
    finally:
        for handle in handles:
            handle.remove()


class _Arrived(Exception):
    """The input of a pair's second layer, which ends the pass."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor


def follows_width(model: nn.Module, inputs: tuple[Any, ...], pair: GrowthPair) -> bool:
    """Return whether the functions between a pair hand a new unit on behind all others."""
    if not any(step in (*FLATTENING, "mean") for step in pair.steps):
        return True  # modules were looked at one by one
    axis = -1 if isinstance(pair.second, nn.Linear) else 1
    drawn: list[Tensor] = []

    def arriving(units: int) -> Tensor:
        def begin(module: nn.Module, given: Any, output: Tensor) -> Tensor:
            if not drawn:
                shape = (len(output), pair.width + 1, *output.shape[2:])
                drawn.append(torch.randn(shape).to(output))
            return drawn[0][:, :units]

        def cut(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (given[0][:, : pair.width],)

        def append(module: nn.Module, given: Any, output: Tensor) -> Tensor:
            # Some values for the units that the layer, being of the old size, was not given.
            return torch.cat([output, output[:, : units - pair.width] + 1], 1)

        def end(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            raise _Arrived(given[0] if given else named["input"])

        handles = [pair.first.register_forward_hook(begin)]
        handles.append(pair.second.register_forward_pre_hook(end, with_kwargs=True))
        for step in (*pair.norms, *pair.depthwise):
            handles.append(step.register_forward_pre_hook(cut))
            handles.append(step.register_forward_hook(append))
        try:
            with evaluating(model), uncompiled(), torch.no_grad(), torch.random.fork_rng([]):
                model(*inputs)
        except _Arrived as arrived:
            return arrived.tensor
        finally:
            for handle in handles:
                handle.remove()
        raise AssertionError(f"{pair.name}: its reader was called while the pair was looked for")

    before = arriving(pair.width)
    try:
        after = arriving(pair.width + 1)
    except RuntimeError:
        return False
    size = before.shape[axis]
    wanted = list(before.shape)
    wanted[axis] += size // pair.width
    return list(after.shape) == wanted and torch.allclose(after.narrow(axis, 0, size), before)
