"""What a parametrisation of the weights costs: a training step with it over one without.

The network is ResNet-20 with torch's own BatchNorm, a step forward, backward and the optimiser's on
a batch of 128 images 3x32x32: it differs in nothing but the parametrisation. For weight
standardisation there is also one convolution alone, 3x3 of 256 channels on 32 maps of 8x8, forward
and backward, also as the formula in plain torch. Beside each stands a second plain one, the
control, which shows what the clock is worth. All run in turn, so that whatever else the machine
does falls on all, and ratios are medians over the rounds, of wall time and of CPU time, on which
other work weighs less::

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
from torch import Tensor, nn
from torch.nn.utils import parametrize

from common import environment, write
from normlab.lab.models import build_model
from normlab.weights.spectral_norm import bidirectional_spectral_norm, spectral_norm
from normlab.weights.weight_norm_parametrization import weight_normalize
from normlab.weights.weight_standardization import standardize_weights

ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "2147483648",
    "MALLOC_TOP_PAD_": "268435456",
}
THREADS = 1
BATCH = 128
WARM_UP = 3

# Method: what parametrises every weight of a model in place, and the largest ratio of the steps.
ROWS: dict[str, tuple[Callable[[nn.Module], object], float]] = {
    "weight-norm": (weight_normalize, 1.05),
    "spectral-norm": (spectral_norm, 1.05),
    "bidirectional-spectral-norm": (bidirectional_spectral_norm, 1.05),
    "weight-standardization": (standardize_weights, 1.05),
}
CONVOLUTION_GOAL = 1.03


class PlainStandardization(nn.Module):
    """The formula of weight standardisation as one writes it."""

    def __init__(self, num_units: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(num_units, 1, 1, 1))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the standardised weight."""
        mean = weight.mean((1, 2, 3), keepdim=True)
        deviation = weight.std((1, 2, 3), correction=0, keepdim=True)
        scale = weight[0].numel() ** -0.5
        return self.gain * scale * (weight - mean) / (deviation + 1e-5)


class Clocked:
    """Something that can be done again and again."""

    def seconds(self) -> tuple[float, float]:
        """Return the wall time and the CPU time of doing it once."""
        wall, cpu = time.perf_counter(), time.process_time()
        self()
        return time.perf_counter() - wall, time.process_time() - cpu


class ConvolutionStep(Clocked):
    """Forward and backward of one convolution on one batch."""

    def __init__(self, layer: nn.Conv2d) -> None:
        generator = torch.Generator().manual_seed(0)
        self.layer = layer
        self.inputs = torch.randn(32, 256, 8, 8, generator=generator, requires_grad=True)
        self.slope = torch.randn(32, 256, 8, 8, generator=generator)

    def __call__(self) -> None:
        """Take a step."""
        self.layer.zero_grad()
        self.inputs.grad = None
        self.layer(self.inputs).backward(self.slope)


class Step(Clocked):
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


def measure(parametrise: Callable[[nn.Module], object], goal: float, rounds: int) -> dict:
    """Return the medians and ratios of a parametrised model's steps over a plain one's."""
    torch.manual_seed(0)
    model = build_model("resnet", (3, 32, 32), 10, depth=20, width=16)
    ours = copy.deepcopy(model)
    parametrise(ours)
    models = {"ours": ours, "control": copy.deepcopy(model), "plain": model}
    return compare({name: Step(one) for name, one in models.items()}, goal, rounds)


def measure_convolution(rounds: int) -> dict:
    """Return the same for one standardised convolution, and for the formula in plain torch."""
    torch.manual_seed(0)
    plain = nn.Conv2d(256, 256, 3, padding=1)
    ours, formula = copy.deepcopy(plain), copy.deepcopy(plain)
    standardize_weights(ours)
    parametrize.register_parametrization(formula, "weight", PlainStandardization(256))
    layers = {"ours": ours, "formula": formula, "control": copy.deepcopy(plain), "plain": plain}
    steps = {name: ConvolutionStep(layer) for name, layer in layers.items()}
    return compare(steps, CONVOLUTION_GOAL, rounds)


def compare(steps: dict[str, Clocked], goal: float, rounds: int) -> dict:
    """Return medians of each step's time, and of the ratios to the plain one's."""
    times = []
    for number in range(WARM_UP + rounds):
        # Each is first, second, ... in turn.
        names = list(steps)
        turn = number % len(names)
        row = {name: steps[name].seconds() for name in names[turn:] + names[:turn]}
        if number >= WARM_UP:
            times.append(row)
    result: dict = {}
    for clock, which in (("wall", 0), ("cpu", 1)):
        for name in steps:
            median = statistics.median(row[name][which] for row in times)
            result[f"{name}_{clock}_ms"] = round(1e3 * median, 2)
            if name != "plain":
                ratios = [row[name][which] / row["plain"][which] for row in times]
                low, middle, high = statistics.quantiles(ratios, n=4)
                result[f"{name}_{clock}_ratio"] = round(middle, 4)
                result[f"{name}_{clock}_ratio_quartiles"] = [round(low, 4), round(high, 4)]
    return result | {"goal": goal, "reached": result["ours_cpu_ratio"] <= goal}


def main() -> None:
    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR})
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=75)
    parser.add_argument("methods", nargs="*", help="without any: all, written to the JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    before = environment()
    results = {}
    for name in arguments.methods or ROWS:
        results[name] = measure(*ROWS[name], rounds=arguments.rounds)
        print(name, results[name], file=sys.stderr)
    results["one standardised convolution"] = measure_convolution(4 * arguments.rounds)
    result = {
        "what": "a training step of ResNet-20, width 16, batch 128 of 3x32x32, with every weight "
        "parametrised, over the same step without; one 3x3 convolution of 256 channels, 32x8x8",
        "clock": "medians of the ratios of single steps that run in turn; the goal is held against "
        "CPU time, which other work lengthens less than wall time",
        "allocator": ALLOCATOR,
        "rounds": arguments.rounds,
        "results": results,
        "environment": before | {"load_average_after": round(os.getloadavg()[0], 2)},
    }
    if not arguments.methods:
        write(__file__, result)


if __name__ == "__main__":
    main()
