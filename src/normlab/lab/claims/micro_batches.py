"""Batch normalisation loses accuracy at batches of two, most of all without space to average over.

Source: S. Ioffe, C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing
Internal Covariate Shift", 2015, arXiv 1502.03167; its failure at small batches is the premise of
all later work on them, such as arXiv 1802.03133, 1911.09737 and 2002.05712.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from normlab.lab.claims.claim import Bound, Claim, Finding, Part
from normlab.lab.claims.measures import (
    POINTS,
    complete,
    final_accuracies,
    judge_difference,
    mean,
    rates,
)
from normlab.lab.claims.small_batches import LARGE, MARGIN, NETWORKS, SCALES, study
from normlab.lab.records import RunRecord
from normlab.lab.study import ModelChoice

CONVOLUTIONS_LOSE = Bound(
    statement="test accuracy that a convolutional network with batch normalisation loses from "
    "batch 32 to batch 2, over the same number of samples",
    direction="at least",
    threshold=MARGIN,
    unit=POINTS,
    reason="As much as the claims about methods for small batches allow these to lose: with a "
    "smaller loss batch normalisation itself would pass for one of them. On ImageNet it loses "
    "about 14 (quoted from memory), with a thousand classes to confuse.",
)

DENSE_LOSE = Bound(
    statement="test accuracy that a multi-layer perceptron with batch normalisation loses from "
    "batch 32 to batch 2, over the same number of samples",
    direction="at least",
    threshold=10.0,
    unit=POINTS,
    reason="With two values a channel and no space, the layer's output tells which of the two is "
    "larger and nothing else, while evaluation keeps magnitudes: the failure is one of principle "
    "and must show in tens of points, as the 14 on ImageNet do where there is space to average "
    "over.",
)

DENSE = {
    "small": ModelChoice.model_validate({"name": "mlp", "depth": 4, "width": 64}),
    "paper": ModelChoice.model_validate({"name": "mlp", "depth": 4, "width": 512}),
}

EPOCHS = {"small": 4, "paper": 100}
SEEDS = {"small": [0, 1, 2, 3, 4, 5, 6, 7], "paper": [0, 1, 2, 3, 4]}


def measure(bound: Bound, runs: Mapping[str, RunRecord]) -> list[Finding]:
    """Return the one finding about a network.

    Args:
        bound: What it is held against.
        runs: The records by ``batch-<size>``.
    """
    large, small = runs[f"batch-{LARGE}"], runs["batch-2"]
    before, after = (final_accuracies(run, "batch-norm") for run in (large, small))
    details = {
        name: {"accuracy": mean(final_accuracies(run, "batch-norm")), "learning rate": rates(run)}
        for name, run in runs.items()
    }
    usable = complete(large, "batch-norm") and complete(small, "batch-norm")
    return [judge_difference(bound, before, after, usable, details)]


def _part(name: str, bound: Bound, networks: Mapping[str, ModelChoice]) -> Part:
    return Part(
        name=name,
        bounds=(bound,),
        measure=partial(measure, bound),
        studies={
            scale: {
                f"batch-{size}": study(
                    size,
                    ["batch-norm"],
                    scale,
                    epochs=EPOCHS[scale],
                    seeds=SEEDS[scale],
                    model=networks[scale],
                )
                for size in (LARGE, 2)
            }
            for scale in SCALES
        },
    )


CLAIM = Claim(
    name="micro-batches",
    method="batch-norm",
    statement="Batch normalisation fails at micro-batches: its statistics are those of the few "
    "samples at hand in training and others in evaluation, and at batch 2 it costs accuracy that "
    "no learning rate brings back.",
    budget={
        "small": "32 trials of 10,000 samples and 12 searches: about 6 minutes on one core",
        "paper": "20 trials and 12 searches of 100 epochs of CIFAR-10, half in batches of 2: a "
        "week on one GPU",
    },
    departs={
        "small": (
            "A plain network of 6 layers and a perceptron of 4, four epochs of 2,500 images of "
            "Fashion-MNIST, not ResNets on ImageNet.",
            "The learning rate is searched for each batch, with three trials each.",
        ),
        "paper": (
            "A residual network of 20 layers and a perceptron of 4 on CIFAR-10, not ResNets on "
            "ImageNet.",
            "The learning rate is searched for each batch, with three trials each.",
        ),
    },
    parts=(
        _part("convolutional", CONVOLUTIONS_LOSE, NETWORKS),
        _part("dense", DENSE_LOSE, DENSE),
    ),
)
