"""Stochastic depth trains a deep residual network in less time, to no lower an accuracy.

Source: G. Huang, Y. Sun, Z. Liu, D. Sedra, K. Weinberger, "Deep Networks with Stochastic Depth",
2016, arXiv 1603.09382.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from normlab.lab.claims.claim import Bound, Claim, Finding, Part
from normlab.lab.claims.measures import (
    POINTS,
    complete,
    final_accuracies,
    judge_difference,
    mean,
)
from normlab.lab.models import build_model
from normlab.lab.records import RunRecord
from normlab.lab.statistics import confidence_interval
from normlab.lab.study import ModelChoice, Study, TaskChoice, Training
from normlab.method import Setting
from normlab.regularizers.block_gates import expected_depth, survival_probs
from normlab.regularizers.stochastic_depth import METHOD

TIMED_DEPTH, TIMED_BATCH, ROUNDS = 110, 16, 100

FASTER = Bound(
    statement="time of a training step, stochastic depth over constant depth",
    direction="at most",
    threshold=0.8,
    unit="",
    reason="The authors' code takes 60 seconds an epoch where the constant depth takes 75, and the "
    "paper says about a quarter less: a fifth is what it has to save.",
)

AS_ACCURATE = Bound(
    statement="final test accuracy, stochastic depth minus constant depth",
    direction="at least",
    threshold=-0.5,
    unit=POINTS,
    reason="The paper finds a lower error. Half a point is what test accuracies differ in from "
    "seed to seed on such data: less would not be noticed by a user, more would be the price of "
    "the time.",
)


def measure_time(runs: Mapping[str, RunRecord]) -> list[Finding]:
    """Time steps of both networks in turn, and return the finding."""
    return [judge_times(step_times(TIMED_DEPTH, ROUNDS))]


def step_times(depth: int, rounds: int) -> list[tuple[float, float]]:
    """Return CPU seconds of steps of constant and of stochastic depth, taken in turn.

    Whatever else the machine does falls on both. Gates are drawn anew for each step.

    Args:
        depth: The weight layers of the ResNet, of width 16.
        rounds: How many steps of each are timed, after one that is not.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(TIMED_BATCH, 3, 32, 32, generator=generator)
    targets = torch.arange(TIMED_BATCH) % 10
    setting = Setting(batches=((inputs, targets),), generator=generator)
    models, optimizers = [], []
    for stochastic in (False, True):
        model = build_model("resnet", (3, 32, 32), 10, depth=depth)
        models.append(METHOD.prepare(model, setting) if stochastic else model)
        # A small rate, so that all rounds compute with finite numbers.
        optimizers.append(torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, fused=True))
    METHOD.attach(models[1], optimizers[1], setting)

    def step(which: int) -> float:
        start = time.thread_time()
        optimizers[which].zero_grad(set_to_none=True)
        nn.functional.cross_entropy(models[which](inputs), targets).backward()
        optimizers[which].step()
        return time.thread_time() - start

    taken = [(step(0), step(1)) for _ in range(rounds + 1)]
    return taken[1:]


def judge_times(taken: Sequence[tuple[float, float]]) -> Finding:
    """Return the finding about times of a step, pairs of constant and stochastic depth."""
    ratios = [own / plain for plain, own in taken]
    blocks = (TIMED_DEPTH - 2) // 2
    plain, own = (sum(column) / len(taken) for column in zip(*taken, strict=True))
    details = {
        "seconds per step": {"batch-norm": plain, "stochastic-depth": own},
        "branches computed, expected share": expected_depth(survival_probs(blocks)) / blocks,
    }
    return FASTER.judge(
        sum(ratios) / len(ratios), confidence_interval(ratios), len(ratios), details
    )


def measure_accuracy(runs: Mapping[str, RunRecord]) -> list[Finding]:
    """Return the finding about accuracy at the end of training."""
    run = runs["training"]
    usable = complete(run, "batch-norm", "stochastic-depth")
    accuracies = {one: final_accuracies(run, one) for one in ("batch-norm", "stochastic-depth")}
    details = {"accuracy": {name: mean(values) for name, values in accuracies.items()}}
    own, plain = accuracies["stochastic-depth"], accuracies["batch-norm"]
    return [judge_difference(AS_ACCURATE, own, plain, usable, details)]


def _study(scale: str) -> Study:
    small = scale == "small"
    task = {"name": "fashion-mnist", "train_size": 1280, "test_size": 2000}
    return Study(
        name="stochastic depth against constant depth",
        task=TaskChoice.model_validate(task if small else {"name": "cifar10"}),
        model=ModelChoice.model_validate(
            {"name": "resnet", "depth": 32 if small else 110, "width": 8 if small else 16}
        ),
        methods=["batch-norm", "stochastic-depth"],
        seeds=[0, 1, 2],
        # One recipe for both, as in the paper; at the small scale half the batch at half the rate.
        training=Training(
            epochs=120 if small else 500,
            batch_size=64 if small else 128,
            lr=0.05 if small else 0.1,
            weight_decay=1e-4,
            schedule="steps",
            # Beyond the end: only start and end are evaluated.
            evaluate_every=10**9 if small else 0,
        ),
    )


_TIMED = (
    "Time is the CPU time of one thread for steps of 110 layers on 16 random images, both networks "
    "in turn; whole trainings, one after the other, fell on different loads of the machine."
)

CLAIM = Claim(
    name="stochastic-depth",
    method="stochastic-depth",
    statement="Leaving residual branches out at random saves at least a fifth of the training time "
    "of a deep residual network, and the network is no less accurate.",
    budget={
        "small": "200 steps of 110 layers and 6 trials of 2,400 steps: about 40 minutes on one "
        "core",
        "paper": "6 trials of 500 epochs of CIFAR-10: about three days on one GPU",
    },
    departs={
        "small": (
            "A network of 32 layers and width 8 and 120 epochs of 1,280 images of Fashion-MNIST, "
            "not 110 layers and 500 epochs of CIFAR-10.",
            "The training was made longer after a first run, whose line stays in the ledger: after "
            "15 epochs the network with missing branches was 7.7 points behind. Bounds are those "
            "of the first run.",
            _TIMED,
            "SGD without Nesterov's look ahead.",
            "The accuracy at the end, not that of the best epoch on held-out images.",
        ),
        "paper": (
            _TIMED,
            "SGD without Nesterov's look ahead.",
            "All 50,000 images are trained on, and the accuracy is that at the end, not that of "
            "the best epoch on 5,000 held-out images.",
        ),
    },
    parts=(
        Part(name="time", bounds=(FASTER,), measure=measure_time),
        Part(
            name="depth",
            bounds=(AS_ACCURATE,),
            measure=measure_accuracy,
            studies={scale: {"training": _study(scale)} for scale in ("small", "paper")},
        ),
    ),
)
