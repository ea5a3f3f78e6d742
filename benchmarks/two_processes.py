"""Two processes that share statistics against one on the joined batch, layer by layer.

Run: ``python benchmarks/two_processes.py``. Says how far outputs, gradients and statistics differ
after two steps, and which collectives a pass takes. The layers are those of
``tests/distributed/test_joined_layers.py``, which holds the same to fixed limits.
"""

import copy
import sys
import tempfile
from pathlib import Path

import torch
from torch import multiprocessing

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import common
from joined_layers import cases, observe_steps, work
from synchronized_work import PROCESSES


def largest_difference(layer, steps, weights, seen) -> float:
    """Return the largest difference, relative to the largest value and at least to 1."""
    inputs = [torch.cat(local) for local in steps]
    largest = 0.0
    for step, expected in enumerate(
        observe_steps(copy.deepcopy(layer), inputs, torch.cat(weights))
    ):
        for what, value in expected.items():
            parts = [result[step][what] for result in seen]
            if what in ("output", "input gradient"):
                actual = torch.cat(parts)
            else:
                actual = sum(parts) if what.startswith("gradient of") else parts[0]
            size = value.double().abs().max().clamp_min(1)
            difference = (actual.double() - value.double()).abs().max() / size
            largest = max(largest, difference.item())
    return largest


def main() -> None:
    """Compare every layer in both precisions and write the JSON."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, (folder,), nprocs=PROCESSES)
        results = [
            torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(PROCESSES)
        ]
    rows = {}
    for dtype in (torch.float64, torch.float32):
        for name, layer, steps, weights in cases(dtype):
            seen = [result["seen"][name, dtype] for result in results]
            row = rows.setdefault(name, {})
            difference = largest_difference(layer, steps, weights, seen)
            row[f"largest_difference_{str(dtype).removeprefix('torch.')}"] = float(
                f"{difference:.2g}"
            )
            forward, backward, _ = results[0]["calls"][name]
            row["collectives_forward"], row["collectives_backward"] = len(forward), len(backward)
    for name, row in rows.items():
        print(name, row)
    result = {"processes": PROCESSES, "backend": "gloo", "layers": rows}
    common.write(__file__, {"environment": common.environment(), **result})


if __name__ == "__main__":
    main()
