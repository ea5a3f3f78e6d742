r"""Bias shift: how far the activations that enter each layer are from zero mean.

A step on the weights of a unit also moves the mean of its input, as if its bias had been moved by
:math:`b^\top A^{-1} g`. The natural gradient takes that back; the plain gradient does not, and the
two agree where incoming activations have zero mean under the distribution that the squared
back-signals weigh.

Source: D.-A. Clevert, T. Unterthiner, S. Hochreiter, "Fast and Accurate Deep Network Learning by
Exponential Linear Units (ELUs)", 2015, arXiv 1511.07289, section 2.

Departs: expectations are over the labels given, the empirical Fisher matrix, rather than over those
that the model predicts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normlab.surgery.flow import evaluating

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class BiasShift:
    r"""What one linear or convolutional layer is given.

    Attributes:
        name: The layer's qualified name.
        mean: The mean of its input over samples, positions and features.
        root_mean_square: The root of the mean square of the same.
        weighted_mean: :math:`\lVert b \rVert_2 / c`, the norm of the mean input of a unit weighted
            by the squared back-signal, averaged over units that have one; NaN without any. The
            zeros that a convolution pads with count as input.
    """

    name: str
    mean: float
    root_mean_square: float
    weighted_mean: float


def bias_shift(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
) -> list[BiasShift]:
    r"""Measure the bias shift in front of every linear and convolutional layer of torch's own.

    With activations a in front of a unit and its back-signal :math:`\delta`, the gradient of the
    loss of a sample by what the unit returns,

    .. math::
        b = E[\delta^2 a], \quad c = E[\delta^2].

    The model runs once, in evaluation mode; its parameters, gradients and statistics stay.

    Args:
        model: Any module; a layer that is called twice is measured at its last call.
        inputs: A batch ``(N, ...)``.
        targets: What ``loss`` takes.
        loss: Maps ``(outputs, targets)`` to a scalar, a sum or mean over samples.

    Returns:
        One entry a layer that is called and whose output the loss depends on, in the order of the
        calls.

    Raises:
        ValueError: No such layer is called.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ELU(), nn.Linear(3, 2))
        >>> shifts = bias_shift(model, torch.tensor([[1.0, 3.0]]), torch.tensor([0]))
        >>> shifts[0].name, shifts[0].mean, round(shifts[0].weighted_mean, 4)
        ('0', 2.0, 3.1623)
    """
    seen: dict[str, tuple[nn.Module, Tensor, Tensor]] = {}

    def note(
        name: str, layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Tensor
    ) -> Tensor:
        seen.pop(name, None)
        # A view of its own, so that an operation in place behind the layer moves nothing here.
        made = output if output.requires_grad else output.detach().requires_grad_()
        x = given[0] if given else named["input"]
        seen[name] = (layer, x.detach(), made)
        return made.clone()

    handles = [
        layer.register_forward_hook(partial(note, name), with_kwargs=True)
        for name, layer in model.named_modules()
        if type(layer) in _LAYERS
    ]
    try:
        with evaluating(model), torch.enable_grad():
            total = loss(model(inputs), targets)
    finally:
        for handle in handles:
            handle.remove()
    outputs = [output for _, _, output in seen.values()]
    if not outputs:
        raise ValueError(
            "bias_shift(model): expected linear or convolutional layers, got "
            f"{type(model).__name__} that calls none; give the whole network"
        )
    signals = torch.autograd.grad(total, outputs, allow_unused=True)
    return [
        _measure(name, layer, given, signal)
        for (name, (layer, given, _)), signal in zip(seen.items(), signals, strict=True)
        if signal is not None
    ]


def _measure(name: str, layer: nn.Module, given: Tensor, signal: Tensor) -> BiasShift:
    """The layer is linear in its weight: its backward pass sums input times signal by itself."""
    weight = layer.get_parameter("weight").detach().requires_grad_()
    # Scaled, because squares of small back-signals may vanish; both sums scale alike.
    square = (signal / signal.abs().max().clamp_min(torch.finfo(signal.dtype).tiny)).square()
    with torch.enable_grad():
        output = torch.func.functional_call(layer, {"weight": weight}, (given,))
        (b,) = torch.autograd.grad(output, weight, square)
    # From the end, so that it holds with and without a batch axis: (*, units) or (units, *space).
    c = square.movedim(1 - weight.dim(), 0).flatten(1).sum(1)
    norms = b.flatten(1).norm(dim=1) / c
    wide = given.double()
    return BiasShift(
        name=name,
        mean=wide.mean().item(),
        root_mean_square=wide.square().mean().sqrt().item(),
        weighted_mean=norms[c > 0].mean().item(),
    )


def unit_natural_gradient(
    activations: Tensor, signals: Tensor, gradient: Tensor, bias_gradient: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Return the natural gradient of one unit's weights and bias.

    .. math::
        \Delta w = A^{-1} (g - b \, \Delta w_0), \quad
        \Delta w_0 = s (g_0 - b^\top A^{-1} g), \quad
        s = (c - b^\top A^{-1} b)^{-1}

    with :math:`A = E[\delta^2 a a^\top], b = E[\delta^2 a], c = E[\delta^2]` over the samples.

    Args:
        activations: The activations a of the layer below ``(N, d)``, N above d. Those of samples
            with a back-signal, with a one for the bias, must span all d + 1 directions.
        signals: The unit's back-signals :math:`\delta`, ``(N,)``.
        gradient: The gradient g of the weights ``(d,)``.
        bias_gradient: The gradient of the bias, a scalar.

    Returns:
        The steps of weights ``(d,)`` and bias.

    Raises:
        ValueError: The samples span fewer directions, so that the Fisher matrix has no inverse.

    Example:
        >>> activations = torch.tensor([[1.0], [-1.0]])  # zero mean: no correction
        >>> unit_natural_gradient(
        ...     activations, torch.tensor([2.0, 2.0]), torch.tensor([1.0]), torch.tensor(8.0)
        ... )
        (tensor([0.2500]), tensor(2.))
    """
    samples, units = activations.shape
    extended = torch.cat([activations, torch.ones_like(activations[:, :1])], dim=1)
    rank = int(torch.linalg.matrix_rank(signals[:, None] * extended))
    if rank <= units:
        raise ValueError(
            f"unit_natural_gradient(activations): expected samples that span {units + 1} "
            f"directions, got {samples} samples that span {rank}; give more samples, and leave out "
            "units that are always zero"
        )
    square = signals.square()
    matrix = torch.einsum("n,ni,nj->ij", square, activations, activations) / len(signals)
    b, c = activations.T @ square / len(signals), square.mean()
    solved = torch.linalg.solve(matrix, torch.stack([gradient, b], dim=1))
    by_gradient, by_b = solved.unbind(1)
    bias_step = (bias_gradient - b @ by_gradient) / (c - b @ by_b)
    return by_gradient - by_b * bias_step, bias_step
