"""The verdict in words: who won, by how much, and whether that means anything."""

from __future__ import annotations

import math
from dataclasses import dataclass

from normlab.lab.report import words
from normlab.lab.report.summary import NOT_STARTED, UNDER_WAY, MethodSummary, Summary


@dataclass(frozen=True)
class Verdict:
    """What the page says on top.

    Attributes:
        headline: One sentence.
        sentences: The numbers behind it, one thought each.
    """

    headline: str
    sentences: tuple[str, ...]


def verdict(summary: Summary, digits: int = 1) -> Verdict:
    """Say who won, by how much, and whether the seeds suffice to tell.

    Args:
        summary: From `normlab.lab.report.summary.summarise`.
        digits: Decimals of a percentage.

    Returns:
        Plain sentences; names stand in them as they are, so a page has to escape them.
    """
    ranked = [method for method in summary.methods if method.final_accuracy is not None]
    headline, sentences = (
        _ranking(summary, ranked, digits) if ranked else _without_accuracy(summary)
    )
    return Verdict(
        headline,
        tuple(
            sentence
            for sentence in (
                *sentences,
                *_others(summary, ranked),
                _fastest(summary, ranked, digits),
                _failures(summary),
                _under_way(summary),
            )
            if sentence
        ),
    )


def digits_for(summary: Summary) -> int:
    """Return the decimals that tell the methods apart: two where accuracies crowd near 100 %."""
    values = [m.final_accuracy for m in summary.methods if m.final_accuracy is not None]
    widths = [value.half_width for value in values if value.half_width]
    crowded = any(value.mean >= 0.99 for value in values) and min(widths, default=1.0) < 0.002
    return 2 if crowded else 1


def accuracy_with_interval(method: MethodSummary, digits: int) -> str:
    """Return ``97.9 % ± 0.3``, or ``97.9 %`` for one seed."""
    estimate = method.final_accuracy
    assert estimate is not None
    text = words.percent(estimate.mean, digits)
    if estimate.half_width is None:
        return text
    return f"{text} ± {words.points(estimate.half_width, digits)}"


def _ranking(summary: Summary, ranked: list[MethodSummary], digits: int) -> tuple[str, list[str]]:
    # A method that lost seeds is judged by its lucky ones: it does not win while others finished.
    whole = [method for method in ranked if not method.failures]
    leader = (whole or ranked)[0]
    reference = summary.reference_method
    lucky = [m for m in ranked[: ranked.index(leader)] if m.failures]
    sentences: list[str] = []
    if len(ranked) == 1:
        alone = f"Only {leader.label} has an accuracy: {accuracy_with_interval(leader, digits)}."
        return alone, [f"That is over {_seeds(leader)}; there is nothing to compare it with."]
    if reference is None or reference.final_accuracy is None:
        headline = f"{leader.label} reached the highest accuracy."
        second = next(method for method in ranked if method is not leader)
        what = (
            "the study names no reference among its methods"
            if reference is None
            else f"{reference.label}, the reference, finished no seed"
        )
        sentences.append(
            f"{leader.label} reached {accuracy_with_interval(leader, digits)} over "
            f"{_seeds(leader)}, {second.label} {accuracy_with_interval(second, digits)}; {what}, "
            "so no difference was tested."
        )
    elif leader is reference:
        second = next(method for method in ranked if method is not leader)
        headline = f"No method beat {leader.label}, the reference."
        sentences.append(
            f"{leader.label} reached {accuracy_with_interval(leader, digits)} over "
            f"{_seeds(leader)}. {second.label} came closest with "
            f"{accuracy_with_interval(second, digits)}{_by_how_much(second, leader, digits)}"
        )
    else:
        headline = _headline(leader, reference, digits)
        sentences.append(
            f"{leader.label} reached {accuracy_with_interval(leader, digits)}"
            f"{_by_how_much(leader, reference, digits)}"
        )
    if lucky:
        sentences.append(
            f"{words.listing([m.label for m in lucky])} stood higher, but only on the seeds that "
            "survived, and is not counted as the winner."
        )
    return headline, sentences


def _headline(leader: MethodSummary, reference: MethodSummary, digits: int) -> str:
    test = leader.test
    assert test is not None
    name, base = leader.label, reference.label
    if test.num_pairs == 0:
        return f"{name} stands above {base}, but the two share no finished seed."
    if test.num_pairs == 1:
        return f"{name} stands above {base} on one seed, which is too few to tell."
    if leader.is_significant:
        assert test.difference is not None
        gap = words.points(abs(test.difference), digits)
        return f"{name} beat {base} by {gap} points."
    if test.num_pairs < 5:
        return (
            f"{name} stands above {base}, but {words.plural(test.num_pairs, 'seed')} "
            "are too few to tell them apart."
        )
    return f"{name} stands above {base}, but not by more than chance."


