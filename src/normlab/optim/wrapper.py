"""An optimiser around another one, which shares everything with it."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from typing import Any

import torch

from normlab.optim.arguments import require
from normlab.parameter_groups import Group

_STEP_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
_STATE_HOOKS = (
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


class OptimizerWrapper(torch.optim.Optimizer):
    """Shares groups, state, defaults and hooks of the optimiser that it wraps.

    A schedule of the learning rate, a hook or a checkpoint may therefore take either of the two,
    and finds the same. A step hook runs around the step of the optimiser that is wrapped, where the
    gradients are those that are applied. As in torch, hooks are not copied or pickled.

    Args:
        optimizer: Any optimiser, another wrapper included.

    Attributes:
        base: The optimiser that is wrapped.
        needs_closure: Whether a step takes passes of its own.

    Raises:
        ValueError: What is wrapped is no optimiser of torch's kind.
    """

    base: torch.optim.Optimizer
    needs_closure = False

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        _check_kind(type(self).__name__, optimizer)
        # Not torch's own constructor, which would make groups and state of its own.
        self.__setstate__({"base": optimizer})

    def __getstate__(self) -> dict[str, Any]:
        hooks = (*_STEP_HOOKS, *_STATE_HOOKS)
        # A scheduler of torch's puts a bound `step` on the object.
        return {k: v for k, v in vars(self).items() if k not in hooks and k != "step"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for name in (*_STEP_HOOKS, *_STATE_HOOKS):
            setattr(self, name, getattr(self.base, name))

    def _run_hooks_around_own_step(self) -> None:
        """Have step hooks that are registered here run around this object's step."""
        for name in _STEP_HOOKS:
            setattr(self, name, OrderedDict())
        self._patch_step_function()

    @property
    def param_groups(self) -> list[Group]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The groups."""
        return self.base.param_groups

    @property
    def state(self) -> defaultdict[torch.Tensor, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The state by parameter."""
        return self.base.state

    @property
    def defaults(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The values of a group that names none."""
        return self.base.defaults

    def add_param_group(self, param_group: Group) -> None:
        """Add a group."""
        self.base.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, or set them to zero."""
        self.base.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return groups and state as plain data."""
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over groups and state from plain data."""
        self.base.load_state_dict(state_dict)


def unwrapped(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """Return an optimiser and those that it wraps, from the outermost to the innermost."""
    found = [optimizer]
    while isinstance(found[-1], OptimizerWrapper):
        found.append(found[-1].base)
    return found


def check_needs_no_closure(operation: str, optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimiser whose step needs a closure, or that wraps such a one.

    Args:
        operation: The wrapper, which takes steps without one.
        optimizer: The optimiser to be wrapped.

    Raises:
        ValueError: Its step needs one, or it is no optimiser.
    """
    _check_kind(operation, optimizer)
    for one in unwrapped(optimizer):
        if isinstance(one, torch.optim.LBFGS) or getattr(one, "needs_closure", False):
            raise ValueError(
                f"{operation}(optimizer): expected an optimiser whose step needs no closure, got "
                f"{type(one).__name__}; let the one that needs a closure be outermost, and alone"
            )


def _check_kind(operation: str, optimizer: Any) -> None:
    valid, kind = isinstance(optimizer, torch.optim.Optimizer), type(optimizer).__name__
    require(valid, operation, "optimizer", kind, "an optimiser to wrap")
