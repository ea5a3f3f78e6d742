"""The residual network for small images, any depth and width.

A 3x3 convolution, three stages of n residual blocks with 1, 2 and 4 times the width, halving the
size between stages, global average pooling and one linear layer. A basic block has two 3x3
convolutions, so the depth is 6n + 2; a bottleneck has 1x1, 3x3, 1x1 with four times the channels
out, so it is 9n + 2.

Source: K. He, X. Zhang, S. Ren, J. Sun, Deep Residual Learning for Image Recognition, 2015,
arXiv:1512.03385, section 4.2. ResNet-20, 32, 44, 56 and 110 have 0.27, 0.46, 0.66, 0.85 and 1.7
million parameters.

Departs: the bottleneck, which the paper uses for ImageNet only, halves the size in its 3x3
convolution instead of the first 1x1, as most public code does, so that no pixel is skipped.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from normlab.lab.models.initialise import initialise_

BLOCKS = ("basic", "bottleneck")
SHORTCUTS = ("zero-pad", "average-pool", "projection")


class ZeroPadShortcut(nn.Module):
    """The paper's option A: every ``stride``-th pixel, with zero channels appended; no parameters.

    Args:
        stride: Step between the pixels kept.
        new_channels: Number of zero channels to append.
    """

    def __init__(self, stride: int, new_channels: int) -> None:
        super().__init__()
        self.new_channels = new_channels
        self.subsample = nn.AvgPool2d(kernel_size=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(N, C + new_channels, H / stride, W / stride)``, sizes rounded up."""
        return F.pad(self.subsample(x), (0, 0, 0, 0, 0, self.new_channels))


class AveragePoolShortcut(nn.Module):
    """Stochastic depth's option A: averages over the stride, with zero channels appended.

    The last window of an odd size averages the pixels it has, so that the size is that of a 3x3
    convolution in the same steps.

    Args:
        stride: Step between the windows, and their side.
        new_channels: Number of zero channels to append.

    Source: G. Huang, Y. Sun, Z. Liu, D. Sedra, K. Weinberger, Deep Networks with Stochastic Depth,
    2016, arXiv:1603.09382.
    """

    def __init__(self, stride: int, new_channels: int) -> None:
        super().__init__()
        self.new_channels = new_channels
        self.pool = nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(N, C + new_channels, H / stride, W / stride)``, sizes rounded up."""
        return F.pad(self.pool(x), (0, 0, 0, 0, 0, self.new_channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut; ``relu2`` follows the addition.

    Args:
        in_channels: Channels coming in.
        channels: Channels of both convolutions.
        stride: Stride of the first convolution.
        shortcut: One of ``SHORTCUTS``, used only where the shape changes.
    """

    expansion = 1
    layers = 2

    def __init__(self, in_channels: int, channels: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, channels, kernel_size=3, stride=stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = _conv(channels, channels, kernel_size=3)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = _downsample(in_channels, channels, stride, shortcut)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu2(out + identity)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around a shortcut; ``relu3`` follows the addition.

    Args:
        in_channels: Channels coming in.
        channels: Channels of the first two convolutions; four times as many go out.
        stride: Stride of the 3x3 convolution.
        shortcut: One of ``SHORTCUTS``, used only where the shape changes.
    """

    expansion = 4
    layers = 3

    def __init__(self, in_channels: int, channels: int, stride: int, shortcut: str) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = _conv(in_channels, channels, kernel_size=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = _conv(channels, channels, kernel_size=3, stride=stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.conv3 = _conv(channels, out_channels, kernel_size=1)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = _downsample(in_channels, out_channels, stride, shortcut)
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu3(out + identity)


class ResNet(nn.Module):
    """The network, with torchvision's names for its parts.

    Args:
        block: ``BasicBlock`` or ``Bottleneck``.
        blocks_per_stage: n, at least 1.
        in_channels: Channels of the images.
        num_classes: Number of logits.
        width: Channels of the first convolution.
        shortcut: One of ``SHORTCUTS``.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks_per_stage: int,
        in_channels: int,
        num_classes: int,
        width: int,
        shortcut: str,
    ) -> None:
        super().__init__()
        out = width * block.expansion
        self.conv1 = _conv(in_channels, width, kernel_size=3)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.layer1 = _stage(block, blocks_per_stage, width, width, 1, shortcut)
        self.layer2 = _stage(block, blocks_per_stage, out, 2 * width, 2, shortcut)
        self.layer3 = _stage(block, blocks_per_stage, 2 * out, 4 * width, 2, shortcut)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4 * out, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(N, num_classes)`` of images ``(N, C, H, W)``."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.avgpool(x).flatten(1))


