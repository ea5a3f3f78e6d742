"""Filter response normalisation keeps its accuracy as the batch shrinks to one sample.

Source: S. Singh, S. Krishnan, "Filter Response Normalization Layer: Eliminating Batch Dependence in
the Training of Deep Neural Networks", 2019, arXiv 1911.09737.
"""

from __future__ import annotations

from collections.abc import Mapping

from normlab.lab.claims.claim import Bound, Claim, Finding, Part
from normlab.lab.claims.measures import (
    POINTS,
    complete,
    final_accuracies,
    judge_difference,
    mean,
)
from normlab.lab.records import RunRecord
from normlab.lab.study import ModelChoice, Study, TaskChoice, Training, Tune

BATCHES = (32, 8, 2, 1)

KEEPS = Bound(
    statement="test accuracy lost by filter response normalisation as the batch shrinks from 32 "
    "to 1, over the same number of samples",
    direction="at most",
    threshold=3.0,
    unit=POINTS,
    reason="The layer computes the same for any batch, so what is lost is due to the noise of "
    "single-sample steps alone; three points leave room for that and are far from the tens that "
    "batch statistics of one or two samples are known to cost.",
)

AHEAD_AT_2 = Bound(
    statement="test accuracy at batch 2, filter response normalisation minus batch normalisation",
    direction="above",
    threshold=0.0,
    unit=POINTS,
    reason="The paper claims to be ahead of the others at every batch size, most of all at small "
    "ones; no size of the gap could be read for this network.",
)

AHEAD_AT_1 = Bound(
    statement="test accuracy at batch 1, filter response normalisation minus batch normalisation",
    direction="above",
    threshold=0.0,
    unit=POINTS,
    reason="As at batch 2; with one sample batch normalisation trains as instance normalisation "
    "and is evaluated as something else.",
)


def measure(runs: Mapping[str, RunRecord]) -> list[Finding]:
    """Return the findings; what happens at batch 32 is reported, not claimed."""
    methods = ("filter-response-norm", "batch-norm")
    response, batch = (
        {name: final_accuracies(run, method) for name, run in runs.items()} for method in methods
    )
    details = {
        name: {"filter-response-norm": mean(response[name]), "batch-norm": mean(batch[name])}
        for name in runs
    }
    both_ends = complete(runs["batch-32"], methods[0]) and complete(runs["batch-1"], methods[0])
    found = [judge_difference(KEEPS, response["batch-32"], response["batch-1"], both_ends, details)]
    for bound, name in ((AHEAD_AT_2, "batch-2"), (AHEAD_AT_1, "batch-1")):
        usable = complete(runs[name], *methods)
        found.append(judge_difference(bound, response[name], batch[name], usable, details))
    return found


def _study(batch_size: int, scale: str) -> Study:
    small = scale == "small"
    samples = 2000 if small else 50_000
    epochs = 2 if small else 100
    task = {"name": "fashion-mnist", "train_size": samples, "test_size": 5000}
    return Study(
        name=f"batch {batch_size}",
        task=TaskChoice.model_validate(task if small else {"name": "cifar10"}),
        # An activation follows every normaliser directly, as the layer is meant to be used.
        model=ModelChoice.model_validate(
            {"name": "plain-conv", "depth": 6 if small else 12, "width": 8 if small else 64}
        ),
        methods=["batch-norm", "filter-response-norm"],
        seeds=[0, 1, 2, 3] if small else [0, 1, 2, 3, 4],
        training=Training(
            epochs=epochs,
            batch_size=batch_size,
            lr=0.05 * batch_size / 32,
            weight_decay=1e-4,
            # The method asks for a slow start: a tenth of the training, for both alike.
            warmup_steps=epochs * (samples // batch_size) // 10,
            # Beyond the end: only start and end are evaluated.
            evaluate_every=10**9 if small else 0,
        ),
        # Each method searches its rate at each batch, in a range proportional to the batch. At one
        # rate for both, 0.05 for 32 samples, filter response normalisation was far from trained at
        # any batch but 1, and what was compared was that rate.
        tune=Tune(
            trials=3,
            low=0.02 * batch_size / 32,
            high=0.5 * batch_size / 32,
            hold_out=0.2,
        ),
    )


CLAIM = Claim(
    name="filter-response-norm",
    method="filter-response-norm",
    statement="Filter response normalisation does not depend on the batch: as the batch shrinks "
    "from 32 to 1 it keeps its accuracy, and leaves batch normalisation behind at small batches.",
    budget={
        "small": "56 trials of 4,000 samples: about 8 minutes on two cores",
        "paper": "64 trials of 100 epochs of CIFAR-10, ten of them in batches of one: weeks on one "
        "GPU",
    },
    departs={
        "small": (
            "A plain network of 6 layers and two epochs of 2,000 images of Fashion-MNIST, not "
            "ResNetV2-50 and InceptionV3 on ImageNet.",
            "The learning rate is searched for each method at each batch, with three trials each.",
        ),
        "paper": (
            "A plain network of 12 layers on CIFAR-10: the workbench has neither ResNetV2-50 nor "
            "ImageNet.",
        ),
    },
    parts=(
        Part(
            name="batches",
            bounds=(KEEPS, AHEAD_AT_2, AHEAD_AT_1),
            measure=measure,
            studies={
                scale: {f"batch-{size}": _study(size, scale) for size in BATCHES}
                for scale in ("small", "paper")
            },
        ),
    ),
)
