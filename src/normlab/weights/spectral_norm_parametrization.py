r"""A weight divided by its largest singular values, which power iteration follows.

With M a weight as a matrix, u and v unit vectors that are kept from forward to forward,

.. math::
    v \leftarrow \frac{M^\top u}{\lVert M^\top u \rVert + \epsilon}, \qquad
    u \leftarrow \frac{M v}{\lVert M v \rVert + \epsilon}, \qquad
    \sigma = \lvert u^\top M v \rvert

Registered with ``torch.nn.utils.parametrize``, so that it composes with other parametrisations, is
saved with the model and can be taken off. Where ``torch.utils.checkpoint`` computes a layer a
second time in the backward pass, the second forward would move the vectors once more and see
another weight: use `normlab.checkpoint_activations`, which repeats the first one, or
`frozen_power_iteration` around forward and backward.

Departs:
    - A weight so small that it has no direction (of zeros, say) is multiplied by the scale alone:
      it stays zero, gets a gradient of ordinary size, and trains. torch's own form makes it NaN.
    - The size of :math:`u^\top M v` counts and not its sign, which is that of the weight where the
      vectors keep still while the weight is replaced.
    - Under ``torch.compile`` the iteration is one operator that is not looked into: the compiler
      would compute vectors anew in the backward pass, from buffers that have moved on by then (so
      it does with torch's own form; https://github.com/pytorch/pytorch/pull/197039).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normlab.moments import runs_eagerly, wide

Sides = Literal[1, 2]

_FIRST_STEPS = 15


class SpectralNorm(nn.Module):
    """The parametrisation: divides a weight by its largest singular values, times a scale.

    Args:
        weight: The weight at registration, of at least two axes.
        scale: The scale c, above 0 and finite.
        sides: 1 for the matrix with output channels as rows, 2 for the mean over both matrices.
        output_axis: The weight's axis of output channels: 1 for transposed convolutions.
        n_power_iterations: Steps in each training forward, at least 1.
        eps: A singular value of at most this size counts as 1, so that zeros stay zeros.
        generator: For the first vectors; torch's own by default.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> part = SpectralNorm(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), scale=2.0)
        >>> part(torch.tensor([[3.0, 0.0], [0.0, 1.0]])).round(decimals=4)
        tensor([[2.0000, 0.0000],
                [0.0000, 0.6667]])
    """

    def __init__(
        self,
        weight: Tensor,
        scale: float = 1.0,
        *,
        sides: Sides = 1,
        output_axis: Literal[0, 1] = 0,
        n_power_iterations: int = 1,
        eps: float = 1e-12,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        for valid, name, value, expected in (
            (weight.dim() > 1, "weight", tuple(weight.shape), "at least two axes"),
            (0 < scale < math.inf, "scale", scale, "a finite number above 0"),
            (sides in (1, 2), "sides", sides, "1 or 2"),
            (n_power_iterations >= 1, "n_power_iterations", n_power_iterations, "at least 1"),
        ):
            if not valid:
                raise ValueError(
                    f"SpectralNorm({name}={value}): expected {expected}, got {value}; "
                    f"give {expected}"
                )
        self.scale = scale
        self.n_power_iterations = n_power_iterations
        self.eps = eps
        self.frozen = False
        self.row_axes = (output_axis, 1 - output_axis)[:sides]
        with torch.no_grad():
            matrix = _three_axes(wide(weight))
            for side, axis in enumerate(self.row_axes):
                left, right = (
                    nn.functional.normalize(
                        torch.randn(size, generator=generator).to(matrix), dim=0
                    )
                    for size in (weight.shape[axis], weight.numel() // weight.shape[axis])
                )
                left, right = _iterate(matrix, left, right, axis, _FIRST_STEPS, eps)
                self.register_buffer(f"left{side}", left)
                self.register_buffer(f"right{side}", right)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the normalised weight."""
        # Autocast would take the small products in half precision.
        with torch.autocast(weight.device.type, enabled=False):
            vectors = self._vectors(weight)
            normalize = _Normalize.apply if runs_eagerly(weight) else _plain
            return normalize(weight, self.scale, self.eps, self.row_axes, *vectors)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return what to normalise where ``layer.weight = weight`` is written: the weight."""
        return weight

    @torch.no_grad()
    def _vectors(self, weight: Tensor) -> list[Tensor]:
        """Return left and right vector of each side, which in training move on before."""
        steps = self.n_power_iterations if self.training and not self.frozen else 0
        # An evaluating graph stays one of torch's own operators, for whoever exports it.
        opaque = torch.compiler.is_compiling() and self.training
        iterate = _iterate_unseen if opaque else _iterate
        matrix = _three_axes(wide(weight))
        vectors: list[Tensor] = []
        for side, axis in enumerate(self.row_axes):
            buffers = getattr(self, f"left{side}"), getattr(self, f"right{side}")
            moved = iterate(matrix, *buffers, axis, steps, self.eps)
            if steps:
                for buffer, vector in zip(buffers, moved, strict=True):
                    buffer.copy_(vector)
            vectors += moved
        return vectors

    def replay_forward(self) -> Callable[[], AbstractContextManager[None]]:
        """Return what makes a context in which a forward repeats the one of now."""
        frozen = self.frozen
        return lambda: _holding([self], frozen)

    def extra_repr(self) -> str:
        """Return the arguments shown by ``print``."""
        return f"scale={self.scale}, sides={len(self.row_axes)}"


@contextmanager
def frozen_power_iteration(model: nn.Module) -> Iterator[None]:
    """Keep the singular vectors of a model still, so that each forward sees the same weights.

    Args:
        model: A model with `SpectralNorm` parametrisations; also restored where the body raises.

    Example:
        >>> from normlab import spectral_norm
        >>> layer = nn.Linear(3, 2)
        >>> _ = spectral_norm(layer)
        >>> with frozen_power_iteration(layer):
        ...     torch.equal(layer.weight, layer.weight)
        True
    """
    with _holding([part for part in model.modules() if isinstance(part, SpectralNorm)], True):
        yield


@contextmanager
def _holding(parts: Sequence[SpectralNorm], frozen: bool) -> Iterator[None]:
    before = [part.frozen for part in parts]
    try:
        for part in parts:
            part.frozen = frozen
        yield
    finally:
        for part, one in zip(parts, before, strict=True):
            part.frozen = one


def _three_axes(weight: Tensor) -> Tensor:
    """Return the weight as ``(A, B, K)``, all kernel positions on the last axis."""
    return weight.reshape(*weight.shape[:2], -1)


def _rows(weight: Tensor, axis: int) -> Tensor:
    """Return the matrix M whose rows lie along ``axis`` of ``(A, B, K)``."""
    return (weight if axis == 0 else weight.transpose(0, 1)).flatten(1)


def _iterate(
    weight: Tensor, left: Tensor, right: Tensor, axis: int, steps: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Return left and right vector after so many steps, in tensors of their own.

    Of their own even after no step, because the next forward moves the buffers while a graph may
    still need what it was given.
    """
    left, right = (vector.to(weight.dtype, copy=True) for vector in (left, right))
    rows = _rows(weight, axis)
    for _ in range(steps):
        right = _direction(torch.mv(rows.t(), left), right, eps)
        left = _direction(torch.mv(rows, right), left, eps)
    return left, right


