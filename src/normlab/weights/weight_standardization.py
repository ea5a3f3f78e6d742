r"""Weight standardisation with a scaled, learnt gain: every filter has mean zero and a set size.

The convolution computes with

.. math::
    \hat W_i = \gamma_i \, \frac{g}{\sqrt n} \, \frac{W_i - \mu_i}{\sigma_i + \epsilon}

where mean and standard deviation are those of the n entries of output channel i, and gradients flow
through both. A filter cannot pass on the mean of its input, and unit variance comes in and goes
out whatever the batch; so networks train without normalised activations.

Source: T. Chen, Z. Zhang, X. Ouyang, Z. Liu, Z. Shen, Z. Wang, "'BNN - BN = ?': Training Binary
Neural Networks without Batch Normalization", 2021, arXiv 2104.08215, whose real convolution it is;
A. Brock, S. De, S. L. Smith, "Characterizing signal propagation to close the performance gap in
unnormalized ResNets", 2021, arXiv 2101.08692, where the scaling comes from.

Departs:
    - It is a parametrisation of torch's own layers, not a layer: it composes with others, is saved
      with the model and can be removed.
    - As a method it takes g from what the networks of the workbench need: 1.7139, with which a ReLU
      that follows keeps the variance (option ``gamma``); the function's default is 1.
    - The gradient is one node in few passes over memory, so values differ from the plain
      equations' by rounding.
"""

from __future__ import annotations

import math
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normlab.method import Card, Method, Setting, Source, Unsuitable
from normlab.moments import runs_eagerly, wide
from normlab.parameter_groups import check_held
from normlab.weights.chosen_sizes import report_lost_sizes

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

RELU_GAMMA = 1.7139
"""The gain g of networks with ReLU, as published; the variance is kept exactly by 0.06 % less,
sqrt(2 / (1 - 1 / pi)) = 1.7129."""


def standardize_weight(
    weight: Tensor, gain: Tensor | None = None, *, gamma: float = 1.0, eps: float = 1e-5
) -> Tensor:
    r"""Return a weight whose output units have mean zero and norm :math:`g \gamma_i`.

    Args:
        weight: A weight ``(C_out, ...)``, the entries of an output unit behind its first axis.
        gain: One factor per output unit, of ``C_out`` entries in any shape; None for 1.
        gamma: The constant gain g.
        eps: Added to the standard deviation, outside the root.

    Returns:
        A tensor like ``weight``; half precision is widened to float32 inside.

    Example:
        >>> standardize_weight(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
        tensor([[-0.6708, -0.2236,  0.2236,  0.6708]])
    """
    scale = gamma / math.sqrt(math.prod(weight.shape[1:]))
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if gain is None:
        factor = torch.full((len(weight),), scale, dtype=dtype, device=weight.device)
    else:
        factor = gain.flatten().to(dtype) * scale
    if runs_eagerly(weight, gain):
        return _Standardize.apply(weight, factor, eps)
    return _plain(weight, factor, eps)


def _plain(weight: Tensor, factor: Tensor, eps: float) -> Tensor:
    rows = wide(weight).flatten(1)
    centred = rows - rows.mean(1, keepdim=True)
    variance = centred.square().mean(1, keepdim=True)
    # The root has no derivative at 0; that of a constant unit is left out, its value is 0.
    varies = variance > 0
    deviation = torch.where(varies, torch.where(varies, variance, 1.0).sqrt(), 0.0)
    return (centred * (factor[:, None] / (deviation + eps))).view_as(weight).to(weight.dtype)


