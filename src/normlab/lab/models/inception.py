"""Inception-v3: factorised convolutions in branches, at any width, with its auxiliary head.

A stem of six convolutions, three modules A, a reduction B, four modules C, a reduction D, two
modules E, global average pooling, dropout and one linear layer. At full width, with 1,000 classes
and images of 299x299, it has 23,834,568 parameters and takes 5,713,216,096 multiplications with
addition in its convolutions and linear layer (the paper says 4.8 billion); the auxiliary head has
3,326,696 parameters more.

Source: C. Szegedy, V. Vanhoucke, S. Ioffe, J. Shlens, Z. Wojna, Rethinking the Inception
Architecture for Computer Vision, 2015, arXiv:1512.00567.

Departs:
    - The default stem is that of the released weights, not of the paper's table: 1x1 to 80 and 3x3
      to 192 channels with pooling, in place of three 3x3 convolutions; ``stem="paper"`` has these.
    - The released number of modules: the paper's "5x" and "2x" are read as a reduction and four or
      two modules.
    - Average pooling counts the zeros around the image, as torchvision's does; TensorFlow's does
      not, and ``count_include_pad=False`` neither.
    - On maps above 17x17 the auxiliary head averages what positions remain.
    - Truncated normal weights end at two standard deviations; torchvision's end at 2.0, which is
      hardly ever, and its auxiliary 5x5 convolution misses the deviation 0.01 that it names.
    - The readouts' biases start at zero.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from normlab.lab.models.inception_modules import (
    MODULE_B,
    MODULE_D,
    MODULE_E,
    AuxiliaryHead,
    Branch,
    Mixed,
    Recipe,
    module_a,
    module_c,
)

STEMS = ("released", "paper")
ANSWERS = ("no", "yes")
SMALLEST = 75
SMALLEST_WITH_AUXILIARY = 299

# Name, width, kernel, stride, same padding; None is 3x3 max pooling in steps of 2.
_STEM_LAYERS: dict[str, tuple[tuple[str, tuple[int, int, int, bool] | None], ...]] = {
    "released": (
        ("Conv2d_1a_3x3", (32, 3, 2, False)),
        ("Conv2d_2a_3x3", (32, 3, 1, False)),
        ("Conv2d_2b_3x3", (64, 3, 1, True)),
        ("maxpool1", None),
        ("Conv2d_3b_1x1", (80, 1, 1, False)),
        ("Conv2d_4a_3x3", (192, 3, 1, False)),
        ("maxpool2", None),
    ),
    "paper": (
        ("Conv2d_1a_3x3", (32, 3, 2, False)),
        ("Conv2d_2a_3x3", (32, 3, 1, False)),
        ("Conv2d_2b_3x3", (64, 3, 1, True)),
        ("maxpool1", None),
        ("Conv2d_3b_3x3", (80, 3, 1, False)),
        ("Conv2d_4a_3x3", (192, 3, 2, False)),
        ("Conv2d_4b_3x3", (288, 3, 1, True)),
    ),
}

_UP_TO_AUXILIARY: tuple[tuple[str, tuple[Branch, ...]], ...] = (
    ("Mixed_5b", module_a(32)),
    ("Mixed_5c", module_a(64)),
    ("Mixed_5d", module_a(64)),
    ("Mixed_6a", MODULE_B),
    ("Mixed_6b", module_c(128)),
    ("Mixed_6c", module_c(160)),
    ("Mixed_6d", module_c(160)),
    ("Mixed_6e", module_c(192)),
)

_FROM_AUXILIARY: tuple[tuple[str, tuple[Branch, ...]], ...] = (
    ("Mixed_7a", MODULE_D),
    ("Mixed_7b", MODULE_E),
    ("Mixed_7c", MODULE_E),
)


class InceptionV3(nn.Module):
    """The network, with torchvision's names for its parts: its state dict loads.

    Args:
        num_classes: Number of logits, at least 1.
        in_channels: Channels of the images.
        width_percent: All widths in per cent of the paper's, at least 1, each rounded to the
            nearest multiple of 8 and at least 8.
        auxiliary: Whether there is an auxiliary head; then training gives logits and auxiliary
            logits, and images must have at least 299 pixels on each side in training.
        stem: ``"released"`` or ``"paper"``.
        dropout: The probability of dropping in front of the readout, at least 0 and at most 1;
            TensorFlow's release has 0.2.
        bn_eps: The epsilon of the norms, above 0.
        bn_momentum: The momentum of their running statistics, from 0 to 1; TensorFlow's release has
            0.0003.
        count_include_pad: Whether average pooling counts the zeros around the image.
        resize: The side to which images are resized bilinearly first, at least 75; 0 for none.
        transform_input: Whether images normalised by ImageNet's mean and deviation are turned into
            those normalised by 0.5 and 0.5, which the released weights need.

    Shape:
        Images ``(N, in_channels, H, W)`` with sides of at least 75, unless they are resized, to
        logits ``(N, num_classes)``; in training with an auxiliary head a pair of these.

    Raises:
        ValueError: A value out of its range.

    Example:
        >>> model = InceptionV3(10, width_percent=6).eval()
        >>> model(torch.zeros(1, 3, 75, 75)).shape
        torch.Size([1, 10])
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        width_percent: int = 100,
        auxiliary: bool = False,
        stem: str = "released",
        dropout: float = 0.5,
        bn_eps: float = 1e-3,
        bn_momentum: float = 0.1,
        count_include_pad: bool = True,
        resize: int = 0,
        transform_input: bool = False,
    ) -> None:
        super().__init__()
        _require(stem in STEMS, "stem", stem, " or ".join(STEMS))
        _require(width_percent >= 1, "width_percent", width_percent, "a number of at least 1")
        _require(num_classes >= 1, "num_classes", num_classes, "a number of at least 1")
        _require(0 <= dropout <= 1, "dropout", dropout, "a probability from 0 to 1")
        _require(0 < bn_eps < math.inf, "bn_eps", bn_eps, "a number above 0")
        _require(0 <= bn_momentum <= 1, "bn_momentum", bn_momentum, "a number from 0 to 1")
        least = SMALLEST_WITH_AUXILIARY if auxiliary else SMALLEST
        head = " with an auxiliary head" if auxiliary else ""
        _require(resize == 0 or resize >= least, "resize", resize, f"0 or at least {least}{head}")
        _require(
            not transform_input or in_channels == 3,
            "transform_input",
            transform_input,
            f"False for images of {in_channels} channels",
        )
        recipe = Recipe(width_percent, bn_eps, bn_momentum, count_include_pad)
        size = (resize, resize)
        self.resize = nn.Upsample(size=size, mode="bilinear") if resize else None
        self.transform_input = transform_input
        channels = in_channels
        for name, layer in _STEM_LAYERS[stem]:
            if layer is None:
                self.add_module(name, nn.MaxPool2d(3, 2))
                continue
            width, kernel, stride, same = layer
            self.add_module(name, recipe.unit(channels, width, kernel, stride, same=same))
            channels = recipe.channels(width)
        channels = self._add_modules(_UP_TO_AUXILIARY, channels, recipe)
        self.AuxLogits = AuxiliaryHead(channels, num_classes, recipe) if auxiliary else None
        channels = self._add_modules(_FROM_AUXILIARY, channels, recipe)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels, num_classes)
        self._lower = tuple(name for name, _ in (*_STEM_LAYERS[stem], *_UP_TO_AUXILIARY))
        self._upper = tuple(name for name, _ in _FROM_AUXILIARY)
        initialise_inception_(self)

    def _add_modules(
        self, table: tuple[tuple[str, tuple[Branch, ...]], ...], channels: int, recipe: Recipe
    ) -> int:
        for name, branches in table:
            module = Mixed(channels, branches, recipe)
            self.add_module(name, module)
            channels = module.out_channels
        return channels

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits, in training with an auxiliary head also the auxiliary logits.

        Raises:
            ValueError: Images below 75 pixels, or in training with an auxiliary head below 299.
        """
        if self.resize is not None:
            x = self.resize(x)
        auxiliary = self.AuxLogits if self.training else None
        least = SMALLEST if auxiliary is None else SMALLEST_WITH_AUXILIARY
        height, width = x.shape[-2:]
        if min(height, width) < least:
            advice = (
                "build it with resize=75"
                if auxiliary is None
                else "build it without auxiliary head, or with resize=299"
            )
            raise ValueError(
                f"InceptionV3(x): expected images of at least {least}x{least}"
                f"{'' if auxiliary is None else ' for the auxiliary head'}, got {height}x{width}; "
                f"{advice}"
            )
        if self.transform_input:
            x = _renormalise(x)
        for name in self._lower:
            x = getattr(self, name)(x)
        auxiliary_logits = None if auxiliary is None else auxiliary(x)
        for name in self._upper:
            x = getattr(self, name)(x)
        logits = self.fc(self.dropout(self.avgpool(x)).flatten(1))
        return logits if auxiliary_logits is None else (logits, auxiliary_logits)


def build(
    input_shape: tuple[int, ...],
    num_classes: int,
    width_percent: int = 100,
    resize: int = SMALLEST,
    auxiliary: str = "no",
    stem: str = "released",
    dropout_percent: int = 50,
) -> InceptionV3:
    """Build an Inception-v3 for the workbench; `InceptionV3` has further options.

    Small images are enlarged, because the network's reductions need 75 pixels: where a side is
    below ``resize``, images are resized bilinearly to ``resize`` on both sides, within the model.

    Args:
        input_shape: ``(C, H, W)``.
        num_classes: Number of logits.
        width_percent: All widths in per cent of the paper's, each rounded to the nearest multiple
            of 8 and at least 8.
        resize: The side to which smaller images are enlarged, at least 75, or 299 with the
            auxiliary head; 0 takes images as they are.
        auxiliary: ``yes`` for the auxiliary head, which takes images of 299 pixels; or ``no``.
        stem: ``released`` or ``paper``.
        dropout_percent: The probability of dropping in front of the readout, in per cent.

    Raises:
        ValueError: Inputs that are not images, images too small that are not resized, a value out
            of its range, or an unknown choice.

    Example:
        >>> model = build((1, 28, 28), 10, width_percent=12).eval()
        >>> model(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """
    if len(input_shape) != 3:
        raise ValueError(
            f"inception-v3(input_shape={tuple(input_shape)}): expected images (C, H, W), got "
            f"{len(input_shape)} dimensions; use the model mlp"
        )
    _require(auxiliary in ANSWERS, "auxiliary", auxiliary, " or ".join(ANSWERS))
    _require(
        0 <= dropout_percent <= 100, "dropout_percent", dropout_percent, "a number from 0 to 100"
    )
    in_channels, *sides = input_shape
    needed = SMALLEST_WITH_AUXILIARY if auxiliary == "yes" else SMALLEST
    resized = resize if min(sides) < resize else 0
    if not resized and min(sides) < needed:
        raise ValueError(
            f"inception-v3(input_shape={tuple(input_shape)}, resize={resize}, "
            f"auxiliary={auxiliary!r}): expected images of at least {needed}x{needed}, got "
            f"{sides[0]}x{sides[1]}; use resize={needed}"
        )
    return InceptionV3(
        num_classes,
        in_channels,
        width_percent=width_percent,
        auxiliary=auxiliary == "yes",
        stem=stem,
        dropout=dropout_percent / 100,
        resize=resized,
    )


@torch.no_grad()
def initialise_inception_(model: InceptionV3) -> None:
    """Initialise in place: truncated normal weights, biases zero, norms the identity.

    The standard deviation before truncation at twice its size is 0.1, in the auxiliary head 0.01
    for the 5x5 convolution and 0.001 for the readout.

    Args:
        model: The network.
    """
    special: dict[nn.Module, float] = {}
    if model.AuxLogits is not None:
        special = {model.AuxLogits.conv1.get_submodule("conv"): 0.01, model.AuxLogits.fc: 0.001}
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            std = special.get(module, 0.1)
            nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def _renormalise(x: Tensor) -> Tensor:
    """Turn images normalised by ImageNet's statistics into those normalised by 0.5 and 0.5."""
    mean = x.new_tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
    std = x.new_tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
    return (x * std + mean - 0.5) / 0.5


def _require(valid: bool, name: str, value: object, expected: str) -> None:
    if not valid:
        raise ValueError(
            f"inception-v3({name}={value!r}): expected {expected}, got {value!r}; change {name}"
        )
