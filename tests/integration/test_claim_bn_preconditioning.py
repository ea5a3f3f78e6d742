"""The claim about preconditioning: its findings go both ways on made-up records."""

from pathlib import Path

import pytest

from normlab.lab.claims.bn_preconditioning import (
    BATCH,
    CLAIM,
    METHOD,
    measure_batch_of_one,
    measure_convergence,
)
from normlab.lab.claims.claim import FAILS, HOLDS, UNDECIDED
from normlab.lab.records import RunRecord, TrialRecord

SEEDS = (0, 1, 2)


def run(**methods):
    """Make up a run: for each method its accuracy half way and at the end, None for diverged."""
    trials = []
    for label, accuracies in methods.items():
        for seed in SEEDS:
            values = [None if a is None else a + 0.001 * seed**2 for a in accuracies]
            lines = [(0, 0.1), *zip((50, 100), values, strict=True)]
            metrics = [{"kind": "eval", "step": s, "accuracy": a} for s, a in lines]
            status = "diverged" if values[-1] is None else "finished"
            result = {"status": status, "final_accuracy": values[-1], "lr": 0.1}
            trials.append(TrialRecord(label.replace("_", "-"), seed, result, metrics))
    return RunRecord(Path("made-up"), {"seeds": list(SEEDS)}, {"num_classes": 10}, {}, trials, [])


def judged(measure, bounds, **runs):
    findings = measure(runs)
    assert [finding.statement for finding in findings] == [bound.statement for bound in bounds]
    return [finding.verdict for finding in findings], [finding.measured for finding in findings]


def converged(own, batch_norm, none):
    large = run(bn_preconditioning=own, batch_norm=batch_norm, none=none)
    return judged(measure_convergence, CLAIM.parts[0].bounds, large=large)


def test_convergence_goes_both_ways():
    verdicts, measured = converged((0.7, 0.8), (0.7, 0.805), (0.6, 0.8))
    assert verdicts == [HOLDS, HOLDS]
    assert measured == pytest.approx([-0.5, 5.0])
    assert converged((0.5, 0.78), (0.7, 0.8), (0.6, 0.8))[0] == [FAILS, FAILS]
    assert converged((None, None), (0.7, 0.8), (0.6, 0.8))[0] == [FAILS, FAILS]
    assert converged((0.7, 0.8), (0.7, 0.8), (None, None))[0] == [HOLDS, HOLDS]


def alone(own, none, batch_norm):
    one = run(bn_preconditioning=(own, own), none=(none, none))
    large = run(batch_norm=(batch_norm, batch_norm))
    return judged(measure_batch_of_one, CLAIM.parts[1].bounds, one=one, large=large)


def test_batch_of_one_goes_both_ways():
    verdicts, measured = alone(0.79, 0.78, 0.80)
    assert verdicts == [HOLDS, HOLDS]
    assert measured == pytest.approx([1.0, -1.0])
    assert alone(0.75, 0.76, 0.80)[0] == [FAILS, FAILS]
    assert alone(None, 0.76, 0.80)[0] == [FAILS, FAILS]


def test_missing_trials_decide_nothing():
    one = run(bn_preconditioning=(0.8, 0.8), none=(0.7, 0.7))
    one.trials.pop()
    large = run(batch_norm=(0.8, 0.8))
    large.trials.pop()
    findings = measure_batch_of_one({"one": one, "large": large})
    assert [finding.verdict for finding in findings] == [UNDECIDED, UNDECIDED]


@pytest.mark.parametrize("scale", CLAIM.budget)
def test_terms_are_equal(scale):
    (large,) = CLAIM.parts[0].studies[scale].values()
    one, reference = CLAIM.parts[1].studies[scale].values()
    assert set(large.methods) == {METHOD, "batch-norm", "none"}
    assert (large.training.batch_size, one.training.batch_size) == (BATCH, 1)
    assert one.training.epochs == reference.training.epochs
    assert one.task == reference.task
    assert one.tune == reference.tune.model_copy(update={"low": one.tune.low})
    assert large.tune.trials == 6
    assert one.tune.trials * one.tune.seeds == 16
