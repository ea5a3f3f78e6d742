"""Batchless normalisation, one sample at a time, reaches what batch normalisation reaches at 32.

Source: B. Berger, "Batchless Normalization: How to Normalize Activations with just one Instance in
Memory", 2022, arXiv 2212.14729.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from normlab.lab.claims.claim import Bound, Claim, Finding, Part
from normlab.lab.claims.measures import (
    POINTS,
    complete,
    final_accuracies,
    judge_difference,
    mean,
    rates,
)
from normlab.lab.claims.small_batches import LARGE, NETWORKS, SCALES, TASKS
from normlab.lab.records import RunRecord
from normlab.lab.study import Study, Training, Tune

REACHES = Bound(
    statement="test accuracy of batchless normalisation at batch 1 minus that of batch "
    "normalisation at batch 32, over the same number of samples",
    direction="at least",
    threshold=-3.0,
    unit=POINTS,
    reason="The paper claims competitive convergence at any batch, without figures. The layer "
    "computes the same for any batch, so what it may lose is due to the noise of single-sample "
    "steps, for which three points leave room.",
)


def measure(runs: Mapping[str, RunRecord]) -> list[Finding]:
    """Return the one finding."""
    single, large = runs["batch-1"], runs[f"batch-{LARGE}"]
    own, reference = (
        final_accuracies(single, "batchless-norm"),
        final_accuracies(large, "batch-norm"),
    )
    details = {
        "batchless-norm, batch 1": mean(own),
        f"batch-norm, batch {LARGE}": mean(reference),
        "learning rates": rates(single) | rates(large),
    }
    usable = complete(single, "batchless-norm") and complete(large, "batch-norm")
    return [judge_difference(REACHES, own, reference, usable, details)]


def _study(batch_size: int, method: str, scale: str) -> Study:
    small = scale == "small"
    # Adam's steps do not grow with the gradient, so its rates go with the root of the batch.
    factor = math.sqrt(batch_size / LARGE)
    return Study(
        name=f"{method} at batch {batch_size}",
        task=TASKS[scale],
        model=NETWORKS[scale],
        methods=[method],
        seeds=[0, 1, 2, 3, 4, 5, 6, 7] if small else [0, 1, 2, 3, 4],
        training=Training(
            epochs=2 if small else 60,
            batch_size=batch_size,
            # The example trains mean and deviation with Adam, which hides the size of their
            # gradients; without decay AdamW is Adam.
            optimizer="adamw",
            lr=3e-3 * factor,
            weight_decay=0.0,
            # Beyond the end: only start and end are evaluated.
            evaluate_every=10**9 if small else 0,
        ),
        tune=Tune(trials=3, low=1e-3 * factor, high=3e-2 * factor, hold_out=0.2),
    )


CLAIM = Claim(
    name="batchless-norm",
    method="batchless-norm",
    statement="With mean and deviation learnt as parameters, training one sample at a time reaches "
    "the accuracy of batch normalisation with ordinary batches.",
    budget={
        "small": "16 trials of 5,000 samples and 6 searches: about 5 minutes on one core",
        "paper": "10 trials and 6 searches of 60 epochs of CIFAR-10, half in batches of 1: two "
        "weeks on one GPU",
    },
    departs={
        "small": (
            "A plain network of 6 layers and two epochs of 2,500 images of Fashion-MNIST, without "
            "dropout; the layer stands in front of the activation.",
            "The layers start from 128 images, not 1,000: as many as a method may see.",
            "The learning rate is searched for each of the two, with three trials each.",
        ),
        "paper": (
            "A residual network of 20 layers without dropout; the layer stands in front of the "
            "activation.",
            "The layers start from 128 images, not 1,000: as many as a method may see.",
            "The learning rate is searched for each of the two, with three trials each.",
        ),
    },
    parts=(
        Part(
            name="batches",
            bounds=(REACHES,),
            measure=measure,
            studies={
                scale: {
                    f"batch-{LARGE}": _study(LARGE, "batch-norm", scale),
                    "batch-1": _study(1, "batchless-norm", scale),
                }
                for scale in SCALES
            },
        ),
    ),
)
