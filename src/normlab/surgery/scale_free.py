"""Find the weights whose scale a normaliser takes away: L(a w) = L(w) for every a above 0."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from normlab.surgery.flow import Call, Flow, Sum, trace_flow

Granularity = Literal["filter", "layer"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_JOINT = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_NORMALISERS = (_BatchNorm, _InstanceNorm, *_JOINT)


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
    """Find the weights of linear and convolutional layers that normalisers directly follow.

    A further use of a layer's output is seen where it is a module, a ReLU or an addition that
    a module takes; leave out a layer whose output the model hands to another function as well.

    Args:
        model: Any module.
        inputs: What its forward takes; two samples are enough.
        granularity: ``"filter"``: each output unit is a group, in front of BatchNorm and
            InstanceNorm. ``"layer"``: the whole weight, or each group of a GroupNorm.

    Returns:
        The weights, shared ones once, and the layers left out, by name, with the reason.

    Raises:
        ValueError: Another granularity.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2))
        >>> find_scale_free_weights(model, torch.zeros(2, 4)).skipped
        {'3': 'no normaliser, or not a normaliser alone, takes its output'}
    """
    if granularity not in ("filter", "layer"):
        raise ValueError(
            f"find_scale_free_weights(granularity={granularity!r}): expected 'filter' or 'layer', "
            f"got {granularity!r}; use 'filter' in front of BatchNorm"
        )
    flow = trace_flow(model, *inputs)
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), []).append(module)
    findings, seen = Findings([], {}), set()
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if not isinstance(module, _LAYERS) or (weight is not None and id(weight) in seen):
            continue
        seen.add(id(weight))
        if weight is None:
            findings.skipped[name] = "its weight is re-parametrised"
            continue
        verdict = _examine(name, weight, owners[id(weight)], flow, granularity)
        if isinstance(verdict, str):
            findings.skipped[name] = verdict
        else:
            findings.weights.append(verdict)
    return findings


def _examine(
    name: str, weight: nn.Parameter, owners: list[nn.Module], flow: Flow, granularity: Granularity
) -> ScaleFreeWeight | str:
    """Return the weight with what moves along with it, or the reason why it must be skipped."""
    if not weight.requires_grad:
        return "it is frozen"
    layouts = {(getattr(owner, "groups", 1), isinstance(owner, _TRANSPOSED)) for owner in owners}
    if len(layouts) > 1 or not all(isinstance(owner, _LAYERS) for owner in owners):
        return "its weight is shared with a layer of another kind"
    conv_groups, transposed = layouts.pop()
    num_groups: set[int] = set()
    biases: dict[int, nn.Parameter] = {}
    statistics: dict[_NormBase, nn.Parameter | None] = {}
    calls = [call for owner in owners for call in flow.of(owner)]
    for call in calls:
        bias = call.module._parameters.get("bias")
        takers = _normalisers_after(call, flow)
        if not takers:
            return "no normaliser, or not a normaliser alone, takes its output"
        for taker in takers:
            norm = taker.module
            if isinstance(norm, _JOINT):
                if granularity == "filter":
                    return f"{type(norm).__name__} takes its output: use granularity='layer'"
                if bias is not None:
                    biases[id(bias)] = bias
                if not isinstance(norm, nn.GroupNorm):
                    num_groups.add(1)
                    continue
            wanted = 2 if isinstance(call.module, nn.Linear) else weight.dim()
            if taker.input_shape is None or len(taker.input_shape) != wanted:
                return "its output units are not the channels of the normaliser"
            channels = taker.input_shape[1]
            by_unit = channels if granularity == "filter" else 1
            num_groups.add(norm.num_groups if isinstance(norm, nn.GroupNorm) else by_unit)
            if isinstance(norm, _NormBase) and norm.running_mean is not None:
                others = any(other.source not in calls for other in flow.of(norm))
                if others or statistics.setdefault(norm, bias) is not bias:
                    return "its normaliser serves another layer, too"
    if not calls or (biases and statistics):
        return "normalisers of two kinds take its output" if calls else "it is not called"
    groups = num_groups.pop() if len(num_groups) == 1 else 1
    moved, tracked = tuple(biases.values()), tuple(statistics.items())
    return ScaleFreeWeight(name, weight, groups, conv_groups, transposed, moved, tracked)


def _normalisers_after(call: Call, flow: Flow) -> list[Call]:
    """Return the calls of normalisers that take a call's output; none if anything else does."""
    # A container only hands its input on; what it holds has calls of its own.
    takers = [
        other
        for other in flow.calls
        if other.source is call and not any(True for _ in other.module.children())
    ]
    activated = [source for relu in flow.functional_relus for source in relu.sources]
    sums = [s for s in (*activated, *(c.source for c in flow.calls)) if isinstance(s, Sum)]
    for addition in sums:
        sums += [term for term in addition.terms if isinstance(term, Sum)]
    elsewhere = [*activated, *(term for addition in sums for term in addition.terms)]
    alone = all(isinstance(taker.module, _NORMALISERS) for taker in takers)
    return takers if alone and not any(use is call for use in elsewhere) else []


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
