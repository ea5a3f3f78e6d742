"""The engine that needs no server: trials one after the other, in the processes that are there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from normlab.lab.processes import Processes
from normlab.lab.tasks.task import Task
from normlab.lab.trial import Trial, Watcher, run_trial


def run_trials(
    trials: Iterable[Trial],
    task: Task,
    processes: Processes,
    watcher: Watcher,
    stopping: Callable[[], bool],
) -> list[dict[str, Any]]:
    """Run trials in order and return their results.

    Args:
        trials: What to run; those with a result already are read, not run.
        task: The task's data.
        processes: Where to run.
        watcher: Is told of the progress.
        stopping: Whether the user asked to stop.

    Returns:
        One result for each trial, failures included.

    Raises:
        normlab.lab.loops.supervised.Interrupted: The user asked to stop.
    """
    return [run_trial(trial, task, processes, watcher, stopping) for trial in trials]
