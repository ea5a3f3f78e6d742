"""Find pairs of layers between which a network can grow wider without changing its function.

A unit can be added where a weight layer makes it and exactly one other weight layer reads it. What
lies between the two must treat every unit by itself: batch normalisation, depth-wise convolutions,
activations, dropout, pools, a flatten. This is read from one traced forward pass. That nothing
else reads the units is seen by differentiating, whatever operation it may be; that functions such
as ``reshape`` keep units apart and follow their number, by a pass with one unit more.

Departs: `clamp_relus` gives ReLUs derivative 1 at zero, where new units stand and torch takes 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.pooling import (
    _AdaptiveAvgPoolNd,
    _AdaptiveMaxPoolNd,
    _AvgPoolNd,
    _MaxPoolNd,
)

from normlab.growth.at_zero import FUNCTIONS, ClampReLU, at_zero
from normlab.growth.probes import FLATTENING, follows_width, read_elsewhere
from normlab.norms.none import ChannelBias
from normlab.surgery.flow import Call, Flow, Operation, trace_flow
from normlab.surgery.swap import swap

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
WeightLayer = nn.Linear | Convolution
Step = nn.Module | str
"""What lies between a pair: a module, or the name of a function."""

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONVOLVE: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
}
_NORMS = (_NormBase, ChannelBias)
_POOLS = (_AvgPoolNd, _AdaptiveAvgPoolNd, _MaxPoolNd, _AdaptiveMaxPoolNd)
_SILENT = (nn.Identity, _DropoutNd)


@dataclass(frozen=True, eq=False)
class GrowthPair:
    """Two weight layers and what lies between them.

    Attributes:
        name: The qualified name of the first layer.
        first: The layer that makes the units.
        second: The layer that reads them.
        steps: What lies between, in order.
        slope: The derivative at zero of all activations between, not 0.
    """

    name: str
    first: WeightLayer
    second: WeightLayer
    steps: tuple[Step, ...]
    slope: float = 1.0

    @property
    def width(self) -> int:
        """The number of units."""
        return self.first.weight.shape[0]

    @property
    def norms(self) -> list[nn.Module]:
        """The normalisers between, with running statistics or a shift for each unit."""
        return [step for step in self.steps if isinstance(step, _NORMS)]

    @property
    def normalised(self) -> bool:
        """Whether a unit that is zero on all of the batch would be divided by its deviation."""
        return any(isinstance(step, _NormBase) for step in self.steps)

    @property
    def depthwise(self) -> list[Convolution]:
        """The depth-wise convolutions between."""
        return [step for step in self.steps if isinstance(step, Convolution)]

    @property
    def taps(self) -> tuple[int, ...]:
        """The shape of one unit's weights for one output of the second layer.

        A kernel; empty where the second layer is linear and reads one value a unit, ``(P,)`` where
        a flatten hands it P of them.
        """
        if isinstance(self.second, nn.Linear):
            positions = self.second.in_features // self.width
            return () if positions == 1 else (positions,)
        return tuple(self.second.kernel_size)

    @property
    def num_taps(self) -> int:
        """The number of one unit's weights for one output of the second layer."""
        return prod(self.taps)

    @property
    def pointwise(self) -> bool:
        """Whether all that lies between keeps positions apart."""
        spatial = (*_POOLS, nn.Flatten, *_LAYERS)
        return not any(
            isinstance(step, (str, *spatial)) and step not in FUNCTIONS for step in self.steps
        )

    def read(self, z: Tensor) -> Tensor:
        """Return what new units contribute to each output through each tap alone, near zero.

        The activations' slope is left out; the other steps act as they do on a new unit.

        Args:
            z: Values ``(N, num_taps, *)`` in place of the first layer's output, of which the r-th
                channel is read by the r-th tap.

        Returns:
            The sum of what the taps read, ``(N, *)``, in the second layer's output positions.
        """
        for step in self.steps:
            if isinstance(step, Convolution):
                z = _identity_convolution(step, z)
            elif isinstance(step, (*_POOLS, nn.Flatten)):
                z = step(z)
            elif step in FLATTENING:
                z = z.flatten(1)
            elif step == "mean" and z.dim() > 2:
                z = z.flatten(2).mean(2)
        taps = torch.eye(self.num_taps, dtype=z.dtype, device=z.device)
        if isinstance(self.second, nn.Linear):
            return z @ taps.flatten()
        kernel = taps.unflatten(1, self.taps).unsqueeze(0)
        return self.second._conv_forward(z, kernel, None).squeeze(1)


