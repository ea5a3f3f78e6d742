"""GradInit makes networks trainable that a standard initialisation leaves untrainable.

Source: C. Zhu, R. Ni, Z. Xu, K. Kong, W. R. Huang, T. Goldstein, "GradInit: Learning to Initialize
Neural Networks for Stable and Efficient Training", 2021, arXiv 2102.08098.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import closing

import torch
from torch import nn

from normlab.inits.gradinit import gradinit
from normlab.lab.batches import Batches
from normlab.lab.claims.claim import Bound, Claim, Finding, Part
from normlab.lab.claims.measures import (
    POINTS,
    chance,
    complete,
    diverged,
    final_accuracies,
    judge_difference,
    mean,
    rates,
    trials_of,
)
from normlab.lab.loops.supervised import evaluate
from normlab.lab.processes import Processes
from normlab.lab.records import RunRecord
from normlab.lab.statistics import confidence_interval, share_interval
from normlab.lab.study import ModelChoice, Study, TaskChoice, Training, Tune
from normlab.lab.tasks import load_task

PLAIN = "none"
LEARNT = {
    "small": "none+gradinit:num_steps=100,scale_lr=0.05",
    "paper": "none+gradinit:num_steps=390,scale_lr=0.05",
}

PLAIN_FAILS = Bound(
    statement="at the rate of a normalised network, share of plain He runs that diverge, or end "
    "the first epoch below twice the accuracy of guessing",
    direction="above",
    threshold=0.5,
    unit="",
    reason="There must be something to rescue: most plain runs must fail, not one by bad luck.",
)

LEARNS = Bound(
    statement="at that rate, test accuracy with GradInit after the first epoch",
    direction="above",
    threshold=30.0,
    unit=POINTS,
    reason="Three times the accuracy of guessing: a network that does not train stays near ten.",
)

BETTER = Bound(
    statement="final test accuracy, GradInit minus plain He, each at a rate of its own search",
    direction="above",
    threshold=0.0,
    unit=POINTS,
    reason="A smaller rate alone may rescue the plain network; the paper's networks end better "
    "with GradInit, by amounts that say nothing about trainings this short.",
)

LOWER = {
    optimizer: Bound(
        statement="share of badly scaled networks (weights times 10) whose test loss after the "
        f"first step of {title} is lower with GradInit than without",
        direction="above",
        threshold=0.5,
        unit="",
        reason="This is what GradInit minimises, on other samples; half would be an accident.",
    )
    for optimizer, title in (("sgd", "SGD"), ("adamw", "AdamW"))
}

FACTOR, NETWORKS, STEPS, BATCH = 10.0, 10, 100, 64
"""How badly networks are scaled, how many there are, GradInit's steps, and its batch."""


def measure_rescue(runs: Mapping[str, RunRecord]) -> list[Finding]:
    """Return the findings at one rate."""
    run = runs["one-rate"]
    learnt = _learnt(run)
    plain = final_accuracies(run, PLAIN)
    trials = trials_of(run, PLAIN)
    broken = sum(diverged(trials[seed]) or plain[seed] < 200 * chance(run) for seed in trials)
    own = final_accuracies(run, learnt)
    details = {
        "mean accuracy": {PLAIN: mean(plain), learnt: mean(own)},
        "diverged": {
            method: sum(map(diverged, trials_of(run, method).values()))
            for method in (PLAIN, learnt)
        },
    }
    interval = share_interval(broken, len(trials)) if complete(run, PLAIN) else None
    share = broken / len(trials) if trials else None
    found = [PLAIN_FAILS.judge(share, interval, len(trials), details)]
    interval = confidence_interval(list(own.values())) if complete(run, learnt) else None
    return [*found, LEARNS.judge(mean(own), interval, len(own), details)]


def measure_better(runs: Mapping[str, RunRecord]) -> list[Finding]:
    """Return the finding at searched rates."""
    run = runs["own-rates"]
    learnt = _learnt(run)
    own, plain = final_accuracies(run, learnt), final_accuracies(run, PLAIN)
    details = {learnt: mean(own), PLAIN: mean(plain), "learning rates": rates(run)}
    return [judge_difference(BETTER, own, plain, complete(run, learnt, PLAIN), details)]


def measure_first_step(runs: Mapping[str, RunRecord]) -> list[Finding]:
    """Return the findings about badly scaled networks, which are trained for one step here."""
    return [
        judge_first_step(bound, [first_step(seed, optimizer) for seed in range(NETWORKS)])
        for optimizer, bound in LOWER.items()
    ]


def judge_first_step(bound: Bound, losses: list[tuple[float, float]]) -> Finding:
    """Return the finding from the losses without and with GradInit.

    Args:
        bound: What it is held against.
        losses: A pair for each network; infinite where the loss left the finite numbers.
    """
    lower = sum(learnt < plain for plain, learnt in losses)
    # JSON holds finite numbers only, and a network may leave them.
    told = [[f"{one:.4g}" for one in pair] for pair in losses]
    interval = share_interval(lower, len(losses))
    return bound.judge(lower / len(losses), interval, len(losses), {"losses": told})


