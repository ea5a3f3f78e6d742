"""Weight normalisation trains faster than the same network with plain weights.

Source: T. Salimans, D. P. Kingma, "Weight Normalization: A Simple Reparameterization to Accelerate
Training of Deep Neural Networks", 2016, arXiv 1602.07868.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from normlab.lab.claims.claim import Bound, Claim, Finding, Part
from normlab.lab.claims.measures import (
    POINTS,
    complete,
    diverged,
    final_accuracies,
    judge_difference,
    mean,
    rates,
    trials_of,
)
from normlab.lab.records import RunRecord
from normlab.lab.study import ModelChoice, Study, TaskChoice, Training, Tune

FASTER = Bound(
    statement="mean training loss over the whole of training, weight normalisation minus plain "
    "weights",
    direction="below",
    threshold=0.0,
    unit="nats",
    reason="A network that is ahead throughout has the lower mean, without a target to be chosen. "
    "The paper shows faster convergence in curves; no size of it could be read.",
)

AS_GOOD = Bound(
    statement="final test accuracy, weight normalisation minus plain weights",
    direction="at least",
    threshold=-1.0,
    unit=POINTS,
    reason="The paper has 8.46 % of test error against 8.43 % with plain weights: the same. One "
    "point is about what two seeds differ in on data of this size, and more than a user gives away "
    "for speed.",
)

NORMED, PLAIN = "weight-norm", "none"


def mean_losses(run: RunRecord, method: str) -> dict[int, float]:
    """Return the mean of a trial's training loss by seed; that of guessing where it diverged."""
    guessing = math.log(run.environment["num_classes"])
    means = {}
    for seed, trial in trials_of(run, method).items():
        lines = [line for line in trial.metrics if line["kind"] == "train"]
        if diverged(trial) or not lines:
            means[seed] = guessing
            continue
        # A line is the mean over the steps since the line before it.
        steps = [line["step"] for line in lines]
        widths = [now - before for before, now in zip([0, *steps], steps, strict=False)]
        total = sum(line["loss"] * width for line, width in zip(lines, widths, strict=True))
        means[seed] = total / steps[-1]
    return means


def measure(runs: Mapping[str, RunRecord]) -> list[Finding]:
    """Return the findings about the course of training and about its end."""
    run = runs["training"]
    usable = complete(run, NORMED, PLAIN)
    findings = []
    for bound, values in ((FASTER, mean_losses), (AS_GOOD, final_accuracies)):
        own, plain = values(run, NORMED), values(run, PLAIN)
        details = {NORMED: mean(own), "plain": mean(plain), "learning rates": rates(run)}
        findings.append(judge_difference(bound, own, plain, usable, details))
    return findings


def _training(epochs: int) -> Training:
    return Training(
        epochs=epochs,
        batch_size=100,
        # The paper's optimiser, its rate constant for the first half of training; without decay
        # AdamW is Adam.
        optimizer="adamw",
        weight_decay=0.0,
        schedule="constant",
        # Beyond the end: only start and end are evaluated.
        evaluate_every=10**9,
    )


SMALL = Study(
    name="weight normalisation against plain weights",
    task=TaskChoice.model_validate(
        {"name": "fashion-mnist", "train_size": 3200, "test_size": 3000}
    ),
    model=ModelChoice.model_validate({"name": "plain-conv", "depth": 10, "width": 8}),
    methods=[PLAIN, NORMED],
    seeds=list(range(16)),
    training=_training(epochs=5),
    tune=Tune(trials=5, low=3e-4, high=3e-2, hold_out=0.2),
)

PAPER = Study(
    name="weight normalisation against plain weights",
    task=TaskChoice(name="cifar10"),
    model=ModelChoice.model_validate({"name": "plain-conv", "depth": 10, "width": 96}),
    methods=[PLAIN, NORMED],
    seeds=[0, 1, 2, 3, 4],
    training=_training(epochs=200),
    tune=Tune(trials=4, low=3e-4, high=1e-2),
)

CLAIM = Claim(
    name="weight-norm",
    method="weight-norm",
    statement="Learning the length and the direction of the weights apart, from a data-dependent "
    "start, a convolutional network without normalisers trains faster than with plain weights, and "
    "ends as well.",
    budget={
        "small": "32 trials of 160 steps and 10 searches: about 12 minutes on one core",
        "paper": "10 trials and 8 searches of 200 epochs of CIFAR-10: days on one GPU",
    },
    departs={
        "small": (
            "A plain network of 10 layers and width 8 with ReLU on 3,200 images of Fashion-MNIST, "
            "five epochs.",
            "The learning rate is searched for each by its accuracy on held-out images, with five "
            "trials each.",
            "Plain weights start as K. He and others have it, without a look at the data.",
            "Sixteen seeds, after six in a first run could decide nothing; its line stays in the "
            "ledger.",
        ),
        "paper": (
            "A plain network of 10 layers and width 96 with ReLU, without dropout and noise, on "
            "images that are not whitened.",
            "The rate is constant to the end, and Adam's first moment with it; the learning rate "
            "is searched for each, with four trials each.",
            "Plain weights start as K. He and others have it, without a look at the data.",
        ),
    },
    parts=(
        Part(
            name="training",
            bounds=(FASTER, AS_GOOD),
            measure=measure,
            studies={"small": {"training": SMALL}, "paper": {"training": PAPER}},
        ),
    ),
)
