"""GradInit of ResNet-110 for one epoch against one epoch of its training, in seconds.

Both are measured by the step and scaled to an epoch: in each round one step of training, one of
GradInit at its defaults, one of each of its two kinds, and one plain double backward pass run in
turn, so that whatever else the machine does falls on all of them. The epoch is the steps of one
pass over the data times the median of the steps; no epoch is run in full::

    python benchmarks/gradinit.py

Images of Fashion-MNIST's size are random, and an epoch of them is that of 7,680 images.
"""

import math
import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn

from common import environment, timed, write
from normlab.inits.gradinit import GradInit
from normlab.inits.gradinit_steps import Half
from normlab.lab.batches import Batches
from normlab.lab.models import build_model
from normlab.lab.tasks import load_task
from normlab.lab.tasks.task import Split

WARM_UP = 1
GOAL = 1.1


def random_images(count: int) -> Split:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 1, 28, 28), dtype=torch.uint8, generator=generator)
    return Split(images, torch.randint(0, 10, (count,), generator=generator))


def training_step(model: nn.Module) -> Callable[[Half], object]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, fused=True)

    def step(batch: Half) -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()

    return step


def double_backward(model: nn.Module) -> Callable[[Half], object]:
    parameters = list(model.parameters())

    def step(batch: Half) -> tuple[Tensor, ...]:
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        found = torch.autograd.grad(loss, parameters, create_graph=True)
        norm = torch.stack([one.norm() for one in found]).norm()
        return torch.autograd.grad(norm, parameters, allow_unused=True)

    return step


def learner_step(learner: GradInit, kinds: list[str]) -> Callable[[Half], object]:
    def step(batch: Half) -> None:
        inputs, targets = batch
        half = len(targets) // 2
        first, second = (inputs[:half], targets[:half]), (inputs[half:], targets[half:])
        kinds.append(learner.step(first, second, second).kind)

    return step


def measure(batches: Batches, rounds: int) -> dict:
    inputs, _ = batches.batch(0, 0)
    torch.manual_seed(0)
    model = build_model("resnet", tuple(inputs.shape[1:]), 10, depth=110, width=16).train()
    # Scales that hardly move, so that every step of a kind costs the same.
    forced = {"objective": math.inf, "constraint": 0.0}
    kinds: list[str] = []
    runs = {
        "training": training_step(model),
        "gradinit": learner_step(GradInit(model), kinds),
        **{
            kind: learner_step(GradInit(model, max_norm=bound, scale_lr=1e-6), [])
            for kind, bound in forced.items()
        },
        "double_backward": double_backward(model),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(WARM_UP + rounds):
        batch = batches.batch(0, number % batches.steps_per_epoch)
        for name, run in runs.items():
            times[name].append(timed(lambda run=run, batch=batch: run(batch)))
    steps = {name: statistics.median(one[WARM_UP:]) for name, one in times.items()}
    epoch = {name: batches.steps_per_epoch * seconds for name, seconds in steps.items()}
    return {
        "batch_size": batches.batch_size,
        "steps_an_epoch": batches.steps_per_epoch,
        "rounds": rounds,
        "seconds_a_step": {name: round(one, 4) for name, one in steps.items()},
        "seconds_an_epoch, scaled": {name: round(one, 2) for name, one in epoch.items()},
        "over_a_training_epoch": {
            name: round(steps[name] / steps["training"], 3)
            for name in ("gradinit", "objective", "constraint")
        },
        "kinds_of_gradinit's_steps": {kind: kinds[WARM_UP:].count(kind) for kind in forced},
        "constraint_over_double_backward": round(steps["constraint"] / steps["double_backward"], 3),
    }


def main() -> None:
    torch.set_num_threads(1)
    before = environment()
    digits = load_task("digits")
    sources = {
        "digits": (digits.train, digits.mean, digits.std, 128, 6),
        "Fashion-MNIST's size": (random_images(7680), (127.5,), (73.9,), 32, 3),
    }
    results = {
        name: measure(Batches(split, mean=mean, std=std, batch_size=size, seed=0), rounds)
        for name, (split, mean, std, size, rounds) in sources.items()
    }
    worst = max(one["constraint_over_double_backward"] for one in results.values())
    write(
        __file__,
        {
            "what": "one epoch of GradInit of ResNet-110 of width 16 against one epoch of its "
            "training",
            "how": "medians of interleaved steps, times the steps of an epoch; no epoch was run in "
            "full",
            "goal": f"a step of the constraint within {GOAL} of a plain double backward pass",
            "reached": worst <= GOAL,
            "results": results,
            "environment": before,
        },
    )


if __name__ == "__main__":
    main()
