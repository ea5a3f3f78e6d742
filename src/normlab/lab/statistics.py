"""Statistics of a comparison over seeds: intervals, paired tests, steps to a target.

Few seeds are the rule, so everything here says what it cannot know: an interval of one seed is
None, a test without two shared seeds has no p-value, and a seed that never reached a target
counts as infinity instead of being left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

LEVEL = 0.95
"""The confidence level of every interval in the report."""

ALPHA = 0.05
"""A corrected p-value below this is called significant."""

TARGET_FRACTIONS = (0.90, 0.95, 0.99)
"""Default targets, as fractions of the reference's best accuracy."""

# Differences of accuracies that agree to this relative precision are the same difference:
# subtracting two rounded fractions leaves noise of about 1e-16.
_SAME = 1e-9


@dataclass(frozen=True)
class PairedTest:
    """A method against the reference on the seeds that both have.

    Attributes:
        num_pairs: How many seeds both have.
        difference: Mean of ``method - reference`` over those seeds; None without any.
        interval: Confidence interval of the difference; None for fewer than two seeds.
        p_value: Two-sided p-value of the paired t-test; None where the test is not defined.
        reason: Why there is no p-value; None where there is one.
    """

    num_pairs: int
    difference: float | None
    interval: tuple[float, float] | None
    p_value: float | None
    reason: str | None


class OneSidedTest(NamedTuple):
    """Whether a method is better: t and p-value (None where undefined), p at most `ALPHA`, why."""

    t: float | None
    p_value: float | None
    significant: bool
    reason: str | None


@dataclass(frozen=True)
class TargetReached:
    """When the seeds of one method reached a target.

    Attributes:
        target: The accuracy aimed at, a fraction.
        reached: How many seeds reached it.
        count: How many seeds there are.
        first: For each seed the position (steps, or seconds) at which it first stood at or above
            the target; infinity for a seed that never did.
        median: The median of ``first`` with infinity counted as such: infinite as soon as half
            of the seeds missed the target (with an even number, as soon as one of the two
            middle seeds did).
    """

    target: float
    reached: int
    count: int
    first: tuple[float, ...]
    median: float


def confidence_interval(
    values: Sequence[float], level: float = LEVEL
) -> tuple[float, float] | None:
    r"""Return Student's t interval of the mean.

    .. math:: \bar x \pm t_{n-1,\,(1+c)/2}\; s / \sqrt n

    with :math:`s^2` the unbiased variance and :math:`c` the level. The interval is about the mean
    over seeds, not about a single run, and is not clipped to what an accuracy can be.

    Args:
        values: One value for each seed, finite.
        level: Confidence level, in (0, 1).

    Returns:
        Lower and upper end; None for a single value, whose spread is unknown.

    Raises:
        ValueError: There are no values, one is not finite, or the level is out of range.

    Example:
        >>> low, high = confidence_interval([0.97, 0.98, 0.99])
        >>> round(low, 4), round(high, 4)
        (0.9552, 1.0048)
        >>> confidence_interval([0.97]) is None
        True
    """
    _check_finite("confidence_interval", "values", values)
    _check_level("confidence_interval", level)
    if len(values) == 0:
        raise ValueError(
            "confidence_interval(values): expected at least one value, got none; "
            "leave out a method without any finished seed"
        )
    if len(values) == 1:
        return None
    mean, error = _mean_and_error(values)
    half = _t_quantile(len(values) - 1, level) * error
    return mean - half, mean + half


