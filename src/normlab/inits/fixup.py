r"""Fixup: an initialisation with which residual networks train without normalisation at any depth.

One step of gradient descent changes the function of the network by the order of the learning rate,
whatever its depth. Three rules, for L residual branches of which one has m weight layers:

1. the last weight layer of every branch and the readout start at zero;
2. the other layers start by a standard rule (He), times :math:`L^{-1/(2m-2)}` inside a branch;
3. every branch has one scalar multiplier, and one scalar bias in front of every convolution, linear
   layer and activation; convolutions have no bias of their own.

Source: H. Zhang, Y. N. Dauphin, T. Ma, "Fixup Initialization: Residual Learning Without
Normalization", 2019, arXiv 1901.09321.

Departs:
    - The stem starts by He's rule like the other layers; the authors' public code leaves it at the
      framework's default (option ``stem_init="default"``).
    - The scalars' learning rate is a tenth of the rate of the other parameters, also where that one
      was scaled with the batch size; the public code takes a tenth of the unscaled one (option
      ``scalar_lr`` sets a rate of its own). The readout's bias belongs to them, as there.
    - A branch with one weight layer, for which the exponent is not defined, starts at zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from normlab.inits.fixup_blocks import (
    FixupBasicBlock,
    FixupBottleneck,
    FixupClassifier,
    ScalarBias,
    ScalarScale,
)
from normlab.method import Card, Group, Method, Setting, Source, Unsuitable, split_groups
from normlab.surgery.residual import ResidualBlock, ResidualNetwork, find_residual_network
from normlab.surgery.swap import swap


class Branch(NamedTuple):
    """A residual branch: its name and its weight layers in order.

    Attributes:
        name: For messages.
        layers: Modules with a ``weight``, such as nn.Conv2d and nn.Linear; those of the short path
            are not among them.
    """

    name: str
    layers: Sequence[nn.Module]


def branch_factor(num_branches: int, num_layers: int) -> float:
    r"""Return :math:`L^{-1/(2m-2)}`, by which the weights of a branch are multiplied.

    Args:
        num_branches: The number L of residual branches in the whole network, at least 1.
        num_layers: The number m of weight layers in this branch, at least 1.

    Returns:
        The factor; 1 for m = 1, where the only layer starts at zero.

    Example:
        >>> [round(branch_factor(16, m), 4) for m in (1, 2, 3)]
        [1.0, 0.25, 0.5]
    """
    return 1.0 if num_layers == 1 else num_branches ** (-1 / (2 * num_layers - 2))


def find_branches(
    model: nn.Module, layers_of: Callable[[nn.Module], Sequence[nn.Module] | None]
) -> list[Branch]:
    """Return the residual branches of a model.

    Args:
        model: Any model.
        layers_of: Returns the weight layers of the branch in order where the module it is given is
            a residual block, otherwise None.

    Returns:
        One `Branch` for each block.

    Example:
        >>> block = FixupBasicBlock(*(nn.Conv2d(4, 4, 3, bias=False) for _ in range(2)))
        >>> is_block = lambda m: (m.conv1, m.conv2) if isinstance(m, FixupBasicBlock) else None
        >>> [branch.name for branch in find_branches(nn.Sequential(block), is_block)]
        ['0']
    """
    found = ((name, layers_of(module)) for name, module in model.named_modules())
    return [Branch(name, layers) for name, layers in found if layers]


def fixup_(
    branches: Sequence[Branch],
    *,
    outside: Iterable[nn.Module] = (),
    head: nn.Module | None = None,
    num_branches: int | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """Initialise the weight layers of a residual network in place, by rules 1 and 2.

    Args:
        branches: The residual branches.
        outside: Layers outside the branches (stem, projections), which start by He's rule.
        head: The readout, which starts at zero.
        num_branches: The number L of branches in the whole network, where ``branches`` are only
            some of them.
        generator: For the draws, on the CPU; torch's own by default.

    Raises:
        ValueError: There is no branch, or one without layers.
    """
    empty = [branch.name for branch in branches if not branch.layers]
    if not branches or empty:
        raise ValueError(
            "fixup_(branches): expected at least one branch with a weight layer, got "
            f"{empty[0] + ' without' if empty else 'none'}; name the weight layers of each "
            "residual branch"
        )
    total = len(branches) if num_branches is None else num_branches
    for layer in outside:
        he_normal_(layer, generator=generator)
    for branch in branches:
        factor = branch_factor(total, len(branch.layers))
        for layer in branch.layers[:-1]:
            he_normal_(layer, factor, generator=generator)
        _zero_(branch.layers[-1])
    if head is not None:
        _zero_(head)


def he_normal_(
    layer: nn.Module, factor: float = 1.0, *, generator: torch.Generator | None = None
) -> None:
    r"""Draw a layer's weight with standard deviation :math:`f \sqrt{2 / (C_{out} k_h k_w)}`.

    Args:
        layer: A convolution or linear layer; its bias, if it has one, becomes zero.
        factor: The factor f.
        generator: As in `fixup_`.
    """
    assert isinstance(layer.weight, Tensor)
    shape = layer.weight.shape
    deviation = factor * math.sqrt(2 / (shape[0] * math.prod(shape[2:])))
    draws = torch.randn(shape, generator=generator)
    _zero_(layer)
    with torch.no_grad():
        layer.weight.copy_(deviation * draws)


def scalars_of(model: nn.Module) -> list[nn.Parameter]:
    """Return scalar biases, scalar multipliers and the readout's bias, found by type of module."""
    found = []
    for module in model.modules():
        if isinstance(module, (ScalarBias, ScalarScale)):
            found.append(module.value)
        elif isinstance(module, FixupClassifier) and module.bias is not None:
            found.append(module.bias)
    return found


