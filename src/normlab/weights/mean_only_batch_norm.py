r"""Mean-only batch normalisation: the companion of weight normalisation, which sets the scale.

Each channel's batch mean is taken away and a learnt shift added. The noise of a mean is near a
Gaussian and gentler than that of BatchNorm's variance; it is what weight normalisation lacks as a
regulariser.

Source: T. Salimans, D. P. Kingma, "Weight Normalization: A Simple Reparameterization to Accelerate
Training of Deep Neural Networks", 2016, arXiv 1602.07868.

Departs:
    - The momentum is the weight of the newest batch, 0.1, as in torch; the paper writes the weight
      of the old average, 0.9.
    - Statistics may cover the batches of several processes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from normlab.moments import (
    check_channels,
    check_momentum,
    group_of_several,
    per_channel,
    refuse_broken_statistics,
    sum_over_processes,
    wide,
)


def mean_only_batch_norm(x: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""Take each channel's mean over samples and space away, then shift it.

    .. math::
        \tilde t = t - \mathrm{mean}(t) + b

    The gradient flows through the mean: that of ``x`` is the output's less its own mean.

    Args:
        x: Activations ``(N, C, *)``.
        bias: The shift b ``(C,)``; None for 0.

    Returns:
        A tensor of the shape and dtype of ``x``; the mean is taken in float32 if ``x`` has a half
        precision.

    Example:
        >>> mean_only_batch_norm(torch.tensor([[1.0], [2.0], [6.0]])).flatten()
        tensor([-2., -1.,  3.])
    """
    return _shifted(x, batch_mean(x), bias)


def batch_mean(x: Tensor, group: Any = None) -> Tensor:
    """Return the mean of each channel, over all processes of ``group`` if there is one.

    Across processes each one contributes its count and sum in float64, in one collective; the
    gradient flows back through the same sum, in one more.

    Args:
        x: Activations ``(N, C, *)``.
        group: A process group, or None for this process alone.
    """
    axes = [axis for axis in range(x.dim()) if axis != 1]
    if group is None:
        return wide(x).mean(axes)
    total = x.sum(axes, dtype=torch.float64)
    count = total.new_full((1,), x.numel() // x.shape[1])
    total, count = sum_over_processes(torch.cat([total, count]), group).split([x.shape[1], 1])
    return (total / count.detach()).to(wide(x).dtype)


def _shifted(x: Tensor, mean: Tensor, bias: Tensor | None) -> Tensor:
    shift = -mean if bias is None else bias - mean
    return (wide(x) + per_channel(shift, x)).to(x.dtype)


class MeanOnlyBatchNorm(nn.Module):
    r"""Mean-only batch normalisation of ``(N, C, *)``: no division by a variance.

    In training :math:`\tilde t = t - \mu_B + b`, in evaluation :math:`\tilde t = t - \bar\mu + b`
    with the running mean :math:`\bar\mu \leftarrow (1 - m) \bar\mu + m \mu_B`. Put it behind a
    weight-normalised layer without a bias.

    Args:
        num_features: The number of channels C.
        momentum: The weight m of the newest batch in the running mean, from 0 to 1; None makes it
            the plain average over all batches.
        process_group: The processes that share statistics; None for all of them, looked up at each
            call; a process alone uses its own batch. One collective a forward pass in training and
            one a backward pass; batches may differ in size.

    Shape:
        Input and output ``(N, C, *)``.

    Raises:
        ValueError: At construction for a momentum outside 0 to 1; at the call for input of another
            number of channels, of integers, or empty; at loading for a mean that is not finite.

    Example:
        >>> MeanOnlyBatchNorm(2)(torch.tensor([[1.0, 5.0], [3.0, 5.0]])).tolist()
        [[-1.0, 0.0], [1.0, 0.0]]
    """

    running_mean: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self, num_features: int, momentum: float | None = 0.1, *, process_group: Any = None
    ) -> None:
        check_momentum("MeanOnlyBatchNorm", momentum)
        super().__init__()
        self.num_features = num_features
        self.momentum = momentum
        self.process_group = process_group
        self.bias = nn.Parameter(torch.empty(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        self.register_load_state_dict_pre_hook(refuse_broken_statistics)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set shift and running mean to zero."""
        nn.init.zeros_(self.bias)
        self.running_mean.zero_()
        self.num_batches_tracked.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` of shape ``(N, C, *)``."""
        check_channels("MeanOnlyBatchNorm", x, self.num_features)
        if not self.training:
            return _shifted(x, self.running_mean, self.bias)
        mean = batch_mean(x, group_of_several(self.process_group))
        self._track(mean)
        return _shifted(x, mean, self.bias)

    @torch.no_grad()
    def _track(self, mean: Tensor) -> None:
        self.num_batches_tracked.add_(1)
        mean = mean.to(self.running_mean.dtype)
        share = self.momentum
        if share is None:
            share = 1 / self.num_batches_tracked.to(self.running_mean.dtype)
        self.running_mean.lerp_(mean, share)

    def extra_repr(self) -> str:
        """Return the arguments shown by ``print``."""
        return f"{self.num_features}, momentum={self.momentum}"


def from_batch_norm(norm: nn.Module, process_group: Any = None) -> MeanOnlyBatchNorm:
    """Return the layer that takes a BatchNorm's place.

    Shift, momentum and running mean are kept; scale and variance have no place in it.

    Args:
        norm: One of torch's BatchNorm layers.
        process_group: As in `MeanOnlyBatchNorm`.

    Returns:
        A fresh layer; its function differs from that of ``norm``.
    """
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    layer = MeanOnlyBatchNorm(norm.num_features, norm.momentum, process_group=process_group)
    with torch.no_grad():
        if norm.bias is not None:
            layer.bias.copy_(norm.bias)
        if norm.running_mean is not None:
            assert norm.num_batches_tracked is not None
            layer.running_mean.copy_(norm.running_mean)
            layer.num_batches_tracked.copy_(norm.num_batches_tracked)
    return layer
