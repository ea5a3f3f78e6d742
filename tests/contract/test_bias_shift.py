"""The bias shift of layers by hand, the unit natural gradient by a full solve, ELU against ReLU."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from normlab.activations.bias_shift import bias_shift, unit_natural_gradient

SEEDS = range(20)


def samples():
    generator = torch.Generator().manual_seed(0)
    activations = torch.randn(50, 4, generator=generator, dtype=torch.float64) + 0.7
    signals = torch.randn(50, generator=generator, dtype=torch.float64)
    return activations, signals, torch.randn(5, generator=generator, dtype=torch.float64)


def test_the_unit_natural_gradient_solves_the_whole_fisher_system():
    activations, signals, gradient = samples()
    extended = torch.cat([activations, torch.ones(50, 1, dtype=torch.float64)], 1)
    fisher = sum(signal**2 * torch.outer(a, a) for signal, a in zip(signals, extended, strict=True))
    expected = torch.linalg.solve(fisher / 50, gradient)
    weight, bias = unit_natural_gradient(activations, signals, gradient[:4], gradient[4])
    torch.testing.assert_close(torch.cat([weight, bias[None]]), expected, rtol=1e-10, atol=1e-12)


def test_without_mean_there_is_no_correction():
    activations, signals, gradient = samples()
    activations, signals = torch.cat([activations, -activations]), torch.cat([signals, signals])
    weight, bias = unit_natural_gradient(activations, signals, gradient[:4], gradient[4])
    squares = signals.square()
    matrix = (activations * squares[:, None]).T @ activations / 100
    expected = torch.linalg.solve(matrix, gradient[:4])
    torch.testing.assert_close(weight, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(bias, gradient[4] / squares.mean(), rtol=1e-12, atol=0)


def test_samples_that_do_not_fix_the_natural_gradient_are_refused():
    activations, signals, gradient = samples()
    few = (activations[:4], signals[:4])
    silent = signals * (torch.arange(50) < 4)
    dead = activations * torch.tensor([1.0, 1.0, 0.0, 1.0])
    constant = activations * torch.tensor([1.0, 1.0, 0.0, 1.0]) + torch.tensor([0.0, 0, 2, 0])
    for given, count in (
        (few, 4),
        ((activations, silent), 50),
        ((dead, signals), 50),
        ((constant, signals), 50),
    ):
        with pytest.raises(
            ValueError, match=rf"span 5 directions, got {count} samples that span 4"
        ):
            unit_natural_gradient(*given, gradient[:4], gradient[4])
    unit_natural_gradient(activations[:5], signals[:5], gradient[:4], gradient[4])


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x):
        return self.fc(input=x)


def test_a_layer_that_is_given_its_input_by_name():
    torch.manual_seed(0)
    model, x, targets = Named(), torch.randn(6, 3), torch.arange(6) % 2
    assert bias_shift(model, x, targets)[0].mean == pytest.approx(x.mean().item(), rel=1e-5)
    plain = bias_shift(nn.Sequential(model.fc), x, targets)[0]
    assert bias_shift(model, x, targets)[0].weighted_mean == plain.weighted_mean


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_by_hand(bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ELU(inplace=True), nn.Linear(4, 2, bias=bias))
    model.double()
    x, targets = torch.randn(6, 3, dtype=torch.float64), torch.arange(6) % 2
    hidden = model[1](model[0](x)).detach()
    logits = model[2](hidden).detach()
    delta = torch.softmax(logits, 1) - F.one_hot(targets, 2)  # of each sample's own loss
    expected = []
    for unit in range(2):
        square = delta[:, unit].square()
        expected.append(((square[:, None] * hidden).mean(0).norm() / square.mean()).item())
    shifts = bias_shift(model, x, targets)
    assert [shift.name for shift in shifts] == ["0", "2"]
    assert shifts[1].mean == pytest.approx(hidden.mean().item())
    assert shifts[1].root_mean_square == pytest.approx(hidden.square().mean().sqrt().item())
    assert shifts[1].weighted_mean == pytest.approx(sum(expected) / 2, rel=1e-10)


@pytest.mark.parametrize(
    "make",
    [
        lambda: (nn.Conv2d(2, 4, 3, padding=1, stride=2, bias=False), (5, 2, 7, 7)),
        lambda: (nn.Conv2d(4, 4, 3, groups=2, dilation=2), (5, 4, 7, 7)),
        lambda: (nn.Conv1d(2, 3, 3), (5, 2, 7)),
    ],
)
def test_a_convolution_by_hand(make):
    """Each unit's weighted mean patch, by unfolding one position at a time with unit kernels."""
    torch.manual_seed(0)
    conv, shape = make()
    model = nn.Sequential(conv, nn.Flatten()).double()
    x = torch.randn(shape, dtype=torch.float64) + 0.3
    y = model[0](x).detach()
    target = torch.randn(y.flatten(1).shape, dtype=torch.float64)
    delta = y - target.view(y.shape)
    entries = conv.weight[0].numel()
    expected = []
    for unit in range(y.shape[1]):
        square = delta[:, unit].square()
        b = []
        for entry in range(entries):
            probe = torch.zeros_like(conv.weight)
            probe[unit].view(-1)[entry] = 1.0
            function = {1: F.conv1d, 2: F.conv2d}[x.dim() - 2]
            arguments = (conv.stride, conv.padding, conv.dilation, conv.groups)
            patch = function(x, probe, None, *arguments)[:, unit].detach()
            b.append((square * patch).mean())
        expected.append((torch.stack(b).norm() / square.mean()).item())
    (shift,) = bias_shift(model, x, target, lambda y, t: (y - t).square().sum() / 2)
    assert shift.weighted_mean == pytest.approx(sum(expected) / len(expected), rel=1e-10)


