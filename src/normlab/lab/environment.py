"""What a result depends on beside the study: versions, hardware, commit, command line."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from normlab import __version__
from normlab.lab.processes import Processes, device_name

PACKAGES = ("torch", "numpy", "accelerate", "optuna", "scipy", "scikit-learn")


def describe_environment(processes: Processes) -> dict[str, Any]:
    """Return versions, hardware, commit and command line as plain data.

    Args:
        processes: Where the run takes place.

    Returns:
        Values that JSON can hold.
    """
    return {
        "normlab": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "device": processes.device.type,
        "device_name": device_name(processes.device),
        "threads": torch.get_num_threads(),
        "processes": processes.size,
        "commit": commit(),
        "command": shlex.join(["normlab", *sys.argv[1:]]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def commit() -> str | None:
    """Return the commit of normlab's own checkout, ``+`` appended if its code was changed since."""
    here = Path(__file__).parents[1]

    def git(*words: str) -> str:
        command = ["git", "-C", str(here), *words]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        # An installed copy may lie within a checkout of something else.
        git("ls-files", "--error-unmatch", "method.py")
        return git("rev-parse", "--short=12", "HEAD") + (
            "+" if git("status", "--porcelain", "--", ".") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
