"""torch's BatchNorm layers on a batch that is held in parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from normlab.moments import Moments, check_channels, per_channel, wide
from normlab.norms.running_statistics import update_running_statistics
from normlab.surgery.swap import BATCH_NORMS


class Seen(NamedTuple):
    """A call of a layer by all parts of a batch, with the joint moments."""

    norm: _BatchNorm
    moments: Moments


def norms_in_use(operation: str, model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the layers that would normalise with the statistics of their input, by name.

    Args:
        operation: The name of what asks, for the message.
        model: The model, in the mode in which it will run.

    Raises:
        ValueError: One of them is a subclass of torch's BatchNorm layers.
    """
    norms = {}
    for name, module in model.named_modules():
        if not isinstance(module, _BatchNorm):
            continue
        if not module.training and module.running_mean is not None:
            continue
        if type(module) not in BATCH_NORMS:
            shares = hasattr(module, "process_group")
            reason = (
                "its processes would wait for each other within a micro-batch"
                if shares
                else "a subclass may do more than normalise"
            )
            raise ValueError(
                f"{operation}(model): expected nn.BatchNorm1d/2d/3d layers, got "
                f"{type(module).__name__} at {name!r}, and {reason}; put it into evaluation mode "
                "or take torch's own layer"
            )
        norms[name] = module
    return norms


@contextmanager
def standing_in(
    norms: dict[str, _BatchNorm], normalise: Callable[[_BatchNorm, Tensor], Tensor]
) -> Iterator[None]:
    """Let ``normalise(norm, input)`` stand for the forward of each layer; its hooks still run."""
    before = [norm.__dict__.get("forward") for norm in norms.values()]

    def forward(norm: _BatchNorm, input: Tensor) -> Tensor:
        check_channels(type(norm).__name__, input, norm.num_features)
        norm._check_input_dim(input)
        return normalise(norm, input)

    try:
        for norm in norms.values():
            norm.__dict__["forward"] = partial(forward, norm)
        yield
    finally:
        for norm, own in zip(norms.values(), before, strict=True):
            norm.__dict__.pop("forward", None)
            if own is not None:
                norm.__dict__["forward"] = own


@torch.no_grad()
def joint_moments(parts: list[Tensor]) -> Moments:
    r"""Return the moments of all parts together.

    .. math::
        \mu = \frac1m \sum_i \sum_{x \in X_i} x, \quad
        v = \frac1m \sum_i \sum_{x \in X_i} (x - \mu)^2

    Args:
        parts: Tensors ``(N_i, C, *)``, of any size but the same number of channels.

    Raises:
        ValueError: A channel has a single value in all parts.

    Example:
        >>> parts = [torch.tensor([[1.0], [3.0]]), torch.tensor([[8.0]])]
        >>> joint_moments(parts)
        Moments(mean=tensor([4.]), variance=tensor([8.6667]), num_values=3)
    """
    num_values = sum(part.numel() // part.shape[1] for part in parts)
    if num_values == 1:
        raise ValueError(
            "BatchNorm(input): expected more than one value per channel in the joint batch, got "
            f"one micro-batch of shape {tuple(parts[0].shape)}; add micro-batches"
        )
    # A mean and then sums of squares: on a CPU some ten times faster than torch.var_mean.
    axes = [axis for axis in range(parts[0].dim()) if axis != 1]
    mean = torch.stack([wide(part).sum(axes) for part in parts]).sum(0) / num_values
    squares = [(part - per_channel(mean, part)).square_().sum(axes) for part in parts]
    return Moments(mean, torch.stack(squares).sum(0) / num_values, num_values)


def standardise(norm: _BatchNorm, moments: Moments, parts: list[Tensor]) -> tuple[Tensor, ...]:
    """Normalise parts of a batch with joint moments, and let the gradient flow through these.

    Args:
        norm: The layer whose scale, shift and eps are taken.
        moments: The moments of the joint batch.
        parts: Tensors ``(N_i, C, *)``. In the gradient the means over the batch are taken over
            them, so it is that of the joint batch where they are all its parts.

    Returns:
        The outputs, one for each part.
    """
    mean, variance, _ = moments
    weight = torch.ones_like(mean) if norm.weight is None else wide(norm.weight)
    bias = torch.zeros_like(mean) if norm.bias is None else wide(norm.bias)
    return _Standardise.apply(mean, variance, weight, bias, norm.eps, *parts)


class _Standardise(torch.autograd.Function):
    """torch's kernels for fixed moments, and what the moments add to the gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        mean: Tensor,
        variance: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        *parts: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(mean, variance, weight, *parts)
        ctx.eps = eps
        return tuple(F.batch_norm(x, mean, variance, weight, bias, eps=eps) for x in parts)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator's signature
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        mean, variance, weight, *parts = ctx.saved_tensors
        direct, by_weight, by_bias = zip(
            *(
                torch.ops.aten.native_batch_norm_backward(
                    dy, x, weight, mean, variance, None, None, False, ctx.eps, [True] * 3
                )
                for dy, x in zip(gradients, parts, strict=True)
            ),
            strict=True,
        )
        dweight = torch.stack(by_weight).sum(0)
        dbias = torch.stack(by_bias).sum(0)
        # dx = gamma / std * (dy - mean(dy) - xhat * mean(dy * xhat)): torch gave the first term,
        # and the two others are an affine map of xhat once more.
        scale = weight * torch.rsqrt(variance + ctx.eps)
        scale = scale / sum(x.numel() // x.shape[1] for x in parts)
        for dx, x in zip(direct, parts, strict=True):
            dx -= F.batch_norm(x, mean, variance, scale * dweight, scale * dbias, eps=ctx.eps)
        return None, None, dweight, dbias, None, *direct


def track(seen: list[Seen]) -> None:
    """Update the running statistics of each layer in training mode, once for each joint batch."""
    for norm, (mean, variance, num_values) in seen:
        if norm.training and norm.track_running_stats:
            unbiased = variance * (num_values / (num_values - 1))
            update_running_statistics(norm, mean[None], unbiased[None])
