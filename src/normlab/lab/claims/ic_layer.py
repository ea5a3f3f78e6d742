"""Independent components: what dropout does to dependence, and IC against BN in training.

Source: G. Chen, P. Chen, Y. Shi, C.-Y. Hsieh, B. Liao, S. Zhang, "Rethinking the Usage of Batch
Normalization and Dropout in the Training of Deep Neural Networks", 2019, arXiv 1905.05928.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

import torch
from torch import Tensor

from normlab.lab.claims.claim import Bound, Claim, Finding, Part
from normlab.lab.claims.measures import (
    POINTS,
    complete,
    final_accuracies,
    judge_difference,
    mean,
    mean_accuracies,
    rates,
)
from normlab.lab.records import RunRecord
from normlab.lab.statistics import confidence_interval
from normlab.lab.study import ModelChoice, Study, TaskChoice, Training, Tune
from normlab.norms.ic_layer import IndependentComponent
from normlab.norms.ic_statistics import mutual_information

INFORMATION = Bound(
    statement="largest deviation of I(dropped) / I(before) from the squared keep rate, over "
    "discrete pairs without an atom at zero, every mask enumerated",
    direction="at most",
    threshold=1e-12,
    unit="",
    reason="The statement is an equality; float64 leaves about 1e-14 on tables of this size.",
)

CORRELATION = Bound(
    statement="deviation of the correlation behind an IC layer from the keep rate times the "
    "correlation in front of it, largest over keep rates 0.95 and 0.6 (mean of 10 batches of "
    "100,000 Gaussian pairs)",
    direction="at most",
    threshold=0.005,
    unit="",
    reason="The standard error of a mean over a million pairs is below 0.001; a keep rate that "
    "acted squared, or not at all, would be off by 0.04 or more.",
)

BETTER = Bound(
    statement="final test accuracy of the network with IC layers minus that with batch "
    "normalisation",
    direction="above",
    threshold=0.0,
    unit=POINTS,
    reason="The paper claims a better final accuracy, without a size that could be read.",
)

SOONER = Bound(
    statement="mean test accuracy over the epochs of training, IC layers minus batch normalisation",
    direction="above",
    threshold=0.0,
    unit=POINTS,
    reason="The paper claims faster convergence; a network that is ahead throughout has the higher "
    "mean.",
)

KEEP_RATES = (0.95, 0.6)
CORRELATION_BEFORE = 0.8


def measure_dependence(runs: Mapping[str, RunRecord]) -> list[Finding]:
    """Return the exact finding about information and the sampled one about correlation."""
    ratios = {
        f"keep {keep}": [_information_ratio(joint, keep) for joint in _tables()]
        for keep in (0.95, 0.5, 0.1)
    }
    worst = max(
        abs(ratio - float(keep.split()[1]) ** 2) for keep, all_ in ratios.items() for ratio in all_
    )
    details = {name: {"first": values[0], "tables": len(values)} for name, values in ratios.items()}
    found = [INFORMATION.judge(worst, (worst, worst), 0, details)]

    deviations, intervals = {}, {}
    for keep in KEEP_RATES:
        values = [value - keep * CORRELATION_BEFORE for value in _correlations(keep)]
        deviations[keep] = abs(sum(values) / len(values))
        low, high = confidence_interval(values) or (0.0, 0.0)
        crosses = low <= 0.0 <= high
        ends = sorted((abs(low), abs(high)))
        intervals[keep] = (0.0 if crosses else ends[0], ends[1])
    # The largest of two deviations is at least each lower end and at most the larger upper end.
    interval = (max(low for low, _ in intervals.values()), max(h for _, h in intervals.values()))
    details = {f"keep {keep}": deviation for keep, deviation in deviations.items()}
    found.append(CORRELATION.judge(max(deviations.values()), interval, 10, details))
    return found


def measure_training(runs: Mapping[str, RunRecord]) -> list[Finding]:
    """Return the findings about final accuracy and about the course of training."""
    run = runs["training"]
    usable = complete(run, "ic-layer", "batch-norm")
    findings = []
    for bound, values in ((BETTER, final_accuracies), (SOONER, mean_accuracies)):
        layer, reference = values(run, "ic-layer"), values(run, "batch-norm")
        details = {
            "ic-layer": mean(layer),
            "batch-norm": mean(reference),
            "learning rates": rates(run),
        }
        findings.append(judge_difference(bound, layer, reference, usable, details))
    return findings


def _tables() -> list[Tensor]:
    """Return joint distributions: a plain example first, then twenty drawn at random."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.rand(3, 4, generator=generator, dtype=torch.float64) for _ in range(20)]
    first = torch.tensor([[0.4, 0.1], [0.1, 0.4]], dtype=torch.float64)
    return [first, *(table / table.sum() for table in drawn)]


