r"""The arithmetic of filter response normalisation and its threshold, in few passes over memory.

In eager mode each function here is one node of autograd's graph: it keeps its input and a few
numbers per map, where the plain composition keeps three tensors as large as the input, and its
backward works in place. Everything else, `torch.compile`, `torch.func`, forward-mode derivatives
and derivatives of derivatives, goes by the plain equations, which torch differentiates or fuses by
itself.

With :math:`g` the gradient that passes the threshold, times gamma, :math:`r = \sqrt{\nu^2 +
\epsilon}` and means over space, backward is

.. math::
    dx = (g - \hat x \, \mathrm{mean}(g \hat x)) / r, \quad
    d\epsilon = -\tfrac12 \sum g x / r^3

Source: S. Singh, S. Krishnan, "Filter Response Normalization Layer: Eliminating Batch Dependence
in the Training of Deep Neural Networks", 2019, arXiv 1911.09737.

Departs: gamma / r is multiplied first and the shift added after, in one pass less, so that values
differ from the equations' by rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normlab.moments import per_channel, runs_eagerly, wide


def filter_response_unit(
    x: Tensor, weight: Tensor, bias: Tensor, eps: Tensor | float, threshold: Tensor | None = None
) -> Tensor:
    r"""Divide each map by its root mean square, scale, shift, and take the threshold if smaller.

    .. math::
        \nu^2 = \mathrm{mean}_{space}(x^2), \quad
        z = \max(\gamma x / \sqrt{\nu^2 + \epsilon} + \beta, \tau)

    Args:
        x: Activations ``(N, C, *)``; without spatial axes each value is a map of its own.
        weight: The scale gamma ``(C,)``.
        bias: The shift beta ``(C,)``.
        eps: Added to the mean square: a number above 0, or one per channel ``(C,)``.
        threshold: The threshold tau ``(C,)``, or None for none. At a tie each side takes half of
            the gradient.

    Returns:
        A tensor of the shape, dtype and layout of ``x``; half precision is widened to float32
        inside.

    Example:
        >>> x = torch.tensor([[[3.0, -4.0, 0.0, 0.0]]])
        >>> filter_response_unit(x, torch.ones(1), torch.zeros(1), 1e-6, torch.zeros(1))
        tensor([[[1.2000, 0.0000, 0.0000, 0.0000]]])
    """
    if runs_eagerly(x, weight, bias, eps, threshold):
        return _FilterResponseUnit.apply(x, weight, bias, eps, threshold)
    full = wide(x)
    inverse = (_over_space(full.square()) / _space(x) + eps).rsqrt()
    y = full * _maps(weight * inverse, x) + per_channel(bias, x)
    if threshold is not None:
        y = torch.maximum(y, per_channel(threshold, x))
    return y.to(x.dtype)


def thresholded_linear_unit(x: Tensor, threshold: Tensor) -> Tensor:
    r"""Return :math:`\max(x, \tau)` with one learnt threshold per channel.

    Args:
        x: Activations ``(N, C, *)``.
        threshold: The threshold tau ``(C,)``. At a tie each side takes half of the gradient.

    Returns:
        A tensor like ``x``.
    """
    if runs_eagerly(x, threshold):
        return _ThresholdedLinearUnit.apply(x, threshold)
    return torch.maximum(x, per_channel(threshold, x).to(x.dtype))


class _FilterResponseUnit(torch.autograd.Function):
    """`filter_response_unit` as one node that keeps its input and one number per map."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: Tensor | float,
        threshold: Tensor | None,
    ) -> Tensor:
        full = wide(x)
        inverse = (_sum_of_squares(full) / _space(x) + eps).rsqrt()
        y = _affine(full, weight * inverse, bias)
        if threshold is not None:
            y.clamp_(min=per_channel(threshold, x).to(y.dtype))
        learnt = eps if isinstance(eps, Tensor) else None
        ctx.eps = eps if learnt is None else None
        ctx.save_for_backward(x, weight, bias, learnt, threshold, inverse)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, eps, threshold, inverse = ctx.saved_tensors
        gradient = wide(gradients[0])
        full = wide(x)
        scale = weight * inverse
        in_place = not torch.is_grad_enabled()
        if not in_place:
            # Derivatives of this backward need it as a function of x, not of the number kept.
            eps = ctx.eps if eps is None else eps
            inverse = (_over_space(full.square()) / _space(x) + eps).rsqrt()
            scale = weight * inverse
        passed, share = gradient, 1.0
        if threshold is not None:
            with torch.no_grad():
                side = _affine(full, scale.detach(), bias.detach() - threshold.detach()).sign_()
            passed, share = _passed_twice(gradient, side), 0.5
        along = share * _over_space(passed * full)
        through = share * _over_space(passed)
        pull = weight * along * inverse**3
        d_threshold = None
        if threshold is not None and ctx.needs_input_grad[4]:
            d_threshold = (_over_space(gradient) - through).sum(0)
        d_x = None
        if ctx.needs_input_grad[0]:
            one, two = _maps(share * scale, x), _maps(pull / -_space(x), x)
            # The gradient handed over may be another's, too; what passed the threshold is ours.
            ours = in_place and threshold is not None
            d_x = passed.mul_(one) if ours else passed * one
            d_x = d_x.addcmul_(full, two) if in_place else d_x + full * two
            d_x = d_x.to(x.dtype)
        return (
            d_x,
            (along * inverse).sum(0),
            through.sum(0),
            -0.5 * pull.sum(0) if ctx.needs_input_grad[3] else None,
            d_threshold,
        )


