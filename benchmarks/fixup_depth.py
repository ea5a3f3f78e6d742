"""Memory over depth: Fixup ResNets up to 10,000 layers on the digits, with and without checkpoints.

For each depth the peak memory of one training step is counted in bytes of tensors, with activations
kept and with `checkpoint_activations`. Parameters, their gradients and the momentum grow with depth
whatever is done, so the exponent of growth is fitted to what is left: the activations. It should
be at most 1 when all are kept and about 1/2 with checkpoints. At last the deepest network trains
for one epoch with checkpoints::

    python benchmarks/fixup_depth.py [--depths DEPTH ...] [--width WIDTH]
"""

import argparse
import math
import os
import sys
import time

import torch
from torch import Tensor, nn

from common import environment, timed, write
from normlab.inits.fixup import METHOD
from normlab.lab.batches import Batches
from normlab.lab.memory import TensorMemory
from normlab.lab.models import build_model
from normlab.lab.tasks import load_task
from normlab.method import Setting
from normlab.surgery.checkpoint_activations import CheckpointedSequential, checkpoint_activations

DEPTHS = (1004, 2000, 5000, 10004)  # 6n + 2
MEMORY_BATCH, EPOCH_BATCH, RATE = 32, 128, 0.05
LINEAR, ROOT = 1.05, (0.4, 0.6)


class Training:
    """A Fixup network on the digits, with its optimiser."""

    def __init__(self, depth: int, width: int, inputs: Tensor, targets: Tensor, less: bool) -> None:
        torch.manual_seed(0)
        setting = Setting(batches=((inputs, targets),), lr=RATE)
        plain = build_model("resnet", tuple(inputs.shape[1:]), 10, depth=depth, width=width)
        self.model = METHOD.prepare(plain, setting)
        self.checkpointing = 0.0
        if less:
            self.checkpointing = timed(
                lambda: checkpoint_activations(self.model, example=inputs[:2])
            )
        groups = [{"params": list(self.model.parameters()), "lr": RATE, "weight_decay": 1e-4}]
        groups = METHOD.parameter_groups(groups, self.model, setting)
        self.optimizer = torch.optim.SGD(groups, lr=RATE, momentum=0.9)

    def step(self, inputs: Tensor, targets: Tensor) -> float:
        """Take a step and return its loss."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(self.model(inputs), targets)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def segments(self) -> list[int]:
        """Return the number of segments of each stage."""
        runs = [m for m in self.model.modules() if isinstance(m, CheckpointedSequential)]
        return [len(run.segments) for run in runs]


def measure(depth: int, width: int, inputs: Tensor, targets: Tensor, less: bool) -> dict:
    training = Training(depth, width, inputs, targets, less)
    parameters = list(training.model.parameters())
    for parameter in parameters:
        # There from the start, so that what they take can be told apart.
        parameter.grad = torch.zeros_like(parameter)
    held = [*parameters, *(p.grad for p in parameters if p.grad is not None)]
    with TensorMemory(held) as memory:
        nn.functional.cross_entropy(training.model(inputs), targets).backward()
    held_bytes = sum(tensor.nbytes for tensor in held)
    result = {
        "peak_bytes": memory.peak,
        "parameters_and_gradients_bytes": held_bytes,
        "activations_bytes": memory.peak - held_bytes,
    }
    return result | ({"segments": training.segments()} if less else {})


def exponent(sizes: dict[int, float]) -> float:
    """Return the slope of a line through the logarithms."""
    xs = [math.log(depth) for depth in sizes]
    ys = [math.log(size) for size in sizes.values()]
    middle, level = sum(xs) / len(xs), sum(ys) / len(ys)
    products = sum((x - middle) * (y - level) for x, y in zip(xs, ys, strict=True))
    return products / sum((x - middle) ** 2 for x in xs)


def epoch(depth: int, width: int, batches: Batches) -> dict:
    training = Training(depth, width, *batches.batch(0, 0), less=True)
    start, losses = time.perf_counter(), []
    for number in range(batches.steps_per_epoch):
        losses.append(training.step(*batches.batch(0, number)))
        print(f"step {number + 1}: loss {losses[-1]:.4f}", file=sys.stderr)
    seconds = time.perf_counter() - start
    # One step more, because to count bytes takes time.
    parameters = list(training.model.parameters())
    states = training.optimizer.state.values()
    momentum = [value for state in states for value in state.values() if value is not None]
    with TensorMemory([*parameters, *momentum]) as memory:
        training.step(*batches.batch(0, 0))
    found = {
        "depth": depth,
        "batch_size": batches.batch_size,
        "steps": len(losses),
        "planning_seconds": round(training.checkpointing, 1),
        "seconds": round(seconds, 1),
        "peak_bytes_of_a_step": memory.peak,
        "first_loss": round(losses[0], 4),
        "last_loss": round(losses[-1], 4),
        "finite": all(math.isfinite(loss) for loss in losses),
    }
    size = f"{memory.peak / 2**20:.0f} MiB of tensors"
    print(f"one epoch of {depth} layers: {found['seconds']} s, {size}", file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--depths", type=int, nargs="+", default=list(DEPTHS))
    parser.add_argument("--width", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    before = environment()
    task = load_task("digits")
    batches, small = (
        Batches(task.train, mean=task.mean, std=task.std, batch_size=size, seed=0)
        for size in (EPOCH_BATCH, MEMORY_BATCH)
    )
    inputs, targets = small.batch(0, 0)
    found: dict[str, dict[int, dict]] = {"kept": {}, "checkpointed": {}}
    for depth in arguments.depths:
        for name, rows in found.items():
            rows[depth] = measure(depth, arguments.width, inputs, targets, name == "checkpointed")
            print(depth, name, rows[depth], file=sys.stderr)
    exponents = {
        name: exponent({depth: row["activations_bytes"] for depth, row in rows.items()})
        for name, rows in found.items()
    }
    deepest = epoch(max(arguments.depths), arguments.width, batches)
    low, high = ROOT
    result = {
        "what": f"peak memory of forward and backward of Fixup ResNets of width {arguments.width} "
        f"over depth, batches of {MEMORY_BATCH} digits of 8x8 pixels; tensors counted in bytes",
        "depths": arguments.depths,
        "exponents_of_activation_memory": {
            name: round(value, 3) for name, value in exponents.items()
        },
        "goal": f"at most {LINEAR} with all activations kept, {low} to {high} with checkpoints, "
        "and one epoch of the deepest network with finite losses",
        "reached": exponents["kept"] <= LINEAR
        and low <= exponents["checkpointed"] <= high
        and deepest["finite"],
        "results": found,
        "epoch": deepest,
        "environment": before | {"load_average_after": round(os.getloadavg()[0], 2)},
    }
    if arguments.depths == list(DEPTHS):
        write(__file__, result)
    else:
        print(result)


if __name__ == "__main__":
    main()
