r"""Set learnt means and deviations from data: before training in stages, or in a running network.

A layer's statistics can be measured once those of every layer in front of it stand. So layers are
set stage by stage: a stage takes all layers whose input depends on layers of earlier stages only.
With one batch that is a single pass, in which each layer sets itself before it computes.

Source: B. Berger, 2022, arXiv 2212.14729, and its public code.

Departs:
    - What depends on what is read off one pass over two samples, whatever the model's code does; a
      layer that is fed by itself, as in a recurrence, is set from the calls before that.
    - Every value weighs the same whatever the size of its batch, and sums are kept in float64; the
      public code averages over calls.
    - A deviation is at least ``min_std``; the public code takes the logarithm of 0.
    - In a running network scale and shift make up for the change (`restart_from_data`); the public
      code, marked untested there, reads an attribute that does not exist and adds the shift to the
      scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normlab.norms.batchless_dependence import called, dependences
from normlab.norms.batchless_layer import BatchlessNorm
from normlab.surgery.flow import evaluating


@dataclass(frozen=True)
class Start:
    """What was set.

    Attributes:
        stages: The names of the layers set together, stage by stage.
        not_reached: The layers that no sample reached; they are as they were.
        fed_back: The layers fed by themselves, whose later calls were not counted.
        floored: How many deviations of a layer were raised to the floor.
    """

    stages: tuple[tuple[str, ...], ...]
    not_reached: tuple[str, ...]
    fed_back: tuple[str, ...]
    floored: Mapping[str, int]

    def __str__(self) -> str:
        """Return one sentence without its full stop."""
        told = [f"statistics set from data in {len(self.stages)} stages"]
        if self.floored:
            count = sum(self.floored.values())
            told.append(f"{count} constant channels in {', '.join(self.floored)} floored")
        if self.fed_back:
            told.append(f"calls of {', '.join(self.fed_back)} on what they fed not counted")
        if self.not_reached:
            told.append(f"not reached and left as they were: {', '.join(self.not_reached)}")
        return "; ".join(told)


def start_from_data(
    model: nn.Module,
    batches: Iterable[Tensor | tuple[Tensor, Any]],
    *,
    one_pass: bool = False,
    min_std: float = 1e-3,
) -> Start:
    r"""Set the statistics of every layer to those of its input, stage by stage.

    The passes run in evaluation mode without gradients. Mean and root mean square deviation are
    taken over all values of all batches; a layer called several times is set from all its calls.

    Args:
        model: The model, whose statistics are changed in place; if anything raises, not at all.
        batches: Inputs ``(N, ...)`` or pairs ``(inputs, targets)`` on the model's device, some
            hundred samples in all. They are held until the end.
        one_pass: With several batches, whether a stage takes one pass over them, with
            :math:`\sigma^2 = \mathrm{mean}((x - \mu_{old})^2) - (\mu_{old} - \mu)^2`, in place of
            one for the means and one for the deviations.
        min_std: The floor of deviations, above 0, for channels that are constant on the sample.

    Returns:
        The stages, and what was out of the ordinary.

    Raises:
        ValueError: The model has no such layer, there is no batch, a batch is neither a tensor nor
            a pair that begins with one, a layer gets a single value per channel, or its input is
            not finite.

    Example:
        >>> model = nn.Sequential(BatchlessNorm(1))
        >>> start_from_data(model, [torch.tensor([[1.0], [5.0]]), torch.tensor([[3.0]])]).stages
        (('0',),)
        >>> model[0].mu, model[0].std
        (Parameter containing: tensor([3.], requires_grad=True), tensor([1.6330]))
    """
    layers = _layers_of("start_from_data", model)
    inputs = _inputs_of("start_from_data", batches, min_std)
    record = _Record("start_from_data", min_std, layers)
    with evaluating(model), torch.no_grad(), _restored_on_error(layers):
        if len(inputs) == 1 and _set_in_one_pass(model, inputs[0], record):
            return record.result(())
        order = dependences(model, inputs[0][:2], layers)
        waiting, done, fed_back = dict(order), frozenset(), []
        while waiting:
            stage = {name: set(range(len(calls))) for name, calls in waiting.items()
                     if all(call <= done for call in calls)}  # fmt: skip
            if not stage:
                # Some layer is fed by itself: of the first one, what does not wait for it.
                name, calls = next(iter(waiting.items()))
                stage = {name: {i for i, call in enumerate(calls) if call <= done}}
                fed_back.append(name)
            for name, found in _measure(model, inputs, layers, stage, one_pass).items():
                layers[name].set_statistics(*record.checked(name, *found))
            record.stages.append(tuple(stage))
            done |= stage.keys()
            for name in stage:
                del waiting[name]
    return record.result(tuple(fed_back))


def restart_from_data(
    model: nn.Module,
    batches: Iterable[Tensor | tuple[Tensor, Any]],
    *,
    one_pass: bool = False,
    min_std: float = 1e-3,
) -> Start:
    """Set the statistics of a running network to those of its inputs; its function stays.

    Scale and shift of each layer make up for the change, so all layers are measured together.

    Args:
        model: The model, changed in place; if anything raises, not at all.
        batches: As in `start_from_data`.
        one_pass: As in `start_from_data`, for one batch too.
        min_std: As in `start_from_data`.

    Returns:
        As `start_from_data`, with one stage.

    Raises:
        ValueError: As in `start_from_data`, or a layer has no scale or no shift.

    Example:
        >>> model, x = BatchlessNorm(1), torch.tensor([[2.0], [4.0]])
        >>> restart_from_data(model, [x]).stages
        (('',),)
        >>> model.weight.item(), model.bias.item(), model(x).flatten().tolist()
        (1.0, 3.0, [2.0, 4.0])
    """
    layers = _layers_of("restart_from_data", model)
    inputs = _inputs_of("restart_from_data", batches, min_std)
    record = _Record("restart_from_data", min_std, layers)
    with evaluating(model), torch.no_grad(), _restored_on_error(layers):
        measured = _measure(model, inputs, layers, dict.fromkeys(layers), one_pass)
        for name, found in measured.items():
            layers[name].move_statistics(*record.checked(name, *found))
        record.stages.append(tuple(measured))
    return record.result(())


class _Record:
    """Checks what was measured, and collects what is told at the end."""

    def __init__(self, operation: str, min_std: float, layers: dict[str, BatchlessNorm]) -> None:
        self.operation, self.min_std, self.layers = operation, min_std, layers
        self.stages: list[tuple[str, ...]] = []
        self.floored: dict[str, int] = {}

    def checked(
        self, name: str, mean: Tensor, variance: Tensor, count: Tensor | int
    ) -> tuple[Tensor, Tensor]:
        """Return mean and floored deviation of a layer, or refuse them."""
        if int(count) < 2:
            raise ValueError(
                f"{self.operation}(batches): expected more than one value per channel at layer "
                f"{name!r}, got one; give more samples"
            )
        if not (torch.isfinite(mean).all() and torch.isfinite(variance).all()):
            raise ValueError(
                f"{self.operation}(batches): expected finite values at layer {name!r}, got NaN or "
                "infinity; look for them in the inputs and in the weights in front of it"
            )
        std = variance.clamp_min(0).sqrt()
        low = int((std < self.min_std).sum())
        if low:
            self.floored[name] = low
        return mean, std.clamp_min(self.min_std)

    def result(self, fed_back: tuple[str, ...]) -> Start:
        reached = {name for stage in self.stages for name in stage}
        not_reached = tuple(name for name in self.layers if name not in reached)
        return Start(tuple(self.stages), not_reached, fed_back, self.floored)


class _CalledAgain(Exception):
    """A layer is called a second time, so its statistics are not those of one call."""


class _SeenAll(Exception):
    """Everything that a pass was for has been seen."""


def _set_in_one_pass(model: nn.Module, inputs: Tensor, record: _Record) -> bool:
    """Let each layer set itself when it is called; False where one is called again."""

    def set_now(name: str, number: int, x: Tensor) -> None:
        if number:
            raise _CalledAgain
        layer = record.layers[name]
        mean = _sums(layer, x, torch.zeros_like(layer.mu))[1] / _count(layer, x)
        variance = _sums(layer, x, mean)[2] / _count(layer, x)
        layer.set_statistics(*record.checked(name, mean, variance, _count(layer, x)))
        record.stages.append((name,))

    try:
        with called(record.layers, set_now):
            model(inputs)
    except _CalledAgain:
        record.stages.clear()
        record.floored.clear()
        return False
    return True


Wanted = Mapping[str, Set[int] | None]
"""The layers to measure, each with the numbers of the calls that count; None for every call."""


def _measure(
    model: nn.Module,
    inputs: list[Tensor],
    layers: dict[str, BatchlessNorm],
    wanted: Wanted,
    one_pass: bool,
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Return mean, variance and number of values of the layers that are reached."""
    centres = {name: layers[name].mu.double() for name in wanted}
    sums = _sum_up(model, inputs, layers, wanted, centres)
    offsets = {name: first / count for name, (count, first, _) in sums.items()}
    means = {name: centres[name] + offset for name, offset in offsets.items()}
    if not one_pass:
        offsets = {name: torch.zeros_like(mean) for name, mean in means.items()}
        sums = _sum_up(model, inputs, layers, {name: wanted[name] for name in means}, means)
    return {
        name: (means[name], second / count - offsets[name].square(), count.flatten()[0])
        for name, (count, _, second) in sums.items()
    }


