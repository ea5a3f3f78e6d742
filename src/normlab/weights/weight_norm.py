r"""Weight normalisation: the length and the direction of each unit's weights are learnt apart.

.. math::
    w_i = g_i \, v_i / \lVert v_i \rVert_2

The gradient of v is orthogonal to v, so a plain step never shortens it and the effective step on
the direction limits itself; nothing depends on the batch, but for the start, which sets g and b by
one batch. Three parts, each usable alone: `weight_normalize` (and `remove_weight_norm`),
`data_dependent_start`, `MeanOnlyBatchNorm`::

    model = weight_normalize(model)
    data_dependent_start(model, inputs)  # some hundreds of training samples
    optimizer = torch.optim.Adam(param_groups(model, lr=1e-3, weight_decay=1e-4))

Source: T. Salimans, D. P. Kingma, "Weight Normalization: A Simple Reparameterization to Accelerate
Training of Deep Neural Networks", 2016, arXiv 1602.07868.

Departs:
    - Dead units are reported and, by the bias, set to 0, the start runs without noise, and weights
      of zeros are refused: see `normlab.weights.weight_norm_start` and
      `weight_norm_parametrization`.
    - `prepare` keeps the weights that the model has as directions; the paper draws them with a
      deviation of 0.05 (option ``v_std``). The start makes the function the same for any length of
      v, but a step turns v by the more the shorter it is: narrow layers diverged from 0.05 under
      SGD at a rate of 0.02. The paper trains with Adam.
    - Neither g nor v decays (option ``decay``): on v decay changes the function not at all, only
      the size of the next steps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from normlab.method import Card, Method, Setting, Source, Unsuitable
from normlab.parameter_groups import Group, check_held, split_groups
from normlab.surgery.flow import trace_flow
from normlab.surgery.snapshot import Snapshot
from normlab.surgery.swap import BATCH_NORMS, modules_of, swap
from normlab.weights.mean_only_batch_norm import MeanOnlyBatchNorm as MeanOnlyBatchNorm
from normlab.weights.mean_only_batch_norm import from_batch_norm
from normlab.weights.weight_norm_parametrization import (
    CONVOLUTIONS,
    WeightNormed,
    check_weights,
    trained_weights,
    weight_normalize,
    weight_normed,
)
from normlab.weights.weight_norm_parametrization import remove_weight_norm as remove_weight_norm
from normlab.weights.weight_norm_start import data_dependent_start


def param_groups(model: nn.Module, lr: float, weight_decay: float) -> list[Group]:
    """Split the parameters that train into two groups for an optimiser.

    1. Everything that is no length or direction: ``weight_decay``.
    2. Lengths g and directions v: no decay.

    Args:
        model: A model with weight-normalised layers.
        lr: The learning rate of both.
        weight_decay: The decay of the first group.

    Returns:
        The groups that are not empty.

    Example:
        >>> model = weight_normalize(nn.Linear(3, 2))
        >>> for group in param_groups(model, lr=0.1, weight_decay=1e-4):
        ...     print([tuple(p.shape) for p in group["params"]], group["weight_decay"])
        [(2,)] 0.0001
        [(2, 1), (2, 3)] 0.0
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[Group] = [{"params": trained, "lr": lr, "weight_decay": weight_decay}]
    return split_groups(groups, _lengths_and_directions(model), weight_decay=0.0)


