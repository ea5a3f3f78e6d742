"""The data-dependent start: mean 0 and variance 1 everywhere, as BatchNorm would give them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from normlab.norms.batch_layer_norm import BatchLayerNorm
from normlab.norms.batch_norm import SynchronizedBatchNorm
from normlab.weights.mean_only_batch_norm import MeanOnlyBatchNorm
from normlab.weights.weight_norm_parametrization import weight_normalize, weight_normed
from normlab.weights.weight_norm_start import data_dependent_start


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def outputs_of(model, *inputs):
    """What each weight-normalised layer gives, call by call."""
    seen = {}
    handles = [
        one.layer.register_forward_hook(
            lambda m, i, o, name=one.name: seen.setdefault(name, []).append(o.detach())
        )
        for one in weight_normed(model)
    ]
    model(*inputs)
    for handle in handles:
        handle.remove()
    return seen


def assert_standard(output, axis=1):
    axes = [other for other in range(output.dim()) if other != axis % output.dim()]
    variance, mean = torch.var_mean(output, axes, correction=0)
    assert mean.abs().max() < 1e-6
    assert (variance - 1).abs().max() < 1e-6


def test_one_linear_layer_becomes_batch_norm():
    layer = weight_normalize(nn.Linear(5, 3)).double()
    x = torch.randn(40, 5, dtype=torch.float64) * 3 + 1
    t = F.linear(x, layer.weight, layer.bias).detach()
    data_dependent_start(layer, x)
    torch.testing.assert_close(layer(x), F.batch_norm(t, None, None, training=True, eps=1e-30))


@pytest.mark.parametrize("bias", [0.0, 0.7])
def test_the_general_form(bias):
    layer = weight_normalize(nn.Linear(5, 3)).double()
    nn.init.constant_(layer.bias, bias)
    (one,) = weight_normed(layer)
    x = torch.randn(40, 5, dtype=torch.float64) - 2
    g, v, weight = (t.detach().clone() for t in (one.length, one.direction, layer.weight))
    t = x @ weight.T + bias
    mean, std = t.mean(0), ((t - t.mean(0)) ** 2).mean(0).sqrt()
    data_dependent_start(layer, x)
    torch.testing.assert_close(one.length, g / std[:, None])
    torch.testing.assert_close(layer.bias, (bias - mean) / std)
    torch.testing.assert_close(layer.weight, weight / std[:, None])
    assert torch.equal(one.direction, v)
    assert all(p.requires_grad and p.grad_fn is None for p in layer.parameters())


class Everything(nn.Module):
    """Nonlinearities, pooling, a residual sum, groups, transposed convolutions and sequences."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.inner = nn.Conv2d(6, 6, 3, padding=1, groups=3)
        self.short = nn.Conv2d(6, 6, 1)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2)
        self.line = nn.Conv1d(4, 3, 3)
        self.tokens = nn.Linear(3, 5)
        self.head = nn.Linear(5, 2)
        self.drop = nn.Dropout(0.5)

    def forward(self, x, *, shift=0.0):
        x = F.relu(self.stem(x + shift))
        x = self.drop(F.max_pool2d(x, 2))
        x = torch.tanh(self.short(x) + self.inner(x))
        x = F.leaky_relu(self.up(input=x)).flatten(2)
        x = F.relu(self.line(x)).transpose(1, 2)
        return self.head(self.drop(F.relu(self.tokens(x))).mean(1))


AXES = {"tokens": -1}


def test_every_layer_of_any_kind():
    model = weight_normalize(Everything().double())
    for one in weight_normed(model):
        nn.init.uniform_(one.layer.bias, -1, 1)
    x = torch.randn(12, 2, 6, 6, dtype=torch.float64) + 1
    start = data_dependent_start(model, x)
    assert start.started == ("stem", "short", "inner", "up", "line", "tokens", "head")
    assert (start.dead, start.unreached, start.repeated, start.without_bias) == ({}, (), (), ())
    assert str(start) == "7 layers start at mean 0 and variance 1"
    for name, (output,) in outputs_of(model.eval(), x).items():
        assert_standard(output, AXES.get(name, 1))


def test_single_precision():
    model = weight_normalize(Everything())
    x = torch.randn(12, 2, 6, 6)
    data_dependent_start(model, x)
    for name, (output,) in outputs_of(model.eval(), x).items():
        assert_standard(output.double(), AXES.get(name, 1))


