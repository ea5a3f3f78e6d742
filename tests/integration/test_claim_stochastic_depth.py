"""The claim about stochastic depth: its findings, on made-up records, can go either way."""

import json
from pathlib import Path

import pytest

from normlab.lab.claims import stochastic_depth
from normlab.lab.claims.claim import FAILS, HOLDS, UNDECIDED
from normlab.lab.records import DIVERGED, FINISHED, RunRecord, TrialRecord

SEEDS = (0, 1, 2)


def trials(method, seconds, accuracy, seeds=SEEDS):
    """Return trials with a little spread; an accuracy of None: diverged half way."""
    found = []
    for seed in seeds:
        result = {
            "status": DIVERGED if accuracy is None else FINISHED,
            "final_accuracy": None if accuracy is None else accuracy + 0.0005 * seed**2,
            "seconds": (0.5 if accuracy is None else 1.0) * seconds * (1 + 0.01 * seed),
            "step": 50 if accuracy is None else 100,
            "lr": 0.1,
        }
        found.append(TrialRecord(method, seed, result, []))
    return found


def findings(plain, own, seeds=SEEDS):
    recorded = trials("batch-norm", *plain) + trials("stochastic-depth", *own, seeds)
    study = {"seeds": list(SEEDS), "model": {"name": "resnet", "depth": 32}, "training": {}}
    run = RunRecord(Path("made-up"), study, {"num_classes": 10}, {}, recorded, [])
    return stochastic_depth.measure({"training": run})


@pytest.mark.parametrize(
    ("plain", "own", "expected"),
    [
        ((10.0, 0.80), (7.5, 0.80), [HOLDS, HOLDS]),
        ((10.0, 0.80), (9.0, 0.85), [FAILS, HOLDS]),
        ((10.0, 0.80), (7.5, 0.78), [HOLDS, FAILS]),
        ((10.0, 0.80), (7.5, None), [HOLDS, FAILS]),
        ((10.0, None), (7.5, 0.80), [HOLDS, HOLDS]),
    ],
)
def test_findings_go_both_ways(plain, own, expected):
    found = findings(plain, own)
    assert [finding.verdict for finding in found] == expected
    bounds = stochastic_depth.CLAIM.bounds
    assert [finding.statement for finding in found] == [bound.statement for bound in bounds]
    json.dumps([finding.details for finding in found], allow_nan=False)


def test_what_is_measured():
    faster, accurate = findings((10.0, 0.80), (7.5, 0.82))
    assert faster.measured == pytest.approx(0.75)
    assert faster.details["seconds per step"]["batch-norm"] == pytest.approx(0.101)
    assert faster.details["branches computed, expected share"] == pytest.approx(11 / 15)
    assert accurate.measured == pytest.approx(2.0)
    assert (faster.n, accurate.n) == (3, 3)


def test_missing_trials_leave_it_undecided():
    assert [f.verdict for f in findings((10.0, 0.8), (7.5, 0.8), (0, 1))] == [UNDECIDED] * 2
    assert [f.verdict for f in findings((10.0, 0.8), (7.5, 0.8), ())] == [UNDECIDED] * 2


@pytest.mark.parametrize("scale", ["small", "paper"])
def test_both_arms_are_trained_alike(scale):
    (part,) = stochastic_depth.CLAIM.parts
    study = part.studies[scale]["training"]
    assert study.methods == ["batch-norm", "stochastic-depth"]
    assert study.model.options["depth"] >= 32
    assert study.tune is None
