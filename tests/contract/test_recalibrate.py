"""Running statistics taken anew, against plain averages and pooled moments in float64."""

import copy

import pytest
import torch
from torch import nn

from normlab.norms.batch_norm import SynchronizedBatchNorm, batch_norm, synchronize
from normlab.surgery.recalibrate import recalibrate


def make_model():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 4),
        nn.BatchNorm1d(4, momentum=0.2),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(4, 2),
        nn.BatchNorm1d(2),
    ).double()
    model(torch.randn(5, 3, dtype=torch.float64))
    model[1].eval()
    return model


def make_batches(*sizes):
    torch.manual_seed(1)
    return [torch.randn(size, 3, dtype=torch.float64) * 2 + 1 for size in sizes]


def inputs_of_norms(model, batches):
    """What each norm sees: the layer before it normalises with its own batch, nothing drops."""
    first = [model[0](batch) for batch in batches]
    last = [model[4](batch_norm(x, model[1].weight, model[1].bias).relu()) for x in first]
    return first, last


@pytest.mark.parametrize("change", [lambda model: model, synchronize])
def test_averages_over_batches(change):
    model = change(make_model())
    batches = make_batches(6, 6, 6)
    recalibrate(model, batches)
    for norm, seen in zip((model[1], model[5]), inputs_of_norms(model, batches), strict=True):
        means = torch.stack([x.mean(0) for x in seen])
        variances = torch.stack([x.var(0, correction=1) for x in seen])
        torch.testing.assert_close(norm.running_mean, means.mean(0), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(norm.running_var, variances.mean(0), rtol=1e-10, atol=1e-12)
        assert norm.num_batches_tracked.item() == 3


@pytest.mark.parametrize("change", [lambda model: model, synchronize])
def test_pooled_moments(change):
    model = change(make_model())
    batches = make_batches(6, 3, 9)
    recalibrate(model, batches, pooled=True)
    for norm, seen in zip((model[1], model[5]), inputs_of_norms(model, batches), strict=True):
        values = torch.cat(seen)
        torch.testing.assert_close(norm.running_mean, values.mean(0), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(norm.running_var, values.var(0), rtol=1e-10, atol=1e-12)
        assert norm.num_batches_tracked.item() == 3


def test_pooled_moments_of_maps_in_single_precision():
    norm = nn.BatchNorm2d(2)
    batches = [torch.randn(n, 2, 3, 4) + 300 for n in (2, 5)]
    recalibrate(norm, batches, pooled=True)
    values = torch.cat(batches).double().transpose(0, 1).reshape(2, -1)
    torch.testing.assert_close(norm.running_mean.double(), values.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(norm.running_var.double(), values.var(1), rtol=1e-6, atol=0)
    assert norm.running_mean.dtype == torch.float32


def observed(model):
    return (
        [module.training for module in model.modules()],
        [module.momentum for module in model.modules() if hasattr(module, "momentum")],
        [len(module._forward_pre_hooks) for module in model.modules()],
        [parameter.grad for parameter in model.parameters()],
    )


@pytest.mark.parametrize("pooled", [False, True])
def test_modes_momenta_and_hooks_are_restored(pooled):
    model = make_model()
    before, weights = observed(model), copy.deepcopy(list(model.parameters()))
    recalibrate(model, make_batches(4, 4), pooled=pooled)
    assert observed(model) == before
    assert model[3].training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), weights, strict=True))


@pytest.mark.parametrize("pooled", [False, True])
def test_an_error_changes_nothing(pooled):
    model = make_model()
    before, state = observed(model), copy.deepcopy(model.state_dict())

    def broken():
        yield make_batches(4)[0]
        raise OSError("the disk is gone")

    for batches, error in (
        (broken(), OSError),
        ([*make_batches(4), torch.zeros(4, 7).double()], RuntimeError),
        (make_batches(4, 1), ValueError),
        ([], ValueError),
        ([{"inputs": 1}], ValueError),
    ):
        with pytest.raises(error):
            recalibrate(model, batches, pooled=pooled)
        assert observed(model) == before
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name]), name


def test_pairs_and_tensors_are_the_same():
    one, two, three = make_model(), make_model(), make_model()
    batches = make_batches(4, 4)
    recalibrate(one, batches)
    recalibrate(two, [(batch, torch.zeros(4)) for batch in batches])
    recalibrate(three, [[batch, torch.zeros(4)] for batch in batches])
    for a, b, c in zip(one.buffers(), two.buffers(), three.buffers(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


class Branches(nn.Module):
    """One norm is called by keyword and twice, one never, one has no statistics."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
        self.without = nn.BatchNorm1d(3, track_running_stats=False)
        self.unused.running_mean.fill_(7.0)

    def forward(self, x):
        return self.without(self.used(input=x) + self.used(input=2 * x))


@pytest.mark.parametrize("pooled", [False, True])
def test_a_layer_that_no_batch_reaches_keeps_its_statistics(pooled):
    model = Branches()
    x = torch.randn(5, 3)
    recalibrate(model, [x], pooled=pooled)
    torch.testing.assert_close(model.used.running_mean, 1.5 * x.mean(0))
    assert model.unused.running_mean.tolist() == [7, 7, 7]
    assert model.unused.running_var.tolist() == [1, 1, 1]


def test_messages():
    with pytest.raises(ValueError, match=r"recalibrate\(model\): expected .*; "):
        recalibrate(nn.Linear(2, 2), [torch.zeros(2, 2)])
    with pytest.raises(ValueError, match=r"recalibrate\(batches\): expected at least one .*; "):
        recalibrate(SynchronizedBatchNorm(2), iter([]))
    with pytest.raises(ValueError, match=r"recalibrate\(batches\): expected tensors .*; "):
        recalibrate(SynchronizedBatchNorm(2), [()])
