"""A paper's claim as data: what it says, how it is run, and what it is held against.

Every threshold stands in a `Bound` with its reason, in the claim's file, before anything runs; a
run folder remembers the bounds and the studies it was begun with and refuses others. One rule gives
every verdict (`verdict`): the whole 95 % interval decides, or nothing does.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from normlab.catalog import find_method
from normlab.lab import compare as comparison
from normlab.lab import environment, records
from normlab.lab.processes import Processes
from normlab.lab.records import RunRecord
from normlab.lab.study import Study

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "not decidable at this scale"

Direction = Literal["at least", "above", "at most", "below"]
"""The side of the threshold on which the claim stands; "at least" and "at most" include it."""

PLAN = "claim.json"


def verdict(
    low: float | None, high: float | None, threshold: float, direction: Direction
) -> Literal["holds", "does not hold", "not decidable at this scale"]:
    """Return the verdict that an interval gives.

    Args:
        low: Lower end of the 95 % interval of what was measured; None where nothing is known.
        high: Upper end; equal to ``low`` for an exact value.
        threshold: What the claim is held against.
        direction: The claim's side of the threshold.

    Returns:
        ``holds`` if the whole interval is on the claim's side, ``does not hold`` if all of it is
        on the other side, else ``not decidable at this scale``.

    Example:
        >>> verdict(0.2, 1.4, 0.0, "above"), verdict(-0.3, 1.4, 0.0, "above")
        ('holds', 'not decidable at this scale')
    """
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return UNDECIDED
    assert low <= high
    inside = {
        "at least": lambda value: value >= threshold,
        "above": lambda value: value > threshold,
        "at most": lambda value: value <= threshold,
        "below": lambda value: value < threshold,
    }[direction]
    if inside(low) and inside(high):
        return HOLDS
    if not inside(low) and not inside(high):
        return FAILS
    return UNDECIDED


@dataclass(frozen=True)
class Finding:
    """One statement, what was measured for it, and the verdict.

    Attributes:
        statement: What the paper's claim comes to here.
        measured: The measured value; None where nothing could be measured.
        low: Lower end of its 95 % interval; None if the interval is unknown.
        high: Upper end.
        threshold: What it is held against.
        direction: The claim's side of the threshold.
        unit: The unit of all four numbers.
        reason: Why the threshold is what it is.
        verdict: As `verdict` gives it.
        n: How many repetitions (seeds, unless the statement says otherwise) the interval rests on;
            0 for an exact value.
        details: Further numbers, as plain data.
    """

    statement: str
    measured: float | None
    low: float | None
    high: float | None
    threshold: float
    direction: Direction
    unit: str
    reason: str
    verdict: str
    n: int
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Bound:
    """What a finding is held against, fixed before anything is run.

    Attributes:
        statement: What is claimed, in one sentence.
        direction: The claim's side of the threshold.
        threshold: The threshold.
        unit: The unit of threshold and measurement.
        reason: Why this threshold.
    """

    statement: str
    direction: Direction
    threshold: float
    unit: str
    reason: str

    def judge(
        self,
        measured: float | None,
        interval: tuple[float, float] | None,
        n: int,
        details: dict[str, Any] | None = None,
    ) -> Finding:
        """Return the finding with its verdict.

        Args:
            measured: The measured value, finite; None where nothing could be measured.
            interval: Its 95 % interval, finite; None if unknown, which leaves it undecided.
            n: The repetitions behind the interval.
            details: Further numbers, as plain data without machine paths.
        """
        low, high = interval or (None, None)
        assert all(value is None or math.isfinite(value) for value in (measured, low, high))
        return Finding(
            **asdict(self),
            measured=measured,
            low=low,
            high=high,
            verdict=verdict(low, high, self.threshold, self.direction),
            n=n,
            details=details or {},
        )


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a claim: the studies it needs and what follows from their records.

    Attributes:
        name: A word, for the run folder.
        bounds: All that its findings are held against.
        studies: For each scale its studies by name; a part that needs no training has none.
        measure: Maps the records of the studies, by name and in order, to one finding a bound.
    """

    name: str
    bounds: tuple[Bound, ...]
    measure: Callable[[Mapping[str, RunRecord]], list[Finding]]
    studies: Mapping[str, Mapping[str, Study]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a paper says, and how it is put to the test.

    Attributes:
        name: The name on the command line.
        method: The method's label; its card names the paper.
        statement: The paper's claim, in our words.
        budget: For each scale what it costs, in words.
        parts: The parts.
        departs: For each scale where it differs from the paper's own experiment.
    """

    name: str
    method: str
    statement: str
    budget: Mapping[str, str]
    parts: tuple[Part, ...]
    departs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def bounds(self) -> tuple[Bound, ...]:
        """All bounds, in the order of the findings."""
        return tuple(bound for part in self.parts for bound in part.bounds)

    @property
    def paper(self) -> str:
        """The paper, in one line."""
        source = find_method(self.method).card.source
        assert source is not None
        arxiv = f", arXiv {source.arxiv}" if source.arxiv else ""
        return f"{source.authors}, {source.title}, {source.year}{arxiv}"


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """One run of a claim, ready to be written down.

    Attributes:
        claim: The claim's name.
        scale: ``small`` or ``paper``.
        statement: The claim.
        paper: The paper.
        departs: Where the run differs from the paper's experiment.
        findings: What was found.
        seeds: The seeds.
        studies: The studies as data, by part and name; data sets by name only.
        n: How many trials were trained, those of the searches left out.
        commit: The commit of the code, several where a stopped run went on under another one.
        device: The kind of device and its name.
        threads: Threads of the process.
        versions: Versions of normlab, Python and packages.
        seconds: Seconds of training and evaluation over all trials, those of the searches too, and
            of what the claim measures besides.
        date: When the run was complete.
    """

    claim: str
    scale: str
    statement: str
    paper: str
    departs: tuple[str, ...]
    findings: tuple[Finding, ...]
    seeds: tuple[int, ...]
    studies: dict[str, Any]
    n: int
    commit: str | None
    device: str
    threads: int
    versions: dict[str, str | None]
    seconds: float
    date: str


def reproduce(
    claim: Claim, scale: str, data: Path | None, folder: Path, console: Console
) -> Evidence:
    """Run a claim to its findings, from where it stopped if it was begun before.

    Args:
        claim: The claim.
        scale: ``"small"`` or ``"paper"``.
        data: The folder with one folder for each data set; None looks in ``data/<task>``.
        folder: The run folder; each study has a folder of its own in it.
        console: Where progress is shown.

    Returns:
        The evidence; the same once more if all of it was run before.

    Raises:
        ValueError: An unknown scale, data that are missing, a folder begun with other thresholds
            or studies, or several processes.
        normlab.lab.compare.Interrupted: The user asked to stop.
        normlab.lab.records.DiskError: The records could not be written.
    """
    if scale not in claim.budget:
        near = get_close_matches(scale, claim.budget, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"reproduce({claim.name}, scale={scale!r}): expected one of "
            f"{', '.join(claim.budget)}, got {scale!r}; do you mean {near!r}?"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"reproduce({claim.name}): expected one process, got {os.environ['WORLD_SIZE']}; "
            "start it without torchrun"
        )
    plan = _begin(claim, scale, folder)
    findings: list[Finding] = []
    runs: list[RunRecord] = []
    for part in claim.parts:
        part_runs: dict[str, RunRecord] = {}
        for name, study in part.studies.get(scale, {}).items():
            place = folder / part.name / name
            console.print(f"{claim.name}: {part.name}, {name}", markup=False)
            comparison.compare(locate(study, data), place, console)
            part_runs[name] = records.read_run(place)
        start = time.perf_counter()
        try:
            made = part.measure(part_runs)
        finally:
            # Written down at once: a part that was stopped goes on from what it has measured.
            if plan["finished"] is None:
                seconds = plan.get("measuring", 0.0) + time.perf_counter() - start
                plan["measuring"] = round(seconds, 1)
                records.write_json(folder / PLAN, plan)
        assert [finding.statement for finding in made] == [b.statement for b in part.bounds]
        findings += made
        runs += part_runs.values()
    if plan["finished"] is None:
        plan["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
        records.write_json(folder / PLAN, plan)

    around = runs[-1].environment if runs else environment.describe_environment(Processes("cpu"))
    trials = [trial for run in runs for trial in run.trials]
    ended = [trial.result for run in runs for trial in (*run.trials, *run.tuning) if trial.result]
    # Folders of before this was measured have no such line.
    seconds = plan.get("measuring", 0.0) + sum(
        (result.get("seconds") or 0.0) + (result.get("evaluation_seconds") or 0.0)
        for result in ended
    )
    return Evidence(
        claim=claim.name,
        scale=scale,
        statement=claim.statement,
        paper=claim.paper,
        departs=tuple(claim.departs.get(scale, ())),
        findings=tuple(findings),
        seeds=tuple(sorted({trial.seed for trial in trials})),
        studies=plan["studies"],
        n=len(trials),
        commit=", ".join(commit for commit in plan["commits"] if commit) or None,
        device=f"{around['device']}: {around['device_name']}",
        threads=around["threads"],
        versions={name: around[name] for name in ("normlab", "python")} | around["packages"],
        seconds=round(seconds, 1),
        date=plan["finished"],
    )


def locate(study: Study, data: Path | None) -> Study:
    """Return a study that names where its data lie.

    Args:
        study: A study without a place of data.
        data: The folder with one folder for each data set; None leaves the study as it is.
    """
    if data is None or study.task.name == "digits":
        return study
    task = study.task.model_copy(update={"data": str(data.expanduser().absolute())})
    return study.model_copy(update={"task": task})


def append_evidence(evidence: Evidence, folder: Path) -> bool:
    """Add one run to ``<folder>/<claim>.jsonl``, unless that very run stands there already.

    Args:
        evidence: The run.
        folder: The folder of evidence.

    Returns:
        Whether a line was added.

    Raises:
        normlab.lab.records.DiskError: The line could not be written.
    """
    line = json.dumps(asdict(evidence), ensure_ascii=False, allow_nan=False)
    path = folder / f"{evidence.claim}.jsonl"
    with records.writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists() and line in path.read_text(encoding="utf-8").splitlines():
            return False
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    return True


def _begin(claim: Claim, scale: str, folder: Path) -> dict[str, Any]:
    """Return what the folder's run was begun with, or write it down; other plans are refused."""
    wanted: dict[str, Any] = {
        "claim": claim.name,
        "scale": scale,
        "bounds": [asdict(bound) for bound in claim.bounds],
        "studies": {
            part.name: {
                name: study.model_dump(exclude_none=True)
                for name, study in part.studies.get(scale, {}).items()
            }
            for part in claim.parts
            if part.studies.get(scale)
        },
    }
    wanted = json.loads(json.dumps(wanted))
    path = folder / PLAN
    plan = wanted | {"commits": [], "finished": None}
    if path.exists():
        plan = json.loads(path.read_text(encoding="utf-8"))
        changed = next((name for name, value in wanted.items() if plan.get(name) != value), None)
        if changed is not None:
            raise ValueError(
                f"reproduce({claim.name}, out={folder}): expected a folder of this claim as it "
                f"stands, got one begun with other {changed}; choose another --out"
            )
    if plan["finished"] is None:
        commit = environment.commit()
        if commit not in plan["commits"]:
            plan["commits"].append(commit)
        records.write_json(path, plan)
    return plan
