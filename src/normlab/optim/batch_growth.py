r"""Batch growth: where a schedule would lower the learning rate, the batch grows instead.

The noise of a step goes with rate over batch, so that dividing the rate by two and doubling the
batch anneal alike, and the second takes fewer steps of the optimiser.

Source: S. L. Smith, P.-J. Kindermans, C. Ying, Q. V. Le, "Don't Decay the Learning Rate, Increase
the Batch Size", 2018, arXiv 1711.00489.

Departs:
    - The batch grows by accumulating gradients over the batches of any loop, hence in whole
      multiples; what is left over, and what exceeds the cap, is done by the rate.
    - Normalisers with batch statistics see the batches of the loop, not the grown ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from normlab.method import Card, Method, Setting, Source
from normlab.optim.arguments import is_count, is_number
from normlab.optim.live import go_live
from normlab.optim.wrapper import OptimizerWrapper, check_needs_no_closure
from normlab.parameter_groups import Group

_KEY = "batch_growth"
_CAP = "max_batches"


def grown_batch_size(
    batch_size: int, rate_factor: float, num_samples: int, *, max_share: float = 0.1
) -> tuple[int, float]:
    """Return the batch that stands in for a lowered rate, and the factor left to the rate.

    Args:
        batch_size: Samples of a batch at the full rate.
        rate_factor: What the schedule multiplies the full rate by, from 0 to 1; a decay by 0.2 in
            a schedule of steps makes the batch five times as large.
        num_samples: Samples in the training set.
        max_share: The largest share of them in one batch, above 0 and at most 1.

    Returns:
        The batch size, at least ``batch_size``, and what to multiply the full rate by with it:
        ``rate_factor`` times the growth of the batch, 1 while there is room for growth.

    Raises:
        ValueError: A value out of its range.

    Example:
        >>> grown_batch_size(128, 0.2, 50_000), grown_batch_size(128, 0.008, 50_000)
        ((640, 1.0), (5000, 0.3125))
    """
    if not (is_number(rate_factor) and 0 <= rate_factor <= 1):
        raise ValueError(
            f"grown_batch_size(rate_factor={rate_factor!r}): expected a number from 0 to 1, got "
            f"{rate_factor!r}; give the present rate divided by the highest"
        )
    _check_share("grown_batch_size", max_share)
    largest = max(batch_size, int(max_share * num_samples))
    wanted = batch_size / rate_factor if rate_factor > 0 else math.inf
    size = largest if wanted >= largest else round(wanted)
    return size, rate_factor * size / batch_size


class BatchGrowth(OptimizerWrapper):
    r"""Takes one step for several batches, the more the lower the schedule has set the rate.

    With f the present rate over the highest so far, the gradients of
    :math:`k = \min(\mathrm{cap}, \mathrm{round}(1/f))` batches are averaged for one step, whose
    rate is the sum of the k rates that the schedule gave: about the highest rate again. While k is
    1, training is the wrapped optimiser's to the bit.

    Any loop and schedule will do: call ``step`` after every batch; ``zero_grad`` does not touch
    what is accumulated. Step hooks run around the steps that are taken. The accumulated gradients
    and the counters stand in ``param_groups[0]``, so that ``state_dict`` holds them, and an
    optimiser that has them from a checkpoint goes on from there; batches that do not fill a last
    step are dropped with the end of training. Clip gradients in a step hook if the clipping is to
    see the average.

    Args:
        optimizer: Any optimiser whose step needs no closure.
        max_batches: The cap on k, at least 1; a tenth of the batches of an epoch in the paper.
            None takes what the groups hold under ``max_batches``.

    Raises:
        ValueError: A cap below 1, or none; an optimiser whose step needs a closure, or that grows
            its batch already.

    Example:
        >>> weight = nn.Parameter(torch.zeros(1))
        >>> optimizer = BatchGrowth(torch.optim.SGD([weight], lr=1.0), max_batches=8)
        >>> for rate in (1.0, 0.5, 0.5):
        ...     optimizer.param_groups[0]["lr"] = rate
        ...     weight.grad = torch.ones(1)
        ...     optimizer.step()
        ...     print(weight.item())
        -1.0
        -1.0
        -2.0
    """

    def __init__(self, optimizer: torch.optim.Optimizer, max_batches: int | None = None) -> None:
        check_needs_no_closure("BatchGrowth", optimizer)
        first = optimizer.param_groups[0]
        cap = first.get(_CAP) if max_batches is None else max_batches
        if not is_count(cap):
            raise ValueError(
                f"BatchGrowth(max_batches={cap!r}): expected 1, 2, 3, ..., got {cap!r}; give a "
                "tenth of the batches of an epoch"
            )
        super().__init__(optimizer)
        first[_CAP] = int(cap)
        first.setdefault(_KEY, _fresh())

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        go_live(self, self.base, _KEY)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Count one batch, and take a step if it is the last of its k.

        Args:
            closure: Runs forward and backward anew and returns the loss; None if that was done.

        Returns:
            What the wrapped optimiser or the closure returns.
        """
        progress = self.param_groups[0].setdefault(_KEY, _fresh())
        rates = [group["lr"] for group in self.param_groups]
        if progress["batches"] == 0:
            progress["wanted"] = self._batches_wanted(progress, max(map(float, rates)))
        if progress["wanted"] == 1:
            return self.base.step() if closure is None else self.base.step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._accumulate(progress, rates)
        if progress["batches"] == progress["wanted"]:
            self._step(progress, rates)
        return loss

    def _batches_wanted(self, progress: dict[str, Any], rate: float) -> int:
        progress["highest"] = max(progress["highest"], rate)
        cap = self.param_groups[0][_CAP]
        # A rate of 0 throughout is no schedule.
        if rate >= progress["highest"]:
            return 1
        return cap if rate <= 0 else min(cap, max(1, round(progress["highest"] / rate)))

    @torch.no_grad()
    def _accumulate(self, progress: dict[str, Any], rates: list[Any]) -> None:
        sums: dict[int, Tensor] = progress["sums"]
        for number, parameter in enumerate(self._parameters()):
            if parameter.grad is None:
                continue
            if number in sums:
                sums[number] = sums[number].to(parameter.grad).add_(parameter.grad)
            else:
                sums[number] = parameter.grad.clone()
        progress["rates"] = [
            float(rate) + before
            for rate, before in zip(rates, progress["rates"] or [0.0] * len(rates), strict=True)
        ]
        progress["batches"] += 1

    @torch.no_grad()
    def _step(self, progress: dict[str, Any], rates: list[Any]) -> None:
        for number, parameter in enumerate(self._parameters()):
            total = progress["sums"].get(number)
            if total is None:
                continue
            average = total.to(parameter).div_(progress["batches"])
            # In place where it can be: others may hold views of the gradient.
            if parameter.grad is None:
                parameter.grad = average
            else:
                parameter.grad.copy_(average)
        summed = progress["rates"]
        progress.update(batches=0, sums={}, rates=[])
        for group, rate in zip(self.param_groups, summed, strict=True):
            group["lr"] = rate
        try:
            self.base.step()
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]


