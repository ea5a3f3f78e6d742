"""From records to numbers: what the findings of several claims have in common.

A trial that diverged is a result: its accuracy is that of guessing. A trial that failed or ran out
of memory is not one, and leaves a finding undecided.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from normlab.lab import records
from normlab.lab.claims.claim import Bound, Finding
from normlab.lab.records import RunRecord, TrialRecord
from normlab.lab.statistics import paired_test

POINTS = "points of accuracy"


def trials_of(run: RunRecord, method: str) -> dict[int, TrialRecord]:
    """Return a method's trials by seed, those that have a usable result."""
    return {
        trial.seed: trial
        for trial in run.trials
        if trial.method == method
        and trial.result is not None
        and trial.result["status"] in (records.FINISHED, records.DIVERGED)
    }


def complete(run: RunRecord, *methods: str) -> bool:
    """Whether every seed of the study has a usable result for each of the methods."""
    wanted = set(run.study["seeds"])
    return all(set(trials_of(run, method)) == wanted for method in methods)


def diverged(trial: TrialRecord) -> bool:
    """Whether the loss left the finite numbers."""
    return trial.result is not None and trial.result["status"] == records.DIVERGED


def chance(run: RunRecord) -> float:
    """Return the accuracy of guessing, a fraction."""
    return 1.0 / run.environment["num_classes"]


def final_accuracies(run: RunRecord, method: str) -> dict[int, float]:
    """Return a method's final test accuracy by seed, in points (0 to 100)."""
    return {
        seed: 100 * (chance(run) if diverged(trial) else (trial.result or {})["final_accuracy"])
        for seed, trial in trials_of(run, method).items()
    }


def mean_accuracies(run: RunRecord, method: str) -> dict[int, float]:
    """Return the mean over a trial's evaluations by seed, the one before training left out."""
    means = {}
    for seed, trial in trials_of(run, method).items():
        values = [accuracy for step, accuracy in curve(trial) if step > 0]
        known = [value for value in values if value is not None]
        mean = sum(known) / len(known) if known else chance(run)
        means[seed] = 100 * (chance(run) if diverged(trial) else mean)
    return means


def curve(trial: TrialRecord) -> list[tuple[float, float | None]]:
    """Return a trial's evaluations as ``(step, accuracy)``, accuracies as fractions."""
    lines = (line for line in trial.metrics if line["kind"] == "eval")
    return [(line["step"], line["accuracy"]) for line in lines]


def mean(values: Mapping[int, float]) -> float | None:
    """Return the mean over seeds, None without any."""
    return sum(values.values()) / len(values) if values else None


def judge_difference(
    bound: Bound,
    one: Mapping[int, float],
    other: Mapping[int, float],
    usable: bool,
    details: dict[str, Any],
) -> Finding:
    """Judge the mean of ``one - other`` over seeds, with Student's interval of the pairs.

    Args:
        bound: What it is held against.
        one: Seed to value.
        other: Seed to value.
        usable: False leaves the finding undecided, because trials are missing.
        details: Goes with the finding.
    """
    test = paired_test(one, other)
    return bound.judge(test.difference, test.interval if usable else None, test.num_pairs, details)


def rates(run: RunRecord) -> dict[str, float]:
    """Return the learning rate that each method of a run was trained with."""
    return {trial.method: trial.result["lr"] for trial in run.trials if trial.result}
