"""The claim about Fixup with mixup: findings on made-up records go both ways."""

from pathlib import Path

import pytest

from normlab.lab.claims.claim import FAILS, HOLDS, UNDECIDED
from normlab.lab.claims.fixup_mixup import CLAIM, measure_accuracy, measure_depth
from normlab.lab.records import RunRecord, TrialRecord

SEEDS = (0, 1, 2, 3, 4)


def run(levels, seeds=SEEDS):
    """Build a run from each method's accuracy, None for diverged, with a little spread."""
    trials = []
    for method, level in levels.items():
        for seed in seeds:
            accuracy = None if level is None else level + 0.004 * (seed % 2)
            status = "diverged" if level is None else "finished"
            result = {"status": status, "final_accuracy": accuracy, "lr": 0.1}
            trials.append(TrialRecord(method, seed, result, []))
    environment = {"num_classes": 10, "test_samples": 1000}
    return RunRecord(Path("made-up"), {"seeds": list(SEEDS)}, environment, {}, trials, [])


def verdicts(findings):
    return [finding.verdict for finding in findings]


def accuracy(fixup, normed, mixed, **options):
    levels = {"fixup+mixup": fixup, "batch-norm": normed, "batch-norm+mixup": mixed}
    return measure_accuracy({"resnet-20": run(levels, **options)})


def depth(fixup, normed, bare, **options):
    levels = {"fixup+mixup": fixup, "batch-norm": normed, "none": bare}
    return measure_depth({"resnet-110": run(levels, **options)})


def test_accuracy_goes_both_ways():
    both = accuracy(0.60, 0.62, 0.50)
    assert verdicts(both) == [HOLDS, HOLDS]
    assert [finding.measured for finding in both] == pytest.approx([-2.0, 10.0])
    assert both[0].details["mean accuracy"]["fixup+mixup"] == pytest.approx(60.16)
    assert verdicts(accuracy(0.60, 0.65, 0.62)) == [FAILS, HOLDS]
    assert verdicts(accuracy(0.60, 0.62, 0.65)) == [HOLDS, FAILS]
    assert verdicts(accuracy(None, 0.62, 0.65)) == [FAILS, FAILS]


def test_depth_goes_both_ways():
    assert verdicts(depth(0.30, 0.40, 0.10)) == [HOLDS, HOLDS]
    assert verdicts(depth(0.15, 0.40, 0.10)) == [FAILS, HOLDS]
    assert verdicts(depth(0.40, 0.15, 0.10)) == [HOLDS, FAILS]
    found = depth(0.30, 0.40, None)
    assert verdicts(found) == [HOLDS, HOLDS]
    assert found[0].details["diverged"] == {"fixup+mixup": 0, "batch-norm": 0, "none": 5}
    assert found[0].measured == pytest.approx(20.16)


def test_missing_trials_leave_it_open():
    assert verdicts(accuracy(0.6, 0.6, 0.6, seeds=(0, 1))) == [UNDECIDED, UNDECIDED]
    assert verdicts(depth(0.6, 0.6, 0.1, seeds=(0, 1))) == [UNDECIDED, UNDECIDED]


def test_every_finding_has_its_bound():
    findings = accuracy(0.6, 0.6, 0.6) + depth(0.6, 0.6, 0.1)
    assert [f.statement for f in findings] == [bound.statement for bound in CLAIM.bounds]
    for scale in CLAIM.budget:
        for part in CLAIM.parts:
            for study in part.studies[scale].values():
                assert study.training.lr in (0.1, 0.1 * study.training.batch_size / 128)
