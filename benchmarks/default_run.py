"""What a newcomer waits for: the default comparison, and the command line's first words.

Each is a fresh process, timed from the shell's side; of the short ones the median of several::

    python benchmarks/default_run.py
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import environment, write

REPEATS = 9
GOALS = {
    "normlab compare": 60.0,
    "normlab --help": 0.5,
    "shell completion": 0.5,
    "import normlab, its methods too, over import torch": 0.1,
}


def seconds(command: list[str], **more: str) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, **more})
    return time.perf_counter() - start


def imports() -> float:
    code = (
        "import time, torch; start = time.perf_counter(); import normlab; normlab.METHODS;"
        "print(time.perf_counter() - start)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return float(done.stdout)


def main() -> None:
    before = environment()
    normlab = [sys.executable, "-m", "normlab"]
    completing = {
        "_NORMLAB_COMPLETE": "complete_bash",
        "COMP_WORDS": "normlab com",
        "COMP_CWORD": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        measured = {
            "normlab compare": seconds([*normlab, "compare", "--out", str(Path(folder) / "run")]),
            "normlab --help": statistics.median(
                seconds([*normlab, "--help"]) for _ in range(REPEATS)
            ),
            "shell completion": statistics.median(
                seconds(normlab, **completing) for _ in range(REPEATS)
            ),
            "import normlab, its methods too, over import torch": statistics.median(
                imports() for _ in range(REPEATS)
            ),
        }
    results = {
        name: {
            "seconds": round(value, 4),
            "goal": GOALS[name],
            "reached": value <= GOALS[name],
        }
        for name, value in measured.items()
    }
    write(__file__, {"what": __doc__.split("\n")[0], "results": results, "environment": before})


if __name__ == "__main__":
    main()
