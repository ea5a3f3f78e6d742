"""Steps at other learning rates than those that stand in the optimiser's groups between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from normlab.parameter_groups import Group


class StepRates:
    """Multiplies an optimiser's rates for the length of a step.

    A step that raises leaves no trace: a closure that raises has the rates put back at once, and
    after any other error they are when the next step begins, unless somebody set them meanwhile.
    Until then they stand in the groups, so that a checkpoint does not lose them.

    Args:
        optimizer: The optimiser.
        key: The name for what is kept in a group during a step.
        factor: Returns the number that a group's rate is multiplied by.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        >>> rates = StepRates(optimizer, "halved", lambda group: 0.5)
        >>> optimizer.step(lambda: print(optimizer.param_groups[0]["lr"]))
        0.5
        >>> optimizer.param_groups[0]["lr"]
        1.0
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, key: str, factor: Callable[[Group], float]
    ) -> None:
        self._optimizer, self._key, self._factor = optimizer, key, factor
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._put_back),
        ]

    def remove(self) -> None:
        """Stop."""
        self._put_back()
        for hook in self._hooks:
            hook.remove()

    def _before_step(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._put_back()
        for group in self._optimizer.param_groups:
            between = group["lr"]
            group["lr"] = between * self._factor(group)
            group[self._key] = (between, group["lr"])
        optimizer, *closures = args
        if "closure" in kwargs:
            kwargs = {**kwargs, "closure": self._guarded(kwargs["closure"])}
        return (optimizer, *map(self._guarded, closures)), kwargs

    def _guarded(self, closure: Callable[[], Any] | None) -> Callable[[], Any] | None:
        if closure is None:
            return None

        def call() -> Any:
            try:
                return closure()
            except BaseException:
                self._put_back()
                raise

        return call

    def _put_back(self, *_: Any) -> None:
        for group in self._optimizer.param_groups:
            between, during = group.pop(self._key, (None, None))
            if during is not None and group["lr"] == during:
                group["lr"] = between
