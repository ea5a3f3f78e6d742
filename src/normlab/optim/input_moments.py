"""What goes into weight layers: first and second moments per feature, over all calls of a step.

Sums over the calls since the last time they were taken, so that micro-batches, several calls of one
layer and several processes all count like one batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normlab.moments import group_of_several, sum_over_processes, wide

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""The layers whose inputs are watched, by exact class: a subclass may compute something else."""


class InputMoments(NamedTuple):
    """Moments of the input features of several layers, one layer after the other, in float64.

    Attributes:
        mean: ``(C_1 + C_2 + ...,)``; features of a linear layer, channels of a convolution.
        square: The mean of the squares, not centred, likewise.
        num_rows: For each layer the number N of rows that its weight was multiplied with:
            samples, times output positions for a convolution; ``(layers,)``.
        called: Whether any process called the layer; what stands for others has no meaning.
    """

    mean: Tensor
    square: Tensor
    num_rows: Tensor
    called: list[bool]


class _Call(NamedTuple):
    mean: Tensor
    variance: Tensor
    num_values: int
    num_rows: int


class InputWatcher:
    """Adds up the moments of what goes into layers, in calls in training mode.

    A call counts when its gradient comes back, and once: a pass without backward does not count,
    nor does the pass that activation checkpointing throws away. In a compiled model, of which a
    hook on a tensor would break the graph, each call with gradients on counts at once, so that
    checkpointing around it counts double. A copy or a pickle of a watched layer is not watched.

    Args:
        layers: For each entry of the result the layers that are counted together.
        process_group: The processes whose calls are counted together; None for all of them, looked
            up at each call of `take`.

    Attributes:
        sizes: The number of features at each place.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> watcher = InputWatcher([[layer]])
        >>> layer(torch.tensor([[1.0, 2.0], [3.0, 2.0]])).sum().backward()
        >>> watcher.take().mean.tolist()
        [2.0, 2.0]
    """

    def __init__(self, layers: Sequence[Sequence[Layer]], process_group: Any = None) -> None:
        self.process_group = process_group
        self.sizes = [num_features(same[0]) for same in layers]
        self._device = layers[0][0].weight.device
        self._calls: list[list[_Call]] = [[] for _ in layers]
        self._hooks = [
            layer.register_forward_hook(_Watch(self, place), with_kwargs=True)
            for place, same in enumerate(layers)
            for layer in same
        ]

    @property
    def empty(self) -> bool:
        """Whether no call was counted since the last `take`."""
        return not any(self._calls)

    def take(self) -> InputMoments:
        """Return the moments since the last time, over all processes, and begin anew.

        All layers go through one collective; every process has to call it.
        """
        pooled = [_pooled(c, n, self._device) for c, n in zip(self._calls, self.sizes, strict=True)]
        for calls in self._calls:
            calls.clear()
        means, variances, counts, num_rows = zip(*pooled, strict=True)
        # Squares are those of float64, where subtracting the squared mean again loses nothing.
        mean = torch.cat(means).double()
        square = torch.cat(variances).double() + mean.square()
        rows = mean.new_tensor(num_rows)
        group = group_of_several(self.process_group)
        if group is None:
            return InputMoments(mean, square, rows, [count > 0 for count in counts])
        total = mean.new_tensor(counts)
        each = self.repeated(total)
        sums = sum_over_processes(torch.cat([each * mean, each * square, total, rows]), group)
        lengths = [len(mean), len(mean), len(total), len(rows)]
        mean, square, total, rows = sums.split(lengths)
        each = self.repeated(total.clamp_min(1))
        return InputMoments(mean / each, square / each, rows, (total > 0).tolist())

    def repeated(self, values: Tensor) -> Tensor:
        """Return one value a layer ``(layers,)`` as one a feature."""
        sizes = torch.tensor(self.sizes, device=values.device)
        return values.repeat_interleave(sizes, output_size=sum(self.sizes))

    def remove(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def add(self, place: int, layer: Layer, x: Tensor, output: Tensor) -> None:
        """Count one call, when its gradient comes."""
        features = wide(_rows(layer, x.detach()))
        mean, variance = _mean_and_variance(features)
        count = features.numel() // features.shape[1]
        num_rows = output.numel() // layer.weight.shape[0]
        calls, call = self._calls[place], _Call(mean, variance, count, num_rows)
        if torch.compiler.is_compiling():
            calls.append(call)
            return

        def count_once(_: Tensor) -> None:
            # The gradient comes back several times where the graph is kept for several losses.
            if all(call is not other for other in calls):
                calls.append(call)

        output.register_hook(count_once)


class _Watch:
    """The hook of one layer; copied or pickled with the layer, it does nothing any more."""

    _watcher: InputWatcher | None = None
    _place = 0

    def __init__(self, watcher: InputWatcher, place: int) -> None:
        self._watcher, self._place = watcher, place

    def __call__(self, layer: Any, args: Any, named: dict[str, Any], output: Tensor) -> None:
        if self._watcher is None or not (layer.training and output.requires_grad):
            return
        x = args[0] if args else named["input"]
        if x.numel() > 0:
            self._watcher.add(self._place, layer, x, output)

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        pass


def num_features(layer: Layer) -> int:
    """Return the number of input features of a linear layer, of channels of a convolution."""
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def group_layers(model: nn.Module, held: Iterable[Tensor]) -> tuple[list[list[Layer]], list[str]]:
    """Return the layers whose inputs say all about the gradient of their weight, and the others.

    Args:
        model: The model.
        held: The parameters that the optimiser holds.

    Returns:
        Lists of layers that share one weight (and bias), mostly of one layer each, in the model's
        order; for every other module with a matrix of weights a sentence, why not.
    """
    mine = {id(parameter) for parameter in held}
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(module)
    found: dict[int, list[Layer]] = {}
    notes: list[str] = []
    for name, module in model.named_modules():
        matrices = [p for p in module.parameters(recurse=False) if p.dim() > 1]
        if not isinstance(module, LAYERS) or type(module) not in LAYERS:
            if matrices or isinstance(module, LAYERS):
                notes.append(f"{name}: a {type(module).__name__} is not supported")
            continue
        own = [p for p in module._parameters.values() if p is not None]
        names = ("weight",) if module.bias is None else ("weight", "bias")
        if any(module._parameters.get(name) is None for name in names):
            notes.append(f"{name}: its parameters are computed from others")
        elif not all(id(p) in mine for p in own):
            notes.append(f"{name}: its parameters are not in the optimiser")
        elif not all(_alike(other, module) for p in own for other in owners[id(p)]):
            notes.append(f"{name}: it shares a parameter with another kind of layer")
        else:
            found.setdefault(id(module.weight), []).append(module)
    return list(found.values()), notes


def _alike(one: nn.Module, other: Layer) -> bool:
    """Whether two modules have both parameters in common and use them alike."""
    same = type(one) is type(other) and getattr(one, "groups", 1) == getattr(other, "groups", 1)
    return same and all(
        one._parameters.get(name) is other._parameters.get(name) for name in ("weight", "bias")
    )


def _rows(layer: Layer, x: Tensor) -> Tensor:
    """Return the input with features on the second axis: ``(rows, C)`` or ``(N, C, *)``."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    return x if x.dim() == layer.weight.dim() else x.unsqueeze(0)


def _mean_and_variance(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the moments over all axes but the second: several times as fast as `var_mean`."""
    if features.dim() == 2:
        share = features.new_full((len(features),), 1 / len(features))
        mean = share @ features
        return mean, share @ (features - mean).square_()
    flat = features.flatten(2)
    count = flat.shape[0] * flat.shape[2]
    mean = flat.sum(2).sum(0) / count
    return mean, (flat - mean[:, None]).square_().sum(2).sum(0) / count


def _pooled(calls: Sequence[_Call], size: int, device: torch.device) -> _Call:
    """Return several calls as one."""
    if len(calls) == 1:
        mean, variance, *counts = calls[0]
        return _Call(mean.to(device), variance.to(device), *counts)
    mean = torch.zeros(size, dtype=torch.float64, device=device)
    square, count, num_rows = mean.clone(), 0, 0
    for call in calls:
        here = call.mean.to(mean)
        mean += call.num_values * here
        square += call.num_values * (call.variance.to(mean) + here.square())
        count += call.num_values
        num_rows += call.num_rows
    mean /= max(count, 1)
    return _Call(mean, square / max(count, 1) - mean.square(), count, num_rows)