class _ThresholdedLinearUnit(torch.autograd.Function):
    """`thresholded_linear_unit` as one node that keeps its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(x, threshold)
        return torch.clamp(x, min=per_channel(threshold, x).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        x, threshold = ctx.saved_tensors
        with torch.no_grad():
            side = (x - per_channel(threshold, x).to(x.dtype)).sign_()
        passed = _passed_twice(gradients[0], side)
        d_x = passed * 0.5 if torch.is_grad_enabled() else passed.mul_(0.5)
        if not ctx.needs_input_grad[1]:
            return d_x, None
        stopped = _over_space(wide(gradients[0])) - _over_space(wide(d_x))
        return d_x, stopped.sum(0)


def _passed_twice(gradient: Tensor, side: Tensor) -> Tensor:
    """Return twice what passes a threshold: 2g above it, where ``side`` is 1; g at a tie, 0."""
    # Sign and product are several times faster on a CPU than a comparison and a choice.
    return torch.addcmul(gradient, gradient, side)


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return ``scale * x + shift`` for one scale per map ``(N, C)``, one shift per channel."""
    scale, shift = _maps(scale, x), per_channel(shift, x)
    if x.is_cpu and x.is_contiguous():
        # With two operands that stand still along a map, torch's CPU loop is not vectorised.
        return torch.mul(x, scale).add_(shift)
    return torch.addcmul(shift, x, scale)


def _sum_of_squares(x: Tensor) -> Tensor:
    """Return the sum of squares over space, one per map ``(N, C)``."""
    if x.dim() > 2 and (x.is_contiguous() or not x.is_cpu):
        return torch.linalg.vector_norm(x, dim=list(range(2, x.dim()))).square()
    # On a CPU torch's norm is many times slower than this where the channels stand together.
    return _over_space(x.square())


def _over_space(x: Tensor) -> Tensor:
    """Return the sum over the spatial axes, one per map ``(N, C)``."""
    # torch reads an empty list of axes as "all of them".
    return x.sum(list(range(2, x.dim()))) if x.dim() > 2 else x


def _space(x: Tensor) -> int:
    return x[0, 0].numel()


def _maps(values: Tensor, like: Tensor) -> Tensor:
    """Return ``values`` of shape ``(N, C)`` as a view that broadcasts against ``like``."""
    return values.reshape(*values.shape, *(1,) * (like.dim() - 2))
