"""What a parametrisation of the weights costs: a ResNet-20 training step with it over one without.

A step is forward, backward and the optimiser's step on a batch of 128 images 3x32x32, with torch's
own BatchNorm in place: the network differs in nothing but the parametrisation. Steps of both run in
turn, so that whatever else the machine does falls on both; ratios are medians over the rounds, of
wall time and of the CPU time of all threads, on which other work weighs less::

    python benchmarks/weight_parametrisations.py [--rounds ROUNDS] [METHOD ...]

The script starts itself again with an allocator that keeps what was freed, because getting large
pieces anew costs a page fault for every 4 KiB.
"""

import argparse
import copy
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

from common import environment, write
from normlab.lab.models import build_model
from normlab.weights.weight_norm_parametrization import weight_normalize

ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "2147483648",
    "MALLOC_TOP_PAD_": "268435456",
}
THREADS = 2
BATCH = 128
WARM_UP = 2

# Method: what parametrises every weight of a model, and the largest ratio of the steps.
ROWS: dict[str, tuple[Callable[[nn.Module], nn.Module], float]] = {
    "weight-norm": (weight_normalize, 1.05),
}


class Step:
    """Training steps of one model on one batch."""

    def __init__(self, model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(BATCH, 3, 32, 32, generator=generator)
        self.targets = torch.randint(0, 10, (BATCH,), generator=generator)
        self.model = model.train()
        # Fused, as in the workbench; a small rate, so that all rounds compute with finite numbers.
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, fused=True)

    def __call__(self) -> None:
        """Take a step."""
        loss = nn.functional.cross_entropy(self.model(self.inputs), self.targets)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def seconds(self) -> tuple[float, float]:
        """Return the wall time and the CPU time of a step."""
        wall, cpu = time.perf_counter(), time.process_time()
        self()
        return time.perf_counter() - wall, time.process_time() - cpu


def measure(parametrise: Callable[[nn.Module], nn.Module], goal: float, rounds: int) -> dict:
    """Return the medians and ratios of a parametrised model's steps over a plain one's."""
    torch.manual_seed(0)
    model = build_model("resnet", (3, 32, 32), 10, depth=20, width=16)
    steps = {"ours": Step(parametrise(copy.deepcopy(model))), "plain": Step(model)}
    times = []
    for number in range(WARM_UP + rounds):
        # Each goes first in every other round.
        order = list(steps) if number % 2 else list(reversed(steps))
        row = {name: steps[name].seconds() for name in order}
        if number >= WARM_UP:
            times.append(row)
    result: dict = {}
    for clock, which in (("wall", 0), ("cpu", 1)):
        for name in steps:
            median = statistics.median(row[name][which] for row in times)
            result[f"{name}_{clock}_ms"] = round(1e3 * median, 2)
        ratios = [row["ours"][which] / row["plain"][which] for row in times]
        low, middle, high = statistics.quantiles(ratios, n=4)
        result[f"{clock}_ratio"] = round(middle, 4)
        result[f"{clock}_ratio_quartiles"] = [round(low, 4), round(high, 4)]
    return result | {"goal": goal, "reached": result["cpu_ratio"] <= goal}


def main() -> None:
    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR})
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("methods", nargs="*", help="without any: all, written to the JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    before = environment()
    results = {}
    for name in arguments.methods or ROWS:
        results[name] = measure(*ROWS[name], rounds=arguments.rounds)
        print(name, results[name], file=sys.stderr)
    result = {
        "what": "a training step of ResNet-20, width 16, batch 128 of 3x32x32, with every weight "
        "parametrised, over the same step without",
        "clock": "medians of the ratios of interleaved rounds; the goal is held against CPU time "
        "of all threads, which other work on the machine lengthens less than wall time",
        "allocator": ALLOCATOR,
        "rounds": arguments.rounds,
        "results": results,
        "environment": before | {"load_average_after": round(os.getloadavg()[0], 2)},
    }
    if not arguments.methods:
        write(__file__, result)


if __name__ == "__main__":
    main()
