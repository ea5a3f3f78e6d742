"""The convolution of target space: every position of every sample is a row of its solve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from normlab.moments import wide
from normlab.weights.target_space_layer import Mode, Solved, TargetLayer, load

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class TargetConv2d(TargetLayer):
    """A convolution with targets ``(N, out_channels, H, W)``, one for each position, as parameters.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: As for nn.Conv2d, like stride, padding, dilation, groups and padding_mode.
        rows: Number of samples, height and width of the output in the realisation pass.
        stride: Step between positions.
        padding: Pixels at each side, ``"same"`` or ``"valid"``.
        dilation: Step between the pixels under the kernel.
        groups: Groups of channels, each solved by itself.
        bias: As for `TargetLayer`, like all that follow.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.

    Shape:
        ``(N, in_channels, H, W)`` to ``(N, out_channels, H', W')``.

    Raises:
        ValueError: As for `TargetLinear`.

    Example:
        >>> layer = TargetConv2d(2, 3, kernel_size=3, rows=(4, 6, 6), padding=1)
        >>> tuple(layer.targets.shape), tuple(layer.solve(torch.ones(4, 2, 6, 6)).weight.shape)
        ((4, 3, 6, 6), (3, 2, 3, 3))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        rows: Sequence[int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        *,
        ridge: float = 0.001,
        relative: bool = False,
        mode: Mode = "sequential",
        float64: bool = False,
        init_std: float = 0.1,
        generator: torch.Generator | None = None,
    ) -> None:
        samples, height, width = rows
        shape = (samples, out_channels, height, width)
        super().__init__(shape, bias, ridge, relative, mode, float64, init_std, generator)
        # torch's layer, without memory, knows how to read and check its arguments.
        form = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            padding_mode=padding_mode,
            device="meta",
        )
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride = _pair(form.kernel_size), _pair(form.stride)
        self.padding = padding if isinstance(padding, str) else _pair(padding)
        self.dilation = _pair(form.dilation)
        self.padding_mode: PaddingMode = padding_mode
        left, right, top, bottom = self._border = tuple(form._reversed_padding_repeated_twice)
        even = padding_mode == "zeros" and (left, top) == (right, bottom)
        self._native = (top, left) if even else None

    @classmethod
    def like(
        cls, layer: nn.Conv2d, input_shape: Sequence[int], bias: bool, **options: Any
    ) -> TargetConv2d:
        """Return a layer of the form of ``layer``, for a realisation pass with such an input.

        Args:
            layer: A convolution; its weights are not looked at.
            input_shape: ``(N, in_channels, H, W)`` in the realisation pass.
            bias: Whether the new layer has a bias.
            options: The keyword-only arguments of the class.
        """
        left, right, top, bottom = layer._reversed_padding_repeated_twice
        samples, _, height, width = input_shape
        kernel_size, stride = _pair(layer.kernel_size), _pair(layer.stride)
        dilation = _pair(layer.dilation)
        padded = (height + top + bottom, width + left + right)
        return cls(
            layer.in_channels,
            layer.out_channels,
            kernel_size,
            (samples, *_output_size(padded, kernel_size, stride, dilation)),
            stride,
            layer.padding if isinstance(layer.padding, str) else _pair(layer.padding),
            dilation,
            layer.groups,
            bias,
            layer.padding_mode,
            **options,
        )

    def rows_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """One row for each sample and position, apart for each group of channels."""
        fits = x.dim() == 4 and x.shape[1] == self.in_channels
        self.check_input(x, fits, f"(N, {self.in_channels}, H, W)")
        padded = self._padded(x)
        size = _output_size(padded.shape[-2:], self.kernel_size, self.stride, self.dilation)
        self.check_rows((len(x), self.out_channels, *size))
        patches = F.unfold(wide(padded), self.kernel_size, self.dilation, 0, self.stride)
        per_group = self.in_channels // self.groups * self.kernel_size[0] * self.kernel_size[1]
        return self._matrix(patches, per_group), self._matrix(
            self.targets.flatten(2), self.out_channels // self.groups
        )

    def _matrix(self, x: Tensor, columns: int) -> Tensor:
        """``(N, groups * columns, positions)`` to ``(groups, N * positions, columns)``."""
        split = x.unflatten(1, (self.groups, columns))
        return split.permute(1, 0, 3, 2).reshape(self.groups, -1, columns)

    def weight_of(self, matrix: Tensor) -> Tensor:
        """``(out, in / groups, kernel height, kernel width)``."""
        per_group = self.in_channels // self.groups
        return matrix.mT.reshape(self.out_channels, per_group, *self.kernel_size)

    def apply_weights(self, x: Tensor, solved: Solved) -> Tensor:
        """``F.conv2d``."""
        x = self._padded(x) if self._native is None else x
        weight, bias = solved
        padding = self._native or (0, 0)
        return F.conv2d(x, weight, bias, self.stride, padding, self.dilation, self.groups)

    def _padded(self, x: Tensor) -> Tensor:
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x, self._border, mode=mode) if any(self._border) else x

    def to_weight_space(self, solved: Solved) -> nn.Conv2d:
        """An ``nn.Conv2d``."""
        layer = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.has_bias,
            self.padding_mode,
        )
        return load(layer, weight=solved.weight, bias=solved.bias)

    def extra_repr(self) -> str:
        """Return the arguments shown by ``print``."""
        samples, _, *size = self.targets.shape
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"rows={(samples, *size)}, stride={self.stride}, padding={self.padding}, "
            f"ridge={self.ridge}"
        )


def _output_size(
    padded: Sequence[int],
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
) -> tuple[int, ...]:
    return tuple(
        (length - step * (kernel - 1) - 1) // hop + 1
        for length, kernel, hop, step in zip(padded, kernel_size, stride, dilation, strict=True)
    )
