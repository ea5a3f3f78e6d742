"""Stochastic depth in two processes: the same gates, and what one process with all samples does."""

import pytest
import torch
from torch import multiprocessing

from normlab.regularizers.block_gates import draw_gates
from stochastic_depth_work import CASES, PROCESSES, STEPS, train, work


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each process found, in the order of ranks."""
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(work, (str(folder),), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(PROCESSES)]


@pytest.mark.parametrize("case", CASES)
def test_gates_agree_and_training_equals_one_process(results, case):
    expected = train(CASES[case], case)
    first, second = (result[case] for result in results)
    assert first["gates"] == second["gates"] == expected["gates"]
    assert len(expected["gates"]) == STEPS
    # Some branch is dropped in every step, so a wrapper that waits for its gradients would raise.
    assert all(not all(gates) for gates in expected["gates"])
    assert len(set(expected["gates"])) > 1
    for name, value in expected["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name]), name
        torch.testing.assert_close(first["weights"][name], value, atol=1e-12, rtol=1e-10, msg=name)


def test_gates_made_by_hand_agree_on_the_first_processs_seed_and_step(results):
    first, second = (result["by hand"] for result in results)
    assert first == second
    drawn = draw_gates((0.5,) * 8, 0, 3)
    assert first == [(0, 4, drawn), (0, 3, drawn)]
