r"""The recurrent layers of target space, and the ordinary one into which one is exported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normlab.weights.target_space_layer import Solved, TargetLayer, load

Nonlinearity = Literal["tanh", "relu"]


class TargetRecurrent(TargetLayer):
    r"""A recurrent layer with targets ``(N, T, hidden_size)`` for its sums at every time.

    .. math::
        h_t = \phi([1, x_t, h_{t-1}] W), \qquad h_0 = 0

    W is solved once from the rows of all samples and times, in which :math:`h_{t-1}` is taken from
    the targets, :math:`\phi(T_{t-1})`. The layer is then unrolled with W itself, on the realisation
    batch too, so that the layers behind it see what was achieved. The sequences of the realisation
    batch may have another length than those of training.

    Args:
        input_size: Features of a time step.
        hidden_size: Units.
        rows: Number of sequences in the realisation pass, and their length.
        bias: As for `TargetLayer`, like ridge and all that follow it.
        nonlinearity: ``"tanh"`` or ``"relu"``.
        return_sequences: Whether the output is that of every time; otherwise that of the last.

    Shape:
        ``(N, T, input_size)`` to ``(N, T, hidden_size)``, or ``(N, hidden_size)`` without
        sequences.

    Raises:
        ValueError: An unknown nonlinearity; otherwise as for `TargetLinear`.

    Example:
        >>> from normlab.weights.target_space_model import TargetSpace
        >>> model = TargetSpace(TargetRecurrent(2, 3, rows=(4, 7)), torch.randn(4, 7, 2))
        >>> model(torch.randn(5, 20, 2)).shape
        torch.Size([5, 20, 3])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        rows: Sequence[int],
        bias: bool = True,
        nonlinearity: Nonlinearity = "tanh",
        return_sequences: bool = True,
        *,
        ridge: float = 0.001,
        relative: bool = False,
        float64: bool = False,
        init_std: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        check_nonlinearity("TargetRecurrent", nonlinearity)
        samples, times = rows
        shape = (samples, times, hidden_size)
        super().__init__(shape, bias, ridge, relative, "sequential", float64, init_std, generator)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.nonlinearity: Nonlinearity = nonlinearity
        self.return_sequences = return_sequences

    def rows_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """One row for each sample and time: the input, then the state wanted before it."""
        self._check_sequences(x)
        self.check_rows((*x.shape[:-1], self.hidden_size))
        wanted = getattr(torch, self.nonlinearity)(self.targets)
        rows = torch.cat([x.to(wanted.dtype), _delayed(wanted)], dim=-1)
        return rows.flatten(0, 1), self.targets.flatten(0, 1)

    def weight_of(self, matrix: Tensor) -> Tensor:
        """``(hidden, input + hidden)``: the two matrices of ``nn.RNN`` side by side."""
        return matrix.mT

    def apply_weights(self, x: Tensor, solved: Solved) -> Tensor:
        """Unroll."""
        states = self._states(x, solved)
        return states if self.return_sequences else states[:, -1]

    def sums(self, x: Tensor, solved: Solved) -> Tensor:
        """What went into the nonlinearity at every time of the unrolling."""
        before = _delayed(self._states(x, solved))
        return F.linear(torch.cat([x, before], dim=-1), solved.weight, solved.bias)

    def _states(self, x: Tensor, solved: Solved) -> Tensor:
        self._check_sequences(x)
        from_input, from_state = solved.weight.split((self.input_size, self.hidden_size), dim=1)
        driven = F.linear(x, from_input, solved.bias)
        activation = getattr(torch, self.nonlinearity)
        state = activation(driven[:, 0])
        states = [state]
        for sums in driven.unbind(1)[1:]:
            state = activation(sums + F.linear(state, from_state))
            states.append(state)
        return torch.stack(states, dim=1)

    def _check_sequences(self, x: Tensor) -> None:
        fits = x.dim() == 3 and x.shape[-1] == self.input_size
        self.check_input(x, fits, f"(N, T, {self.input_size})")

    def to_weight_space(self, solved: Solved) -> nn.Module:
        """A `RecurrentLayer`."""
        layer = RecurrentLayer(
            self.input_size,
            self.hidden_size,
            self.has_bias,
            self.nonlinearity,
            self.return_sequences,
        )
        self.load_into(layer.cell, solved)
        return layer

    def load_into(self, cell: nn.RNN, solved: Solved) -> nn.RNN:
        """Put solved weights into torch's layer, and return it."""
        from_input, from_state = solved.weight.split((self.input_size, self.hidden_size), dim=1)
        bias = solved.bias
        zero = None if bias is None else torch.zeros_like(bias)
        load(
            cell,
            weight_ih_l0=from_input,
            weight_hh_l0=from_state,
            bias_ih_l0=bias,
            bias_hh_l0=zero,
        )
        cell.flatten_parameters()
        return cell

    def extra_repr(self) -> str:
        """Return the arguments shown by ``print``."""
        rows = tuple(self.targets.shape[:-1])
        return (
            f"{self.input_size}, {self.hidden_size}, rows={rows}, "
            f"nonlinearity={self.nonlinearity!r}, ridge={self.ridge}"
        )


