r"""Merge a fixed affine map of channels into the linear or convolutional layer beside it.

.. math::
    s (W x + b) + t = (s W) x + (s b + t), \qquad W (s x + t) + b = (W s) x + (b + W t)

Everything is computed in float64; the caller stores it in the dtype of the layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normlab.surgery.scale_free import by_unit


@torch.no_grad()
def affine_map(
    mean: Any, variance: Any, weight: Tensor | None, bias: Tensor | None, eps: Any
) -> tuple[Tensor, Tensor]:
    """Return scale and shift ``(C,)`` in float64; ``weight`` and ``bias`` may be None."""
    scale = torch.rsqrt(variance.double() + eps)
    scale = scale if weight is None else scale * weight.double()
    shift = -mean.double() * scale
    return scale, shift if bias is None else shift + bias.double()


@torch.no_grad()
def merge_norm_after(
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    *,
    groups: int = 1,
    transposed: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return weight and bias in float64 of a layer with ``scale * y + shift`` behind it.

    Args:
        weight: The layer's weight.
        bias: Its bias, or None.
        scale: One per output channel.
        shift: One per output channel.
        groups: The convolution's groups.
        transposed: Whether it is a transposed convolution, whose weight begins with the inputs.
    """
    weight, scale, shift = weight.double().clone(), scale.to(weight.device), shift.to(weight.device)
    units = by_unit(weight, groups, transposed)
    units.mul_(scale.reshape(groups, -1, *[1] * (units.dim() - 2)))
    return weight, shift if bias is None else bias.double() * scale + shift


@torch.no_grad()
def merge_norm_before(
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    *,
    groups: int = 1,
    transposed: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias in float64 of a layer with ``scale * x + shift`` in front of it.

    Args:
        weight: The layer's weight.
        bias: Its bias, or None; stays None where the shift is zero.
        scale: One per input channel.
        shift: One per input channel; must not change at a border, see `shift_is_uniform`.
        groups: The convolution's groups.
        transposed: Whether it is a transposed convolution, whose weight begins with the inputs.
    """
    weight, scale, shift = weight.double().clone(), scale.to(weight.device), shift.to(weight.device)
    units = by_unit(weight, groups, transposed)
    by_input = (groups, 1, -1, *[1] * (units.dim() - 3))
    constant = (units * shift.reshape(by_input)).flatten(2).sum(2).flatten()
    units.mul_(scale.reshape(by_input))
    if bias is None:
        return weight, constant if shift.any() else None
    return weight, bias.double() + constant


def shift_is_uniform(
    kernel_size: Any, stride: Any, padding: Any, output_padding: Any, transposed: bool
) -> bool:
    """Whether a convolution with zero padding maps a constant input to a constant output.

    Args:
        kernel_size: One number per spatial axis; none for a linear layer.
        stride: As `kernel_size`.
        padding: As `kernel_size`, ``"same"`` or ``"valid"``.
        output_padding: As `kernel_size`.
        transposed: Whether the convolution is transposed, where outputs differ in the number of
            weights that reach them.
    """
    if transposed:
        return set(kernel_size) <= {1} and set(stride) <= {1} and not any(output_padding)
    if padding == "same":
        return set(kernel_size) <= {1}
    return padding == "valid" or not any(padding)
