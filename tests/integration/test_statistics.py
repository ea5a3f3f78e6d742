import math

import numpy as np
import pytest
from scipy import stats

from normlab.lab.statistics import (
    TargetReached,
    confidence_interval,
    default_targets,
    holm,
    one_sided_paired_test,
    paired_test,
    steps_to_target,
)


@pytest.mark.parametrize("count", [2, 3, 5, 20])
@pytest.mark.parametrize("level", [0.9, 0.95, 0.99])
def test_interval_is_scipys_t_interval(count, level):
    values = np.random.default_rng(count).normal(0.9, 0.02, count)
    expected = stats.t.interval(level, count - 1, values.mean(), stats.sem(values))
    assert confidence_interval(list(values), level) == pytest.approx(expected, rel=1e-9)


def test_interval_of_one_seed_is_unknown():
    assert confidence_interval([0.9]) is None


def test_interval_covers_the_mean_as_often_as_it_says():
    generator = np.random.default_rng(0)
    draws = generator.normal(0.5, 0.1, (2000, 3))
    intervals = [confidence_interval(list(draw)) for draw in draws]
    covered = np.mean([low <= 0.5 <= high for low, high in intervals])
    assert 0.935 <= covered <= 0.965  # three standard errors around 0.95


@pytest.mark.parametrize("count", [2, 3, 7])
def test_paired_test_is_scipys(count):
    generator = np.random.default_rng(count)
    method, reference = generator.normal(0.9, 0.02, (2, count))
    test = paired_test(dict(enumerate(method)), dict(enumerate(reference)))
    expected = stats.ttest_rel(method, reference)
    assert test.num_pairs == count
    assert test.difference == pytest.approx(np.mean(method - reference))
    assert test.p_value == pytest.approx(expected.pvalue, rel=1e-9)
    assert test.interval == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert test.reason is None


def test_only_shared_seeds_are_compared():
    test = paired_test({0: 0.9, 1: 0.8, 7: 0.1}, {1: 0.7, 0: 0.85, 3: 0.0})
    assert test.num_pairs == 2
    assert test.difference == pytest.approx(0.075)


def test_pairing_sees_what_an_unpaired_test_does_not():
    reference = {0: 0.70, 1: 0.80, 2: 0.90}
    method = {0: 0.711, 1: 0.810, 2: 0.912}
    assert paired_test(method, reference).p_value < 0.01
    assert stats.ttest_ind(list(method.values()), list(reference.values())).pvalue > 0.8


@pytest.mark.parametrize(
    ("method", "reference", "difference", "p_value", "reason"),
    [
        ({0: 0.9}, {1: 0.9}, None, None, "share no finished seed"),
        ({}, {}, None, None, "share no finished seed"),
        ({0: 0.9}, {0: 0.8}, 0.1, None, "one shared seed"),
        ({0: 0.9, 1: 0.7}, {0: 0.8, 1: 0.6}, 0.1, None, "same on every seed"),
        ({0: 0.9, 1: 0.7}, {0: 0.9, 1: 0.7}, 0.0, 1.0, None),
        ({0: 0.0, 1: 0.0}, {0: 0.0, 1: 0.0}, 0.0, 1.0, None),
    ],
)
def test_where_the_test_is_not_defined(method, reference, difference, p_value, reason):
    test = paired_test(method, reference)
    assert test.difference == (None if difference is None else pytest.approx(difference))
    assert test.p_value == p_value
    assert (test.reason is None) if reason is None else (reason in test.reason)


def test_one_sided_test_of_five_pairs():
    """Computed in closed form for four degrees of freedom; close, but not significant."""
    method = [91.7, 93.4, 92.2, 90.0, 91.9]
    reference = [91.0, 92.7, 92.2, 90.1, 91.5]
    test = one_sided_paired_test(method, reference)
    assert test.t == pytest.approx(2.0104621, abs=5e-8)
    assert test.p_value == pytest.approx(0.0573692, abs=5e-8)
    assert not test.significant
    exchanged = one_sided_paired_test(reference, method)
    assert exchanged.t == pytest.approx(-test.t)
    assert exchanged.p_value == pytest.approx(1 - test.p_value)
    assert not exchanged.significant