def _by_how_much(method: MethodSummary, reference: MethodSummary, digits: int) -> str:
    """Continue a sentence with the paired difference and what it is worth."""
    test = method.test
    assert test is not None
    if test.difference is None:
        return f"; {test.reason} with {reference.label}, so the difference cannot be tested."
    gap = words.points(abs(test.difference), digits)
    if not gap.strip("0.,"):
        place = f", level with {reference.label}"
    else:
        side = "above" if test.difference > 0 else "below"
        place = f", {gap} points {side} {reference.label}"
    if test.num_pairs == 1:
        return f"{place}; a single seed cannot tell whether that is more than chance."
    over = f"with {words.plural(test.num_pairs, 'seed')} this difference"
    if method.p_corrected is None:
        return f"{place}; {test.reason}."
    found = f"Holm-corrected p = {words.p_value(method.p_corrected)}".replace("= <", "<")
    if method.is_significant:
        return f"{place}; {over} is significant ({found})."
    assert test.interval is not None
    low, high = (words.points(end, digits, sign=True) for end in test.interval)
    alone = test.interval[0] > 0 or test.interval[1] < 0
    meaning = (
        f"by itself it would be {low} to {high} points, but it is one of several that were tested."
        if alone
        else f"anything from {low} to {high} points would fit the seeds."
    )
    return f"{place}; {over} is not significant ({found}): {meaning}"


def _others(summary: Summary, ranked: list[MethodSummary]) -> list[str]:
    """Sort the methods that the first sentences left out into better, worse and neither."""
    reference = summary.reference_method
    if reference is None or reference.final_accuracy is None or len(ranked) < 3:
        return []
    tested = [m for m in ranked if m.test is not None and m.test.difference is not None]
    better = [m.label for m in tested if m.is_significant and _difference(m) > 0]
    worse = [m.label for m in tested if m.is_significant and _difference(m) < 0]
    unclear = [m.label for m in tested if not m.is_significant]
    sentences = []
    if len(better) > 1:
        sentences.append(f"Significantly above {reference.label}: {words.listing(better)}.")
    if worse:
        sentences.append(f"Significantly below {reference.label}: {words.listing(worse)}.")
    if len(unclear) > 1:
        if len(unclear) == len(tested):
            told = f"None of the {len(unclear)} methods can be told apart"
        elif len(unclear) <= 4:
            told = f"{words.listing(unclear)} cannot be told apart"
        else:
            told = f"The other {len(unclear)} methods cannot be told apart"
        sentences.append(f"{told} from {reference.label} by these seeds.")
    return sentences


def _difference(method: MethodSummary) -> float:
    assert method.test is not None
    assert method.test.difference is not None
    return method.test.difference


def _fastest(summary: Summary, ranked: list[MethodSummary], digits: int) -> str:
    """Name the first to the highest target that anybody's median reaches."""
    for index in reversed(range(len(summary.targets))):
        times = [(m.seconds_to[index].median, m) for m in ranked if m.seconds_to]
        times = [(median, method) for median, method in times if math.isfinite(median)]
        if len(times) < 2:
            continue
        times.sort(key=lambda pair: pair[0])
        (median, first), (later, second) = times[:2]
        return (
            f"{first.label} was first to {words.percent(summary.targets[index], digits)}, after "
            f"{words.duration(median)} of training and "
            f"{words.plural(round(first.steps_to[index].median), 'step')} (medians over seeds); "
            f"{second.label} followed after {words.duration(later)}."
        )
    return ""


def _failures(summary: Summary) -> str:
    parts = []
    for method in summary.methods:
        kinds: dict[str, list[int]] = {}
        for trial in method.failures:
            kinds.setdefault(trial.status, []).append(trial.step)
        for status, steps in kinds.items():
            verb = {"diverged": "diverged", "out-of-memory": "ran out of memory"}.get(
                status, "failed"
            )
            first = ", first" if len(steps) > 1 else ""
            parts.append(
                f"{method.label} {verb} on {len(steps)} of "
                f"{words.plural(len(method.trials), 'seed')} ({first[2:]}{' ' if first else ''}"
                f"at step {min(steps):,})"
            )
    if not parts:
        return ""
    if len(parts) > 4:
        count = sum(trial.failed for trial in summary.trials)
        return f"{words.plural(count, 'trial')} of {len(summary.trials)} failed; see below."
    return f"{'; '.join(parts)}."


def _under_way(summary: Summary) -> str:
    waiting = [trial for trial in summary.trials if trial.status in (UNDER_WAY, NOT_STARTED)]
    if not waiting:
        return ""
    running = sum(trial.status == UNDER_WAY for trial in waiting)
    ended = len(summary.trials) - len(waiting)
    return (
        f"The study is not complete: {ended} of {words.plural(len(summary.trials), 'trial')} "
        f"have ended, {running} {'is' if running == 1 else 'are'} under way; "
        "every number here may still change."
    )


def _without_accuracy(summary: Summary) -> tuple[str, list[str]]:
    trials = summary.trials
    finished = [trial for trial in trials if trial.finished]
    if not trials:
        return "Nothing has been recorded yet.", ["The study has not started its first trial."]
    if finished:
        losses = [(m.final_loss.mean, m) for m in summary.methods if m.final_loss is not None]
        sentences = ["Its trials recorded no accuracy on held-out data, so nothing was tested."]
        if losses:
            value, method = min(losses, key=lambda pair: pair[0])
            sentences.append(
                f"The lowest final loss is {method.label}'s, {words.number(value)}; a loss on "
                "training data says little about how well a method generalises."
            )
        return "No accuracy was measured, so there is no winner.", sentences
    if any(trial.failed for trial in trials):
        if all(trial.failed for trial in trials):
            return "No trial trained to its end, so there is no winner.", []
        return "No trial has finished so far, and some have failed.", []
    furthest = max(trial.step for trial in trials)
    return "No trial has finished yet, so there is no winner.", [
        f"The furthest has done {words.plural(furthest, 'step')}."
    ]


def _seeds(method: MethodSummary) -> str:
    assert method.final_accuracy is not None
    return words.plural(len(method.final_accuracy.values), "seed")
