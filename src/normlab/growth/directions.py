r"""Which new units get the largest gradient: the cross term of a pair of layers and its directions.

With inputs h of the first layer and gradients d of the loss at the outputs of the second, a unit
with zero incoming and outgoing weights v gets the gradient

.. math::
    \partial L / \partial u = \phi'(0) \, M v, \qquad M = \sum_{n, p} h_{n p} \, D_{n p}^T

in its incoming weights u. n runs over samples, p over positions of the map between, h is the patch
that the first layer reads for p, and :math:`D_{n p}` holds for each output channel and each tap of
the second layer the gradient of the one position that reads p through this tap. The best
orthonormal set of directions v are the first right singular vectors of M.

Source: U. Evci, B. van Merrienboer, T. Unterthiner, M. Vladymyrov, F. Pedregosa, "GradMax: Growing
Neural Networks using Gradient Information", 2022, arXiv 2201.05125.

Departs:
    - M is exact for convolutions. The authors' public code takes the gradient of one larger
      convolution in place of both layers, which ignores that the map between is cut and padded
      anew (``kind="aux"``).
    - Directions beyond the rank of M, which would get no gradient from any vector, are random ones,
      orthogonal to the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import product
from math import prod
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, distributed, nn

from normlab.growth.pairs import CONVOLVE, Convolution, GrowthPair
from normlab.moments import group_of_several
from normlab.surgery.flow import uncompiled

CrossTerm = Literal["exact", "aux"]
Loss = Callable[[Any, Tensor], Tensor]

_CHUNK = 2**25
"""How many gradients at positions between are held at once."""


class Seen(NamedTuple):
    """What one pass showed of a pair.

    Attributes:
        inputs: What the first layer was given.
        gradients: Gradients of the loss at the outputs of the second layer.
        positions: The shape of the first layer's output, without samples and channels.
    """

    inputs: Tensor
    gradients: Tensor
    positions: tuple[int, ...]


def observe(
    model: nn.Module,
    pairs: Iterable[GrowthPair],
    inputs: Tensor,
    targets: Tensor,
    loss: Loss = nn.functional.cross_entropy,
) -> dict[GrowthPair, Seen]:
    """Run one pass forward and backward and return what it showed of each pair.

    The modules keep their modes; buffers, the state of torch's random generators and the gradients
    of the parameters are as before afterwards.

    Args:
        model: The model of the pairs.
        pairs: The pairs.
        inputs: A batch.
        targets: Its targets.
        loss: Maps ``(outputs, targets)`` to a scalar. Of several outputs the first is taken.
    """
    pairs = tuple(pairs)
    given: dict[GrowthPair, Tensor] = {}
    positions: dict[GrowthPair, tuple[int, ...]] = {}
    zeros: dict[GrowthPair, Tensor] = {}
    handles = []
    for pair in pairs:

        def before(
            module: nn.Module,
            args: tuple[Any, ...],
            named: dict[str, Any],
            pair: GrowthPair = pair,
        ) -> None:
            given[pair] = (args[0] if args else named["input"]).detach()

        def between(module: nn.Module, args: Any, output: Tensor, pair: GrowthPair = pair) -> None:
            positions[pair] = tuple(output.shape[2:])

        def after(module: nn.Module, args: Any, output: Tensor, pair: GrowthPair = pair) -> Tensor:
            # The gradient at an addend is that at the sum, also if the sum is changed in place.
            zeros[pair] = torch.zeros_like(output, requires_grad=True)
            return output + zeros[pair]

        handles.append(pair.first.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(pair.first.register_forward_hook(between))
        handles.append(pair.second.register_forward_hook(after))
    try:
        with _kept(model, inputs.device), uncompiled(), torch.enable_grad():
            outputs = model(inputs)
            outputs = outputs[0] if isinstance(outputs, tuple) else outputs
            gradients = torch.autograd.grad(loss(outputs, targets), [zeros[p] for p in pairs])
    finally:
        for handle in handles:
            handle.remove()
    return {
        pair: Seen(given[pair], gradient, positions[pair])
        for pair, gradient in zip(pairs, gradients, strict=True)
    }


@contextmanager
def _kept(model: nn.Module, device: torch.device) -> Iterator[None]:
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        with torch.no_grad():
            for buffer, values in buffers:
                buffer.copy_(values)


def cross_term(pair: GrowthPair, seen: Seen, *, kind: CrossTerm = "exact") -> Tensor:
    """Return M of a pair in float64, summed over the processes of a distributed run.

    Args:
        pair: The pair.
        seen: What `observe` returned for it.
        kind: ``"aux"``: the gradient of one convolution in place of both, with the patches of the
            first one's size gathered, as in the authors' public code.

    Returns:
        ``(in * kernel, out * taps)``: inputs of a unit, then outputs with their taps.

    Raises:
        ValueError: ``"aux"`` for layers that are not two plain convolutions.
    """
    if isinstance(pair.first, nn.Linear):
        rows = seen.inputs.flatten(0, -2)
        matrix = _wide(rows).T @ _wide(seen.gradients.flatten(0, -2))
    elif kind == "aux":
        matrix = _auxiliary(pair, pair.first, seen)
    else:
        matrix = _exact(pair, pair.first, seen)
    if (group := group_of_several(None)) is not None:
        distributed.all_reduce(matrix, group=group)
    return matrix


def _exact(pair: GrowthPair, first: Convolution, seen: Seen) -> Tensor:
    outputs = seen.gradients.shape[1]
    inner = (outputs * pair.num_taps, *seen.positions)
    weight = torch.zeros(
        inner[0], *first.weight.shape[1:], dtype=seen.inputs.dtype, device=seen.inputs.device
    )
    weight.requires_grad_()
    total = torch.zeros_like(_wide(weight.detach()))
    size = max(1, _CHUNK // prod(inner))
    for inputs, gradients in zip(seen.inputs.split(size), seen.gradients.split(size), strict=True):
        with torch.enable_grad():
            between = torch.zeros(
                len(inputs) * outputs, pair.num_taps, *seen.positions,
                dtype=gradients.dtype, device=gradients.device, requires_grad=True,
            )  # fmt: skip
            (arriving,) = torch.autograd.grad(pair.read(between), between, gradients.flatten(0, 1))
            made = first._conv_forward(inputs, weight, None)
            total += torch.autograd.grad(made, weight, arriving.reshape(made.shape))[0]
    return total.flatten(1).T


def _auxiliary(pair: GrowthPair, first: Convolution, seen: Seen) -> Tensor:
    second = pair.second
    plain = isinstance(second, Convolution) and pair.pointwise
    if not plain or not all(_pads_with_zeros(layer) for layer in (first, second)):
        raise ValueError(
            f"cross_term({pair.name}, kind='aux'): expected two convolutions with an activation "
            "between, zero padding in numbers and no dilation, got others; use kind='exact'"
        )
    assert isinstance(second, Convolution)
    assert not isinstance(first.padding, str)
    assert not isinstance(second.padding, str)
    axes = list(zip(first.kernel_size, second.kernel_size, first.stride, strict=True))
    size = [one + (two - 1) * step for one, two, step in axes]
    stride = [one * two for one, two in zip(first.stride, second.stride, strict=True)]
    padding = [
        one + two * step
        for one, two, step in zip(first.padding, second.padding, first.stride, strict=True)
    ]
    weight = seen.inputs.new_zeros(second.out_channels, first.in_channels, *size)
    with torch.enable_grad():
        weight.requires_grad_()
        made = CONVOLVE[type(first)](seen.inputs, weight, None, stride, padding)
        # With a stride the one convolution may have more positions, or fewer, than the two.
        common = tuple(
            slice(0, min(a, b)) for a, b in zip(made.shape, seen.gradients.shape, strict=True)
        )
        (whole,) = torch.autograd.grad(made[common], weight, seen.gradients[common])
    patches = []
    for tap in product(*(range(two) for _, two, _ in axes)):
        window = tuple(
            slice(place * step, place * step + one)
            for place, (one, _, step) in zip(tap, axes, strict=True)
        )
        patches.append(whole[(slice(None), slice(None), *window)].flatten(1))
    return _wide(torch.stack(patches, 1).flatten(0, 1).T)


def _pads_with_zeros(layer: Any) -> bool:
    plain = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return plain and set(layer.dilation) == {1}


def best_directions(
    matrix: Tensor, count: int, generator: torch.Generator | None = None, *, rtol: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Return the first right singular vectors of a matrix, made unique, and their values.

    The entry of largest magnitude in each vector is positive. Vectors beyond the rank are random,
    orthogonal to the others as long as there is space. A matrix that is not finite, as that of a
    training that diverged, has rank 0.

    Args:
        matrix: M ``(rows, columns)``.
        count: How many vectors.
        generator: For vectors beyond the rank, on the CPU; torch's own by default.
        rtol: Singular values below this share of the largest one count as 0.

    Returns:
        Unit vectors ``(columns, count)``, and singular values ``(count,)``, 0 for random vectors.

    Example:
        >>> vectors, values = best_directions(torch.diag(torch.tensor([1.0, 3.0])).double(), 1)
        >>> vectors.T.tolist(), values.tolist()
        ([[0.0, 1.0]], [3.0])
    """
    rows, columns = matrix.shape
    if not torch.isfinite(matrix).all():
        matrix = torch.zeros_like(matrix)
    # The smaller Gram matrix: only a few vectors are wanted of what may be thousands.
    squares, vectors = torch.linalg.eigh(matrix @ matrix.T if rows < columns else matrix.T @ matrix)
    values = squares.clamp_min(0).sqrt().flip(0)[:count]
    vectors = vectors.flip(1)[:, :count]
    rank = int((values > rtol * values[:1]).sum())
    values, vectors = values[:rank], vectors[:, :rank]
    if rows < columns:
        vectors = matrix.T @ vectors / values
    largest = vectors.abs().argmax(0, keepdim=True)
    vectors = vectors * vectors.gather(0, largest).sign()
    if rank < count:
        drawn = torch.randn(columns, count - rank, generator=generator, dtype=torch.float64)
        drawn = drawn.to(vectors)
        space = min(count, columns) - rank
        for _ in range(2):  # once more, because the first leaves rounding
            drawn[:, :space] -= vectors @ (vectors.T @ drawn[:, :space])
        drawn[:, :space] = torch.linalg.qr(drawn[:, :space])[0]
        vectors = torch.cat([vectors, drawn / drawn.norm(dim=0)], 1)
        values = torch.cat([values, values.new_zeros(count - rank)])
    return vectors, values


def _wide(values: Tensor) -> Tensor:
    # Apple's accelerator has no float64.
    return values.cpu().double() if values.device.type == "mps" else values.double()
