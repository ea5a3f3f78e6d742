"""Put a component in front of every weight layer but the first, in a model of any shape.

ResNets and sequences of layers can be built anew in the order of the paper (`ic_layer`). Other
models keep their own order, and this surgery changes what stands in it: each BatchNorm goes, and
each convolution and linear layer is fed through a component.

Departs:
    - Activations stay where the model has them, also after a residual sum; none works in place.
    - The readout is fed component, pool, linear where the pool is a module that leaves one
      position, as in the paper's networks; otherwise the component stands at the linear layer.
    - Convolutions on single positions (squeeze-and-excitation) get none: their input is already a
      mean over a map, and a batch of one would have nothing to standardise.
    - Linear layers on sequences ``(N, L, C)`` get none: their channels are the last axis.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from math import prod
from typing import TypeGuard

from torch import Tensor, nn

from normlab.method import Unsuitable
from normlab.surgery.flow import Call, Flow, Operation, Source, Sum, trace_flow
from normlab.surgery.swap import BATCH_NORMS, modules_of, swap

_CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d,
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
_WEIGHTS = (*_CONVOLUTIONS, nn.Linear)
_AVERAGES = (
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
)  # fmt: skip
_SILENT = (nn.Flatten, nn.Identity, nn.modules.dropout._DropoutNd)


def rearrange(
    model: nn.Module, inputs: Tensor, component: Callable[[int, int], nn.Module]
) -> tuple[nn.Module, int, dict[str, str]]:
    """Take out each BatchNorm and feed each weight layer but the stem and shortcuts by a component.

    Args:
        model: Any module, changed in place.
        inputs: Two samples, to see in which order the model uses its layers.
        component: ``(num_features, spatial_dims) -> module``.

    Returns:
        The model, the number of components, and the weight layers without one, with the reason.

    Raises:
        Unsuitable: There is no place for a component. Nothing is changed then.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> rearrange(model, torch.zeros(2, 4), lambda width, dims: nn.BatchNorm1d(width))[1]
        1
    """
    flow = trace_flow(model, inputs)
    names = {module: name for name, module in model.named_modules()}
    weights = [call for call in flow.calls if type(call.module) in _WEIGHTS]
    shortcuts = _shortcuts(flow)
    places: dict[nn.Module, tuple[int, int]] = {}
    skipped: dict[str, str] = {}
    for call in weights:
        layer, shape = call.module, call.input_shape
        assert shape is not None
        if layer is weights[0].module:
            skipped[names[layer]] = "it is the stem"
        elif layer in shortcuts:
            skipped[names[layer]] = "it is a shortcut, which takes its input raw"
        elif isinstance(layer, nn.Linear) and len(shape) != 2:
            skipped[names[layer]] = "its channels are the last axis"
        elif not isinstance(layer, nn.Linear) and prod(shape[2:]) == 1:
            skipped[names[layer]] = "it works on single positions"
        else:
            pool = _average_before(call, flow) if isinstance(layer, nn.Linear) else None
            fed = call if pool is None else pool
            assert fed.input_shape is not None
            places[fed.module] = (fed.input_shape[1], len(fed.input_shape) - 2)
    if not places:
        raise Unsuitable(
            "ic-layer(model): expected a weight layer behind another one, with channels on the "
            f"axis after the samples, got {type(model).__name__} without any; use a deeper model"
        )
    replacements: dict[nn.Module, nn.Module] = {
        layer: nn.Sequential(OrderedDict(ic=component(*place), layer=layer))
        for layer, place in places.items()
    }
    for module in model.modules():
        # A BatchNorm that is gone no longer hands on a tensor of its own to write into.
        if getattr(module, "inplace", False) is True:
            setattr(module, "inplace", False)  # noqa: B010 - not an attribute of every module
    norms = modules_of(model, BATCH_NORMS).values()
    model = swap(model, {**replacements, **{norm: nn.Identity() for norm in norms}})
    return model, len(places), skipped


def _average_before(call: Call, flow: Flow) -> Call | None:
    """Return the call of the pool that leaves one position and alone feeds a linear layer."""
    source = call.source
    while _only_hands_on(source):
        source = source.sources[0] if isinstance(source, Operation) else source.source
    if not isinstance(source, Call) or type(source.module) not in _AVERAGES:
        return None
    shape = source.input_shape
    if call.input_shape is None or shape is None or len(flow.of(source.module)) > 1:
        return None
    return source if call.input_shape[1:] == shape[1:2] else None


def _only_hands_on(source: Source) -> TypeGuard[Call | Operation]:
    if isinstance(source, Operation):
        return len(source.sources) == 1
    return isinstance(source, Call) and isinstance(source.module, _SILENT)


def _shortcuts(flow: Flow) -> set[nn.Module]:
    """Return the weight layers that stand alone on the short path around a longer branch."""
    found: set[nn.Module] = set()
    for addition in _sums(flow):
        paths = [list(_back(term)) for term in addition.terms]
        for short in paths:
            for long in paths:
                meeting = next((node for node in short if node in long), None)
                if short is long or meeting is None:
                    continue
                one, several = (
                    [
                        node.module
                        for node in path[: path.index(meeting)]
                        if isinstance(node, Call) and type(node.module) in _WEIGHTS
                    ]
                    for path in (short, long)
                )
                if len(one) == 1 and len(several) > 1:
                    found.add(one[0])
    return found


def _sums(flow: Flow) -> Iterator[Sum]:
    waiting: list[Source] = [call.source for call in flow.calls]
    waiting += [source for operation in flow.operations for source in operation.sources]
    seen: set[int] = set()
    while waiting:
        node = waiting.pop()
        if isinstance(node, Sum) and id(node) not in seen:
            seen.add(id(node))
            yield node
            waiting += node.terms


def _back(source: Source) -> Iterator[Call | Sum | Operation]:
    """Walk from where a tensor was made to where its first part came from, up to a sum."""
    while source is not None:
        yield source
        if isinstance(source, Call):
            source = source.source
        elif isinstance(source, Operation):
            source = source.sources[0] if source.sources else None
        else:
            return