class Pairs(NamedTuple):
    """What `find_pairs` found, and each weight layer it left out with the reason."""

    pairs: list[GrowthPair]
    skipped: dict[str, str]


def find_pairs(model: nn.Module, *inputs: Any, names: Iterable[str] | None = None) -> Pairs:
    """Find the pairs of layers between which a model can grow.

    Args:
        model: Any module; nothing in it is changed.
        inputs: What its forward takes; two samples are enough.
        names: The first layers of the pairs wanted; None for all that fit.

    Returns:
        The pairs in the order of the forward pass, and the layers left out by name.

    Raises:
        ValueError: A name is not that of a pair; the message has the reason.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        >>> pairs, skipped = find_pairs(model, torch.zeros(2, 4))
        >>> [(pair.name, pair.width) for pair in pairs], skipped
        ([('0', 3)], {'2': 'nothing takes its output'})
    """
    flow = trace_flow(model, *inputs)
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    modules = {call.module: call.name for call in flow.calls if isinstance(call.module, _LAYERS)}
    found = Pairs([], {})
    for module, name in modules.items():
        pair = _examine(name, module, model, flow, owners)
        if isinstance(pair, GrowthPair) and read_elsewhere(model, inputs, pair):
            pair = "something else takes its output, too"
        if isinstance(pair, GrowthPair) and not follows_width(model, inputs, pair):
            pair = "what lies behind it mixes its units, or has their number written into it"
        if isinstance(pair, GrowthPair):
            found.pairs.append(pair)
        else:
            found.skipped[name] = pair
    return found if names is None else _named(found, tuple(names))


def _named(found: Pairs, names: tuple[str, ...]) -> Pairs:
    pairs = {pair.name: pair for pair in found.pairs}
    for name in names:
        if name in found.skipped:
            raise ValueError(
                f"find_pairs(names={name!r}): expected a layer with one reader, got one that does "
                f"not fit: {found.skipped[name]}; leave it out"
            )
        if name not in pairs:
            known = [*pairs, *found.skipped]
            near = get_close_matches(name, known, n=1, cutoff=0.0)
            raise ValueError(
                f"find_pairs(names={name!r}): expected the name of a linear or convolutional "
                f"layer, got {name!r}; {f'do you mean {near[0]!r}?' if near else 'there is none'}"
            )
    return Pairs([pairs[name] for name in pairs if name in names], found.skipped)


def clamp_relus(model: nn.Module, pairs: Iterable[GrowthPair]) -> int:
    """Replace the ReLUs between pairs by `ClampReLU`, in the model; the pairs are to be found anew.

    Args:
        model: The model, changed in place.
        pairs: Pairs of it.

    Returns:
        How many modules were replaced.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> clamp_relus(model, find_pairs(model, torch.zeros(2, 4)).pairs)
        1
        >>> model[1]
        ClampReLU()
    """
    steps = {step for pair in pairs for step in pair.steps}
    bounds = {nn.ReLU: None, nn.ReLU6: 6.0}
    clamps: dict[nn.Module, nn.Module] = {
        step: ClampReLU(bounds[type(step)])
        for step in model.modules()
        if step in steps and type(step) in bounds
    }
    swap(model, clamps)
    return len(clamps)


