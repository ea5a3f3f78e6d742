"""The main job: train one network under several methods on equal terms, and write the page."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from normlab.catalog import METHODS, find_method
from normlab.lab import records
from normlab.lab.engines.here import run_trials
from normlab.lab.environment import describe_environment
from normlab.lab.loops.supervised import Interrupted
from normlab.lab.models import model_title
from normlab.lab.processes import Processes
from normlab.lab.progress import Silent, watching
from normlab.lab.report import write_report
from normlab.lab.study import Study, make_study
from normlab.lab.tasks import load_task
from normlab.lab.tasks.task import Task, limit
from normlab.lab.trial import Trial, make_setting, prepare
from normlab.lab.tuning import tune_rate
from normlab.method import Method, Unsuitable

__all__ = ["Comparison", "Interrupted", "compare"]


@dataclass(frozen=True)
class Comparison:
    """What a comparison left behind: its results and, on the first process, the page."""

    folder: Path
    results: list[dict[str, Any]]
    page: Path | None


def compare(study: Study, folder: Path, console: Console) -> Comparison:
    """Run a study to its end, from where it stopped if it was begun before, and write its page.

    Args:
        study: What to compare.
        folder: The run folder.
        console: Where progress is shown.

    Returns:
        All results, failures included.

    Raises:
        ValueError: Something in the study does not fit: an unknown name, data that is missing, a
            method that refuses the model, a folder of another study or in use.
        Interrupted: The user asked to stop.
        normlab.lab.records.DiskError: The records could not be written.
    """
    methods = [find_method(label) for label in study.methods]
    labels = [method.label for method in methods]
    study = study.model_copy(update={"methods": labels, "reference": _reference(study, labels)})
    processes = Processes(study.training.device, study.training.precision)
    with ExitStack() as stack:
        stack.callback(processes.close)
        if processes.first:
            stack.enter_context(records.hold(folder))
        choice = study.task
        task = load_task(choice.name, choice.data, **choice.options)
        task = limit(task, choice.train_size, choice.test_size)
        _check(study, methods, task, processes, folder)
        if processes.first:
            _write_study(study, methods, task, processes, folder)
        searches = len(labels) * study.tune.trials * study.tune.seeds if study.tune else 0
        total = searches + len(labels) * len(study.seeds)
        stopping = stack.enter_context(_stop_on_interrupt())
        watcher = stack.enter_context(watching(total, console)) if processes.first else Silent()
        try:
            rates = dict.fromkeys(labels, study.training.lr)
            if study.tune:
                for label in labels:
                    rates[label] = tune_rate(
                        study, label, task, folder, processes, watcher, stopping
                    )
                    watcher.say(f"{label}: the search chose lr {rates[label]:g}")
            trials = [
                Trial(study, label, seed, rates[label], records.trial_folder(folder, label, seed))
                for seed in study.seeds
                for label in labels
            ]
            results = run_trials(trials, task, processes, watcher, stopping)
        except Interrupted:
            if processes.first:
                write_report(folder)
            raise
        page = write_report(folder) if processes.first else None
    return Comparison(folder, results, page)


def _reference(study: Study, labels: list[str]) -> str:
    wanted = find_method(study.reference_method).label
    if wanted not in labels:
        raise ValueError(
            f"compare(reference={wanted!r}): expected one of the methods compared "
            f"({', '.join(labels)}), got {wanted!r}; add it to the methods"
        )
    if len(set(labels)) < len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise ValueError(
            f"compare(methods={', '.join(labels)}): expected each method once, got {twice!r} "
            "twice; leave one out"
        )
    return wanted


def _check(
    study: Study, methods: list[Method], task: Task, processes: Processes, folder: Path
) -> None:
    """Prepare every method once, so that a misfit is told before anything is trained."""
    for method in methods:
        trial = Trial(study, method.label, study.seeds[0], study.training.lr, folder)
        setting = make_setting(trial, task, processes, 1, lambda _: None)
        try:
            prepare(trial, method, task, setting, processes)
        except Unsuitable as error:
            raise Unsuitable(f"{error} (method {method.label}, model {study.model.name})") from None
        if method.card.batch_of_one == "refuses" and study.training.batch_size == 1:
            raise Unsuitable(
                f"compare(batch_size=1): expected methods that train on one sample, got "
                f"{method.label}; leave it out or use a larger batch"
            )


def _write_study(
    study: Study, methods: list[Method], task: Task, processes: Processes, folder: Path
) -> None:
    """Write what the run is, or refuse a folder that holds another one."""
    path = folder / records.STUDY
    if path.exists():
        _same_study(study, folder)
    records.write_text(path, study.to_toml())
    facts = {
        "task_title": task.title,
        "model_title": model_title(study.model.name, study.model.options),
        "num_classes": task.num_classes,
        "train_samples": len(task.train),
        "test_samples": len(task.test),
    }
    records.write_json(folder / records.ENVIRONMENT, describe_environment(processes) | facts)
    cards = {method.label: card_data(method) for method in methods}
    records.write_json(folder / records.CARDS, cards)


def _same_study(study: Study, folder: Path) -> None:
    before = make_study(records.read_run(folder).study, source=str(folder / records.STUDY))
    old, new = before.model_dump(), study.model_dump()
    for growing in ("methods", "seeds"):
        if set(old[growing]) <= set(new[growing]):
            old[growing] = new[growing]
    changed = next((name for name in new if old[name] != new[name]), None)
    if changed is not None:
        raise ValueError(
            f"compare(out={folder}): expected the folder of this study or an empty one, got the "
            f"folder of a study with {changed} = {_short(old[changed], new[changed])}; "
            "choose another --out (methods and seeds may be added, the rest may not change)"
        )


def _short(old: Any, new: Any) -> str:
    """Return what differs of two values."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        return "; ".join(f"{key}: {old.get(key)!r}, not {new.get(key)!r}" for key in keys)
    return f"{old!r}, not {new!r}"


def card_data(method: Method) -> dict[str, Any]:
    """Return a method's card as plain data, with its options and its place in the catalogue."""
    if method.parts:
        return asdict(method.card) | {
            "order": -1,
            "options": [],
            "parts": [card_data(part) for part in method.parts],
        }
    order = [known.card.name for known in METHODS].index(method.card.name)
    options = [
        {"name": name, "default": default, "value": method.options.get(name, default)}
        for name, default in METHODS[order].defaults().items()
    ]
    return asdict(method.card) | {"order": order, "options": options}


@contextmanager
def _stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C ask for a clean stop; the second one stops at once."""
    asked = False

    def ask(*_: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = {kind: signal.signal(kind, ask) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
