r"""Weight rescaling: set the norm of weights that feed a normaliser, in place of weight decay.

A weight in front of a normaliser is free of scale: its norm changes nothing but the size of the
next step. Rescaling sets that norm after the optimiser's step, so there is no decay coefficient.

Source: Z. Liu, Y. Cui, J. Wan, Y. Mao, A. B. Chan, "Weight Rescaling: Effective and Robust
Regularization for Deep Neural Networks with Batch Normalization", 2021, arXiv 2102.03497.

Departs:
    - "Unit norm" is read as the l2 norm of each filter or row, the finest group that is free of
      scale behind BatchNorm; the paper does not name the group.
    - A BatchNorm's running statistics move with its weight, so that evaluation right after a
      large rescale computes the same function.
    - In front of GroupNorm and LayerNorm, which keep what the bias adds, weight and bias are
      rescaled by one factor for each group of the normaliser.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from normlab.method import Card, Method, Setting, Source, Unsuitable
from normlab.optim.arguments import is_count, is_number, require
from normlab.optim.live import go_live, retire
from normlab.parameter_groups import Group, check_held, check_no_growth, split_groups
from normlab.surgery.scale_free import (
    Findings,
    Granularity,
    ScaleFreeWeight,
    by_unit,
    find_scale_free_weights,
    unit_norms,
)

KEY = "weight_rescaling"


@torch.no_grad()
def rescale_(
    weight: Tensor,
    target_norm: float = 1.0,
    *,
    num_groups: int | None = None,
    conv_groups: int = 1,
    transposed: bool = False,
) -> Tensor:
    r"""Set the norm of each group of output units in place; groups of zeros are left alone.

    .. math::
        w_i \leftarrow r \sqrt{k} \, w_i / \lVert w_i \rVert_2

    with k the number of units in a group.

    Args:
        weight: ``(out, in)`` or ``(out, in / G, *kernel)``; ``(in, out / G, *kernel)`` of a
            transposed convolution.
        target_norm: The norm r of one unit, above 0.
        num_groups: The number of groups, a divisor of ``out``; None for one a unit, 1 for the
            whole layer.
        conv_groups: The number G of groups of the convolution.
        transposed: Whether the convolution is transposed.

    Returns:
        The factor of each output unit ``(out,)``, in float32 if ``weight`` has a half precision.

    Raises:
        ValueError: A target that is not above 0, or groups that do not divide the units.

    Example:
        >>> weight = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
        >>> rescale_(weight)
        tensor([0.2000, 1.0000])
        >>> weight
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    valid = is_number(target_norm) and target_norm > 0
    require(valid, "rescale_", "target_norm", target_norm, "a number above 0")
    units = by_unit(weight, conv_groups, transposed)
    out = units.shape[0] * units.shape[1]
    valid = num_groups is None or (is_count(num_groups) and out % num_groups == 0)
    require(valid, "rescale_", "num_groups", num_groups, f"None or a divisor of {out}")
    norms = unit_norms(units, num_groups)
    size = out // len(norms)
    targets = torch.full_like(norms, target_norm * math.sqrt(size))
    scale = _factors(norms, targets).repeat_interleave(size)
    units.mul_(_along(scale, units))
    return scale


def _factors(norms: Tensor, targets: Tensor, threshold: float = 0.0) -> Tensor:
    chosen = (norms > threshold * targets) & (targets > 0)
    return torch.where(chosen, targets / norms, 1.0)


def _along(scale: Tensor, units: Tensor) -> Tensor:
    return scale.view(*units.shape[:2], *(1,) * (units.dim() - 2))