def build(
    input_shape: tuple[int, ...],
    num_classes: int,
    depth: int = 20,
    width: int = 16,
    block: str = "basic",
    shortcut: str = "zero-pad",
) -> ResNet:
    """Build a residual network.

    Args:
        input_shape: ``(C, H, W)``.
        num_classes: Number of logits.
        depth: Weight layers: 6n + 2 with basic blocks, 9n + 2 with bottlenecks.
        width: Channels of the first stage.
        block: ``basic`` or ``bottleneck``.
        shortcut: ``zero-pad`` (the paper's option A), ``average-pool`` (stochastic depth's) or
            ``projection`` (1x1 convolution and norm).

    Raises:
        ValueError: A depth that no n gives, an unknown choice, or inputs that are not images.

    Example:
        >>> model = build((3, 32, 32), 10, depth=20)
        >>> sum(parameter.numel() for parameter in model.parameters())
        269722
    """
    if len(input_shape) != 3:
        raise ValueError(
            f"resnet(input_shape={tuple(input_shape)}): expected images (C, H, W), got "
            f"{len(input_shape)} dimensions; use the model mlp"
        )
    for option, value, known in (("block", block, BLOCKS), ("shortcut", shortcut, SHORTCUTS)):
        if value not in known:
            raise ValueError(
                f"resnet({option}={value!r}): expected {', '.join(known[:-1])} or {known[-1]}, "
                f"got {value!r}; choose one of these"
            )
    if width < 1:
        raise ValueError(f"resnet(width={width}): expected at least 1, got {width}; try 16")
    block_class = BasicBlock if block == "basic" else Bottleneck
    model = ResNet(
        block_class,
        _blocks_per_stage(depth, block_class),
        input_shape[0],
        num_classes,
        width,
        shortcut,
    )
    initialise_(model)
    return model


def _blocks_per_stage(depth: int, block: type[BasicBlock] | type[Bottleneck]) -> int:
    period = 3 * block.layers
    blocks, rest = divmod(depth - 2, period)
    if blocks >= 1 and rest == 0:
        return blocks
    lower = max(1, blocks) * period + 2
    nearest = f"{lower}" if blocks < 1 else f"{lower} and {lower + period}"
    raise ValueError(
        f"resnet(depth={depth}): expected {period}n + 2 with {block.layers} layers in a block, got "
        f"{depth}; the nearest possible depths: {nearest}"
    )


def _stage(
    block: type[BasicBlock] | type[Bottleneck],
    blocks: int,
    in_channels: int,
    channels: int,
    stride: int,
    shortcut: str,
) -> nn.Sequential:
    out_channels = channels * block.expansion
    first = block(in_channels, channels, stride, shortcut)
    return nn.Sequential(
        first, *(block(out_channels, channels, 1, shortcut) for _ in range(blocks - 1))
    )


def _conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(
        in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False
    )


def _downsample(
    in_channels: int, out_channels: int, stride: int, shortcut: str
) -> nn.Module | None:
    if stride == 1 and in_channels == out_channels:
        return None
    if shortcut == "zero-pad":
        return ZeroPadShortcut(stride, out_channels - in_channels)
    if shortcut == "average-pool":
        return AveragePoolShortcut(stride, out_channels - in_channels)
    return nn.Sequential(
        _conv(in_channels, out_channels, kernel_size=1, stride=stride),
        nn.BatchNorm2d(out_channels),
    )
