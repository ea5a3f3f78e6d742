r"""Linear scaling: a learning rate in proportion to the batch, reached by a gradual warm-up.

The rate tuned at one batch size serves at another when it is multiplied by the ratio of the two,
as long as the first epochs rise to it from the rate of the reference batch.

Source: P. Goyal, P. Dollar, R. Girshick and others, "Accurate, Large Minibatch SGD: Training
ImageNet in 1 Hour", 2017, arXiv 1706.02677.

Departs:
    - The square root of the ratio is an option (``rule="sqrt"``), for Adam and its kin.
    - No momentum correction: torch keeps the rate outside the momentum buffer, so that a change of
      the rate needs none.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LinearLR, LRScheduler, SequentialLR

from normlab.method import Card, Method, Setting, Source
from normlab.optim.arguments import is_count, is_number
from normlab.optim.live import go_live, retire
from normlab.optim.step_rates import StepRates
from normlab.parameter_groups import Group

Rule = Literal["linear", "sqrt"]

_KEY = "linear_scaling"


def scaled_lr(lr: float, batch_size: int, *, reference: int = 256, rule: Rule = "linear") -> float:
    r"""Return the learning rate for a batch size from that of a reference batch.

    .. math::
        \eta = \eta_{ref} \, B / B_{ref}, \quad
        \eta = \eta_{ref} \sqrt{B / B_{ref}} \;\text{(sqrt)}

    Args:
        lr: The rate at the reference batch.
        batch_size: Samples of a step, over all processes and micro-batches.
        reference: Samples of the reference batch.
        rule: ``"linear"`` for SGD, ``"sqrt"`` for Adam and its kin.

    Raises:
        ValueError: A batch below 1, or an unknown rule.

    Example:
        >>> scaled_lr(0.1, 8192), scaled_lr(1e-3, 1024, rule="sqrt")
        (3.2, 0.002)
    """
    for name, value in (("batch_size", batch_size), ("reference", reference)):
        if not (is_number(value) and value >= 1):
            raise ValueError(
                f"scaled_lr({name}={value!r}): expected at least 1, got {value!r}; give the number "
                "of samples"
            )
    if rule not in ("linear", "sqrt"):
        raise ValueError(
            f"scaled_lr(rule={rule!r}): expected 'linear' or 'sqrt', got {rule!r}; use 'linear' "
            "for SGD, 'sqrt' for Adam"
        )
    ratio = batch_size / reference
    return lr * (ratio if rule == "linear" else math.sqrt(ratio))


def warm_up(
    optimizer: torch.optim.Optimizer, steps: int, start: float, then: LRScheduler | None = None
) -> LRScheduler:
    """Return a schedule that rises linearly to the optimiser's rates, then follows another.

    Call its ``step`` after each step of the optimiser.

    Args:
        optimizer: The optimiser, with the rates to be reached.
        steps: Steps of the rise, at least 1.
        start: The share of each rate to begin with, above 0 and at most 1; the reference batch
            divided by the batch after linear scaling.
        then: A schedule of the same optimiser that begins after the rise; None to stay.

    Raises:
        ValueError: A value out of its range.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=3.2)
        >>> schedule = warm_up(optimizer, steps=2, start=256 / 8192)
        >>> rates = []
        >>> for _ in range(4):
        ...     rates.append(optimizer.param_groups[0]["lr"])
        ...     optimizer.step()
        ...     schedule.step()
        >>> [round(rate, 4) for rate in rates]
        [0.1, 1.65, 3.2, 3.2]
    """
    _check_rise("warm_up", steps, start)
    rise = LinearLR(optimizer, start_factor=start, total_iters=steps)
    return rise if then is None else SequentialLR(optimizer, [rise, then], milestones=[steps])


class WarmUp:
    r"""The same rise around any loop: each step's rate is multiplied by a factor, then restored.

    .. math::
        f_t = f_0 + (1 - f_0) \, t / T, \quad t = 0, \dots, T

    So a schedule that sets the rates goes on as if nothing was there. A step that raises counts for
    nothing. The step counter stands in ``optimizer.param_groups[0]["linear_scaling"]``: a warm-up
    of an optimiser that has it from a checkpoint, or is a copy, goes on from there. As in torch,
    copies have no hooks and need a warm-up of their own.

    Args:
        optimizer: The optimiser.
        steps: The number T of steps of the rise, at least 1.
        start: The factor f_0 of the first step, above 0 and at most 1.

    Raises:
        ValueError: A value out of its range, or an optimiser that another one acts on.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        >>> warm = WarmUp(optimizer, steps=4, start=0.5)
        >>> for _ in range(2):
        ...     optimizer.step()
        >>> warm.factor, optimizer.param_groups[0]["lr"]
        (0.75, 1.0)
    """

    def __init__(self, optimizer: torch.optim.Optimizer, steps: int, start: float) -> None:
        _check_rise("WarmUp", steps, start)
        self.optimizer, self.steps, self.start = optimizer, steps, start
        go_live(self, optimizer, _KEY)
        optimizer.param_groups[0].setdefault(_KEY, {"step": 0})
        self._rates = StepRates(optimizer, "linear_scaling_rates", lambda _: self.factor)
        self._hook = optimizer.register_step_post_hook(self._after_step)

    @property
    def factor(self) -> float:
        """The factor of the step to come."""
        step = self.optimizer.param_groups[0].setdefault(_KEY, {"step": 0})["step"]
        return self.start + (1 - self.start) * min(step / self.steps, 1.0)

    def remove(self) -> None:
        """Stop."""
        self._rates.remove()
        self._hook.remove()
        retire(self.optimizer, _KEY)

    def _after_step(self, *_: Any) -> None:
        self.optimizer.param_groups[0][_KEY]["step"] += 1


def _check_rise(operation: str, steps: int, start: float) -> None:
    if not is_count(steps):
        raise ValueError(
            f"{operation}(steps={steps!r}): expected 1, 2, 3, ..., got {steps!r}; leave the "
            "warm-up out for none"
        )
    if not (is_number(start) and 0 < start <= 1):
        raise ValueError(
            f"{operation}(start={start!r}): expected a share above 0 and at most 1, got {start!r}; "
            "give the reference batch divided by the batch"
        )


def _ratio(setting: Setting, reference: int, rule: Rule) -> float:
    return scaled_lr(1.0, len(setting.batches[0][0]), reference=reference, rule=rule)


def parameter_groups(
    groups: list[Group],
    model: nn.Module,
    setting: Setting,
    *,
    reference_batch_size: int = 256,
    rule: Rule = "linear",
) -> list[Group]:
    """Scale every group's rate from the reference batch to the batch in use."""
    ratio = _ratio(setting, reference_batch_size, rule)
    setting.say(f"learning rates are multiplied by {ratio:g} for the size of the batch")
    return [{**group, "lr": ratio * group.get("lr", setting.lr)} for group in groups]


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    setting: Setting,
    *,
    reference_batch_size: int = 256,
    rule: Rule = "linear",
    warmup_epochs: float = 5.0,
) -> None:
    """Rise from the rate of the reference batch, where the batch in use is larger."""
    if not warmup_epochs >= 0:
        raise ValueError(
            f"linear-scaling(warmup_epochs={warmup_epochs}): expected at least 0, got "
            f"{warmup_epochs}; use 5, or 0 for none"
        )
    ratio = _ratio(setting, reference_batch_size, rule)
    steps = round(warmup_epochs * setting.steps_per_epoch)
    if ratio <= 1 or steps == 0:
        setting.say("no warm-up: the rate is not above that of the reference batch, or none asked")
        return
    WarmUp(optimizer, steps, 1 / ratio)
    setting.say(f"the rate rises over {steps} of {setting.total_steps} steps")


CARD = Card(
    name="linear-scaling",
    title="Linear scaling",
    summary="Multiplies the learning rate by the batch size over a reference batch, and rises to "
    "it over the first epochs.",
    room="optim",
    source=Source(
        authors="P. Goyal, P. Dollar, R. Girshick, P. Noordhuis, L. Wesolowski, A. Kyrola, "
        "A. Tulloch, Y. Jia, K. He",
        title="Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour",
        year=2017,
        arxiv="1706.02677",
    ),
    batch_of_one="as the model",
    keeps_evaluation=True,
    state=("the step counter of the warm-up",),
    best_for="Taking a recipe to a larger batch without a new search for the rate.",
    limits=(
        "Beyond some batch size, which depends on the data, accuracy falls whatever the rate.",
        "A rate that was searched at the batch in use must not be scaled again.",
    ),
    departures=("The square root of the ratio is an option, for Adam (rule=sqrt).",),
)

METHOD = Method(card=CARD, parameter_groups=parameter_groups, attach=attach)
