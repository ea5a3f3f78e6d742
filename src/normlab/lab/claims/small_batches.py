"""What the claims about small batches share: the network, the studies, four bounds a method.

Each method is held against batch normalisation twice at each small batch: at the same batch, where
it must be ahead, and at batch 32, which it must nearly reach. All see the same number of samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

from normlab.lab.claims.claim import Bound, Finding, Part
from normlab.lab.claims.measures import (
    POINTS,
    complete,
    final_accuracies,
    judge_difference,
    mean,
    rates,
)
from normlab.lab.records import RunRecord
from normlab.lab.study import ModelChoice, Study, TaskChoice, Training, Tune

SMALL, LARGE = (2, 4), 32
"""The small batches, and the one at which batch normalisation works."""

MARGIN = 2.0
"""Points of accuracy that a method may lose against batch normalisation at the large batch."""

SCALES = ("small", "paper")

TASKS = {
    "small": TaskChoice.model_validate(
        {"name": "fashion-mnist", "train_size": 2500, "test_size": 5000}
    ),
    "paper": TaskChoice(name="cifar10"),
}

NETWORKS = {
    "small": ModelChoice.model_validate({"name": "plain-conv", "depth": 6, "width": 8}),
    "paper": ModelChoice.model_validate({"name": "resnet", "depth": 20, "width": 16}),
}

SEEDS = {"small": [0, 1, 2, 3, 4, 5], "paper": [0, 1, 2, 3, 4]}

DEPARTS = {
    "small": (
        "A plain network of 6 layers and two epochs of 2,500 images of Fashion-MNIST.",
        "The learning rate is searched for each method at each batch, with three trials each.",
        "All methods alike rise to their rate over the first tenth of training.",
    ),
    "paper": (
        "A residual network of 20 layers on CIFAR-10, 100 epochs.",
        "The learning rate is searched for each method at each batch, with three trials each.",
    ),
}


def study(
    batch_size: int,
    methods: list[str],
    scale: str,
    *,
    epochs: int | None = None,
    seeds: list[int] | None = None,
    model: ModelChoice | None = None,
    adam: bool = False,
) -> Study:
    """Return the study of one batch size.

    Args:
        batch_size: Samples in a batch.
        methods: The methods.
        scale: ``"small"`` or ``"paper"``.
        epochs: Passes over the training set; None for 2, or 100 at the scale of the paper.
        seeds: None for `SEEDS`.
        model: None for `NETWORKS`.
        adam: Whether to train with Adam, for all methods alike, in place of SGD.
    """
    small = scale == "small"
    # Rates in proportion to the batch, as those of equally long training go; Adam's steps do not
    # grow with the gradient, so its rates go with the root.
    factor = math.sqrt(batch_size / LARGE) if adam else batch_size / LARGE
    middle, low, high = (3e-3, 1e-3, 3e-2) if adam else (0.05, 0.02, 0.5)
    epochs = epochs or (2 if small else 100)
    samples = 2500 if small else 50_000
    return Study(
        name=f"batch {batch_size}",
        task=TASKS[scale],
        model=model or NETWORKS[scale],
        methods=methods,
        seeds=seeds or SEEDS[scale],
        training=Training(
            epochs=epochs,
            batch_size=batch_size,
            optimizer="adamw" if adam else "sgd",
            lr=middle * factor,
            weight_decay=0.0 if adam else 1e-4,
            # Batch Kalman normalisation's recipe begins slowly; a tenth of the training, for all.
            warmup_steps=epochs * (samples // batch_size) // 10,
            # Beyond the end: only start and end are evaluated.
            evaluate_every=10**9 if small else 0,
        ),
        tune=Tune(trials=3, low=low * factor, high=high * factor, hold_out=0.2),
    )


def bounds(title: str, ahead: str, near: str) -> tuple[Bound, ...]:
    """Return two bounds for each small batch: ahead at the same batch, near the large one.

    Args:
        title: The method in words.
        ahead: Why it is to be ahead, and by how much.
        near: Why `MARGIN`.
    """
    return tuple(
        bound
        for size in SMALL
        for bound in (
            Bound(
                statement=f"test accuracy at batch {size}, {title} minus batch normalisation",
                direction="above",
                threshold=0.0,
                unit=POINTS,
                reason=ahead,
            ),
            Bound(
                statement=f"test accuracy of {title} at batch {size} minus that of batch "
                f"normalisation at batch {LARGE}, over the same number of samples",
                direction="at least",
                threshold=-MARGIN,
                unit=POINTS,
                reason=near,
            ),
        )
    )


def part(method: str, held_against: tuple[Bound, ...], *, adam: bool = False) -> Part:
    """Return the one part of a claim about small batches.

    Args:
        method: The method's label.
        held_against: As `bounds` gives them.
        adam: As in `study`.
    """
    both = ["batch-norm", method]
    sizes = {**dict.fromkeys(SMALL, both), LARGE: ["batch-norm"]}
    return Part(
        name="batches",
        bounds=held_against,
        measure=partial(measure, method, held_against),
        studies={
            scale: {
                f"batch-{size}": study(size, methods, scale, adam=adam)
                for size, methods in sizes.items()
            }
            for scale in SCALES
        },
    )


def measure(
    method: str, held_against: tuple[Bound, ...], runs: Mapping[str, RunRecord]
) -> list[Finding]:
    """Return the four findings about a method.

    Args:
        method: The method's label.
        held_against: As `bounds` gives them.
        runs: The records by ``batch-<size>``.
    """
    large = runs[f"batch-{LARGE}"]
    reference = final_accuracies(large, "batch-norm")
    details = {
        name: {
            label: {"accuracy": mean(final_accuracies(run, label)), "learning rate": rate}
            for label, rate in rates(run).items()
        }
        for name, run in runs.items()
    }
    found = []
    for number, size in enumerate(SMALL):
        ahead, near = held_against[2 * number : 2 * number + 2]
        run = runs[f"batch-{size}"]
        own, other = (final_accuracies(run, label) for label in (method, "batch-norm"))
        usable = complete(run, method, "batch-norm")
        found.append(judge_difference(ahead, own, other, usable, details))
        usable = complete(run, method) and complete(large, "batch-norm")
        found.append(judge_difference(near, own, reference, usable, details))
    return found
