"""Curves over seeds, made small enough for a page: a mean with the range of its seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from normlab.lab.records import TrialRecord

POINTS = 200
"""Most points of one curve; about one for every two pixels of a plot."""


def curve(trials: Sequence[TrialRecord], kind: str, name: str, points: int = POINTS) -> dict:
    """Return the mean over seeds of one recorded number, with the range of the seeds.

    Seeds are brought together by step; the seconds are the mean of the seeds' own seconds. A seed
    counts as long as it has something to show: a curve goes on with the seeds that are left, and
    ``count`` says how many those are.

    Evaluations are thinned by leaving points out (the last one stays), because each of them is a
    measurement; training losses are averaged over neighbouring steps, because each of them already
    is an average.

    Args:
        trials: The seeds of one method.
        kind: ``"train"`` or ``"eval"``.
        name: ``"loss"`` or ``"accuracy"``.
        points: Most points to keep.

    Returns:
        Columns ``step``, ``seconds``, ``mean``, ``low``, ``high``, ``count``; empty columns where
        nothing was recorded.
    """
    seeds = [
        [line for line in trial.metrics if line.get("kind") == kind and _is_number(line.get(name))]
        for trial in trials
    ]
    steps = sorted({line["step"] for lines in seeds for line in lines})
    if len(steps) <= points:
        places = {step: step for step in steps}
    elif kind == "eval":
        last = len(steps) - 1
        kept = (steps[round(index * last / (points - 1))] for index in range(points))
        places = {step: step for step in kept}
    else:
        low, width = steps[0], (steps[-1] - steps[0] + 1) / points
        places = {step: int((step - low) / width) for step in steps}

    groups: dict[int, list[list[dict[str, Any]]]] = {}
    for lines in seeds:
        own: dict[int, list[dict[str, Any]]] = {}
        for line in lines:
            if line["step"] in places:
                own.setdefault(places[line["step"]], []).append(line)
        for place, group in own.items():
            groups.setdefault(place, []).append(group)

    columns: dict[str, list] = {
        key: [] for key in ("step", "seconds", "mean", "low", "high", "count")
    }
    for place in sorted(groups):
        group = groups[place]
        values = [_mean([line[name] for line in lines]) for lines in group]
        everything = [line for lines in group for line in lines]
        columns["step"].append(round(_mean([line["step"] for line in everything])))
        columns["seconds"].append(
            _short(_mean([line.get("seconds") or 0.0 for line in everything]))
        )
        columns["mean"].append(_short(_mean(values)))
        columns["low"].append(_short(min(values)))
        columns["high"].append(_short(max(values)))
        columns["count"].append(len(values))
    return columns


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _short(value: float) -> float:
    """Five digits are more than a plot shows, and a third of the bytes."""
    return float(f"{value:.5g}")
