"""A step of LARS and LAMB over one of torch.optim.SGD and AdamW, all on lists of tensors (foreach).

The parameters are those of a ResNet-20 and of a ResNet-50 (the workbench's bottleneck network of 50
layers and 512 to 2048 channels), with gradients that are given: nothing but the step is timed. Of
each pair the steps run in turn, and ratios are medians over the pairs, in CPU time of one thread.
Beside it, for whoever wonders, the same over torch's fused kernels, which exist for its own
optimisers only. Run: ``python benchmarks/optimizers.py [--pairs PAIRS]``.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch

from common import environment, write
from normlab.lab.models import build_model
from normlab.optim.lamb import LAMB
from normlab.optim.lars import LARS
from normlab.optim.layer_adaptation import exclude_from_adaptation

GOAL = 1.5
WARM_UP = 3

MODELS = {
    "ResNet-20": {"depth": 20, "width": 16},
    "ResNet-50-like": {"depth": 47, "width": 128, "block": "bottleneck"},
}

PAIRS = {
    "LARS": (
        lambda groups: LARS(groups, 1.0, 0.9, 5e-4),
        lambda groups, **kind: torch.optim.SGD(groups, 1e-6, 0.9, weight_decay=5e-4, **kind),
    ),
    "LAMB": (
        lambda groups: LAMB(groups, 1e-6),
        lambda groups, **kind: torch.optim.AdamW(groups, 1e-6, **kind),
    ),
}


def groups_of(options: dict) -> list[dict]:
    """Return adapted and excluded parameters with gradients, as a user would have them."""
    torch.manual_seed(0)
    model = build_model("resnet", (3, 32, 32), 10, **options)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return exclude_from_adaptation(model)


def without_adaptation(groups: list[dict]) -> list[dict]:
    return [{k: v for k, v in group.items() if k != "adapt"} for group in groups]


def seconds(step: Callable[[], object]) -> float:
    start = time.thread_time()
    step()
    return time.thread_time() - start


def measure(options: dict, ours: Callable, theirs: Callable, pairs: int) -> dict:
    steps = {
        "ours": ours(groups_of(options)).step,
        "foreach": theirs(without_adaptation(groups_of(options)), foreach=True).step,
        "fused": theirs(without_adaptation(groups_of(options)), fused=True).step,
    }
    times = [{name: seconds(step) for name, step in steps.items()} for _ in range(WARM_UP + pairs)][
        WARM_UP:
    ]
    result = {
        f"{name}_ms": round(1e3 * statistics.median(one[name] for one in times), 3)
        for name in steps
    }
    for name in ("foreach", "fused"):
        low, middle, high = statistics.quantiles([one["ours"] / one[name] for one in times], n=4)
        result[f"over_{name}"] = round(middle, 3)
        result[f"over_{name}_quartiles"] = [round(low, 3), round(high, 3)]
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=41)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    before = environment()
    results, numbers = {}, {}
    for model, options in MODELS.items():
        sizes = [p.numel() for group in groups_of(options) for p in group["params"]]
        numbers[model] = {"tensors": len(sizes), "parameters": sum(sizes)}
        for name, (ours, theirs) in PAIRS.items():
            results[f"{name}, {model}"] = measure(options, ours, theirs, arguments.pairs)
    worst = max(one["over_foreach"] for one in results.values())
    write(
        __file__,
        {
            "what": "a step of LARS over torch.optim.SGD, of LAMB over torch.optim.AdamW, both "
            "foreach; fused kernels beside it",
            "clock": "CPU time of one thread, medians of the ratios of interleaved pairs",
            "goal": f"at most {GOAL} times the step of torch's optimiser, foreach",
            "worst_over_foreach": worst,
            "reached": worst <= GOAL,
            "models": numbers,
            "results": results,
            "pairs": arguments.pairs,
            "environment": before | {"load_average_after": round(os.getloadavg()[0], 2)},
        },
    )


if __name__ == "__main__":
    main()