def paired_test(
    method: Mapping[int, float], reference: Mapping[int, float], level: float = LEVEL
) -> PairedTest:
    r"""Test whether a method differs from the reference, seed by seed.

    A seed fixes the data order and the initial draw, so the difference within a seed varies less
    than the values themselves. With :math:`d_i` the differences on the :math:`n` shared seeds,

    .. math:: t = \bar d \,/\, (s_d / \sqrt n), \qquad p = 2\,F_{n-1}(-|t|)

    Where the test is not defined the p-value is None and the reason is given: with fewer than two
    shared seeds, and where all differences are the same but not zero (t would be infinite, and
    p = 0 would claim certainty from a handful of seeds). If all differences are zero there is no
    evidence of a difference at all, and p is 1.

    Args:
        method: Seed to value, finite.
        reference: Seed to value, finite.
        level: Confidence level of the interval, in (0, 1).

    Returns:
        The mean difference with its interval and p-value, on the seeds both have.

    Raises:
        ValueError: A value is not finite, or the level is out of range.

    Example:
        >>> test = paired_test({0: 0.95, 1: 0.97, 2: 0.96}, {0: 0.93, 1: 0.94, 2: 0.95})
        >>> test.num_pairs, round(test.difference, 3), round(test.p_value, 4)
        (3, 0.02, 0.0742)
    """
    _check_finite("paired_test", "method", list(method.values()))
    _check_finite("paired_test", "reference", list(reference.values()))
    _check_level("paired_test", level)
    shared = sorted(method.keys() & reference.keys())
    if not shared:
        return PairedTest(0, None, None, None, "the two share no finished seed")
    differences = [method[seed] - reference[seed] for seed in shared]
    mean, error = _mean_and_error(differences)
    if len(shared) == 1:
        return PairedTest(1, mean, None, None, "one shared seed has no spread to test against")
    half = _t_quantile(len(shared) - 1, level) * error
    interval = (mean - half, mean + half)
    scale = max(max(abs(method[seed]), abs(reference[seed])) for seed in shared)
    if max(differences) - min(differences) <= _SAME * scale:
        if abs(mean) <= _SAME * scale:
            return PairedTest(len(shared), 0.0, (0.0, 0.0), 1.0, None)
        reason = "the difference is the same on every seed, which leaves the t-test undefined"
        return PairedTest(len(shared), mean, interval, None, reason)

    from scipy.special import stdtr

    p_value = 2.0 * float(stdtr(len(shared) - 1, -abs(mean / error)))
    return PairedTest(len(shared), mean, interval, min(p_value, 1.0), None)


def one_sided_paired_test(method: Sequence[float], reference: Sequence[float]) -> OneSidedTest:
    r"""Test whether a method is better than the reference, pair by pair.

    .. math:: t = \bar d \,/\, (s_d / \sqrt n), \qquad p = 1 - F_{n-1}(t)

    Exchanging the two gives 1 - p. Where `paired_test` has no p-value, there is none here.

    Args:
        method: One value for each pair (a seed, a fold), finite; larger is better.
        reference: The reference's values in the same order.

    Returns:
        Statistic, p-value and verdict.

    Raises:
        ValueError: The lengths differ, there is no pair, or a value is not finite.

    Example:
        >>> test = one_sided_paired_test([0.95, 0.97, 0.96], [0.93, 0.94, 0.95])
        >>> round(test.t, 3), round(test.p_value, 4), test.significant
        (3.464, 0.0371, True)
    """
    if len(method) != len(reference) or not len(method):
        raise ValueError(
            "one_sided_paired_test(method, reference): expected one reference value for each "
            f"value, got {len(method)} and {len(reference)}; leave out what has no partner"
        )
    two_sided = paired_test(dict(enumerate(method)), dict(enumerate(reference)))
    if two_sided.p_value is None:
        return OneSidedTest(None, None, False, two_sided.reason)
    mean, error = _mean_and_error([one - two for one, two in zip(method, reference, strict=True)])
    t = mean / error if two_sided.difference else 0.0
    p_value = two_sided.p_value / 2 if t >= 0 else 1.0 - two_sided.p_value / 2
    return OneSidedTest(t, p_value, p_value <= ALPHA, None)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    r"""Correct p-values for having made several tests (Holm's step-down).

    With the :math:`m` values in rising order, the corrected :math:`i`-th is

    .. math:: \tilde p_{(i)} = \max_{j \le i} \min\bigl(1, (m - j + 1)\, p_{(j)}\bigr)

    so that calling those below 0.05 significant is wrong anywhere in the family with a
    probability of at most 0.05, whatever the tests' dependence.

    Args:
        p_values: One for each test, in [0, 1]; None for a test that could not be made, which is
            kept as None and does not count towards :math:`m`.

    Returns:
        The corrected values in the order given.

    Raises:
        ValueError: A value lies outside [0, 1].

    Example:
        >>> holm([0.01, 0.04, None, 0.03])
        [0.03, 0.06, None, 0.06]

    Source:
        S. Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    for p_value in p_values:
        if p_value is not None and not 0.0 <= p_value <= 1.0:
            raise ValueError(
                f"holm(p_values): expected values in [0, 1] or None, got {p_value!r}; "
                "pass p-values as they come from the tests"
            )
    made = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p_value, index) in enumerate(made):
        largest = max(largest, min(1.0, (len(made) - rank) * p_value))
        corrected[index] = largest
    return corrected


def steps_to_target(
    curves: Sequence[Sequence[tuple[float, float | None]]], target: float
) -> TargetReached:
    """Return when each seed first stood at or above a target, and the median over all seeds.

    A seed that never reached the target is censored: all that is known is that it would have
    taken longer. It counts as infinity, so that a method is not made to look fast by the seeds
    that failed. Positions are those of the evaluations; nothing is interpolated between them.

    Args:
        curves: For each seed its evaluations ``(position, accuracy)`` in order; the position may
            be a number of steps or of seconds; an accuracy of None (not a number) reaches nothing.
        target: The accuracy aimed at, a fraction in (0, 1].

    Returns:
        How many seeds reached the target, when, and the median.

    Raises:
        ValueError: The target lies outside (0, 1].

    Example:
        >>> steps_to_target([[(0, 0.1), (10, 0.8), (20, 0.9)], [(0, 0.1), (10, 0.7)]], 0.8)
        TargetReached(target=0.8, reached=1, count=2, first=(10.0, inf), median=inf)
    """
    if not 0.0 < target <= 1.0:
        raise ValueError(
            f"steps_to_target(target={target!r}): expected a fraction in (0, 1], got {target!r}; "
            "give 0.95 for 95 %"
        )
    first = tuple(
        next(
            (float(at) for at, accuracy in curve if accuracy is not None and accuracy >= target),
            math.inf,
        )
        for curve in curves
    )
    return TargetReached(
        target=target,
        reached=sum(math.isfinite(position) for position in first),
        count=len(first),
        first=first,
        median=_median(first),
    )


def default_targets(reference_best: float) -> list[float]:
    """Return the targets of a study that names none.

    They are 90 %, 95 % and 99 % of the reference's mean best accuracy, rounded down to a
    thousandth: the first tells who starts fast, the last who gets as far as the reference does.

    Args:
        reference_best: Mean over seeds of the reference's best accuracy, a fraction in [0, 1].

    Returns:
        Rising targets; none where the reference learned nothing (a best accuracy near zero).

    Raises:
        ValueError: The accuracy lies outside [0, 1].

    Example:
        >>> default_targets(0.98)
        [0.882, 0.931, 0.97]
    """
    if not 0.0 <= reference_best <= 1.0:
        raise ValueError(
            f"default_targets(reference_best={reference_best!r}): expected a fraction in [0, 1], "
            f"got {reference_best!r}; give 0.95 for 95 %"
        )
    # The small addition keeps 0.95 * 0.98 = 0.9309999... from losing its last digit.
    targets = [
        math.floor(fraction * reference_best * 1000 + 1e-6) / 1000 for fraction in TARGET_FRACTIONS
    ]
    return sorted({target for target in targets if target > 0.0})


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error (0 for one value, where nobody asks for it)."""
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return mean, 0.0
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return mean, math.sqrt(variance / count)