def test_half_precision_stays_half():
    layer = weight_normalize(nn.Linear(8, 4).bfloat16())
    x = torch.randn(500, 8).bfloat16()
    data_dependent_start(layer, x)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert layer(x).float().var(0).sub(1).abs().max() < 0.05


def test_dead_units_are_set_to_zero_and_reported():
    layer = weight_normalize(nn.Linear(3, 3)).double()
    (one,) = weight_normed(layer)
    with torch.no_grad():
        one.direction[1] = torch.tensor([0.0, 0.0, 2.0])  # sees the constant input only
        layer.bias.fill_(0.5)
    x = torch.randn(20, 3, dtype=torch.float64)
    x[:, 2] = 3.0
    length = one.length[1].item()
    model = nn.Sequential(layer)
    start = data_dependent_start(model, x)
    assert start.dead == {"0": (1,)}
    assert "dead units, which the batch does not move, are at 0: 0: 1" in str(start)
    assert one.length[1].item() == length
    output = layer(x)
    torch.testing.assert_close(output[:, 1], torch.zeros(20, dtype=torch.float64))
    assert_standard(output[:, [0, 2]])


def test_dead_units_without_a_bias_are_said_to_keep_what_they_give():
    layer = weight_normalize(nn.Linear(3, 2, bias=False))
    before = layer(torch.ones(1, 3)).detach()
    start = data_dependent_start(nn.Sequential(layer), torch.ones(20, 3))
    torch.testing.assert_close(layer(torch.ones(1, 3)), before)
    assert start.dead == {"0": (0, 1)}
    assert str(start) == (
        "dead units, which the batch does not move, keep what they give, without a bias: 0: 0, 1. "
        "no bias, so only the variance is set: 0"
    )
    both = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 3), nn.Linear(3, 1))
    report = str(data_dependent_start(weight_normalize(both), torch.ones(20, 3)))
    assert report.startswith("2 layers start at mean 0 and variance 1. dead units, which ")
    assert "are at 0: 1: 0, 1, 2; 2: 0. dead units" in report


@pytest.mark.parametrize("bias", [True, False])
def test_only_layers_with_a_bias_are_said_to_start_at_mean_0(bias):
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.ReLU(), nn.Linear(3, 2, bias=bias))
    report = str(data_dependent_start(weight_normalize(model), torch.randn(30, 4)))
    if bias:
        assert report.startswith("1 layer starts at mean 0 and variance 1. no bias")
    else:
        assert report == "no bias, so only the variance is set: 0, 2"


def test_batch_statistics_of_other_layers_are_those_of_training():
    layer = BatchLayerNorm(3, nominal_batch_size=30, epoch_steps=5)
    model = nn.Sequential(nn.Linear(4, 3), layer, nn.ReLU(), nn.Linear(3, 2))
    weight_normalize(model.double())
    x = torch.randn(30, 4, dtype=torch.float64) * 5
    layer.averages("population").batch[1] = 9.0
    before = copy.deepcopy(layer.state_dict())
    data_dependent_start(model, x)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    assert_standard(outputs_of(model.train(), x)["3"][0])


@pytest.mark.parametrize(("deviation", "dead"), [(0.99e-5, True), (1.01e-5, False)])
def test_where_death_begins(deviation, dead):
    layer = weight_normalize(nn.Linear(1, 1)).double()
    with torch.no_grad():
        weight_normed(layer)[0].length.fill_(deviation)
    x = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    assert bool(data_dependent_start(layer, x).dead) == dead


def test_layers_without_a_bias_keep_their_mean():
    layer = weight_normalize(nn.Linear(4, 3, bias=False)).double()
    x = torch.randn(30, 4, dtype=torch.float64) + 2
    before = layer(x)
    start = data_dependent_start(nn.Sequential(layer), x)
    assert start.without_bias == ("0",)
    assert "no bias, so only the variance is set: 0" in str(start)
    torch.testing.assert_close(layer(x), before / before.std(0, correction=0))


def test_repeated_and_unreached_layers():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.spare = nn.Linear(3, 3), nn.Linear(3, 3)
            self.recurrent = nn.GRU(3, 3)

        def forward(self, x):
            return self.body(F.relu(self.body(x)))

    model = weight_normalize(Twice().double())
    spare = copy.deepcopy(model.spare.state_dict())
    x = torch.randn(30, 3, dtype=torch.float64)
    start = data_dependent_start(model, x)
    assert (start.started, start.repeated, start.unreached) == (("body",), ("body",), ("spare",))
    assert "called several times, the first call decided: body" in str(start)
    assert "not called, left alone: spare" in str(start)
    assert_standard(outputs_of(model, x)["body"][0])
    assert all(torch.equal(model.spare.state_dict()[key], spare[key]) for key in spare)


