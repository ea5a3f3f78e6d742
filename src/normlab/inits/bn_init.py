r"""Start the scale of batch normalisation below 1 and let it learn more slowly than the weights.

Three parts, each usable alone: the scale starts at :math:`\gamma_0 < 1`; its learning rate is
divided by c; a normaliser in front of the first layer takes the place of the data set's fixed
means and deviations.

Why it matters, for a chain of convolution, BatchNorm and ReLU with all shifts 0 and a fixed
gradient at the logits: every scale but the last is undone by the next normaliser, so the logits and
the gradient of every convolution shrink by :math:`\gamma_0` once, whatever the depth, and the
softmax starts nearer to uniform. The gradient of a scale does not change. Relative to its value its
step is then :math:`1/\gamma_0` times as large, which the division of its rate by c corrects.

Source: J. Davis, L. Frank, "Revisiting Batch Norm Initialization", 2021, arXiv 2110.13989.

Departs:
    - A scale is known by the type of its layer; the public code takes every one-dimensional
      parameter with "weight" in its name, those of LayerNorm and PReLU too.
    - Linear layers start by torch's default where ``linear_init="default"``; the public code says
      so, but draws from a range 2.449 times as wide (``linear_init="reference"``).
    - `prepare` leaves convolutions and linear layers as they are unless asked (``conv_init``,
      ``linear_init``), so that methods compared differ in what is theirs.
    - A starting scale that is not above 0 is refused; the public code then takes 1 silently.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normlab.inits.bn_init_recipe import (
    ConvInit,
    LinearInit,
    check_inits,
    check_scale,
    init_weights_,
    online_input_norm,
)
from normlab.method import Card, Method, Setting, Source, Unsuitable
from normlab.parameter_groups import Group, split_groups
from normlab.surgery.swap import adopt

Normalisers: TypeAlias = tuple[type[nn.Module], ...]


def bn_init_(
    model: nn.Module,
    scale: float = 0.1,
    *,
    skip: Iterable[nn.Module] = (),
    normalisers: Normalisers = (),
) -> nn.Module:
    r"""Set the scale of every batch normalisation layer to :math:`\gamma_0`, its shift to 0.

    Args:
        model: The model, changed in place.
        scale: The scale gamma0, above 0; below 1 to have an effect, 0.1 to start the search.
        skip: Modules of the model that are left alone with all they hold, such as the last
            normaliser of a residual branch where that one starts at zero.
        normalisers: Further classes of layers whose ``weight`` is a scale and ``bias`` a shift.

    Returns:
        The model.

    Raises:
        Unsuitable: No layer of the model has a scale.
        ValueError: ``scale`` is not above 0, or ``skip`` names a module that is not the model's.

    Example:
        >>> model = bn_init_(nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)))
        >>> model[1].weight
        Parameter containing:
        tensor([0.1000, 0.1000], requires_grad=True)
    """
    check_scale("bn_init_", scale)
    skipped = _skipped(model, skip)
    for layer in _scaled_layers("bn_init_", model, normalisers):
        if layer not in skipped:
            nn.init.constant_(_scale_of(layer), scale)
            shift = getattr(layer, "bias", None)
            if isinstance(shift, nn.Parameter):
                nn.init.zeros_(shift)
    return model


def param_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    c: float = 100.0,
    *,
    normalisers: Normalisers = (),
) -> list[Group]:
    r"""Split the parameters that train into three groups for an optimiser.

    1. Biases, shifts and everything else with less than two dimensions: ``lr``, no decay.
    2. Scales of batch normalisation: ``lr / c``, no decay.
    3. All other parameters, the weights: ``lr``, ``weight_decay``.

    One schedule serves all groups. An absolute floor of the rate, such as the recipe's 1e-8 at the
    end of a cosine, is the same for all of them, so that the ratio c is lost at the very end only.

    Args:
        model: The model.
        lr: The base learning rate.
        weight_decay: The decay of the third group.
        c: The divisor c of the scales' rate; up to 1 they keep ``lr``.
        normalisers: As in `bn_init_`; none of their parameters decays.

    Returns:
        The three groups in this order, each parameter in exactly one. The second is empty if no
        layer has a scale.

    Raises:
        ValueError: ``c`` is not finite.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
        >>> for group in param_groups(model, lr=0.1, weight_decay=1e-4):
        ...     print([tuple(p.shape) for p in group["params"]], group["lr"], group["weight_decay"])
        [(2,), (2,)] 0.1 0.0
        [(2,)] 0.001 0.0
        [(2, 4)] 0.1 0.0001
    """
    slow_lr = lr / _rate_divisor("param_groups", "c", c)
    scales, vectors = _scales_and_vectors(model, normalisers)
    chosen = {id(parameter) for parameter in (*scales, *vectors)}
    weights = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    return [
        {"params": [one for one in params if one.requires_grad], "lr": rate, "weight_decay": decay}
        for params, rate, decay in (
            (vectors, lr, 0.0),
            (scales, slow_lr, 0.0),
            (weights, lr, weight_decay),
        )
    ]


def parameter_groups(
    groups: list[Group],
    model: nn.Module,
    setting: Setting,
    *,
    divisor: float = 100.0,
    normalisers: Normalisers = (),
) -> list[Group]:
    """Divide the scales' learning rate, and exempt all but the weights from decay.

    Args:
        groups: Parameter groups; one without ``lr`` has the setting's.
        model: The model.
        setting: The training's.
        divisor: The divisor c of the scales' rate; up to 1 they keep the rate of their group.
        normalisers: As in `bn_init_`.

    Returns:
        The groups, with those of scales and of other parameters without decay split off.

    Raises:
        Unsuitable: No layer of the model has a scale.
        ValueError: ``divisor`` is not finite.
    """
    divisor = _rate_divisor("bn-init", "divisor", divisor)
    _scaled_layers("bn-init", model, normalisers)
    scales, vectors = _scales_and_vectors(model, normalisers)
    rated = [{"lr": setting.lr, **group} for group in groups]
    slowed = split_groups(rated, scales, lr=lambda lr: lr / divisor, weight_decay=0.0)
    return split_groups(slowed, vectors, weight_decay=0.0)


def prepare(
    model: nn.Module,
    setting: Setting,
    *,
    scale: float = 0.1,
    input_norm: bool = False,
    conv_init: ConvInit = "keep",
    linear_init: LinearInit = "keep",
    normalisers: Normalisers = (),
) -> nn.Module:
    """Set the scale of every BatchNorm and, if asked, put one in front of the model.

    Args:
        model: A model with BatchNorm; changed in place.
        setting: With ``input_norm``, the first batch tells the number of channels.
        scale: As in `bn_init_`.
        input_norm: Whether inputs go through `online_input_norm` first. The model returned is then
            an ``nn.Sequential`` of ``input_norm`` and ``model``, in which the names of the model's
            parameters begin with ``model.``.
        conv_init: As in `init_weights_`.
        linear_init: As in `init_weights_`.
        normalisers: As in `bn_init_`.

    Returns:
        The model, or the sequence that holds it.

    Raises:
        Unsuitable: No layer has a scale, or the inputs have no channels to normalise. The model is
            not changed then.
        ValueError: An option is out of range.
    """
    check_scale("bn-init", scale)
    check_inits("bn-init", conv_init, linear_init)
    count = len(_scaled_layers("bn-init", model, normalisers))
    first = _input_norm_for(model, setting.batches[0][0], scale) if input_norm else None
    init_weights_(model, conv_init=conv_init, linear_init=linear_init, generator=setting.generator)
    bn_init_(model, scale, normalisers=normalisers)
    setting.say(f"{count} normalisers start with a scale of {scale}")
    if first is None:
        return model
    setting.say("inputs are normalised by a BatchNorm of their own")
    return nn.Sequential(OrderedDict(input_norm=first, model=model)).train(model.training)


def _input_norm_for(model: nn.Module, inputs: Tensor, scale: float) -> nn.Module:
    if not torch.is_floating_point(inputs) or not 2 <= inputs.dim() <= 5:
        raise Unsuitable(
            "bn-init(input_norm=True): expected floating point inputs (N, C, *) with up to three "
            f"axes of space, got {inputs.dtype} of shape {tuple(inputs.shape)}; leave input_norm "
            "out"
        )
    layer = online_input_norm(inputs.shape[1], scale, spatial_dims=inputs.dim() - 2)
    return adopt(layer, model)


def _scaled_layers(operation: str, model: nn.Module, normalisers: Normalisers) -> list[nn.Module]:
    """Return the normalisers with a scale; `Unsuitable` if there is none."""
    layers = [layer for layer in _normalisers_in(model, normalisers) if _has_scale(layer)]
    if not layers:
        raise Unsuitable(
            f"{operation}(model): expected a normaliser with a learnt scale, got "
            f"{type(model).__name__} without any; write the model with nn.BatchNorm1d/2d/3d, or "
            "name the classes of its own with normalisers=(...)"
        )
    return layers


def _normalisers_in(model: nn.Module, normalisers: Normalisers) -> list[nn.Module]:
    named = normalisers if isinstance(normalisers, tuple) else (normalisers,)
    if not all(isinstance(one, type) and issubclass(one, nn.Module) for one in named):
        raise ValueError(
            f"bn-init(normalisers={normalisers!r}): expected classes of modules, got something "
            "else; write normalisers=(FilterResponseNorm,)"
        )
    return [layer for layer in model.modules() if isinstance(layer, (_BatchNorm, *named))]


def _has_scale(layer: nn.Module) -> bool:
    return isinstance(getattr(layer, "weight", None), nn.Parameter)


def _scale_of(layer: nn.Module) -> nn.Parameter:
    assert isinstance(layer.weight, nn.Parameter)
    return layer.weight


def _scales_and_vectors(
    model: nn.Module, normalisers: Normalisers
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the scales, and all else of a normaliser or with less than two dimensions."""
    layers = _normalisers_in(model, normalisers)
    scales = {id(_scale_of(layer)) for layer in layers if _has_scale(layer)}
    own = {id(parameter) for layer in layers for parameter in layer.parameters(recurse=False)}
    others = [one for one in model.parameters() if id(one) not in scales]
    return (
        [one for one in model.parameters() if id(one) in scales],
        [one for one in others if one.dim() < 2 or id(one) in own],
    )


