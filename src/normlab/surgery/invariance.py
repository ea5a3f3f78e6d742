"""See by computing whether the outputs of a model depend on the scale of a weight.

Where they do not, L(a w) = L(w) for every a above 0, the gradient is orthogonal to the weight. That
shows for all weights in one pass forward and back through a copy of the model: in float64, with
every ``eps`` out of the way, off special values such as scales of zero, with the same noise
whenever it runs, and as it was written where it is compiled.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from normlab.surgery.flow import uncompiled

SAMPLES, SAMPLES_WITH_SPACE = 8, 4
"""How many samples the copy sees at least: two numbers, normalised, are always 1 and -1."""

_ORTHOGONAL = 1e-6
_UNDECIDED = 1e-2
_SILENT = 1e-9
_EQUAL = 1e-3


class Scaled(NamedTuple):
    """Tensors of the copy that are multiplied together.

    Attributes:
        num_groups: The number of groups of output units, each with a factor of its own.
        values: Views with the output units on the first two axes: a weight, biases that go along.
        slopes: Their gradients in the same layout.
        statistics: Normalisers whose running statistics move along, each with the bias in front
            of it that does not.
    """

    num_groups: int
    values: Sequence[Tensor]
    slopes: Sequence[Tensor]
    statistics: Sequence[tuple[_NormBase, Tensor | None]] = ()

    def by_group(self, one: Tensor, other: Tensor) -> Tensor:
        """Return the inner product of two tensors in this layout, group by group."""
        return (one * other).flatten(0, 1).unflatten(0, (self.num_groups, -1)).flatten(1).sum(1)


class Twin:
    """A copy of a model that tells which scales its outputs do not depend on.

    Args:
        model: Any module; it is not changed.
        inputs: What its forward takes.
    """

    def __init__(self, model: nn.Module, *inputs: Any) -> None:
        self.model = copy.deepcopy(model).double().train()
        self.model.requires_grad_(True)
        self._copies: dict[int, Any] = {
            id(one): two
            for originals, copies in (
                (model.modules(), self.model.modules()),
                (model.parameters(), self.model.parameters()),
            )
            for one, two in zip(originals, copies, strict=True)
        }
        self._generator = torch.Generator().manual_seed(0)
        self.inputs = tuple(self._several(value) for value in inputs)
        with torch.no_grad():
            for parameter in self.model.parameters():
                size = parameter.square().mean().sqrt()
                noise = torch.randn(parameter.shape, generator=self._generator).to(parameter)
                parameter.add_(noise, alpha=0.1 * (size.item() or 1.0))
        for module in self.model.modules():
            if isinstance(vars(module).get("eps"), float):
                vars(module)["eps"] = 1e-30
        total = torch.zeros((), dtype=torch.float64)
        for output in self._outputs():
            weights = torch.randn(output.shape, generator=self._generator).to(output)
            total = total + (weights * (output + output.square())).sum()
        self._size = total.detach().abs().item()
        if total.requires_grad:
            total.backward()

    def of(self, original: Any) -> Any:
        """Return the copy of one of the model's modules or parameters."""
        return self._copies[id(original)]

    def _several(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        wanted = SAMPLES if value.dim() < 3 else SAMPLES_WITH_SPACE
        value = value.detach().repeat(-(-wanted // len(value)), *(1,) * (value.dim() - 1))
        if not value.is_floating_point():
            return value
        size = value.square().mean().sqrt().item() or 1.0
        return value.double() + size * torch.randn(value.shape, generator=self._generator).to(value)

    def _outputs(self) -> Iterator[Tensor]:
        devices = [p.device for p in self.model.parameters() if p.device.type == "cuda"][:1]
        with torch.random.fork_rng(devices=devices), uncompiled():
            torch.manual_seed(0)
            yield from _tensors(self.model(*self.inputs))

    def is_free(self, scaled: Scaled) -> bool:
        """Whether the outputs in training mode do not depend on the scale of each group."""
        pairs = list(zip(scaled.values, scaled.slopes, strict=True))
        along = torch.stack([scaled.by_group(one, two) for one, two in pairs]).sum(0).abs()
        values = torch.stack([scaled.by_group(one, one) for one, _ in pairs]).sum(0)
        slopes = torch.stack([scaled.by_group(two, two) for _, two in pairs]).sum(0)
        sizes = (values * slopes).sqrt()
        silent = sizes <= _SILENT * self._size
        ratio = torch.where(silent, 0.0, along / sizes).max()
        if ratio < _ORTHOGONAL and 2 * silent.sum() <= len(silent):
            return True
        return bool(ratio < _UNDECIDED) and self._agree([scaled])

    def keeps_evaluation(self, scaled: Sequence[Scaled]) -> bool:
        """Whether outputs in evaluation mode stay where weights are scaled, statistics with them.

        Args:
            scaled: The weights, all scaled at once.
        """
        self.model.eval()
        try:
            return self._agree(scaled, tolerance=_EQUAL)
        finally:
            self.model.train()

    @torch.no_grad()
    def _agree(self, scaled: Sequence[Scaled], tolerance: float = _UNDECIDED) -> bool:
        """Whether the outputs stay where each group is multiplied by a number of its own."""
        before = [output.clone() for output in self._outputs()]
        kept = copy.deepcopy(self.model.state_dict())
        for one in scaled:
            # At least doubled, so that it shows; an eps written into a formula matters less then.
            draws = torch.rand(one.num_groups, generator=self._generator, dtype=torch.float64)
            first = one.values[0]
            units = first.shape[0] * first.shape[1]
            scale = (0.7 + 2.3 * draws).exp().repeat_interleave(units // one.num_groups).to(first)
            for value in one.values:
                value.mul_(scale.view(*value.shape[:2], *(1,) * (value.dim() - 2)))
            for norm, bias in one.statistics:
                assert norm.running_mean is not None
                assert norm.running_var is not None
                shift = 0 if bias is None else bias * (1 - scale)
                norm.running_mean.mul_(scale).add_(shift)
                norm.running_var.mul_(scale.square())
        after = list(self._outputs())
        self.model.load_state_dict(kept)
        return all(
            (one - two).abs().max() <= tolerance * one.abs().max()
            for one, two in zip(before, after, strict=True)
        )


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        if values.is_floating_point():
            yield values
    elif isinstance(values, dict):
        yield from _tensors(tuple(values.values()))
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)
