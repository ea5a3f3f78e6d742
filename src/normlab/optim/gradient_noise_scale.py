r"""The gradient noise scale: how large a batch is worth its cost, measured while training.

A batch of B samples shows the true gradient G plus noise of variance :math:`S / B`. Below
:math:`B_{noise} = S / |G|^2` larger batches save steps almost in proportion; above it they hardly
save any.

Source: S. McCandlish, J. Kaplan, D. Amodei and the OpenAI Dota team, "An Empirical Model of
Large-Batch Training", 2018, arXiv 1812.06162, appendix A.

Departs:
    - Averages are corrected for their start at zero, as Adam's are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from normlab.moments import group_of_several, wide


@dataclass(frozen=True)
class NoiseScale:
    r"""What two batch sizes show of the gradient.

    Attributes:
        noise: S, the trace of the covariance of one sample's gradient; may come out below 0 by
            chance.
        signal: :math:`|G|^2`, the square norm of the true gradient; likewise.
        num_estimates: How many pairs of gradients were averaged.
    """

    noise: float
    signal: float
    num_estimates: int = 1

    @property
    def scale(self) -> float:
        """The batch at which noise and signal are equal; infinite where no signal was seen."""
        return max(self.noise, 0.0) / self.signal if self.signal > 0 else float("inf")

    @property
    def suggested_batch_size(self) -> int | None:
        """The scale as a number of samples, at least 1; None where no signal was seen.

        At this batch training takes twice the fewest steps and twice the fewest samples.
        """
        return max(1, round(self.scale)) if self.signal > 0 else None


def noise_scale(
    small_square: float, big_square: float, small_batch: int, big_batch: int
) -> NoiseScale:
    r"""Return unbiased estimates from the square norms of two gradients at one point.

    .. math::
        |G|^2 = \frac{B_b |G_b|^2 - B_s |G_s|^2}{B_b - B_s}, \quad
        S = \frac{|G_s|^2 - |G_b|^2}{1 / B_s - 1 / B_b}

    Args:
        small_square: The square norm of the mean gradient over the small batch, or the mean of
            several such.
        big_square: That over the big batch.
        small_batch: Samples of the small batch.
        big_batch: Samples of the big one, more than that.

    Raises:
        ValueError: The batches are not in this order.

    Example:
        >>> noise_scale(5.0, 2.0, small_batch=1, big_batch=4)
        NoiseScale(noise=4.0, signal=1.0, num_estimates=1)
    """
    if not 1 <= small_batch < big_batch:
        raise ValueError(
            f"noise_scale(small_batch={small_batch}, big_batch={big_batch}): expected a small "
            f"batch of at least 1 below the big one, got {small_batch} and {big_batch}; accumulate "
            "several micro-batches or use several processes"
        )
    signal = (big_batch * big_square - small_batch * small_square) / (big_batch - small_batch)
    noise = (small_square - big_square) / (1 / small_batch - 1 / big_batch)
    return NoiseScale(noise, signal)


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
        self._small = (multiply**2 * self._square_norm(), batch_size)

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
        found = noise_scale(square.item(), self._square_norm().item(), small_batch, batch_size)
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

    @torch.no_grad()
    def _square_norm(self) -> Tensor:
        gradients = [wide(p.grad) for p in self.parameters if p.grad is not None]
        if not gradients:
            raise ValueError(
                "GradientNoiseScale: expected gradients, got none; call it between backward and "
                "the optimiser's step"
            )
        norms = torch._foreach_norm(gradients)  # pyright: ignore[reportPrivateImportUsage]
        return torch.stack([norm.to(norms[0].device) for norm in norms]).double().square().sum()