def _direction(new: Tensor, old: Tensor, eps: float) -> Tensor:
    """Return the direction of a vector; a vanishing one has none and leaves the old one.

    Written as a choice between values, so that no device has to be waited for.
    """
    norm = torch.linalg.vector_norm(new)
    return torch.where(norm > eps, new / (norm + eps), old)


_iterate_unseen = torch.library.custom_op(
    "normlab::power_iteration",
    _iterate,
    mutates_args=(),
    schema="(Tensor weight, Tensor left, Tensor right, int axis, int steps, float eps) "
    "-> (Tensor, Tensor)",
)


@_iterate_unseen.register_fake
def _(weight: Tensor, left: Tensor, right: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(left, dtype=weight.dtype), torch.empty_like(right, dtype=weight.dtype)


def _plain(
    weight: Tensor, scale: float, eps: float, row_axes: tuple[int, ...], *vectors: Tensor
) -> Tensor:
    sigma = _products(weight, row_axes, vectors).abs().mean()
    return (wide(weight) * _factor(scale, sigma, eps)).to(weight.dtype)


def _products(weight: Tensor, row_axes: tuple[int, ...], vectors: Sequence[Tensor]) -> Tensor:
    """Return u^T M v of each side."""
    matrix = _three_axes(wide(weight))
    values = [
        torch.dot(left, torch.mv(_rows(matrix, axis), right))
        for axis, left, right in zip(row_axes, vectors[::2], vectors[1::2], strict=True)
    ]
    return torch.stack(values)


def _factor(scale: float, sigma: Tensor, eps: float) -> Tensor:
    return scale / torch.where(sigma > eps, sigma, 1.0)


class _Normalize(torch.autograd.Function):
    """`_plain` as one node, because for small weights the many steps cost more than the sums."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        scale: float,
        eps: float,
        row_axes: tuple[int, ...],
        *vectors: Tensor,
    ) -> Tensor:
        products = _products(weight, row_axes, vectors)
        sigma = products.abs().mean()
        ctx.save_for_backward(weight, products, sigma, *vectors)
        ctx.options = (scale, eps, row_axes)
        return (wide(weight) * _factor(scale, sigma, eps)).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, products, sigma, *vectors = ctx.saved_tensors
        scale, eps, row_axes = ctx.options
        rest = (None,) * (3 + len(vectors))
        if torch.is_grad_enabled():
            # Derivatives of this backward need the singular values as functions of the weight.
            value = _plain(weight, scale, eps, row_axes, *vectors)
            return *torch.autograd.grad(value, weight, gradients[0], create_graph=True), *rest
        gradient, matrix = _three_axes(wide(gradients[0])), _three_axes(wide(weight))
        factor = _factor(scale, sigma, eps)
        along = torch.dot(gradient.flatten(), matrix.flatten())
        # Where the singular value counts as 1 it has no derivative.
        pull = torch.where(sigma > eps, -along * factor / sigma, 0.0) / len(row_axes)
        pulls = pull * products.sign()
        found = gradient * factor
        for axis, pull, left, right in zip(
            row_axes, pulls, vectors[::2], vectors[1::2], strict=True
        ):
            outer = torch.outer(left * pull, right)
            if axis == 0:
                found += outer.view_as(found)
            else:
                found += outer.view(found.shape[1], found.shape[0], -1).transpose(0, 1)
        return found.view_as(weight).to(weight.dtype), *rest