def parameter_groups(
    groups: list[Group],
    model: nn.Module,
    setting: Setting,
    *,
    scalar_lr_factor: float = 0.1,
    scalar_lr: float | None = None,
    decay_scalars: bool = True,
) -> list[Group]:
    """Give the scalars and the readout's bias a smaller learning rate.

    Args:
        groups: Parameter groups; one without ``lr`` has the setting's.
        model: A prepared model.
        setting: The training's.
        scalar_lr_factor: The scalars' rate as a share of the rate of their group.
        scalar_lr: The scalars' rate itself, instead of a share; None for the share.
        decay_scalars: Whether weight decay applies to them, as in the public code.

    Returns:
        The groups, with those of the scalars split off.
    """
    changes = {} if decay_scalars else {"weight_decay": 0.0}
    rate = (lambda lr: scalar_lr_factor * lr) if scalar_lr is None else scalar_lr
    rated = [{"lr": setting.lr, **group} for group in groups]
    return split_groups(rated, scalars_of(model), lr=rate, **changes)


def prepare(model: nn.Module, setting: Setting, *, stem_init: str = "he") -> nn.Module:
    """Take the normalisers out of a ResNet, put the scalars in and initialise it.

    Args:
        model: A ResNet in the manner of torchvision; changed in place.
        setting: The first batch serves to see what the model computes.
        stem_init: ``"he"``, or ``"default"`` for torch's own.

    Returns:
        The model.

    Raises:
        Unsuitable: The model has no residual blocks, or blocks of another kind.
        ValueError: ``stem_init`` has no such value.
    """
    if stem_init not in ("he", "default"):
        raise ValueError(
            f"fixup(stem_init={stem_init!r}): expected 'he' or 'default', got {stem_init!r}; "
            "use 'he'"
        )
    network = find_residual_network(model, setting.batches[0][0][:2], "fixup")
    for block in network.blocks:
        if len(block.convolutions) not in (2, 3):
            raise Unsuitable(
                f"fixup(model): expected blocks of two or three convolutions, got {block.name} "
                f"with {len(block.convolutions)}; use fixup_ with blocks of your own"
            )
    branches = [Branch(block.name, block.convolutions) for block in network.blocks]
    replacements: dict[nn.Module, nn.Module] = {
        block.module: _fixup_block(network, block) for block in network.blocks
    }
    network.stem.bias = None
    if network.stem_norm is None:
        replacements[network.stem] = nn.Sequential(network.stem, ScalarBias())
    else:
        replacements[network.stem_norm] = ScalarBias()
    head = network.head
    replacements[head] = FixupClassifier(
        head.in_features, head.out_features, bias=head.bias is not None
    )
    projections = [
        module
        for block in network.blocks
        if block.shortcut is not None
        for module in block.shortcut.modules()
        if isinstance(module, nn.Conv2d)
    ]
    outside = [network.stem, *projections] if stem_init == "he" else projections
    if stem_init == "default":
        drawn = torch.empty(network.stem.weight.shape)
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=setting.generator)
        with torch.no_grad():
            network.stem.weight.copy_(drawn)
    fixup_(branches, outside=outside, generator=setting.generator)
    setting.say(f"{len(branches)} residual branches follow Fixup, without normalisers")
    return swap(model, replacements)


def _fixup_block(network: ResidualNetwork, block: ResidualBlock) -> nn.Module:
    shortcut = network.bare_shortcut(block)
    inside = [] if shortcut is None else shortcut.modules()
    for layer in (*block.convolutions, *(m for m in inside if isinstance(m, nn.Conv2d))):
        layer.bias = None
    kind = {2: FixupBasicBlock, 3: FixupBottleneck}[len(block.convolutions)]
    return kind(*block.convolutions, shortcut=shortcut)


def _zero_(layer: nn.Module) -> None:
    for parameter in layer.parameters(recurse=False):
        nn.init.zeros_(parameter)


CARD = Card(
    name="fixup",
    title="Fixup initialisation",
    summary="Starts every residual branch at zero and scales its weights by depth, with a few "
    "learnt scalars in place of normalisers.",
    room="inits",
    source=Source(
        authors="H. Zhang, Y. N. Dauphin, T. Ma",
        title="Fixup Initialization: Residual Learning Without Normalization",
        year=2019,
        arxiv="1901.09321",
        venue="ICLR 2019",
    ),
    best_for="Very deep residual networks without normalisers, at any batch size, at the learning "
    "rate that a normalised network would take.",
    limits=(
        "Needs residual branches: a plain network is refused.",
        "On small data it does not reach BatchNorm's accuracy alone; add mixup, cutout or dropout.",
    ),
    departures=(
        "The stem starts by He's rule, not by torch's default (stem_init=default).",
        "The scalars' rate is a tenth of the rate in use, not of the unscaled one (scalar_lr).",
    ),
)

METHOD = Method(card=CARD, prepare=prepare, parameter_groups=parameter_groups)
