"""The shared formulas against sums made by hand."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from normlab.moments import batch_moments, check_channels, per_channel, wide
from normlab.norms.batch_norm import SynchronizedBatchNorm


@given(shape=st.lists(st.integers(1, 4), min_size=2, max_size=5), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_moments_of_any_shape(shape, seed):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mean, variance, count = batch_moments(x)
    for channel in range(shape[1]):
        values = x[:, channel].flatten().tolist()
        average = sum(values) / len(values)
        assert count == len(values)
        assert mean[channel].item() == pytest.approx(average, abs=1e-12)
        expected = sum((value - average) ** 2 for value in values) / len(values)
        assert variance[channel].item() == pytest.approx(expected, abs=1e-12)


def test_half_precision_is_summed_in_single():
    x = torch.full((4096, 1), 3.0, dtype=torch.bfloat16)
    mean, variance, _ = batch_moments(x)
    assert mean.dtype is torch.float32
    assert mean.item() == 3.0
    assert variance.item() == 0.0
    assert wide(x).dtype is torch.float32
    assert wide(x.double()).dtype is torch.float64


def test_views_broadcast_over_channels():
    x = torch.zeros(2, 3, 4, 5)
    assert (x + per_channel(torch.arange(3.0), x))[1, 2, 3, 4] == 2.0
    assert per_channel(torch.arange(3.0), torch.zeros(2, 3)).shape == (3,)


@pytest.mark.parametrize(
    ("name", "value"),
    [("running_mean", math.nan), ("running_var", -1.0), ("running_var", math.inf)],
)
def test_broken_statistics_are_not_loaded(name, value):
    model = nn.Sequential(SynchronizedBatchNorm(2))
    state = model.state_dict()
    state[f"0.{name}"] = torch.tensor([1.0, value])
    message = rf"SynchronizedBatchNorm\.load_state_dict\(0\.{name}\): expected finite statistics"
    with pytest.raises(ValueError, match=message):
        model.load_state_dict(state)
    assert torch.equal(model[0].running_mean, torch.zeros(2))
    state[f"0.{name}"] = torch.tensor([1.0, 2.0])
    copy.deepcopy(model).load_state_dict(state)
    pickle.loads(pickle.dumps(model)).load_state_dict(state)


@pytest.mark.parametrize("momentum", [-0.1, 1.5, math.nan])
def test_momentum_out_of_range(momentum):
    with pytest.raises(ValueError, match=r"SynchronizedBatchNorm\(momentum=.*from 0 to 1, or None"):
        SynchronizedBatchNorm(2, momentum=momentum)
    SynchronizedBatchNorm(2, momentum=None)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 4), r"expected shape \(N, 3, \*\), got \(2, 4\)"),
        (torch.zeros(3), r"got \(3,\)"),
        (torch.zeros(2, 3, dtype=torch.int32), "expected floating point, got torch.int32"),
        (torch.zeros(0, 3), "expected at least one value"),
    ],
)
def test_wrong_input(x, message):
    with pytest.raises(ValueError, match=r"layer\(input\): .*" + message):
        check_channels("layer", x, 3)
