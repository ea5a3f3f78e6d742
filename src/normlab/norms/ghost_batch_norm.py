r"""Ghost batch normalisation: a large batch is normalised in pieces, each with its own moments.

The noise of small-batch statistics regularises; ghosts keep it while the batch grows. Evaluation
is batch normalisation.

Source: E. Hoffer, I. Hubara, D. Soudry, "Train longer, generalize better: closing the
generalization gap in large batch training of neural networks", 2017, arXiv 1705.08741.

Departs:
    - The variance is averaged in evaluation, unbiased as in torch; the paper averages deviations.
    - Running statistics are updated once for each ghost, in the order of the batch, exactly as
      batch normalisation of one ghost after the other would.
    - A batch that is no multiple of the ghost size ends in a smaller ghost, which joins the one
      before if it had a single value per channel.
    - Ghosts are 32 samples unless said otherwise; the paper's were 128.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normlab.method import Card, Method, Setting, Source
from normlab.moments import (
    check_channels,
    check_count,
    check_momentum,
    refuse_broken_statistics,
    wide,
)
from normlab.norms.running_statistics import update_running_statistics
from normlab.surgery.swap import swap_batch_norms

_FEW = 8
"""Up to so many ghosts are normalised one by one: rearranging them costs more than the calls."""


def ghost_batch_norm(
    x: Tensor,
    ghost_size: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    r"""Standardise each channel over the samples of a ghost and space, then scale and shift it.

    .. math::
        y_n = \gamma (x_n - \mu_g) / \sqrt{v_g + \epsilon} + \beta, \quad g = \lfloor n / s \rfloor

    with mean and biased variance of ghost g, samples ``g s`` to ``g s + s - 1``; s is
    ``ghost_size``.

    Args:
        x: Activations ``(N, C, *)``.
        ghost_size: The number of samples in a ghost, at least 1. A last ghost may be smaller; one
            with a single value per channel joins the one before.
        weight: The scale gamma ``(C,)``; None for 1.
        bias: The shift beta ``(C,)``; None for 0.
        eps: Added to the variance, above 0.

    Returns:
        A tensor of the shape, dtype and layout of ``x``; the statistics are taken in float32 if
        ``x`` has a half precision.

    Raises:
        ValueError: A ghost has a single value per channel, or ``ghost_size`` is below 1.

    Example:
        >>> x = torch.tensor([[1.0], [3.0], [10.0], [30.0]])
        >>> ghost_batch_norm(x, 2).flatten()
        tensor([-1.0000,  1.0000, -1.0000,  1.0000])
    """
    _check_ghost_size("ghost_batch_norm", ghost_size)
    check_count("ghost_batch_norm", x)
    sizes = _ghosts_and_rest("ghost_batch_norm", x, ghost_size)
    return _normalise(x, *sizes, weight, bias, eps)[0]


class GhostBatchNorm(_BatchNorm):
    """Batch normalisation of ``(N, C, *)`` with the statistics of ghosts: pieces of the batch.

    In training it computes what batch normalisation of one ghost after the other would, running
    statistics included. A batch of one ghost is batch normalisation; so is evaluation, with the
    running statistics or, without them, those of the whole batch. Keys and values of its
    ``state_dict`` are those of torch's layers.

    Ghosts lie within one process: with several, each one normalises its own and, as with torch's
    layers, keeps its own running statistics. There is no collective.

    Args:
        num_features: The number of channels C.
        eps: Added to the variance.
        momentum: The weight of the newest ghost in the running statistics, from 0 to 1; None makes
            them plain averages over all ghosts.
        affine: Whether a scale and a shift are learnt.
        track_running_stats: Whether running statistics are kept.
        ghost_size: As in `ghost_batch_norm`.

    Shape:
        Input and output ``(N, C, *)``.

    Raises:
        ValueError: At construction for a ``ghost_size`` below 1 or a momentum outside 0 to 1; at
            the call for input of another number of channels, of integers, or empty, and in
            training for a ghost with a single value per channel.

    Example:
        >>> layer = GhostBatchNorm(8, ghost_size=4)
        >>> layer(torch.randn(16, 8, 5, 5)).shape, layer.num_batches_tracked
        (torch.Size([16, 8, 5, 5]), tensor(4))
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        ghost_size: int = 32,
    ) -> None:
        _check_ghost_size("GhostBatchNorm", ghost_size)
        check_momentum("GhostBatchNorm", momentum)
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        self.ghost_size = ghost_size
        self.register_load_state_dict_pre_hook(refuse_broken_statistics)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``input`` of shape ``(N, C, *)``."""
        self._check_input_dim(input)
        if not self.training:
            return super().forward(input)
        ghosts, rest = _ghosts_and_rest("GhostBatchNorm", input, self.ghost_size)
        if ghosts + (rest > 0) == 1:
            return super().forward(input)
        # torch's plain averages read a tensor's value, which ends a compiled graph.
        if self.momentum is not None and _one_by_one(input, ghosts):
            batch_norm = super().forward
            sizes = [self.ghost_size] * ghosts + [rest] * (rest > 0)
            return torch.cat([batch_norm(part) for part in input.split(sizes)])
        y, means, variances = _normalise(input, ghosts, rest, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            update_running_statistics(self, means, variances)
        return y

    def _check_input_dim(self, input: Tensor) -> None:
        check_channels("GhostBatchNorm", input, self.num_features)
        if self.training:
            check_count("GhostBatchNorm", input)

    def extra_repr(self) -> str:
        """Return the arguments shown by ``print``."""
        return f"{super().extra_repr()}, ghost_size={self.ghost_size}"


def _check_ghost_size(operation: str, ghost_size: int) -> None:
    if ghost_size < 1:
        raise ValueError(
            f"{operation}(ghost_size={ghost_size}): expected at least 1, got {ghost_size}; use 32"
        )


def _ghosts_and_rest(operation: str, x: Tensor, ghost_size: int) -> tuple[int, int]:
    """Return the number of ghosts of full size, and that of the samples in the last ragged one."""
    positions = math.prod(x.shape[2:])
    if ghost_size * positions == 1:
        raise ValueError(
            f"{operation}(ghost_size=1): expected more than one value per channel in a ghost, got "
            f"shape {tuple(x.shape)}; use ghosts of 2 samples or more"
        )
    ghosts, rest = divmod(x.shape[0], ghost_size)
    if rest * positions == 1 and ghosts > 0:
        return ghosts - 1, ghost_size + 1
    return ghosts, rest


def _one_by_one(x: Tensor, ghosts: int) -> bool:
    # Where the channels stand together, rearranging would cost several passes over memory.
    channels_last = x.movedim(1, -1).is_contiguous() and not x.is_contiguous()
    return channels_last or ghosts <= _FEW


def _normalise(
    x: Tensor, ghosts: int, rest: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output with means and unbiased variances of all ghosts, ``(G, C)``."""
    if rest == 0:
        return _normalise_equal(x, ghosts, weight, bias, eps)
    full, ragged = x.split([x.shape[0] - rest, rest])
    parts = [(full, ghosts)] * (ghosts > 0) + [(ragged, 1)]
    done = [_normalise_equal(part, count, weight, bias, eps) for part, count in parts]
    if len(done) == 1:
        return done[0]
    y, means, variances = zip(*done, strict=True)
    return torch.cat(y), torch.cat(means), torch.cat(variances)


