"""The two convolutional networks of the exponential linear unit: 11 and 18 layers, no shortcuts.

Stacks of convolutions, each followed by an ELU, with 2x2 max pooling after the first five, so that
images of 32 pixels end as one; the last convolution gives the class scores. Both are written
without normalisers, which is what they are for; ``norm="batch-norm"`` gives the variant to compare
with.

Source: D.-A. Clevert, T. Unterthiner, S. Hochreiter, "Fast and Accurate Deep Network Learning by
Exponential Linear Units (ELUs)", 2015, arXiv 1511.07289.

Departs:
    - 2x2 convolutions keep the size by a zero on the right and below; the paper's padding is not
      known.
    - The class scores have no ELU behind them.
    - Images smaller than 32 pixels, such as MNIST's 28, are padded with zeros to 32 on all sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from normlab.lab.models.initialise import initialise_

SIDE = 32
POOLED_STACKS = 5

Layout = tuple[tuple[tuple[int, int], ...], ...]

# (units, kernel) of each convolution by stack; units 0 stand for the number of classes.
LAYERS_11: Layout = (
    ((192, 5),),
    ((192, 1), (240, 3)),
    ((240, 1), (260, 2)),
    ((260, 1), (280, 2)),
    ((280, 1), (300, 2)),
    ((300, 1),),
    ((0, 1),),
)
LAYERS_18: Layout = (
    ((384, 3),),
    ((384, 1), (384, 2), (640, 2), (640, 2)),
    ((640, 1), (768, 2), (768, 2), (768, 2)),
    ((768, 1), (896, 2), (896, 2)),
    ((896, 3), (1024, 2), (1024, 2)),
    ((1024, 1), (1152, 2)),
    ((1152, 1),),
    ((0, 1),),
)
RATES_11 = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.0)
RATES_18 = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.0)


class ELUNet(nn.Module):
    """Stacks of convolutions that end in one pixel of class scores.

    Args:
        input_shape: ``(C, H, W)`` with sides of at most 32, which all images must have.
        stacks: One sequence a stack, of which the first five halve the size.

    Attributes:
        stacks: One sequence a stack; every convolution but the last is followed by an activation
            and a dropout, whose rate is zero unless `set_dropout_` says otherwise.
    """

    def __init__(self, input_shape: tuple[int, ...], stacks: list[nn.Sequential]) -> None:
        super().__init__()
        self.sides = tuple(input_shape[1:])
        high, wide = (SIDE - side for side in self.sides)
        self.pad = nn.ZeroPad2d((wide // 2, wide - wide // 2, high // 2, high - high // 2))
        self.stacks = nn.Sequential(*stacks)
        self.flatten = nn.Flatten()

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(N, classes)`` of images ``(N, C, H, W)``.

        Raises:
            ValueError: Images of other sides than the network was built for.
        """
        if tuple(x.shape[-2:]) != self.sides:
            expected, got = ("x".join(map(str, sides)) for sides in (self.sides, x.shape[-2:]))
            raise ValueError(
                f"ELUNet(x): expected images of {expected}, got {got}; build it for their size"
            )
        return self.flatten(self.stacks(self.pad(x)))


@dataclass(frozen=True)
class DropoutStage:
    """A stretch of training with its own dropout.

    Attributes:
        iterations: How many steps it takes.
        rates: The probability of dropping, by stack.
        scope: ``"last"`` puts it at the end of a stack, ``"all"`` behind each of its layers.
    """

    iterations: int
    rates: tuple[float, ...]
    scope: Literal["last", "all"]


FINE_TUNING_18 = (
    DropoutStage(50_000, RATES_18, "all"),
    DropoutStage(40_000, tuple(round(1.5 * rate, 4) for rate in RATES_18), "all"),
)
"""How the network of 18 layers is fine-tuned after training without dropout."""


def stage_at(step: int, stages: Sequence[DropoutStage] = FINE_TUNING_18) -> DropoutStage:
    """Return the stage that a step of fine-tuning belongs to; the last one goes on.

    Args:
        step: The step, from 0.
        stages: The stages in order.

    Example:
        >>> [stage_at(step).rates[5] for step in (0, 49_999, 50_000, 10**6)]
        [0.5, 0.5, 0.75, 0.75]
    """
    for stage in stages[:-1]:
        if step < stage.iterations:
            return stage
        step -= stage.iterations
    return stages[-1]


def set_dropout_(model: ELUNet, rates: Sequence[float], scope: str = "last") -> None:
    """Set the rates of dropout in place; weights and their names stay.

    Args:
        model: The network.
        rates: The probability of dropping, by stack, each at least 0 and below 1.
        scope: ``"last"`` or ``"all"``, as in `DropoutStage`.

    Raises:
        ValueError: Another number of rates, one out of its range, a rate for the class scores, or
            an unknown scope.
    """
    if scope not in ("last", "all"):
        raise ValueError(
            f"set_dropout_(scope={scope!r}): expected 'last' or 'all', got {scope!r}; use 'last'"
        )
    dropouts = [
        [layer for layer in stack.modules() if isinstance(layer, nn.Dropout)]
        for stack in model.stacks
    ]
    wrong = len(rates) != len(dropouts) or not all(0 <= rate < 1 for rate in rates)
    if wrong or rates[-1] != 0:
        raise ValueError(
            f"set_dropout_(rates={tuple(rates)}): expected {len(dropouts)} rates of at least 0 and "
            f"below 1, the last one 0, got {tuple(rates)}; give one for each stack"
        )
    for rate, layers in zip(rates, dropouts, strict=True):
        for layer in layers:
            layer.p = float(rate) if scope == "all" or layer is layers[-1] else 0.0


