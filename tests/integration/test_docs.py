"""The examples of the pages in ``docs`` run and print what the pages say."""

import doctest
from pathlib import Path

import pytest

from normlab.lab.card_page import pages

DOCS = Path(__file__).parents[2] / "docs"
PAGES = [page for page in sorted(DOCS.glob("*.md")) if ">>>" in page.read_text(encoding="utf-8")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples(page):
    # Fences end a block of output; a blank line in front of each keeps doctest from reading them.
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL
    failed, tried = doctest.testfile(str(page), module_relative=False, optionflags=flags)
    assert tried
    assert not failed


def test_there_is_a_page_about_converting():
    assert "convert" in [page.stem for page in PAGES]


def test_the_methods_pages_are_those_of_their_cards():
    written = {page.name: page.read_text("utf-8") for page in (DOCS / "methods").glob("*.md")}
    assert written == pages(), "write them anew: python -m normlab.lab.card_page docs/methods"
