"""Fixup trains residual networks without normalisers at depths where He's rule alone diverges.

Source: H. Zhang, Y. N. Dauphin, T. Ma, "Fixup Initialization: Residual Learning Without
Normalization", 2019, arXiv 1901.09321.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from normlab.lab.claims.claim import Bound, Claim, Finding, Part
from normlab.lab.claims.measures import (
    POINTS,
    chance,
    complete,
    diverged,
    final_accuracies,
    judge_difference,
    mean,
    trials_of,
)
from normlab.lab.records import RunRecord
from normlab.lab.statistics import confidence_interval, share_interval
from normlab.lab.study import ModelChoice, Study, TaskChoice, Training

HE_FAILS = Bound(
    statement="share of plain He runs of the deepest network that diverge, or end the first epoch "
    "below twice the accuracy of guessing",
    direction="above",
    threshold=0.5,
    unit="",
    reason="The claim is about depths where plain He initialisation does not train: most of its "
    "runs must fail there, not one by bad luck.",
)

FIXUP_TRAINS = Bound(
    statement="test accuracy of Fixup's deepest network after the first epoch",
    direction="above",
    threshold=30.0,
    unit=POINTS,
    reason="Three times the accuracy of guessing: a network that does not train stays near ten.",
)

DEPTH_COSTS_LITTLE = Bound(
    statement="Fixup's test accuracy after the first epoch, deepest network minus shallowest",
    direction="at least",
    threshold=-10.0,
    unit=POINTS,
    reason="The paper's accuracies after one epoch stay on one level over depth, give or take "
    "several points; a method that breaks down with depth loses several tens.",
)

NO_DIVERGENCE = Bound(
    statement="runs of the 10,000-layer network whose loss leaves the finite numbers within one "
    "epoch",
    direction="at most",
    threshold=0.0,
    unit="runs",
    reason="The paper trains 10,000 layers at the learning rate of a normalised network; a single "
    "divergence contradicts it.",
)

DEEP_LEARNS = Bound(
    statement="test accuracy of the 10,000-layer network after one epoch, the worst seed (interval "
    "over test samples)",
    direction="above",
    threshold=11.0,
    unit=POINTS,
    reason="Not to diverge is not yet to train: the largest class has 10.2 % of the samples, which "
    "is what a network reaches that has learned nothing.",
)


def measure_depths(runs: Mapping[str, RunRecord]) -> list[Finding]:
    """Return the findings about depth; the runs come in order of depth."""
    shallow, deep = next(iter(runs.values())), list(runs.values())[-1]
    level = {
        name: {method: mean(final_accuracies(run, method)) for method in ("none", "fixup")}
        for name, run in runs.items()
    }
    bare = trials_of(deep, "none")
    ends = final_accuracies(deep, "none")
    broken = sum(diverged(trial) or ends[seed] < 200 * chance(deep) for seed, trial in bare.items())
    details = {
        "diverged": {
            name: sum(diverged(trial) for trial in trials_of(run, "none").values())
            for name, run in runs.items()
        },
        "runs": len(bare),
    }
    share = broken / len(bare) if bare else None
    interval = share_interval(broken, len(bare)) if complete(deep, "none") else None
    found = [HE_FAILS.judge(share, interval, len(bare), details)]

    fixup = final_accuracies(deep, "fixup")
    details = {"mean accuracy": level}
    interval = confidence_interval(list(fixup.values())) if complete(deep, "fixup") else None
    found.append(FIXUP_TRAINS.judge(mean(fixup), interval, len(fixup), details))

    usable = complete(deep, "fixup") and complete(shallow, "fixup")
    first = final_accuracies(shallow, "fixup")
    found.append(judge_difference(DEPTH_COSTS_LITTLE, fixup, first, usable, details))
    return found


def measure_ten_thousand(runs: Mapping[str, RunRecord]) -> list[Finding]:
    """Return the findings about the 10,000-layer network."""
    run = runs["one-epoch"]
    trials = trials_of(run, "fixup")
    usable = complete(run, "fixup")
    lost = sum(diverged(trial) for trial in trials.values())
    details = {
        f"seed {seed}": {
            "seconds": (trial.result or {})["seconds"],
            "steps": (trial.result or {})["step"],
            "peak memory in bytes": (trial.result or {})["peak_memory_bytes"],
            "training loss, first and last": [
                losses[0]["loss"] if losses else None,
                losses[-1]["loss"] if losses else None,
            ],
        }
        for seed, trial in trials.items()
        for losses in [[line for line in trial.metrics if line["kind"] == "train"]]
    }
    exact = (float(lost), float(lost)) if usable else None
    found = [NO_DIVERGENCE.judge(float(lost) if trials else None, exact, 0, details)]

    worst = min(final_accuracies(run, "fixup").values(), default=math.nan)
    if math.isnan(worst):
        return [*found, DEEP_LEARNS.judge(None, None, 0)]
    samples = run.environment["test_samples"]
    low, high = share_interval(round(worst / 100 * samples), samples)
    interval = (100 * low, 100 * high) if usable else None
    return [*found, DEEP_LEARNS.judge(worst, interval, samples, {"test samples": samples})]


def _study(depth: int, scale: str) -> Study:
    small = scale == "small"
    # With 60 steps of batch 64 an epoch was too short at any depth: Fixup starts with the readout
    # and every branch at zero, and had 21 % at depth 8. An epoch of the paper has 390 steps.
    task = {"name": "fashion-mnist", "train_size": 7680, "test_size": 1000}
    return Study(
        name=f"first epoch at depth {depth}",
        task=TaskChoice.model_validate(task if small else {"name": "cifar10"}),
        model=ModelChoice.model_validate(
            {"name": "resnet", "depth": depth, "width": 4 if small else 16}
        ),
        methods=["none", "fixup"],
        # Six of six failures are the fewest whose interval lies above one half.
        seeds=[0, 1, 2, 3, 4, 5],
        # The rate of a network with batch normalisation: 0.1 for a batch of 128 in the paper, and
        # the workbench's default for small batches.
        training=Training(
            epochs=1,
            batch_size=32 if small else 128,
            lr=0.05 if small else 0.1,
            weight_decay=1e-4,
            schedule="constant",
        ),
    )


def _ten_thousand(scale: str) -> Study:
    small = scale == "small"
    return Study(
        name="one epoch of 10,004 layers",
        task=TaskChoice(name="digits" if small else "cifar10"),
        model=ModelChoice.model_validate(
            {"name": "resnet", "depth": 10004, "width": 4 if small else 16}
        ),
        methods=["fixup"],
        seeds=[0],
        training=Training(
            epochs=1,
            batch_size=64 if small else 128,
            lr=0.05 if small else 0.1,
            weight_decay=1e-4,
            schedule="constant",
        ),
    )


DEPTHS = {"small": (8, 32, 110), "paper": (8, 32, 110, 1202)}

CLAIM = Claim(
    name="fixup",
    method="fixup",
    statement="With Fixup, residual networks without normalisers train at the learning rate of a "
    "batch-normalised network at any depth, 10,000 layers included, where plain He initialisation "
    "diverges.",
    budget={
        "small": "36 trials of 240 steps, and 21 steps of 10,004 layers: about 20 minutes on one "
        "core, 2 GB of memory",
        "paper": "48 trials of one epoch of CIFAR-10, and one of 10,004 layers: about a day on one "
        "GPU of 80 GB",
    },
    departs={
        "small": (
            "A quarter of the width, 7,680 images of Fashion-MNIST in the epoch, batches of 32 at "
            "half the rate.",
            "No batch-normalised network trains beside: the rate is the one that it has in the "
            "workbench.",
            "The 10,004 layers see the digits of 8x8 pixels.",
        ),
    },
    parts=(
        Part(
            name="depths",
            bounds=(HE_FAILS, FIXUP_TRAINS, DEPTH_COSTS_LITTLE),
            measure=measure_depths,
            studies={
                scale: {f"depth-{depth}": _study(depth, scale) for depth in depths}
                for scale, depths in DEPTHS.items()
            },
        ),
        Part(
            name="ten-thousand",
            bounds=(NO_DIVERGENCE, DEEP_LEARNS),
            measure=measure_ten_thousand,
            studies={scale: {"one-epoch": _ten_thousand(scale)} for scale in DEPTHS},
        ),
    ),
)
