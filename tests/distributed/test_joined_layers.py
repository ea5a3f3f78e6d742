"""Layers with batch statistics: two processes equal one on the joined batch, in one collective.

Values, gradients, and all that evaluation will use.
"""

import copy

import pytest
import torch
from torch import multiprocessing

from joined_layers import cases, observe_steps, work
from synchronized_work import PROCESSES

NAMES = [name for name, *_ in cases(torch.float64)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each process found, in the order of ranks."""
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(work, (str(folder),), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(PROCESSES)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_equal_one(results, name, dtype, tolerance):
    layer, steps, weights = next(rest for one, *rest in cases(dtype) if one == name)
    inputs = [torch.cat(local) for local in steps]
    joined = observe_steps(copy.deepcopy(layer), inputs, torch.cat(weights))
    for step, expected in enumerate(joined):
        seen = [result["seen"][name, dtype][step] for result in results]
        for what, value in expected.items():
            parts = [part[what] for part in seen]
            if what in ("output", "input gradient"):
                actual = torch.cat(parts)
            elif what.startswith("gradient of"):
                actual = sum(parts)
            else:
                assert torch.equal(*parts), f"{what} differs between the processes"
                actual = parts[0]
            assert actual.dtype == value.dtype
            # Relative to the largest value: a gradient is a sum in which large terms may cancel.
            size = value.double().abs().max().clamp_min(1)
            difference = ((actual.double() - value.double()).abs() / size).max().item()
            assert difference <= tolerance, f"{what} differs by {difference:.1e}"


@pytest.mark.parametrize("name", NAMES)
def test_one_collective_a_pass(results, name):
    for result in results:
        forward, backward, without_gradients = result["calls"][name]
        assert forward == ["all_reduce"]
        assert backward == ["all_reduce"]
        assert without_gradients == ["all_reduce"]
