"""What the optimisers that give each layer its own rate (LARS, LAMB) have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from normlab.optim.arguments import is_number, require
from normlab.optim.tensor_lists import by_kind, in_portions
from normlab.parameter_groups import Group, split_groups
from normlab.surgery.normalisers import find_normalisers

PORTION = 2**20
"""On the host, as many elements are treated at once: 4 MiB in single precision."""


def excluded_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return what neither adapts its rate to its norm nor decays: biases, scales, shifts.

    These are the parameters of at most one axis, those called ``bias`` or, as in standardised
    weights, ``gain``, and those of torch's normalisers and their subclasses.

    Args:
        model: Any module.
    """
    of_norms = {id(p) for found in find_normalisers(model) for p in found.module.parameters()}
    return [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() <= 1
        or name.rpartition(".")[2] in ("bias", "gain")
        or id(parameter) in of_norms
    ]


def exclude_from_adaptation(model: nn.Module, **options: Any) -> list[Group]:
    """Return parameter groups for `LARS` and `LAMB`: weights, then biases and norm parameters.

    The second group has ``adapt=False``, so that its rate is the plain one, and no weight decay.

    Args:
        model: The model; its parameters that need no gradient are left out.
        options: Values of both groups, such as ``lr``.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        >>> groups = exclude_from_adaptation(model, lr=0.1)
        >>> [(len(group["params"]), group.get("adapt", True)) for group in groups]
        [(1, True), (3, False)]
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return split_excluded([{**options, "params": trained}], model)


def split_excluded(groups: list[Group], model: nn.Module) -> list[Group]:
    """Move biases and norm parameters into groups with ``adapt=False`` and no weight decay."""
    return split_groups(groups, excluded_parameters(model), weight_decay=0.0, adapt=False)


class LayerAdaptiveOptimizer(torch.optim.Optimizer):
    """An optimiser whose step treats the tensors of a group at once, kind by kind."""

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, whose values are checked before."""
        self._check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def _check(self, values: Group) -> None:
        """Refuse values of a group that are out of their range."""
        name, lr, decay = type(self).__name__, values["lr"], values["weight_decay"]
        valid = (is_number(lr) or isinstance(lr, Tensor)) and bool(lr >= 0)
        require(valid, name, "lr", lr, "a rate of at least 0")
        valid = is_number(decay) and decay >= 0
        require(valid, name, "weight_decay", decay, "a coefficient of at least 0")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one step.

        Args:
            closure: Computes the loss anew with its gradients; None where they are there.

        Returns:
            What the closure returns, or None.

        Raises:
            ValueError: A gradient is sparse or complex.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            gradients = [weight.grad for weight in weights]
            if any(one.is_sparse or one.is_complex() for one in gradients):
                raise ValueError(
                    f"{type(self).__name__}.step(): expected dense real gradients, got sparse or "
                    "complex ones; use torch.optim.SparseAdam or torch.optim.SGD for these"
                )
            # The state comes last: its tensors lie in lists beside the weights.
            for kind in by_kind([weights, gradients, *self._state_of(weights, group)]):
                on_host = kind[0][0].device.type == "cpu"
                for portion in in_portions(kind, PORTION) if on_host else [kind]:
                    self._update(group, *portion)
        return loss

    def _state_of(self, weights: list[Tensor], group: Group) -> list[list[Tensor]]:
        """Return the state of each weight in lists, made where it is not there yet."""
        raise NotImplementedError

    def _update(self, group: Group, weights: list[Tensor], *lists: list[Tensor]) -> None:
        """Move weights of one device and dtype, given their gradients and state."""
        raise NotImplementedError