def _skipped(model: nn.Module, skip: Iterable[nn.Module]) -> set[nn.Module]:
    modules = set(model.modules())
    skipped: set[nn.Module] = set()
    for module in skip:
        if module not in modules:
            raise ValueError(
                f"bn_init_(skip=...): expected modules of the model, got {module!r}; pass the "
                "layers themselves, such as [model.layer1[0].bn2]"
            )
        skipped |= set(module.modules())
    return skipped


def _rate_divisor(operation: str, name: str, divisor: float) -> float:
    if not math.isfinite(divisor):
        raise ValueError(
            f"{operation}({name}={divisor!r}): expected a finite number, got {divisor!r}; use 100, "
            "or freeze the scales with requires_grad_(False)"
        )
    return max(divisor, 1.0)


CARD = Card(
    name="bn-init",
    title="Batch-norm scale initialisation",
    summary="Starts the scale of batch normalisation below 1 and lets it learn at a hundredth of "
    "the rate.",
    room="inits",
    source=Source(
        authors="J. Davis, L. Frank",
        title="Revisiting Batch Norm Initialization",
        year=2021,
        arxiv="2110.13989",
        venue="ECCV 2022",
    ),
    batch_statistics=True,
    batch_of_one="needs space",
    eval_differs=True,
    state=("with input_norm, the scale and the running statistics of the input's normaliser",),
    best_for="Any network with BatchNorm: it costs nothing at run time.",
    limits=(
        "A residual branch whose last scale should start at zero is not one of these: bn_init_ "
        "takes such layers in skip.",
        "input_norm is meant for raw images in [0, 1]; behind fixed means and deviations only its "
        "scale remains.",
    ),
    departures=(
        "Scales are found by the type of their layer, not by a parameter's name.",
        "Weights of convolutions and linear layers stay as they are unless conv_init or "
        "linear_init says otherwise.",
    ),
)

METHOD = Method(card=CARD, prepare=prepare, parameter_groups=parameter_groups)