def check_optimizers(model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    """Refuse optimisers that, together, miss a length or direction of the model that trains.

    Args:
        model: A model with weight-normalised layers.
        optimizers: All optimisers of its parameters.

    Raises:
        ValueError: They were built before the weights were normalised.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> check_optimizers(weight_normalize(model), optimizer)
        Traceback (most recent call last):
            ...
        ValueError: weight-norm(optimizer): expected an optimiser of the model's present ...
    """
    check_held("weight-norm", _lengths_and_directions(model), *optimizers)


def _lengths_and_directions(model: nn.Module) -> list[nn.Parameter]:
    return [part for one in weight_normed(model) for part in (one.length, one.direction)]


def prepare(
    model: nn.Module,
    setting: Setting,
    *,
    mean_only: bool = False,
    start: bool = True,
    v_std: float = 0.0,
    noise: bool = False,
) -> nn.Module:
    """Take BatchNorm out, normalise every weight, the classifier's too, and start from the data.

    Args:
        model: The model, changed in place. Weights that do not train are left alone.
        setting: All its batches, joined, are what the start looks at.
        mean_only: Whether a `MeanOnlyBatchNorm` takes the place of each BatchNorm. Without it each
            one becomes an identity, and every weight layer gets a bias.
        start: Whether `data_dependent_start` runs.
        v_std: The deviation of the normal distribution from which the directions of linear and
            convolutional layers are drawn, with all lengths 1 and biases 0: 0.05 in the paper. 0
            keeps the weights and biases that the model has.
        noise: As in `data_dependent_start`.

    Returns:
        The model, or its replacement if it is itself a BatchNorm.

    Raises:
        Unsuitable: No weight layer, or one that cannot be normalised. The model is as before then.
        ValueError: An option is out of range, or what `data_dependent_start` refuses.
    """
    if not 0 <= v_std < math.inf:
        raise ValueError(
            f"weight-norm(v_std={v_std!r}): expected a finite number of at least 0, got {v_std!r}; "
            "use 0 to keep the model's weights, or 0.05"
        )
    chosen = trained_weights(model)
    layers = [layer for _, layer, _ in chosen if isinstance(layer, (nn.Linear, *CONVOLUTIONS))]
    if not layers:
        raise Unsuitable(
            "weight-norm(model): expected linear or convolutional layers with weights that train, "
            f"got {type(model).__name__} without any; leave the method out"
        )
    check_weights(model, chosen, zeros_allowed=layers if v_std else ())
    inputs = torch.cat([inputs for inputs, _ in setting.batches])
    snapshot = Snapshot(model)
    try:
        changed, norms, shifted = _without_batch_norms(model, inputs, mean_only)
        for layer in layers:
            _start_plain(layer, v_std, layer not in shifted, setting.generator)
        weight_normalize(changed)
        found = weight_normed(changed)
        _say_what_was_done(setting, norms, mean_only, found)
        if v_std:
            with torch.no_grad():
                for one in found:
                    if one.layer in layers:
                        one.length.fill_(1.0)
        if start:
            setting.say(str(data_dependent_start(changed, inputs, noise=noise)))
    except BaseException:
        snapshot.restore()
        raise
    return changed


def _without_batch_norms(
    model: nn.Module, inputs: Tensor, mean_only: bool
) -> tuple[nn.Module, int, set[nn.Module]]:
    """Return the model, how many BatchNorms it had, and the layers that the new ones shift."""
    norms = list(modules_of(model, BATCH_NORMS).values())
    shifted: set[nn.Module] = set()
    if mean_only and norms:
        flow = trace_flow(model, inputs[:2])
        shifted = {layer for norm in norms if (layer := flow.predecessor(norm)) is not None}
    made: dict[nn.Module, nn.Module] = {
        norm: from_batch_norm(norm) if mean_only else nn.Identity() for norm in norms
    }
    return swap(model, made), len(norms), shifted


def _start_plain(layer: nn.Module, std: float, has_bias: bool, generator: torch.Generator) -> None:
    """Draw a layer's weight, if asked, and see to its bias, before it is normalised."""
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    if std:
        # Drawn on the CPU, so that a seed gives the same start on any device.
        drawn = torch.randn(weight.shape, generator=generator)
        with torch.no_grad():
            weight.copy_(std * drawn)
            if layer.bias is not None:
                assert isinstance(layer.bias, nn.Parameter)
                layer.bias.zero_()
    if has_bias and layer.bias is None:
        units = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        assert isinstance(units, int)
        layer.bias = nn.Parameter(weight.new_zeros(units))


def _say_what_was_done(
    setting: Setting, norms: int, mean_only: bool, found: list[WeightNormed]
) -> None:
    if norms:
        became = "mean-only ones" if mean_only else "biases of the layers"
        setting.say(f"{norms} BatchNorm layers became {became}")
    setting.say(f"{len(found)} weights are given by length and direction")


def parameter_groups(
    groups: list[Group], model: nn.Module, setting: Setting, *, decay: bool = False
) -> list[Group]:
    """Exempt lengths and directions from weight decay, unless ``decay``."""
    if decay:
        return groups
    return split_groups(groups, _lengths_and_directions(model), weight_decay=0.0)


def attach(model: nn.Module, optimizer: torch.optim.Optimizer, setting: Setting) -> None:
    """Refuse an optimiser that was built before the weights were normalised."""
    check_optimizers(model, optimizer)


CARD = Card(
    name="weight-norm",
    title="Weight normalisation",
    summary="Learns length and direction of each unit's weights apart, and starts from one batch "
    "at which every pre-activation has mean 0 and variance 1.",
    room="weights",
    source=Source(
        authors="T. Salimans, D. P. Kingma",
        title="Weight Normalization: A Simple Reparameterization to Accelerate Training of Deep "
        "Neural Networks",
        year=2016,
        arxiv="1602.07868",
        venue="NIPS 2016",
    ),
    state=("length and direction of each unit in place of its weights",),
    best_for="Small or dependent batches, recurrent and generative networks, reinforcement "
    "learning: all that batch statistics harm.",
    limits=(
        "It regularises less than BatchNorm; mean_only=True, a mean-only batch normalisation with "
        "the weights' length in place of the variance, makes up for most of that, and depends on "
        "the batch in training.",
        "Deep networks need the data-dependent start.",
        "The start sets lengths and biases anew: a trained network that is converted keeps the "
        "directions of its weights only, and has to be trained further.",
        "Recurrent and attention layers are normalised, but have no data-dependent start.",
    ),
    departures=(
        "Dead units of the start keep their length, give 0 and are reported.",
        "The start runs without dropout and noise unless noise=True.",
        "The model's own weights are the first directions; v_std=0.05 draws them as published.",
        "Lengths and directions do not decay unless decay=True.",
        "The start looks at all the batches that a method is given, not at 500 images.",
    ),
)

METHOD = Method(card=CARD, prepare=prepare, parameter_groups=parameter_groups, attach=attach)
