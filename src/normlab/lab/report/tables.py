"""The tables of the page: rows of cells, each with its text and the number it sorts by."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from normlab.lab.report import words
from normlab.lab.report.summary import Estimate, MethodSummary, Summary

STRIP_WIDTH = 150


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        text: What stands there.
        minor: What stands behind it in lighter type: an interval, a count.
        value: What the column sorts by; None sorts last either way.
        best: Whether it is the best of its column.
        strip: What to draw instead of text.
    """

    text: str
    minor: str = ""
    value: float | None = None
    best: bool = False
    strip: Strip | None = None


@dataclass(frozen=True)
class Strip:
    """The seeds of one method on the axis that all methods share, in units of the drawing.

    Attributes:
        dots: One for each seed.
        mean: The mean.
        low: Lower end of the interval; None for one seed.
        high: Upper end.
        reference: The reference's mean, a line through all rows.
        clipped: How many seeds lie left of the axis.
    """

    dots: list[float]
    mean: float | None
    low: float | None
    high: float | None
    reference: float | None
    clipped: int


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        title: Its heading.
        hint: What the heading means, in a sentence.
        cells: One for each method.
        group: A heading over several columns.
        falling: Whether the first click sorts the highest to the top.
    """

    title: str
    hint: str
    cells: list[Cell]
    group: str = ""
    falling: bool = False

    @property
    def minor_width(self) -> int:
        """Letters to keep for what stands behind the numbers, so that these line up."""
        return max((len(cell.minor) for cell in self.cells if cell.text), default=0)


def accuracy_columns(summary: Summary, digits: int) -> list[Column]:
    """Return final and best accuracy, the seeds, and the test against the reference."""
    methods = summary.methods
    columns = []
    if any(m.final_accuracy for m in methods):
        columns = [
            _estimates(
                "Final accuracy",
                "Mean over finished seeds at the end of training, with its 95 % interval",
                methods,
                lambda m: m.final_accuracy,
                lambda value: words.percent(value, digits),
                lambda width: words.points(width, digits),
                best=max,
            ),
            Column("Each seed", _strip_hint(summary), _strips(summary)),
        ]
        if any(m.test for m in methods):
            name = summary.reference
            columns += [
                Column(
                    "Difference",
                    f"Percentage points to {name}, mean over the seeds that both finished",
                    [_difference(m, digits) for m in methods],
                    falling=True,
                ),
                Column(
                    "p",
                    f"Paired t-test against {name}, Holm-corrected over all methods",
                    [_p_value(m) for m in methods],
                ),
            ]
        columns.append(
            _estimates(
                "Best accuracy",
                "Mean over seeds of the best evaluation; chosen on the test data, so it flatters",
                methods,
                lambda m: m.best_accuracy,
                lambda value: words.percent(value, digits),
                lambda width: words.points(width, digits),
                best=max,
            )
        )
    columns.append(
        _estimates(
            "Final loss",
            "Mean over finished seeds at the end of training",
            methods,
            lambda m: m.final_loss,
            words.number,
            words.width,
            best=min,
        )
    )
    done = [
        Cell(f"{m.num_finished} of {len(m.trials)}", value=float(m.num_finished)) for m in methods
    ]
    columns.append(Column("Finished", "Seeds that trained to their end", done, falling=True))
    return _filled(columns)


def target_columns(summary: Summary, digits: int) -> list[Column]:
    """Return, for each target, the median steps and seconds to reach it."""
    columns = []
    for index, target in enumerate(summary.targets):
        group = words.percent(target, digits)
        for title, hint, pick, text in (
            ("Steps", f"Median optimiser steps until {group}", "steps_to", _steps),
            ("Time", f"Median training time until {group}", "seconds_to", words.duration),
        ):
            cells = [_target(m, pick, index, text) for m in summary.methods]
            columns.append(Column(title, hint, _mark(cells, min), group))
    return columns if any(m.steps_to for m in summary.methods) else []


def cost_columns(summary: Summary) -> list[Column]:
    """Return time, throughput, memory, parameters and, where they differ, learning rates."""
    methods = summary.methods
    columns = [
        _estimates(
            "Training time",
            "Mean over finished seeds, without evaluation and recording",
            methods,
            lambda m: m.seconds,
            words.duration,
            lambda width: words.duration(width, 2),
            best=min,
        ),
        _estimates(
            "Samples per second",
            "Mean over seeds",
            methods,
            lambda m: m.samples_per_second,
            words.number,
            words.width,
            best=max,
        ),
        _estimates(
            "Peak memory",
            "Mean over seeds of the most memory held at once",
            methods,
            lambda m: m.peak_memory,
            words.size,
            None,
            best=min,
        ),
    ]
    counts = [
        Cell(
            words.magnitude(m.num_parameters),
            value=None if m.num_parameters is None else float(m.num_parameters),
        )
        for m in methods
    ]
    columns.append(Column("Parameters", "Parameters of the model as prepared", _mark(counts, min)))
    rates = [
        Cell(
            ", ".join(words.rate(rate) for rate in m.learning_rates) or words.NOTHING,
            value=m.learning_rates[0] if m.learning_rates else None,
        )
        for m in methods
    ]
    columns.append(Column("Learning rate", "The rate that the trials used", rates))
    return _filled(columns)


def _estimates(
    title: str,
    hint: str,
    methods: Sequence[MethodSummary],
    pick: Callable[[MethodSummary], Estimate | None],
    text: Callable[[float], str],
    width_text: Callable[[float], str] | None,
    best: Callable[..., float],
) -> Column:
    cells = []
    for method in methods:
        estimate = pick(method)
        if estimate is None:
            cells.append(Cell(words.NOTHING))
            continue
        half = estimate.half_width
        minor = f"± {width_text(half)}" if half is not None and width_text else ""
        cells.append(Cell(text(estimate.mean), minor, estimate.mean))
    # A method that lost seeds is measured on its lucky ones only, and is not marked as the best.
    whole = [not method.failures for method in methods]
    return Column(title, hint, _mark(cells, best, whole), falling=best is max)


def _mark(
    cells: list[Cell], best: Callable[..., float], allowed: Sequence[bool] | None = None
) -> list[Cell]:
    """Mark the best cells by what is shown, unless all of them show the same."""
    allowed = allowed or [True] * len(cells)
    values = [c.value for c, ok in zip(cells, allowed, strict=True) if ok and c.value is not None]
    if len(values) < 2 or len({cell.text for cell in cells if cell.value is not None}) == 1:
        return cells
    text = next(cell.text for cell in cells if cell.value == best(values))
    return [
        replace(cell, best=ok and cell.text == text)
        for cell, ok in zip(cells, allowed, strict=True)
    ]


def _filled(columns: list[Column]) -> list[Column]:
    return [c for c in columns if any(cell.value is not None or cell.strip for cell in c.cells)]


def _difference(method: MethodSummary, digits: int) -> Cell:
    if method.is_reference:
        return Cell("reference", value=0.0)
    test = method.test
    if test is None or test.difference is None:
        return Cell(words.NOTHING)
    minor = ""
    if test.interval is not None:
        minor = f"± {words.points(0.5 * (test.interval[1] - test.interval[0]), digits)}"
    return Cell(words.points(test.difference, digits, sign=True), minor, test.difference)


def _p_value(method: MethodSummary) -> Cell:
    if method.p_corrected is None:
        return Cell(words.NOTHING)
    return Cell(
        words.p_value(method.p_corrected),
        value=method.p_corrected,
        minor="significant" if method.is_significant else "",
    )


def _steps(value: float) -> str:
    return f"{round(value):,}"


def _target(method: MethodSummary, pick: str, index: int, text: Callable[[float], str]) -> Cell:
    reached = getattr(method, pick)
    if not reached:
        return Cell(words.NOTHING)
    found = reached[index]
    share = f"{found.reached} of {found.count}"
    if found.reached == 0:
        return Cell("", "not reached")
    if not math.isfinite(found.median):
        return Cell("", f"only {share}")
    minor = share if found.reached < found.count and pick == "steps_to" else ""
    return Cell(text(found.median), minor, found.median)


def _strip_hint(summary: Summary) -> str:
    low, high = _axis(summary)
    return (
        f"A dot for each seed from {words.percent(low)} to {words.percent(high)}; the bar is the "
        "interval of the mean, the dashed line the reference"
    )


def _axis(summary: Summary) -> tuple[float, float]:
    """The range of all seeds, cut on the left where a few would squeeze all others together."""
    values = sorted(
        value
        for m in summary.methods
        if m.final_accuracy
        for value in m.final_accuracy.values.values()
    )
    low, middle, high = values[0], values[len(values) // 2], values[-1]
    if middle < high:
        low = max(low, high - 6.0 * (high - middle))
    margin = 0.06 * (high - low) or 0.01
    return low - margin, high + margin


def _strips(summary: Summary) -> list[Cell]:
    low, high = _axis(summary)

    def place(value: float) -> float:
        share = (min(max(value, low), high) - low) / (high - low)
        return round(4 + share * (STRIP_WIDTH - 8), 1)

    base = summary.reference_method
    reference = place(base.final_accuracy.mean) if base and base.final_accuracy else None
    cells = []
    for method in summary.methods:
        estimate = method.final_accuracy
        if estimate is None:
            cells.append(Cell("", strip=Strip([], None, None, None, reference, 0)))
            continue
        seen = [value for value in estimate.values.values() if value >= low]
        shown = estimate.mean >= low
        interval = estimate.interval if shown else None
        strip = Strip(
            dots=[place(value) for value in seen],
            mean=place(estimate.mean) if shown else None,
            low=place(interval[0]) if interval else None,
            high=place(interval[1]) if interval else None,
            reference=reference,
            clipped=len(estimate.values) - len(seen),
        )
        text = ", ".join(
            f"seed {seed}: {words.percent(value, 2)}" for seed, value in estimate.values.items()
        )
        cells.append(Cell(text, value=estimate.mean, strip=strip))
    return cells
