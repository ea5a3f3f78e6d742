"""Where the real data sets are, for the tests that need them."""

import os
from pathlib import Path

import pytest


def data_root() -> Path | None:
    """Return ``NORMLAB_DATA``, or the ``shared/data`` beside the repository, or None."""
    named = os.environ.get("NORMLAB_DATA")
    root = Path(named) if named else Path(__file__).parents[2] / "shared" / "data"
    return root if root.is_dir() else None


def require_data(name: str) -> Path:
    """Return a data set's folder; without it skip the test, or fail it where CI is set."""
    root = data_root()
    if root is not None and (root / name).is_dir():
        return root / name
    reason = f"needs the data set {name}: set NORMLAB_DATA to the folder that holds {name}/"
    if os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(reason)
    pytest.skip(reason)
