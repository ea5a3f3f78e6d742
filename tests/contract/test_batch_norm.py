"""Batch normalisation against its sheet's equations and properties, then the contract."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn

from normlab.method import Setting, Unsuitable
from normlab.norms.batch_norm import METHOD, SynchronizedBatchNorm, batch_norm, synchronize
from normlab.testing import LAYER_CHECKS, LayerCase
from normlab.testing.layers import matches_the_oracle


def oracle(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The paper's equations, one channel at a time."""
    y = torch.empty_like(x)
    for c in range(x.shape[1]):
        values = x[:, c]
        mean = values.sum() / values.numel()
        variance = ((values - mean) ** 2).sum() / values.numel()
        if not layer.training and layer.running_mean is not None:
            mean, variance = layer.running_mean[c], layer.running_var[c]
        weight, bias = (layer.weight[c], layer.bias[c]) if layer.affine else (1.0, 0.0)
        y[:, c] = weight * (values - mean) / torch.sqrt(variance + layer.eps) + bias
    return y.detach()


PROMISES = {
    "oracle": oracle,
    "batch_statistics": METHOD.card.batch_statistics,
    "batch_of_one": METHOD.card.batch_of_one,
    "eval_differs": METHOD.card.eval_differs,
}
CASES = {
    "torch, 1d": LayerCase(
        lambda: nn.BatchNorm1d(4), [(5, 4), (5, 4, 6)], refuses_wrong_input=False, **PROMISES
    ),
    "torch, 2d": LayerCase(
        lambda: nn.BatchNorm2d(4), [(5, 4, 3, 5)], refuses_wrong_input=False, **PROMISES
    ),
    "synchronised": LayerCase(
        lambda: SynchronizedBatchNorm(4),
        [(5, 4), (5, 4, 6), (5, 4, 3, 5), (3, 4, 2, 3, 2)],
        **PROMISES,
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("check", LAYER_CHECKS, ids=lambda check: check.__name__)
def test_contract(check, case):
    check(case)


def test_without_scale_and_shift():
    layer = partial(SynchronizedBatchNorm, 4, eps=1e-2, momentum=0.4, affine=False)
    matches_the_oracle(LayerCase(layer, [(5, 4, 6)], **PROMISES))


LAYERS = [nn.BatchNorm1d, SynchronizedBatchNorm]


@pytest.fixture
def x():
    return torch.randn(6, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def affine():
    return (
        torch.tensor([0.5, -2.0, 1.5], dtype=torch.float64),
        torch.tensor([0.1, 0.0, -3.0], dtype=torch.float64),
    )


@pytest.mark.parametrize("make", LAYERS)
def test_the_sheets_example(make):
    x = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64).reshape(4, 1)
    layer = make(1).double()
    expected = [-1.34163542, -0.44721181, 0.44721181, 1.34163542]
    assert layer(x).flatten().tolist() == pytest.approx(expected, abs=1e-8)
    assert batch_norm(x).flatten().tolist() == pytest.approx(expected, abs=1e-8)
    assert layer.running_mean.item() == pytest.approx(0.25)
    assert layer.running_var.item() == pytest.approx(1.0666667, abs=1e-7)
    assert layer.num_batches_tracked.item() == 1


def test_the_reference_function_is_the_layer_in_training(x):
    layer = nn.BatchNorm1d(3, eps=1e-3).double()
    with torch.no_grad():
        for parameter, value in zip(layer.parameters(), affine(), strict=True):
            parameter.copy_(value)
    torch.testing.assert_close(batch_norm(x, *affine(), 1e-3), layer(x))


def test_half_precision_takes_statistics_in_single(x):
    half = (100 + x).to(torch.bfloat16)
    y = batch_norm(half)
    assert y.dtype == torch.bfloat16
    expected = batch_norm(half.double())
    torch.testing.assert_close(y.double(), expected, atol=1e-4, rtol=2**-8)


def test_mean_and_variance_of_the_output(x):
    weight, bias = affine()
    y = batch_norm(x, weight, bias, 1e-2)
    v = x.var((0, 2), correction=0)
    torch.testing.assert_close(y.mean((0, 2)), bias)
    torch.testing.assert_close(y.var((0, 2), correction=0), weight**2 * v / (v + 1e-2))


def test_affine_changes_of_the_input_are_removed(x):
    a = torch.tensor([3.0, 0.2, -5.0], dtype=torch.float64).reshape(3, 1)
    b = torch.tensor([-1.0, 10.0, 2.0], dtype=torch.float64).reshape(3, 1)
    torch.testing.assert_close(batch_norm(a * x + b, eps=0.0), a.sign() * batch_norm(x, eps=0.0))
    assert (batch_norm(a * x + b, eps=0.5) - a.sign() * batch_norm(x, eps=0.5)).abs().max() > 0.01


def test_closed_form_gradients(x):
    weight, bias = (value.requires_grad_() for value in affine())
    x.requires_grad_()
    dy = torch.randn(x.shape, dtype=torch.float64)
    eps = 1e-2
    batch_norm(x, weight, bias, eps).backward(dy)

    def mean(values):
        return values.mean((0, 2), keepdim=True)

    with torch.no_grad():
        v = x.var((0, 2), correction=0, keepdim=True)
        xhat = (x - mean(x)) / (v + eps).sqrt()
        g = dy * weight.reshape(3, 1)
        expected = (g - mean(g) - xhat * mean(g * xhat)) / (v + eps).sqrt()
        torch.testing.assert_close(x.grad, expected)
        torch.testing.assert_close(weight.grad, (dy * xhat).sum((0, 2)))
        torch.testing.assert_close(bias.grad, dy.sum((0, 2)))
        torch.testing.assert_close(x.grad.sum((0, 2)), torch.zeros(3, dtype=torch.float64))
        along = 30 * mean(g * xhat) * eps / (v + eps) ** 1.5
        torch.testing.assert_close((x.grad * xhat).sum((0, 2)), along.flatten())


def test_gradient_is_orthogonal_to_the_weights_before(x):
    inputs, dy = x.mT.reshape(-1, 3), torch.randn(30, 4, dtype=torch.float64)

    def gradient(weights):
        weights = weights.clone().requires_grad_()
        batch_norm(inputs @ weights.T, eps=0.0).backward(dy)
        return weights.grad

    weights = torch.randn(4, 3, dtype=torch.float64)
    grad = gradient(weights)
    torch.testing.assert_close((grad * weights).sum(1), torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(gradient(7 * weights), grad / 7)


@pytest.mark.parametrize("make", LAYERS)
def test_samples_depend_on_each_other_in_training_only(make, x):
    layer = make(3).double()
    changed = x.clone()
    changed[1:] += torch.randn(5, 3, 5)
    assert (layer(changed)[0] - layer(x)[0]).abs().max() > 1e-3
    layer.eval()
    assert torch.equal(layer(changed)[0], layer(x)[0])


@pytest.mark.parametrize("make", LAYERS)
def test_momentum_none_averages_batches(make):
    layer = make(3, momentum=None).double()
    batches = torch.randn(5, 8, 3, dtype=torch.float64) * 3 + 1
    for batch in batches:
        layer(batch)
    torch.testing.assert_close(layer.running_mean, batches.mean((0, 1)))
    torch.testing.assert_close(layer.running_var, batches.var(1, correction=1).mean(0))
    # The paper's form of the same: m / (m - 1) times the mean of the biased variances.
    biased = batches.var(1, correction=0).mean(0)
    torch.testing.assert_close(layer.running_var, 8 / 7 * biased)


@pytest.mark.parametrize("make", LAYERS)
def test_one_value_per_channel(make):
    layer = make(3)
    with pytest.raises(ValueError, match=r"more than (1|one) value per channel"):
        layer(torch.randn(1, 3))
    with pytest.raises(ValueError, match=r"more than (1|one) value per channel"):
        layer(torch.randn(1, 3, 1))
    assert layer.eval()(torch.randn(1, 3)).isfinite().all()
    without = make(3, track_running_stats=False).eval()
    with pytest.raises(ValueError, match=r"more than (1|one) value per channel"):
        without(torch.randn(1, 3))


def test_one_value_per_channel_in_the_house_form():
    for function in (SynchronizedBatchNorm(3), batch_norm):
        with pytest.raises(ValueError, match=r"expected .*, got shape \(1, 3\); "):
            function(torch.randn(1, 3))
    with pytest.raises(ValueError, match="more than one value per channel"):
        batch_norm(torch.randn(0, 3))


def test_two_flat_values_become_signs():
    d = torch.tensor([0.3, 4.0, 0.05], dtype=torch.float64)
    x = torch.stack([1 - d, 1 + d])
    expected = d / torch.sqrt(d**2 + 1e-5)
    torch.testing.assert_close(batch_norm(x), torch.stack([-expected, expected]))


def test_state_is_that_of_torch():
    keys = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    theirs = nn.BatchNorm2d(3)
    theirs(torch.randn(4, 3, 2, 2))
    ours = SynchronizedBatchNorm(3)
    assert list(ours.state_dict()) == list(theirs.state_dict()) == keys
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 3, 2, 2)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))
    back = nn.BatchNorm2d(3)
    back.load_state_dict(ours.state_dict())
    assert all(torch.equal(ours.state_dict()[key], back.state_dict()[key]) for key in keys)