def first_step(seed: int, optimizer: str) -> tuple[float, float]:
    """Return the test losses after one real step, without and with GradInit.

    A perceptron of four layers on the digits; both take the same step on the same batch.

    Args:
        seed: The seed of weights and batches.
        optimizer: ``"sgd"`` at 0.1 or ``"adamw"`` at 0.001.
    """
    task = load_task("digits")
    batches = Batches(task.train, mean=task.mean, std=task.std, batch_size=BATCH, seed=seed)
    losses = []
    for learnt in (False, True):
        torch.manual_seed(seed)
        # No normaliser, or scale would not count.
        model = nn.Sequential(
            nn.Flatten(),
            *(nn.Linear(64, 32), nn.ReLU()),
            *(nn.Linear(32, 32), nn.ReLU()),
            *(nn.Linear(32, 32), nn.ReLU()),
            nn.Linear(32, 10),
        )
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(FACTOR if weight.dim() > 1 else 1.0)
        lr = 0.1 if optimizer == "sgd" else 1e-3
        if learnt:
            examples = [batches.batch(1, step) for step in range(batches.steps_per_epoch)]
            gradinit(model, examples, num_steps=STEPS, optimizer=optimizer, lr=lr, scale_lr=0.05)
        kind = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
        real = kind(model.parameters(), lr=lr)
        inputs, targets = batches.batch(0, 0)
        task.loss(model(inputs), targets).backward()
        real.step()
        with closing(Processes("cpu")) as processes:
            loss, _ = evaluate(model, task, processes)
        losses.append(loss if math.isfinite(loss) else math.inf)
    return losses[0], losses[1]


def _learnt(run: RunRecord) -> str:
    return next(method for method in run.study["methods"] if method != PLAIN)


def _study(name: str, scale: str, training: Training, tune: Tune | None) -> Study:
    small = scale == "small"
    task = {"name": "fashion-mnist", "train_size": 4800, "test_size": 1000}
    return Study(
        name=name,
        task=TaskChoice.model_validate(task if small else {"name": "cifar10"}),
        model=ModelChoice.model_validate(
            {"name": "resnet", "depth": 44 if small else 110, "width": 4 if small else 16}
        ),
        methods=[PLAIN, LEARNT[scale]],
        # Six of six failures are the fewest whose interval lies above one half.
        seeds=[0, 1, 2, 3, 4, 5],
        training=training,
        tune=tune,
    )


def _training(scale: str, **others: object) -> Training:
    small = scale == "small"
    values = {
        "epochs": 1,
        "batch_size": 32 if small else 128,
        # The rate of a network with batch normalisation.
        "lr": 0.05 if small else 0.1,
        "weight_decay": 1e-4,
    }
    return Training.model_validate(values | others)


def _one_rate(scale: str) -> Study:
    return _study("first epoch at one rate", scale, _training(scale, schedule="constant"), None)


def _own_rates(scale: str) -> Study:
    training = _training(scale, epochs=1 if scale == "small" else 200)
    tune = Tune(trials=4, low=1e-3, high=1e-1, hold_out=0.2)
    return _study("each at a rate of its own", scale, training, tune)


SCALES = ("small", "paper")

CLAIM = Claim(
    name="gradinit",
    method="gradinit",
    statement="Learning one scale for each parameter tensor before training makes deep networks "
    "without normalisers train where their standard initialisation fails, and lowers the loss "
    "after the first step of a badly scaled network.",
    budget={
        "small": "24 trials of 150 steps and 8 searches, half of them with 100 steps of GradInit, "
        "and 40 networks of one step: about 7 minutes on one core",
        "paper": "12 trials of one epoch of ResNet-110 on CIFAR-10, and 12 and 8 searches of 200 "
        "epochs: about three weeks on one GPU",
    },
    departs={
        "small": (
            "ResNet-44 of width 4 on 4,800 images of Fashion-MNIST, one epoch in batches of 32.",
            "Channel biases stand in place of the normalisers; gradients are not clipped in "
            "training, where the authors clip their norm at 1 for networks without normalisers.",
            "GradInit takes 100 steps, which come on top of its training, as in the paper.",
            "The badly scaled networks are perceptrons on the digits.",
        ),
        "paper": (
            "Channel biases stand in place of the normalisers; gradients are not clipped in "
            "training, where the authors clip their norm at 1 for networks without normalisers.",
            "No cutout; the learning rate is searched for each, with four trials each.",
            "The badly scaled networks are perceptrons on the digits.",
        ),
    },
    parts=(
        Part(
            name="rescue",
            bounds=(PLAIN_FAILS, LEARNS),
            measure=measure_rescue,
            studies={scale: {"one-rate": _one_rate(scale)} for scale in SCALES},
        ),
        Part(
            name="better",
            bounds=(BETTER,),
            measure=measure_better,
            studies={scale: {"own-rates": _own_rates(scale)} for scale in SCALES},
        ),
        Part(name="first-step", bounds=tuple(LOWER.values()), measure=measure_first_step),
    ),
)
