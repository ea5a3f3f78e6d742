"""The claim about stochastic depth: its findings, on made-up records, can go either way."""

import json
from pathlib import Path

import pytest
import torch

from normlab.lab.claims import stochastic_depth
from normlab.lab.claims.claim import FAILS, HOLDS, UNDECIDED
from normlab.lab.records import DIVERGED, FINISHED, RunRecord, TrialRecord
from normlab.regularizers.block_gates import survival_probs

SEEDS = (0, 1, 2)


def trials(method, accuracy, seeds=SEEDS):
    """Return trials with a little spread; an accuracy of None: diverged."""
    found = []
    for seed in seeds:
        result = {
            "status": DIVERGED if accuracy is None else FINISHED,
            "final_accuracy": None if accuracy is None else accuracy + 0.0005 * seed**2,
            "lr": 0.1,
        }
        found.append(TrialRecord(method, seed, result, []))
    return found


def accuracy(plain, own, seeds=SEEDS):
    recorded = trials("batch-norm", plain) + trials("stochastic-depth", own, seeds)
    study = {"seeds": list(SEEDS), "model": {"name": "resnet", "depth": 32}, "training": {}}
    run = RunRecord(Path("made-up"), study, {"num_classes": 10}, {}, recorded, [])
    (found,) = stochastic_depth.measure_accuracy({"training": run})
    return found


@pytest.mark.parametrize(
    ("plain", "own", "expected"),
    [
        (0.80, 0.80, HOLDS),
        (0.80, 0.85, HOLDS),
        (0.80, 0.78, FAILS),
        (0.80, None, FAILS),
        (None, 0.80, HOLDS),
    ],
)
def test_accuracy_goes_both_ways(plain, own, expected):
    found = accuracy(plain, own)
    assert found.verdict == expected
    json.dumps(found.details, allow_nan=False)


def test_what_is_measured():
    found = accuracy(0.80, 0.82)
    assert found.measured == pytest.approx(2.0)
    assert found.n == 3


def test_missing_trials_leave_it_undecided():
    assert accuracy(0.8, 0.8, (0, 1)).verdict == UNDECIDED
    assert accuracy(0.8, 0.8, ()).verdict == UNDECIDED


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [([0.74, 0.76, 0.75], HOLDS), ([0.89, 0.9, 0.91], FAILS), ([0.7, 0.8, 0.9], UNDECIDED)],
)
def test_time_goes_both_ways(ratios, expected):
    found = stochastic_depth.judge_times([(2.0, 2.0 * ratio) for ratio in ratios])
    assert found.verdict == expected
    assert found.measured == pytest.approx(sum(ratios) / 3)
    assert found.details["seconds per step"]["batch-norm"] == pytest.approx(2.0)
    assert found.details["branches computed, expected share"] == pytest.approx(40.25 / 54)


def test_steps_of_stochastic_depth_are_timed_beside_plain_ones():
    taken = stochastic_depth.step_times(depth=20, rounds=12, batch=16)
    assert len(taken) == 12
    assert sum(own for _, own in taken) < 0.95 * sum(plain for plain, _ in taken)


def test_steps_are_timed_on_one_thread_in_turn(monkeypatch):
    order = []

    class Step:
        def __init__(self, depth, batch, options):
            self.name = "plain" if options is None else "stochastic"

        def __call__(self, gates):
            assert torch.get_num_threads() == 1
            order.append((self.name[0], gates))
            # Each second time is disturbed; the shorter one counts.
            return {"plain": 2.0, "stochastic": 1.5}[self.name] + len(order) // 2 % 2

    monkeypatch.setattr(stochastic_depth, "TimedStep", Step)
    torch.set_num_threads(2)
    try:
        taken = stochastic_depth.step_times(depth=110, rounds=20)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert taken == [(2.0, 1.5)] * 20
    # One round that does not count, then each begins at the other end.
    assert "".join(name for name, _ in order[:10]) == "ps" + "spsp" + "psps"
    plans = [gates for _, gates in order[2::4]]
    assert all([gates for _, gates in order[n + 2 :: 4]] == plans for n in range(4))
    assert len(set(plans)) == 20


def test_gates_of_the_timed_steps_are_representative():
    probs = survival_probs(54)
    plans = [stochastic_depth.representative(probs, 18, seed) for seed in range(20)]
    for start in (0, 18, 36):
        expected = sum(probs[start : start + 18])
        counts = [sum(gates[start : start + 18]) for gates in plans]
        assert all(abs(count - expected) < 1 for count in counts)
        assert sum(counts) / 20 == pytest.approx(expected, abs=0.05)
    found = stochastic_depth.judge_times([(2.0, 1.5)] * 20)
    share = found.details["branches computed, share in these steps"]
    assert share == pytest.approx(40.25 / 54, abs=0.1 / 54)


def test_every_finding_has_its_bound():
    claim = stochastic_depth.CLAIM
    assert claim.bounds == (stochastic_depth.FASTER, stochastic_depth.AS_ACCURATE)


@pytest.mark.parametrize("scale", ["small", "paper"])
def test_both_arms_are_trained_alike(scale):
    study = stochastic_depth.CLAIM.parts[1].studies[scale]["training"]
    assert study.methods == ["batch-norm", "stochastic-depth"]
    assert study.model.options["depth"] >= 32
    assert study.tune is None


def test_the_small_scale_has_seeds_enough():
    assert len(stochastic_depth.CLAIM.parts[1].studies["small"]["training"].seeds) >= 12
