"""The claim on GradMax: findings that can go either way, and students that grow as they should."""

import math
from pathlib import Path

import pytest
import torch

from normlab.lab.claims import gradmax
from normlab.lab.claims.claim import FAILS, HOLDS, UNDECIDED, verdict
from normlab.lab.records import RunRecord, TrialRecord

SEEDS = (0, 1, 2, 3)


def made_up(gain, loss, spread=0.01):
    """Outcomes in which GradMax has a gain and a loss, and random growth has 1 and 1."""
    return {
        name: {
            seed: {
                width: gradmax.Growth(
                    (gain if name == "gradmax" else 1.0) * (1 + spread * seed),
                    {0.1: (loss if name == "gradmax" else 1.0) - spread * seed, 0.01: 9.0},
                )
                for width in (5, 6)
            }
            for seed in SEEDS
        }
        for name in ("gradmax", "random")
    }


def test_findings_about_students_go_both_ways():
    good = gradmax.judge_students(made_up(2.0, 0.9))
    assert [one.verdict for one in good] == [HOLDS, HOLDS]
    assert good[0].measured == pytest.approx(2.0)
    logs = [math.log((0.9 - 0.01 * seed) / (1 - 0.01 * seed)) for seed in SEEDS]
    assert good[1].measured == pytest.approx(100 * math.expm1(sum(logs) / 4))
    assert good[0].details["learning rates"] == {"gradmax": 0.1, "random": 0.1}
    bad = gradmax.judge_students(made_up(1.2, 1.1))
    assert [one.verdict for one in bad] == [FAILS, FAILS]
    none = gradmax.judge_students(made_up(-1.0, 1.0))
    assert none[0].verdict == FAILS


def test_random_growth_counts_by_the_mean_of_logarithms(monkeypatch):
    def grown(model, x, y, method, generator):
        draws.append(method)
        return gradmax.Growth(1.0, dict.fromkeys(gradmax.RATES, (1.0, 4.0)[len(draws) % 2]))

    draws = []
    monkeypatch.setattr(gradmax, "grow_once", grown)
    monkeypatch.setattr(gradmax, "descend", lambda *arguments: 0.0)
    outcome = gradmax.run_seed(0)
    assert draws.count("random") == 2 * draws.count("gradmax") == 10
    assert outcome["random"][5].losses[0.1] == pytest.approx(2.0)


def test_students_that_diverge_leave_the_loss_undecided():
    outcomes = made_up(2.0, 0.9)
    outcomes["random"][1][5] = gradmax.Growth(1.0, {0.1: math.inf, 0.01: math.inf})
    found = gradmax.judge_students(outcomes)
    assert [one.verdict for one in found] == [HOLDS, UNDECIDED]


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"), [(0.8, 0.8, HOLDS), (0.7, 0.8, FAILS), (None, 0.8, FAILS)]
)
def test_finding_about_images_goes_both_ways(ours, theirs, expected):
    trials = []
    for method, accuracy in (("gradmax", ours), ("random-growth", theirs)):
        for seed in SEEDS:
            status = "finished" if accuracy else "diverged"
            final = accuracy and accuracy + 0.001 * seed * (seed % 2)
            result = {"status": status, "final_accuracy": final, "lr": 0.1}
            trials.append(TrialRecord(method, seed, result, []))
    run = RunRecord(Path("made-up"), {"seeds": list(SEEDS)}, {"num_classes": 10}, {}, trials, [])
    (found,) = gradmax.measure_images({"training": run})
    assert found.verdict == expected
    run.trials.pop()
    assert gradmax.measure_images({"training": run})[0].verdict == UNDECIDED


def test_a_student_of_one_seed_is_the_same_twice(monkeypatch):
    for name in ("STEPS_BEFORE", "STEPS_AFTER"):
        monkeypatch.setattr(gradmax, name, 3)
    monkeypatch.setattr(gradmax, "WIDTHS", (5,))
    one, two = gradmax.run_seed(0), gradmax.run_seed(0)
    assert one == two
    assert one != gradmax.run_seed(1)
    assert one["gradmax"][5].gain > one["random"][5].gain > 0
    monkeypatch.setattr(gradmax, "SEEDS", (0, 1))
    found = gradmax.measure_students({})
    assert [one.statement for one in found] == [gradmax.GAIN.statement, gradmax.LOSS.statement]
    assert found[0].n == 2


def test_growth_keeps_the_loss_and_leaves_the_student():
    generator = torch.Generator().manual_seed(0)
    model, x = gradmax.student(5, generator), torch.randn(50, 20, generator=generator)
    y = torch.randn(50, 10, generator=generator)
    before = gradmax.half_squares(model(x), y)
    gradmax.grow_once(model, x, y, "gradmax", generator)
    assert torch.equal(gradmax.half_squares(model(x), y), before)
    assert model[0].out_features == 5


def test_claim_is_whole():
    claim = gradmax.CLAIM
    assert set(claim.budget) == set(claim.departs) == {"small", "paper"}
    for bound in claim.bounds:
        sides = {verdict(x, x, bound.threshold, bound.direction) for x in (-1e6, 1e6)}
        assert sides == {HOLDS, FAILS}
