"""Which layers the input of a layer depends on, seen in one pass.

Every operation on tensors is followed, whatever Python code calls it; only what goes through
numbers of Python or through other libraries is lost from sight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@contextmanager
def called(
    layers: Mapping[str, nn.Module], action: Callable[[str, int, Tensor], None]
) -> Iterator[None]:
    """Call ``action(name, number of the call, input)`` whenever a layer is about to run."""
    numbers = dict.fromkeys(layers, 0)
    handles = []

    def before(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        numbers[name] += 1
        action(name, numbers[name] - 1, args[0] if args else kwargs["x"])

    try:
        for name, layer in layers.items():
            handles.append(layer.register_forward_pre_hook(partial(before, name), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def dependences(
    model: nn.Module, inputs: Tensor, layers: Mapping[str, nn.Module]
) -> dict[str, list[frozenset[str]]]:
    """Return for each call of each layer, in order, the layers that its input depends on.

    Args:
        model: The model, run once as it is.
        inputs: What it takes; two samples are enough.
        layers: The layers to watch, by name; each gives one tensor.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        >>> dependences(model, torch.zeros(2, 2), {"a": model[0], "b": model[2]})
        {'a': [frozenset()], 'b': [frozenset({'a'})]}
    """
    calls: dict[str, list[frozenset[str]]] = {}
    handles = []
    with _Dependence() as dependence:

        def before(name: str, _: int, x: Tensor) -> None:
            calls.setdefault(name, []).append(dependence.of([x]))

        def after(name: str, _: nn.Module, __: Any, output: Tensor) -> None:
            dependence.add([output], frozenset({name}))

        try:
            for name, layer in layers.items():
                handles.append(layer.register_forward_hook(partial(after, name)))
            with called(layers, before):
                model(inputs)
        finally:
            for handle in handles:
                handle.remove()
    return calls


class _Dependence(TorchDispatchMode):
    """Follows through every operation which layers a tensor depends on, memory by memory."""

    def __init__(self) -> None:
        super().__init__()
        self._sources: dict[int, frozenset[str]] = {}
        # Memory is told apart by its address, so none may be freed during the pass.
        self._alive: list[Any] = []

    def of(self, values: Any) -> frozenset[str]:
        known = (self._sources.get(address, frozenset()) for address in self._addresses(values))
        return frozenset[str]().union(*known)

    def add(self, values: Any, sources: frozenset[str]) -> None:
        self._alive.append(values)
        for address in self._addresses(values):
            self._sources[address] = self._sources.get(address, frozenset()) | sources

    def _addresses(self, values: Any) -> list[int]:
        # Views share memory, so a write through one shows in all. Sparse tensors have none.
        return [
            leaf.untyped_storage()._cdata
            for leaf in tree_leaves(values)
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided
        ]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.add(result, self.of((args, kwargs)))
        return result
