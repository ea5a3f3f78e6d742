"""Batch normalisation improves when its scales start at a tenth and learn slowly.

Source: J. Davis, L. Frank, "Revisiting Batch Norm Initialization", 2021, arXiv 2110.13989.
"""

from __future__ import annotations

from collections.abc import Mapping

from normlab.lab.claims.claim import Bound, Claim, Finding, Part
from normlab.lab.claims.measures import POINTS, complete, final_accuracies, mean, rates
from normlab.lab.records import RunRecord
from normlab.lab.statistics import ALPHA, one_sided_paired_test, paired_test
from normlab.lab.study import ModelChoice, Study, TaskChoice, Training, Tune

BETTER = Bound(
    statement="final test accuracy, batch-norm scale initialisation minus default batch "
    "normalisation (each end of the interval is a one-sided 95 % bound)",
    direction="above",
    threshold=0.0,
    unit=POINTS,
    reason="The paper calls a gain significant where the one-sided paired t-test over 15 seeds has "
    "p of at most 0.05, which is when the lower one-sided bound is not below zero; no size of the "
    "gain could be read.",
)


def measure(runs: Mapping[str, RunRecord]) -> list[Finding]:
    """Return the one finding, with t and p of the paper's test in its details."""
    run = runs["training"]
    own, default = (final_accuracies(run, method) for method in ("bn-init", "batch-norm"))
    shared = sorted(own.keys() & default.keys())
    details = {
        "bn-init": mean(own),
        "batch-norm": mean(default),
        "learning rates": rates(run),
    }
    if not shared:
        return [BETTER.judge(None, None, 0, details)]
    one_sided = one_sided_paired_test([own[s] for s in shared], [default[s] for s in shared])
    details["one-sided paired t-test"] = one_sided._asdict()
    # Both ends at once, each of them wrong with probability ALPHA.
    test = paired_test(own, default, level=1 - 2 * ALPHA)
    interval = test.interval if complete(run, "bn-init", "batch-norm") else None
    return [BETTER.judge(test.difference, interval, test.num_pairs, details)]


METHODS = ["batch-norm", "bn-init"]
SEEDS = list(range(1, 16))

SMALL = Study(
    name="batch-norm scale initialisation against the default",
    task=TaskChoice.model_validate(
        {"name": "fashion-mnist", "train_size": 3200, "test_size": 3000}
    ),
    model=ModelChoice.model_validate({"name": "plain-conv", "depth": 6, "width": 8}),
    methods=METHODS,
    seeds=SEEDS,
    # In the first run, 250 steps of ResNet-8 at rates up to 1, logits that start at a tenth had no
    # time to grow: what was measured was the budget. Beyond the end: only start and end are
    # evaluated.
    training=Training(epochs=20, batch_size=64, weight_decay=1e-4, evaluate_every=10**9),
    # A tenth of the gradient at every convolution asks for other rates, so each has its own search.
    tune=Tune(trials=5, low=2e-2, high=3.0, hold_out=0.2),
)

PAPER = Study(
    name="batch-norm scale initialisation against the default",
    task=TaskChoice(name="cifar10"),
    model=ModelChoice.model_validate({"name": "resnet", "depth": 20, "width": 64}),
    methods=METHODS,
    seeds=SEEDS,
    training=Training(epochs=180, batch_size=128, lr=0.1, weight_decay=1e-4),
)

CLAIM = Claim(
    name="bn-init",
    method="bn-init",
    statement="Starting the scales of batch normalisation at a tenth and dividing their learning "
    "rate by a hundred improves test accuracy, by a one-sided paired t-test over 15 seeds.",
    budget={
        "small": "30 trials of 1,000 steps and 10 searches: about 8 minutes on one core",
        "paper": "30 trials of ResNet-20 over 180 epochs of CIFAR-10: about a week on one GPU",
    },
    departs={
        "small": (
            "A plain network of 6 layers on 3,200 images of Fashion-MNIST, 20 epochs in batches of "
            "64.",
            "The learning rate is searched for each, with five trials each; start and slowdown of "
            "the scales are the defaults, not searched.",
            "The final accuracy is compared, not that of the epoch best on held-out data.",
            "Default batch normalisation decays its scales and all biases, as torch does.",
        ),
        "paper": (
            "ResNet-20 of width 64, not ResNet-18; start and slowdown of the scales are the "
            "defaults, not searched.",
            "The final accuracy is compared, not that of the epoch best on held-out data.",
            "Default batch normalisation decays its scales and all biases, as torch does.",
        ),
    },
    parts=(
        Part(
            name="training",
            bounds=(BETTER,),
            measure=measure,
            studies={"small": {"training": SMALL}, "paper": {"training": PAPER}},
        ),
    ),
)
