"""Lists of tensors at once, without waiting for the device: norms, portions, scaling."""

# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor


def tensor_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Return the l2 norm of each tensor, ``(len(tensors),)``; nothing is copied to the host.

    Args:
        tensors: At least one, on one device and of one dtype. Of a tensor that is spread over
            processes (``DTensor``) the norm is that of the whole.

    Returns:
        The norms, in float32 if the tensors have a half precision.

    Example:
        >>> tensor_norms([torch.tensor([3.0, 4.0]), torch.zeros(2, 2)])
        tensor([5., 0.])
    """
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    narrow = dtype != tensors[0].dtype
    norms = torch._foreach_norm(list(tensors), 2, dtype=dtype if narrow else None)
    return torch.stack([_whole(norm) for norm in norms])


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the l2 norm of all tensors taken as one vector, on the first one's device.

    Args:
        tensors: At least one, of any devices and dtypes.

    Example:
        >>> total_norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
        tensor(5.)
    """
    norms = [tensor_norms(part) for (part,) in by_kind([list(tensors)])]
    wide = max((norm.dtype for norm in norms), key=lambda dtype: torch.finfo(dtype).bits)
    joined = torch.cat([norm.to(tensors[0].device, wide) for norm in norms])
    return torch.linalg.vector_norm(joined)


def by_kind(lists: list[list[Tensor]]) -> list[list[list[Tensor]]]:
    """Cut lists that belong together into pieces of one device and dtype each.

    Args:
        lists: Lists of equal length; the first one's tensors decide.

    Returns:
        For each kind, by name, the pieces of all lists.

    Example:
        >>> ones = [torch.ones(1), torch.ones(1).double(), torch.ones(2)]
        >>> [[len(one) for one in pieces] for pieces in by_kind([ones, ones])]
        [[2, 2], [1, 1]]
    """
    group = torch.optim.Optimizer._group_tensors_by_device_and_dtype
    kinds = group(cast(list[list[Tensor | None]], lists)) if lists[0] else {}
    ordered = sorted(kinds.items(), key=lambda pair: str(pair[0]))
    return [cast(list[list[Tensor]], pieces) for _, (pieces, _) in ordered]


def in_portions(lists: list[list[Tensor]], elements: int) -> Iterator[list[list[Tensor]]]:
    """Cut lists that belong together into portions of about so many elements each.

    What is computed for a portion in several passes stays in a processor's cache, and its memory is
    used again for the next one.

    Args:
        lists: Lists of equal length; the first one's tensors count.
        elements: A portion ends where it has so many.

    Example:
        >>> tensors = [torch.ones(4), torch.ones(2), torch.ones(1)]
        >>> [[len(one) for one in part] for part in in_portions([tensors], 3)]
        [[1], [2]]
    """
    begin, count = 0, 0
    for end, tensor in enumerate(lists[0], start=1):
        count += tensor.numel()
        if count >= elements or end == len(lists[0]):
            yield [one[begin:end] for one in lists]
            begin, count = end, 0


def scale_(tensors: list[Tensor], factor: float) -> None:
    """Multiply tensors of one device and dtype by a number, in place.

    Example:
        >>> tensors = [torch.ones(2), torch.ones(1)]
        >>> scale_(tensors, 0.5)
        >>> tensors
        [tensor([0.5000, 0.5000]), tensor([0.5000])]
    """
    first = tensors[0]
    if first.device.type == "cpu" and first.dtype in (torch.float32, torch.float64):
        # A plain number would be made a tensor anew for each of them: half the time of small ones.
        torch._foreach_mul_(tensors, torch.tensor(factor, dtype=first.dtype))
    else:
        torch._foreach_mul_(tensors, factor)


def _whole(norm: Tensor) -> Tensor:
    # A DTensor; asking for its class would load torch.distributed where nobody uses it.
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # pyright: ignore[reportAttributeAccessIssue]