def test_hooks_of_others_see_what_the_started_layer_gives():
    layer, seen = weight_normalize(nn.Linear(3, 2)).double(), []
    handle = layer.register_forward_hook(lambda m, i, o: seen.append(o))
    x = torch.randn(30, 3, dtype=torch.float64)
    data_dependent_start(layer, x)
    assert_standard(seen[0])
    handle.remove()
    assert not layer._forward_hooks


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 2)
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(6)

    def forward(self, x):
        return self.second(self.drop(self.norm(self.first(x))))


@pytest.mark.parametrize("noise", [False, True])
def test_noise_is_off_unless_asked_for(noise):
    model = weight_normalize(Noisy().double())
    state = copy.deepcopy(model.norm.state_dict())
    model.drop.eval()
    model.train(not noise)
    model.first.train(noise)
    modes = [module.training for module in model.modules()]
    x = torch.randn(30, 6, dtype=torch.float64)
    torch.manual_seed(5)
    data_dependent_start(model, x, noise=noise)
    assert [module.training for module in model.modules()] == modes
    after = model.norm.state_dict()
    assert all(torch.equal(after[key], state[key]) for key in state)
    # With the mask of the pass again, or without one, the last layer is standard.
    model.train(noise)
    model.norm.train()
    torch.manual_seed(5)
    assert_standard(outputs_of(model, x)["second"][0])
    model.train(not noise)
    model.norm.train()
    wrong = outputs_of(model, x)["second"][0].var(0, correction=0)
    assert (wrong - 1).abs().max() > 0.1


def test_batch_statistics_are_those_of_training():
    model = nn.Sequential(nn.Linear(4, 3), SynchronizedBatchNorm(3), nn.ReLU(), nn.Linear(3, 2))
    weight_normalize(model.double())
    x = torch.randn(30, 4, dtype=torch.float64) * 5
    nn.init.constant_(model[1].running_var, 9.0)
    data_dependent_start(model, x)
    assert (model[1].running_var == 9).all()
    assert_standard(outputs_of(model.train(), x)["3"][0])


def test_mean_only_layers_keep_their_shift_and_know_the_mean():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), MeanOnlyBatchNorm(4), nn.ReLU(), nn.Flatten(),
        nn.Linear(16, 3, bias=False), MeanOnlyBatchNorm(3),
    )  # fmt: skip
    weight_normalize(model.double())
    x = torch.randn(30, 2, 4, 4, dtype=torch.float64) + 1
    data_dependent_start(model, x)
    assert not any(norm.bias.any() for norm in (model[1], model[5]))
    assert [norm.num_batches_tracked.item() for norm in (model[1], model[5])] == [0, 0]
    assert [norm.momentum for norm in (model[1], model[5])] == [0.1, 0.1]
    trained = copy.deepcopy(model).train()(x)
    assert_standard(trained)
    torch.testing.assert_close(model.eval()(x), trained)


def test_nothing_changes_where_it_cannot_start():
    model = weight_normalize(Noisy())
    model.norm.eval()

    def refuse(x, error, message):
        state = copy.deepcopy(model.state_dict())
        modes = [module.training for module in model.modules()]
        with pytest.raises(error, match=message):
            data_dependent_start(model, x)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert [module.training for module in model.modules()] == modes
        assert not any(module._forward_hooks for module in model.modules())

    x = torch.randn(30, 6)
    x[3, 2] = torch.nan
    refuse(x, ValueError, "expected finite output of first, got inf or NaN")
    refuse(torch.randn(1, 6), ValueError, "more than one value for each unit of first")
    refuse(torch.randn(6), ValueError, r"got output of shape \(6,\)")
    model.second = weight_normalize(nn.Linear(5, 2))  # raises after the first layer was set
    refuse(torch.randn(30, 6), RuntimeError, "shapes cannot be multiplied")


def test_what_is_not_weight_normalised_alone():
    with pytest.raises(ValueError, match="got Linear without any; call weight_normalize first"):
        data_dependent_start(nn.Linear(2, 2), torch.randn(4, 2))
    with pytest.raises(ValueError, match="GRU without any"):
        data_dependent_start(weight_normalize(nn.GRU(2, 2)), torch.randn(4, 2))
    layer = weight_normalize(nn.Linear(2, 2))
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    with pytest.raises(ValueError, match="got another parametrisation on top"):
        data_dependent_start(layer, torch.randn(4, 2))
