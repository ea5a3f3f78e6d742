"""Stochastic depth trains a deep residual network in less time, to no lower an accuracy.

Source: G. Huang, Y. Sun, Z. Liu, D. Sedra, K. Weinberger, "Deep Networks with Stochastic Depth",
2016, arXiv 1603.09382.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

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
from normlab.regularizers.block_gates import draw_gates, expected_depth, survival_probs
from normlab.regularizers.stochastic_depth import METHOD, gates_of

TIMED_DEPTH, TIMED_BATCH, ROUNDS, REPEATS = 110, 128, 20, 2

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


def representative(probs: tuple[float, ...], stage: int, seed: int) -> tuple[bool, ...]:
    """Return gates with the expected number of open blocks in each stage.

    Where that number is not whole it is rounded up in as many of the seeds as its fraction says:
    twenty seeds in a row have the expectation but for a tenth of a block.

    Args:
        probs: The probability of each block.
        stage: The number of blocks in a stage.
        seed: Tells the draws apart.
    """
    found: list[bool] = []
    for number, start in enumerate(range(0, len(probs), stage)):
        part = probs[start : start + stage]
        whole, fraction = divmod(expected_depth(part), 1)
        # Seven and twenty have no common factor, so twenty seeds visit each twentieth once.
        wanted = int(whole) + ((seed * 7 % 20 + 0.5) / 20 < fraction)
        step = 0
        while sum(gates := draw_gates(part, 1000 * seed + number, step)) != wanted:
            step += 1
        found += gates
    return tuple(found)


class TimedStep:
    """A training step of a ResNet of width 16 on one batch of random images of 32 x 32.

    Args:
        depth: The weight layers.
        batch: The number of images.
        options: Options of stochastic depth; None for the plain network.
    """

    def __init__(self, depth: int, batch: int, options: Mapping[str, Any] | None) -> None:
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(batch, 3, 32, 32, generator=generator)
        self.targets = torch.arange(batch) % 10
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = build_model(
                "resnet", (3, 32, 32), 10, depth=depth, shortcut="average-pool"
            )
        self._gates = None
        if options is not None:
            setting = Setting(batches=((self.inputs, self.targets),))
            self.model = METHOD.with_options(**options).prepare(self.model, setting)
            self._gates = gates_of(self.model)
        # A small rate, so that all rounds compute with finite numbers.
        self._optimizer = torch.optim.SGD(
            self.model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4, fused=True
        )
        if self._gates is not None:
            self._gates.attach(self.model, self._optimizer)

    def __call__(self, gates: tuple[bool, ...]) -> float:
        """Take a step under these gates and return its CPU time in seconds."""
        start = time.thread_time()
        with nullcontext() if self._gates is None else self._gates.holding(gates):
            self._optimizer.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(self.model(self.inputs), self.targets).backward()
            self._optimizer.step()
        return time.thread_time() - start


def time_in_turn(
    steps: Mapping[str, TimedStep], plans: Sequence[tuple[bool, ...]]
) -> Iterator[dict[str, float]]:
    """Yield the seconds of each step under each plan of gates.

    Whatever else the machine does falls on all steps: they take turns, each round begins at the
    other end, and of two times the shorter one counts. A round that does not count goes ahead.

    Args:
        steps: What is timed.
        plans: The gates of each round.
    """
    for step in steps.values():
        step(plans[0])
    for number, gates in enumerate(plans):
        names = list(steps) if number % 2 else list(steps)[::-1]
        times = [{name: steps[name](gates) for name in names} for _ in range(REPEATS)]
        yield {name: min(one[name] for one in times) for name in steps}


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute in the calling thread alone, whose CPU time is what is read."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def step_times(depth: int, rounds: int, batch: int = TIMED_BATCH) -> list[tuple[float, float]]:
    """Return CPU seconds of steps of constant and of stochastic depth.

    Args:
        depth: The weight layers.
        rounds: How many steps of each count.
        batch: The number of images.
    """
    steps = {"plain": TimedStep(depth, batch, None), "stochastic": TimedStep(depth, batch, {})}
    with one_thread():
        taken = time_in_turn(steps, _plans(depth, rounds))
        return [(one["plain"], one["stochastic"]) for one in taken]


def _plans(depth: int, rounds: int) -> list[tuple[bool, ...]]:
    blocks = (depth - 2) // 2
    return [representative(survival_probs(blocks), blocks // 3, seed) for seed in range(rounds)]


def judge_times(taken: Sequence[tuple[float, float]]) -> Finding:
    """Return the finding about times of a step, pairs of constant and stochastic depth."""
    ratios = [own / plain for plain, own in taken]
    blocks = (TIMED_DEPTH - 2) // 2
    plain, own = (sum(column) / len(taken) for column in zip(*taken, strict=True))
    computed = sum(map(sum, _plans(TIMED_DEPTH, len(taken)))) / len(taken)
    details = {
        "seconds per step": {"batch-norm": plain, "stochastic-depth": own},
        "branches computed, expected share": expected_depth(survival_probs(blocks)) / blocks,
        "branches computed, share in these steps": computed / blocks,
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
    return Study(
        name="stochastic depth against constant depth",
        task=TaskChoice.model_validate(
            {"name": "digits", "train_size": 640} if small else {"name": "cifar10"}
        ),
        model=ModelChoice.model_validate(
            {
                "name": "resnet",
                "depth": 32 if small else 110,
                "width": 8 if small else 16,
                "shortcut": "average-pool",
            }
        ),
        methods=["batch-norm", "stochastic-depth"],
        seeds=list(range(12)) if small else [0, 1, 2],
        # One recipe for both, as in the paper; at the small scale half the batch at half the rate.
        training=Training(
            epochs=140 if small else 500,
            batch_size=64 if small else 128,
            lr=0.05 if small else 0.1,
            weight_decay=1e-4,
            schedule="steps",
            # Beyond the end: only start and end are evaluated.
            evaluate_every=10**9 if small else 0,
        ),
    )


_TIMED = (
    "Time is the CPU time of one thread for steps of 110 layers on 128 random images, both "
    "networks in turn, the shorter of two times; whole trainings, one after the other, fell on "
    "different loads of the machine."
)
_GATES = (
    "The gates of the 20 timed steps are not free draws, which would be off by 2 % on average: "
    "each stage has its expected number of open blocks, rounded up and down in turn, and which "
    "these are is drawn. The interval is that of the clock."
)

CLAIM = Claim(
    name="stochastic-depth",
    method="stochastic-depth",
    statement="Leaving residual branches out at random saves at least a fifth of the training time "
    "of a deep residual network, and the network is no less accurate.",
    budget={
        "small": "82 steps of 110 layers, 5 minutes, and 24 trials of 1,400 steps, 20 minutes on "
        "one core",
        "paper": "6 trials of 500 epochs of CIFAR-10: about three days on one GPU",
    },
    departs={
        "small": (
            "A network of 32 layers and width 8 and 140 epochs of 640 images of digits (8 x 8), "
            "not 110 layers and 500 epochs of CIFAR-10.",
            "Third design, and bounds are those of the first; all lines stay in the ledger. After "
            "15 epochs of Fashion-MNIST the network with missing branches was 7.7 points behind, "
            "so training was made longer. Three seeds of that told -0.7 points give or take 2.9, a "
            "standard deviation of 1.2, at which 0.5 would have taken over 20 seeds of eleven "
            "minutes a pair. A step on digits takes a fifth of the time: 12 seeds of 1,400 steps "
            "fit, with an interval of 0.64 standard deviations to either side.",
            _TIMED,
            _GATES,
            "SGD without Nesterov's look ahead.",
            "The accuracy at the end, not that of the best epoch on held-out images.",
        ),
        "paper": (
            _TIMED,
            _GATES,
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
