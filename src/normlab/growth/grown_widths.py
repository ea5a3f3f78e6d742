"""Load a checkpoint of a grown model into one that has not grown yet: it takes the saved widths.

The widths need no record of their own, because the shapes in a checkpoint are one. In front of
loading, layers of pairs whose saved shapes differ are given new parameters of these shapes, and the
optimisers that train the model are given the new parameters. Load the model first and its optimiser
second.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normlab.growth.pairs import GrowthPair
from normlab.growth.replace_tensors import Key, fit, replace_tensors
from normlab.growth.widen import slots, sync_sizes

_ATTRIBUTE = "grown_widths"


class GrownWidths:
    """What a model remembers of its pairs, and a hook in front of ``load_state_dict``.

    Attributes:
        pairs: The pairs that grow, in the order of the forward pass.
        start: The width of each pair before its first growth.
        final: The width that each pair is to have in the end, or None.
    """

    def __init__(self, pairs: Iterable[GrowthPair], final: Iterable[int] | None = None) -> None:
        self.pairs = list(pairs)
        self.start = [pair.width for pair in self.pairs]
        self.final = None if final is None else list(final)
        self._optimizers: list[weakref.ref[torch.optim.Optimizer]] = []

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model is trained by other optimisers, if by any.
        return {**self.__dict__, "_optimizers": []}

    def trained_by(self, optimizer: torch.optim.Optimizer) -> None:
        """Let an optimiser follow when loading replaces parameters."""
        self._optimizers = [ref for ref in self._optimizers if ref() is not None]
        self._optimizers.append(weakref.ref(optimizer))

    def __call__(
        self, model: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any
    ) -> None:
        """Give the layers the widths of a state; one that is not of this model is left to torch."""
        names = {module: name for name, module in model.named_modules()}
        shapes: dict[Key, list[int]] = {}
        changed = []
        for pair in self.pairs:
            found = slots(pair)
            saved = [
                state_dict.get(f"{prefix}{names[slot.module]}.{slot.name}")
                for slot in found
                if slot.module in names
            ]
            widths = {
                value.shape[slot.dim] / slot.per_unit
                for slot, value in zip(found, saved, strict=False)
                if isinstance(value, Tensor) and value.dim() > slot.dim
            }
            width = widths.pop() if len(widths) == 1 else 0
            if len(saved) < len(found) or width != int(width) or width in (0, pair.width):
                continue
            changed.append(pair)
            for slot in found:
                shape = shapes.setdefault(slot.key, list(getattr(slot.module, slot.name).shape))
                shape[slot.dim] = int(width) * slot.per_unit
        tensors = {
            (module, name): fit(getattr(module, name).detach(), shape)
            for (module, name), shape in shapes.items()
        }
        live = [optimizer for ref in self._optimizers if (optimizer := ref()) is not None]
        replace_tensors(tensors, live)
        for pair in changed:
            sync_sizes(pair)


def remember_widths(
    model: nn.Module, pairs: Iterable[GrowthPair], final: Iterable[int] | None = None
) -> GrownWidths:
    """Let a model take the widths of the checkpoints that it loads.

    Args:
        model: The model, called by its user: the hook is registered on it.
        pairs: The pairs that grow.
        final: The widths that they are to have in the end.

    Returns:
        What the model remembers.

    Example:
        >>> from normlab.growth.pairs import find_pairs
        >>> small, large = (
        ...     nn.Sequential(nn.Linear(2, n), nn.Tanh(), nn.Linear(n, 1)) for n in (3, 5)
        ... )
        >>> _ = remember_widths(small, find_pairs(small, torch.zeros(2, 2)).pairs)
        >>> small.load_state_dict(large.state_dict())
        <All keys matched successfully>
        >>> small[0]
        Linear(in_features=2, out_features=5, bias=True)
    """
    widths = GrownWidths(pairs, final)
    setattr(model, _ATTRIBUTE, widths)
    model.register_load_state_dict_pre_hook(widths)
    return widths


def remembered_widths(model: nn.Module) -> GrownWidths | None:
    """Return what `remember_widths` let a model, or a module in it, remember."""
    found = (module.__dict__.get(_ATTRIBUTE) for module in model.modules())
    return next((widths for widths in found if widths is not None), None)
