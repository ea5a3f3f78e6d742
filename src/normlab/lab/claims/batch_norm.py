"""Batch normalisation reaches the bare network's best accuracy in a fraction of its steps.

Source: S. Ioffe, C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing
Internal Covariate Shift", 2015, arXiv 1502.03167.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from normlab.lab.claims.claim import Bound, Claim, Finding, Part
from normlab.lab.claims.measures import complete, curve, rates, trials_of
from normlab.lab.records import RunRecord
from normlab.lab.statistics import confidence_interval, steps_to_target
from normlab.lab.study import ModelChoice, Study, TaskChoice, Training, Tune

FASTER = Bound(
    statement="steps of the un-normalised network to its own best test accuracy, divided by the "
    "steps of the batch-normalised one to the same accuracy on the same seed (geometric mean)",
    direction="at least",
    threshold=2.0,
    unit="times",
    reason="In the paper's table the step from 31.0 to 13.3 million, a factor of 2.3, is due to "
    "batch normalisation with nothing else changed; the factor of 14 needs five further changes "
    "and another learning rate.",
)

LEARNED = 0.3
"""An un-normalised network below three times chance has learned too little to be overtaken."""


def measure(runs: Mapping[str, RunRecord]) -> list[Finding]:
    """Return the one finding: how many times fewer steps."""
    run = runs["speed"]
    bare, normalised = trials_of(run, "none"), trials_of(run, "batch-norm")
    seeds = sorted(bare.keys() & normalised.keys())
    targets, own, other, ratios = {}, {}, {}, []
    for seed in seeds:
        evaluations = curve(bare[seed])
        targets[seed] = max((a for _, a in evaluations if a is not None), default=0.0)
        if targets[seed] < LEARNED:
            continue
        own[seed] = steps_to_target([evaluations], targets[seed]).first[0]
        reached = steps_to_target([curve(normalised[seed])], targets[seed]).first[0]
        other[seed] = reached if math.isfinite(reached) else None
        # One that never got there would have needed at least one evaluation more.
        last = (normalised[seed].result or {})["steps"]
        after = last + max(1, run.study["training"]["evaluate_every"])
        ratios.append(math.log(own[seed] / (after if other[seed] is None else reached)))
    details = {
        "accuracy aimed at": targets,
        "steps un-normalised": own,
        "steps batch-normalised": other,
        "learning rates": rates(run),
    }
    if not ratios:
        return [FASTER.judge(None, None, 0, details)]
    interval = confidence_interval(ratios)
    usable = complete(run, "none", "batch-norm") and len(ratios) == len(seeds)
    if interval is not None:
        never = any(steps is None for steps in other.values())
        # Where a seed never got there its ratio is only known to be smaller.
        interval = (0.0 if never else math.exp(interval[0]), math.exp(interval[1]))
    measured = math.exp(sum(ratios) / len(ratios))
    return [FASTER.judge(measured, interval if usable else None, len(ratios), details)]


SMALL = Study(
    name="batch-norm against no normaliser, plain network",
    task=TaskChoice.model_validate(
        {"name": "fashion-mnist", "train_size": 3200, "test_size": 1000}
    ),
    model=ModelChoice.model_validate({"name": "plain-conv", "depth": 12, "width": 8}),
    methods=["batch-norm", "none"],
    seeds=[0, 1, 2, 3, 4],
    # A falling rate would tie the best accuracy of both to the end of training.
    training=Training(
        epochs=4, batch_size=32, weight_decay=0.0, schedule="constant", evaluate_every=20
    ),
    # Three seeds a rate: on one seed the search took, for the un-normalised network, a rate at
    # which four of five other seeds diverged or never learned, and nothing could be compared.
    tune=Tune(trials=5, seeds=3, low=2e-3, high=0.2),
)

PAPER = Study(
    name="batch-norm against no normaliser, plain network",
    task=TaskChoice(name="cifar10"),
    model=ModelChoice.model_validate({"name": "plain-conv", "depth": 20, "width": 64}),
    methods=["batch-norm", "none"],
    seeds=[0, 1, 2, 3, 4],
    training=Training(
        epochs=60, batch_size=32, weight_decay=0.0, schedule="constant", evaluate_every=200
    ),
    tune=Tune(trials=8, low=1e-4, high=1.0),
)

CLAIM = Claim(
    name="batch-norm",
    method="batch-norm",
    statement="A deep plain network with batch normalisation reaches the best accuracy of the "
    "same network without it in a fraction of the training steps, learning rates tuned alike.",
    budget={
        "small": "40 trials of 400 steps: about 8 minutes on two cores",
        "paper": "26 trials of 94,000 steps: several days on one GPU",
    },
    departs={
        "small": (
            "A plain network of 12 layers on 3,200 images of Fashion-MNIST, not Inception on "
            "ImageNet.",
            "The learning rate is searched for each network: five rates on three seeds each.",
        ),
        "paper": (
            "A plain network of 20 layers on CIFAR-10, not Inception on ImageNet.",
            "The learning rate is searched for each network, with eight trials each.",
        ),
    },
    parts=(
        Part(
            name="steps",
            bounds=(FASTER,),
            measure=measure,
            studies={"small": {"speed": SMALL}, "paper": {"speed": PAPER}},
        ),
    ),
)
