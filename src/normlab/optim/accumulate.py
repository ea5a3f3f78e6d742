r"""Gradient accumulation: one step for the mean over several micro-batches.

Exact for losses that are means over samples, and for means over tokens if their counts are given.
Normalisers with batch statistics see each micro-batch alone.

Source: common practice; see X. He, F. Xue, X. Ren, Y. You, "Large-Scale Deep Learning
Optimizations: A Comprehensive Survey", 2021, arXiv 2111.00856.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import distributed, nn

from normlab.moments import group_of_several
from normlab.optim.arguments import is_count


@contextmanager
def accumulate(
    model: nn.Module,
    index: int,
    num_batches: int,
    *,
    count: int | None = None,
    total: int | None = None,
    process_group: Any = None,
) -> Iterator[float]:
    r"""Run forward and backward of one micro-batch; yields the factor for its loss.

    .. math::
        g = \sum_{i=1}^k f_i \, g_i, \quad f_i = 1 / k
        \;\text{or}\; n_i W / \sum n

    Under ``DistributedDataParallel`` and ``fully_shard`` the first k - 1 micro-batches exchange no
    gradients.

    Args:
        model: The model as it is called.
        index: The number i of the micro-batch, from 0.
        num_batches: The number k of micro-batches in a step, at least 1.
        count: The tokens of this micro-batch over which its loss is a mean; None for a mean over
            samples in micro-batches of equal size.
        total: The tokens of the whole step over all micro-batches and processes, see
            `total_count`; given together with ``count``.
        process_group: The W processes that average gradients; None for all of them.

    Raises:
        ValueError: No micro-batches, an index outside the step, a count below 0, or only one of
            ``count`` and ``total``.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> parts = torch.ones(6, 2).chunk(3)
        >>> for index, part in enumerate(parts):
        ...     with accumulate(model, index, len(parts)) as factor:
        ...         (factor * model(part).mean()).backward()
        >>> model.weight.grad
        tensor([[1., 1.]])
    """
    if not is_count(num_batches):
        raise ValueError(
            f"accumulate(num_batches={num_batches!r}): expected 1, 2, 3, ..., got {num_batches!r}; "
            "give the number of micro-batches in a step"
        )
    if not (is_count(index, least=0) and index < num_batches):
        raise ValueError(
            f"accumulate(index={index}, num_batches={num_batches}): expected an index from 0 to "
            f"{num_batches - 1}, got {index}; count the micro-batches of one step"
        )
    both = is_count(count, least=0) and is_count(total) and count <= total
    if not both and (count, total) != (None, None):
        raise ValueError(
            f"accumulate(count={count!r}, total={total!r}): expected a count of at least 0 within "
            f"a total of at least 1, or neither, got {count!r} and {total!r}; take the total from "
            "total_count"
        )
    factor = 1 / num_batches
    if count is not None and total is not None:
        group = group_of_several(process_group)
        # Processes average their gradients, where the sum is wanted.
        factor = count * (1 if group is None else distributed.get_world_size(group)) / total
    last = index == num_batches - 1
    with ExitStack() as stack:
        if hasattr(model, "no_sync") and not last:
            stack.enter_context(model.no_sync())  # pyright: ignore[reportCallIssue, reportArgumentType]
        if hasattr(model, "set_requires_gradient_sync"):
            model.set_requires_gradient_sync(last)  # pyright: ignore[reportCallIssue]
            # An error must not leave the next step without an exchange.
            stack.callback(model.set_requires_gradient_sync, True)  # pyright: ignore[reportArgumentType]
        yield factor


def total_count(counts: list[int], process_group: Any = None) -> int:
    """Return the sum of the micro-batches' counts over all processes, in one collective.

    Args:
        counts: The tokens of each micro-batch of this process.
        process_group: The processes that average gradients; None for all of them.

    Example:
        >>> total_count([5, 7])
        12
    """
    total = sum(counts)
    group = group_of_several(process_group)
    if group is None:
        return total
    device = "cpu"
    if distributed.get_backend(group) == "nccl":
        device = f"cuda:{torch.cuda.current_device()}"
    summed = torch.tensor(total, device=device)
    distributed.all_reduce(summed, group=group)
    return int(summed)
