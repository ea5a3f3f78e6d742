"""Activations where new units stand: at zero.

`torch.nn.ReLU` has derivative 0 there, so a unit with zero incoming weights would never learn;
`ClampReLU` has the same values and derivative 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ClampReLU(nn.Module):
    r"""ReLU with derivative 1 at zero: :math:`\min(\max(x, 0), m)`, the bounds included.

    Args:
        max_value: The upper bound m; None for none.

    Example:
        >>> x = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
        >>> ClampReLU()(x).sum().backward()
        >>> x.grad
        tensor([0., 1., 1.])
    """

    def __init__(self, max_value: float | None = None) -> None:
        super().__init__()
        self.max_value = max_value

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` with what is outside the bounds moved to them."""
        return x.clamp(min=0, max=self.max_value)

    def extra_repr(self) -> str:
        """Return the arguments shown by ``print``."""
        return "" if self.max_value is None else f"max_value={self.max_value}"


ACTIVATIONS = (
    ClampReLU, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU,
    nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Softsign, nn.Hardswish, nn.Hardtanh,
    nn.Hardsigmoid, nn.LogSigmoid, nn.Tanhshrink, nn.Hardshrink, nn.Softshrink,
)  # fmt: skip
FUNCTIONS = {
    "relu": F.relu, "relu_": F.relu, "relu6": F.relu6, "tanh": torch.tanh, "gelu": F.gelu,
    "silu": F.silu, "sigmoid": torch.sigmoid,
}  # fmt: skip


def at_zero(step: nn.Module | str) -> tuple[float, float] | None:
    """Return value and derivative at zero of an activation; None for anything else.

    Args:
        step: A module, or the name of a function; for torch's ReLU what `ClampReLU` has.
    """
    function = FUNCTIONS.get(step) if isinstance(step, str) else step
    if function is None or not (step in FUNCTIONS or type(step) in ACTIVATIONS):
        return None
    if isinstance(step, nn.PReLU) and step.num_parameters > 1:
        return None  # it has a parameter a unit, for which a new unit has no value
    like = next(step.parameters(), None) if isinstance(step, nn.Module) else None
    with torch.enable_grad():
        zero = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        zero = zero if like is None else torch.zeros_like(like[:1], requires_grad=True)
        # In-place activations may not touch a leaf.
        value = function(zero.clone())
        (slope,) = torch.autograd.grad(value.sum(), zero)
    if isinstance(step, nn.ReLU | nn.ReLU6):
        slope = torch.ones(1)
    return value.item(), slope.item()
