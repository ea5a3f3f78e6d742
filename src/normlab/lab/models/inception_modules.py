"""The parts of Inception-v3: a unit, modules written as tables of branches, the auxiliary head.

Branches are joined in the order of their table. A convolution of stride 1 keeps the size ("same"
padding), one of stride 2 has no padding. Names are torchvision's, so that its weights load.

Source: C. Szegedy, V. Vanhoucke, S. Ioffe, J. Shlens, Z. Wojna, Rethinking the Inception
Architecture for Computer Vision, 2015, arXiv:1512.00567.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

MULTIPLE = 8
"""Scaled widths are multiples of this, as all widths of the paper are, and at least this."""

SMALLEST_AUXILIARY = 17
"""The smallest map that the auxiliary head takes: 5x5 pooling in steps of 3 leaves 5x5 of it."""


@dataclass(frozen=True)
class Step:
    """One convolution of a branch, with its norm and activation.

    Attributes:
        name: The name of the unit.
        width: Its output channels, before scaling.
        kernel: The kernel's height and width, or one number for both.
        stride: 1, which keeps the size, or 2.
    """

    name: str
    width: int
    kernel: int | tuple[int, int]
    stride: int = 1


@dataclass(frozen=True)
class Pool:
    """A 3x3 pooling: the average in steps of 1, which keeps the size, or the maximum of 2."""

    kind: str


AVERAGE, MAXIMUM = Pool("average"), Pool("maximum")

Fork = tuple[Step, ...]
"""Convolutions side by side at the end of a branch."""

Branch = tuple[Step | Pool | Fork, ...]


@dataclass(frozen=True)
class Recipe:
    """What all parts of one network share.

    Attributes:
        width_percent: All widths are scaled by so many per cent; see `channels`.
        bn_eps: The epsilon of the norms.
        bn_momentum: The momentum of their running statistics, in torch's sense.
        count_include_pad: Whether average pooling counts the zeros around the image.
    """

    width_percent: int = 100
    bn_eps: float = 1e-3
    bn_momentum: float = 0.1
    count_include_pad: bool = True

    def channels(self, width: int) -> int:
        """Return a scaled width: the nearest multiple of 8 (half of it up), at least 8.

        Example:
            >>> [Recipe(width_percent=12).channels(width) for width in (32, 192, 448)]
            [8, 24, 56]
        """
        whole = 100 * MULTIPLE
        return max(1, (2 * width * self.width_percent + whole) // (2 * whole)) * MULTIPLE

    def unit(
        self,
        in_channels: int,
        width: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        *,
        same: bool = False,
    ) -> nn.Sequential:
        """Return convolution without bias, batch norm, ReLU.

        Args:
            in_channels: Channels coming in.
            width: Output channels, before scaling.
            kernel: The kernel's height and width, or one number for both.
            stride: The convolution's stride.
            same: Whether padding keeps the size; otherwise there is none.
        """
        size = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (size[0] // 2, size[1] // 2) if same else (0, 0)
        channels = self.channels(width)
        return nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(in_channels, channels, size, stride, padding, bias=False),
                bn=nn.BatchNorm2d(channels, eps=self.bn_eps, momentum=self.bn_momentum),
                relu=nn.ReLU(),
            )
        )


def module_a(pool_width: int) -> tuple[Branch, ...]:
    """Return the branches of A, of width 224 + ``pool_width``; the paper's two 3x3 for a 5x5."""
    return (
        (Step("branch1x1", 64, 1),),
        (Step("branch5x5_1", 48, 1), Step("branch5x5_2", 64, 5)),
        (
            Step("branch3x3dbl_1", 64, 1),
            Step("branch3x3dbl_2", 96, 3),
            Step("branch3x3dbl_3", 96, 3),
        ),
        (AVERAGE, Step("branch_pool", pool_width, 1)),
    )


MODULE_B: tuple[Branch, ...] = (
    (Step("branch3x3", 384, 3, 2),),
    (
        Step("branch3x3dbl_1", 64, 1),
        Step("branch3x3dbl_2", 96, 3),
        Step("branch3x3dbl_3", 96, 3, 2),
    ),
    (MAXIMUM,),
)
"""Halves the size; adds 480 channels to those that come in."""


def module_c(width: int) -> tuple[Branch, ...]:
    """Return the branches of C, 768 wide: 7x7 kernels as 1x7 and 7x1, ``width`` within."""
    return (
        (Step("branch1x1", 192, 1),),
        (
            Step("branch7x7_1", width, 1),
            Step("branch7x7_2", width, (1, 7)),
            Step("branch7x7_3", 192, (7, 1)),
        ),
        (
            Step("branch7x7dbl_1", width, 1),
            Step("branch7x7dbl_2", width, (7, 1)),
            Step("branch7x7dbl_3", width, (1, 7)),
            Step("branch7x7dbl_4", width, (7, 1)),
            Step("branch7x7dbl_5", 192, (1, 7)),
        ),
        (AVERAGE, Step("branch_pool", 192, 1)),
    )


