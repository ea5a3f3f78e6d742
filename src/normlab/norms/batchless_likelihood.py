r"""The likelihood that teaches `normlab.norms.batchless_norm` its means and deviations.

The negative log-likelihood of a Gaussian depends on the data through two moments only, so a layer
that keeps these can form value and gradient of the loss at any later time, without the data.
"""

from __future__ import annotations

import math
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from normlab.moments import wide

STD_PARAMETRIZATIONS = ("log", "abs", "inv")
"""What the parameter ``s`` may hold: log sigma; sigma less eps, up to its sign; 1 / sigma."""

REDUCTIONS = ("mean", "sum")
"""Over channels; within a channel it is always the mean."""


def inverse_and_log_std(
    s: Tensor, std_parametrization: str = "log", eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    r"""Return :math:`1 / \sigma` and :math:`\log \sigma` of the parameter that holds sigma.

    Args:
        s: The parameter.
        std_parametrization: ``"log"``: :math:`\log \sigma = s`; ``"abs"``:
            :math:`\sigma = |s| + \epsilon`; ``"inv"``: :math:`1 / \sigma = s`, where the logarithm
            is :math:`-\log(|s| + \epsilon)`.
        eps: The constant of the latter two.

    Example:
        >>> inverse_and_log_std(torch.tensor(0.0))
        (tensor(1.), tensor(0.))
    """
    s = wide(s)
    if std_parametrization == "log":
        return torch.exp(-s), s
    if std_parametrization == "abs":
        std = s.abs() + eps
        return std.reciprocal(), std.log()
    return s, -(s.abs() + eps).log()


def parameter_of_std(std: Tensor, std_parametrization: str = "log", eps: float = 1e-5) -> Tensor:
    """Return the parameter that holds the deviation ``std``, above 0 (above eps for ``"abs"``)."""
    if std_parametrization == "log":
        return std.log()
    return (std - eps).clamp_min(0) if std_parametrization == "abs" else std.reciprocal()


@torch.no_grad()
def moments_about(mu: Tensor, x: Tensor, axes: list[int]) -> Tensor:
    r"""Return 1, :math:`\mathrm{mean}(x - \mu)`, :math:`\mathrm{mean}((x - \mu)^2)`, stacked.

    Args:
        mu: A tensor that broadcasts against ``x``.
        x: The data, of at least single precision.
        axes: The axes to take the means over.
    """
    centred = x - mu
    first, second = centred.mean(axes), centred.square().mean(axes)
    return torch.stack([torch.ones_like(first), first, second])


def gaussian_loss(
    moments: Tensor,
    mu: Tensor,
    s: Tensor,
    *,
    std_parametrization: str = "log",
    eps: float = 1e-5,
    gauge_loss: bool = True,
    reduction: str = "mean",
) -> Tensor:
    r"""Return the negative log-likelihood of a Gaussian, less :math:`\log(2 \pi) / 2`.

    .. math::
        L = \mathrm{mean}_c(\log \sigma_c) + \tfrac12 \mathrm{mean}((x - \mu)^2 / \sigma^2)
            - \mathrm{sg}(\mathrm{mean}_c(\log \sigma_c)) - \tfrac12

    Args:
        moments: ``(3, *)`` as `moments_about` gives them, about the present value of ``mu``; a sum
            of several gives the sum of their losses.
        mu: The mean ``(*)``.
        s: The parameter of the deviation ``(*)``.
        std_parametrization: As in `inverse_and_log_std`.
        eps: As in `inverse_and_log_std`.
        gauge_loss: Whether to take off the last two terms, which have no gradient.
        reduction: ``"sum"`` takes sums over channels for the means over them.

    Returns:
        A scalar with first derivatives for ``mu`` and ``s``.

    Example:
        >>> x = torch.tensor([[1.0], [2.0], [3.0], [6.0]])
        >>> moments = moments_about(torch.ones(1), x, [0])
        >>> gaussian_loss(moments, torch.ones(1), torch.tensor([2.0]).log())
        tensor(0.4375)
    """
    inverse, log_std = inverse_and_log_std(s, std_parametrization, eps)
    count, first, second = moments.to(log_std.dtype)
    # The mean of (x - mu)^2 as a function of mu near its present value: its square is left out.
    mu = wide(mu)
    squares = torch.addcmul(second, mu - mu.detach(), first, value=-2)
    if gauge_loss:
        log_std = log_std - (log_std.detach() + 0.5)
    loss = torch.addcmul(count * log_std, inverse.square(), squares, value=0.5)
    return loss.sum() if reduction == "sum" else loss.mean()


class InjectLoss(torch.autograd.Function):
    """Returns ``y`` of ``(y, loss)``; its backward pass gives ``loss`` the gradient 1."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor) -> Tensor:
        """Return ``y``."""
        ctx.dtype = loss.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient of ``y`` as it is, and 1."""
        return gradients[0], gradients[0].new_ones((), dtype=ctx.dtype)


def check_options(
    operation: str, std_parametrization: str, reduction: str, nll_weight: float
) -> None:
    """Refuse options of the likelihood that are out of range; ``operation`` begins the message."""
    check_choice(operation, "std_parametrization", std_parametrization, STD_PARAMETRIZATIONS)
    check_choice(operation, "reduction", reduction, REDUCTIONS)
    if not 0 <= nll_weight < math.inf:
        raise ValueError(
            f"{operation}(nll_weight={nll_weight}): expected a number of at least 0, got "
            f"{nll_weight}; use 1"
        )


def check_choice(operation: str, option: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a value that is none of ``choices``, and name the nearest."""
    if value not in choices:
        near = get_close_matches(str(value), choices, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"{operation}({option}={value!r}): expected one of {', '.join(choices)}, got "
            f"{value!r}; do you mean {near!r}?"
        )
