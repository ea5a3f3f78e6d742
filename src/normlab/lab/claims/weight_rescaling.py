"""Weight rescaling does what weight decay does in front of normalisers, without a coefficient.

Source: Z. Liu, Y. Cui, J. Wan, Y. Mao, A. B. Chan, "Weight Rescaling: Effective and Robust
Regularization for Deep Neural Networks with Batch Normalization", 2021, arXiv 2102.03497.
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
    rates,
)
from normlab.lab.records import FINISHED, RunRecord
from normlab.lab.study import ModelChoice, Study, TaskChoice, Training, Tune

AS_GOOD = Bound(
    statement="final test accuracy, weight rescaling minus weight decay at whichever of two "
    "coefficients does better on held-out data",
    direction="at least",
    threshold=-0.5,
    unit=POINTS,
    reason="The paper says similar or better. Half a point is what test accuracies differ in from "
    "seed to seed on such data: less would not be noticed by a user.",
)

BETTER_THAN_NEITHER = Bound(
    statement="final test accuracy, weight rescaling minus training with neither it nor decay",
    direction="above",
    threshold=0.0,
    unit=POINTS,
    reason="It is offered as a regulariser, so it has to gain something over none.",
)


def measure(runs: Mapping[str, RunRecord]) -> list[Finding]:
    """Return the findings; the test set has no say in which coefficient is taken."""
    rescaled = final_accuracies(runs["no-decay"], "weight-rescaling")
    arms = {name: final_accuracies(run, "batch-norm") for name, run in runs.items()}
    searched = {name: held_out(runs[name], "batch-norm") for name in ("decay-low", "decay-high")}
    chosen = max(searched, key=lambda name: searched[name] or 0.0)
    details = {
        "weight-rescaling": mean(rescaled),
        **{name: mean(values) for name, values in arms.items()},
        "held-out accuracy": searched,
        "coefficient": chosen,
        "learning rates": {name: rates(run) for name, run in runs.items()},
    }
    usable = complete(runs["no-decay"], "weight-rescaling")
    decayed = None not in searched.values() and complete(runs[chosen], "batch-norm")
    neither = complete(runs["no-decay"], "batch-norm")
    return [
        judge_difference(AS_GOOD, rescaled, arms[chosen], usable and decayed, details),
        judge_difference(
            BETTER_THAN_NEITHER, rescaled, arms["no-decay"], usable and neither, details
        ),
    ]


def held_out(run: RunRecord, method: str) -> float | None:
    """Return the best accuracy on held-out data in the search for a rate, in points; or None."""
    found = [
        100 * trial.result["final_accuracy"]
        for trial in run.tuning
        if trial.method == method and trial.result and trial.result["status"] == FINISHED
    ]
    return max(found, default=None)


def _study(methods: list[str], weight_decay: float, trials: int, scale: str) -> Study:
    small = scale == "small"
    task = {"name": "fashion-mnist", "train_size": 2000}
    return Study(
        name=f"weight decay {weight_decay:g}",
        task=TaskChoice.model_validate(task if small else {"name": "cifar10"}),
        model=ModelChoice.model_validate(
            {"name": "plain-conv", "depth": 6 if small else 16, "width": 8 if small else 64}
        ),
        methods=methods,
        seeds=[0, 1, 2, 3, 4],
        training=Training(
            epochs=12 if small else 200,
            batch_size=64 if small else 128,
            weight_decay=weight_decay,
            # Beyond the end: only start and end are evaluated.
            evaluate_every=10**9 if small else 0,
        ),
        # Rescaling fixes the effective rate where decay moves it, so each has its own search.
        tune=Tune(trials=trials, low=1e-2, high=1.0, hold_out=0.2),
    )


# The customary 5e-4 hardly acts within a few hundred steps, hence the second, ten times as large;
# over 200 epochs the second is a smaller one.
DECAYS = {"small": (5e-4, 5e-3), "paper": (1e-4, 5e-4)}
TRIALS = 8
"""The search of each arm; decay shares it among its coefficients, which are part of its search."""

SEARCHED = (
    "Eight trials search each arm: eight rates for weight rescaling and for neither, four at each "
    "of two coefficients for decay, whose coefficient is chosen with its rate on held-out data."
)
NOTHING_DECAYS = (
    "Under weight rescaling nothing decays, the classifier and the normalisers included, as in the "
    "training with neither; under decay all parameters do."
)

CLAIM = Claim(
    name="weight-rescaling",
    method="weight-rescaling",
    statement="Setting the norms of the weights in front of batch normalisation after every step "
    "regularises as well as weight decay, without its coefficient, and better than neither.",
    budget={
        "small": "44 trials of 372 steps or fewer: about 6 minutes on two cores",
        "paper": "44 trials of 200 epochs of CIFAR-10: about nine days on one GPU",
    },
    departs={
        "small": (
            "A plain network of 6 layers and width 8 on 2,000 images of Fashion-MNIST, not VGG-16 "
            "on CIFAR-10.",
            SEARCHED,
            NOTHING_DECAYS,
        ),
        "paper": (
            "A plain network of 16 layers in the manner of VGG-16, with batch normalisation.",
            "The paper's recipe could not be read.",
            SEARCHED,
            NOTHING_DECAYS,
        ),
    },
    parts=(
        Part(
            name="decay",
            bounds=(AS_GOOD, BETTER_THAN_NEITHER),
            measure=measure,
            studies={
                scale: {
                    "decay-low": _study(["batch-norm"], low, TRIALS // 2, scale),
                    "decay-high": _study(["batch-norm"], high, TRIALS // 2, scale),
                    "no-decay": _study(["batch-norm", "weight-rescaling"], 0.0, TRIALS, scale),
                }
                for scale, (low, high) in DECAYS.items()
            },
        ),
    ),
)
