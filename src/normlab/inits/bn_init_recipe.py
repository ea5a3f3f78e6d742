"""The rest of the recipe of `normlab.inits.bn_init`: the input's normaliser, the weights' start."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch import nn

from normlab.surgery.swap import BATCH_NORMS

RECTIFIED_DEVIATION = 0.58
r"""The deviation of a rectified standard normal, :math:`\sqrt{1/2 - 1/(2\pi)} = 0.5838`, as the
paper rounds it: an input scaled by it spreads like the output of BatchNorm and ReLU inside."""

ConvInit: TypeAlias = Literal["keep", "kaiming"]
LinearInit: TypeAlias = Literal["keep", "default", "reference"]


def init_weights_(
    model: nn.Module,
    *,
    conv_init: ConvInit = "kaiming",
    linear_init: LinearInit = "default",
    generator: torch.Generator | None = None,
) -> nn.Module:
    r"""Initialise convolutions and linear layers as in the paper's recipe, with biases 0.

    .. math::
        w \sim N(0, 2/n) \;\text{(convolutions)}, \quad
        w \sim U(-b, b), \; b = 1/\sqrt{n} \;\text{(linear layers)}

    with n the number of a unit's inputs.

    Args:
        model: The model, changed in place.
        conv_init: ``"kaiming"`` as above; ``"keep"`` leaves convolutions alone. Transposed ones
            always stay.
        linear_init: ``"default"`` as above, which is torch's own; ``"reference"`` for the range of
            the public code, :math:`b = \sqrt{6/n}`; ``"keep"`` leaves linear layers alone.
        generator: For the draws, on the CPU; torch's own by default.

    Returns:
        The model.

    Raises:
        ValueError: An option has no such value.

    Example:
        >>> model = init_weights_(nn.Linear(4, 8, bias=False), linear_init="reference")
        >>> bool(model.weight.abs().max() > 0.5)  # torch's own bound is 0.5
        True
    """
    check_inits("init_weights_", conv_init, linear_init)
    for layer in model.modules():
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and conv_init == "kaiming":
            drawn = torch.empty(layer.weight.shape)
            nn.init.kaiming_normal_(drawn, nonlinearity="relu", generator=generator)
        elif isinstance(layer, nn.Linear) and linear_init != "keep":
            drawn = torch.empty(layer.weight.shape)
            squared = 1.0 if linear_init == "default" else 6.0
            bound = math.sqrt(squared / layer.in_features)
            nn.init.uniform_(drawn, -bound, bound, generator=generator)
        else:
            continue
        with torch.no_grad():
            layer.weight.copy_(drawn)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return model


def online_input_norm(
    num_features: int,
    scale: float = 0.1,
    *,
    deviation: float = RECTIFIED_DEVIATION,
    spatial_dims: int = 2,
) -> nn.Module:
    r"""Return a BatchNorm for raw inputs: scale :math:`\gamma_0 \sigma`, shift frozen at 0.

    It takes the place of the data set's fixed means and deviations, which its running statistics
    are in evaluation. The scale is learnt, and slowly, as that of any BatchNorm.

    Args:
        num_features: The number of channels of the input.
        scale: The scale gamma0 of the model's other normalisers, above 0.
        deviation: The deviation sigma, above 0.
        spatial_dims: The number of axes after samples and channels, 0 to 3.

    Returns:
        One of torch's BatchNorm layers, with all the keys of its ``state_dict``.

    Raises:
        ValueError: A value is out of range.

    Example:
        >>> layer = online_input_norm(3)
        >>> layer.weight[0].item(), layer.bias.requires_grad
        (0.0579..., False)
    """
    check_scale("online_input_norm", scale)
    if not 0 < deviation < math.inf:
        raise ValueError(
            f"online_input_norm(deviation={deviation!r}): expected a finite number above 0, got "
            f"{deviation!r}; use {RECTIFIED_DEVIATION}"
        )
    if spatial_dims not in range(4):
        raise ValueError(
            f"online_input_norm(spatial_dims={spatial_dims!r}): expected 0, 1, 2 or 3, got "
            f"{spatial_dims!r}; give the number of axes after samples and channels"
        )
    layer = BATCH_NORMS[max(spatial_dims, 1) - 1](num_features)
    nn.init.constant_(layer.weight, scale * deviation)
    layer.bias.requires_grad_(False)
    return layer


def check_scale(operation: str, scale: float) -> None:
    """Refuse a starting scale that is not above 0, in the name of ``operation``."""
    if not 0 < scale < math.inf:
        raise ValueError(
            f"{operation}(scale={scale!r}): expected a finite number above 0, got {scale!r}; use "
            "0.1, or 1 for torch's own start"
        )


def check_inits(operation: str, conv_init: str, linear_init: str) -> None:
    """Refuse an unknown ``conv_init`` or ``linear_init``, in the name of ``operation``."""
    for name, value, known in (
        ("conv_init", conv_init, ("keep", "kaiming")),
        ("linear_init", linear_init, ("keep", "default", "reference")),
    ):
        if value not in known:
            raise ValueError(
                f"{operation}({name}={value!r}): expected one of {', '.join(known)}, got "
                f"{value!r}; use {known[1]!r}"
            )