def test_alone_it_is_torchs_layer():
    theirs, ours = nn.BatchNorm2d(3, momentum=0.3), SynchronizedBatchNorm(3, momentum=0.3)
    x = torch.randn(4, 3, 2, 2)
    for _ in range(2):
        assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.running_var, theirs.running_var)


def test_synchronize_keeps_everything():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, eps=1e-3, momentum=None), nn.Flatten()
    )
    model.append(nn.Sequential(nn.BatchNorm1d(16, affine=False), nn.BatchNorm1d(16)))
    model[1].requires_grad_(False).eval()
    x = torch.randn(5, 3, 2, 2)
    model(x)
    twin, parameters = copy.deepcopy(model), list(model.parameters())
    assert synchronize(model) is model
    assert [type(model[1]), type(model[3][0]), type(model[3][1])] == [SynchronizedBatchNorm] * 3
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert not model[1].training
    assert model[3].training
    assert not model[1].weight.requires_grad
    assert (model[1].eps, model[1].momentum, model[3][0].affine) == (1e-3, None, False)
    assert torch.equal(model(x), twin(x))
    for (name, one), (same, two) in zip(
        model.state_dict().items(), twin.state_dict().items(), strict=True
    ):
        assert name == same
        assert torch.equal(one, two)


def test_synchronize_keeps_the_dtype_and_replaces_a_shared_layer_once():
    norm = nn.BatchNorm1d(3).double()
    model = synchronize(nn.Sequential(norm, nn.ReLU(), norm))
    assert model[0] is model[2]
    assert model[0].running_mean.dtype == torch.float64
    assert isinstance(synchronize(nn.BatchNorm1d(3)), SynchronizedBatchNorm)
    with pytest.raises(Unsuitable, match="synchronize"):
        synchronize(nn.Linear(2, 2))


def test_the_method_keeps_the_model():
    setting = Setting(batches=((torch.randn(4, 3), torch.zeros(4)),))
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU())
    norm = model[1]
    assert METHOD.prepare(model, setting) is model
    assert model[1] is norm
    with pytest.raises(Unsuitable, match="batch-norm"):
        METHOD.prepare(nn.Sequential(nn.Linear(3, 5)), setting)


def test_noise_of_the_variance():
    generator = torch.Generator().manual_seed(0)
    for m in (4, 16):
        v = torch.randn(m, 20000, generator=generator).var(0, correction=0)
        assert (v.std() / v.mean()).item() == pytest.approx(math.sqrt(2 / (m - 1)), rel=0.05)
