"""Watch one forward pass operation by operation: who makes and who uses each tensor.

`normlab.surgery.flow` tells which module follows which. Where a layer's output is to be changed,
every other use forbids it, and this file leaves none out: an indexing, a second argument, a view,
a hook, the model's result.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True, eq=False)
class WatchedCall:
    """What one call of a module took first, and what it returned."""

    input: Tensor | None
    output: Tensor | None


class Watched(TorchDispatchMode):
    """Who made and who used each tensor of one pass.

    Watching operations instead of functions or modules leaves no use out: an indexing, a second
    argument, a view.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.calls: dict[nn.Module, list[WatchedCall]] = {}
        self.makers: dict[int, str] = {}
        self.users: dict[int, dict[nn.Module, str]] = {}
        self.names = {module: name for name, module in model.named_modules()}
        self.owners: dict[int, list[nn.Module]] = {}
        for module in model.modules():
            for parameter in module._parameters.values():
                self.owners.setdefault(id(parameter), []).append(module)
        self._inside = [model]
        # Tensors are told apart by their address, so none may be freed during the pass.
        self._alive: list[Any] = []

    def describe(self, module: nn.Module, operation: str) -> str:
        """Return a leaf's name and class, or the operation that a container calls by itself."""
        leaf = not any(True for _ in module.children()) and self.names[module]
        return f"{self.names[module]!r} ({type(module).__name__})" if leaf else repr(operation)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Have every module tell when its call begins and ends."""
        handles = []
        try:
            for module in self.names:
                has_hooks = bool(module._forward_hooks or module._forward_pre_hooks)
                handles.append(module.register_forward_pre_hook(self._enter))
                leave = partial(self._leave, has_hooks)
                handles.append(module.register_forward_hook(leave, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def returned(self, outputs: Any) -> None:
        """Note what the model returns."""
        for tensor in _tensors(outputs):
            self._use(tensor, self._inside[0], "the model returns")

    def _use(self, tensor: Tensor, module: nn.Module, what: str) -> None:
        self.users.setdefault(id(tensor), {})[module] = what

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        self._inside.append(module)

    def _leave(
        self, has_hooks: bool, module: nn.Module, inputs: Any, kwargs: Any, output: Any
    ) -> None:
        self._inside.pop()
        first = next(_tensors((inputs, kwargs)), None)
        call = WatchedCall(first, output if isinstance(output, Tensor) else None)
        self.calls.setdefault(module, []).append(call)
        self._alive.append(call)
        if has_hooks:
            for tensor in _tensors((inputs, kwargs, output)):
                self._use(tensor, module, f"a hook of {self.names[module]!r} takes")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        module = self._inside[-1]
        what = self.describe(module, func.overloadpacket.__name__)
        for tensor in _tensors((args, kwargs)):
            self._use(tensor, module, f"{what} takes")
        self.makers.update((id(tensor), what) for tensor in _tensors(result))
        self._alive.append((args, kwargs, result))
        return result


def _tensors(values: Any) -> Iterator[Tensor]:
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor):
            yield leaf
        elif is_dataclass(leaf):
            yield from _tensors(list(vars(leaf).values()))


def watch(model: nn.Module, *inputs: Any) -> Watched:
    """Run ``model`` once, in the mode it is in, without gradients, and return what was seen."""
    watched = Watched(model)
    with watched.hooked(), torch.no_grad(), watched:
        watched.returned(model(*inputs))
    return watched