def _information_ratio(joint: Tensor, keep: float) -> float:
    """Return I after / I before, the joint distribution after found by trying every mask."""
    after = joint.new_zeros(joint.shape[0] + 1, joint.shape[1] + 1)
    for i, j in product(range(joint.shape[0]), range(joint.shape[1])):
        for first, second in product((0, 1), (0, 1)):
            weight = (keep if first else 1 - keep) * (keep if second else 1 - keep)
            # Value number k + 1 where the mask keeps it, the value zero where it does not.
            after[first * (i + 1), second * (j + 1)] += weight * joint[i, j]
    return float(mutual_information(after) / mutual_information(joint))


def _correlations(keep: float) -> list[float]:
    """Return the correlation behind an IC layer, once for each of ten batches."""
    layer = IndependentComponent(2, drop_prob=1 - keep, spatial_dims=0).double().train()
    rest = (1 - CORRELATION_BEFORE**2) ** 0.5
    values = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for _ in range(10):
            noise = torch.randn(100_000, 2, dtype=torch.float64)
            second = CORRELATION_BEFORE * noise[:, 0] + rest * noise[:, 1]
            # The layer has to take mean and scale away before it drops.
            pair = torch.stack([3 + 2 * noise[:, 0], 0.5 * second - 1], dim=1)
            values.append(float(torch.corrcoef(layer(pair).T)[0, 1]))
    return values


SMALL = Study(
    name="IC layers against batch normalisation",
    task=TaskChoice.model_validate(
        {"name": "fashion-mnist", "train_size": 4800, "test_size": 2000}
    ),
    model=ModelChoice.model_validate({"name": "resnet", "depth": 8, "width": 8}),
    methods=["batch-norm", "ic-layer"],
    seeds=[0, 1, 2, 3, 4],
    training=Training(epochs=5, batch_size=64, weight_decay=5e-4),
    tune=Tune(trials=4, low=3e-3, high=0.3),
)

PAPER = Study(
    name="IC layers against batch normalisation",
    task=TaskChoice(name="cifar10"),
    model=ModelChoice.model_validate({"name": "resnet", "depth": 110, "width": 16}),
    methods=["batch-norm", "ic-layer"],
    seeds=[0, 1, 2, 3, 4],
    training=Training(
        epochs=200, batch_size=64, optimizer="adamw", lr=1e-3, weight_decay=1e-4, schedule="steps"
    ),
    tune=Tune(trials=4, low=1e-4, high=1e-2),
)

CLAIM = Claim(
    name="ic-layer",
    method="ic-layer",
    statement="Dropout behind batch normalisation makes neurons less dependent: correlation falls "
    "as the keep rate, mutual information as its square; with such layers in front of every weight "
    "layer a residual network trains faster and ends better than with batch normalisation.",
    budget={
        "small": "18 trials of 375 steps: about 5 minutes on two cores",
        "paper": "18 trials of ResNet-110 over 200 epochs: about a week on one GPU",
    },
    departs={
        "small": (
            "ResNet-8 of half the width on 4,800 images of Fashion-MNIST, five epochs, SGD.",
            "The learning rate is searched for each, with four trials each.",
        ),
        "paper": (
            "The paper's recipe could not be read: Adam, 200 epochs and rate steps are the "
            "customary one for CIFAR-10.",
            "The learning rate is searched for each, with four trials each.",
        ),
    },
    parts=(
        Part(name="dependence", bounds=(INFORMATION, CORRELATION), measure=measure_dependence),
        Part(
            name="training",
            bounds=(BETTER, SOONER),
            measure=measure_training,
            studies={"small": {"training": SMALL}, "paper": {"training": PAPER}},
        ),
    ),
)