MODULE_D: tuple[Branch, ...] = (
    (Step("branch3x3_1", 192, 1), Step("branch3x3_2", 320, 3, 2)),
    (
        Step("branch7x7x3_1", 192, 1),
        Step("branch7x7x3_2", 192, (1, 7)),
        Step("branch7x7x3_3", 192, (7, 1)),
        Step("branch7x7x3_4", 192, 3, 2),
    ),
    (MAXIMUM,),
)
"""Halves the size; adds 512 channels to those that come in."""

MODULE_E: tuple[Branch, ...] = (
    (Step("branch1x1", 320, 1),),
    (
        Step("branch3x3_1", 384, 1),
        (Step("branch3x3_2a", 384, (1, 3)), Step("branch3x3_2b", 384, (3, 1))),
    ),
    (
        Step("branch3x3dbl_1", 448, 1),
        Step("branch3x3dbl_2", 384, 3),
        (Step("branch3x3dbl_3a", 384, (1, 3)), Step("branch3x3dbl_3b", 384, (3, 1))),
    ),
    (AVERAGE, Step("branch_pool", 192, 1)),
)
"""2048 wide; two of its branches end in 1x3 and 3x1 side by side."""


class Mixed(nn.Module):
    """A module: branches side by side, their outputs joined along the channels.

    Args:
        in_channels: Channels coming in.
        branches: The table.
        recipe: Widths, norms and pooling.

    Attributes:
        out_channels: Channels going out.
    """

    def __init__(self, in_channels: int, branches: tuple[Branch, ...], recipe: Recipe) -> None:
        super().__init__()
        self.out_channels = 0
        ways = []
        for branch in branches:
            *chain, last = branch
            channels, names = in_channels, []
            for part in chain:
                assert not isinstance(part, tuple), "a fork stands at the end of its branch"
                channels = self._add(part, channels, recipe)
                names.append(_name(part))
            ends = last if isinstance(last, tuple) else (last,)
            self.out_channels += sum(self._add(end, channels, recipe) for end in ends)
            ways.append((tuple(names), tuple(_name(end) for end in ends)))
        self._ways = tuple(ways)

    def _add(self, part: Step | Pool, in_channels: int, recipe: Recipe) -> int:
        if isinstance(part, Step):
            same = part.stride == 1
            unit = recipe.unit(in_channels, part.width, part.kernel, part.stride, same=same)
            self.add_module(part.name, unit)
            return recipe.channels(part.width)
        pool = (
            nn.AvgPool2d(3, 1, padding=1, count_include_pad=recipe.count_include_pad)
            if part is AVERAGE
            else nn.MaxPool2d(3, 2)
        )
        self.add_module(_name(part), pool)
        return in_channels

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(N, out_channels, H', W')`` of maps ``(N, in_channels, H, W)``."""
        outputs = []
        for chain, ends in self._ways:
            y = x
            for name in chain:
                y = getattr(self, name)(y)
            outputs += [getattr(self, name)(y) for name in ends]
        return torch.cat(outputs, dim=1)


def _name(part: Step | Pool) -> str:
    return part.name if isinstance(part, Step) else "pool"


class AuxiliaryHead(nn.Module):
    """A second classifier on the middle of the network, with norms, for training alone.

    Average pooling 5x5 in steps of 3, a 1x1 and a 5x5 convolution, the average of what positions
    remain (one on 17x17 maps), a linear layer.

    Args:
        in_channels: Channels coming in.
        num_classes: Number of logits.
        recipe: Widths and norms.
    """

    def __init__(self, in_channels: int, num_classes: int, recipe: Recipe) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(5, 3)
        self.conv0 = recipe.unit(in_channels, 128, 1)
        self.conv1 = recipe.unit(recipe.channels(128), 768, 5)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(recipe.channels(768), num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(N, num_classes)`` of maps of at least 17x17.

        Raises:
            ValueError: Smaller maps.
        """
        height, width = x.shape[-2:]
        if min(height, width) < SMALLEST_AUXILIARY:
            raise ValueError(
                f"auxiliary_head(x): expected maps of at least {SMALLEST_AUXILIARY}x"
                f"{SMALLEST_AUXILIARY}, which images of 299x299 give, got {height}x{width}; train "
                f"on larger images or build the network without auxiliary head"
            )
        x = self.conv1(self.conv0(self.pool(x)))
        return self.fc(self.avgpool(x).flatten(1))