def _normalise_equal(
    x: Tensor, ghosts: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output of ghosts of one size with their means and unbiased variances."""
    if _one_by_one(x, ghosts):
        return _one_after_the_other(x, ghosts, weight, bias, eps)
    return _as_channels(x, ghosts, weight, bias, eps)


def _one_after_the_other(
    x: Tensor, ghosts: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    # With momentum 1 the running statistics are those of the ghost.
    means, variances = wide(x).new_zeros(2, ghosts, x.shape[1])
    scale, shift = (None if one is None else wide(one) for one in (weight, bias))
    parts = [
        F.batch_norm(part, mean, variance, scale, shift, training=True, momentum=1.0, eps=eps)
        for part, mean, variance in zip(x.chunk(ghosts), means, variances, strict=True)
    ]
    return torch.cat(parts), means, variances


def _as_channels(
    x: Tensor, ghosts: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise in one call: the channels of all ghosts are those of a smaller batch."""
    channels = x.shape[1]
    folded = x.unflatten(0, (ghosts, -1)).transpose(0, 1).flatten(1, 2)
    means, variances = wide(x).new_zeros(2, ghosts * channels)
    y = F.batch_norm(
        folded,
        means,
        variances,
        None if weight is None else wide(weight).repeat(ghosts),
        None if bias is None else wide(bias).repeat(ghosts),
        training=True,
        momentum=1.0,
        eps=eps,
    )
    y = y.unflatten(1, (ghosts, channels)).transpose(0, 1).flatten(0, 1)
    return y, means.view(ghosts, channels), variances.view(ghosts, channels)


def from_batch_norm(norm: nn.Module, ghost_size: int = 32) -> GhostBatchNorm:
    """Return the layer that takes a BatchNorm's place, with the very parameters and buffers of it.

    Scale, shift, running statistics, eps, momentum and mode are kept, so evaluation stays as it
    was, and an optimiser made before stays valid.

    Args:
        norm: One of torch's BatchNorm layers.
        ghost_size: As in `ghost_batch_norm`.

    Returns:
        The new layer.

    Example:
        >>> norm = nn.BatchNorm2d(8, momentum=0.3)
        >>> layer = from_batch_norm(norm, 16)
        >>> layer.weight is norm.weight, layer.momentum
        (True, 0.3)
    """
    assert isinstance(norm, _BatchNorm)
    layer = GhostBatchNorm(
        norm.num_features,
        norm.eps,
        norm.momentum,
        norm.affine,
        norm.track_running_stats,
        ghost_size=ghost_size,
    )
    layer._parameters.update(norm._parameters)
    layer._buffers.update(norm._buffers)
    return layer.train(norm.training)


def prepare(model: nn.Module, setting: Setting, *, ghost_size: int = 32) -> nn.Module:
    """Replace each BatchNorm by one with ghosts of ``ghost_size`` samples."""
    _check_ghost_size("ghost-batch-norm", ghost_size)
    model = swap_batch_norms(model, lambda _, norm: from_batch_norm(norm, ghost_size), CARD.name)
    count = sum(isinstance(module, GhostBatchNorm) for module in model.modules())
    setting.say(f"{count} BatchNorm layers normalise ghosts of {ghost_size} samples now")
    return model


CARD = Card(
    name="ghost-batch-norm",
    title="Ghost batch normalisation",
    summary="Standardises each channel over small pieces of a large batch, and keeps the noise of "
    "small batches.",
    room="norms",
    source=Source(
        authors="E. Hoffer, I. Hubara, D. Soudry",
        title="Train longer, generalize better: closing the generalization gap in large batch "
        "training of neural networks",
        year=2017,
        arxiv="1705.08741",
        venue="NeurIPS 2017",
    ),
    batch_statistics=True,
    batch_of_one="needs space",
    eval_differs=True,
    keeps_evaluation=True,
    state=("running mean and variance of each channel", "number of ghosts seen"),
    best_for="Batches of several hundred samples or more on one device, where batch normalisation "
    "generalises worse than it did at small batches.",
    limits=(
        "It brings back the noise of small batches; it does not help where batches are small.",
        "On a CPU, convolutional maps are copied twice, and a loop over the ghosts can be faster.",
    ),
    departures=(
        "Evaluation averages unbiased variances, as torch does; the paper averages deviations.",
        "A ragged last ghost is kept, or joins the one before if it had one value per channel.",
        "Ghosts are 32 samples unless said otherwise; the paper's were 128.",
    ),
)

METHOD = Method(card=CARD, prepare=prepare)