def _fresh() -> dict[str, Any]:
    return {"highest": 0.0, "wanted": 1, "batches": 0, "rates": [], "sums": {}}


def _check_share(operation: str, max_share: float) -> None:
    if not (is_number(max_share) and 0 < max_share <= 1):
        raise ValueError(
            f"{operation}(max_share={max_share!r}): expected a share above 0 and at most 1, got "
            f"{max_share!r}; use 0.1"
        )


def parameter_groups(
    groups: list[Group], model: nn.Module, setting: Setting, *, max_share: float = 0.1
) -> list[Group]:
    """Note the cap: how many batches make the largest share of the training set."""
    _check_share("batch-growth", max_share)
    cap = max(1, int(max_share * setting.steps_per_epoch))
    setting.say(f"up to {cap} batches make one step as the learning rate falls")
    return [{**group, _CAP: cap} for group in groups]


def optimizer(
    groups: list[Group], make: Callable[[list[Group]], torch.optim.Optimizer]
) -> torch.optim.Optimizer:
    """Wrap the task's optimiser."""
    return BatchGrowth(make(groups))


CARD = Card(
    name="batch-growth",
    title="Batch growth",
    summary="Takes larger batches where the schedule would take smaller steps, by accumulating "
    "gradients.",
    room="optim",
    source=Source(
        authors="S. L. Smith, P.-J. Kindermans, C. Ying, Q. V. Le",
        title="Don't Decay the Learning Rate, Increase the Batch Size",
        year=2018,
        arxiv="1711.00489",
    ),
    batch_of_one="as the model",
    keeps_evaluation=True,
    state=("the gradients accumulated so far, and the highest rate",),
    best_for="Fewer optimiser steps at the accuracy of a decayed rate.",
    limits=(
        "Acts only where a schedule lowers the rate, and up to a tenth of the training set.",
        "Accumulating keeps a second copy of the gradients and saves no time on one device.",
    ),
    departures=(
        "Grows in whole multiples of the loop's batch; the rest is left to the rate.",
        "Batch statistics are those of the loop's batches.",
    ),
)

METHOD = Method(card=CARD, parameter_groups=parameter_groups, optimizer=optimizer)
