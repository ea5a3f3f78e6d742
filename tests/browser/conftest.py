"""A real Chromium for the tests of the page.

Without one these tests say that they did not run. In CI (environment variable ``CI``) they have
to run, and fail instead.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="session")
def chromium():
    """A browser, started once."""
    path = shutil.which("chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        sync_playwright = None
    if path is None or sync_playwright is None:
        missing = "playwright" if path else "Chromium (Debian's package `chromium`)"
        reason = f"DID NOT RUN: the tests of the page need {missing}"
        if os.environ.get("CI", "").lower() in ("1", "true"):
            pytest.fail(reason)
        pytest.skip(reason)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        yield browser
        browser.close()


class Reader:
    """Somebody who opens a page and notes all that it does wrong."""

    def __init__(self, browser, **context):
        self._context = browser.new_context(
            **{"viewport": {"width": 1280, "height": 900}, **context}
        )
        self.page = self._context.new_page()
        self.page.set_default_timeout(15_000)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self._hear(message.type, message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))

    def _hear(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.complaints.append(f"{kind}: {text}")

    def open(self, path: Path, plots: bool = True):
        """Open a page, wait until its first plot stands, and return it."""
        self.page.goto(path.as_uri())
        if plots:
            self.page.wait_for_selector("html[data-ready=yes]", timeout=60_000)
        return self.page

    def close(self) -> None:
        """Close the window."""
        self._context.close()


@pytest.fixture
def read(chromium):
    """Open windows on pages: ``read(color_scheme="dark")``."""
    readers: list[Reader] = []

    def opened(**context) -> Reader:
        readers.append(Reader(chromium, **context))
        return readers[-1]

    yield opened
    for reader in readers:
        reader.close()
