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
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
        kind = weight.device.type
        # Autocast would take the small products in half precision; to turn off what is off costs
        # as much as several of them.
        wanted = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        with torch.autocast(kind, enabled=False) if wanted else nullcontext():
            vectors, products = self._vectors(weight)
            options = (self.scale, self.eps, self.row_axes)
            if runs_eagerly(weight):
                return _Normalize.apply(weight, options, products, *vectors)  # pyright: ignore[reportReturnType]
            return _plain(weight, *options, *vectors)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return what to normalise where ``layer.weight = weight`` is written: the weight."""
        return weight

    @torch.no_grad()
    def _vectors(self, weight: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return left and right vector of each side, which in training move on before.

        And of each side u^T M v; nothing where the compiler must not see how vectors move.
        """
        steps = self.n_power_iterations if self.training and not self.frozen else 0
        # An evaluating graph stays one of torch's own operators, for whoever exports it.
        opaque = torch.compiler.is_compiling() and self.training
        matrix = _three_axes(wide(weight))
        vectors: list[Tensor] = []
        products: list[Tensor] = []
        for side, axis in enumerate(self.row_axes):
            buffers = getattr(self, f"left{side}"), getattr(self, f"right{side}")
            if opaque:
                moved = _iterate_unseen(matrix, *buffers, axis, steps, self.eps)
            else:
                *moved, product = _follow(_rows(matrix, axis), *buffers, steps, self.eps)
                products.append(product)
            if steps:
                for buffer, vector in zip(buffers, moved, strict=True):
                    buffer.copy_(vector)
            vectors += moved
        return vectors, products

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
    """Return left and right vector of a weight ``(A, B, K)`` after so many steps."""
    return _follow(_rows(weight, axis), left, right, steps, eps)[:2]


def _follow(
    rows: Tensor, left: Tensor, right: Tensor, steps: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return left and right vector after so many steps, in tensors of their own, and u^T M v.

    Of their own even after no step, because the next forward moves the buffers while a graph may
    still need what it was given.
    """
    left, right = (vector.to(rows.dtype, copy=steps == 0) for vector in (left, right))
    for _ in range(steps):
        right = _direction(torch.mv(rows.t(), left), right, eps)
        left = _direction(torch.mv(rows, right), left, eps)
    return left, right, torch.dot(left, torch.mv(rows, right))


def _direction(new: Tensor, old: Tensor, eps: float) -> Tensor:
    """Return the direction of a vector; a vanishing one has none and leaves the old one.

    On a device as a choice between values, so that it has not to be waited for.
    """
    norm = _on_host(torch.linalg.vector_norm(new))
    if isinstance(norm, Tensor):
        return torch.where(norm > eps, new / (norm + eps), old)
    return new / (norm + eps) if norm > eps else old.clone()


def _on_host(scalar: Tensor) -> Tensor | float:
    """Return a tensor of one value as a number where nothing has to be waited for.

    On small weights each operation between scalars costs as much as one on the weight.
    """
    at_hand = scalar.device.type == "cpu" and runs_eagerly(scalar)
    return scalar.item() if at_hand else scalar


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
    matrix = _three_axes(wide(weight))
    products = [
        torch.dot(left, torch.mv(_rows(matrix, axis), right))
        for axis, left, right in zip(row_axes, vectors[::2], vectors[1::2], strict=True)
    ]
    sigma = torch.stack(products).abs().mean()
    return (wide(weight) * _factor(scale, sigma, eps)).to(weight.dtype)


def _factor(scale: float, sigma: Any, eps: float) -> Any:
    if isinstance(sigma, Tensor):
        return scale / torch.where(sigma > eps, sigma, 1.0)
    return scale / (sigma if sigma > eps else 1.0)


class _Normalize(torch.autograd.Function):
    """`_plain` as one node, because for small weights the many steps cost more than the sums."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        options: tuple[float, float, tuple[int, ...]],
        products: list[Tensor],
        *vectors: Tensor,
    ) -> Tensor:
        scale, eps, _ = options
        values = [_on_host(product) for product in products]
        sigma = sum(map(abs, values)) / len(values)
        factor = _factor(scale, sigma, eps)
        ctx.save_for_backward(weight, *vectors)
        ctx.options = options
        ctx.scalars = (values, sigma > eps, factor)
        return (wide(weight) * factor).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, *vectors = ctx.saved_tensors
        scale, eps, row_axes = ctx.options
        rest = (None,) * (2 + len(vectors))
        if torch.is_grad_enabled():
            # Derivatives of this backward need the singular values as functions of the weight.
            value = _plain(weight, scale, eps, row_axes, *vectors)
            return *torch.autograd.grad(value, weight, gradients[0], create_graph=True), *rest
        values, counts, factor = ctx.scalars
        gradient, matrix = _three_axes(wide(gradients[0])), _three_axes(wide(weight))
        along = _on_host(torch.dot(gradient.flatten(), matrix.flatten()))
        # Where the singular value counts as 1 it has no derivative.
        pull = -along * factor * factor / scale * counts / len(row_axes)
        found = gradient * factor
        for axis, product, left, right in zip(
            row_axes, values, vectors[::2], vectors[1::2], strict=True
        ):
            # Of a number as of a tensor; zero has none.
            sign = (product > 0) * 1.0 - (product < 0) * 1.0
            places = (-1, 1, 1) if axis == 0 else (1, -1, 1)
            others = (1, *found.shape[1:]) if axis == 0 else (len(found), 1, -1)
            found.addcmul_((left * (pull * sign)).view(places), right.view(others))
        return found.view_as(weight).to(weight.dtype), *rest
