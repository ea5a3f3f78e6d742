"""The peak memory of one training step, counted in bytes of tensors.

A process's resident size tells little about a method: it holds the interpreter, the data and
whatever the allocator keeps. Here the storages that live at the same time are counted, exactly
and repeatably, on any device.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorMemory(TorchDispatchMode):
    """Counts the bytes of all storages made while it is active, and those given at the start.

    Args:
        held: Tensors that exist already and count from the start: parameters, buffers.

    Attributes:
        peak: The largest number of bytes alive at one time. Scratch memory inside one operator
            is not seen.

    Example:
        >>> with TensorMemory([]) as memory:
        ...     x = torch.ones(1000)
        ...     y = (x + 1) * 2
        >>> memory.peak
        12000
    """

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()
        self.peak = 0
        self._alive = 0
        self._known: set[int] = set()
        for tensor in held:
            self._count(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._known:
            return
        self._known.add(address)
        size = storage.nbytes()
        self._alive += size
        self.peak = max(self.peak, self._alive)
        weakref.finalize(storage, self._free, address, size)

    def _free(self, address: int, size: int) -> None:
        self._known.discard(address)
        self._alive -= size


@contextmanager
def peak_memory(model: torch.nn.Module, wanted: bool) -> Iterator[list[int]]:
    """Measure the block's peak; the list holds it afterwards, or stays empty if not ``wanted``."""
    found: list[int] = []
    if not wanted:
        yield found
        return
    with TensorMemory([*model.parameters(), *model.buffers()]) as memory:
        yield found
    found.append(memory.peak)
