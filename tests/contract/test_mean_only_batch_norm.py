"""Mean-only batch normalisation against its sheet, then the contract of every layer."""

import pytest
import torch
from torch import nn

from normlab.testing import LAYER_CHECKS, LayerCase
from normlab.weights.mean_only_batch_norm import (
    MeanOnlyBatchNorm,
    from_batch_norm,
    mean_only_batch_norm,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def oracle(layer, x):
    """The paper's equation, one channel at a time."""
    y = torch.empty_like(x)
    for c in range(x.shape[1]):
        values = x[:, c]
        mean = values.sum() / values.numel() if layer.training else layer.running_mean[c]
        y[:, c] = values - mean + layer.bias[c]
    return y.detach()


CASE = LayerCase(
    make=lambda: MeanOnlyBatchNorm(4),
    shapes=[(5, 4), (5, 4, 6), (5, 4, 3, 5), (3, 4, 2, 3, 2)],
    oracle=oracle,
    batch_statistics=True,
    eval_differs=True,
)


@pytest.mark.parametrize("check", LAYER_CHECKS, ids=lambda check: check.__name__)
def test_contract(check):
    check(CASE)


@pytest.mark.parametrize("shape", [(8, 3), (8, 3, 4, 5)])
def test_equals_batch_norm_without_the_division(shape):
    x = torch.randn(shape, dtype=torch.float64) * 2 + 1
    axes = [axis for axis in range(x.dim()) if axis != 1]
    std = x.std(axes, correction=0)
    expected = nn.functional.batch_norm(x, None, None, std, training=True, eps=1e-30)
    torch.testing.assert_close(mean_only_batch_norm(x), expected)


def test_the_gradient_is_that_of_the_output_less_its_mean():
    x = torch.randn(6, 3, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    g = torch.randn(6, 3, 4, dtype=torch.float64)
    dx, db = torch.autograd.grad(mean_only_batch_norm(x, bias), (x, bias), g)
    torch.testing.assert_close(dx, g - g.mean((0, 2), keepdim=True))
    torch.testing.assert_close(db, g.sum((0, 2)))


def test_one_sample_gives_the_shift():
    layer = MeanOnlyBatchNorm(3)
    nn.init.normal_(layer.bias)
    x = torch.randn(1, 3, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y[0], layer.bias)
    y.square().sum().backward()
    assert not x.grad.any()
    assert layer.bias.grad.any()


def test_running_mean_of_equal_batches():
    layer = MeanOnlyBatchNorm(3).double()
    x = torch.randn(6, 3, 2, dtype=torch.float64)
    for k in range(1, 5):
        layer(x)
        torch.testing.assert_close(layer.running_mean, (1 - 0.9**k) * x.mean((0, 2)))
    assert layer.num_batches_tracked.item() == 4
    layer.eval()
    before = layer.running_mean.clone()
    torch.testing.assert_close(layer(x), x - before[:, None])
    assert torch.equal(layer.running_mean, before)


@pytest.mark.parametrize("momentum", [0.0, 1.0, None])
def test_momentum(momentum):
    layer = MeanOnlyBatchNorm(3, momentum).double()
    batches = torch.randn(3, 6, 3, dtype=torch.float64)
    for x in batches:
        layer(x)
    means = batches.mean(1)
    expected = {0.0: torch.zeros(3).double(), 1.0: means[-1], None: means.mean(0)}[momentum]
    torch.testing.assert_close(layer.running_mean, expected)


@pytest.mark.parametrize("momentum", [-0.1, 1.1, float("nan")])
def test_momentum_out_of_range(momentum):
    with pytest.raises(ValueError, match="expected a number from 0 to 1, or None"):
        MeanOnlyBatchNorm(3, momentum)


def test_broken_statistics_are_not_loaded():
    layer = MeanOnlyBatchNorm(2)
    state = layer.state_dict() | {"running_mean": torch.tensor([0.0, torch.nan])}
    with pytest.raises(ValueError, match="expected finite statistics"):
        layer.load_state_dict(state)
    assert not layer.running_mean.any()
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict(nn.Linear(2, 2).state_dict())


def test_what_a_batch_norm_hands_on():
    norm = nn.BatchNorm2d(3, momentum=0.3)
    nn.init.normal_(norm.bias)
    norm(torch.randn(4, 3, 2, 2) + 1)
    layer = from_batch_norm(norm)
    assert layer.momentum == 0.3
    assert torch.equal(layer.bias, norm.bias)
    assert torch.equal(layer.running_mean, norm.running_mean)
    assert layer.num_batches_tracked.item() == 1
    bare = from_batch_norm(nn.BatchNorm2d(3, affine=False, track_running_stats=False))
    assert not bare.bias.any()
    assert not bare.running_mean.any()


def test_nothing_is_kept_for_backward():
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    layer = MeanOnlyBatchNorm(4)
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    assert not kept
