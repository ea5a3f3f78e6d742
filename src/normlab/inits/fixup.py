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
    - Grouped convolutions take the fan-out of a group for their standard deviation, not of all
      groups: a depthwise one would let hardly anything pass.
    - Networks of other forms than the paper's: see `normlab.inits.fixup_any`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from normlab.inits.fixup_any import fixup_any_
from normlab.inits.fixup_blocks import (
    FixupBasicBlock,
    FixupBottleneck,
    FixupClassifier,
    ScalarBias,
    ScalarScale,
)
from normlab.inits.fixup_check import refuse_scalars
from normlab.inits.fixup_insert import BEFORE
from normlab.inits.fixup_proof import inputs_of, prove
from normlab.inits.fixup_rules import (
    branch_factor,
    find_branches,
    fixup_,
    he_normal_,
    torch_default_,
)
from normlab.method import Card, Method, Setting, Source, Unsuitable
from normlab.parameter_groups import Group, check_held, split_groups
from normlab.surgery.branches import Branch, plan_branches
from normlab.surgery.normalisers import refuse_wrapped
from normlab.surgery.residual import ResidualBlock, ResidualNetwork, find_residual_network
from normlab.surgery.snapshot import Snapshot
from normlab.surgery.swap import swap

__all__ = [
    "CARD",
    "METHOD",
    "Branch",
    "branch_factor",
    "find_branches",
    "fixup_",
    "he_normal_",
    "parameter_groups",
    "prepare",
    "scalars_of",
]


def scalars_of(model: nn.Module) -> list[nn.Parameter]:
    """Return scalar biases, scalar multipliers and the readout's bias, found by type of module."""
    found = []
    for module in model.modules():
        if isinstance(module, (ScalarBias, ScalarScale)):
            found.append(module.value)
        elif isinstance(module, FixupClassifier) or BEFORE in module._modules:
            # Of the layers behind a scalar bias the readout has a bias of its own, and a layer
            # that is not torch's.
            bias = module._parameters.get("bias")
            found += [] if bias is None else [bias]
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
    """Take the normalisers out of a residual network, put the scalars in and initialise it.

    A ResNet in the manner of torchvision is rebuilt of `FixupBasicBlock` or `FixupBottleneck`. The
    branches of any other network are looked for (`plan_branches`), and the scalars go into its
    own modules (`fixup_any_`).

    Args:
        model: A residual network; changed in place.
        setting: The first batch serves to see what the model computes; its inputs are what the
            model takes, a tuple or list of them where it takes several.
        stem_init: ``"he"``, or ``"default"`` for torch's own.

    Returns:
        The model.

    Raises:
        Unsuitable: The model has no residual branches, an addition that cannot be told, weights
            that are computed anew in each pass, or Fixup's scalars already; or it would not start
            as Fixup does. The model is as it was then.
        ValueError: ``stem_init`` has no such value.
    """
    if stem_init not in ("he", "default"):
        raise ValueError(
            f"fixup(stem_init={stem_init!r}): expected 'he' or 'default', got {stem_init!r}; "
            "use 'he'"
        )
    refuse_wrapped("fixup", model)
    refuse_scalars(model)
    inputs = inputs_of(setting)
    network = _known_form(model, inputs)
    if network is None:
        plan = plan_branches(model, *inputs, operation="fixup")
        return fixup_any_(model, plan, setting, stem_init=stem_init)
    snapshot = Snapshot(model)
    try:
        return _prepare_known(network, setting, stem_init)
    except BaseException:
        snapshot.restore()
        raise


def _known_form(model: nn.Module, inputs: tuple[Any, ...]) -> ResidualNetwork | None:
    """Return the parts of a ResNet whose blocks have a Fixup form of the paper."""
    if len(inputs) != 1:
        return None
    try:
        network = find_residual_network(model, inputs[0], "fixup")
    except Unsuitable:
        return None
    except (AttributeError, RuntimeError, TypeError, ValueError):
        # Names that fit by chance: its parts cannot be run the way the names say.
        return None
    known = all(len(block.convolutions) in (2, 3) for block in network.blocks)
    return network if known and all(_is_plain(layer) for layer in _weight_layers(network)) else None


def _weight_layers(network: ResidualNetwork) -> list[nn.Module]:
    inside = [layer for block in network.blocks for layer in block.convolutions]
    return [network.stem, *inside, *_projections(network), network.head]


def _projections(network: ResidualNetwork) -> list[nn.Module]:
    shortcuts = [block.shortcut for block in network.blocks if block.shortcut is not None]
    return [m for one in shortcuts for m in one.modules() if isinstance(m, nn.Conv2d)]


def _is_plain(layer: nn.Module) -> bool:
    """Whether it is torch's own class, which a re-parametrised layer is not, with its weight."""
    return type(layer) in (nn.Conv2d, nn.Linear) and layer._parameters.get("weight") is not None


def _prepare_known(network: ResidualNetwork, setting: Setting, stem_init: str) -> nn.Module:
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
    projections = _projections(network)
    outside = [network.stem, *projections] if stem_init == "he" else projections
    if stem_init == "default":
        torch_default_(network.stem, generator=setting.generator)
    fixup_(branches, outside=outside, generator=setting.generator)
    model = swap(network.model, replacements)
    readout = replacements[head]
    prove(model, branches, {"the readout": readout}, inputs_of(setting))
    for block in network.blocks:
        _prove_block(block, replacements[block.module])
    setting.say(
        f"{len(branches)} residual branches follow Fixup in the paper's block form, without "
        "normalisers"
    )
    return model


@torch.no_grad()
def _prove_block(found: ResidualBlock, block: nn.Module) -> None:
    """Show that a fresh block is ``relu(shortcut(x))``."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, found.in_channels, 8, 8, generator=generator)
    x = x.to(found.convolutions[0].weight)
    short = x if block.shortcut is None else block.get_submodule("shortcut")(x)
    if not torch.equal(block(x), short.relu()):
        raise Unsuitable(
            f"fixup(model): expected relu(shortcut(x)) of a fresh block, got {found.name}, which "
            "computes something else; take the hooks off its convolutions"
        )


def _fixup_block(network: ResidualNetwork, block: ResidualBlock) -> nn.Module:
    shortcut = network.bare_shortcut(block)
    inside = [] if shortcut is None else shortcut.modules()
    for layer in (*block.convolutions, *(m for m in inside if isinstance(m, nn.Conv2d))):
        layer.bias = None
    kind = {2: FixupBasicBlock, 3: FixupBottleneck}[len(block.convolutions)]
    return kind(*block.convolutions, shortcut=shortcut)


def attach(model: nn.Module, optimizer: torch.optim.Optimizer, setting: Setting) -> None:
    """Refuse an optimiser that was built before the scalars were put in."""
    check_held("fixup", scalars_of(model), optimizer)


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
        "Needs residual branches: a plain network is refused, and so is one with an addition of "
        "which the short path cannot be told (name its branches yourself: plan_branches).",
        "On small data it does not reach BatchNorm's accuracy alone; add mixup, cutout or dropout.",
    ),
    departures=(
        "The stem starts by He's rule, not by torch's default (stem_init=default).",
        "The scalars' rate is a tenth of the rate in use, not of the unscaled one (scalar_lr).",
        "Grouped convolutions take the fan-out of a group for their standard deviation, not of all "
        "groups: a depthwise one would let hardly anything pass.",
        "Networks other than the paper's ResNets and Transformer keep their modules; the scalars "
        "go in where one forward pass shows that they belong.",
    ),
)

METHOD = Method(card=CARD, prepare=prepare, parameter_groups=parameter_groups, attach=attach)