def test_the_model_stays_as_it_is():
    model = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(), nn.Linear(4, 2)
    )
    model[0].requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    shifts = bias_shift(model, torch.randn(6, 3), torch.arange(6) % 2)
    assert [shift.name for shift in shifts] == ["0", "4"]
    assert all(math.isfinite(shift.weighted_mean) for shift in shifts)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_models_without_layers_are_refused():
    with pytest.raises(ValueError, match="expected linear or convolutional layers"):
        bias_shift(nn.Sequential(nn.Flatten()), torch.randn(2, 3), torch.zeros(2).long())


def hidden_layers(activation, seed, gain):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(512, 128, generator=generator)
    values = []
    for _ in range(8):
        weight = torch.randn(128, 128, generator=generator) * math.sqrt(gain / 128)
        x = activation(x @ weight)
        values.append(x)
    return values


@pytest.mark.parametrize("seed", SEEDS)
def test_elu_brings_means_nearer_to_zero_than_relu(seed):
    """Eight layers of 128: relative to the signal at one gain, plainly at each one's own gain."""
    for elu, relu in zip(
        hidden_layers(F.elu, seed, 2.0), hidden_layers(F.relu, seed, 2.0), strict=True
    ):
        relative = [abs(one.mean().item()) / one.square().mean().sqrt() for one in (elu, relu)]
        assert relative[0] < relative[1]
    for elu, relu in zip(
        hidden_layers(F.elu, seed, 1 / 0.6449), hidden_layers(F.relu, seed, 2.0), strict=True
    ):
        assert abs(elu.mean()) < abs(relu.mean())


def test_the_diagnostic_tells_elu_from_relu():
    torch.manual_seed(0)
    shifts = {}
    x, targets = torch.randn(256, 128), torch.arange(256) % 10
    for kind in (nn.ELU, nn.ReLU):
        torch.manual_seed(1)
        layers = [m for _ in range(8) for m in (nn.Linear(128, 128), kind())]
        model = nn.Sequential(*layers, nn.Linear(128, 10))
        for layer in model[:-1:2]:
            nn.init.kaiming_normal_(layer.weight)
        shifts[kind] = bias_shift(model, x, targets)
    assert len(shifts[nn.ELU]) == 9
    for elu, relu in list(zip(shifts[nn.ELU], shifts[nn.ReLU], strict=True))[1:]:
        assert elu.weighted_mean / elu.root_mean_square < relu.weighted_mean / relu.root_mean_square
