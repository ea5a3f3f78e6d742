"""Append-only records on disk: the only file that knows how a run folder is laid out.

::

    <folder>/
      study.toml            the study as it was run
      environment.json      versions, device, commit, command line
      cards.json            one card for each method of the study
      lock                  held by the process that writes here
      report.html           written by the report
      trials/<method>/<seed>/
        metrics.jsonl       one JSON object a line, only ever appended
        state/step-.../     the last checkpoint, gone once the trial has a result
        weights.safetensors the weights at the end of training
        result.json         written last and atomically: it is what "finished" means
      tuning/<method>/<number>/   the same, for the trials of the search

Reading needs neither torch nor the workbench, so a page can be written anywhere.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Self
from urllib.parse import quote, unquote

STUDY = "study.toml"
ENVIRONMENT = "environment.json"
CARDS = "cards.json"
REPORT = "report.html"

FINISHED, DIVERGED, OUT_OF_MEMORY, FAILED = "finished", "diverged", "out-of-memory", "failed"


class RecordError(ValueError):
    """A run folder that cannot be used, with what to do about it."""


class DiskError(OSError):
    """Something that could not be written; what was recorded before is kept."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write within the block into a `DiskError` that says what to do."""
    try:
        yield
    except DiskError:
        raise
    except OSError as error:
        raise DiskError(
            f"compare({path}): expected to write this file, got: {error.strerror or error}; "
            "free space or mend the folder, then run the same command again: "
            "it goes on from what is recorded"
        ) from error


@dataclass(frozen=True)
class TrialRecord:
    """What is on disk of one (method, seed).

    Attributes:
        method: The method's label, as the study spells it (``fixup+mixup``).
        seed: The seed.
        result: The content of ``result.json``, or None while the trial is unfinished.
        metrics: The lines of ``metrics.jsonl`` in order of writing.
    """

    method: str
    seed: int
    result: dict[str, Any] | None
    metrics: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class RunRecord:
    """Everything that a run folder holds, for the report.

    Attributes:
        folder: Where it was read.
        study: The study as plain data.
        environment: Versions, device, commit and command line.
        cards: A method's label to its card as plain data.
        trials: One record for each (method, seed) that has started.
        tuning: The trials of the search for the learning rate; ``seed`` is the trial's number.
    """

    folder: Path
    study: dict[str, Any]
    environment: dict[str, Any]
    cards: dict[str, dict[str, Any]]
    trials: list[TrialRecord]
    tuning: list[TrialRecord]


def trial_folder(folder: Path, method: str, seed: int, room: str = "trials") -> Path:
    """Return the folder of one trial; ``room`` is ``"trials"`` or ``"tuning"``."""
    return folder / room / quote(method, safe="+=,-_. ") / str(seed)


def read_run(folder: Path) -> RunRecord:
    """Read a run folder.

    Args:
        folder: The folder of a study.

    Returns:
        All of its records; trials under way have no result yet.

    Raises:
        RecordError: The folder holds no study, or a file in it is damaged.
    """
    if not (folder / STUDY).is_file():
        raise RecordError(
            f"report({folder}): expected the folder of a study (with {STUDY}), got "
            f"{'a folder without it' if folder.is_dir() else 'no folder'}; "
            "give the folder that `normlab compare --out` wrote"
        )
    try:
        study = tomllib.loads((folder / STUDY).read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise RecordError(
            f"report({folder / STUDY}): expected TOML, got {error}; restore the file"
        ) from None
    return RunRecord(
        folder=folder,
        study=study,
        environment=_read_json(folder / ENVIRONMENT, {}),
        cards=_read_json(folder / CARDS, {}),
        trials=list(_read_trials(folder / "trials")),
        tuning=list(_read_trials(folder / "tuning")),
    )


def read_result(folder: Path) -> dict[str, Any] | None:
    """Return a trial's result, None while it is unfinished."""
    return _read_json(folder / "result.json", None)


def read_trial(folder: Path) -> TrialRecord:
    """Read one trial's folder (see `trial_folder`)."""
    return TrialRecord(
        method=unquote(folder.parent.name),
        seed=int(folder.name),
        result=_read_json(folder / "result.json", None),
        metrics=list(_read_lines(folder / "metrics.jsonl")),
    )


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader sees the old content or the new, never a part of it."""
    write_text(path, json.dumps(_plain(content), indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text so that a reader sees the old content or the new, never a part of it."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write bytes so that a reader sees the old content or the new, never a part of it."""
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold a run folder for this process, so that no second one writes into it.

    The lock is the operating system's: it ends with the process, however that dies.

    Raises:
        RecordError: Another process holds the folder; its process id is named.
    """
    with writing(folder / "lock"):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("a+", encoding="utf-8")
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise RecordError(
                f"compare(out={folder}): expected a folder that no process writes to, got one in "
                f"use by process {holder}; wait for it, stop it, or choose another --out"
            ) from None
        with writing(folder / "lock"):
            file.seek(0)
            file.truncate()
            file.write(str(os.getpid()))
            file.flush()
        yield


class MetricsWriter:
    """Appends to one trial's ``metrics.jsonl`` and knows how long the file is.

    Lines are kept back until `flush`, which the loop calls at every checkpoint and evaluation, so
    that recording costs nothing that can be measured. Leaving the context flushes and closes.

    Args:
        folder: The trial's folder (see `trial_folder`).
        offset: The length in bytes that a checkpoint remembers; what was written after that
            checkpoint is dropped, because the steps behind it are run again.
    """

    def __init__(self, folder: Path, offset: int = 0) -> None:
        self._path = folder / "metrics.jsonl"
        self._pending: list[str] = []
        with writing(self._path):
            folder.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = self._path.open("ab")
            self._file.truncate(offset)

    def append(self, line: dict[str, Any]) -> None:
        """Add one line."""
        self._pending.append(json.dumps(_plain(line), allow_nan=False))

    def flush(self) -> int:
        """Hand all lines to the operating system; returns the file's length in bytes."""
        with writing(self._path):
            if self._pending:
                self._file.write(("\n".join(self._pending) + "\n").encode())
                self._file.flush()
                self._pending.clear()
            return self._file.tell()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.flush()
        finally:
            with writing(self._path):
                self._file.close()


class NoMetrics:
    """Takes lines and keeps none: for every process but the first."""

    def append(self, line: dict[str, Any]) -> None:
        """Drop the line."""

    def flush(self) -> int:
        """Return 0, the length of nothing."""
        return 0


def finish_trial(folder: Path, result: dict[str, Any]) -> None:
    """Write ``result.json``, after which the trial counts as finished, and drop its checkpoint."""
    write_json(folder / "result.json", result)
    shutil.rmtree(folder / "state", ignore_errors=True)


def _read_trials(room: Path) -> Iterator[TrialRecord]:
    for method in sorted(room.glob("*")):
        seeds = [seed for seed in method.glob("*") if seed.is_dir() and seed.name.isdigit()]
        for seed in sorted(seeds, key=lambda path: int(path.name)):
            yield read_trial(seed)


def _read_json(path: Path, otherwise: Any) -> Any:
    if not path.exists():
        return otherwise
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RecordError(
            f"report({path}): expected JSON, got a damaged file ({error}); "
            "delete that file and run the study again to make it anew"
        ) from None


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            # A process killed while it wrote leaves half a line at the end.
            if line.endswith(b"\n"):
                yield json.loads(line)


def _plain(value: Any) -> Any:
    """Return ``value`` with every number that JSON cannot hold replaced by None."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
