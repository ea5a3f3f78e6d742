"""The preconditioner of one layer, from the mean and the scale of its input features.

A layer ``a = W h + b`` written as ``a = z [1, (h - mu) / s] / q`` has the weights ``[b, W] = P z``.
A gradient step on z is a step along ``P P^T`` times the gradient on ``[b, W]``.

Source: S. Lange, K. Helfrich, Q. Ye, "Batch Normalization Preconditioning for Neural Network
Training", 2021, arXiv 2108.01110.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from normlab.moments import wide


class Preconditioner(NamedTuple):
    r"""The matrix :math:`P = \frac1q U D` of one layer, ``U`` the shift and ``D`` the scaling.

    Attributes:
        mean: The mean mu of each input feature or channel ``(C,)``; zeros leave out the shift.
        square_scale: The square s^2 of each one's scale ``(C,)``; where it is 0 the feature is
            constant and its weights are left alone.
        square_q: q^2, at least 1; a number or a scalar tensor.
        groups: The number of groups of the convolution.
    """

    mean: Tensor
    square_scale: Tensor
    square_q: Tensor | float = 1.0
    groups: int = 1

    def along(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and 1/s^2 so that they broadcast against ``weight`` (out, in / G, *)."""
        inverse = torch.where(self.square_scale > 0, 1 / self.square_scale, 0.0)
        return self._broadcast(self.mean, weight), self._broadcast(inverse, weight)

    def _broadcast(self, values: Tensor, weight: Tensor) -> Tensor:
        values = values.to(weight).view(self.groups, *weight.shape[1:2], *(1,) * (weight.dim() - 2))
        if self.groups == 1:
            return values
        return values.repeat_interleave(weight.shape[0] // self.groups, 0)


def precondition(
    weight_grad: Tensor, bias_grad: Tensor | None, preconditioner: Preconditioner
) -> tuple[Tensor, Tensor | None]:
    r"""Return :math:`P P^T g`, the gradient of a layer as if its input had been normalised.

    .. math::
        \Delta W = (g_W - g_b \mu^T) / s^2 / q^2, \quad \Delta b = g_b / q^2 - \Delta W \mu

    where a convolution has one mean and one scale per channel, shared by the taps.

    Args:
        weight_grad: ``(out, in)`` or ``(out, in / G, *kernel)``.
        bias_grad: ``(out,)``; None without a bias, where only scaling is left.
        preconditioner: The statistics.

    Returns:
        The two transformed gradients; the second is None without a bias.

    Example:
        >>> statistics = Preconditioner(torch.tensor([2.0]), torch.tensor([4.0]))
        >>> precondition(torch.tensor([[8.0]]), torch.tensor([2.0]), statistics)
        (tensor([[1.]]), tensor([0.]))
    """
    weight_step = weight_grad.clone()
    bias_step = None if bias_grad is None else bias_grad.clone()
    precondition_(weight_step, bias_step, preconditioner)
    return weight_step, bias_step


def precondition_(
    weight_grad: Tensor, bias_grad: Tensor | None, preconditioner: Preconditioner
) -> None:
    """Transform as `precondition` does, in place: fresh memory costs more than the arithmetic."""
    mean, inverse = preconditioner.along(weight_grad)
    scale = inverse / preconditioner.square_q
    if bias_grad is None:
        weight_grad.mul_(scale)
        return
    column = bias_grad.view(-1, *(1,) * (weight_grad.dim() - 1))
    weight_grad.addcmul_(column, mean, value=-1).mul_(scale)
    bias_grad.div_(preconditioner.square_q).sub_(_dot(weight_grad, mean))


def precondition_layer(layer: nn.Module, preconditioner: Preconditioner) -> None:
    """Transform the gradients that a layer's parameters hold, in place."""
    found = (layer._parameters["weight"], layer._parameters.get("bias"))
    grads = [None if parameter is None else parameter.grad for parameter in found]
    weight_grad, bias_grad = (None if grad is None else wide(grad) for grad in grads)
    assert weight_grad is not None
    precondition_(weight_grad, bias_grad, preconditioner)
    for grad, edited in zip(grads, (weight_grad, bias_grad), strict=True):
        if grad is not None and edited is not None and edited is not grad:
            grad.copy_(edited)


def map_back(
    weight: Tensor, bias: Tensor | None, preconditioner: Preconditioner
) -> tuple[Tensor, Tensor | None]:
    r"""Return :math:`P z`: parameters, or noise, of the normalised layer as those of the plain one.

    .. math::
        W = V / s / q, \quad b = c / q - W \mu

    Args:
        weight: V, ``(out, in)`` or ``(out, in / G, *kernel)``.
        bias: c, ``(out,)``; None without a bias.
        preconditioner: The statistics.

    Returns:
        W and b.

    Example:
        >>> statistics = Preconditioner(torch.tensor([2.0]), torch.tensor([4.0]))
        >>> map_back(torch.tensor([[6.0]]), torch.tensor([1.0]), statistics)
        (tensor([[3.]]), tensor([-5.]))
    """
    mean, inverse = preconditioner.along(weight)
    q = preconditioner.square_q**0.5
    mapped = weight * inverse.sqrt() / q
    return mapped, None if bias is None else bias / q - _dot(mapped, mean)


def _dot(weight: Tensor, mean: Tensor) -> Tensor:
    """Return the sum of ``weight * mean`` over all but the output units ``(out,)``."""
    taps = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
    if len(mean) == 1:
        return taps @ mean.flatten()
    return (taps * mean.flatten(1)).sum(1)
