"""The claim about Inception-v3: findings on made-up records go both ways."""

from pathlib import Path

import pytest

from normlab.lab.claims.claim import FAILS, HOLDS, UNDECIDED
from normlab.lab.claims.inception import CLAIM, METHODS, PAPER, SMALL, measure
from normlab.lab.models.inception import build
from normlab.lab.records import RunRecord, TrialRecord

SEEDS = tuple(SMALL.seeds)


def findings(*levels, seeds=SEEDS):
    """Measure runs of the three methods at accuracies, None for diverged, with a little spread."""
    trials = []
    for method, level in zip(METHODS, levels, strict=True):
        for seed in seeds:
            accuracy = None if level is None else level + 0.004 * (seed % 2)
            status = "diverged" if level is None else "finished"
            result = {"status": status, "final_accuracy": accuracy, "lr": 0.1}
            trials.append(TrialRecord(method, seed, result, []))
    environment = {"num_classes": 10, "test_samples": 1000}
    run = RunRecord(Path("made-up"), {"seeds": list(SEEDS)}, environment, {}, trials, [])
    return measure({"training": run})


def verdicts(*levels, **options):
    return [finding.verdict for finding in findings(*levels, **options)]


def test_each_row_is_held_against_the_one_before():
    found = findings(0.60, 0.62, 0.65)
    assert [finding.verdict for finding in found] == [HOLDS, HOLDS]
    assert [finding.measured for finding in found] == pytest.approx([2.0, 3.0])
    assert found[0].details["mean accuracy"]["batch-norm"] == pytest.approx(60.2)
    assert verdicts(0.60, 0.58, 0.62) == [FAILS, HOLDS]
    assert verdicts(0.60, 0.64, 0.62) == [HOLDS, FAILS]
    assert verdicts(0.60, 0.60, 0.60) == [FAILS, FAILS]


def test_who_diverged_has_guessed():
    found = findings(0.60, None, 0.65)
    assert [finding.verdict for finding in found] == [FAILS, HOLDS]
    assert found[0].details["diverged"] == dict(zip(METHODS, (0, 6, 0), strict=True))
    assert found[0].measured == pytest.approx(10 - 60.2)


def test_missing_trials_leave_it_open():
    assert verdicts(0.60, 0.62, 0.65, seeds=(0, 1, 2)) == [UNDECIDED, UNDECIDED]


def test_the_studies_give_all_three_the_same():
    assert [f.statement for f in findings(0.6, 0.6, 0.6)] == [b.statement for b in CLAIM.bounds]
    for study in (SMALL, PAPER):
        assert study.tune is not None
        assert study.reference_method == "batch-norm"
        build((1, 28, 28), 10, **{**study.model.options, "width_percent": 1})
    assert SMALL.task.options == {}
    steps = SMALL.training.epochs * SMALL.task.train_size // SMALL.training.batch_size
    assert f"trials of {steps} steps" in CLAIM.budget["small"]