def _t_quantile(degrees: int, level: float) -> float:
    # scipy.special instead of scipy.stats: the same function, imported ten times as fast.
    from scipy.special import stdtrit

    return float(stdtrit(degrees, 0.5 * (1.0 + level)))


def _median(values: Sequence[float]) -> float:
    if not values:
        return math.inf
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return 0.5 * (ordered[middle - 1] + ordered[middle])


def _check_finite(operation: str, name: str, values: Sequence[float]) -> None:
    for value in values:
        if not math.isfinite(value):
            raise ValueError(
                f"{operation}({name}): expected finite numbers, got {value!r}; "
                "leave out seeds that diverged"
            )


def _check_level(operation: str, level: float) -> None:
    if not 0.0 < level < 1.0:
        raise ValueError(
            f"{operation}(level={level!r}): expected a fraction in (0, 1), got {level!r}; "
            "give 0.95 for 95 %"
        )


def share_interval(count: int, total: int) -> tuple[float, float]:
    """Return the exact (Clopper-Pearson) 95 % interval of a share.

    Args:
        count: How many of them, 0 to ``total``.
        total: How many there are, at least 1.

    Example:
        >>> low, high = share_interval(6, 6)
        >>> round(low, 3), high
        (0.541, 1.0)

    Source:
        C. J. Clopper, E. S. Pearson, The use of confidence or fiducial limits, 1934.
    """
    from scipy.special import betaincinv

    tail = (1 - LEVEL) / 2
    low = 0.0 if count == 0 else float(betaincinv(count, total - count + 1, tail))
    high = 1.0 if count == total else float(betaincinv(count + 1, total - count, 1 - tail))
    return low, high
