"""Targets solve the two spirals and remember bits where weights, in as many steps, do not.

Source: M. Fairbank, S. Samothrakis, L. Citi, "Deep Learning in Target Space", 2022, arXiv
2006.01578.

Both problems are toys that train within seconds, so that each part trains for itself
(`normlab.lab.claims.target_space_training`) and both scales run the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import track

from normlab.lab.claims.claim import Bound, Claim, Finding, Part
from normlab.lab.claims.measures import POINTS, judge_difference, mean
from normlab.lab.claims.target_space_training import (
    BitMemory,
    Spirals,
    train_bit_memory,
    train_spirals,
)
from normlab.lab.records import RunRecord
from normlab.lab.statistics import share_interval

SPIRAL_SEEDS = range(20)
SPIRAL_STEPS = 1000
SPIRAL_LR = 0.01

MEMORY_SEEDS = range(8)
MEMORY_STEPS = 400
DELAY = 30
TARGET_LR = 0.01
WEIGHT_LRS = (0.001, 0.01)
REMEMBERED = 0.99
"""The share of right bits from which on a network is said to remember them."""

SOLVED = Bound(
    statement="two spirals: share of seeds whose training points are all right at some step of "
    "1,000, in target space",
    direction="above",
    threshold=0.5,
    unit="",
    reason="The paper claims that most runs solve the problem, and most is more than half.",
)

MORE_OFTEN = Bound(
    statement="two spirals: among the seeds solved in one of both spaces only, share solved in "
    "target space",
    direction="above",
    threshold=0.5,
    unit="",
    reason="Where both spaces were equally good, each would have half of these seeds (McNemar's "
    "exact comparison of pairs).",
)

BETWEEN = Bound(
    statement="two spirals: accuracy on the points between the training points, target space minus "
    "weight space",
    direction="above",
    threshold=0.0,
    unit=POINTS,
    reason="The paper reports that test points come out right as well, without a size that could "
    "be read.",
)

REMEMBERS = Bound(
    statement=f"bit memory over {DELAY} steps: share of seeds with at least 99 % of fresh bits "
    "right, in target space",
    direction="above",
    threshold=0.5,
    unit="",
    reason="Guessing gets 50 % of the bits, so that 99 % is memory with a stray error; that most "
    "runs learn it is more than half.",
)

BEYOND = Bound(
    statement=f"bit memory over {DELAY} steps: right bits in target space minus those in weight "
    "space at the better of two rates",
    direction="at least",
    threshold=25.0,
    unit=POINTS,
    reason="The paper claims delays at which weight space fails: half of the 50 points between "
    "guessing and perfect memory.",
)


def measure_spirals(runs: Mapping[str, RunRecord]) -> list[Finding]:
    """Train on the two spirals in both spaces and return the findings."""
    targets, weights = {}, {}
    for seed in _progress(SPIRAL_SEEDS, "two spirals"):
        targets[seed] = train_spirals("targets", seed, SPIRAL_STEPS, SPIRAL_LR)
        weights[seed] = train_spirals("weights", seed, SPIRAL_STEPS, SPIRAL_LR)
    return judge_spirals(targets, weights)


def judge_spirals(targets: Mapping[int, Spirals], weights: Mapping[int, Spirals]) -> list[Finding]:
    """Return the findings about the two spirals.

    Args:
        targets: The runs in target space by seed.
        weights: Those in weight space, of the same seeds.
    """
    details = {}
    for space, found in (("target space", targets), ("weight space", weights)):
        details[space] = {
            "solved": sum(one.solved_at is not None for one in found.values()),
            "solved at step": {seed: one.solved_at for seed, one in found.items()},
            "training accuracy": mean({s: 100 * one.training for s, one in found.items()}),
            "test accuracy": mean({s: 100 * one.test for s, one in found.items()}),
        }
    solved = {seed for seed, one in targets.items() if one.solved_at is not None}
    by_weights = {seed for seed, one in weights.items() if one.solved_at is not None}
    findings = [
        _judge_share(SOLVED, len(solved), len(targets), details),
        _judge_share(MORE_OFTEN, len(solved - by_weights), len(solved ^ by_weights), details),
    ]
    own, other = ({s: 100 * one.test for s, one in runs.items()} for runs in (targets, weights))
    return [*findings, judge_difference(BETWEEN, own, other, True, details)]


def measure_bit_memory(runs: Mapping[str, RunRecord]) -> list[Finding]:
    """Train on bit memory in both spaces and return the findings."""
    targets: dict[int, BitMemory] = {}
    weights: dict[float, dict[int, BitMemory]] = {lr: {} for lr in WEIGHT_LRS}
    for seed in _progress(MEMORY_SEEDS, "bit memory"):
        targets[seed] = train_bit_memory("targets", seed, DELAY, MEMORY_STEPS, TARGET_LR)
        for lr, found in weights.items():
            found[seed] = train_bit_memory("weights", seed, DELAY, MEMORY_STEPS, lr)
    return judge_bit_memory(targets, weights)


def judge_bit_memory(
    targets: Mapping[int, BitMemory], weights: Mapping[float, Mapping[int, BitMemory]]
) -> list[Finding]:
    """Return the findings about bit memory.

    Args:
        targets: The runs in target space by seed.
        weights: Those in weight space by learning rate and seed.
    """
    own = {seed: 100 * one.accuracy for seed, one in targets.items()}
    # In each seed the better rate: if that favours anyone, then weight space.
    best = {seed: max(100 * found[seed].accuracy for found in weights.values()) for seed in own}
    details = {"target space": own, "weight space": best}
    remembered = sum(one.accuracy >= REMEMBERED for one in targets.values())
    return [
        _judge_share(REMEMBERS, remembered, len(targets), details),
        judge_difference(BEYOND, own, best, True, details),
    ]


def _judge_share(bound: Bound, count: int, total: int, details: dict[str, Any]) -> Finding:
    if total == 0:
        return bound.judge(None, None, 0, details)
    return bound.judge(count / total, share_interval(count, total), total, details)


def _progress(seeds: Sequence[int], name: str) -> Iterable[int]:
    console = Console(stderr=True)
    return track(seeds, f"target-space: {name}", console=console, transient=True)


DEPARTS = (
    "Two spirals: 2-12-12-12-2 tanh without shortcuts, as the authors' library script; 1,000 steps "
    "of Adam at 0.01 in both spaces.",
    f"Bit memory: a delay of {DELAY} with {DELAY + 3} units, {MEMORY_STEPS} steps on batches of 32 "
    "and 8 realisation sequences; the authors' long example has a delay of 90 and 25,000 steps on "
    "batches of 400.",
    "Bit memory in weight space has two rates, the script's 0.001 and that of target space, 0.01, "
    "and counts with the better one in each seed.",
)

CLAIM = Claim(
    name="target-space",
    method="target-space",
    statement="Training targets instead of weights solves the two spirals far more often in as "
    "many steps, and a recurrent network remembers bits over delays at which training weights "
    "fails.",
    budget={
        "small": "40 runs of 1,000 steps on the two spirals, 24 of 400 on bit memory: about 5 "
        "minutes on one core",
        "paper": "the same as small",
    },
    departs={"small": DEPARTS, "paper": DEPARTS},
    parts=(
        Part(
            name="two-spirals",
            bounds=(SOLVED, MORE_OFTEN, BETWEEN),
            measure=measure_spirals,
        ),
        Part(name="bit-memory", bounds=(REMEMBERS, BEYOND), measure=measure_bit_memory),
    ),
)
