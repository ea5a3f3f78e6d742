"""Data sets with their loss and metric: one data set a file."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from normlab.lab.tasks import cifar10, digits, fashion_mnist, image_folder, mnist, npz
from normlab.lab.tasks.task import Split, Task, channel_statistics, hold_out, limit

__all__ = [
    "TASKS",
    "Split",
    "Task",
    "TaskEntry",
    "channel_statistics",
    "hold_out",
    "limit",
    "load_task",
]


@dataclass(frozen=True)
class TaskEntry:
    """A data set of the workbench.

    Args:
        name: The name a study uses.
        summary: What it is, in one line.
        load: Makes the task, from where the data are (if it needs any) and options.
        needs: What the user must provide; empty if nothing.
        folders: Names of its folder in a folder of data sets, beside the task's own name.
    """

    name: str
    summary: str
    load: Callable[..., Task]
    needs: str
    folders: tuple[str, ...] = ()


TASKS = (
    TaskEntry("digits", "handwritten digits, 8x8 grey, bundled with scikit-learn", digits.load, ""),
    TaskEntry("mnist", "handwritten digits, 28x28 grey", mnist.load, "a folder with 4 idx files"),
    TaskEntry(
        "fashion-mnist",
        "articles of clothing, 28x28 grey",
        fashion_mnist.load,
        "a folder with 4 idx files",
    ),
    TaskEntry(
        "cifar10",
        "objects and animals, 32x32 colour",
        cifar10.load,
        "a folder with 2 parquet files; extra normlab[hub]",
        ("cifar10-jpeg",),
    ),
    TaskEntry(
        "image-folder",
        "your own images, one folder for each class",
        image_folder.load,
        "a folder with train/<class>/*.png; extra normlab[hub]",
    ),
    TaskEntry("npz", "your own arrays", npz.load, "an .npz file with x_train, y_train, ..."),
)


def load_task(name: str, data: str | Path | None = None, **options: Any) -> Task:
    """Load a data set by its name.

    Args:
        name: One of the names in ``TASKS``.
        data: Where the data are: their folder, a folder that holds it under the task's name, or
            for ``npz`` a file. None looks in ``data/<name>`` of the current folder.
        **options: Keyword arguments of the data set, such as ``image_size`` of ``image-folder``.

    Raises:
        ValueError: An unknown name or option, or data that are missing or damaged; the message says
            which file, and how to get it.

    Example:
        >>> load_task("digits").title
        'Digits (8x8)'
    """
    names = [entry.name for entry in TASKS]
    entry = next((entry for entry in TASKS if entry.name == name), None)
    if entry is None:
        raise ValueError(
            f"load_task({name!r}): expected one of {', '.join(names)}, got {name!r}"
            f"{_nearest(name, names)}"
        )
    parameters = inspect.signature(entry.load).parameters
    allowed = [option for option in parameters if option != "data"]
    for option, value in options.items():
        if option not in allowed:
            known = ", ".join(allowed) if allowed else "no options"
            raise ValueError(
                f"load_task({name!r}, {option}=...): expected {known}, got {option!r}"
                f"{_nearest(option, allowed)}"
            )
        if type(value) is not type(parameters[option].default):
            kind = {int: "a whole number", str: "a word"}[type(parameters[option].default)]
            raise ValueError(
                f"load_task({name!r}, {option}={value!r}): expected {kind}, got {value!r}; change "
                f"the option"
            )
    if "data" not in parameters:
        if data is not None:
            raise ValueError(
                f"load_task({name!r}, data={str(data)!r}): expected no data, which are bundled, "
                f"got a path; leave it out"
            )
        return entry.load(**options)
    place = Path(data or Path("data") / name).expanduser()
    below = (place / folder for folder in (name, *entry.folders))
    return entry.load(next((folder for folder in below if folder.is_dir()), place), **options)


def _nearest(word: str, known: list[str]) -> str:
    matches = get_close_matches(word, known, n=1, cutoff=0.5)
    if matches:
        return f"; did you mean {matches[0]!r}?"
    return "; choose one of these" if known else "; leave it out"
