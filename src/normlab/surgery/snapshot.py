"""Remember a model and its optimisers as they are, and put them back exactly.

A snapshot holds the modules' own dictionaries (children, parameters, buffers, hooks, modes, plain
attributes), a copy of every tensor's values, and the optimisers' groups and state. Restoring it
gives back the same objects: whoever holds a reference to a parameter or a module goes on holding
the right one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter


class Snapshot:
    """A model and its optimisers at one moment.

    The tensors are copied, so a snapshot takes as much memory as the model and the optimisers'
    state.

    Args:
        model: The model.
        optimizers: Optimisers of its parameters.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> snapshot = Snapshot(model)
        >>> model[1] = nn.ELU()
        >>> nn.init.zeros_(model[0].weight).sum().item()
        0.0
        >>> type(snapshot.restore()[1]).__name__, bool(model[0].weight.any())
        ('ReLU', True)
    """

    def __init__(self, model: nn.Module, optimizers: Iterable[torch.optim.Optimizer] = ()) -> None:
        self.model = model
        self.optimizers = tuple(optimizers)
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        buffers = dict(model.named_buffers(remove_duplicate=False))
        self._dictionaries = {
            module: (type(module), _copied(module.__dict__)) for module in self.modules.values()
        }
        tensors = {id(tensor): tensor for tensor in (*self.parameters.values(), *buffers.values())}
        self._tensors = [_SavedTensor(tensor) for tensor in tensors.values()]
        self._values = {id(saved.tensor): saved for saved in self._tensors}
        self._optimizers = [_SavedOptimizer(optimizer) for optimizer in self.optimizers]

    def values_of(self, tensor: Tensor) -> Tensor | None:
        """Return the values that a tensor of the model had; None if it was not the model's."""
        saved = self._values.get(id(tensor))
        return None if saved is None else saved.values

    def attributes_of(self, module: nn.Module) -> dict[str, Any]:
        """Return the attributes that a module of the model had."""
        return self._dictionaries[module][1]

    def restore(self) -> nn.Module:
        """Put everything back and return the model."""
        for module, (kind, attributes) in self._dictionaries.items():
            module.__class__ = kind
            module.__dict__.clear()
            module.__dict__.update(_copied(attributes))
        for saved in (*self._tensors, *self._optimizers):
            saved.restore()
        return self.model


class _SavedTensor:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._lazy = isinstance(tensor, (UninitializedBuffer, UninitializedParameter))
        self.values = None if self._lazy else tensor.detach().clone()
        # The same storage: others may hold a view of it.
        self._storage = tensor.data
        self._requires_grad = tensor.requires_grad
        grad = tensor.grad if tensor.is_leaf else None
        self._grad = None if grad is None else _SavedTensor(grad)

    def restored(self) -> Tensor:
        self.restore()
        return self.tensor

    def restore(self) -> None:
        if self._lazy:
            return
        assert self.values is not None
        self._storage.copy_(self.values)
        self.tensor.data = self._storage
        if self.tensor.is_leaf:
            self.tensor.requires_grad_(self._requires_grad)
            self.tensor.grad = None if self._grad is None else self._grad.restored()


class _SavedOptimizer:
    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._groups = [{**group, "params": list(group["params"])} for group in _groups(optimizer)]
        self._state = {
            parameter: {name: _cloned(value) for name, value in state.items()}
            for parameter, state in optimizer.state.items()
        }

    def restore(self) -> None:
        # The list itself stays: schedulers hold it.
        self._optimizer.param_groups[:] = [
            {**group, "params": list(group["params"])} for group in self._groups
        ]
        self._optimizer.state.clear()
        for parameter, state in self._state.items():
            self._optimizer.state[parameter] = {
                name: _cloned(value) for name, value in state.items()
            }


def _groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return optimizer.param_groups


def _copied(attributes: dict[str, Any]) -> dict[str, Any]:
    """Return a module's attributes with the containers among them copied, their contents not."""
    return {
        name: value.copy() if isinstance(value, (dict, list, set)) else value
        for name, value in attributes.items()
    }


def _cloned(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