class WeightRescaler:
    """Rescales weights after the optimiser's step.

    The step counter, and the initial norms where they are the targets, stand in
    ``optimizer.param_groups[0]["weight_rescaling"]``, so that ``optimizer.state_dict()`` holds
    them and training resumes exactly. An optimiser that has them from a checkpoint, or is a copy,
    goes on from there; a number for ``target_norm`` replaces the initial norms. As in torch, copies
    have no hooks and need a rescaler of their own.

    Args:
        optimizer: The optimiser; weights that it does not hold, or whose biases would have to move
            along and are not held, are left alone.
        weights: What `find_scale_free_weights` found.
        target_norm: The norm r of an output unit, above 0; a group of k units gets r sqrt(k).
            ``"init"``: the norm that each group has now.
        every: Rescale after every so many steps, at least 1; the number of batches for once per
            epoch.
        threshold: Rescale only groups whose norm is above ``threshold`` times their target, at
            least 0; 1 makes the target an upper bound.
        rescale_state: Whether to multiply the momentum of SGD, or the moments of Adam, by 1/s (and
            1/s^2) where a weight is multiplied by s. With the rate multiplied by s^2 (SGD) or s
            (Adam), rescaling then changes nothing in how the directions train.

    Raises:
        ValueError: A value out of its range, an optimiser that another rescaler acts on, initial
            norms in it of other weights, or ``rescale_state`` for an optimiser other than SGD, Adam
            and AdamW.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> WeightRescaler(optimizer, find_scale_free_weights(model, torch.zeros(2, 4)).weights,
        ...                target_norm=2.0).rescale()
        >>> model[0].weight.detach().norm(dim=1).round(decimals=4)
        tensor([2., 2., 2.])
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        weights: Sequence[ScaleFreeWeight],
        *,
        target_norm: float | Literal["init"] = 1.0,
        every: int = 1,
        threshold: float = 0.0,
        rescale_state: bool = False,
    ) -> None:
        first, name = optimizer.param_groups[0], "WeightRescaler"
        valid = target_norm == "init" or (is_number(target_norm) and target_norm > 0)
        require(valid, name, "target_norm", target_norm, "a number above 0 or 'init'")
        require(is_count(every), name, "every", every, "1, 2, 3, ...")
        valid = is_number(threshold) and threshold >= 0
        require(valid, name, "threshold", threshold, "a number of at least 0")
        plain = isinstance(optimizer, (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW))
        valid, kind = plain or not rescale_state, type(optimizer).__name__
        require(valid, name, "optimizer", kind, "SGD, Adam or AdamW for rescale_state=True")
        check_no_growth(name, optimizer)
        decay = {id(p): g.get("weight_decay") for g in optimizer.param_groups for p in g["params"]}
        self.optimizer = optimizer
        self.weights = [
            weight
            for weight in weights
            if all(id(parameter) in decay for parameter in (weight.weight, *weight.biases))
        ]
        self.every = every
        self.threshold = threshold
        self.rescale_state = rescale_state
        decayed = [weight.name for weight in self.weights if decay[id(weight.weight)]]
        if decayed:
            warnings.warn(
                f"WeightRescaler: weight decay is set on {', '.join(decayed)}, whose norm is "
                "set anyway; use weight_decay=0 for rescaled weights",
                stacklevel=2,
            )
        self._targets = [weight.group_norms() for weight in self.weights]
        progress = dict(first.get(KEY, {"step": 0}))
        if target_norm == "init":
            initial = progress.setdefault("targets", self._targets)
            shapes = [target.shape for target in self._targets]
            valid = shapes == [target.shape for target in initial]
            require(valid, name, "weights", len(shapes), "the weights of the checkpoint")
        else:
            progress.pop("targets", None)
            for weight, target in zip(self.weights, self._targets, strict=True):
                target.fill_(float(target_norm) * math.sqrt(weight.group_size()))
        go_live(self, optimizer, KEY)
        first[KEY] = progress
        self._hook = optimizer.register_step_post_hook(self._after_step)

    def remove(self) -> None:
        """Stop rescaling."""
        self._hook.remove()
        retire(self.optimizer, KEY)

    def _after_step(self, *_: Any) -> None:
        state = self.optimizer.param_groups[0].setdefault(KEY, {"step": 0})
        state["step"] += 1
        if state["step"] % self.every == 0:
            self.rescale()

    @torch.no_grad()
    def rescale(self) -> None:
        """Rescale now, whatever the step."""
        # Loading a checkpoint replaces the optimiser's groups, so they are read anew each time.
        state = self.optimizer.param_groups[0].get(KEY, {})
        all_targets = state.get("targets", self._targets)
        all_norms = [weight.group_norms() for weight in self.weights]
        tensors: list[Tensor] = []
        factors: list[Tensor] = []
        # The groups of a device are treated at once, so that a step makes few small calls.
        for device in {norms.device for norms in all_norms}:
            here = [i for i, norms in enumerate(all_norms) if norms.device == device]
            norms = torch.cat([all_norms[i] for i in here])
            targets = torch.cat([all_targets[i].to(device) for i in here])
            scales = _factors(norms, targets, self.threshold)
            parts = scales.split([len(all_norms[i]) for i in here])
            for i, part in zip(here, parts, strict=True):
                weight = self.weights[i]
                size = weight.group_size()
                scale = part if size == 1 else part.repeat_interleave(size)
                for tensor, factor in self._products(weight, scale):
                    tensors.append(tensor)
                    factors.append(factor)
        if tensors:
            torch._foreach_mul_(tensors, factors)  # pyright: ignore[reportPrivateImportUsage]

    def _products(self, weight: ScaleFreeWeight, scale: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return each tensor that moves with a weight, and by what to multiply it."""
        along = _along(scale, weight.units(weight.weight))
        products = [(weight.units(weight.weight), along)]
        products += [(bias, scale) for bias in weight.biases]
        for norm, bias in weight.statistics:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            if bias is not None:
                norm.running_mean.add_(bias * (1 / scale - 1))  # the bias is not multiplied
            products += [(norm.running_mean, scale), (norm.running_var, scale.square())]
        for parameter in (weight.weight, *weight.biases) if self.rescale_state else ():
            kept = self.optimizer.state.get(parameter, {})
            for name in ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
                if kept.get(name) is not None:
                    power = -2 if name.endswith("sq") else -1
                    is_weight = parameter is weight.weight
                    tensor = weight.units(kept[name]) if is_weight else kept[name]
                    products.append((tensor, (along if is_weight else scale) ** power))
        return products


