"""The claim about GradInit: its findings, on made-up records, can go either way."""

import json
import math
from pathlib import Path

import pytest

from normlab.lab.claims import gradinit
from normlab.lab.claims.claim import FAILS, HOLDS, UNDECIDED
from normlab.lab.records import DIVERGED, FINISHED, RunRecord, TrialRecord

SEEDS = range(6)
LEARNT = gradinit.LEARNT["small"]


def run_of(plain, learnt, seeds=SEEDS):
    """A run around two accuracies; None: diverged."""
    trials = []
    for method, accuracy in (("none", plain), (LEARNT, learnt)):
        for seed in seeds:
            lost = accuracy is None
            final = None if lost else accuracy + 0.001 * seed**2
            result = {"status": DIVERGED if lost else FINISHED, "final_accuracy": final, "lr": 0.1}
            trials.append(TrialRecord(method, seed, result, []))
    study = {"seeds": list(SEEDS), "methods": ["none", LEARNT]}
    return RunRecord(Path("made-up"), study, {"num_classes": 10}, {}, trials, [])


def verdicts(findings):
    json.dumps([finding.details for finding in findings], allow_nan=False)
    return [finding.verdict for finding in findings]


def test_rescue_goes_both_ways():
    def found(plain, learnt):
        return gradinit.measure_rescue({"one-rate": run_of(plain, learnt)})

    assert verdicts(found(None, 0.6)) == [HOLDS, HOLDS]
    assert verdicts(found(0.12, 0.2)) == [HOLDS, FAILS]
    assert verdicts(found(0.4, None)) == [FAILS, FAILS]
    bound, level = found(None, 0.6)
    assert bound.measured == 1.0
    assert bound.details["diverged"] == {"none": 6, LEARNT: 0}
    assert level.measured == pytest.approx(60, abs=2)


def test_better_goes_both_ways():
    def found(plain, learnt):
        return gradinit.measure_better({"own-rates": run_of(plain, learnt)})

    (holds,) = found(0.5, 0.6)
    assert (holds.verdict, holds.measured) == (HOLDS, pytest.approx(10.0))
    assert verdicts(found(0.6, 0.5)) == [FAILS]
    assert verdicts(found(0.6, None)) == [FAILS]


def test_a_missing_trial_leaves_findings_undecided():
    run = run_of(None, 0.6)
    run.trials.pop()
    assert verdicts(gradinit.measure_rescue({"one-rate": run})) == [HOLDS, UNDECIDED]
    assert verdicts(gradinit.measure_better({"own-rates": run})) == [UNDECIDED]


def test_the_first_step_goes_both_ways():
    bound = gradinit.LOWER["sgd"]

    def verdict_of(losses):
        return verdicts([gradinit.judge_first_step(bound, losses)])

    assert verdict_of([(20.0, 2.0)] * 9 + [(math.inf, 2.0)]) == [HOLDS]
    assert verdict_of([(2.0, 2.0)] * 9 + [(2.0, math.inf)]) == [FAILS]
    assert verdict_of([(20.0, 2.0), (2.0, 20.0)] * 5) == [UNDECIDED]


def test_the_first_step_is_repeatable(monkeypatch):
    monkeypatch.setattr(gradinit, "STEPS", 3)
    losses = gradinit.first_step(0, "sgd")
    assert losses == gradinit.first_step(0, "sgd")
    assert losses[0] != losses[1]
    assert gradinit.first_step(0, "adamw") != losses


@pytest.mark.parametrize("scale", gradinit.SCALES)
def test_arms_differ_in_nothing_but_gradinit(scale):
    for part in gradinit.CLAIM.parts[:2]:
        (study,) = part.studies[scale].values()
        assert study.methods == ["none", gradinit.LEARNT[scale]]
