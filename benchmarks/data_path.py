"""What the in-memory data path costs against the training step that it feeds.

A batch of the data path (cropped, flipped, normalised) and a training step of ResNet-20 run in
turn, so that whatever else the machine does falls on both::

    python benchmarks/data_path.py
"""

import itertools

import torch

from common import environment, paired, timed, write
from normlab.lab.batches import Batches
from normlab.lab.models import build_model
from normlab.lab.tasks import Split, Task

THREADS = 2
BATCH_SIZE = 128
PAIRS = 30
GOAL = 0.05


def main():
    torch.set_num_threads(THREADS)
    before = environment()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (50_000, 3, 32, 32), dtype=torch.uint8, generator=generator)
    split = Split(pixels, torch.randint(0, 10, (50_000,), generator=generator))
    torch.manual_seed(0)
    model = build_model("resnet", (3, 32, 32), 10, depth=20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    results = {}
    for augmentation in ("crop-flip", "none"):
        batches = Batches(
            split,
            mean=(127.5,) * 3,
            std=(73.9,) * 3,
            batch_size=BATCH_SIZE,
            seed=0,
            augmentation=augmentation,
        )
        inputs, targets = batches.batch(0, 0)
        steps = itertools.count(1)

        def draw(batches=batches, steps=steps):
            batches.batch(0, next(steps))

        def train(inputs=inputs, targets=targets):
            optimizer.zero_grad()
            Task.loss(model(inputs), targets).backward()
            optimizer.step()

        results[augmentation] = paired(draw, train, PAIRS)
        # Once an epoch the order is drawn, too.
        results[augmentation]["first_of_an_epoch_ms"] = round(
            1e3 * timed(lambda batches=batches: batches.batch(1, 0)), 3
        )
    write(
        __file__,
        {
            "what": "data path / ResNet-20 training step, batch 128 of 3x32x32, 50,000 samples",
            "goal": GOAL,
            "reached": all(row["ratio"] < GOAL for row in results.values()),
            "results": results,
            "environment": before,
        },
    )


if __name__ == "__main__":
    main()
