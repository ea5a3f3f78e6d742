"""The versions the project is tested with are named for every package it asks for.

A release of a package that came out after a commit must not change what that commit does: help
once took twice as long from one day to the next.
"""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ASKED = PROJECT["dependencies"] + [
    line for extra in PROJECT["optional-dependencies"].values() for line in extra
]
TESTED = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
)


def numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


@pytest.mark.parametrize("asked", ASKED)
def test_a_package_asked_for_is_tested_in_a_version_that_is_allowed(asked):
    matched = re.fullmatch(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)(?:,<([\d.]+))?", asked)
    assert matched, asked
    name, lowest, beyond = matched.groups()
    assert numbers(TESTED[name]) >= numbers(lowest)
    assert beyond is None or numbers(TESTED[name]) < numbers(beyond)
