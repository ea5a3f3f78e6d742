"""What every benchmark shares: its environment, paired timing, and where its JSON goes."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from normlab.lab.environment import commit
from normlab.lab.processes import device_name


def environment() -> dict[str, Any]:
    """Return what a timing depends on; the load tells whether the machine was quiet."""
    return {
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": device_name(torch.device("cpu")),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_before": round(os.getloadavg()[0], 2),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def paired(
    first: Callable[[], object], second: Callable[[], object], pairs: int, warm_up: int = 3
) -> dict[str, float]:
    """Time two functions in turn and return the median of the ratio first / second.

    Args:
        first: What is judged.
        second: What it is judged against.
        pairs: How many pairs count.
        warm_up: How many pairs run before.

    Returns:
        Medians in milliseconds, the median ratio and its quartiles.
    """
    rows = [(timed(first), timed(second)) for _ in range(warm_up + pairs)][warm_up:]
    return summary([one for one, _ in rows], [two for _, two in rows])


def timed(function: Callable[[], object]) -> float:
    """Return the seconds that one call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def summary(first: list[float], second: list[float]) -> dict[str, float]:
    """Return medians in milliseconds and the median and quartiles of the ratio."""
    ratios = [one / two for one, two in zip(first, second, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "first_ms": round(1e3 * statistics.median(first), 4),
        "second_ms": round(1e3 * statistics.median(second), 4),
        "ratio": round(middle, 4),
        "ratio_quartiles": [round(low, 4), round(high, 4)],
        "pairs": len(ratios),
    }


def write(script: str, result: dict[str, Any]) -> None:
    """Write a benchmark's result beside its script and print it."""
    text = json.dumps(result, indent=2) + "\n"
    Path(script).with_suffix(".json").write_text(text)
    print(text)
