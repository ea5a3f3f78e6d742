"""Hide modules from a surgery, and bring them back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


class Held(nn.Module):
    """Stands in for a module that a surgery must not see: it computes the same and shows nothing.

    Args:
        module: The module, kept out of the registration.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._held = (module,)
        self.training = module.training

    @property
    def module(self) -> nn.Module:
        """The module that is held."""
        return self._held[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute what the module computes."""
        return self.module(*args, **kwargs)

    def train(self, mode: bool = True) -> Held:
        """Set the mode of the module, too."""
        self.module.train(mode)
        return super().train(mode)


def hold(model: nn.Module, modules: Iterable[nn.Module]) -> nn.Module:
    """Hide modules from a surgery; `release` brings them back."""
    held = {module: Held(module) for module in modules}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child in held:
                parent._modules[name] = held[child]
    return held.get(model, model)


def release(model: nn.Module) -> nn.Module:
    """Bring every hidden module back to its place."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, Held):
                parent._modules[name] = child.module
    return model.module if isinstance(model, Held) else model
