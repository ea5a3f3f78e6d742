"""Seconds that a conversion of torchvision's ResNet-50 takes, proof and undo included.

Run: ``python benchmarks/convert_resnet50.py``. The proof runs the model before and after in
evaluation, and one pass forward and back in training.
"""

import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import common
from normlab import convert, fold, freeze
from zoo_models import torchvision_model

ROUNDS = 5
SIDE, SAMPLES = 64, 2


def main() -> None:
    """Time each conversion in turn, several rounds, and write the JSON."""
    environment = common.environment()
    torch.manual_seed(0)
    model = torchvision_model("resnet50").eval()
    example = torch.randn(SAMPLES, 3, SIDE, SIDE)
    conversions = {
        "group-norm": lambda: convert(model, "group-norm", example),
        "filter-response-norm": lambda: convert(model, "filter-response-norm", example),
        "batchless-norm": lambda: convert(model, "batchless-norm:start=statistics", example),
        "freeze": lambda: freeze(model, example),
        "fold": lambda: fold(model, example),
    }
    seconds = {name: [] for name in conversions}
    undo = {name: [] for name in conversions}
    for _ in range(1 + ROUNDS):
        for name, run in conversions.items():
            done = []
            seconds[name].append(common.timed(lambda run=run, done=done: done.append(run())))
            undo[name].append(common.timed(done[0].undo))
    rows = {
        name: {
            "seconds": round(statistics.median(times[1:]), 3),
            "undo_seconds": round(statistics.median(undo[name][1:]), 3),
        }
        for name, times in seconds.items()
    }
    for name, row in rows.items():
        print(name, row)
    result = {"model": "torchvision resnet50", "example": list(example.shape), "limit_seconds": 2}
    common.write(__file__, {"environment": environment, **result, "conversions": rows})


if __name__ == "__main__":
    main()
