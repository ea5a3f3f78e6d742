"""Two processes that precondition together equal one process on the joined batch."""

import pytest
import torch
from torch import multiprocessing

from preconditioned_work import STATISTICS, batches, network, train, work
from synchronized_work import PROCESSES


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each process found, in the order of ranks."""
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(work, (str(folder),), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(PROCESSES)]


@pytest.mark.parametrize("statistics", STATISTICS)
def test_two_processes_equal_one(results, statistics):
    model = network()
    expected, state, _ = train(model, model, [torch.cat(x) for x in batches()], statistics)
    for result in results:
        parameters, found, _ = result["trained"][statistics]
        torch.testing.assert_close(parameters, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found, state, rtol=1e-10, atol=1e-10)
    assert all(
        torch.equal(*pair)
        for pair in zip(*(result["trained"][statistics][0] for result in results), strict=True)
    )


@pytest.mark.parametrize("statistics", STATISTICS)
def test_one_collective_a_step_for_all_layers(results, statistics):
    for result in results:
        assert result["trained"][statistics][2] == [["all_reduce"]] * 3


def test_layers_called_on_some_processes_only(results):
    x = torch.arange(12.0).view(6, 2).double()
    for result in results:
        moments, again = result["uneven"]
        assert moments.called == [True, True, False]
        assert moments.num_rows.tolist() == [6, 5, 0]
        joined = torch.cat([x[:1], x[:4]])
        mean = torch.cat([x.mean(0), joined.mean(0)])
        square = torch.cat([x.square().mean(0), joined.square().mean(0)])
        torch.testing.assert_close(moments.mean[:4], mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(moments.square[:4], square, rtol=1e-6, atol=1e-6)
        assert again == [False, False, False]
