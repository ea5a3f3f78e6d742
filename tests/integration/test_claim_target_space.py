"""The claim about target space: its toy problems, and findings that can go either way."""

import json
import math

import pytest
import torch
from torch import nn

from normlab.lab.claims import target_space
from normlab.lab.claims.claim import FAILS, HOLDS, UNDECIDED
from normlab.lab.claims.target_space_training import (
    BitMemory,
    Spirals,
    bits,
    start_weights_,
    train_bit_memory,
    train_spirals,
    two_spirals,
)
from normlab.weights.target_space_recurrent import RecurrentLayer


def verdicts(findings):
    return [finding.verdict for finding in findings]


def test_spirals_are_those_of_the_sheet():
    points, classes = two_spirals()
    assert points.shape == (194, 2)
    for i in (0, 1, 50, 96):
        radius, angle = 0.65 + 0.0609375 * i, i * math.pi / 16
        expected = torch.tensor([radius * math.cos(angle), radius * math.sin(angle)])
        torch.testing.assert_close(points[i], expected)
        torch.testing.assert_close(points[97 + i], -expected)
        assert (classes[i], classes[97 + i]) == (0, 1)
    between, _ = two_spirals(between=True)
    torch.testing.assert_close(between[:96].norm(dim=1), points[:96].norm(dim=1) + 0.0609375 / 2)


def test_weights_start_from_a_cut_normal():
    generator = torch.Generator().manual_seed(0)
    layer = RecurrentLayer(10, 300)
    start_weights_(layer, generator)
    std = math.sqrt(6 / 610)
    for weight in (layer.cell.weight_ih_l0, layer.cell.weight_hh_l0):
        assert weight.abs().max() <= 2 * std
        assert weight.std().item() == pytest.approx(0.8796 * std, rel=0.03)
    assert not layer.cell.bias_ih_l0.any()
    dense = nn.Linear(100, 200)
    start_weights_(dense, generator)
    assert dense.weight.std().item() == pytest.approx(0.8796 * math.sqrt(6 / 300), rel=0.03)


@pytest.mark.parametrize("space", ["targets", "weights"])
def test_training_is_a_function_of_its_seed(space):
    assert train_spirals(space, 3, steps=5) == train_spirals(space, 3, steps=5)
    assert train_spirals(space, 3, steps=5) != train_spirals(space, 4, steps=5)
    options = {"delay": 3, "steps": 4, "lr": 0.01, "batch_size": 4, "realisation_size": 2}
    told = []
    one = train_bit_memory(space, 3, **options, on_step=lambda *line: told.append(line))
    assert one == train_bit_memory(space, 3, **options)
    assert one != train_bit_memory(space, 4, **options)
    assert [step for step, _ in told] == [1, 2, 3, 4]
    assert told[-1][1] == one.loss
    assert set(bits((50, 50), torch.Generator().manual_seed(0)).unique().tolist()) == {0.0, 1.0}


def test_a_short_memory_is_learned_in_target_space():
    found = train_bit_memory("targets", 5, delay=2, steps=80, lr=0.02, batch_size=8)
    assert found.accuracy > 0.95


def test_training_that_leaves_the_finite_numbers_counts_as_nothing_right():
    found = train_bit_memory("weights", 0, delay=2, steps=3, lr=math.inf)
    assert found.accuracy == 0.0
    assert train_spirals("weights", 0, steps=3, lr=math.inf).training == 0.0


def spirals(steps, test):
    return {
        seed: Spirals(1.0 if at is not None else 0.9, test + 0.001 * (seed % 3), at)
        for seed, at in enumerate(steps)
    }


def test_spiral_findings_go_both_ways():
    judge = target_space.judge_spirals
    solved, not_solved = [300] * 20, [None] * 20
    good = judge(spirals(solved, 0.98), spirals(not_solved, 0.9))
    assert verdicts(good) == [HOLDS] * 3
    assert [finding.n for finding in good] == [20, 20, 20]
    assert good[2].measured == pytest.approx(8.0)
    json.dumps([finding.details for finding in good], allow_nan=False)
    assert verdicts(judge(spirals(not_solved, 0.9), spirals(solved, 0.98))) == [FAILS] * 3
    some = [300] * 8 + [None] * 12
    good = judge(spirals(solved, 0.98), spirals(some, 0.9))
    assert (good[1].measured, good[1].n) == (1.0, 12)
    mixed = judge(spirals(some, 0.9), spirals(some[::-1], 0.9))
    assert verdicts(mixed)[:2] == [UNDECIDED, UNDECIDED]
    assert mixed[1].n == 16
    same = judge(spirals(solved, 0.98), spirals(solved, 0.9))
    assert (same[1].verdict, same[1].measured) == (UNDECIDED, None)


def memory(accuracy, seeds=range(8)):
    return {seed: BitMemory(accuracy - 0.001 * (seed % 3), 0.1) for seed in seeds}


def test_bit_memory_findings_go_both_ways():
    judge = target_space.judge_bit_memory
    good = judge(memory(1.0), {0.001: memory(0.5), 0.01: memory(0.6)})
    assert verdicts(good) == [HOLDS, HOLDS]
    assert good[1].measured == pytest.approx(40.0)
    assert good[0].n == 8
    assert verdicts(judge(memory(0.98), {0.001: memory(0.5)})) == [FAILS, HOLDS]
    assert verdicts(judge(memory(1.0), {0.001: memory(0.5), 0.01: memory(0.8)})) == [HOLDS, FAILS]
    json.dumps([finding.details for finding in good], allow_nan=False)


def test_measuring_trains_both_spaces(monkeypatch):
    for name, value in {
        "SPIRAL_SEEDS": range(2),
        "SPIRAL_STEPS": 3,
        "MEMORY_SEEDS": range(2),
        "MEMORY_STEPS": 2,
        "DELAY": 2,
    }.items():
        monkeypatch.setattr(target_space, name, value)
    for part in target_space.CLAIM.parts:
        found = part.measure({})
        assert [finding.statement for finding in found] == [b.statement for b in part.bounds]
    assert set(target_space.CLAIM.budget) == {"small", "paper"}
