"""Two processes that accumulate equal one on all the data; the noise scale sees both."""

import pytest
import torch
from torch import multiprocessing

from accumulated_work import SIZES, data, gradients, network, work
from normlab.optim.gradient_noise_scale import noise_scale
from synchronized_work import PROCESSES


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each process found, in the order of ranks."""
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(work, (str(folder),), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(PROCESSES)]


def of(x):
    model = network()
    model(x).square().mean().backward()
    return gradients(model)


def square(x):
    return sum(g.square().sum() for g in of(x)).item()


def test_token_means_over_processes_and_micro_batches(results):
    everything = torch.cat([part for parts in data() for part in parts])
    expected = of(everything)
    for rank, result in enumerate(results):
        found = result["run_tokens"]
        assert found["total"] == sum(map(sum, SIZES)) == len(everything)
        assert found["calls"] == ["all_reduce"]
        torch.testing.assert_close(found["joint"], expected, rtol=1e-10, atol=1e-12)
        # Before the last micro-batch nothing was exchanged.
        factor = SIZES[rank][0] * PROCESSES / len(everything)
        alone = [factor * g for g in of(data()[rank][0])]
        torch.testing.assert_close(found["own"], alone, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("name", "small"), [("hook", 6), ("accumulation", 3)])
def test_noise_scale_over_processes(results, name, small):
    everything = torch.cat([part for parts in data() for part in parts])
    shares = everything.chunk(PROCESSES)
    mean = sum(square(share[:small]) for share in shares) / PROCESSES
    expected = noise_scale(mean, square(everything), small, 12)
    for result in results:
        found, joint = result["run_noise"][name]
        assert found.noise == pytest.approx(expected.noise, rel=1e-6)
        assert found.signal == pytest.approx(expected.signal, rel=1e-6)
        torch.testing.assert_close(joint, of(everything), rtol=1e-10, atol=1e-12)
