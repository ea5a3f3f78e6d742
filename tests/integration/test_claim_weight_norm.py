"""The claim about weight normalisation: its findings, on made-up records, can go either way."""

import json
import math
from pathlib import Path

import pytest

from normlab.lab.claims import weight_norm
from normlab.lab.claims.claim import FAILS, HOLDS, UNDECIDED
from normlab.lab.records import DIVERGED, FINISHED, RunRecord, TrialRecord

SEEDS = (0, 1, 2)


def trial(method, seed, losses, accuracy):
    """Losses are ``(step, mean since the line before)``; None: diverged."""
    lines = [{"kind": "train", "step": s, "loss": v} for s, v in losses or [(5, math.nan)]]
    lines.append({"kind": "eval", "step": 0, "accuracy": 0.1, "loss": 99.0})
    status = DIVERGED if losses is None else FINISHED
    result = {"status": status, "final_accuracy": accuracy, "lr": 0.01, "steps": 10}
    return TrialRecord(method, seed, result, lines)


def run_of(plain, normed, seeds=SEEDS):
    """A run in which each method has (losses, accuracy)."""
    trials = []
    for method, given in (("none", plain), ("weight-norm", normed)):
        for seed in seeds:
            losses, accuracy = given
            moved = losses and [(s, v + 0.001 * seed) for s, v in losses]
            trials.append(trial(method, seed, moved, accuracy + 0.0001 * seed**2))
    study = {"seeds": list(SEEDS), "training": {}}
    return {"training": RunRecord(Path("made-up"), study, {"num_classes": 10}, {}, trials, [])}


FAST, SLOW = [(2, 1.0), (10, 0.5)], [(2, 1.1), (10, 0.9)]


def test_mean_losses_weigh_each_step_once():
    run = run_of((SLOW, 0.8), (FAST, 0.8))["training"]
    assert weight_norm.mean_losses(run, "weight-norm")[0] == pytest.approx(0.6)
    assert weight_norm.mean_losses(run, "none")[0] == pytest.approx((2 * 1.1 + 8 * 0.9) / 10)


@pytest.mark.parametrize(
    ("plain", "normed", "expected"),
    [
        ((SLOW, 0.8), (FAST, 0.8), [HOLDS, HOLDS]),
        ((FAST, 0.8), (SLOW, 0.795), [FAILS, HOLDS]),
        ((SLOW, 0.8), (FAST, 0.78), [HOLDS, FAILS]),
        ((None, 0.0), (FAST, 0.8), [HOLDS, HOLDS]),
        ((FAST, 0.8), (None, 0.0), [FAILS, FAILS]),
    ],
)
def test_findings_go_both_ways(plain, normed, expected):
    findings = weight_norm.measure(run_of(plain, normed))
    assert [finding.verdict for finding in findings] == expected
    assert [finding.statement for finding in findings] == [
        bound.statement for bound in weight_norm.CLAIM.bounds
    ]
    for finding in findings:
        json.dumps(finding.details, allow_nan=False)


def test_missing_trials_leave_it_undecided():
    findings = weight_norm.measure(run_of((SLOW, 0.8), (FAST, 0.8), seeds=(0, 1)))
    assert [finding.verdict for finding in findings] == [UNDECIDED, UNDECIDED]


def test_diverged_trials_have_the_loss_of_guessing():
    run = run_of((None, 0.0), (FAST, 0.8))["training"]
    assert weight_norm.mean_losses(run, "none") == dict.fromkeys(SEEDS, math.log(10))
