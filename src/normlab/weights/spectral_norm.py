r"""Spectral normalisation: a weight divided by its largest singular value, or by the mean of two.

With :math:`M_1` the kernel as a matrix with output channels as rows, :math:`M_2` with input
channels as rows, and :math:`\sigma` the largest singular value,

.. math::
    \bar W = c \, W / \sigma(M_1), \qquad
    \bar W = c \, W / \tfrac12 (\sigma(M_1) + \sigma(M_2))

The first (c = 1: SN, else SSN) sets what the layer can do to its input at most; the second (BSN,
BSSN) balances that with what it can do to the gradient. Singular values are followed by power
iteration: one step in each training forward, from vectors that a checkpoint holds; gradients take
the vectors as constants.

Source: T. Miyato, T. Kataoka, M. Koyama, Y. Yoshida, "Spectral Normalization for Generative
Adversarial Networks", 2018, arXiv 1802.05957; Z. Lin, V. Sekar, G. Fanti, "Why Spectral
Normalization Stabilizes GANs: Analysis and Improvements", 2020, arXiv 2009.02773.

Departs:
    - No gradient flows through the power iteration; the second paper's public code lets it.
    - The iteration starts with 15 steps, as torch's does, and moves with each training forward;
      `frozen_power_iteration` keeps it still where a step runs a layer several times.
    - The one-sided form is ours, too, and not torch's: there a weight of zeros becomes NaN, and one
      revived from zeros infinite. The two agree where the iteration has converged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normlab.method import Card, Method, Setting, Source, Unsuitable
from normlab.moments import runs_eagerly, wide

Sides = Literal[1, 2]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED, nn.Embedding)
_FIRST_STEPS = 15


class SpectralNorm(nn.Module):
    """The parametrisation: divides a weight by its largest singular values, times a scale.

    Args:
        weight: The weight at registration, of at least two axes.
        scale: The scale c, above 0.
        sides: 1 for the matrix with output channels as rows, 2 for the mean over both matrices.
        output_axis: The weight's axis of output channels: 1 for transposed convolutions.
        n_power_iterations: Steps in each training forward, at least 1.
        eps: Singular values count as at least this large, so that zeros stay zeros.
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
            (scale > 0, "scale", scale, "a number above 0"),
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
                for name, size in (("left", weight.shape[axis]), ("right", 0)):
                    # The right vector follows from the left one in the first step.
                    size = size or weight.numel() // weight.shape[axis]
                    vector = torch.randn(size, generator=generator).to(matrix)
                    self.register_buffer(f"{name}{side}", vector / vector.norm())
            for side in range(sides):
                self._iterate(matrix, side, _FIRST_STEPS)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the normalised weight."""
        # Autocast would take the small products in half precision.
        with torch.autocast(weight.device.type, enabled=False):
            if self.training and not self.frozen:
                with torch.no_grad():
                    matrix = _three_axes(wide(weight))
                    for side in range(len(self.row_axes)):
                        self._iterate(matrix, side, self.n_power_iterations)
            # Clones, because the next forward moves the vectors while this graph may be alive.
            vectors = [
                getattr(self, f"{name}{side}").clone()
                for side in range(len(self.row_axes))
                for name in ("left", "right")
            ]
            normalize = _Normalize.apply if runs_eagerly(weight) else _plain
            return normalize(weight, self.scale, self.eps, self.row_axes, *vectors)

    def _iterate(self, matrix: Tensor, side: int, steps: int) -> None:
        left, right = getattr(self, f"left{side}"), getattr(self, f"right{side}")
        rows = _rows(matrix, self.row_axes[side])
        for _ in range(steps):
            _set_direction(right, torch.mv(rows.t(), left), self.eps)
            _set_direction(left, torch.mv(rows, right), self.eps)

    def extra_repr(self) -> str:
        """Return the arguments shown by ``print``."""
        return f"scale={self.scale}, sides={len(self.row_axes)}"


def _three_axes(weight: Tensor) -> Tensor:
    """Return the weight as ``(A, B, K)``, all kernel positions on the last axis."""
    return weight.reshape(*weight.shape[:2], -1)


def _rows(weight: Tensor, axis: int) -> Tensor:
    """Return the matrix M whose rows lie along ``axis`` of ``(A, B, K)``."""
    return (weight if axis == 0 else weight.transpose(0, 1)).flatten(1)


def _plain(
    weight: Tensor, scale: float, eps: float, row_axes: tuple[int, ...], *vectors: Tensor
) -> Tensor:
    return _divided(weight, scale, eps, _mean_value(weight, row_axes, vectors))


def _divided(weight: Tensor, scale: float, eps: float, sigma: Tensor) -> Tensor:
    return (wide(weight) * (scale / sigma.clamp(min=eps))).to(weight.dtype)


def _mean_value(weight: Tensor, row_axes: tuple[int, ...], vectors: Sequence[Tensor]) -> Tensor:
    matrix = _three_axes(wide(weight))
    values = [
        torch.dot(left, torch.mv(_rows(matrix, axis), right))
        for axis, left, right in zip(row_axes, vectors[::2], vectors[1::2], strict=True)
    ]
    return torch.stack(values).mean()


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
        sigma = _mean_value(weight, row_axes, vectors)
        ctx.save_for_backward(weight, sigma, *vectors)
        ctx.options = (scale, eps, row_axes)
        return _divided(weight, scale, eps, sigma)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, sigma, *vectors = ctx.saved_tensors
        scale, eps, row_axes = ctx.options
        rest = (None,) * (3 + len(vectors))
        if torch.is_grad_enabled():
            # Derivatives of this backward need the singular values as functions of the weight.
            value = _plain(weight, scale, eps, row_axes, *vectors)
            return *torch.autograd.grad(value, weight, gradients[0], create_graph=True), *rest
        gradient, matrix = _three_axes(wide(gradients[0])), _three_axes(wide(weight))
        factor = scale / sigma.clamp(min=eps)
        along = torch.dot(gradient.flatten(), matrix.flatten())
        # Where the singular value counts as eps it has no derivative.
        pull = torch.where(sigma >= eps, -along * factor / sigma, 0.0) / len(row_axes)
        found = gradient * factor
        for axis, left, right in zip(row_axes, vectors[::2], vectors[1::2], strict=True):
            outer = torch.outer(left * pull, right)
            if axis == 0:
                found += outer.view_as(found)
            else:
                found += outer.view(found.shape[1], found.shape[0], -1).transpose(0, 1)
        return found.view_as(weight).to(weight.dtype), *rest


def _set_direction(vector: Tensor, new: Tensor, eps: float) -> None:
    """Set a vector to the direction of another one; a vanishing one gives none, and is not taken.

    Written as a choice between values, so that a graph can be compiled.
    """
    norm = torch.linalg.vector_norm(new)
    vector.copy_(torch.where(norm > eps, new / (norm + eps), vector))


def spectral_norm(
    target: nn.Module,
    *,
    scale: float = 1.0,
    n_power_iterations: int = 1,
    generator: torch.Generator | None = None,
) -> dict[str, nn.Module]:
    """Divide the weights of a model by their largest singular value, times a scale.

    Args:
        target: A model, whose linear, convolutional, transposed convolutional and embedding layers
            are parametrised in place, or one such layer.
        scale: The scale c of all layers, above 0.
        n_power_iterations: Steps in each training forward, at least 1.
        generator: For the first vectors; torch's own by default.

    Returns:
        The layers by name. ``parametrize.remove_parametrizations(layer, "weight")`` makes one plain
        again, with the weight that it computes with.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> _ = spectral_norm(layer, scale=1.5)
        >>> round(torch.linalg.matrix_norm(layer.weight, 2).item(), 3)
        1.5
    """
    return _register(target, 1, scale, n_power_iterations, generator)


def bidirectional_spectral_norm(
    target: nn.Module,
    *,
    scale: float = 1.0,
    n_power_iterations: int = 1,
    generator: torch.Generator | None = None,
) -> dict[str, nn.Module]:
    """Divide the weights of a model by the mean of two largest singular values, times a scale.

    Args:
        target: As in `spectral_norm`.
        scale: As in `spectral_norm`; the paper tries 0.7 to 4.
        n_power_iterations: As in `spectral_norm`.
        generator: As in `spectral_norm`.

    Returns:
        As `spectral_norm`.

    Raises:
        ValueError: An argument is out of its range.
    """
    return _register(target, 2, scale, n_power_iterations, generator)


def _register(
    target: nn.Module,
    sides: Sides,
    scale: float,
    n_power_iterations: int,
    generator: torch.Generator | None,
) -> dict[str, nn.Module]:
    chosen: dict[str, nn.Module] = {
        name: module for name, module in target.named_modules() if isinstance(module, _LAYERS)
    }
    parts = []
    for module in chosen.values():
        assert isinstance(module.weight, Tensor)
        part = SpectralNorm(
            module.weight.detach(),
            scale,
            sides=sides,
            output_axis=1 if isinstance(module, _TRANSPOSED) else 0,
            n_power_iterations=n_power_iterations,
            generator=generator,
        )
        parts.append(part.train(module.training))
    for module, part in zip(chosen.values(), parts, strict=True):
        parametrize.register_parametrization(module, "weight", part)
    return chosen


@contextmanager
def frozen_power_iteration(model: nn.Module) -> Iterator[None]:
    """Keep the singular vectors of a model still, so that each forward sees the same weights.

    Args:
        model: A model with `SpectralNorm` parametrisations; also restored where the body raises.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> _ = spectral_norm(layer)
        >>> with frozen_power_iteration(layer):
        ...     torch.equal(layer.weight, layer.weight)
        True
    """
    parts = [part for part in model.modules() if isinstance(part, SpectralNorm)]
    before = [part.frozen for part in parts]
    try:
        for part in parts:
            part.frozen = True
        yield
    finally:
        for part, frozen in zip(parts, before, strict=True):
            part.frozen = frozen


def _prepare(model: nn.Module, setting: Setting, sides: Sides, scale: float, name: str):
    chosen = _register(model, sides, scale, 1, setting.generator)
    if not chosen:
        raise Unsuitable(
            f"{name}(model): expected a model with linear or convolutional layers, got "
            f"{type(model).__name__} without any; there is nothing to normalise"
        )
    setting.say(f"{len(chosen)} weights are divided by their largest singular value")
    return model


def prepare(model: nn.Module, setting: Setting, *, scale: float = 1.0) -> nn.Module:
    """Normalise every weight layer from one side; normalisers stay where they are."""
    return _prepare(model, setting, 1, scale, "spectral-norm")


def prepare_bidirectional(model: nn.Module, setting: Setting, *, scale: float = 1.0) -> nn.Module:
    """Normalise every weight layer from both sides; normalisers stay where they are."""
    return _prepare(model, setting, 2, scale, "bidirectional-spectral-norm")


_STATE = ("one pair of singular vectors for each matrix",)
_LIMITS = (
    "It leaves the model's normalisers where they are: in front of one it does nothing.",
    "The singular value is that of the kernel as a matrix, not of the convolution: no exact bound.",
)

CARD = Card(
    name="spectral-norm",
    title="Spectral normalisation",
    summary="Divides every weight by its largest singular value, times a scale.",
    room="weights",
    source=Source(
        authors="T. Miyato, T. Kataoka, M. Koyama, Y. Yoshida",
        title="Spectral Normalization for Generative Adversarial Networks",
        year=2018,
        arxiv="1802.05957",
        venue="ICLR 2018",
    ),
    batch_of_one="needs space",
    state=_STATE,
    best_for="Discriminators and critics, and networks whose gain must not exceed a set value.",
    limits=_LIMITS,
    departures=("A weight of zeros stays zero; torch's own form gives NaN.",),
)

METHOD = Method(card=CARD, prepare=prepare)

BIDIRECTIONAL_CARD = Card(
    name="bidirectional-spectral-norm",
    title="Bidirectional scaled spectral normalisation",
    summary="Divides every weight by the mean of the largest singular values that its kernel has "
    "forwards and backwards, times a scale.",
    room="weights",
    source=Source(
        authors="Z. Lin, V. Sekar, G. Fanti",
        title="Why Spectral Normalization Stabilizes GANs: Analysis and Improvements",
        year=2020,
        arxiv="2009.02773",
        venue="NeurIPS 2021",
    ),
    batch_of_one="needs space",
    state=_STATE,
    best_for="Discriminators of convolutions, whose gradients shall neither explode nor vanish.",
    limits=_LIMITS,
    departures=(
        "No gradient flows through the power iteration, as in the first paper.",
        "The vectors move with each training forward, not with each step of the discriminator "
        "(see frozen_power_iteration).",
    ),
)

BIDIRECTIONAL = Method(card=BIDIRECTIONAL_CARD, prepare=prepare_bidirectional)
