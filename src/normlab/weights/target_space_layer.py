r"""Layers whose parameters are targets: what their sums should be on the realisation batch.

Each solves its weights from the input that it gets in a pass over the realisation batch, and then
is an ordinary layer with these weights. `normlab.weights.target_space.TargetSpace` makes the pass.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normlab.moments import wide
from normlab.weights.target_space_solve import solve_weights

Mode = Literal["sequential", "optimistic"]
"""What goes on in the realisation pass: the sums achieved, or the targets as if they were met."""

Pass = Literal["solve", "project"]
"""What a pass over the realisation batch is for: solving weights, or making targets reachable."""


class Solved(NamedTuple):
    """The weights of a layer, as torch's layer of the same kind has them."""

    weight: Tensor
    bias: Tensor | None


class TargetLayer(nn.Module):
    """What the layers of target space share; the kinds of layer differ in rows and application.

    Args:
        targets_shape: The shape of the layer's output on the realisation batch.
        bias: Whether there is a bias; it is solved, and held small, like a weight.
        ridge: The ridge of the solve, at least 0; 0 takes the pseudo-inverse, with a warning.
        relative: Whether ``ridge`` is multiplied by the number of rows.
        mode: ``"sequential"`` or ``"optimistic"``.
        float64: Whether to solve in float64; otherwise in float32, or float64 in such a model.
        init_std: Standard deviation of the initial targets, normal and cut at two of it.
        generator: For the draw, on the CPU; torch's own by default.
    """

    def __init__(
        self,
        targets_shape: Sequence[int],
        bias: bool,
        ridge: float,
        relative: bool,
        mode: Mode,
        float64: bool,
        init_std: float,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_ridge(name, ridge)
        check_mode(name, mode)
        if len(targets_shape) < 2 or min(targets_shape) < 1:
            raise ValueError(
                f"{name}(rows): expected the sizes of a realisation batch, all at least 1, got "
                f"targets of shape {tuple(targets_shape)}; give at least one sample"
            )
        if ridge == 0:
            warnings.warn(
                f"{name}: a ridge of 0 takes the pseudo-inverse, which jumps where the rank of "
                "the layer's input changes; use 0.001 for weights that change smoothly",
                stacklevel=3,
            )
        self.has_bias = bias
        self.ridge = ridge
        self.relative = relative
        self.mode: Mode = mode
        self.float64 = float64
        self.init_std = init_std
        self.targets = nn.Parameter(torch.empty(*targets_shape))
        self._pass: Pass | None = None
        self._solved: Solved | None = None
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the targets anew; a projection makes them reachable."""
        drawn = torch.empty(self.targets.shape)
        limit = 2 * self.init_std
        nn.init.trunc_normal_(drawn, std=self.init_std, a=-limit, b=limit, generator=generator)
        with torch.no_grad():
            self.targets.copy_(drawn)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the weights to ``x``; in a realisation pass solve them from ``x`` first.

        Raises:
            ValueError: The weights were not solved, or in one realisation pass a second time.
        """
        name = type(self).__name__
        if self._pass is None:
            if self._solved is None:
                raise ValueError(
                    f"{name}(x): expected weights solved from a realisation batch, got none; put "
                    "the model into TargetSpace(model, realisation) and call that"
                )
            return self.apply_weights(x, self._solved)
        if self._solved is not None:
            raise ValueError(
                f"{name}(x): expected one call in a pass over the realisation batch, got a "
                "second one; use an ordinary layer where weights are shared between calls"
            )
        solved = self.solve(x)
        if self._pass == "project":
            with torch.no_grad():
                self.targets.copy_(self.sums(x, solved))
            solved = self.solve(x)
        self._solved = solved
        if self._pass == "solve" and self.mode == "optimistic":
            # An activation in place must not reach the targets themselves.
            return self.targets.to(x.dtype).clone()
        return self.apply_weights(x, solved)

    def solve(self, x: Tensor) -> Solved:
        """Return the weights that come closest to the targets.

        Args:
            x: The layer's input on the realisation batch.

        Raises:
            ValueError: The input has a shape that the layer is not made for, or the sums have
                another shape than the targets.
        """
        rows, targets = self.rows_of(x)
        accurate = torch.float64 if self.float64 else wide(targets).dtype
        if self.has_bias:
            rows = torch.cat([rows.new_ones(*rows.shape[:-1], 1), rows], dim=-1)
        ridge = self.ridge * (rows.shape[-2] if self.relative else 1)
        matrix = solve_weights(rows.to(accurate), targets.to(accurate), ridge)
        matrix = matrix.to(self.targets.dtype)
        if not self.has_bias:
            return Solved(self.weight_of(matrix), None)
        return Solved(self.weight_of(matrix[..., 1:, :]), matrix[..., 0, :].flatten())

    def check_input(self, x: Tensor, fits: bool, expected: str) -> None:
        """Refuse an input of a shape that the layer is not made for."""
        if not fits:
            raise ValueError(
                f"{type(self).__name__}(x): expected an input of shape {expected}, got "
                f"{tuple(x.shape)}; make the layer for such inputs"
            )

    def check_rows(self, shape: Sequence[int]) -> None:
        """Refuse a realisation batch whose sums would have another shape than the targets."""
        if tuple(shape) != tuple(self.targets.shape):
            raise ValueError(
                f"{type(self).__name__}(x): expected a realisation batch with sums of the shape of "
                f"the targets {tuple(self.targets.shape)}, got {tuple(shape)}; make the layer for "
                "this batch"
            )

    def rows_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return input and targets as matrices ``(*, rows, columns)``, without a column of ones."""
        raise NotImplementedError

    def weight_of(self, matrix: Tensor) -> Tensor:
        """Return solved columns, without the bias, in the layout of torch's layer."""
        raise NotImplementedError

    def apply_weights(self, x: Tensor, solved: Solved) -> Tensor:
        """Return the layer's output for any input."""
        raise NotImplementedError

    def sums(self, x: Tensor, solved: Solved) -> Tensor:
        """Return what the targets are targets for."""
        return self.apply_weights(x, solved)

    def to_weight_space(self, solved: Solved) -> nn.Module:
        """Return torch's layer with these weights."""
        raise NotImplementedError


class TargetLinear(TargetLayer):
    """A linear layer with targets ``(*rows, out_features)`` as its parameters.

    Args:
        in_features: The size of each input sample.
        out_features: The size of each output sample.
        rows: The leading sizes of the input in the realisation pass: the number of samples, or
            that and the positions at which the layer is applied.
        bias: As for `TargetLayer`, like all that follow.

    Shape:
        ``(*, in_features)`` to ``(*, out_features)``.

    Raises:
        ValueError: A negative ridge, an unknown mode or no rows; see also `TargetLayer.forward`.

    Example:
        >>> layer = TargetLinear(2, 3, rows=4, ridge=0.5)
        >>> tuple(layer.targets.shape), tuple(layer.solve(torch.ones(4, 2)).weight.shape)
        ((4, 3), (3, 2))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rows: int | Sequence[int],
        bias: bool = True,
        *,
        ridge: float = 0.001,
        relative: bool = False,
        mode: Mode = "sequential",
        float64: bool = False,
        init_std: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        leading = (rows,) if isinstance(rows, int) else tuple(rows)
        shape = (*leading, out_features)
        super().__init__(shape, bias, ridge, relative, mode, float64, init_std, generator)
        self.in_features = in_features
        self.out_features = out_features

    def rows_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """One row for each sample and position."""
        self.check_input(x, x.shape[-1] == self.in_features, f"(*, {self.in_features})")
        self.check_rows((*x.shape[:-1], self.out_features))
        return x.reshape(-1, x.shape[-1]), self.targets.reshape(-1, self.out_features)

    def weight_of(self, matrix: Tensor) -> Tensor:
        """``(out, in)``."""
        return matrix.mT

    def apply_weights(self, x: Tensor, solved: Solved) -> Tensor:
        """``F.linear``."""
        return F.linear(x, solved.weight, solved.bias)

    def to_weight_space(self, solved: Solved) -> nn.Linear:
        """An ``nn.Linear``."""
        layer = nn.Linear(self.in_features, self.out_features, bias=self.has_bias)
        return load(layer, weight=solved.weight, bias=solved.bias)

    def extra_repr(self) -> str:
        """Return the arguments shown by ``print``."""
        rows = tuple(self.targets.shape[:-1])
        return f"{self.in_features}, {self.out_features}, rows={rows}, ridge={self.ridge}"


def load(layer: nn.Module, **values: Tensor | None) -> Any:
    """Copy values into a layer's parameters, in their dtype and on their device."""
    for name, value in values.items():
        if value is not None:
            setattr(layer, name, nn.Parameter(value.detach().clone()))
    return layer


def check_ridge(operation: str, ridge: float) -> None:
    """Refuse a ridge that is negative or not a number."""
    if not 0 <= ridge < math.inf:
        raise ValueError(
            f"{operation}(ridge={ridge}): expected a finite number of at least 0, got {ridge}; "
            "use 0.001, or up to 0.1 where rows are very many"
        )


def check_mode(operation: str, mode: str) -> None:
    """Refuse an unknown mode."""
    known = get_args(Mode)
    if mode not in known:
        raise ValueError(
            f"{operation}(mode={mode!r}): expected {' or '.join(map(repr, known))}, got {mode!r}; "
            "use 'sequential'"
        )
