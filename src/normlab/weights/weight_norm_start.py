r"""The data-dependent start of weight normalisation: every pre-activation standardised, once.

One forward pass of a batch. In the order in which the model calls them, each weight-normalised
layer's pre-activations t are measured over the batch and over space, and length and bias set so
that their mean is 0 and their variance 1 for each unit; later layers see what the earlier ones give
*after* that.

.. math::
    g \leftarrow g / \sigma, \quad b \leftarrow (b - \mu) / \sigma

with the population deviation :math:`\sigma`, and t with the old bias.

Source: T. Salimans, D. P. Kingma, "Weight Normalization: A Simple Reparameterization to Accelerate
Training of Deep Neural Networks", 2016, arXiv 1602.07868.

Departs:
    - Dropout and other noise are off in the pass unless ``noise=True``; the public code leaves them
      on.
    - A dead unit, whose deviation is below 1e-5, keeps its length and, where its layer has a bias,
      gives 0; the paper and the public code divide by zero, or by something tiny, which makes the
      length huge.
    - The running mean of a `MeanOnlyBatchNorm` starts at the batch's mean instead of 0, so that
      evaluation is right before the first step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from normlab.moments import wide
from normlab.surgery.flow import normalises_by_batch
from normlab.weights.mean_only_batch_norm import MeanOnlyBatchNorm
from normlab.weights.weight_norm_parametrization import (
    CONVOLUTIONS,
    WITHOUT_START,
    WeightLayer,
    WeightNormed,
    weight_normed,
)

DEAD_BELOW = 1e-5


@dataclass(frozen=True)
class Start:
    """What a data-dependent start did.

    Attributes:
        started: The layers that were set, in the order of their first call.
        dead: The units that the batch does not move, by layer.
        without_bias: The layers that have no bias, whose mean therefore stays.
        repeated: The layers that were called again; their first call decided.
        unreached: The weight-normalised layers that were not called; the input weights of
            attention and recurrent layers, which have no such start, are not counted.
    """

    started: tuple[str, ...]
    dead: dict[str, tuple[int, ...]]
    without_bias: tuple[str, ...]
    repeated: tuple[str, ...]
    unreached: tuple[str, ...]

    def __str__(self) -> str:
        """One sentence about what was done, and one about each thing to know."""
        centred = [name for name in self.started if name not in self.without_bias]
        parts = []
        if centred:
            layers = "1 layer starts" if len(centred) == 1 else f"{len(centred)} layers start"
            parts.append(f"{layers} at mean 0 and variance 1")
        for names, what in (
            (centred, "are at 0"),
            (self.without_bias, "keep what they give, without a bias"),
        ):
            units = [f"{name}: {_few(self.dead[name])}" for name in names if name in self.dead]
            if units:
                parts.append(
                    f"dead units, which the batch does not move, {what}: {'; '.join(units)}"
                )
        for names, what in (
            (self.without_bias, "no bias, so only the variance is set"),
            (self.repeated, "called several times, the first call decided"),
            (self.unreached, "not called, left alone"),
        ):
            if names:
                parts.append(f"{what}: {', '.join(names)}")
        return ". ".join(parts)


@torch.no_grad()
def data_dependent_start(model: nn.Module, *inputs: Any, noise: bool = False) -> Start:
    """Set lengths and biases so that each pre-activation has mean 0 and variance 1 on a batch.

    The pass runs without noise: every module is in evaluation mode but normalisers by the batch
    (those with running statistics, and classes that say ``batch_statistics = True``), which
    normalise as in training. Of a layer without a bias only the variance is set. Modes and running
    statistics are as before afterwards. With several processes give each the same inputs, or start
    before the model is wrapped: DDP then hands on what the first process has.

    Args:
        model: A model with weight-normalised layers, changed in place.
        inputs: What its forward takes; some hundreds of training samples.
        noise: Whether the pass runs in training mode, with dropout and other noise.

    Returns:
        What was done, with the dead units.

    Raises:
        ValueError: No layer is weight-normalised, one has another parametrisation on top, a layer
            sees a single value for each unit, or its output is not finite. Nothing is changed
            then, nor if the model raises.

    Example:
        >>> from normlab.weights.weight_norm_parametrization import weight_normalize
        >>> model, x = weight_normalize(nn.Linear(3, 2)), torch.randn(50, 3)
        >>> data_dependent_start(model, x).dead
        {}
        >>> torch.allclose(model(x).std(0, correction=0), torch.ones(2))
        True
    """
    every = weight_normed(model)
    found = {one.layer: one for one in every if not isinstance(one.layer, WITHOUT_START)}
    if not found:
        raise ValueError(
            "data_dependent_start(model): expected weight-normalised linear or convolutional "
            f"layers, got {type(model).__name__} without any; call weight_normalize first"
        )
    for one in found.values():
        if not one.is_alone:
            raise ValueError(
                "data_dependent_start(model): expected weight normalisation alone on "
                f"{one.name or 'the model'}, got another parametrisation on top; start first, put "
                "the other one on afterwards"
            )
    starter = _Starter(found)
    with ExitStack() as stack:
        stack.enter_context(_unchanged_on_error(list(found.values())))
        stack.enter_context(_modes_and_buffers(model, noise))
        for layer in found:
            handle = layer.register_forward_hook(starter, prepend=True, with_kwargs=True)
            stack.callback(handle.remove)
        model(*inputs)
    return starter.report()


class _Starter:
    """The hook: sets a layer at its first call, and returns what it gives from then on."""

    def __init__(self, found: dict[nn.Module, WeightNormed]) -> None:
        self._found = found
        self._started: list[WeightNormed] = []
        self._repeated: dict[str, None] = {}
        self._dead: dict[str, tuple[int, ...]] = {}

    def __call__(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        one = self._found[layer]
        if one in self._started:
            self._repeated[one.name] = None
            return None
        self._started.append(one)
        dead = _standardise(one, output)
        if dead:
            self._dead[one.name] = dead
        # Not the layer itself, which would call the hooks again.
        return layer.forward(*args, **kwargs)

    def report(self) -> Start:
        return Start(
            started=tuple(one.name for one in self._started),
            dead=self._dead,
            without_bias=tuple(one.name for one in self._started if one.layer.bias is None),
            repeated=tuple(self._repeated),
            unreached=tuple(o.name for o in self._found.values() if o not in self._started),
        )


def _standardise(one: WeightNormed, output: Tensor) -> tuple[int, ...]:
    """Set length and bias of one layer by its output; returns the dead units."""
    layer = cast(WeightLayer, one.layer)
    axis = output.dim() - 1
    if isinstance(layer, CONVOLUTIONS):
        axis -= len(layer.kernel_size)
    units = output.shape[axis]
    if output.numel() <= units:
        raise ValueError(
            f"data_dependent_start(inputs): expected more than one value for each unit of "
            f"{one.name or 'the model'}, got output of shape {tuple(output.shape)}; give a batch "
            "of some hundreds of samples"
        )
    others = [other for other in range(output.dim()) if other != axis]
    variance, mean = torch.var_mean(wide(output), dim=others, correction=0)
    std = variance.sqrt()
    if not (torch.isfinite(std).all() and torch.isfinite(mean).all()):
        raise ValueError(
            f"data_dependent_start(inputs): expected finite output of {one.name or 'the model'}, "
            "got inf or NaN; look at the inputs and at the weights"
        )
    dead = std < DEAD_BELOW
    divisor = torch.where(dead, 1.0, std)
    one.length.view(-1).copy_(one.length.view(-1) / divisor)
    if layer.bias is not None:
        layer.bias.copy_((layer.bias - mean) / divisor)
    return tuple(torch.nonzero(dead).flatten().tolist())


@contextmanager
def _unchanged_on_error(found: list[WeightNormed]) -> Iterator[None]:
    biases = (one.layer.bias for one in found)
    tensors = [one.length for one in found] + [b for b in biases if isinstance(b, Tensor)]
    values = [tensor.clone() for tensor in tensors]
    try:
        yield
    except BaseException:
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)
        raise


@contextmanager
def _modes_and_buffers(model: nn.Module, noise: bool) -> Iterator[None]:
    """Set the modes of the pass; afterwards modes and buffers are as before, but for the means."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    mean_only = [module for module in model.modules() if isinstance(module, MeanOnlyBatchNorm)]
    momenta = [(module, module.momentum) for module in mean_only]
    means: list[tuple[MeanOnlyBatchNorm, Tensor]] = []
    try:
        model.train(noise)
        for module in model.modules():
            if normalises_by_batch(module):
                module.training = True
        for module in mean_only:
            module.momentum = 1.0
        yield
        means = [(module, module.running_mean.clone()) for module in mean_only]
    finally:
        for module, training in modes:
            module.training = training
        for module, momentum in momenta:
            module.momentum = momentum
        for buffer, value in buffers:
            buffer.copy_(value)
        for module, mean in means:
            module.running_mean.copy_(mean)


def _few(units: Sequence[int]) -> str:
    shown = ", ".join(map(str, units[:8]))
    return shown if len(units) <= 8 else f"{shown}, ... ({len(units)} in all)"
