"""Optimisers over weights that two processes share equal one process; SAM's own ascents."""

import pytest
import torch
from torch import multiprocessing

from sharded_work import OPTIMIZERS, RADIUS, RATE, batch, network, train, work
from synchronized_work import PROCESSES


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each process found, in the order of ranks."""
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(work, (str(folder),), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(PROCESSES)]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_norms_are_those_of_the_whole(results, name):
    model = network()
    train(model, OPTIMIZERS[name](model.parameters()), batch())
    for result in results:
        for found, expected in zip(result["run_sharded"][name], model.parameters(), strict=True):
            torch.testing.assert_close(found, expected.detach(), atol=1e-10, rtol=1e-10)


def gradient(model, x):
    loss = model(x).square().mean()
    return torch.autograd.grad(loss, list(model.parameters()))


def test_without_an_exchange_each_process_ascends_by_its_own_gradient(results):
    uphill = []
    for x in batch().chunk(PROCESSES):
        model = network()
        slopes = gradient(model, x)
        length = torch.cat([slope.flatten() for slope in slopes]).norm()
        with torch.no_grad():
            for weight, slope in zip(model.parameters(), slopes, strict=True):
                weight.add_(RADIUS / length * slope)
        uphill.append(gradient(model, x))
    starts = network().parameters()
    expected = [
        start.detach() - RATE * sum(slopes) / PROCESSES
        for start, slopes in zip(starts, zip(*uphill, strict=True), strict=True)
    ]
    for result in results:
        torch.testing.assert_close(result["run_own_ascent"], expected, atol=1e-12, rtol=1e-12)
