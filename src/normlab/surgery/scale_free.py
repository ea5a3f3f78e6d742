"""Find the weights whose scale a normaliser takes away: L(a w) = L(w) for every a above 0."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrize

from normlab.surgery.flow import Flow, trace_flow
from normlab.surgery.invariance import Scaled, Twin

Granularity = Literal["filter", "layer"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_JOINT = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_NORMALISERS = (_BatchNorm, _InstanceNorm, *_JOINT)
_CANNOT_MOVE = "running statistics further on cannot move along"


@dataclass(frozen=True, eq=False)
class ScaleFreeWeight:
    """A weight whose output goes into normalisers and nowhere else.

    Attributes:
        name: The layer's qualified name; the first one if several share the weight.
        weight: The weight.
        num_groups: The number of groups of output units that are rescaled by one factor each.
        conv_groups: As in `rescale_`.
        transposed: As in `rescale_`.
        biases: Biases that have to be rescaled along, one value a unit.
        statistics: Normalisers with running statistics, each with the bias in front of it.
    """

    name: str
    weight: nn.Parameter
    num_groups: int
    conv_groups: int = 1
    transposed: bool = False
    biases: tuple[nn.Parameter, ...] = ()
    statistics: tuple[tuple[_NormBase, nn.Parameter | None], ...] = ()

    def units(self, tensor: Tensor) -> Tensor:
        """Return a tensor in the weight's layout as a view ``(G, out / G, ...)``."""
        return by_unit(tensor, self.conv_groups, self.transposed)

    def group_norms(self) -> Tensor:
        """Return the norm of each group ``(num_groups,)``."""
        return unit_norms(self.units(self.weight.detach()), self.num_groups)

    def group_size(self) -> int:
        """Return the number of output units in a group."""
        return math.prod(self.units(self.weight).shape[:2]) // self.num_groups


class Findings(NamedTuple):
    """What `find_scale_free_weights` found, and each layer it skipped with the reason."""

    weights: list[ScaleFreeWeight]
    skipped: dict[str, str]


def find_scale_free_weights(
    model: nn.Module, *inputs: Any, granularity: Granularity = "filter"
) -> Findings:
    """Find the weights whose scale does not matter to the outputs in training mode.

    It is computed, not read from names or classes (see `normlab.surgery.invariance`), so
    normalisers of anybody's own are understood, wherever they stand. Running statistics move along
    where a normaliser of torch takes a layer's very output. What is compiled runs as it was
    written.

    Args:
        model: Any module that can be copied.
        inputs: What its forward takes; two samples are enough.
        granularity: ``"filter"``: each output unit is a group, as in front of BatchNorm and
            InstanceNorm; where its bias has to go along, as in front of a normaliser that keeps the
            mean, it does. ``"layer"``: the whole weight, or as many groups as can be scaled apart,
            as in front of GroupNorm.

    Returns:
        The weights, shared ones once, and the layers left out, by name, with the reason.

    Raises:
        ValueError: Another granularity.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2))
        >>> find_scale_free_weights(model, torch.zeros(2, 4)).skipped
        {'3': 'the outputs change with its scale'}
    """
    if granularity not in ("filter", "layer"):
        raise ValueError(
            f"find_scale_free_weights(granularity={granularity!r}): expected 'filter' or 'layer', "
            f"got {granularity!r}; use 'filter' in front of BatchNorm"
        )
    flow, twin = trace_flow(model, *inputs), Twin(model, *inputs)
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), []).append(module)
    findings, seen = Findings([], {}), set()
    scaled: list[Scaled] = []
    for name, module in model.named_modules():
        if isinstance(module, _LAYERS) and "weight" not in module._parameters:
            findings.skipped[name] = "its weight is re-parametrised"
        if isinstance(module, (*_NORMALISERS, parametrize.ParametrizationList)):
            continue
        for key, weight in module._parameters.items():
            if weight is None or weight.dim() < 2 or id(weight) in seen:
                continue
            seen.add(id(weight))
            full = name if key == "weight" else f"{name}.{key}".removeprefix(".")
            verdict = _examine(full, weight, owners[id(weight)], flow, twin, granularity)
            if isinstance(verdict, str):
                findings.skipped[full] = verdict
            else:
                findings.weights.append(verdict)
                scaled.append(_in_twin(verdict, twin, verdict.num_groups))
    if not twin.keeps_evaluation(scaled):
        for weight, one in zip(tuple(findings.weights), scaled, strict=True):
            if not twin.keeps_evaluation([one]):
                findings.weights.remove(weight)
                findings.skipped[weight.name] = _CANNOT_MOVE
    return findings


