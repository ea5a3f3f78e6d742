"""The parts of a Fixup network: scalars, residual blocks without normalisers, the readout.

Rule 3 of `normlab.inits.fixup`: one scalar multiplier after the last weight layer of every branch,
one scalar bias in front of every convolution, linear layer and activation. The blocks take ready
convolutions, so that width, groups and strides are the caller's.

Source: H. Zhang, Y. N. Dauphin, T. Ma, "Fixup Initialization: Residual Learning Without
Normalization", 2019, arXiv 1901.09321.

Departs:
    - A scalar is a parameter of shape (1,): sharded training refuses parameters without axes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ScalarBias(nn.Module):
    """Adds one learnt number to every value, started at 0.

    Example:
        >>> ScalarBias()(torch.ones(2)).tolist()
        [1.0, 1.0]
    """

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` plus the scalar, in the dtype of ``x``."""
        return x + self.value.to(x.dtype)


class ScalarScale(nn.Module):
    """Multiplies every value by one learnt number, started at 1.

    Example:
        >>> ScalarScale()(torch.ones(2)).tolist()
        [1.0, 1.0]
    """

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` times the scalar, in the dtype of ``x``."""
        return x * self.value.to(x.dtype)


class FixupBasicBlock(nn.Module):
    r"""A residual block of two convolutions without normaliser.

    .. math::
        y = \mathrm{relu}(s \, W_2 * (\mathrm{relu}(W_1 * (x + b_1) + b_2) + b_3) + b_4
            + \mathrm{shortcut})

    Args:
        conv1: The first convolution, without bias.
        conv2: The second one.
        shortcut: What takes ``x + b_1`` on the short path where the shape changes (a 1x1
            convolution without bias, or a subsampling with zero channels appended); None for the
            raw ``x``.

    Shape:
        Input ``(N, C, H, W)``; the output is as the convolutions make it.

    Raises:
        ValueError: A convolution has a bias.

    Example:
        >>> conv1, conv2 = (nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2))
        >>> block = FixupBasicBlock(conv1, conv2)
        >>> _ = nn.init.zeros_(conv2.weight)
        >>> x = torch.rand(1, 4, 5, 5)
        >>> torch.equal(block(x), x)
        True
    """

    def __init__(
        self, conv1: nn.Conv2d, conv2: nn.Conv2d, shortcut: nn.Module | None = None
    ) -> None:
        super().__init__()
        _check_no_bias("FixupBasicBlock", conv1, conv2)
        self.bias1 = ScalarBias()
        self.conv1 = conv1
        self.bias2 = ScalarBias()
        self.relu1 = nn.ReLU()
        self.bias3 = ScalarBias()
        self.conv2 = conv2
        self.scale = ScalarScale()
        self.bias4 = ScalarBias()
        self.relu2 = nn.ReLU()
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        start = self.bias1(x)
        out = self.relu1(self.bias2(self.conv1(start)))
        out = self.bias4(self.scale(self.conv2(self.bias3(out))))
        return self.relu2(out + (x if self.shortcut is None else self.shortcut(start)))


class FixupBottleneck(nn.Module):
    r"""A residual block of three convolutions without normaliser.

    .. math::
        u = \mathrm{relu}(W_1 * (x + b_1) + b_2), \;
        v = \mathrm{relu}(W_2 * (u + b_3) + b_4), \;
        y = \mathrm{relu}(s \, W_3 * (v + b_5) + b_6 + \mathrm{shortcut})

    Args:
        conv1: The first convolution, 1x1, without bias.
        conv2: The second one, 3x3, with the block's stride.
        conv3: The third one, 1x1.
        shortcut: As in `FixupBasicBlock`.

    Shape:
        Input ``(N, C, H, W)``; the output is as the convolutions make it.

    Raises:
        ValueError: A convolution has a bias.
    """

    def __init__(
        self,
        conv1: nn.Conv2d,
        conv2: nn.Conv2d,
        conv3: nn.Conv2d,
        shortcut: nn.Module | None = None,
    ) -> None:
        super().__init__()
        _check_no_bias("FixupBottleneck", conv1, conv2, conv3)
        self.bias1 = ScalarBias()
        self.conv1 = conv1
        self.bias2 = ScalarBias()
        self.relu1 = nn.ReLU()
        self.bias3 = ScalarBias()
        self.conv2 = conv2
        self.bias4 = ScalarBias()
        self.relu2 = nn.ReLU()
        self.bias5 = ScalarBias()
        self.conv3 = conv3
        self.scale = ScalarScale()
        self.bias6 = ScalarBias()
        self.relu3 = nn.ReLU()
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        start = self.bias1(x)
        out = self.relu1(self.bias2(self.conv1(start)))
        out = self.relu2(self.bias4(self.conv2(self.bias3(out))))
        out = self.bias6(self.scale(self.conv3(self.bias5(out))))
        return self.relu3(out + (x if self.shortcut is None else self.shortcut(start)))


class FixupClassifier(nn.Linear):
    """The readout: a scalar bias, then a linear layer that starts at zero.

    Args:
        in_features: The number of features.
        out_features: The number of classes.
        bias: Whether there is a bias for each class.

    Shape:
        Input ``(N, in_features)``, output ``(N, out_features)``.

    Example:
        >>> FixupClassifier(4, 2)(torch.ones(1, 4)).tolist()
        [[0.0, 0.0]]
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.before = ScalarBias()

    def reset_parameters(self) -> None:
        """Set weight and bias to zero."""
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Return the logits of features ``(N, in_features)``."""
        return super().forward(self.before(input))


def _check_no_bias(operation: str, *convolutions: nn.Conv2d) -> None:
    if any(convolution.bias is not None for convolution in convolutions):
        raise ValueError(
            f"{operation}(conv): expected convolutions without bias, got one with; give "
            "bias=False, because scalar biases take its place"
        )
