"""Find the weights that a forward pass multiplies by without calling the layer that holds them.

A layer that is called is seen as a whole. A function that is handed a weight (``F.linear(x,
self.qkv.weight)``, ``x @ self.matrix``) shows only if one knows which tensors are parameters, or
were made of nothing else: a transposed, sliced or standardised weight. So the parameters are marked
before the pass as the model's inputs are, by handing each to a module of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from normlab.surgery.flow import Call, Flow, Operation, Sum

RECURRENT = (nn.RNNBase, nn.RNNCellBase)
"""Layers of torch with weights that the rules for linear layers do not fit."""

_CONTRACTING = (
    "linear", "bilinear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d",
    "conv_transpose3d", "matmul", "rmatmul", "imatmul", "mm", "bmm", "mv", "dot", "inner", "einsum",
    "tensordot", "addmm", "addmv", "addbmm", "baddbmm", "multi_head_attention_forward",
)  # fmt: skip


class Marks(nn.Module):
    """Hands every weight, every parameter of two or more axes, to a module with its name."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        # With one axis of more than one number it is a vector in disguise: a gain, a bias.
        self._held = [
            (name, p) for name, p in model.named_parameters() if p.numel() > max(p.shape, default=1)
        ]
        self.marks = nn.ModuleList(_Mark(name) for name, _ in self._held)

    def forward(self) -> None:
        """Hand them over."""
        for mark, (_, parameter) in zip(self.marks, self._held, strict=True):
            mark(parameter)


class _Mark(nn.Identity):
    def __init__(self, parameter_name: str) -> None:
        super().__init__()
        self.parameter_name = parameter_name


class WeightUses:
    """Where one pass multiplied by weights that were handed to a function.

    Args:
        flow: The pass of a model that called its `Marks` first.
    """

    def __init__(self, flow: Flow) -> None:
        self._parameters: dict[Any, list[_Mark]] = {}
        for source in in_order(flow.operations):
            if isinstance(source, Call):
                self._parameters[source] = [m for m in (source.module,) if isinstance(m, _Mark)]
                continue
            given = [self._parameters[one] for one in sources_of(source) if one is not None]
            pure = bool(given) and all(given)
            self._parameters[source] = [mark for one in given for mark in one] if pure else []
        self._by_owner: dict[str, dict[str, None]] = {}
        for operation in flow.operations:
            self._by_owner.setdefault(operation.owner, {}).update(self._multiplied(operation))

    def is_parameter(self, source: Any) -> bool:
        """Whether a tensor was made of such parameters, by functions, and of no activations."""
        if isinstance(source, Call):
            return isinstance(source.module, _Mark)
        return bool(self._parameters.get(source))

    def of(self, source: Any) -> list[str]:
        """Return the names of such parameters that a call multiplied by.

        Args:
            source: A function, or the call of a module for all functions in its own forward.
        """
        if isinstance(source, Operation):
            return list(self._multiplied(source))
        return list(self._by_owner.get(source.name, ())) if isinstance(source, Call) else []

    def _multiplied(self, operation: Operation) -> dict[str, None]:
        if operation.name.strip("_") not in _CONTRACTING or self._parameters[operation]:
            return {}
        given = (self._parameters[one] for one in operation.sources if one is not None)
        return {mark.parameter_name: None for marks in given for mark in marks}


def sources_of(source: Any) -> Iterable[Any]:
    """Return where the tensors were made that a call or a function was given."""
    if isinstance(source, Call):
        return (source.source,)
    return source.terms if isinstance(source, Sum) else source.sources


def in_order(ends: Iterable[Any]) -> Iterator[Any]:
    """Yield what ``ends`` were made of, and these, each once and behind what it was made of."""
    done: set[Any] = set()
    for end in ends:
        stack = [] if end is None else [end]
        while stack:
            source = stack[-1]
            waiting = [one for one in sources_of(source) if one is not None and one not in done]
            if waiting:
                stack += waiting
                continue
            stack.pop()
            if source not in done:
                done.add(source)
                yield source
