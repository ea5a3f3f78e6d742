"""Normalisers by their class's name, where they are shown to normalise.

Models bring layers of their own that normalise without being subclasses of torch's. Their names
hint at it ("RMSNorm", "GlobalNorm"), but so does that of a layer which subtracts the mean of the
data set. What divides by a statistic of its input returns the same for that input scaled up.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_SCALES = (1e2, 1e3)
_EQUAL = 1e-2


class NamedNorms:
    """The layers of a model that are named like normalisers and have no weight matrix.

    Args:
        model: Any module.
        known: The normalisers that need no proof.
    """

    def __init__(self, model: nn.Module, known: set[nn.Module]) -> None:
        inside = {inner for norm in known for inner in norm.modules()}
        self._named = {
            name: module
            for name, module in model.named_modules()
            if "norm" in type(module).__name__.lower()
            and not inside.intersection(module.modules())
            and all(weight.dim() < 2 for weight in module.parameters())
        }
        self._inputs: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Note what each is called with."""

        def note(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            self._inputs.setdefault(module, (inputs, named))

        hooks = [
            module.register_forward_pre_hook(note, with_kwargs=True)
            for module in self._named.values()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def found(self) -> dict[str, nn.Module]:
        """Return, by name, those that were called and normalise; of nested ones the outer."""
        found: dict[str, nn.Module] = {}
        inside: set[nn.Module] = set()
        for name, module in self._named.items():
            if module not in inside and module in self._inputs and self._normalises(module):
                found[name] = module
                inside |= set(module.modules())
        return found

    def _normalises(self, module: nn.Module) -> bool:
        if {"running_mean", "running_var"} <= dict(module.named_buffers()).keys():
            return True
        inputs, named = self._inputs[module]
        first = next((x for x in (*inputs, *named.values()) if _is_real(x)), None)
        if first is None:
            return False
        noise = torch.randn(first.shape, generator=torch.Generator().manual_seed(0))
        tried = copy.deepcopy(module).float().train()
        outputs = []
        for scale in _SCALES:
            scaled = scale * noise.to(first.device)
            given = [scaled if x is first else _wide(x) for x in inputs]
            keywords = {name: scaled if x is first else _wide(x) for name, x in named.items()}
            try:
                with torch.no_grad():
                    outputs.append(tried(*given, **keywords))
            except (AttributeError, RuntimeError, TypeError, ValueError):
                return False
        one, two = outputs
        if not isinstance(one, Tensor) or not one.isfinite().all():
            return False
        return bool((one - two).abs().max() <= _EQUAL * one.abs().max())


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _wide(value: Any) -> Any:
    return value.float() if _is_real(value) else value
