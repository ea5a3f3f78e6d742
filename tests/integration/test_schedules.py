"""The learning rate's course."""

import math

import pytest

from normlab.lab.schedules import rate_factor


def test_constant():
    assert {rate_factor(step, 10, "constant") for step in range(10)} == {1.0}


def test_cosine_falls_from_one_to_zero():
    values = [rate_factor(step, 100, "cosine") for step in range(101)]
    assert values[0] == 1.0
    assert values[50] == pytest.approx(0.5)
    assert values[100] == pytest.approx(0.0)
    assert values[25] == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert values == sorted(values, reverse=True)


def test_warm_up_rises_linearly_and_hands_over():
    values = [rate_factor(step, 20, "constant", warmup_steps=4) for step in range(6)]
    assert values == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert rate_factor(4, 20, "cosine", warmup_steps=4) == 1.0


def test_warm_up_may_last_throughout():
    assert rate_factor(9, 10, "cosine", warmup_steps=10) == pytest.approx(10 / 11)
