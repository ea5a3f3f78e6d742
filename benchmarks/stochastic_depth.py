"""What stochastic depth saves: a training step of ResNet-110 with and without it.

Three networks train in turn, so that whatever else the machine does falls on all of them: plain;
with stochastic depth, p_L = 0.5 and the linear schedule; and the same in the mode that masks, which
computes everything. The expected ratio is that of the blocks that are computed, sum p_l / L. It
supposes that blocks are all there is and cost the same; beside it stands what is expected from the
time of each stage: the early ones take longer here and are dropped less often.

The ratio of a single step depends on its gates: with free draws the mean of 20 rounds would be off
by 2 %. The rounds therefore take gates of representative depth: each stage of the network has the
number of open blocks that is expected of it, rounded up or down from round to round so that twenty
rounds have the expectation but for a tenth of a block; which blocks these are is drawn. What is
left is the error of the clock: each round takes its steps twice, in turn, and counts the shorter
times, and the ratio is that of the sums over all rounds::

    python benchmarks/stochastic_depth.py [--rounds ROUNDS] [--depth DEPTH]
"""

import argparse
import os
import statistics
import sys
import time

import torch
from torch import Tensor, nn

from common import environment, write
from layer_steps import ALLOCATOR
from normlab.lab.models import build_model
from normlab.method import Setting
from normlab.regularizers.block_gates import draw_gates, expected_depth, survival_probs
from normlab.regularizers.stochastic_depth import METHOD, gates_of

BATCH, SIZE, CLASSES = 128, 32, 10
GOAL = 0.05
WARM_UP, REPEATS = 1, 2


def representative(probs: tuple[float, ...], stage: int, seed: int) -> tuple[bool, ...]:
    """Return gates with the expected number of open blocks in each stage.

    Where that number is not whole it is rounded up in as many of the seeds as its fraction says.

    Args:
        probs: The probability of each block.
        stage: The number of blocks in a stage.
        seed: Tells the draws apart.
    """
    found: list[bool] = []
    for number, start in enumerate(range(0, len(probs), stage)):
        part = probs[start : start + stage]
        whole, fraction = divmod(expected_depth(part), 1)
        # Twenty seeds in a row round up in the share that the fraction says.
        wanted = int(whole) + ((seed * 7 % 20 + 0.5) / 20 < fraction)
        step = 0
        while sum(gates := draw_gates(part, 1000 * seed + number, step)) != wanted:
            step += 1
        found += gates
    return tuple(found)


class Step:
    """A training step of one network on one batch."""

    def __init__(self, depth: int, inputs: Tensor, targets: Tensor, options: dict | None) -> None:
        torch.manual_seed(0)
        self.model = build_model("resnet", tuple(inputs.shape[1:]), CLASSES, depth=depth)
        self.inputs, self.targets = inputs, targets
        self.gates = None
        if options is not None:
            setting = Setting(batches=((inputs, targets),))
            self.model = METHOD.with_options(**options).prepare(self.model, setting)
            self.gates = gates_of(self.model)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4, fused=True
        )
        if self.gates is not None:
            self.gates.attach(self.model, self.optimizer)

    def __call__(self, gates: tuple[bool, ...]) -> float:
        """Take a step under these gates and return its CPU time."""
        start = time.thread_time()
        if self.gates is None:
            self._step()
        else:
            with self.gates.holding(gates):
                self._step()
        return time.thread_time() - start

    def _step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(self.model(self.inputs), self.targets)
        loss.backward()
        self.optimizer.step()


