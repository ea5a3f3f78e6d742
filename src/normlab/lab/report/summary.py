"""A run's records made into the numbers of the page: plain data, no formatting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from normlab.lab.records import FINISHED, RunRecord, TrialRecord
from normlab.lab.statistics import (
    ALPHA,
    PairedTest,
    TargetReached,
    confidence_interval,
    default_targets,
    holm,
    paired_test,
    steps_to_target,
)

UNDER_WAY, NOT_STARTED = "under way", "not started"


@dataclass(frozen=True)
class Estimate:
    """A number over seeds.

    Attributes:
        values: Seed to value; at least one.
        mean: Their mean.
        interval: Confidence interval of the mean; None for one seed.
    """

    values: dict[int, float]
    mean: float
    interval: tuple[float, float] | None

    @property
    def half_width(self) -> float | None:
        """Half the width of the interval, the number after the ±."""
        return None if self.interval is None else 0.5 * (self.interval[1] - self.interval[0])


@dataclass(frozen=True)
class Trial:
    """How one (method, seed) stands.

    Attributes:
        seed: The seed.
        status: As in ``result.json``, or ``"under way"``, or ``"not started"``.
        step: The last step done (the one at which it diverged, where it did).
        steps: The steps planned; None where nothing says so yet.
        reason: What went wrong, in the record's words.
    """

    seed: int
    status: str
    step: int
    steps: int | None
    reason: str | None

    @property
    def finished(self) -> bool:
        """Whether it trained to its end."""
        return self.status == FINISHED

    @property
    def failed(self) -> bool:
        """Whether it ended before its end."""
        return self.status not in (FINISHED, UNDER_WAY, NOT_STARTED)


@dataclass(frozen=True)
class MethodSummary:
    """The numbers of one method; every estimate is over its finished seeds, None without any.

    Attributes:
        label: The method as the study spells it.
        card: Its card, possibly empty.
        is_reference: Whether the others are tested against it.
        trials: One for each seed of the study, in order.
        final_accuracy: Accuracy at the end, a fraction.
        best_accuracy: The highest accuracy at any evaluation, a fraction.
        final_loss: Loss at the end.
        seconds: Training time, without evaluation.
        samples_per_second: Throughput; of all seeds that ended, where none finished.
        peak_memory: Bytes; likewise.
        num_parameters: Parameters of the model as prepared.
        learning_rates: The distinct rates its trials used, rising.
        test: Final accuracy against the reference; None for the reference itself.
        p_corrected: Holm-corrected p-value of that test.
        steps_to: When its ended seeds reached each target, in steps.
        seconds_to: The same in seconds.
        notes: What it reported, each line once; with the seed where not every seed said it.
    """

    label: str
    card: dict[str, Any]
    is_reference: bool
    trials: list[Trial]
    final_accuracy: Estimate | None
    best_accuracy: Estimate | None
    final_loss: Estimate | None
    seconds: Estimate | None
    samples_per_second: Estimate | None
    peak_memory: Estimate | None
    num_parameters: int | None
    learning_rates: list[float]
    steps_to: list[TargetReached]
    seconds_to: list[TargetReached]
    notes: list[str]
    test: PairedTest | None = None
    p_corrected: float | None = None

    @property
    def num_finished(self) -> int:
        """How many seeds trained to their end."""
        return sum(trial.finished for trial in self.trials)

    @property
    def failures(self) -> list[Trial]:
        """The seeds that ended before their end."""
        return [trial for trial in self.trials if trial.failed]

    @property
    def is_significant(self) -> bool:
        """Whether it differs from the reference by the corrected test."""
        return self.p_corrected is not None and self.p_corrected < ALPHA


@dataclass(frozen=True)
class Summary:
    """A whole run.

    Attributes:
        methods: Sorted by final accuracy, highest first; those without one at the end.
        reference: The reference's label, "" where the study names none.
        targets: Accuracies of ``steps_to``, rising.
        targets_are_derived: Whether they come from the reference's accuracy and not the study.
        seeds: The study's seeds.
    """

    methods: list[MethodSummary]
    reference: str
    targets: list[float]
    targets_are_derived: bool
    seeds: list[int] = field(default_factory=list)

    @property
    def trials(self) -> list[Trial]:
        """All trials of all methods."""
        return [trial for method in self.methods for trial in method.trials]

    @property
    def reference_method(self) -> MethodSummary | None:
        """The reference, where the run has it."""
        return next((method for method in self.methods if method.is_reference), None)


def summarise(run: RunRecord) -> Summary:
    """Make a run's records into the numbers of the page.

    Works on any run, however far it got: what has not been measured is None.

    Args:
        run: From `normlab.lab.records.read_run`.

    Returns:
        The summary, with the tests against the reference made and corrected.
    """
    labels = _labels(run)
    seeds = sorted(set(run.study.get("seeds") or []) | {trial.seed for trial in run.trials})
    reference = str(run.study.get("reference") or "")
    by_method = {label: [t for t in run.trials if t.method == label] for label in labels}

    targets = sorted({float(t) for t in run.study.get("targets") or [] if 0.0 < float(t) <= 1.0})
    derived = not targets
    if derived:
        targets = _derived_targets(by_method, reference)

    methods = [
        _summarise_method(
            label, run.cards.get(label, {}), by_method[label], seeds, targets, label == reference
        )
        for label in labels
    ]
    methods = _with_tests(methods)
    # Without a single accuracy the order of the study stays.
    methods.sort(key=lambda m: math.inf if m.final_accuracy is None else -m.final_accuracy.mean)
    return Summary(methods, reference, targets, derived, seeds)


def _labels(run: RunRecord) -> list[str]:
    """The methods in the order of the cards; then any the cards do not know."""
    known = list(run.cards)
    if not known:
        known = [
            method["name"]
            for method in run.study.get("methods") or []
            if isinstance(method, dict) and "name" in method and not method.get("options")
        ]
    return list(dict.fromkeys([*known, *(trial.method for trial in run.trials)]))


def _summarise_method(
    label: str,
    card: dict[str, Any],
    records: Sequence[TrialRecord],
    seeds: Sequence[int],
    targets: Sequence[float],
    is_reference: bool,
) -> MethodSummary:
    by_seed = {record.seed: record for record in records}
    results = {seed: record.result for seed, record in by_seed.items() if record.result}
    finished = {
        seed: result for seed, result in results.items() if result.get("status") == FINISHED
    }
    ended = [by_seed[seed] for seed in results]
    steps = [_accuracies(record, "step") for record in ended]
    seconds = [_accuracies(record, "seconds") for record in ended]
    # Without any accuracy there is nothing that a target could be held against.
    measured = any(value is not None for curve in steps for _, value in curve)
    parameters = [result.get("num_parameters") for result in results.values()]
    rates = {result.get("lr") for result in results.values()}
    return MethodSummary(
        label=label,
        card=card,
        is_reference=is_reference,
        trials=[_trial(seed, by_seed.get(seed)) for seed in seeds],
        final_accuracy=_estimate(finished, "final_accuracy"),
        best_accuracy=_estimate(finished, "best_accuracy"),
        final_loss=_estimate(finished, "final_loss"),
        seconds=_estimate(finished, "seconds"),
        samples_per_second=_estimate(finished or results, "samples_per_second"),
        peak_memory=_estimate(finished or results, "peak_memory_bytes"),
        num_parameters=next((count for count in parameters if count is not None), None),
        learning_rates=sorted(
            float(rate) for rate in rates if rate is not None and _is_number(rate)
        ),
        steps_to=[steps_to_target(steps, target) for target in targets] if measured else [],
        seconds_to=[steps_to_target(seconds, target) for target in targets] if measured else [],
        notes=_notes(results),
    )


def _notes(results: dict[int, dict[str, Any]]) -> list[str]:
    said = {seed: [str(note) for note in one.get("notes") or []] for seed, one in results.items()}
    lines = [
        note if all(note in others for others in said.values()) else f"seed {seed}: {note}"
        for seed, notes in said.items()
        for note in notes
    ]
    return list(dict.fromkeys(lines))


def _with_tests(methods: list[MethodSummary]) -> list[MethodSummary]:
    """Add each method's test against the reference, and correct them together."""
    reference = next((m for m in methods if m.is_reference), None)
    base = reference.final_accuracy.values if reference and reference.final_accuracy else {}
    tests = [
        None
        if method.is_reference or reference is None or method.final_accuracy is None
        else paired_test(method.final_accuracy.values, base)
        for method in methods
    ]
    corrected = holm([None if test is None else test.p_value for test in tests])
    return [
        replace(method, test=test, p_corrected=p_value)
        for method, test, p_value in zip(methods, tests, corrected, strict=True)
    ]


