"""Follow the tensors of one forward pass from module to module.

A method that pairs layers ("the activation after this normaliser", "the weight layer in front of
it") cannot read that from names or from the order of registration. It is seen by running the
model once: module B directly follows module A where the very tensor that A returned is handed to
B. Any control flow is allowed; nothing is traced symbolically.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode

_ADDITIONS = {
    torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__, Tensor.__radd__,
}  # fmt: skip
_RELUS = ("relu", "relu_")


@dataclass(frozen=True, eq=False)
class Call:
    """One call of one module during the pass.

    Attributes:
        name: The module's qualified name, ``""`` for the root; the first one if it has several.
        module: The module.
        source: Where this call's first input was made: the call that returned it, a `Sum` where it
            was added up, another `Operation`; None where it comes from the user.
        input_shape: The shape of the first tensor handed over, or None.
    """

    name: str
    module: nn.Module
    source: Source
    input_shape: torch.Size | None


@dataclass(frozen=True, eq=False)
class Sum:
    """An addition of tensors, as closes a residual branch; ``terms`` are where they were made."""

    terms: tuple[Source, ...]


@dataclass(frozen=True, eq=False)
class Operation:
    """A function of tensors other than an addition, called outside torch's own layers.

    Attributes:
        name: The function's name: ``"relu"``, ``"cat"``, ``"flatten"``.
        owner: The qualified name of the module that called it.
        sources: Where each of its tensors was made.
    """

    name: str
    owner: str
    sources: tuple[Source, ...]


Source: TypeAlias = Call | Sum | Operation | None


@dataclass(frozen=True)
class Flow:
    """What one pass showed: every call of every module and function, in the order of their ends."""

    calls: tuple[Call, ...]
    operations: tuple[Operation, ...]

    @property
    def functional_relus(self) -> list[Operation]:
        """The ReLUs called as functions rather than as modules."""
        return [operation for operation in self.operations if operation.name in _RELUS]

    def of(self, module: nn.Module) -> list[Call]:
        """Return the calls of a module; a module used twice has two."""
        return [call for call in self.calls if call.module is module]

    def followers(self, module: nn.Module) -> list[Call]:
        """Return the calls that took what ``module`` returned as it is."""
        return [
            call
            for call in self.calls
            if isinstance(call.source, Call) and call.source.module is module
        ]

    def predecessor(self, module: nn.Module) -> nn.Module | None:
        """Return the one module whose output every call of ``module`` takes, if there is one."""
        sources = {
            id(call.source.module): call.source.module
            for call in self.of(module)
            if isinstance(call.source, Call)
        }
        alone = len(sources) == 1 and all(isinstance(c.source, Call) for c in self.of(module))
        return next(iter(sources.values())) if alone else None


def trace_flow(model: nn.Module, *inputs: Any) -> Flow:
    """Run ``model`` once and return which module's output went into which.

    The pass runs in evaluation mode without gradients, what is compiled as it was written; hooks
    and modes are restored, also when the model raises.

    Args:
        model: Any module.
        inputs: What the model's forward takes; two samples are enough.

    Returns:
        The calls in order.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU())
        >>> flow = trace_flow(model, torch.zeros(2, 4))
        >>> [type(call.module).__name__ for call in flow.followers(model[1])]
        ['ReLU']
    """
    recorder = _Recorder(model)
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(uncompiled())
        stack.enter_context(recorder.hooked())
        stack.enter_context(torch.no_grad())
        stack.enter_context(recorder)
        model(*inputs)
    return Flow(tuple(recorder.calls), tuple(recorder.operations))


def uncompiled() -> AbstractContextManager[Any]:
    """Run what is compiled as it was written, so that hooks see every call."""
    # Where nothing was compiled, to ask would load the compiler.
    compiles = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if compiles else nullcontext()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, and each one back into its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def tensors_in(values: Any) -> Iterator[Tensor]:
    """Yield the tensors in what a module takes or returns: one, or nested in lists and the like."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (dict, list, tuple)):
        for value in values.values() if isinstance(values, dict) else values:
            yield from tensors_in(value)


def normalises_by_batch(module: nn.Module) -> bool:
    """Return whether a module uses statistics of the batch in training.

    BatchNorm and all that owns a buffer ``running_mean`` does, and classes that say
    ``batch_statistics = True``.
    """
    says_so = getattr(type(module), "batch_statistics", False) is True
    return says_so or "running_mean" in module._buffers or isinstance(module, _NormBase)


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.operations: list[Operation] = []
        self._model = model
        self._sources: dict[int, Call | Sum | Operation] = {}
        # Tensors are told apart by their address, so none may be freed during the pass.
        self._alive: list[Any] = []
        self._inside: list[tuple[str, nn.Module, Source, torch.Size | None]] = []

    @contextmanager
    def hooked(self) -> Iterator[None]:
        handles = []
        try:
            for name, module in self._model.named_modules():
                handles.append(module.register_forward_pre_hook(partial(self._enter, name)))
                handles.append(module.register_forward_hook(self._leave))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        first = next((value for value in inputs if isinstance(value, Tensor)), None)
        source = None if first is None else self._sources.get(id(first))
        self._inside.append((name, module, source, None if first is None else first.shape))

    def _leave(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        name, module, source, shape = self._inside.pop()
        call = Call(name, module, source, shape)
        self.calls.append(call)
        if isinstance(output, Tensor):
            self._alive.append((inputs, output))
            made_here = self._sources.get(id(output))
            # A container returns what its last child or its last sum made: that is the maker. A
            # module that works in place returns what it was given, and did make it anew.
            container = any(True for _ in module.children())
            if made_here is None or made_here is source or not container:
                self._sources[id(output)] = call

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [one for one in _flat(result) if isinstance(one, Tensor)]
        # torch's layers compute with functions, too: there the call of the layer says it all.
        if made and not (self._inside and _is_layer_of_torch(self._inside[-1][1])):
            given = [one for one in _flat((args, kwargs)) if isinstance(one, Tensor)]
            sources = tuple(self._sources.get(id(one)) for one in given)
            if func in _ADDITIONS:
                source = Sum(sources)
            else:
                owner = self._inside[-1][0] if self._inside else ""
                source = Operation(getattr(func, "__name__", ""), owner, sources)
                self.operations.append(source)
            self._alive.append((given, made))
            self._sources.update((id(one), source) for one in made)
        return result


def _is_layer_of_torch(module: nn.Module) -> bool:
    own = type(module).__module__.startswith("torch.nn.modules")
    return own and not any(True for _ in module.children())


def _flat(values: Any) -> Iterator[Any]:
    """Yield what stands in nested lists, tuples and dictionaries."""
    if isinstance(values, dict):
        values = tuple(values.values())
    if isinstance(values, (list, tuple)):
        for value in values:
            yield from _flat(value)
    else:
        yield values
