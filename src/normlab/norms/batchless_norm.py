r"""Batchless normalisation: each channel's mean and deviation are parameters, fitted by likelihood.

Every channel is standardised with a learnt mean and a learnt deviation. Their only teacher is the
negative log-likelihood of a Gaussian for the layer's input, which each layer adds to the loss; so
a sample's output depends on no other sample, training and evaluation compute the same function,
and batches of one train, also when gradients are accumulated one sample at a time.

In a training loop of one's own::

    model = ...                                     # with BatchlessNorm(channels) layers
    start_from_data(model, [inputs, ...])           # some hundred samples
    loss = criterion(model(inputs), targets) + collect_losses(model)

Source: B. Berger, "Batchless Normalization: How to Normalize Activations with just one Instance in
Memory", 2022, arXiv 2212.14729.

Departs:
    - The loss is formed in training only; the public code adds it in evaluation too.
    - `collect_losses` counts the value of the loss; the public code adds a term whose value is
      zero, as ``silent=True`` and `METHOD` do.
    - The dead channel, whose deviation the public code takes the logarithm of 0 of, is floored,
      and values weigh the same whatever the size of their batch (`normlab.norms.batchless_start`).
    - Moving the statistics of a running network keeps its function; the public code, marked
      untested there, adds the new shift to the scale.
    - The output's scale gamma and shift beta are called ``weight`` and ``bias``, as in torch's
      layers.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from normlab.method import Card, Method, Setting, Source, Unsuitable
from normlab.norms.batchless_layer import BatchlessNorm as BatchlessNorm
from normlab.norms.batchless_layer import batchless_norm as batchless_norm
from normlab.norms.batchless_layer import collect_losses as collect_losses
from normlab.norms.batchless_layer import statistics_parameters as statistics_parameters
from normlab.norms.batchless_likelihood import check_choice, check_options
from normlab.norms.batchless_start import restart_from_data as restart_from_data
from normlab.norms.batchless_start import start_from_data as start_from_data
from normlab.parameter_groups import Group, split_groups
from normlab.surgery.swap import adopt, batch_norms, keep_affine, swap


def from_batch_norm(norm: nn.Module, **options: Any) -> BatchlessNorm:
    r"""Return the layer that takes a BatchNorm's place and computes what it does in evaluation.

    Scale and shift are kept, and the running statistics as :math:`\mu = m`,
    :math:`\sigma = \sqrt{v + \epsilon}`; without running statistics mu is 0 and sigma 1.

    Args:
        norm: One of torch's BatchNorm layers.
        options: As `BatchlessNorm` takes them.

    Raises:
        ValueError: The running statistics are not finite.
    """
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    affine = {"use_output_std": norm.affine, "use_output_mean": norm.affine}
    layer = BatchlessNorm(norm.num_features, **{**affine, **options})
    # First the precision, then the values.
    adopt(layer, norm)
    if norm.affine:
        keep_affine(layer, norm)
    if norm.running_mean is not None and norm.running_var is not None:
        std = (norm.running_var + norm.eps).sqrt()
        if not (torch.isfinite(norm.running_mean).all() and torch.isfinite(std).all()):
            raise ValueError(
                "from_batch_norm(norm): expected finite running statistics, got NaN, infinity or a "
                "negative variance; recalibrate the model, or load a sound checkpoint"
            )
        layer.set_statistics(norm.running_mean, std)
    return layer


def prepare(
    model: nn.Module,
    setting: Setting,
    *,
    start: Literal["data", "statistics"] = "data",
    std_parametrization: Literal["log", "abs", "inv"] = "log",
    reduction: Literal["mean", "sum"] = "mean",
    nll_weight: float = 1.0,
    inject: bool = False,
) -> nn.Module:
    """Replace each BatchNorm by `BatchlessNorm`, and set the statistics.

    Args:
        model: The model, changed in place, or not at all if anything raises.
        setting: Its batches are the sample of ``start="data"``.
        start: ``"data"`` sets the statistics to those of the sample, layer by layer;
            ``"statistics"`` takes over the running statistics, so that evaluation stays as it is.
        std_parametrization: As in `BatchlessNorm`.
        reduction: As in `BatchlessNorm`.
        nll_weight: As in `BatchlessNorm`.
        inject: As in `BatchlessNorm`.

    Returns:
        The model.

    Raises:
        Unsuitable: The model has no BatchNorm, or one without the running statistics asked for.
        ValueError: An option has no such value, or the sample gives no finite statistics.
    """
    check_options("batchless-norm", std_parametrization, reduction, nll_weight)
    check_choice("batchless-norm", "start", start, ("data", "statistics"))
    norms = batch_norms(model, "batchless-norm")
    bare = [name for name, norm in norms.items() if getattr(norm, "running_mean", None) is None]
    if start == "statistics" and bare:
        raise Unsuitable(
            "batchless-norm(start='statistics'): expected BatchNorm layers with running "
            f"statistics, got {', '.join(bare)} without; use start='data'"
        )
    replacements: dict[nn.Module, nn.Module] = {
        norm: from_batch_norm(
            norm,
            std_parametrization=std_parametrization,
            reduction=reduction,
            nll_weight=nll_weight,
            inject=inject,
        )
        for norm in norms.values()
    }
    model = swap(model, replacements)
    if start == "statistics":
        setting.say(f"{len(norms)} BatchNorm layers became batchless with their running statistics")
        return model
    try:
        inputs = [inputs for inputs, _ in setting.batches]
        # One batch takes a single pass.
        alike = len({batch.shape[1:] for batch in inputs}) == 1
        found = start_from_data(model, [torch.cat(inputs)] if alike else inputs)
    except BaseException:
        swap(model, {new: old for old, new in replacements.items()})
        raise
    setting.say(f"{len(norms)} BatchNorm layers became batchless; {found}")
    return model


def parameter_groups(groups: list[Group], model: nn.Module, setting: Setting) -> list[Group]:
    """Exempt mu and s from weight decay: it would pull the statistics off the data."""
    return split_groups(groups, statistics_parameters(model), weight_decay=0.0)


def penalty(model: nn.Module) -> Tensor:
    """Return the layers' losses with their values taken off, as the public code adds them.

    The gradients are theirs; the value is 0, so that the loss stays the task's.
    """
    return collect_losses(model, silent=True)


CARD = Card(
    name="batchless-norm",
    title="Batchless normalisation",
    summary="Learns each channel's mean and deviation by gradient descent on a Gaussian's "
    "likelihood, and standardises with them.",
    room="norms",
    source=Source(
        authors="B. Berger",
        title="Batchless Normalization: How to Normalize Activations with just one Instance in "
        "Memory",
        year=2022,
        arxiv="2212.14729",
    ),
    state=("mean and log-deviation of each channel, as parameters",),
    best_for="Small batches, down to one sample at a time with accumulated gradients.",
    limits=(
        "Needs a loop that adds the layers' losses (or inject=True), and a sample of some hundred "
        "inputs to start from.",
        "The statistics follow the activations with a delay: at the same rate small networks "
        "learnt more slowly than with BatchNorm under SGD. reduction=sum shortens the delay, yet "
        "mostly made that worse at batches of 32; std_parametrization=inv diverged at a high rate.",
    ),
    departures=(
        "The loss is formed in training only.",
        "A channel without deviation in the sample starts at a deviation of 1e-3.",
    ),
)

METHOD = Method(card=CARD, prepare=prepare, parameter_groups=parameter_groups, penalty=penalty)
