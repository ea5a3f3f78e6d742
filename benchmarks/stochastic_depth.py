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
from normlab.lab.claims.stochastic_depth import TimedStep, representative, time_in_turn
from normlab.regularizers.block_gates import expected_depth, survival_probs

BATCH = 128
GOAL = 0.05


def stage_shares(steps: dict[str, TimedStep], blocks: int, rounds: int) -> list[float]:
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
    steps = {
        "plain": TimedStep(arguments.depth, BATCH, None),
        "stochastic": TimedStep(arguments.depth, BATCH, {}),
        "masked": TimedStep(arguments.depth, BATCH, {"mode": "mask"}),
    }
    blocks = (arguments.depth - 2) // 2
    probs = survival_probs(blocks)
    plans = [representative(probs, blocks // 3, seed) for seed in range(arguments.rounds)]
    rows = []
    for row in time_in_turn(steps, plans):
        rows.append(row)
        print(f"round {len(rows)}: {row}", file=sys.stderr)

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
        "batch": list(steps["plain"].inputs.shape),
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
