r"""Batch normalisation, the reference: each channel is standardised with its batch's statistics.

torch's own layers are the reference method. This file adds what they lack: the training form as
one plain function, and a layer whose statistics cover the batches of all processes, on any device.

Source: S. Ioffe, C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing
Internal Covariate Shift", 2015, arXiv 1502.03167.

Departs:
    - The statistics of evaluation are exponential averages, as in torch; the paper's own, plain
      averages with frozen weights, are `normlab.surgery.recalibrate`.
    - eps is 1e-5, as in torch; the paper gives no value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normlab.method import Card, Method, Setting, Source
from normlab.moments import (
    Moments,
    batch_moments,
    check_channels,
    check_count,
    check_momentum,
    group_of_several,
    per_channel,
    refuse_broken_statistics,
    wide,
)
from normlab.surgery.swap import batch_norms, swap


def batch_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    r"""Standardise each channel over samples and space, then scale and shift it.

    .. math::
        \mu = \mathrm{mean}(x), \quad v = \mathrm{mean}((x - \mu)^2), \quad
        y = \gamma (x - \mu) / \sqrt{v + \epsilon} + \beta

    Args:
        x: Activations ``(N, C, *)``.
        weight: The scale gamma ``(C,)``; None for 1.
        bias: The shift beta ``(C,)``; None for 0.
        eps: Added to the variance.

    Returns:
        A tensor of the shape and dtype of ``x``; the statistics are taken in float32 if ``x`` has
        a half precision.

    Raises:
        ValueError: A channel holds a single value, which would always become ``bias``.

    Example:
        >>> batch_norm(torch.tensor([[1.0], [2.0], [3.0], [4.0]])).flatten()
        tensor([-1.3416, -0.4472,  0.4472,  1.3416])
    """
    check_count("batch_norm", x)
    return _standardise(x, batch_moments(x), weight, bias, eps)


def _standardise(
    x: Tensor, moments: Moments, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    scale = torch.rsqrt(moments.variance + eps)
    if weight is not None:
        scale = scale * weight
    y = (wide(x) - per_channel(moments.mean, x)) * per_channel(scale, x)
    if bias is not None:
        y = y + per_channel(bias, x)
    return y.to(x.dtype)


class SynchronizedBatchNorm(_BatchNorm):
    """Batch normalisation of ``(N, C, *)`` with the statistics of all processes' batches.

    In training the joint batch decides: output, gradients and running statistics equal those of
    one process with the batches joined. One collective a forward pass and one a backward pass
    carry count, sum and sum of squares in float64, so local batches may differ in size. The layer
    works on any device and back end, the CPU with gloo included; without several processes it is
    torch's layer. Keys and values of its ``state_dict`` are those of torch's layers.

    In evaluation no process waits for another: the running statistics are used or, without them,
    those of the local batch.

    Args:
        num_features: The number of channels C.
        eps: Added to the variance.
        momentum: The weight of the newest batch in the running statistics; None makes them plain
            averages over all batches.
        affine: Whether a scale and a shift are learnt.
        track_running_stats: Whether running statistics are kept.
        process_group: The processes that share statistics; None for all, looked up at each call,
            so that the layer can be copied and saved.

    Shape:
        Input and output ``(N, C, *)``, N of at least 1 on each process.

    Raises:
        ValueError: At construction for a momentum outside 0 to 1; at the call for input of another
            number of channels, of integers, or empty, and in training for a single value per
            channel over all processes; at loading for
            statistics that are not finite or a negative variance.

    Example:
        >>> layer = SynchronizedBatchNorm(8)
        >>> layer(torch.randn(4, 8, 5, 5)).shape
        torch.Size([4, 8, 5, 5])
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
    ) -> None:
        check_momentum("SynchronizedBatchNorm", momentum)
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        self.process_group = process_group
        self.register_load_state_dict_pre_hook(refuse_broken_statistics)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``input`` of shape ``(N, C, *)``."""
        group = group_of_several(self.process_group) if self.training else None
        if group is None:
            return super().forward(input)
        # With a value from each of several processes there is always more than one.
        self._check_input_dim(input)
        moments = batch_moments(input, group)
        if self.track_running_stats:
            self._track(moments)
        return _standardise(input, moments, self.weight, self.bias, self.eps)

    @torch.no_grad()
    def _track(self, moments: Moments) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = self.momentum
        if share is None:
            share = 1 / self.num_batches_tracked.to(self.running_mean.dtype)
        unbiased = moments.variance * (moments.num_values / (moments.num_values - 1))
        self.running_mean.lerp_(moments.mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), share)

    def _check_input_dim(self, input: Tensor) -> None:
        check_channels("SynchronizedBatchNorm", input, self.num_features)
        if self.training and group_of_several(self.process_group) is None:
            check_count("SynchronizedBatchNorm", input)


def synchronize(model: nn.Module, process_group: Any = None) -> nn.Module:
    """Replace each of torch's BatchNorm layers by one that shares statistics between processes.

    The new layers hold the very parameters and buffers of the old ones, so that an optimiser made
    before stays valid; mode, ``eps``, ``momentum`` and ``requires_grad`` are kept.

    Args:
        model: The model, changed in place; the same on every process.
        process_group: As in `SynchronizedBatchNorm`.

    Returns:
        The model, or its replacement if it is itself a BatchNorm layer.

    Raises:
        Unsuitable: The model has no batch normalisation layer.

    Example:
        >>> synchronize(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))[1].num_features
        3
    """
    norms = batch_norms(model, "synchronize").values()
    return swap(model, {norm: _synchronized(norm, process_group) for norm in norms})


def _synchronized(norm: nn.Module, process_group: Any) -> SynchronizedBatchNorm:
    assert isinstance(norm, _BatchNorm)
    layer = SynchronizedBatchNorm(
        norm.num_features,
        norm.eps,
        norm.momentum,
        norm.affine,
        norm.track_running_stats,
        process_group,
    )
    layer._parameters.update(norm._parameters)
    layer._buffers.update(norm._buffers)
    return layer


def prepare(model: nn.Module, setting: Setting) -> nn.Module:
    """Return the model as it is; `Unsuitable` if there is no BatchNorm in it."""
    batch_norms(model, "batch-norm")
    return model


CARD = Card(
    name="batch-norm",
    title="Batch normalisation",
    summary="Standardises each channel with the mean and variance of the current batch; the "
    "reference that every other method is compared with.",
    room="norms",
    source=Source(
        authors="S. Ioffe, C. Szegedy",
        title="Batch Normalization: Accelerating Deep Network Training by Reducing Internal "
        "Covariate Shift",
        year=2015,
        arxiv="1502.03167",
        venue="ICML 2015",
    ),
    batch_statistics=True,
    batch_of_one="needs space",
    eval_differs=True,
    keeps_evaluation=True,
    state=("running mean and variance of each channel", "number of batches seen"),
    best_for="Batches of about 16 independent samples or more on one device.",
    limits=(
        "The statistics of small batches are noisy, with a relative deviation of the variance "
        "near sqrt(2 / (m - 1)) over m values.",
        "Training and evaluation compute different functions, the more so the smaller the batch.",
        "Dependent samples in a batch, and learning from one sample at a time.",
    ),
    departures=(
        "Evaluation uses exponential averages, as torch does; `recalibrate` gives the paper's.",
        "eps is 1e-5, as in torch; the paper gives no value.",
    ),
)

METHOD = Method(card=CARD, prepare=prepare)
