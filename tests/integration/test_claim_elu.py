"""The claim about ELU: its findings, on made-up records, can go either way."""

from pathlib import Path

import pytest

from normlab.lab.claims import elu
from normlab.lab.claims.claim import FAILS, HOLDS, UNDECIDED
from normlab.lab.models.elu_net import build_11
from normlab.lab.records import DIVERGED, FINISHED, RunRecord, TrialRecord

SEEDS = (0, 1, 2)


def run_of(seeds=SEEDS, **accuracies):
    """A run in which each method ends at its accuracy, with a little spread; None: diverged."""
    trials = []
    for method, accuracy in accuracies.items():
        for seed in seeds:
            status = DIVERGED if accuracy is None else FINISHED
            final = None if accuracy is None else accuracy + 0.0001 * seed**2
            result = {"status": status, "final_accuracy": final, "lr": 0.01}
            trials.append(TrialRecord(method, seed, result, []))
    study = {"seeds": list(SEEDS), "training": {}}
    return RunRecord(Path("made-up"), study, {"num_classes": 10}, {}, trials, [])


def verdicts(bare, normed, **options):
    runs = {"none": run_of(**bare, **options), "batch-norm": run_of(**normed)}
    findings = elu.measure(runs)
    assert [one.statement for one in findings] == [one.statement for one in elu.CLAIM.bounds]
    return [finding.verdict for finding in findings]


@pytest.mark.parametrize(
    ("bare", "normed", "expected"),
    [
        ((0.50, 0.54), (0.52, 0.54), [HOLDS, HOLDS, HOLDS]),
        ((0.50, 0.54), (0.55, 0.56), [HOLDS, FAILS, FAILS]),
        ((0.54, 0.50), (0.49, 0.47), [FAILS, HOLDS, HOLDS]),
        ((None, 0.50), (0.45, 0.502), [HOLDS, HOLDS, HOLDS]),
        ((0.50, None), (0.45, 0.50), [FAILS, FAILS, FAILS]),
    ],
)
def test_findings_go_both_ways(bare, normed, expected):
    names = ("relu", "elu")
    bare, normed = (dict(zip(names, pair, strict=True)) for pair in (bare, normed))
    assert verdicts(bare, normed) == expected


def test_missing_trials_leave_it_undecided():
    given = {"relu": 0.5, "elu": 0.6}
    assert verdicts(given, given, seeds=(0, 1)) == [UNDECIDED] * 3


@pytest.mark.parametrize("scale", ["small", "paper"])
def test_the_studies_differ_in_the_norm_alone(scale):
    studies = elu.CLAIM.parts[0].studies[scale]
    assert list(studies) == ["none", "batch-norm"]
    plain = [study.model_dump(exclude={"name", "model"}) for study in studies.values()]
    assert plain[0] == plain[1]
    options = [study.model.options for study in studies.values()]
    assert [one.pop("norm") for one in options] == ["none", "batch-norm"]
    assert options[0] == options[1]
    build_11((1, 28, 28), 10, **options[0])  # the model knows its options


def test_the_budget_counts_what_is_run():
    budget = elu.CLAIM.budget["small"]
    study = elu.CLAIM.parts[0].studies["small"]["none"]
    size, batch = study.task.train_size, study.training.batch_size
    epochs, tune = study.training.epochs, study.tune
    trials = 2 * len(study.methods) * len(study.seeds)
    assert f"{trials} trials of {epochs * size // batch} steps" in budget
    searched = round(size * (1 - tune.hold_out)) // batch * epochs
    assert f"{4 * tune.trials * tune.seeds} searches of {searched}:" in budget
    assert tune.trials > 4  # more than the search draws at random