def _examine(
    name: str, first: nn.Module, model: nn.Module, flow: Flow, owners: dict[int, int]
) -> GrowthPair | str:
    """Return the pair that starts with a layer, or the reason why there is none."""
    reason = _unfit(first, flow, owners)
    if reason is not None:
        return reason
    assert isinstance(first, WeightLayer)
    leaves = {n for n, module in model.named_modules() if not any(True for _ in module.children())}
    steps: list[Step] = []
    slope, current = 1.0, flow.of(first)[0]
    flat = isinstance(first, nn.Linear) and len(current.input_shape or ()) != 2
    while True:
        takers = _takers(current, flow, leaves)
        if len(takers) != 1:
            return "several layers take its output" if takers else "nothing takes its output"
        (current,) = takers
        step = current.module if isinstance(current, Call) else current.name
        title = type(step).__name__ if isinstance(step, nn.Module) else f"{step}()"
        if isinstance(step, _LAYERS) and not _is_depthwise(step):
            reason = _unfit(step, flow, owners)
            if reason is not None:
                return f"{title} after it: {reason}"
            return _pair(name, first, step, steps, slope)
        zero = at_zero(step)
        if zero is not None:
            if zero[0] != 0:
                return f"{title} is not 0 at zero"
            # The derivative of torch's ReLU is replaced by `clamp_relus`.
            clampable = isinstance(step, nn.ReLU | nn.ReLU6)
            if zero[1] == 0 and not clampable:
                hint = " (use nn.ReLU)" if str(step).startswith("relu") else ""
                return f"{title} has derivative 0 at zero{hint}"
            slope *= zero[1]
        elif isinstance(step, (*_NORMS, *_LAYERS)):
            misfit = isinstance(step, _LAYERS) and _unfit(step, flow, owners, depthwise=True)
            sizes = {len(tensor) for tensor in step.state_dict().values() if tensor.dim()}
            if flat or misfit or not sizes <= {first.weight.shape[0]}:
                return f"{title} takes its output in a way that does not fit"
            if len(flow.of(step)) != 1 or any(owners[id(p)] > 1 for p in step.parameters()):
                return f"{title} takes its output and serves another layer, too"
        elif isinstance(step, (*_POOLS, nn.Flatten)) or step in (*FLATTENING, "mean"):
            whole = not isinstance(step, nn.Flatten) or (step.start_dim, step.end_dim) == (1, -1)
            if isinstance(first, nn.Linear) or not whole:
                return f"{title} takes its output in a way that does not fit"
        elif not isinstance(step, _SILENT):
            return f"{title} takes its output"
        steps.append(step)


def _pair(
    name: str, first: WeightLayer, second: Any, steps: list[Step], slope: float
) -> GrowthPair | str:
    if not any(at_zero(step) for step in steps):
        return "there is no activation before the next layer"
    dense = isinstance(second, nn.Linear)
    flattened = any(isinstance(step, nn.Flatten) or step in FLATTENING for step in steps)
    averaged = "mean" in steps
    width = first.weight.shape[0]
    if second.weight.shape[1] % width or (not dense and second.weight.shape[1] != width):
        return "the next layer does not read its units one by one"
    to_rows = flattened or averaged
    if (isinstance(first, nn.Linear) != dense and not to_rows) or (to_rows and not dense):
        return "the next layer reads another axis"
    if averaged and second.weight.shape[1] != width:
        return "mean() takes its output in a way that does not fit"
    return GrowthPair(name, first, second, tuple(steps), slope)


def _unfit(
    layer: nn.Module, flow: Flow, owners: dict[int, int], depthwise: bool = False
) -> str | None:
    """Return the reason why a weight layer cannot change its size, or None if it can."""
    if "weight" not in layer._parameters:
        return "its weight is re-parametrised"
    if type(layer) not in _LAYERS:
        return f"{type(layer).__name__} may do more than its base class"
    if getattr(layer, "groups", 1) != 1 and not depthwise:
        return "it has groups"
    if depthwise and getattr(layer, "padding_mode", "zeros") != "zeros":
        return "it does not pad with zeros"
    if len(flow.of(layer)) != 1:
        return "it is called several times"
    if any(owners[id(parameter)] > 1 for parameter in layer.parameters()):
        return "its weight is shared"
    if not layer._parameters["weight"].requires_grad:  # pyright: ignore[reportOptionalMemberAccess]
        return "it is frozen"
    return None


def _is_depthwise(layer: Any) -> bool:
    return (
        layer.__class__ is not nn.Linear
        and layer.groups == layer.in_channels > 1
        and (layer.out_channels == layer.in_channels)
    )


def _takers(current: Call | Operation, flow: Flow, leaves: set[str]) -> list[Call | Operation]:
    """Return the calls of single layers, and the functions outside them, that take a result."""
    calls = [call for call in flow.calls if call.source is current and call.name in leaves]
    functions = [
        operation
        for operation in flow.operations
        if operation.owner not in leaves and any(source is current for source in operation.sources)
    ]
    return [*calls, *functions]


def _identity_convolution(layer: Convolution, z: Tensor) -> Tensor:
    kernel = z.new_zeros(z.shape[1], 1, *layer.kernel_size)
    kernel[(slice(None), 0, *centre(layer))] = 1
    convolve = CONVOLVE[type(layer)]
    return convolve(z, kernel, None, layer.stride, layer.padding, layer.dilation, z.shape[1])


def centre(layer: Convolution) -> tuple[int, ...]:
    """Return the index of a kernel's middle."""
    return tuple(size // 2 for size in layer.kernel_size)
