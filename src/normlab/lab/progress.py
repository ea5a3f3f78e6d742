"""What a person sees while trials run: one live view on a terminal, a line a trial elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor

from normlab.lab import records
from normlab.lab.trial import Trial

REFRESH_SECONDS = 0.5
HEARTBEAT_SECONDS = 60.0


@contextmanager
def watching(total_trials: int, console: Console) -> Iterator[Live | Lines]:
    """Show the progress of so many trials while the block runs.

    Args:
        total_trials: Trials planned, those of the search included.
        console: Where to show it; decides by itself whether it is a terminal.
    """
    if not console.is_terminal:
        yield Lines(console, total_trials)
        return
    bars = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        refresh_per_second=2,
        transient=True,
    )
    with bars:
        yield Live(bars, total_trials)


class Live:
    """Two bars, all trials and the one at work, and a line above them for each one ended."""

    def __init__(self, bars: Progress, total_trials: int) -> None:
        self._bars = bars
        self._all = bars.add_task("all trials", total=total_trials, status="")
        self._one = bars.add_task("", total=1, status="", visible=False)
        self._shown_at = 0.0

    def begin(self, trial: Trial, total_steps: int, step: int) -> None:
        """Point the second bar at a trial."""
        self._bars.reset(self._one, total=total_steps, completed=step, visible=True)
        self._bars.update(self._one, description=_name(trial), status="")

    def step(self, step: int, loss: Tensor) -> None:
        """Move the bar, a few times a second at most: reading a loss may wait for the device."""
        now = time.monotonic()
        if now - self._shown_at >= REFRESH_SECONDS:
            self._shown_at = now
            self._bars.update(self._one, completed=step, status=f"loss {loss.item():.4f}")

    def end(self, trial: Trial, result: dict[str, Any]) -> None:
        """Leave a line behind."""
        self._bars.update(self._one, visible=False)
        self._bars.advance(self._all)
        self._bars.console.print(describe(trial, result), markup=False, highlight=False)

    def say(self, text: str) -> None:
        """Print one line."""
        self._bars.console.print(text, markup=False, highlight=False)


class Lines:
    """One line for each trial ended, and one a minute while a long one runs."""

    def __init__(self, console: Console, total_trials: int) -> None:
        self._console = console
        self._total_trials = total_trials
        self._ended = 0
        self._trial: Trial | None = None
        self._total_steps = 0
        self._said_at = time.monotonic()

    def begin(self, trial: Trial, total_steps: int, step: int) -> None:
        """Remember which trial runs; say where it goes on if it was begun before."""
        self._trial, self._total_steps, self._said_at = trial, total_steps, time.monotonic()
        if step:
            self.say(f"{_name(trial)}: goes on at step {step} of {total_steps}")

    def step(self, step: int, loss: Tensor) -> None:
        """Say once a minute how far it is."""
        if time.monotonic() - self._said_at >= HEARTBEAT_SECONDS and self._trial is not None:
            self._said_at = time.monotonic()
            self.say(
                f"{_name(self._trial)}: step {step}/{self._total_steps}, loss {loss.item():.4f}"
            )

    def end(self, trial: Trial, result: dict[str, Any]) -> None:
        """Print the trial's result."""
        self._ended += 1
        self.say(f"[{self._ended}/{self._total_trials}] {describe(trial, result)}")

    def say(self, text: str) -> None:
        """Print one line."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class Silent:
    """Shows nothing: for every process but the first."""

    def begin(self, trial: Trial, total_steps: int, step: int) -> None:
        """Show nothing."""

    def step(self, step: int, loss: Tensor) -> None:
        """Show nothing."""

    def end(self, trial: Trial, result: dict[str, Any]) -> None:
        """Show nothing."""

    def say(self, text: str) -> None:
        """Show nothing."""


def describe(trial: Trial, result: dict[str, Any]) -> str:
    """Return one line about a trial's result."""
    if result["status"] == records.FINISHED:
        return (
            f"{_name(trial)}: accuracy {100 * result['final_accuracy']:.2f} % "
            f"in {result['seconds']:.1f} s of training"
        )
    return f"{_name(trial)}: {result['status']}: {result['reason']}"


def _name(trial: Trial) -> str:
    if trial.folder.parent.parent.name == "tuning":
        return f"{trial.method}, search {trial.folder.name}, lr {trial.lr:g}"
    return f"{trial.method}, seed {trial.seed}"