@pytest.mark.parametrize("count", [2, 3, 15])
@pytest.mark.parametrize("gain", [-0.05, 0.0, 0.05])
def test_one_sided_test_is_scipys(count, gain):
    generator = np.random.default_rng(count)
    method, reference = generator.normal(0.9, 0.02, (2, count))
    test = one_sided_paired_test(list(method + gain), list(reference))
    expected = stats.ttest_rel(method + gain, reference, alternative="greater")
    assert test.t == pytest.approx(expected.statistic, rel=1e-9)
    assert test.p_value == pytest.approx(expected.pvalue, rel=1e-9)
    assert test.significant == (expected.pvalue <= 0.05)


@pytest.mark.parametrize(
    ("method", "reference", "t", "p_value", "reason"),
    [
        ([0.9], [0.8], None, None, "one shared seed"),
        ([0.9, 0.7], [0.8, 0.6], None, None, "same on every seed"),
        ([0.9, 0.7], [0.9, 0.7], 0.0, 0.5, None),
    ],
)
def test_where_the_one_sided_test_is_not_defined(method, reference, t, p_value, reason):
    test = one_sided_paired_test(method, reference)
    assert (test.t, test.p_value, test.significant) == (t, p_value, False)
    assert (test.reason is None) if reason is None else (reason in test.reason)


def test_holm_by_hand():
    # 0.01 * 4, 0.02 * 3, then 0.04 * 2 = 0.08 and 0.045 * 1, lifted to 0.08.
    assert holm([0.04, 0.01, 0.045, 0.02]) == pytest.approx([0.08, 0.04, 0.08, 0.06])


def test_holm_leaves_out_tests_that_were_not_made():
    assert holm([None, 0.03, None]) == [None, 0.03, None]
    assert holm([]) == []


def test_holm_never_exceeds_one_and_keeps_the_order():
    p_values = list(np.random.default_rng(1).uniform(0, 1, 50))
    corrected = holm(p_values)
    assert all(p <= c <= 1.0 for p, c in zip(p_values, corrected, strict=True))
    assert np.all(np.diff(np.array(corrected)[np.argsort(p_values)]) >= 0)


def test_a_seed_that_never_arrives_counts_as_infinitely_late():
    curves = [
        [(0, 0.1), (10, 0.5), (20, 0.9)],
        [(0, 0.1), (10, 0.9), (20, 0.8)],
        [(0, 0.1), (10, None), (20, 0.7)],
    ]
    found = steps_to_target(curves, 0.9)
    assert found == TargetReached(0.9, 2, 3, (20.0, 10.0, math.inf), 20.0)
    assert steps_to_target(curves, 0.95).median == math.inf
    assert steps_to_target(curves[1:], 0.9).median == math.inf  # half of them missed it
    assert steps_to_target(curves[:2], 0.9).median == 15.0
    assert steps_to_target([], 0.9) == TargetReached(0.9, 0, 0, (), math.inf)


def test_default_targets_are_fractions_of_the_reference():
    assert default_targets(1.0) == [0.9, 0.95, 0.99]
    assert default_targets(0.98) == [0.882, 0.931, 0.97]
    assert default_targets(0.0) == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: confidence_interval([]), r"confidence_interval\(values\): expected at least one"),
        (lambda: confidence_interval([0.1, math.nan]), r"expected finite numbers, got nan; "),
        (lambda: confidence_interval([0.1, 0.2], 95), r"confidence_interval\(level=95\)"),
        (lambda: paired_test({0: math.inf}, {0: 1.0}), r"paired_test\(method\): expected finite"),
        (lambda: paired_test({}, {}, 1.0), r"paired_test\(level=1.0\): expected a fraction"),
        (lambda: one_sided_paired_test([0.1, 0.2], [0.1]), r"for each value, got 2 and 1; leave"),
        (lambda: one_sided_paired_test([], []), r"for each value, got 0 and 0; leave"),
        (lambda: one_sided_paired_test([0.1], [math.nan]), r"\(reference\): expected finite"),
        (lambda: holm([1.2]), r"holm\(p_values\): expected values in \[0, 1\] or None, got 1.2"),
        (lambda: steps_to_target([], 95), r"steps_to_target\(target=95\): .* give 0.95"),
        (lambda: default_targets(97), r"default_targets\(reference_best=97\): expected"),
    ],
)
def test_wrong_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