def stage_shares(steps: dict[str, Step], blocks: int, rounds: int) -> list[float]:
    """Return the part of a plain step that lies in each stage's branches.

    What a step takes with all gates closed is not theirs; the rest is divided in the proportion of
    the stages' own times.

    Args:
        steps: The steps, plain and stochastic.
        blocks: The number of blocks.
        rounds: How often each is timed.
    """
    plain, stochastic = steps["plain"], steps["stochastic"]
    model = plain.model
    stages = [model.layer1, model.layer2, model.layer3]
    with torch.no_grad():
        given = [model.relu(model.bn1(model.conv1(plain.inputs)))]
        for stage in stages[:-1]:
            given.append(stage(given[-1]))

    def pass_of(stage: nn.Module, x: Tensor) -> float:
        start = time.thread_time()
        stage(x.requires_grad_()).sum().backward()
        return time.thread_time() - start

    rows = [
        [plain(()), stochastic((False,) * blocks), *map(pass_of, stages, given)]
        for _ in range(rounds)
    ]
    whole, closed, *parts = (statistics.median(column) for column in zip(*rows, strict=True))
    return [(1 - closed / whole) * part / sum(parts) for part in parts]


def main() -> None:
    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR})
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=20, help="a multiple of twenty")
    parser.add_argument("--depth", type=int, default=110)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    before = environment()
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(BATCH, 3, SIZE, SIZE, generator=generator)
    targets = torch.arange(BATCH) % CLASSES
    steps = {
        "plain": Step(arguments.depth, inputs, targets, None),
        "stochastic": Step(arguments.depth, inputs, targets, {}),
        "masked": Step(arguments.depth, inputs, targets, {"mode": "mask"}),
    }
    blocks = (arguments.depth - 2) // 2
    probs = survival_probs(blocks)
    plans = [representative(probs, blocks // 3, seed) for seed in range(arguments.rounds)]
    for _ in range(WARM_UP):
        for step in steps.values():
            step((True,) * blocks)
    rows = []
    for number, gates in enumerate(plans):
        names = list(steps) if number % 2 else list(steps)[::-1]
        times = [{name: steps[name](gates) for name in names} for _ in range(REPEATS)]
        rows.append({name: min(row[name] for row in times) for name in steps})
        print(f"round {number + 1}: {rows[-1]}", file=sys.stderr)

    sums = {name: sum(row[name] for row in rows) for name in steps}
    ratio = sums["stochastic"] / sums["plain"]
    quartiles = statistics.quantiles([row["stochastic"] / row["plain"] for row in rows], n=4)
    shares = stage_shares(steps, blocks, 5)
    of_blocks = expected_depth(probs) / blocks
    size = blocks // 3
    kept = [expected_depth(probs[i : i + size]) / size for i in range(0, blocks, size)]
    expected = 1 - sum(share * (1 - p) for share, p in zip(shares, kept, strict=True))
    computed = statistics.fmean(sum(gates) for gates in plans)
    result = {
        "what": f"CPU time of a training step of ResNet-{arguments.depth} with stochastic depth "
        "over that of the plain network, beside what the blocks that are computed let expect",
        "batch": [BATCH, 3, SIZE, SIZE],
        "clock": "CPU time of one thread; the sum over the rounds, in which the networks take "
        "turns and the shorter of two times counts",
        "gates": "representative: each stage has its expected number of open blocks, rounded up "
        "and down in turn",
        "rounds": arguments.rounds,
        "plain_ms": round(1e3 * sums["plain"] / arguments.rounds, 1),
        "ratio": round(ratio, 4),
        "quartiles_of_the_rounds": [round(quartiles[0], 4), round(quartiles[2], 4)],
        "masked_ratio": round(sums["masked"] / sums["plain"], 4),
        "blocks": blocks,
        "expected_depth": expected_depth(probs),
        "depth_in_the_rounds": round(computed, 4),
        "expected_ratio_of_blocks": round(of_blocks, 4),
        "over_expected_of_blocks": round(ratio / of_blocks, 4),
        "share_of_each_stage_in_a_step": [round(share, 4) for share in shares],
        "expected_ratio_by_stages": round(expected, 4),
        "over_expected_by_stages": round(ratio / expected, 4),
        "goal": f"within {GOAL:.0%} of what sum p_l / L lets expect",
        "reached": abs(ratio / of_blocks - 1) <= GOAL,
        "environment": before | {"load_average_after": round(os.getloadavg()[0], 2)},
    }
    if arguments.depth == parser.get_default("depth"):
        write(__file__, result)
    else:
        print(result)


if __name__ == "__main__":
    main()