def _sum_up(
    model: nn.Module,
    inputs: list[Tensor],
    layers: dict[str, BatchlessNorm],
    wanted: Wanted,
    centres: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Run all batches and return the sums of 1, x - centre and its square, ``(3, *)`` a layer."""
    totals: dict[str, Tensor] = {}
    missing: set[tuple[str, int]] = set()

    def add(name: str, number: int, x: Tensor) -> None:
        calls = wanted[name]
        if calls is None or number in calls:
            sums = _sums(layers[name], x, centres[name])
            totals[name] = totals[name] + sums if name in totals else sums
            missing.discard((name, number))
            # What comes after need not be computed.
            if calls is not None and not missing:
                raise _SeenAll

    for batch in inputs:
        missing = {(name, number) for name, calls in wanted.items() for number in calls or ()}
        with called({name: layers[name] for name in wanted}, add), suppress(_SeenAll):
            model(batch)
    return totals


def _sums(layer: BatchlessNorm, x: Tensor, centre: Tensor) -> Tensor:
    centred = x.double() - layer.align(centre.double(), x)
    axes = layer.reduced_axes(x)
    first = centred.sum(axes).reshape(centre.shape)
    second = centred.square().sum(axes).reshape(centre.shape)
    return torch.stack([torch.full_like(first, _count(layer, x)), first, second])


def _count(layer: BatchlessNorm, x: Tensor) -> int:
    return math.prod(x.shape[axis] for axis in layer.reduced_axes(x))


@contextmanager
def _restored_on_error(layers: dict[str, BatchlessNorm]) -> Iterator[None]:
    """Put the parameters of the layers back if the body raises."""
    saved = [(p, p.detach().clone()) for layer in layers.values() for p in layer.parameters()]
    try:
        yield
    except BaseException:
        for parameter, value in saved:
            parameter.copy_(value)
        raise


def _layers_of(operation: str, model: nn.Module) -> dict[str, BatchlessNorm]:
    layers = {name: m for name, m in model.named_modules() if isinstance(m, BatchlessNorm)}
    if not layers:
        raise ValueError(
            f"{operation}(model): expected a model with BatchlessNorm layers, got "
            f"{type(model).__name__} without any; put them in first"
        )
    return layers


def _inputs_of(operation: str, batches: Iterable[Any], min_std: float) -> list[Tensor]:
    if not 0 < min_std < math.inf:
        raise ValueError(
            f"{operation}(min_std={min_std}): expected a number above 0, got {min_std}; use 1e-3"
        )
    inputs: list[Tensor] = []
    for batch in batches:
        one = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(one, Tensor):
            raise ValueError(
                f"{operation}(batches): expected tensors or pairs (inputs, targets), got "
                f"{type(one).__name__}; yield the inputs alone"
            )
        inputs.append(one)
    if not inputs:
        raise ValueError(
            f"{operation}(batches): expected at least one batch, got none; give a loader that "
            "yields batches, or a list if it was used up"
        )
    return inputs
