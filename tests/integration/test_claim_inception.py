"""The claim about Inception-v3: findings on made-up records go both ways."""

from pathlib import Path

import pytest

from normlab.catalog import find_method
from normlab.lab.claims.claim import FAILS, HOLDS, UNDECIDED
from normlab.lab.claims.inception import CLAIM, PAPER, RMSPROP, SGD, SMALL, SMOOTHED, measure
from normlab.lab.models.inception import build
from normlab.lab.records import RunRecord, TrialRecord

METHODS = (SGD, RMSPROP, SMOOTHED)
SEEDS = tuple(SMALL["smoothing"].seeds)


def run_of(levels, seeds):
    """A run at accuracies by method, None for diverged, with a little spread."""
    trials = []
    for method, level in levels.items():
        for seed in seeds:
            accuracy = None if level is None else level + 0.004 * (seed % 2)
            status = "diverged" if level is None else "finished"
            result = {"status": status, "final_accuracy": accuracy, "lr": 0.1}
            trials.append(TrialRecord(method, seed, result, []))
    environment = {"num_classes": 10, "test_samples": 1000}
    return RunRecord(Path("made-up"), {"seeds": list(SEEDS)}, environment, {}, trials, [])


def findings(sgd, rmsprop, smoothed, *, other_rmsprop=None, seeds=SEEDS):
    """Measure made-up runs; RMSProp is trained in both, each time anew."""
    other = rmsprop if other_rmsprop is None else other_rmsprop
    return measure(
        {
            "optimisers": run_of({SGD: sgd, RMSPROP: rmsprop}, seeds),
            "smoothing": run_of({RMSPROP: other, SMOOTHED: smoothed}, seeds),
        }
    )


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
    assert verdicts(0.60, 0.62, 0.61, other_rmsprop=0.60) == [HOLDS, HOLDS]
    assert verdicts(0.60, 0.62, 0.61, other_rmsprop=0.63) == [HOLDS, FAILS]


def test_who_diverged_has_guessed():
    found = findings(0.60, None, 0.65)
    assert [finding.verdict for finding in found] == [FAILS, HOLDS]
    assert found[0].details["diverged"] == {SGD: 0, RMSPROP: len(SEEDS)}
    assert found[1].details["diverged"] == {RMSPROP: len(SEEDS), SMOOTHED: 0}
    assert found[0].measured == pytest.approx(10 - 60.2)


def test_missing_trials_leave_it_open():
    assert verdicts(0.60, 0.62, 0.65, seeds=(0, 1, 2)) == [UNDECIDED, UNDECIDED]


def test_both_arms_of_a_comparison_have_the_same():
    assert [f.statement for f in findings(0.6, 0.6, 0.6)] == [b.statement for b in CLAIM.bounds]
    for studies in (SMALL, PAPER):
        optimisers, smoothing = studies.values()
        assert list(studies) == ["optimisers", "smoothing"]
        assert optimisers.tune is not None
        assert optimisers.tune.trials > 4  # more than the search draws at random
        assert smoothing.tune is None
        assert optimisers.methods == [SGD, RMSPROP]
        assert smoothing.methods == [RMSPROP, SMOOTHED]
        assert [study.reference for study in studies.values()] == [SGD, RMSPROP]
        plain = [
            study.model_dump(exclude={"name", "methods", "reference", "tune", "training"})
            for study in studies.values()
        ]
        assert plain[0] == plain[1]
        training = [study.training.model_dump(exclude={"lr"}) for study in studies.values()]
        assert training[0] == training[1]
        build((1, 28, 28), 10, **{**optimisers.model.options, "width_percent": 1})
    # Records are found by the label as the catalogue writes it.
    assert [find_method(label).label for label in METHODS] == list(METHODS)
    assert SMALL["smoothing"].task.options == {}


def test_the_budget_counts_what_is_run():
    budget = CLAIM.budget["small"]
    optimisers = SMALL["optimisers"]
    size, batch = optimisers.task.train_size, optimisers.training.batch_size
    epochs, tune = optimisers.training.epochs, optimisers.tune
    trials = sum(len(study.methods) * len(study.seeds) for study in SMALL.values())
    assert f"{trials} trials of {epochs * (size // batch)} steps" in budget
    searched = round(size * (1 - tune.hold_out)) // batch * epochs
    assert f"{2 * tune.trials * tune.seeds} searches of {searched}" in budget
