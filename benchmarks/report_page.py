"""Size and speed of the report: 20 methods, 5 seeds, 100 epochs, ten training lines an epoch.

Measures the page's bytes, the seconds to write it, and in headless Chromium the seconds from the
start of the navigation until the tables sort and until the first plot is drawn as well; each
opening is a freshly started browser, so nothing is warm. Run from the repository's root::

    python benchmarks/report_page.py

writes ``benchmarks/report_page.json``.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "src"), str(HERE.parent / "tests")]

from playwright.sync_api import sync_playwright  # noqa: E402

from fake_run import many_methods, write_fake_run  # noqa: E402
from normlab.lab.report import write_report  # noqa: E402

METHODS, SEEDS, EPOCHS, LINES = 20, 5, 100, 10
OPENINGS = 7
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
MOST_BYTES, MOST_SECONDS = 8_000_000, 2.0


def open_page(playwright, path: Path) -> dict[str, float]:
    """Open the page in a new browser and return its seconds until each mark."""
    browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=list(FLAGS))
    try:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready=yes]", timeout=60_000)
        marks = page.evaluate(
            "performance.getEntriesByType('mark').map(mark => [mark.name, mark.startTime / 1000])"
        )
        page.locator("#table-accuracy thead button", has_text="Final loss").click()
        assert page.locator("#table-accuracy th[aria-sort=ascending]").count() == 1
        return {name: seconds for name, seconds in marks if name in ("sortable", "plotted")}
    finally:
        browser.close()


def main() -> None:
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        folder = write_fake_run(
            Path(name) / "run",
            many_methods(METHODS),
            seeds=range(SEEDS),
            epochs=EPOCHS,
            lines_per_epoch=LINES,
        )
        write_report(folder)  # imports are not what is measured
        start = time.perf_counter()
        path = write_report(folder)
        seconds = time.perf_counter() - start
        load = os.getloadavg()[0]
        openings = [open_page(playwright, path) for _ in range(OPENINGS)]
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=list(FLAGS)
        )
        chromium = browser.version
        browser.close()
        result = {
            "what": {
                "methods": METHODS,
                "seeds": SEEDS,
                "epochs": EPOCHS,
                "training_lines_per_epoch": LINES,
            },
            "bytes": path.stat().st_size,
            "seconds_to_write": round(seconds, 3),
            "seconds_until": {
                mark: {
                    "median": round(statistics.median(each[mark] for each in openings), 3),
                    "best": round(min(each[mark] for each in openings), 3),
                    "all": [round(each[mark], 3) for each in openings],
                }
                for mark in ("sortable", "plotted")
            },
            "goals": {"bytes": MOST_BYTES, "seconds_until_plotted": MOST_SECONDS},
            "environment": {
                "python": platform.python_version(),
                "platform": f"{platform.system()} {platform.machine()}",
                "cores": os.cpu_count(),
                "load_before": round(load, 2),
                "chromium": chromium,
                "jinja2": version("jinja2"),
                "playwright": version("playwright"),
            },
        }
    text = json.dumps(result, indent=2)
    (HERE / "report_page.json").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
