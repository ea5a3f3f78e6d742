"""The ledger: one page made from all evidence, and from nothing else.

The page is a pure function of the files in the folder of evidence, so that a test can tell whether
it is up to date::

    python -m normlab.lab.claims.ledger evidence docs/ledger.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from normlab.lab import records

HEAD = """\
# Ledger of claims

This page is generated from the folder `evidence/` by `normlab reproduce`; do not edit it.

A finding *holds* if the whole 95 % interval of what was measured lies on the claim's side of the
threshold, *does not hold* if all of it lies on the other side, and is *not decidable at this scale*
otherwise. Thresholds are fixed, with their reasons, before a claim is run. All runs are listed,
newest first.
"""

COLUMNS = (
    "finding",
    "verdict",
    "measured [95 % interval]",
    "claimed",
    "scale",
    "device",
    "seconds",
    "commit",
    "date",
)


def read_evidence(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return all runs by claim, in order of name, the newest run of each first.

    Args:
        folder: The folder of evidence; one that does not exist holds none.

    Raises:
        ValueError: A line that is not the evidence of a run.
    """
    runs: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                run = json.loads(line)
                runs.setdefault(run["claim"], []).append(run)
            except (json.JSONDecodeError, TypeError, KeyError) as error:
                raise ValueError(
                    f"ledger({path}, line {number}): expected the evidence of one run, got "
                    f"{type(error).__name__}: {error}; restore the file"
                ) from None
    # Within a file later lines are newer, so they come first where dates agree.
    return {
        claim: sorted(all_runs, key=lambda run: run["date"])[::-1]
        for claim, all_runs in sorted(runs.items())
    }


def ledger_text(folder: Path) -> str:
    """Return the page as Markdown.

    Args:
        folder: The folder of evidence.

    Raises:
        ValueError: As for `read_evidence`.
    """
    blocks = [HEAD]
    for claim, runs in read_evidence(folder).items():
        newest = runs[0]
        rows = [COLUMNS, ("---",) * len(COLUMNS)]
        rows += [_row(run, finding) for run in runs for finding in run["findings"]]
        table = "\n".join("| " + " | ".join(map(_cell, row)) + " |" for row in rows)
        reasons = "\n".join(
            f"- {_sentence(finding['statement'])}: "
            f"{bounds_text(finding['direction'], finding['threshold'])} {finding['unit']}".rstrip()
            + f". {finding['reason']}"
            for finding in newest["findings"]
        )
        differs = "\n".join(f"- {line}" for line in newest["departs"])
        blocks.append(f"## {claim}\n\n{newest['statement']}\n\nSource: {newest['paper']}.\n")
        blocks.append(f"{table}\n")
        blocks.append(
            f"Thresholds and their reasons, as fixed before the newest run:\n\n{reasons}\n"
        )
        if differs:
            blocks.append(f"Where the newest run differs from the paper's:\n\n{differs}\n")
    if len(blocks) == 1:
        blocks.append("No claim has been run yet.\n")
    return "\n".join(blocks)


def write_ledger(folder: Path, page: Path) -> None:
    """Write the page anew.

    Args:
        folder: The folder of evidence.
        page: The file to write.
    """
    records.write_text(page, ledger_text(folder))


def measured_text(
    measured: float | None, low: float | None, high: float | None, unit: str = ""
) -> str:
    """Return a measured value with its interval as people read it.

    Example:
        >>> measured_text(1.2345, 0.5, 2.0, "points"), measured_text(None, None, None)
        ('1.234 [0.5, 2] points', 'nothing')
    """
    if measured is None:
        return "nothing"
    interval = "no interval" if low is None or high is None else f"{_number(low)}, {_number(high)}"
    return f"{_number(measured)} [{interval}] {unit}".rstrip()


def bounds_text(direction: str, threshold: float) -> str:
    """Return what is claimed of the value, such as ``at least 2``."""
    return f"{direction} {_number(threshold)}"


def _row(run: dict[str, Any], finding: dict[str, Any]) -> tuple[str, ...]:
    values = (finding[name] for name in ("measured", "low", "high", "unit"))
    return (
        finding["statement"],
        f"**{finding['verdict']}**",
        measured_text(*values),
        bounds_text(finding["direction"], finding["threshold"]),
        run["scale"],
        f"{run['device']}, {run['threads']} thread{'s' if run['threads'] != 1 else ''}",
        f"{run['seconds']:.0f}",
        run["commit"] or "unknown",
        run["date"][:10],
    )


def _number(value: float) -> str:
    # Adding zero turns a negative zero into the plain one.
    return f"{value + 0.0:.4g}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


if __name__ == "__main__":
    write_ledger(Path(sys.argv[1]), Path(sys.argv[2]))
