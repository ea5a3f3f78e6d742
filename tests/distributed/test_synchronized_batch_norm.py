"""Two processes that share statistics against one process on the joined batch."""

import pytest
import torch
from torch import multiprocessing, nn

from normlab.surgery.recalibrate import recalibrate
from synchronized_work import PROCESSES, layers, network, observe, work


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each process found, in the order of ranks."""
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(work, (str(folder),), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(PROCESSES)]


def joined(parts):
    """Join what belongs to samples, add up what belongs to parameters; buffers must agree."""
    whole = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        if name.startswith("gradient of"):
            whole[name] = sum(values)
        elif name in ("output", "input gradient"):
            whole[name] = values
        else:
            assert torch.equal(*values), f"{name} differs between the processes"
            whole[name] = values[0]
    return whole


def flat(x):
    """``(N, C, *)`` as ``(N * space, C)``, in which batches of different space can be joined."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def assert_same(actual, expected, tolerance):
    for name, value in expected.items():
        got = actual[name]
        if isinstance(got, list):
            got, value = torch.cat([flat(part) for part in got]), flat(value)
        assert got.dtype == value.dtype
        # Relative to the largest value: a gradient is a sum in which large terms may cancel.
        difference = ((got - value).abs() / value.abs().max().clamp_min(1)).max().item()
        assert difference <= tolerance, f"{name} differs by {difference:.1e}"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
def test_layers_equal_one_process(results, dtype, tolerance):
    for name, layer, steps, weights in layers(dtype):
        # Statistics do not see where in space a value stands, so the joined batch may be flat.
        one = nn.BatchNorm1d(
            3, layer.eps, layer.momentum, layer.affine, layer.track_running_stats
        ).to(dtype)
        one.load_state_dict(layer.state_dict())
        for step, local in enumerate(steps):
            x, w = (torch.cat([flat(part) for part in parts]) for parts in (local, weights))
            expected = observe(one, x, w)
            actual = joined([result["run_layers"][dtype, name][step] for result in results])
            assert_same(actual, expected, tolerance)


def test_a_network_equals_one_process(results):
    model, batches = network()
    expected = observe(model, torch.cat(batches[0]), torch.ones(1))
    assert len([name for name in expected if name.startswith("gradient of")]) == 9
    actual = joined([result["run_network"]["step"] for result in results])
    assert_same(actual, expected, 1e-10)


@pytest.mark.parametrize("pooled", [False, True])
def test_recalibration_equals_one_process(results, pooled):
    model, batches = network()
    recalibrate(model, [torch.cat(batch) for batch in batches], pooled=pooled)
    for result in results:
        recalibrated = result["run_network"]["recalibrated"][pooled]
        assert_same(recalibrated, dict(model.named_buffers()), 1e-10)


def test_one_collective_forward_and_one_backward(results):
    for result in results:
        assert result["run_counts"] == {
            "forward": ["all_reduce"],
            "backward": ["all_reduce"],
            "without gradients": ["all_reduce"],
            "evaluation": [],
        }


def test_layout_and_precision_are_kept(results):
    for result in results:
        assert result["run_layouts"] == {
            "channels last": True,
            "same values": True,
            "half": (torch.bfloat16, True),
        }


def test_refusals(results):
    for result in results:
        messages = result["run_refusals"]["messages"]
        assert "more than one value per channel" in messages["alone"]
        assert "expected shape (N, 3, *)" in messages["channels"]
        assert "expected at least one value" in messages["empty"]


def test_a_group_of_one_is_plain(results):
    for result in results:
        assert result["run_refusals"]["alone is plain"]
        assert result["run_refusals"]["alone calls"] == []