class _Standardize(torch.autograd.Function):
    """`_plain` as one node that keeps its input and two numbers per unit."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, factor: Tensor, eps: float) -> Tensor:
        rows = wide(weight).flatten(1)
        mean = rows.mean(1, keepdim=True)
        centred = rows - mean
        deviation = torch.linalg.vector_norm(centred, dim=1, keepdim=True).div_(
            math.sqrt(rows.shape[1])
        )
        ctx.save_for_backward(weight, factor, mean, deviation)
        ctx.eps = eps
        return centred.mul_(factor[:, None] / (deviation + eps)).view_as(weight).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, factor, mean, deviation = ctx.saved_tensors
        if torch.is_grad_enabled():
            # Derivatives of this backward need mean and deviation as functions of the weight.
            value = _plain(weight, factor, ctx.eps)
            wanted = list(compress((weight, factor), ctx.needs_input_grad))
            found = iter(torch.autograd.grad(value, wanted, gradients[0], create_graph=True))
            return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)
        gradient = wide(gradients[0]).flatten(1)
        centred = wide(weight).flatten(1) - mean
        along = (gradient * centred).sum(1, keepdim=True)
        inverse = 1 / (deviation + ctx.eps)
        scale = factor[:, None] * inverse
        # Where a unit is constant the deviation has no derivative; zero leaves it alone.
        pull = torch.where(deviation > 0, -along * scale * inverse / deviation, 0.0)
        pull /= centred.shape[1]
        base = -scale * gradient.mean(1, keepdim=True)
        d_weight = centred.mul_(pull).addcmul_(gradient, scale).add_(base)
        return d_weight.view_as(weight).to(weight.dtype), (along * inverse).flatten(), None


class WeightStandardization(nn.Module):
    """The parametrisation: `standardize_weight` with a learnt gain that starts at 1.

    Args:
        num_units: The number of output units C_out. The gain is of shape ``(C_out, 1, 1, 1)``, so
            that what treats a parameter unit by unit (adaptive clipping) does so with it.
        gamma: The constant gain g.
        eps: Added to the standard deviation.

    Shape:
        Input and output ``(C_out, ...)``.

    Example:
        >>> layer = nn.Conv2d(3, 4, 3)
        >>> _ = parametrize.register_parametrization(layer, "weight", WeightStandardization(4))
        >>> layer.weight.mean((1, 2, 3)).abs().max().item() < 1e-6
        True
    """

    def __init__(self, num_units: int, gamma: float = 1.0, eps: float = 1e-5) -> None:
        super().__init__()
        for name, value in (("gamma", gamma), ("eps", eps)):
            if not value > 0:
                raise ValueError(
                    f"WeightStandardization({name}={value}): expected a number above 0, got "
                    f"{value}; leave it out for the default"
                )
        self.gamma = gamma
        self.eps = eps
        self.gain = nn.Parameter(torch.ones(num_units, 1, 1, 1))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the standardised weight."""
        return standardize_weight(weight, self.gain, gamma=self.gamma, eps=self.eps)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return what to standardise where ``layer.weight = weight`` is written: the weight.

        The layer computes with what becomes of it, whatever its mean and size.
        """
        return weight

    def extra_repr(self) -> str:
        """Return the arguments shown by ``print``."""
        return f"{len(self.gain)}, gamma={self.gamma}, eps={self.eps}"


def standardize_weights(
    target: nn.Module, *, gamma: float = 1.0, eps: float = 1e-5
) -> dict[str, nn.Module]:
    """Standardise the weights of all convolutions of a model, in place.

    Args:
        target: A model, or one convolution; layers whose weight is standardised already are left.
        gamma: The constant gain g.
        eps: Added to the standard deviation.

    Returns:
        The layers by name. ``parametrize.remove_parametrizations(layer, "weight")`` makes one plain
        again, with the weight that it computes with.

    Raises:
        ValueError: ``gamma`` or ``eps`` is not above 0, or a filter has a single entry.

    Example:
        >>> list(standardize_weights(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(2, 2))))
        ['0']
    """
    chosen: dict[str, nn.Module] = {
        name: module
        for name, module in target.named_modules()
        if isinstance(module, CONVOLUTIONS) and not _is_standardized(module)
    }
    parts = []
    for name, module in chosen.items():
        assert isinstance(module.weight, Tensor)
        shape = module.weight.shape
        if math.prod(shape[1:]) < 2:
            raise ValueError(
                f"standardize_weights({name or 'layer'}): expected filters of several entries, got "
                f"a weight of shape {tuple(shape)}, which would become zero; leave this layer out"
            )
        parts.append(WeightStandardization(shape[0], gamma, eps).to(module.weight))
    for module, part in zip(chosen.values(), parts, strict=True):
        parametrize.register_parametrization(module, "weight", part)
    return chosen


def _is_standardized(module: nn.Module) -> bool:
    if not parametrize.is_parametrized(module, "weight"):
        return False
    assert isinstance(module.parametrizations, nn.ModuleDict)
    parts = module.parametrizations["weight"].children()
    return any(isinstance(part, WeightStandardization) for part in parts)


def prepare(
    model: nn.Module, setting: Setting, *, gamma: float = RELU_GAMMA, eps: float = 1e-5
) -> nn.Module:
    """Standardise the weights of all convolutions; normalisers stay where they are."""
    if not any(isinstance(module, CONVOLUTIONS) for module in model.modules()):
        raise Unsuitable(
            "weight-standardization(model): expected a model with convolutions, got "
            f"{type(model).__name__} without any; use weight-norm for dense layers"
        )
    report_lost_sizes(model, setting)
    chosen = standardize_weights(model, gamma=gamma, eps=eps)
    setting.say(f"the weights of {len(chosen)} convolutions are standardised")
    return model


def attach(model: nn.Module, optimizer: torch.optim.Optimizer, setting: Setting) -> None:
    """Refuse an optimiser that was built before the weights were standardised."""
    parts = (module for module in model.modules() if isinstance(module, WeightStandardization))
    check_held("weight-standardization", (part.gain for part in parts), optimizer)


CARD = Card(
    name="weight-standardization",
    title="Scaled weight standardisation",
    summary="Convolves with filters of mean zero and set size, each with a learnt gain.",
    room="weights",
    source=Source(
        authors="T. Chen, Z. Zhang, X. Ouyang, Z. Liu, Z. Shen, Z. Wang",
        title="'BNN - BN = ?': Training Binary Neural Networks without Batch Normalization",
        year=2021,
        arxiv="2104.08215",
    ),
    batch_of_one="as the model",
    state=("a gain per output channel",),
    best_for="Convolutional networks without normalised activations (none+weight-standardization+"
    "adaptive-clipping), or in front of GroupNorm at small batches.",
    limits=(
        "It leaves the model's normalisers where they are: compose with none to take them out.",
        "In deep residual networks without normalisers the sums still grow with depth.",
        "Behind fixup it undoes the sizes that Fixup chose.",
        "Linear layers, and transposed convolutions, are left alone.",
    ),
    departures=(
        "The constant gain is 1.7139, for ReLU networks; binary networks take gamma=1.",
        "A parametrisation of torch's layers instead of a layer of its own.",
    ),
)

METHOD = Method(card=CARD, prepare=prepare, attach=attach)
