"""The findings about weight rescaling on made-up records: equal searches, and who chooses."""

from pathlib import Path

import pytest

from normlab.lab.claims import weight_rescaling
from normlab.lab.claims.claim import FAILS, HOLDS, UNDECIDED
from normlab.lab.records import RunRecord, TrialRecord

SEEDS = (0, 1, 2)


def trials(method, accuracy, seeds=SEEDS):
    return [
        TrialRecord(
            method,
            seed,
            {"status": "finished", "final_accuracy": accuracy + 0.001 * seed**2, "lr": 0.1},
            [],
        )
        for seed in seeds
    ]


def record(found, tuning):
    return RunRecord(
        Path("made-up"), {"seeds": list(SEEDS)}, {"num_classes": 10}, {}, found, tuning
    )


def runs(rescaled, low, high, none, searched=(0.8, 0.7)):
    """Build the three runs; ``searched`` is what the two decays reach on held-out data."""
    return {
        "decay-low": record(trials("batch-norm", low), trials("batch-norm", searched[0], [0])),
        "decay-high": record(trials("batch-norm", high), trials("batch-norm", searched[1], [0])),
        "no-decay": record(trials("batch-norm", none) + trials("weight-rescaling", rescaled), []),
    }


def verdicts(findings):
    return [finding.verdict for finding in findings]


def test_findings_go_both_ways():
    measure = weight_rescaling.measure
    assert verdicts(measure(runs(0.84, 0.84, 0.70, 0.80))) == [HOLDS, HOLDS]
    assert verdicts(measure(runs(0.82, 0.84, 0.70, 0.80))) == [FAILS, HOLDS]
    assert verdicts(measure(runs(0.82, 0.84, 0.70, 0.83))) == [FAILS, FAILS]


def test_held_out_data_choose_the_coefficient_whatever_the_test_set_says():
    low = weight_rescaling.measure(runs(0.80, 0.78, 0.90, 0.7, searched=(0.8, 0.7)))[0]
    high = weight_rescaling.measure(runs(0.80, 0.78, 0.90, 0.7, searched=(0.7, 0.8)))[0]
    assert (low.verdict, low.details["coefficient"]) == (HOLDS, "decay-low")
    assert (high.verdict, high.details["coefficient"]) == (FAILS, "decay-high")
    assert low.measured == pytest.approx(2.0)


def test_what_is_missing_leaves_a_finding_undecided():
    without_search = runs(0.84, 0.84, 0.70, 0.80)
    without_search["decay-high"].tuning.clear()
    assert verdicts(weight_rescaling.measure(without_search)) == [UNDECIDED, HOLDS]
    without_trial = runs(0.84, 0.84, 0.70, 0.80)
    del without_trial["no-decay"].trials[0]
    assert verdicts(weight_rescaling.measure(without_trial)) == [HOLDS, UNDECIDED]


@pytest.mark.parametrize("scale", ["small", "paper"])
def test_terms_are_equal(scale):
    (part,) = weight_rescaling.CLAIM.parts
    studies = part.studies[scale]
    decayed = [studies["decay-low"], studies["decay-high"]]
    free = studies["no-decay"]
    assert free.training.weight_decay == 0
    assert free.methods == ["batch-norm", "weight-rescaling"]
    assert sum(study.tune.trials for study in decayed) == free.tune.trials
    for study in decayed:
        assert study.methods == ["batch-norm"]
        assert study.training.weight_decay > 0
        assert study.tune == free.tune.model_copy(update={"trials": study.tune.trials})
        same = study.training.model_copy(update={"weight_decay": 0.0})
        assert same == free.training
