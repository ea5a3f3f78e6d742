"""What the workbench's loop costs over a hand-written loop for the same net and data.

Both loops run in one process, a step of one after a step of the other; records, progress and
checkpoints of ours are on. Steps are summed in blocks, so that what happens only now and then (a
line of the records, a checkpoint) counts, and the median ratio of the blocks is reported::

    python benchmarks/loop_overhead.py
"""

import copy
import io
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from common import environment, summary, write
from normlab.catalog import find_method
from normlab.lab import records
from normlab.lab.batches import Batches
from normlab.lab.checkpoint import Position
from normlab.lab.loops import supervised
from normlab.lab.models import build_model
from normlab.lab.processes import Processes
from normlab.lab.progress import watching
from normlab.lab.study import Study
from normlab.lab.tasks import load_task
from normlab.lab.tasks.task import Split, Task
from normlab.lab.trial import Trial

BLOCK = {"ResNet-20, batch 128": 10, "digits net, batch 32": 50}
GOALS = {"ResNet-20, batch 128": 1.03, "digits net, batch 32": 1.10}


def bare_loop(model: nn.Module, task: Task, batch_size: int):
    """A loop as one writes it by hand: shuffle, index, normalise, step; yields after each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    mean = torch.tensor(task.mean).reshape(-1, 1, 1)
    std = torch.tensor(task.std).reshape(-1, 1, 1)
    inputs, targets = task.train.inputs, task.train.targets
    while True:
        for indices in torch.randperm(len(targets)).split(batch_size):
            if len(indices) < batch_size:
                continue
            x = (inputs[indices].float() - mean) / std
            if task.augmentation == "crop-flip":
                top, left = torch.randint(0, 9, (2,)).tolist()
                x = nn.functional.pad(x, (4, 4, 4, 4))[..., top : top + 32, left : left + 32]
                x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x)
            loss = nn.functional.cross_entropy(model(x), targets[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield


def measure(name: str, model: nn.Module, task: Task, batch_size: int, steps: int) -> dict:
    bare = bare_loop(copy.deepcopy(model), task, batch_size)
    processes = Processes("cpu")
    batches = Batches(
        task.train,
        mean=task.mean,
        std=task.std,
        batch_size=batch_size,
        seed=0,
        augmentation=task.augmentation,
    )
    group = {"params": list(model.parameters()), "initial_lr": 0.05, "weight_decay": 5e-4}
    # As the workbench makes it; the hand-written loop has torch's default.
    optimizer = torch.optim.SGD([group], lr=0.05, momentum=0.9, fused=True)
    ours, theirs = [0.0], [0.0]
    block = BLOCK[name]
    last = None

    with (
        tempfile.TemporaryDirectory() as folder,
        watching(1, Console(file=io.StringIO(), force_terminal=True)) as watcher,
    ):
        trial = Trial(Study(), "batch-norm", 0, 0.05, Path(folder))

        def on_step(step: int, loss: torch.Tensor) -> None:
            nonlocal last
            watcher.step(step, loss)
            now = time.perf_counter()
            if last is not None:
                ours[-1] += now - last
            next(bare)
            last = time.perf_counter()
            theirs[-1] += last - now
            if step % block == 0:
                ours.append(0.0)
                theirs.append(0.0)

        watcher.begin(trial, steps, 0)
        loop = supervised.Loop(
            model=model,
            method=find_method("batch-norm"),
            optimizer=optimizer,
            task=task,
            batches=batches,
            seed=0,
            total_steps=steps,
            evaluate_every=10**9,
            schedule="cosine",
            warmup_steps=0,
            processes=processes,
            checkpoints=Path(folder) / "state",
            on_step=on_step,
            stopping=lambda: False,
        )
        # The memory of a step is measured once a trial, not once a step: here it is known.
        position = Position(peak_memory_bytes=1)
        with records.MetricsWriter(Path(folder)) as metrics:
            supervised.train(loop, metrics, position)
    # The first blocks warm up; the last one is not whole.
    result = summary(ours[2:-1], theirs[2:-1])
    result["steps_a_block"] = block
    result["ours_ms_a_step"] = round(result.pop("first_ms") / block, 3)
    result["bare_ms_a_step"] = round(result.pop("second_ms") / block, 3)
    return result | {"goal": GOALS[name], "reached": result["ratio"] <= GOALS[name]}


def main() -> None:
    torch.set_num_threads(2)
    before = environment()
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (12_800, 3, 32, 32), dtype=torch.uint8, generator=generator)
    split = Split(images, torch.randint(0, 10, (12_800,), generator=generator))
    cifar = Task(
        name="synthetic",
        title="random images of CIFAR's size",
        train=split,
        test=split.select(torch.arange(10)),
        class_names=tuple("0123456789"),
        mean=(127.5,) * 3,
        std=(73.9,) * 3,
        augmentation="crop-flip",
    )
    digits = load_task("digits")
    resnet = build_model("resnet", (3, 32, 32), 10, depth=20)
    small = build_model("plain-conv", (1, 8, 8), 10, depth=3, width=16)
    results = {
        "digits net, batch 32": measure("digits net, batch 32", small, digits, 32, 3000),
        "ResNet-20, batch 128": measure("ResNet-20, batch 128", resnet, cifar, 128, 160),
    }
    write(
        __file__,
        {
            "what": "time of a step in the workbench's loop over a hand-written loop's",
            "results": results,
            "environment": before,
        },
    )


if __name__ == "__main__":
    main()
