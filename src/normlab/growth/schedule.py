"""When a network grows, and how wide it is then: closed forms, known before training begins.

A schedule has several growth steps. All-at-once lets every pair of layers grow at each of them;
round-robin lets one pair grow, in turn.

Source: U. Evci, B. van Merrienboer, T. Unterthiner, M. Vladymyrov, F. Pedregosa, "GradMax: Growing
Neural Networks using Gradient Information", 2022, arXiv 2201.05125.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GrowthSchedule:
    """Growth after every multiple of ``every`` steps from ``start`` on, ``num_growths`` times.

    Args:
        start: The first step of the optimiser after which the network may grow, at least 1.
        every: The number of steps between growths, at least 1.
        num_growths: The number of growth steps, at least 1; with ``round_robin`` each of them
            grows one pair.
        round_robin: Whether one pair grows at a time, in turn.

    Raises:
        ValueError: A value out of its range.

    Example:
        >>> GrowthSchedule(start=10_000, every=2500, num_growths=3).steps()
        [10000, 12500, 15000]
        >>> GrowthSchedule(start=10, every=4, num_growths=2).steps()
        [12, 16]
    """

    start: int
    every: int
    num_growths: int
    round_robin: bool = False

    def __post_init__(self) -> None:
        for name in ("start", "every", "num_growths"):
            value = getattr(self, name)
            if value < 1 or value != int(value):
                raise ValueError(
                    f"GrowthSchedule({name}={value!r}): expected 1, 2, 3, ..., got {value!r}; "
                    "give a whole number"
                )

    @property
    def first(self) -> int:
        """The step after which the network grows for the first time."""
        return -(-self.start // self.every) * self.every

    def steps(self) -> list[int]:
        """Return the steps after which the network grows."""
        return [self.first + number * self.every for number in range(self.num_growths)]

    def growth_at(self, step: int) -> int | None:
        """Return the number, from 0, of the growth after a step; None where there is none."""
        number, rest = divmod(step - self.first, self.every)
        return number if rest == 0 and 0 <= number < self.num_growths else None

    def pairs_at(self, growth: int, num_pairs: int) -> range:
        """Return the positions of the pairs that grow at a growth.

        Args:
            growth: The number of the growth, from 0.
            num_pairs: How many pairs there are.
        """
        if not self.round_robin:
            return range(num_pairs)
        turn = growth % num_pairs
        return range(turn, turn + 1)

    def turns(self, pair: int, growths: int, num_pairs: int) -> int:
        """Return how often a pair has grown.

        Args:
            pair: The position of the pair, from 0.
            growths: How many growths there were.
            num_pairs: How many pairs there are.

        Example:
            >>> schedule = GrowthSchedule(150, 150, 6, round_robin=True)
            >>> [schedule.turns(pair, growths=5, num_pairs=3) for pair in range(3)]
            [2, 2, 1]
        """
        growths = min(growths, self.num_growths)
        return (growths - pair + num_pairs - 1) // num_pairs if self.round_robin else growths


def units_per_growth(width: int, fraction: float = 0.25) -> int:
    """Return how many units a pair gains at each growth: ``max(1, int(width * fraction))``.

    Args:
        width: The width before the first growth.
        fraction: The share of it, above 0.

    Example:
        >>> 4 + 12 * units_per_growth(4)
        16
    """
    return max(1, int(width * fraction))


def spread_width(start: int, final: int, turn: int, turns: int) -> int:
    """Return the width after some of several growths that end exactly at a final width.

    Args:
        start: The width before the first growth.
        final: The width after the last one.
        turn: How many growths there were.
        turns: How many there will have been.

    Example:
        >>> [spread_width(4, 16, turn, 12) for turn in (0, 1, 2, 12)]
        [4, 5, 6, 16]
        >>> [spread_width(2, 10, turn, 12) for turn in (0, 1, 2, 12)]
        [2, 2, 3, 10]
    """
    return start + (final - start) * min(turn, turns) // turns


def extra_epochs(schedule: GrowthSchedule, start_fraction: float, steps_per_epoch: int) -> float:
    r"""Return by how many epochs to extend training so that it costs as much as the full width.

    .. math::
        \bigl((1 - w) s + \tfrac{1 - w}{2} f (n - 1)\bigr) / E

    with first growth s, interval f and number n of growths, and E steps in an epoch: what the
    layers that grow saved. Their cost is taken as proportional to their width, as it is for a
    pair that is grown between and has fixed widths around it.

    Args:
        schedule: When the network grows, all pairs at once.
        start_fraction: The share w of the final width at the start, from 0 to 1.
        steps_per_epoch: The number E.

    Example:
        >>> schedule = GrowthSchedule(start=10_000, every=2500, num_growths=12)
        >>> extra_epochs(schedule, 0.25, steps_per_epoch=390)
        45.67...
    """
    saved = schedule.first + schedule.every * (schedule.num_growths - 1) / 2
    return (1 - start_fraction) * saved / steps_per_epoch