def build_11(
    input_shape: tuple[int, ...],
    num_classes: int,
    width_percent: int = 100,
    norm: str = "none",
    dropout: str = "0-10-20-30-40-50-0",
    order: str = "dropout-pool",
) -> ELUNet:
    """Build the network of 11 layers, the one for the class scores included.

    Args:
        input_shape: ``(C, H, W)`` with sides of at most 32.
        num_classes: Number of logits, at least 1.
        width_percent: Units of each hidden layer, in percent of the paper's; at least 1.
        norm: ``none``, or ``batch-norm`` between each hidden convolution and its ELU.
        dropout: Percent dropped at the end of each stack.
        order: ``dropout-pool`` or ``pool-dropout``: what comes first behind a stack.

    Raises:
        ValueError: Inputs that are not images or too large, or an option out of its range.

    Example:
        >>> model = build_11((3, 32, 32), 100)
        >>> sum(parameter.numel() for parameter in model.parameters())
        1669028
    """
    options = (width_percent, norm, dropout, order)
    return _build("elu-net-11", LAYERS_11, input_shape, num_classes, *options)


def build_18(
    input_shape: tuple[int, ...],
    num_classes: int,
    width_percent: int = 100,
    norm: str = "none",
    dropout: str = "0-0-0-0-0-0-0-0",
    order: str = "dropout-pool",
) -> ELUNet:
    """Build the network of 18 hidden layers and one for the class scores.

    It is trained without dropout first and fine-tuned with it: see `FINE_TUNING_18` and
    `set_dropout_`.

    Args:
        input_shape: ``(C, H, W)`` with sides of at most 32.
        num_classes: Number of logits, at least 1.
        width_percent: As for `build_11`.
        norm: As for `build_11`.
        dropout: As for `build_11`.
        order: As for `build_11`.

    Raises:
        ValueError: As for `build_11`.
    """
    options = (width_percent, norm, dropout, order)
    return _build("elu-net-18", LAYERS_18, input_shape, num_classes, *options)


def _build(
    name: str,
    layout: Layout,
    input_shape: tuple[int, ...],
    num_classes: int,
    width_percent: int,
    norm: str,
    dropout: str,
    order: str,
) -> ELUNet:
    if len(input_shape) != 3 or max(input_shape[1:]) > SIDE:
        raise ValueError(
            f"{name}(input_shape={tuple(input_shape)}): expected images (C, H, W) of at most "
            f"{SIDE} pixels a side, got {tuple(input_shape)}; scale them down, or use plain-conv"
        )
    for option, number, advice in (
        ("num_classes", num_classes, "give the number of classes"),
        ("width_percent", width_percent, "use 100 for the paper's width"),
    ):
        if number < 1:
            raise ValueError(
                f"{name}({option}={number}): expected at least 1, got {number}; {advice}"
            )
    for option, value, known in (
        ("norm", norm, ("none", "batch-norm")),
        ("order", order, ("dropout-pool", "pool-dropout")),
    ):
        if value not in known:
            raise ValueError(
                f"{name}({option}={value!r}): expected {' or '.join(known)}, got {value!r}; "
                f"use {known[0]}"
            )
    channels = input_shape[0]
    stacks = []
    for index, stack in enumerate(layout):
        layers: list[nn.Module] = []
        for units, kernel in stack:
            out = max(1, round(units * width_percent / 100)) if units else num_classes
            normed = bool(units) and norm == "batch-norm"
            # "same" pads even kernels on the right and below, as ruled.
            layers.append(nn.Conv2d(channels, out, kernel, padding="same", bias=not normed))
            channels = out
            if units:
                layers += [nn.BatchNorm2d(out)] * normed
                layers += [nn.ELU(), nn.Dropout(0.0)]
        if index < POOLED_STACKS:
            # In front of the stack's last dropout, or behind it.
            layers.insert(len(layers) - (order == "pool-dropout"), nn.MaxPool2d(2))
        stacks.append(nn.Sequential(*layers))
    model = ELUNet(input_shape, stacks)
    initialise_(model)
    scores = [module for module in model.modules() if isinstance(module, nn.Conv2d)][-1]
    nn.init.kaiming_normal_(scores.weight, nonlinearity="linear")
    set_dropout_(model, _rates(name, dropout, len(layout)))
    return model


def _rates(name: str, dropout: str, stacks: int) -> list[float]:
    percent = dropout.split("-")
    if len(percent) != stacks or not all(part.isdecimal() for part in percent):
        raise ValueError(
            f"{name}(dropout={dropout!r}): expected {stacks} whole percentages joined by hyphens, "
            f"got {dropout!r}; use {'-'.join(['0'] * stacks)} for none"
        )
    return [int(part) / 100 for part in percent]
