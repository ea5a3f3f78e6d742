r"""The gradient noise scale: how large a batch is worth its cost, measured while training.

A batch of B samples shows the true gradient G plus noise of variance :math:`S / B`. Below
:math:`B_{noise} = S / |G|^2` larger batches save steps almost in proportion; above it they hardly
save any.

Source: S. McCandlish, J. Kaplan, D. Amodei and the OpenAI Dota team, "An Empirical Model of
Large-Batch Training", 2018, arXiv 1812.06162, appendix A.

Departs:
    - Averages are corrected for their start at zero, as Adam's are.
    - As a method it measures fresh batches on a copy of the model, a few of them now and then, so
      that training is to the bit what it was; the paper measures the batches of training.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, distributed, nn

from normlab.method import Card, Method, Setting, Source
from normlab.moments import group_of_several, wide
from normlab.optim.arguments import is_count, is_number, require
from normlab.optim.live import go_live, retire
from normlab.optim.noise_scale import NoiseScale, measure_noise_scale, noise_scale, square_norm

_KEY = "gradient_noise_scale"
_QUARTERS = 4


class GradientNoiseScale:
    """Measures the noise scale while training accumulates gradients or shares them.

    With accumulation, the gradient after the first micro-batch is the small one, and that before
    the optimiser's step the big one; nothing is stored but two numbers. Under
    ``DistributedDataParallel`` without accumulation register `comm_hook`, which sees each process's
    own gradient.

    Args:
        parameters: The parameters whose gradients are measured.
        momentum: The weight of the newest pair in the averages, above 0 and at most 1.
        process_group: The processes that share gradients; None for all of them. Their small
            gradients are averaged in one collective for each pair.

    Raises:
        ValueError: A momentum out of its range.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> meter = GradientNoiseScale(model.parameters())
        >>> batch = torch.randn(8, 2)
        >>> for number, part in enumerate(batch.chunk(4)):
        ...     (model(part).square().mean() / 4).backward()
        ...     if number == 0:
        ...         meter.small(batch_size=2, multiply=4)
        >>> meter.big(batch_size=8)
        >>> meter.estimate().num_estimates
        1
    """

    def __init__(
        self, parameters: Iterable[Tensor], momentum: float = 0.05, process_group: Any = None
    ) -> None:
        if not 0 < momentum <= 1:
            raise ValueError(
                f"GradientNoiseScale(momentum={momentum}): expected a number above 0 and at most "
                f"1, got {momentum}; use 0.05"
            )
        self.parameters = list(parameters)
        self.momentum = momentum
        self.process_group = process_group
        self._small: tuple[Tensor, int] | None = None
        self._noise, self._signal, self._count = 0.0, 0.0, 0

    def small(self, batch_size: int, multiply: float = 1.0) -> None:
        """Measure the gradients present as those of this process's small batch.

        Args:
            batch_size: Its samples, equal on all processes.
            multiply: What makes the gradients those of a mean: the number of micro-batches where
                the loss was divided by it.
        """
        self._small = (multiply**2 * square_norm(self.parameters), batch_size)

    def big(self, batch_size: int) -> None:
        """Measure the gradients present as those of the whole batch, and move the averages.

        Args:
            batch_size: Its samples, over all micro-batches and processes.

        Raises:
            ValueError: No small batch was measured since the last big one, or it is not smaller.
        """
        if self._small is None:
            raise ValueError(
                "GradientNoiseScale.big(): expected a small batch measured before, got none; call "
                "small() after the first micro-batch, or register comm_hook"
            )
        (square, small_batch), self._small = self._small, None
        group = group_of_several(self.process_group)
        if group is not None:
            square = square.clone()
            distributed.all_reduce(square, group=group)
            square /= distributed.get_world_size(group)
        found = noise_scale(
            square.item(), square_norm(self.parameters).item(), small_batch, batch_size
        )
        # Each of the two is averaged by itself: a ratio of unbiased numbers is biased.
        self._noise += self.momentum * (found.noise - self._noise)
        self._signal += self.momentum * (found.signal - self._signal)
        self._count += 1

    def comm_hook(self, batch_size: int) -> Any:
        """Return a hook for ``DistributedDataParallel.register_comm_hook(None, hook)``.

        It measures each process's own gradient as the small one, then averages as without it.

        Args:
            batch_size: Samples of one process's batch.
        """

        # Without annotations, which torch would refuse in this file, where they are text.
        def hook(_, bucket):
            local = bucket.buffer()
            square = wide(local.detach()).square().sum().double()
            before = torch.zeros_like(square) if bucket.index() == 0 else self._before()
            self._small = (before + square, batch_size)
            group = group_of_several(self.process_group)
            if group is None:
                future = torch.futures.Future()
                future.set_result(local)
                return future
            local.div_(distributed.get_world_size(group))
            work = distributed.all_reduce(local, group=group, async_op=True)
            assert work is not None
            return work.get_future().then(lambda done: done.value()[0])

        return hook

    def _before(self) -> Tensor:
        assert self._small is not None
        return self._small[0]

    def estimate(self) -> NoiseScale:
        """Return the averages so far.

        Raises:
            ValueError: Nothing was measured.
        """
        if self._count == 0:
            raise ValueError(
                "GradientNoiseScale.estimate(): expected at least one pair of gradients, got none; "
                "call small() and big() in each step"
            )
        known = 1 - (1 - self.momentum) ** self._count
        return NoiseScale(self._noise / known, self._signal / known, self._count)

    def state_dict(self) -> dict[str, float | int]:
        """Return the averages as plain data."""
        return {"noise": self._noise, "signal": self._signal, "count": self._count}

    def load_state_dict(self, state_dict: dict[str, float | int]) -> None:
        """Take over averages from `state_dict`."""
        self._noise, self._signal = float(state_dict["noise"]), float(state_dict["signal"])
        self._count = int(state_dict["count"])


class NoiseScaleProbe:
    """Measures a model's noise scale in the course of training, around any loop.

    Before some of the optimiser's steps it draws fresh batches and calls `measure_noise_scale`;
    estimates are averaged over each quarter of training. The averages and the step counter stand
    in ``optimizer.param_groups[0]["gradient_noise_scale"]``: a probe of an optimiser that has them
    from a checkpoint goes on from there. Estimates that are not finite are left out.

    Args:
        model: The model.
        optimizer: Its optimiser.
        setting: Batches, loss and the number of steps; ``say`` is told of each quarter. Batches
            come from its ``draw``, or are ``batches`` in turn: as many as a measurement takes.
        num_batches: How many batches a measurement takes, at least 2.
        share: About how many passes measurements take for each pass of training, above 0 and at
            most 1; more where a quarter would be left without one.

    Raises:
        ValueError: A value out of its range, or an optimiser that another probe acts on.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> batches = tuple((torch.randn(8, 3), torch.randint(2, (8,))) for _ in range(4))
        >>> probe = NoiseScaleProbe(model, optimizer, Setting(batches=batches, total_steps=40))
        >>> for x, y in batches * 10:
        ...     optimizer.zero_grad()
        ...     nn.functional.cross_entropy(model(x), y).backward()
        ...     optimizer.step()
        >>> [quarter.num_estimates for quarter in probe.quarters()]
        [1, 1, 1, 1]
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        setting: Setting,
        num_batches: int = 4,
        share: float = 0.1,
    ) -> None:
        enough = is_count(num_batches) and num_batches >= 2
        require(enough, "NoiseScaleProbe", "num_batches", num_batches, "2, 3, 4, ...")
        valid = is_number(share) and 0 < share <= 1
        require(valid, "NoiseScaleProbe", "share", share, "a share above 0 and at most 1")
        self.model, self.optimizer, self.setting = model, optimizer, setting
        self.num_batches = int(num_batches)
        wanted = math.ceil(self.num_batches / share)
        self.steps_apart = max(1, min(wanted, setting.total_steps // _QUARTERS))
        self._said: set[int] = set()
        go_live(self, optimizer, _KEY)
        optimizer.param_groups[0].setdefault(_KEY, _fresh())
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def quarters(self) -> list[NoiseScale]:
        """Return the averages over each quarter of training that was measured, in order."""
        return [_average(*sums) for sums in self._progress()["sums"] if sums[2]]

    def remove(self) -> None:
        """Stop."""
        for hook in self._hooks:
            hook.remove()
        retire(self.optimizer, _KEY)

    def _progress(self) -> dict[str, Any]:
        return self.optimizer.param_groups[0].setdefault(_KEY, _fresh())

    def _before_step(self, *_: Any) -> None:
        progress = self._progress()
        number, place = divmod(progress["step"], self.steps_apart)
        # Midway: the first step is the one whose memory is measured.
        if place != self.steps_apart // 2:
            return
        first = number * self.num_batches
        batches = map(self.setting.fresh_batch, range(first, first + self.num_batches))
        found = measure_noise_scale(self.model, batches, self.setting.loss)
        if math.isfinite(found.noise) and math.isfinite(found.signal):
            sums = progress["sums"][min(self._quarter(progress["step"]), _QUARTERS - 1)]
            for index, value in enumerate((found.noise, found.signal, 1)):
                sums[index] += value

    def _after_step(self, *_: Any) -> None:
        progress = self._progress()
        progress["step"] += 1
        for quarter in range(self._quarter(progress["step"])):
            sums = progress["sums"][quarter]
            # A run that goes on from a checkpoint reports what was found before, too.
            if quarter not in self._said and sums[2]:
                self._said.add(quarter)
                self.setting.say(self._sentence(quarter, _average(*sums)))

    def _sentence(self, quarter: int, found: NoiseScale) -> str:
        size = found.suggested_batch_size
        # More digits than two would promise what a few estimates do not hold.
        about = None if size is None else f"about {float(f'{size:.2g}'):.0f} samples"
        estimates = "1 estimate" if found.num_estimates == 1 else f"{found.num_estimates} estimates"
        return (
            f"noise scale in quarter {quarter + 1} of training: {about or 'no signal seen'}, at "
            f"batches of {len(self.setting.batches[0][1])} ({estimates})"
        )

    def _quarter(self, step: int) -> int:
        """Return 0 to 3, or 4 after the last planned step."""
        return min(_QUARTERS, _QUARTERS * step // max(1, self.setting.total_steps))


def _fresh() -> dict[str, Any]:
    return {"step": 0, "sums": [[0.0, 0.0, 0] for _ in range(_QUARTERS)]}


def _average(noise: float, signal: float, count: int) -> NoiseScale:
    return NoiseScale(noise / count, signal / count, count)


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    setting: Setting,
    *,
    num_batches: int = 4,
    share: float = 0.1,
) -> None:
    """Measure the noise scale in each quarter of training."""
    probe = NoiseScaleProbe(model, optimizer, setting, num_batches, share)
    setting.say(
        f"the gradient noise scale is measured every {probe.steps_apart} steps on "
        f"{probe.num_batches} batches"
    )


CARD = Card(
    name="gradient-noise-scale",
    title="Gradient noise scale",
    summary="Trains as without it, and reports at which batch size the gradient's noise equals its "
    "signal.",
    room="optim",
    source=Source(
        authors="S. McCandlish, J. Kaplan, D. Amodei, OpenAI Dota Team",
        title="An Empirical Model of Large-Batch Training",
        year=2018,
        arxiv="1812.06162",
    ),
    batch_of_one="as the model",
    keeps_evaluation=True,
    state=("the averages of each quarter of training, and the step counter",),
    best_for="Choosing a batch size: below the scale a larger batch saves steps almost in "
    "proportion, far above it hardly any.",
    limits=(
        "About a tenth more passes, and a copy of the model while it measures.",
        "A quarter of training with one or two estimates gives a rough number: train longer, or "
        "give share=0.5.",
        "Where layers use batch statistics, the scale is that of gradients at the batch in use.",
        "Quarters are those of the steps planned: batch-growth takes fewer, and the last quarters "
        "are then not reported.",
    ),
    departures=(
        "Measures fresh batches on a copy of the model, so that training is to the bit what it "
        "was.",
        "The loss alone is measured: without penalties, mixing of samples and soft labels.",
    ),
)

METHOD = Method(card=CARD, attach=attach)
