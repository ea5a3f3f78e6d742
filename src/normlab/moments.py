"""The few shared formulas of normalisers: channel views, wide accumulation, batch moments.

Activations are ``(N, C, *)``: samples, channels, then any number of spatial axes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.autograd.forward_ad import unpack_dual


class Moments(NamedTuple):
    """Per-channel moments: ``mean`` and biased ``variance`` of shape ``(C,)``.

    ``num_values`` is how many values a channel has: a number, or a tensor where it was summed over
    processes.
    """

    mean: Tensor
    variance: Tensor
    num_values: int | Tensor


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    """Return ``values`` of shape ``(C,)`` as a view that broadcasts against ``like`` (N, C, *)."""
    return values.reshape(-1, *(1,) * (like.dim() - 2))


def wide(x: Tensor) -> Tensor:
    """Return ``x`` in float32 if it has a half precision, for sums that half would lose."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def group_of_several(process_group: Any) -> Any:
    """Return the process group to reduce over; None where this process is alone in it.

    Args:
        process_group: A group, or None for all processes.
    """
    if not distributed.is_available() or not distributed.is_initialized():
        return None
    group = distributed.group.WORLD if process_group is None else process_group
    return group if distributed.get_world_size(group) > 1 else None


def sum_over_processes(values: Tensor, group: Any) -> Tensor:
    """Return the sum of ``values`` over the processes of ``group``, in one collective.

    In backward each process gets the sum of all processes' gradients, in one more.
    """
    return _SumOverProcesses.apply(values, group)


def check_channels(operation: str, x: Tensor, num_features: int) -> None:
    """Refuse input that is not floating point of shape ``(N, num_features, *)`` with ``N > 0``.

    Args:
        operation: The layer's name, for the message.
        x: The input.
        num_features: The number of channels expected.

    Raises:
        ValueError: In the form of the house.
    """
    if not torch.is_floating_point(x):
        raise ValueError(
            f"{operation}(input): expected floating point, got {x.dtype}; convert the input"
        )
    if x.dim() < 2 or x.shape[1] != num_features:
        raise ValueError(
            f"{operation}(input): expected shape (N, {num_features}, *), got {tuple(x.shape)}; "
            "set num_features to the number of channels"
        )
    if x.numel() == 0:
        raise ValueError(
            f"{operation}(input): expected at least one value, got shape {tuple(x.shape)}; "
            "leave empty batches out"
        )


def check_count(operation: str, x: Tensor) -> None:
    """Refuse input with a single value per channel, which always is its own mean.

    Args:
        operation: The layer's name, for the message.
        x: The input ``(N, C, *)``.

    Raises:
        ValueError: In the form of the house.
    """
    if x.numel() <= x.shape[1]:
        raise ValueError(
            f"{operation}(input): expected more than one value per channel in training, got shape "
            f"{tuple(x.shape)}; train with larger batches, call .eval(), or take a method that "
            "trains on one sample, such as group-norm or batchless-norm"
        )


def check_momentum(operation: str, momentum: float | None) -> None:
    """Refuse a momentum of running statistics outside 0 to 1; None means plain averages.

    Args:
        operation: The layer's name, for the message.
        momentum: The weight of the newest batch.

    Raises:
        ValueError: In the form of the house.
    """
    if momentum is not None and not 0 <= momentum <= 1:
        raise ValueError(
            f"{operation}(momentum={momentum!r}): expected a number from 0 to 1, or None, got "
            f"{momentum!r}; use 0.1 (what other libraries call a momentum of 0.9)"
        )


def refuse_broken_statistics(
    module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any
) -> None:
    """Refuse to load statistics that are not finite, or variances below 0, into a layer.

    For ``layer.register_load_state_dict_pre_hook(refuse_broken_statistics)``: it looks at each
    floating point buffer of the layer; one whose name ends in ``_var`` is a variance.

    Raises:
        ValueError: With the name of the buffer. The layer is not changed then.
    """
    for name, buffer in module.named_buffers(recurse=False):
        values = state_dict.get(prefix + name)
        if values is None or values.is_meta or not torch.is_floating_point(buffer):
            continue
        if not torch.isfinite(values).all() or (name.endswith("_var") and (values < 0).any()):
            raise ValueError(
                f"{type(module).__name__}.load_state_dict({prefix + name}): expected finite "
                f"statistics and no negative variance, got {values.min()} to {values.max()}; take "
                "a checkpoint from before the training diverged"
            )


def batch_moments(x: Tensor, group: Any = None) -> Moments:
    """Return the moments of each channel over samples and space, over all processes if asked.

    Across processes each one contributes its count, sum and sum of squares in float64, in one
    collective; the gradient flows back through the same sum, in one more.

    Args:
        x: Activations ``(N, C, *)``.
        group: A process group, or None for this process alone.

    Returns:
        Mean, biased variance, and the number of values per channel.
    """
    axes = [axis for axis in range(x.dim()) if axis != 1]
    if group is None:
        variance, mean = torch.var_mean(wide(x), dim=axes, correction=0)
        return Moments(mean, variance, x.numel() // x.shape[1])
    exact = x.double()
    count = exact.new_full((1,), x.numel() // x.shape[1])
    sums = torch.cat([exact.sum(axes), exact.square().sum(axes), count])
    sums = sum_over_processes(sums, group)
    total, squares, count = sums.split([x.shape[1], x.shape[1], 1])
    mean = total / count
    variance = (squares / count - mean.square()).clamp_min(0)
    kind = wide(x).dtype
    return Moments(mean.to(kind), variance.to(kind), count.detach())


class _SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over processes; each one's gradient is the sum of all gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = values.clone()
        distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone()
        distributed.all_reduce(total, group=ctx.group)
        return total, None


def runs_eagerly(*arguments: Tensor | float | None) -> bool:
    """Whether an autograd function of our own may take the place of the plain equations.

    It may in eager mode, in reverse mode, on torch's own tensors: `torch.compile`, `torch.func`,
    forward-mode derivatives and subclasses of tensors go by the plain equations.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    tensors = [one for one in arguments if isinstance(one, Tensor)]
    # A subclass may be anything: a distributed tensor cannot be written into like a plain one.
    plain = all(type(one) in (Tensor, torch.nn.Parameter) for one in tensors)
    return plain and all(unpack_dual(one).tangent is None for one in tensors)