def _examine(
    name: str,
    weight: nn.Parameter,
    owners: list[nn.Module],
    flow: Flow,
    twin: Twin,
    granularity: Granularity,
) -> ScaleFreeWeight | str:
    """Return the weight with what moves along with it, or the reason to leave it out."""
    if not weight.requires_grad:
        return "it is frozen"
    if twin.of(weight).grad is None:
        return "it is not called"
    of_torch = all(isinstance(owner, _LAYERS) for owner in owners)
    layouts = {
        (getattr(owner, "groups", 1), isinstance(owner, _TRANSPOSED)) if of_torch else (1, False)
        for owner in owners
    }
    if len(layouts) > 1:
        return "its weight is shared with a layer of another kind"
    found = ScaleFreeWeight(name, weight, 1, *layouts.pop())
    units = math.prod(found.units(weight).shape[:2])
    if twin.is_free(_in_twin(found, twin, units)):
        found = replace(found, num_groups=units if granularity == "filter" else 1)
    else:
        # A normaliser that keeps the mean, or shares it among units, needs the bias to go along.
        biases = {id(b): b for owner in owners if (b := owner._parameters.get("bias")) is not None}
        tied = all(twin.of(b).grad is not None and len(b) == units for b in biases.values())
        found = replace(found, biases=tuple(biases.values()) if of_torch and tied else ())
        counts = [count for count in range(units, 0, -1) if units % count == 0]
        most = next((count for count in counts if twin.is_free(_in_twin(found, twin, count))), 0)
        if most == 0:
            return "the outputs change with its scale"
        if not all(bias.requires_grad for bias in found.biases):
            return "its bias is frozen"
        found = replace(found, num_groups=most)
    statistics = _statistics(owners, flow, units, with_bias=not found.biases)
    if isinstance(statistics, str):
        return statistics
    found = replace(found, statistics=statistics)
    if granularity == "filter" and found.num_groups < units:
        whole = twin.keeps_evaluation([_in_twin(found, twin, found.num_groups)])
        together = "its units are free of scale only together: use granularity='layer'"
        return together if whole else _CANNOT_MOVE
    return found


def _in_twin(found: ScaleFreeWeight, twin: Twin, num_groups: int) -> Scaled:
    weight, biases = twin.of(found.weight), [twin.of(bias) for bias in found.biases]
    return Scaled(
        num_groups,
        [found.units(weight.detach()), *(bias.detach()[None] for bias in biases)],
        [found.units(weight.grad), *(bias.grad[None] for bias in biases)],
        [
            (twin.of(norm), None if bias is None else twin.of(bias).detach())
            for norm, bias in found.statistics
        ],
    )


def _statistics(
    owners: list[nn.Module], flow: Flow, units: int, *, with_bias: bool
) -> tuple[tuple[_NormBase, nn.Parameter | None], ...] | str:
    """Return the normalisers whose running statistics move with a weight, or why they cannot."""
    calls = [call for owner in owners for call in flow.of(owner)]
    found: dict[_NormBase, nn.Parameter | None] = {}
    for call in calls:
        bias = call.module._parameters.get("bias") if with_bias else None
        for taker in flow.calls:
            norm = taker.module
            if (
                taker.source is call
                and isinstance(norm, _NormBase)
                and norm.running_mean is not None
            ):
                if len(norm.running_mean) != units:
                    return "its output units are not the channels of the normaliser"
                others = any(use.source not in calls for use in flow.of(norm))
                if others or found.setdefault(norm, bias) is not bias:
                    return "its normaliser serves another layer, too"
    return tuple(found.items())


def by_unit(weight: Tensor, conv_groups: int, transposed: bool) -> Tensor:
    """Return a weight, or a tensor in its layout, as a view ``(G, out / G, ...)``."""
    view = weight.unflatten(0, (conv_groups, -1))
    return view.transpose(1, 2) if transposed else view


def unit_norms(units: Tensor, num_groups: int | None) -> Tensor:
    """Return the norm of each group of output units; None makes every unit a group of its own.

    Args:
        units: A weight as `by_unit` views it.
        num_groups: The number of groups, a divisor of the number of units.
    """
    kind = torch.promote_types(units.dtype, torch.float32)
    norms = torch.linalg.vector_norm(units, dim=list(range(2, units.dim())), dtype=kind).flatten()
    if num_groups is None or num_groups == len(norms):
        return norms
    return torch.linalg.vector_norm(norms.unflatten(0, (num_groups, -1)), dim=1)
