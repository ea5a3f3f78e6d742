r"""Target space: the sums a layer should have on a fixed batch are trained, and weights follow.

The parameters of a layer are targets :math:`T_l` for its sums on a fixed *realisation batch*
:math:`\bar X`. Its weights are the ridge solution for them, solved anew at every step, each layer
from what the layers before it really pass on:

.. math::
    W_l = (A_l^\top A_l + \lambda I)^{-1} A_l^\top T_l, \quad S_l = A_l W_l, \quad
    A_{l+1} = [1, \phi_l(S_l)]

The mini-batch goes through an ordinary network with these weights, and the gradient goes back
through all of it, the solves included. A change of an early layer no longer scrambles the later
ones: their weights make up for it ("cascade untangling").

Source: M. Fairbank, S. Samothrakis, L. Citi, "Deep Learning in Target Space", 2022, arXiv
2006.01578, JMLR 23(8):1-46; the authors' public code.

Departs:
    - Targets are those of the sums in front of the activation, as in the public code; the paper's
      abstract calls them firing strengths.
    - The realisation batch goes through the network in evaluation mode and without autocast, so
      that the weights are deterministic and the same in training and evaluation. The public code
      drops units there too.
    - Convolutions may have stride, dilation and groups; the public code has neither.
    - The ridge is 0.001, as in the public scripts for two spirals and recurrent networks. The
      public library's default and its convolutional networks have 0.1, which lets next to nothing
      through a deep convolutional network whose first targets were projected on few small images.
    - A ridge of zero takes the pseudo-inverse, the limit of small ridges, with a warning.
    - Weight decay does not act on targets (option ``decay_targets``): the ridge is the decay.

Several processes solve the same weights, each by itself, from the same realisation batch; averaged
gradients are those of one process on the joined batch, without any further exchange.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from normlab.method import Card, Method, Setting, Source, Unsuitable
from normlab.parameter_groups import Group, check_held, split_groups
from normlab.surgery.flow import Flow, trace_flow
from normlab.surgery.snapshot import Snapshot
from normlab.surgery.swap import BATCH_NORMS, modules_of, swap
from normlab.weights.target_space_conv import TargetConv2d
from normlab.weights.target_space_layer import (
    Mode,
    TargetLayer,
    TargetLinear,
    check_mode,
    check_ridge,
)
from normlab.weights.target_space_model import TargetSpace, check_realisation, dressed
from normlab.weights.target_space_recurrent import TargetRNN

Convertible = nn.Linear | nn.Conv2d | nn.RNN
"""The layers that have a kind of target layer."""

REALISATION_SIZE = 100
"""How many samples the realisation batch has where no number is asked for and so many are there."""


def target_space(
    model: nn.Module,
    realisation: Tensor,
    *,
    ridge: float = 0.001,
    relative: bool = False,
    mode: Mode = "sequential",
    project: bool = True,
    float64: bool = False,
    generator: torch.Generator | None = None,
    say: Callable[[str], None] | None = None,
) -> TargetSpace:
    """Put a model of torch's layers into target space; its weights are lost.

    Every nn.Linear and nn.Conv2d that is called once becomes a target layer, and so does an nn.RNN
    of one layer and direction that starts from zeros. torch's batch normalisation layers become
    identities, and then every target layer has a bias. Other layers stay, and weights of theirs are
    trained as they are.

    Args:
        model: A model, changed in place.
        realisation: The realisation batch, some samples as the model takes them.
        ridge: The ridge of every solve, at least 0.
        relative: Whether ``ridge`` is multiplied by the number of rows, which for a convolution is
            that of samples times positions.
        mode: ``"sequential"``: each layer is solved from what the layers before it achieve.
            ``"optimistic"``: as if they met their targets.
        project: Whether to make the first targets reachable.
        float64: Whether to solve in float64.
        generator: For the first targets.
        say: Takes sentences about what was done; None for a warning where weights stay.

    Returns:
        The model in target space.

    Raises:
        Unsuitable: The model has no layer for it, or batch normalisation of an unknown class.
        ValueError: An option out of its range, or an empty realisation batch. The model is not
            changed then.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        >>> model = target_space(model, torch.randn(6, 4))
        >>> [tuple(parameter.shape) for parameter in model.parameters()]
        [(6, 8), (6, 2)]
    """
    check_ridge("target_space", ridge)
    check_mode("target_space", mode)
    check_realisation("target_space", realisation)
    norms = modules_of(model, BATCH_NORMS)
    known = set(norms.values())
    others = {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm)}
    strange = [f"{n} ({type(m).__name__})" for n, m in others.items() if m not in known]
    if strange:
        raise Unsuitable(
            "target_space(model): expected no batch normalisation but torch's BatchNorm layers, "
            f"got {', '.join(strange)}; take it out first"
        )
    chosen, kept = _layers(model, *_traced(model, realisation))
    if not chosen:
        reasons = "; ".join(f"{name}: {why}" for name, why in kept.items())
        raise Unsuitable(
            "target_space(model): expected an nn.Linear, nn.Conv2d or nn.RNN called once in a "
            f"forward pass, got none ({reasons or 'there is no such layer'}); build the model from "
            "TargetLinear, TargetConv2d or TargetRecurrent"
        )
    options = {
        "ridge": ridge,
        "relative": relative,
        "float64": float64,
        "generator": generator,
    }
    replacements: dict[nn.Module, nn.Module] = {norm: nn.Identity() for norm in norms.values()}
    for layer, shape in chosen.items():
        own = any("bias" in name for name, _ in layer.named_parameters(recurse=False))
        bias = own or bool(norms)
        replacements[layer] = dressed(_target_layer(layer, shape, bias, mode, options), layer)
    snapshot = Snapshot(model)
    try:
        found = TargetSpace(swap(model, replacements), realisation, project=project)
    except BaseException:
        snapshot.restore()
        raise
    staying = f"weights stay: {'; '.join(f'{name} {why}' for name, why in kept.items())}"
    if say is None and kept:
        warnings.warn(f"target_space: {staying}", stacklevel=2)
    if say is not None:
        say(f"{len(chosen)} layers are in target space, over {len(realisation)} samples")
        if norms:
            say(f"{len(norms)} BatchNorm layers were taken out; each layer's bias does their work")
        if kept:
            say(staying)
    return found


def _traced(model: nn.Module, realisation: Tensor) -> tuple[Flow, set[nn.Module]]:
    """Return what one pass shows, and the recurrent layers that it gives a first state."""
    given: set[nn.Module] = set()

    def look(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        if any(value is not None for value in (*args[1:], named.get("hx"))):
            given.add(module)

    layers = [module for module in model.modules() if type(module) is nn.RNN]
    hooks = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in layers]
    try:
        return trace_flow(model, realisation), given
    finally:
        for hook in hooks:
            hook.remove()


def _layers(
    model: nn.Module, flow: Flow, given: set[nn.Module]
) -> tuple[dict[Convertible, torch.Size], dict[str, str]]:
    """Return the layers to convert with the shape of their input, and why others stay."""
    chosen, kept = {}, {}
    modules = set(model.modules())
    holders = Counter(id(p) for m in modules for p in m._parameters.values() if p is not None)
    for name, module in model.named_modules():
        if is_parametrized(module):
            kept[name] = "makes its weight from others"
        weights = [p for p in module._parameters.values() if p is not None and p.dim() > 1]
        if not weights or isinstance(module, ParametrizationList):
            continue
        calls = flow.of(module)
        shape = calls[0].input_shape if calls else None
        kinds = (nn.Linear, nn.Conv2d, nn.RNN)
        if not isinstance(module, kinds) or type(module) not in kinds:
            kept[name] = f"is of another kind ({type(module).__name__})"
        elif isinstance(module, nn.RNN) and (module.num_layers > 1 or module.bidirectional):
            kept[name] = "has several layers or directions"
        elif set(module._parameters) != _names(module) or any(
            holders[id(weight)] > 1 for weight in weights
        ):
            kept[name] = "shares its weight, or makes it from others"
        elif len(calls) != 1:
            kept[name] = f"is called {len(calls)} times"
        elif shape is None or (isinstance(module, nn.RNN) and len(shape) != 3):
            kept[name] = "does not take one tensor with a batch"
        elif module in given:
            kept[name] = "is given a first state"
        elif not all(weight.requires_grad for weight in weights):
            kept[name] = "is frozen"
        else:
            chosen[module] = shape
    return chosen, kept


def _names(layer: Convertible) -> set[str]:
    """Return the names of all parameters of a layer that computes none of them."""
    if not isinstance(layer, nn.RNN):
        return {"weight", "bias"}
    matrices = {"weight_ih_l0", "weight_hh_l0"}
    return matrices | ({"bias_ih_l0", "bias_hh_l0"} if layer.bias else set())


def _target_layer(
    layer: Convertible, shape: torch.Size, bias: bool, mode: Mode, options: dict[str, Any]
) -> TargetLayer:
    if isinstance(layer, nn.RNN):
        return TargetRNN.like(layer, shape, bias, **options)
    if isinstance(layer, nn.Conv2d):
        return TargetConv2d.like(layer, shape, bias, mode=mode, **options)
    leading = shape[:-1]
    return TargetLinear(layer.in_features, layer.out_features, leading, bias, mode=mode, **options)


def prepare(
    model: nn.Module,
    setting: Setting,
    *,
    realisation_size: int | None = None,
    ridge: float = 0.001,
    relative: bool = False,
    mode: Mode = "sequential",
    project: bool = True,
    float64: bool = False,
) -> nn.Module:
    """Put a model into target space over some of the example batches' samples.

    The realisation batch is fixed; the batches of training may have any size.

    Args:
        model: A model; see `target_space`.
        setting: Its example batches give the realisation batch.
        realisation_size: How many samples it has, at least 1; None for up to 100.
        ridge: As for `target_space`, like all that follow.
        relative: Whether the ridge is multiplied by the rows.
        mode: ``"sequential"`` or ``"optimistic"``.
        project: Whether to make the first targets reachable.
        float64: Whether to solve in float64.

    Returns:
        A `TargetSpace` around the model.

    Raises:
        Unsuitable: As for `target_space`.
        ValueError: The example batches hold fewer samples than asked for, or as for
            `target_space`.
    """
    samples = torch.cat([inputs for inputs, _ in setting.batches])
    wanted = min(REALISATION_SIZE, len(samples)) if realisation_size is None else realisation_size
    if not 1 <= wanted <= len(samples):
        raise ValueError(
            f"target-space(realisation_size={wanted}): expected 1 to {len(samples)}, which is all "
            f"that the example batches hold, got {wanted}; ask for fewer, or train with larger "
            "batches"
        )
    return target_space(
        model,
        samples[:wanted],
        ridge=ridge,
        relative=relative,
        mode=mode,
        project=project,
        float64=float64,
        generator=setting.generator,
        say=setting.say,
    )


def parameter_groups(
    groups: list[Group],
    model: nn.Module,
    setting: Setting,
    *,
    lr_factor: float = 1.0,
    decay_targets: bool = False,
) -> list[Group]:
    """Give the targets groups of their own, without weight decay.

    Args:
        groups: Parameter groups; one without ``lr`` has the setting's.
        model: A prepared model.
        setting: The training's.
        lr_factor: The targets' rate as a multiple of that of their group, above 0.
        decay_targets: Whether weight decay pulls targets to zero.

    Returns:
        The groups, with the targets split off.

    Raises:
        ValueError: ``lr_factor`` is not above 0.
    """
    if not lr_factor > 0:
        raise ValueError(
            f"target-space(lr_factor={lr_factor}): expected a number above 0, got {lr_factor}; "
            "use 1"
        )
    targets = [module.targets for module in model.modules() if isinstance(module, TargetLayer)]
    changes = {} if decay_targets else {"weight_decay": 0.0}
    rated = [{"lr": setting.lr, **group} for group in groups]
    return split_groups(rated, targets, lr=lambda lr: lr_factor * lr, **changes)


def attach(model: nn.Module, optimizer: torch.optim.Optimizer, setting: Setting) -> None:
    """Refuse an optimiser that does not hold the targets.

    Raises:
        ValueError: The optimiser was built before the model was put into target space.
    """
    targets = [module.targets for module in model.modules() if isinstance(module, TargetLayer)]
    check_held("target-space", targets, optimizer)


CARD = Card(
    name="target-space",
    title="Deep learning in target space",
    summary="Trains what each layer's sums should be on a fixed batch, and solves the weights "
    "from that.",
    room="weights",
    source=Source(
        authors="M. Fairbank, S. Samothrakis, L. Citi",
        title="Deep Learning in Target Space",
        year=2022,
        arxiv="2006.01578",
        venue="JMLR 23(8):1-46",
    ),
    state=("the realisation batch, and every layer's targets in place of its weights",),
    best_for="Deep narrow networks, saturating activations and long recurrences, where training "
    "weights is hard.",
    limits=(
        "Every step passes the realisation batch through the network and solves a system per "
        "layer; wide layers and many positions cost most.",
        "Rates are not those of weights: the paper's script takes SGD at 10 where weights take "
        "0.1 (lr_factor=100), and Adam at 0.01.",
        "A prepared model's parameters are targets; to_weight_space gives an ordinary network.",
        "BatchNorm is taken out; transposed and 1-d convolutions, LSTM, GRU and RNNs of several "
        "layers or directions keep their weights.",
        "A realisation batch of n samples leaves dense layers weights of rank n at most.",
    ),
    departures=(
        "The realisation batch passes without dropout, so that weights are deterministic.",
        "Convolutions may have stride, dilation and groups.",
        "The ridge is 0.001; the public library's default, also for images, is 0.1.",
        "A ridge of zero takes the pseudo-inverse.",
        "Weight decay leaves the targets alone (decay_targets).",
    ),
)

METHOD = Method(card=CARD, prepare=prepare, parameter_groups=parameter_groups, attach=attach)
