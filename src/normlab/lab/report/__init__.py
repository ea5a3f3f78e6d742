"""Records in, one page out: a self-contained HTML report of a comparison. It never trains."""

from __future__ import annotations

from pathlib import Path

from normlab.lab.records import REPORT, read_run, write_text


def write_report(folder: Path) -> Path:
    """Write the report of a run folder, however far the run got.

    Args:
        folder: The folder of a study.

    Returns:
        The path of the page, ``<folder>/report.html``.

    Raises:
        RecordError: The folder holds no study, or a file in it is damaged.
    """
    run = read_run(Path(folder))
    # Only now: a wrong folder is refused without waiting for the plotting library.
    from normlab.lab.report.page import render

    path = run.folder / REPORT
    write_text(path, render(run))
    return path
