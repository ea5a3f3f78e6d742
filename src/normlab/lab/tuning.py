"""The search for each method's learning rate: the same number of Optuna trials for all.

Each proposal is trained like any trial, on the training set less a part that judges it; the test
set is not looked at. The search keeps no state of its own: proposals follow from the results on
disk, so it goes on where it was stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import optuna

from normlab.lab import records
from normlab.lab.loops.supervised import derived_seed
from normlab.lab.processes import Processes
from normlab.lab.study import Study
from normlab.lab.tasks.task import Task, hold_out
from normlab.lab.trial import Trial, Watcher, run_trial


def tune_rate(
    study: Study,
    method: str,
    task: Task,
    folder: Path,
    processes: Processes,
    watcher: Watcher,
    stopping: Callable[[], bool],
) -> float:
    """Return the learning rate that does best on held-out data for one method.

    Args:
        study: The study; it has a ``tune`` part.
        method: The method's label.
        task: The task.
        folder: The run folder.
        processes: Where to run.
        watcher: Is told of the progress.
        stopping: Whether the user asked to stop.

    Returns:
        The rate with the best final accuracy on the held-out part, the lower loss at a tie; the
        study's own rate if no trial finished.

    Raises:
        normlab.lab.loops.supervised.Interrupted: The user asked to stop.
    """
    tune = study.tune
    assert tune is not None
    judged = hold_out(task, tune.hold_out, tune.seed)
    rates = optuna.distributions.FloatDistribution(tune.low, tune.high, log=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    tried: list[tuple[float, float, float]] = []
    search = optuna.create_study(direction="maximize")
    for number in range(tune.trials):
        # A fresh seed for each proposal makes it a function of the number and of what was seen.
        sampler_seed = derived_seed(tune.seed, "search", number) % 2**32
        search.sampler = optuna.samplers.TPESampler(seed=sampler_seed, n_startup_trials=4)
        proposal = search.ask({"lr": rates})
        lr = float(f"{proposal.params['lr']:.3g}")
        results = []
        for repeat in range(tune.seeds):
            place = number * tune.seeds + repeat
            trial = Trial(
                study=study,
                method=method,
                seed=tune.seed + repeat,
                lr=lr,
                folder=records.trial_folder(folder, method, place, room="tuning"),
            )
            results.append(run_trial(trial, judged, processes, watcher, stopping))
        # A rate at which one seed does not finish is worth nothing on that seed.
        finished = [result for result in results if result["status"] == records.FINISHED]
        worth = sum(result["final_accuracy"] for result in finished) / tune.seeds
        search.tell(proposal, worth)
        if finished:
            loss = sum(result["final_loss"] or float("inf") for result in finished) / len(finished)
            tried.append((worth, -loss, lr))
    return max(tried)[2] if tried else study.training.lr
