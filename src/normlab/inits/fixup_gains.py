"""Find the constants that multiply a residual branch on its way to the sum, and set them to 1.

LayerScale and its relatives start at 1e-6 or at 0. Behind a branch that starts at zero they would
keep it there. Which parameters these are is seen in one pass: those by which the output of a
branch's last layer is multiplied before it is added to something else.

Source: H. Zhang, Y. N. Dauphin, T. Ma, "Fixup Initialization: Residual Learning Without
Normalization", 2019, arXiv 1901.09321.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from normlab.surgery.flow import evaluating, tensors_in, uncompiled

_ADDING = ("add", "iadd", "radd", "sub", "isub", "rsub")
_MULTIPLYING = ("mul", "imul", "rmul", "multiply")
# What neither mixes values nor bends them.
_PASSING = (
    "view", "reshape", "flatten", "unflatten", "permute", "transpose", "movedim", "swapaxes", "get",
    "getitem", "unsqueeze", "squeeze", "expand", "expand_as", "contiguous", "clone", "detach", "to",
    "type_as", "float", "half", "bfloat16", "double", "roll", "pad", "neg", "div", "truediv",
    "dropout", "dropout1d", "dropout2d", "dropout3d",
)  # fmt: skip


def start_gains_(model: nn.Module, ends: Iterable[nn.Module], inputs: tuple[Any, ...]) -> list[str]:
    """Set the constants that multiply a branch to 1, where they are equal for all channels.

    Args:
        model: The model, without normalisers; changed in place.
        ends: The last layers of its branches.
        inputs: What its forward takes.

    Returns:
        The names of the parameters.

    Example:
        >>> class Block(nn.Linear):
        ...     def __init__(self):
        ...         super().__init__(2, 2)
        ...         self.last, self.gain = nn.Linear(2, 2), nn.Parameter(torch.zeros(1))
        ...     def forward(self, x):
        ...         return x + self.gain * self.last(super().forward(x).relu())
        >>> block = Block()
        >>> start_gains_(block, [block.last], (torch.ones(1, 2),)), block.gain.item()
        (['gain'], 1.0)
    """
    follower = _Follower(model)
    hooks = [end.register_forward_hook(follower.start) for end in ends]
    try:
        with evaluating(model), uncompiled(), torch.no_grad(), follower:
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    found = []
    for name, parameter in model.named_parameters():
        if id(parameter) in follower.found and _is_constant(parameter):
            nn.init.ones_(parameter)
            found.append(name)
    return found


def _is_constant(parameter: Tensor) -> bool:
    if parameter.numel() != max(parameter.shape, default=1):
        return False
    first = parameter.detach().flatten()[0]
    return bool((parameter == first).all()) and first.item() != 1


class _Follower(TorchFunctionMode):
    """Follows what the last layers return, with the parameters that multiplied it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.found: set[int] = set()
        # A parameter, or a view of one, by the identity of the tensor.
        self._parameters = {id(p): id(p) for p in model.parameters()}
        self._ways: dict[int, frozenset[int]] = {}
        # Tensors are told apart by their address, so none may be freed during the pass.
        self._alive: list[Any] = []

    def start(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Begin to follow what a last layer returns."""
        first = next(tensors_in(output))
        self._alive.append(first)
        self._ways[id(first)] = frozenset()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        word = getattr(func, "__name__", "").strip("_")
        given, made = list(tensors_in((args, kwargs))), list(tensors_in(result))
        self._alive.append((given, made))
        ways = [self._ways[id(one)] for one in given if id(one) in self._ways]
        factors = [self._parameters[id(one)] for one in given if id(one) in self._parameters]
        if not ways:
            if len(given) == len(factors) == 1 and word in _PASSING:
                self._parameters.update((id(one), factors[0]) for one in made)
            return result
        multiplied = frozenset().union(*ways)
        if word == "addcmul" or (word in _ADDING and len(given) > len(ways) + len(factors)):
            self.found |= multiplied | (set(factors) if word == "addcmul" else set())
            return result
        if word in _MULTIPLYING:
            multiplied |= set(factors)
        elif word not in (*_PASSING, *_ADDING):
            multiplied = frozenset()
        self._ways.update((id(one), multiplied) for one in made)
        return result