class TargetRNN(TargetRecurrent):
    """A `TargetRecurrent` that takes and returns what an ``nn.RNN`` of one layer does.

    Args:
        input_size: As for `TargetRecurrent`, like hidden_size, rows, bias and nonlinearity.
        batch_first: Whether samples come first in input and output, rather than times.
        options: The keyword-only arguments of `TargetRecurrent`.

    Shape:
        ``(T, N, input_size)`` to ``(T, N, hidden_size)`` and the last states
        ``(1, N, hidden_size)``; the first two with ``batch_first`` as ``(N, T, *)``.

    Raises:
        ValueError: As for `TargetRecurrent`.

    Example:
        >>> from normlab.weights.target_space_model import TargetSpace
        >>> model = TargetSpace(TargetRNN(2, 3, rows=(4, 7)), torch.randn(7, 4, 2))
        >>> states, last = model(torch.randn(20, 5, 2))
        >>> states.shape, last.shape
        (torch.Size([20, 5, 3]), torch.Size([1, 5, 3]))
        >>> model.to_weight_space()
        RNN(2, 3)
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        rows: Sequence[int],
        bias: bool = True,
        nonlinearity: Nonlinearity = "tanh",
        batch_first: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(input_size, hidden_size, rows, bias, nonlinearity, **options)
        self.batch_first = batch_first

    @classmethod
    def like(
        cls, layer: nn.RNN, input_shape: Sequence[int], bias: bool, **options: Any
    ) -> TargetRNN:
        """Return a layer of the form of ``layer``, for a realisation pass with such an input.

        Args:
            layer: A recurrent layer of one layer and direction; its weights are not looked at.
            input_shape: The shape of its input in the realisation pass.
            bias: Whether the new layer has a bias.
            options: The keyword-only arguments of the class.
        """
        one, other, _ = input_shape
        rows = (one, other) if layer.batch_first else (other, one)
        sizes = (layer.input_size, layer.hidden_size)
        return cls(*sizes, rows, bias, layer.nonlinearity, layer.batch_first, **options)

    def forward(self, x: Tensor, hx: None = None) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the states at every time and the last ones, from a state of zeros.

        Raises:
            ValueError: A first state is given, or a packed sequence; or as for `TargetLayer`.
        """
        if hx is not None or not isinstance(x, Tensor):
            got = "a first state" if hx is not None else type(x).__name__
            raise ValueError(
                f"TargetRNN(x): expected sequences in one tensor that start from a state of zeros, "
                f"got {got}; keep nn.RNN where a model needs that"
            )
        states = super().forward(x if self.batch_first else x.transpose(0, 1))
        return states if self.batch_first else states.transpose(0, 1), states[:, -1].unsqueeze(0)

    def to_weight_space(self, solved: Solved) -> nn.RNN:
        """An ``nn.RNN``."""
        cell = nn.RNN(
            self.input_size,
            self.hidden_size,
            nonlinearity=self.nonlinearity,
            bias=self.has_bias,
            batch_first=self.batch_first,
        )
        return self.load_into(cell, solved)


class RecurrentLayer(nn.Module):
    """A plain ``nn.RNN`` of one layer that returns its states alone, samples first.

    Args:
        input_size: Features of a time step.
        hidden_size: Units.
        bias: Whether there is a bias.
        nonlinearity: ``"tanh"`` or ``"relu"``.
        return_sequences: Whether the output is that of every time; otherwise that of the last.

    Shape:
        As `TargetRecurrent`.

    Raises:
        ValueError: An unknown nonlinearity.

    Example:
        >>> RecurrentLayer(2, 3, return_sequences=False)(torch.zeros(5, 7, 2)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: Nonlinearity = "tanh",
        return_sequences: bool = True,
    ) -> None:
        super().__init__()
        check_nonlinearity("RecurrentLayer", nonlinearity)
        self.cell = nn.RNN(
            input_size, hidden_size, nonlinearity=nonlinearity, bias=bias, batch_first=True
        )
        self.return_sequences = return_sequences

    def forward(self, x: Tensor) -> Tensor:
        """Unroll from a state of zeros."""
        states, _ = self.cell(x)
        return states if self.return_sequences else states[:, -1]


def check_nonlinearity(operation: str, nonlinearity: str) -> None:
    """Refuse what ``nn.RNN`` does not have."""
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(
            f"{operation}(nonlinearity={nonlinearity!r}): expected 'tanh' or 'relu', got "
            f"{nonlinearity!r}; use 'tanh'"
        )


def _delayed(states: Tensor) -> Tensor:
    """Return the states one time step later, with zeros at the start."""
    return F.pad(states[:, :-1], (0, 0, 1, 0))
