r"""Take the running statistics of batch normalisation anew, from data, with frozen weights.

The exponential averages kept in training lag behind the weights and weigh the last batches most.
The paper's own estimate for evaluation is a plain average over many batches after training.

Source: S. Ioffe, C. Szegedy, 2015, arXiv 1502.03167, algorithm 2.

Departs:
    - Every layer is estimated in the same pass, so layers further up see inputs normalised with
      their batch's statistics, as in training.
    - ``pooled=True`` gives the moments of all values seen instead of averages over batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normlab.surgery.flow import evaluating


def recalibrate(
    model: nn.Module,
    batches: Iterable[Tensor | tuple[Tensor, Any]],
    *,
    pooled: bool = False,
) -> None:
    r"""Replace the running statistics of every batch normalisation layer by those of ``batches``.

    .. math::
        \mathrm{mean} = \tfrac1B \sum_b \mu_b, \quad
        \mathrm{var} = \tfrac1B \sum_b \tfrac{m}{m-1} v_b

    The batch normalisation layers (torch's and their subclasses) run in training mode, everything
    else in evaluation mode, without gradients. Modes and momenta are restored afterwards, and the
    old statistics too if anything raises. A layer that no batch reaches keeps its statistics.

    Args:
        model: The model, whose buffers are changed in place.
        batches: Inputs ``(N, ...)`` or pairs ``(inputs, targets)``, moved to the model's device.
            Each batch counts the same whatever its size, so let the loader drop an unfilled last
            one (``drop_last=True``).
        pooled: Whether to take mean and variance (divisor ``M - 1``) of all M values of a channel
            in all batches together, accumulated in float64. Each pass still normalises with its
            own batch.

    Raises:
        ValueError: The model has no batch normalisation layer with running statistics, there is
            no batch, or a batch is neither a tensor nor a pair that begins with one.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(1), nn.Dropout())
        >>> recalibrate(model, [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [7.0]])])
        >>> model[0].running_mean, model[0].running_var
        (tensor([4.]), tensor([2.]))
    """
    norms = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]
    if not norms:
        raise ValueError(
            f"recalibrate(model): expected batch normalisation layers with running statistics, got "
            f"{type(model).__name__} without any; leave recalibration out"
        )
    device = next(tensor.device for tensor in (*model.parameters(), *model.buffers()))
    sums: dict[nn.Module, Tensor] = {}
    seen = 0
    with _averaging(model, norms), _summing(norms if pooled else [], sums), torch.no_grad():
        for batch in batches:
            model(_inputs_of(batch).to(device))
            seen += 1
        if not seen:
            raise ValueError(
                "recalibrate(batches): expected at least one batch, got none; give a loader "
                "that yields batches, or a list if it was used up"
            )
        for norm in norms:
            if norm in sums:
                _set_pooled(norm, sums[norm])


@contextmanager
def _averaging(model: nn.Module, norms: list[_BatchNorm]) -> Iterator[None]:
    """Let running statistics start anew as plain averages; restore them if the body raises."""
    momenta = [norm.momentum for norm in norms]
    saved = [[buffer.clone() for buffer in norm.buffers(recurse=False)] for norm in norms]

    def restore(norm: _BatchNorm, values: list[Tensor]) -> None:
        for buffer, value in zip(norm.buffers(recurse=False), values, strict=True):
            buffer.copy_(value)

    try:
        with evaluating(model):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None
                norm.training = True
            yield
    except BaseException:
        for norm, values in zip(norms, saved, strict=True):
            restore(norm, values)
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    for norm, values in zip(norms, saved, strict=True):
        if not norm.num_batches_tracked:
            restore(norm, values)


@contextmanager
def _summing(norms: list[_BatchNorm], sums: dict[nn.Module, Tensor]) -> Iterator[None]:
    """Add up count, sum and sum of squares of each layer's input, rows of ``(3, C)``."""
    handles = []

    def add(norm: _BatchNorm, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = (args[0] if args else kwargs["input"]).detach().double()
        axes = [axis for axis in range(x.dim()) if axis != 1]
        count = x.new_full((x.shape[1],), x.numel() // x.shape[1])
        one = torch.stack([count, x.sum(axes), x.square().sum(axes)])
        sums[norm] = sums[norm] + one if norm in sums else one

    try:
        for norm in norms:
            hook = partial(add, norm)
            handles.append(norm.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _set_pooled(norm: _BatchNorm, sums: Tensor) -> None:
    # A layer that shares statistics between processes says with which; None means all of them.
    shares = hasattr(norm, "process_group") and distributed.is_available()
    if shares and distributed.is_initialized():
        distributed.all_reduce(sums, group=norm.process_group)
    count, total, squares = sums
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(total / count)
    norm.running_var.copy_(((squares - total.square() / count) / (count - 1)).clamp_min(0))


def _inputs_of(batch: Any) -> Tensor:
    inputs = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(inputs, Tensor):
        raise ValueError(
            "recalibrate(batches): expected tensors or pairs (inputs, targets), got "
            f"{type(batch).__name__} with {type(inputs).__name__}; yield the inputs alone"
        )
    return inputs