_FOUND: WeakKeyDictionary[nn.Module, tuple[tuple[int | str, ...], Findings]] = WeakKeyDictionary()
"""What was found in a model last, because each part of the method looks, and looking takes time."""


def _found(model: nn.Module, setting: Setting, granularity: Granularity) -> Findings:
    parts = (*model.modules(), *model.parameters())
    key = (granularity, *map(id, parts), *(part.requires_grad for part in model.parameters()))
    if model not in _FOUND or _FOUND[model][0] != key:
        inputs = setting.batches[0][0][:2]
        _FOUND[model] = key, find_scale_free_weights(model, inputs, granularity=granularity)
    found = _FOUND[model][1]
    if not found.weights:
        reasons = "; ".join(f"{name}: {why}" for name, why in found.skipped.items())
        raise Unsuitable(
            "weight-rescaling(model): expected a weight whose scale a normaliser takes away, got "
            f"none ({reasons or 'there is no such layer'}); keep the normalisers"
        )
    return found


def prepare(
    model: nn.Module, setting: Setting, *, granularity: Granularity = "filter"
) -> nn.Module:
    """Refuse a model in which no weight is free of scale; the model is not changed."""
    _found(model, setting, granularity)
    return model


def parameter_groups(
    groups: list[Group], model: nn.Module, setting: Setting, *, granularity: Granularity = "filter"
) -> list[Group]:
    """Exempt the rescaled weights from weight decay."""
    found = _found(model, setting, granularity)
    return split_groups(groups, [weight.weight for weight in found.weights], weight_decay=0.0)


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    setting: Setting,
    *,
    target_norm: float | Literal["init"] = 1.0,
    every: int = 1,
    granularity: Granularity = "filter",
    threshold: float = 0.0,
    rescale_state: bool = False,
) -> None:
    """Rescale after the optimiser's steps, and say which layers are skipped."""
    found = _found(model, setting, granularity)
    moved = [parameter for one in found.weights for parameter in (one.weight, *one.biases)]
    check_held("weight-rescaling", moved, optimizer)
    rescaler = WeightRescaler(
        optimizer,
        found.weights,
        target_norm=target_norm,
        every=every,
        threshold=threshold,
        rescale_state=rescale_state,
    )
    setting.say(f"{len(rescaler.weights)} weights are rescaled by {granularity}")
    for reason in dict.fromkeys(found.skipped.values()):
        names = [name for name, why in found.skipped.items() if why == reason]
        setting.say(f"not rescaled, because {reason}: {', '.join(names)}")


CARD = Card(
    name="weight-rescaling",
    title="Weight rescaling",
    summary="Sets the norm of every filter in front of a normaliser after each step, in place of "
    "weight decay.",
    room="optim",
    source=Source(
        authors="Z. Liu, Y. Cui, J. Wan, Y. Mao, A. B. Chan",
        title="Weight Rescaling: Effective and Robust Regularization for Deep Neural Networks "
        "with Batch Normalization",
        year=2021,
        arxiv="2102.03497",
    ),
    batch_of_one="as the model",
    keeps_evaluation=True,
    state=("the step counter, and the initial norms if target_norm is 'init'",),
    best_for="Networks with BatchNorm whose weight decay nobody wants to tune.",
    limits=(
        "Weights whose scale matters, the classifier's above all, are left alone.",
        "The model is copied and run a few times to see which those are.",
        "A rate tuned with weight decay has to be converted, see equivalent_lr.",
    ),
    departures=(
        "The norm is that of each filter or row; the paper does not name the group.",
        "Running statistics are moved with the weights.",
        "In front of GroupNorm and LayerNorm weight and bias are rescaled together.",
    ),
)

METHOD = Method(card=CARD, prepare=prepare, parameter_groups=parameter_groups, attach=attach)
