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
from normlab.lab.records import RunRecord
from normlab.lab.study import ModelChoice, Study, TaskChoice, Training, Tune

AS_GOOD = Bound(
    statement="final test accuracy, weight rescaling minus weight decay at the better of two "
    "coefficients",
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
    """Return the findings; the better coefficient is the one with the higher mean."""
    rescaled = final_accuracies(runs["decay-low"], "weight-rescaling")
    arms = {name: final_accuracies(run, "batch-norm") for name, run in runs.items()}
    details = {
        "weight-rescaling": mean(rescaled),
        **{name: mean(values) for name, values in arms.items()},
        "learning rates": {name: rates(run) for name, run in runs.items()},
    }
    better = max(("decay-low", "decay-high"), key=lambda name: mean(arms[name]) or 0.0)
    whole = {name: complete(run, "batch-norm") for name, run in runs.items()}
    usable = complete(runs["decay-low"], "weight-rescaling")
    decayed = usable and whole["decay-low"] and whole["decay-high"]
    return [
        judge_difference(AS_GOOD, rescaled, arms[better], decayed, details),
        judge_difference(
            BETTER_THAN_NEITHER, rescaled, arms["none"], usable and whole["none"], details
        ),
    ]


def _study(name: str, weight_decay: float, scale: str) -> Study:
    small = scale == "small"
    task = {"name": "fashion-mnist", "train_size": 2000}
    # Rescaled weights are exempt from decay; what else the network has decays as in decay-low.
    methods = ["batch-norm", "weight-rescaling"] if name == "decay-low" else ["batch-norm"]
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
        tune=Tune(trials=4, low=1e-2, high=1.0, hold_out=0.2),
    )


# The customary 5e-4 hardly acts within a few hundred steps, hence the second, ten times as large;
# over 200 epochs the second is a smaller one.
DECAYS = {"small": (5e-4, 5e-3), "paper": (1e-4, 5e-4)}

CLAIM = Claim(
    name="weight-rescaling",
    method="weight-rescaling",
    statement="Setting the norms of the weights in front of batch normalisation after every step "
    "regularises as well as weight decay, without its coefficient, and better than neither.",
    budget={
        "small": "36 trials of 372 steps or fewer: about 5 minutes on two cores",
        "paper": "36 trials of 200 epochs of CIFAR-10: about a week on one GPU",
    },
    departs={
        "small": (
            "A plain network of 6 layers and width 8 on 2,000 images of Fashion-MNIST, not VGG-16 "
            "on CIFAR-10.",
            "The learning rate is searched for each arm, with four trials each.",
        ),
        "paper": (
            "A plain network of 16 layers in the manner of VGG-16, with batch normalisation.",
            "The paper's recipe could not be read; the learning rate is searched for each arm.",
        ),
    },
    parts=(
        Part(
            name="decay",
            bounds=(AS_GOOD, BETTER_THAN_NEITHER),
            measure=measure,
            studies={
                scale: {
                    "decay-low": _study("decay-low", low, scale),
                    "decay-high": _study("decay-high", high, scale),
                    "none": _study("none", 0.0, scale),
                }
                for scale, (low, high) in DECAYS.items()
            },
        ),
    ),
)
