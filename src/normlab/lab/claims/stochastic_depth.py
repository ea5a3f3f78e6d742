"""Stochastic depth trains a deep residual network in less time, to no lower an accuracy.

Source: G. Huang, Y. Sun, Z. Liu, D. Sedra, K. Weinberger, "Deep Networks with Stochastic Depth",
2016, arXiv 1603.09382.
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
    trials_of,
)
from normlab.lab.records import RunRecord
from normlab.lab.statistics import confidence_interval
from normlab.lab.study import ModelChoice, Study, TaskChoice, Training
from normlab.regularizers.block_gates import expected_depth, survival_probs

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


def seconds_per_step(run: RunRecord, method: str) -> dict[int, float]:
    """Return the mean time of a method's training steps by seed, evaluation left out."""
    results = {seed: trial.result or {} for seed, trial in trials_of(run, method).items()}
    return {
        seed: result["seconds"] / result["step"]
        for seed, result in results.items()
        if result["step"] and result["seconds"]
    }


def measure(runs: Mapping[str, RunRecord]) -> list[Finding]:
    """Return the findings; times are compared seed by seed."""
    run = runs["training"]
    usable = complete(run, "batch-norm", "stochastic-depth")
    plain, own = (seconds_per_step(run, one) for one in ("batch-norm", "stochastic-depth"))
    ratios = {seed: own[seed] / plain[seed] for seed in own if seed in plain}
    blocks = (run.study["model"]["depth"] - 2) // 2
    details = {
        "seconds per step": {"batch-norm": mean(plain), "stochastic-depth": mean(own)},
        "branches computed, expected share": expected_depth(survival_probs(blocks)) / blocks,
    }
    known = usable and len(ratios) > 1
    interval = confidence_interval(list(ratios.values())) if known else None
    found = [FASTER.judge(mean(ratios), interval, len(ratios), details)]

    accuracies = {one: final_accuracies(run, one) for one in ("batch-norm", "stochastic-depth")}
    details = {"accuracy": {name: mean(values) for name, values in accuracies.items()}}
    own, plain = accuracies["stochastic-depth"], accuracies["batch-norm"]
    return [*found, judge_difference(AS_ACCURATE, own, plain, usable, details)]


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


CLAIM = Claim(
    name="stochastic-depth",
    method="stochastic-depth",
    statement="Leaving residual branches out at random saves at least a fifth of the training time "
    "of a deep residual network, and the network is no less accurate.",
    budget={
        "small": "6 trials of 2,400 steps: about 40 minutes on one core",
        "paper": "6 trials of 500 epochs of CIFAR-10: about three days on one GPU",
    },
    departs={
        "small": (
            "A network of 32 layers and width 8 and 120 epochs of 1,280 images of Fashion-MNIST, "
            "not 110 layers and 500 epochs of CIFAR-10.",
            "The training was made longer after a first run, whose line stays in the ledger: after "
            "15 epochs the network with missing branches was still far from fitting its data. "
            "Bounds are those of the first run.",
            "SGD without Nesterov's look ahead.",
            "The accuracy at the end, not that of the best epoch on held-out images.",
        ),
        "paper": (
            "SGD without Nesterov's look ahead.",
            "All 50,000 images are trained on, and the accuracy is that at the end, not that of "
            "the best epoch on 5,000 held-out images.",
        ),
    },
    parts=(
        Part(
            name="depth",
            bounds=(FASTER, AS_ACCURATE),
            measure=measure,
            studies={scale: {"training": _study(scale)} for scale in ("small", "paper")},
        ),
    ),
)