def _derived_targets(by_method: dict[str, list[TrialRecord]], reference: str) -> list[float]:
    """Fractions of the reference's best accuracy, or of the best method's where it has none."""
    best: dict[str, float] = {}
    for label, records in by_method.items():
        results = {record.seed: record.result for record in records if record.result}
        finished = {s: r for s, r in results.items() if r.get("status") == FINISHED}
        estimate = _estimate(finished, "best_accuracy")
        if estimate is not None:
            best[label] = min(max(estimate.mean, 0.0), 1.0)
    if not best:
        return []
    return default_targets(best.get(reference) or max(best.values()))


def _trial(seed: int, record: TrialRecord | None) -> Trial:
    if record is None:
        return Trial(seed, NOT_STARTED, 0, None, None)
    done = max((int(line.get("step") or 0) for line in record.metrics), default=0)
    result = record.result
    if result is None:
        return Trial(seed, UNDER_WAY, done, None, None)
    step = result.get("diverged_at")
    if step is None:
        step = result.get("step", done)
    status = str(result.get("status", "failed"))
    return Trial(seed, status, int(step or 0), result.get("steps"), result.get("reason"))


def _estimate(results: dict[int, dict[str, Any]], name: str) -> Estimate | None:
    values = {seed: float(r[name]) for seed, r in results.items() if _is_number(r.get(name))}
    if not values:
        return None
    numbers = list(values.values())
    return Estimate(values, math.fsum(numbers) / len(numbers), confidence_interval(numbers))


def _accuracies(record: TrialRecord, position: str) -> list[tuple[float, float | None]]:
    return [
        (float(line.get(position) or 0.0), line.get("accuracy"))
        for line in record.metrics
        if line.get("kind") == "eval" and "accuracy" in line
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
