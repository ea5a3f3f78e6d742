"""Scaled weight standardisation against the sheet's formula, entry by entry in float64."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from normlab import WeightStandardization, standardize_weight, standardize_weights
from normlab.method import Setting, Unsuitable
from normlab.optim.adaptive_clipping import METHOD as CLIPPING
from normlab.optim.adaptive_clipping import AdaptiveClipping
from normlab.weights.weight_standardization import METHOD


def plain(weight, gain, gamma, eps):
    """The sheet's rule, one filter after the other."""
    filters = []
    for i, one in enumerate(weight):
        count = one.numel()
        mean = one.sum() / count
        deviation = (((one - mean) ** 2).sum() / count).sqrt()
        filters.append(gain[i] * gamma / math.sqrt(count) * (one - mean) / (deviation + eps))
    return torch.stack(filters)


@pytest.mark.parametrize("shape", [(3, 4), (4, 3, 5), (4, 3, 3, 3), (2, 3, 2, 2, 2), (1, 2)])
def test_value_and_gradients(shape):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64).add_(0.5)
    gain = torch.randn(shape[0], generator=generator, dtype=torch.float64)
    slope = torch.randn(shape, generator=generator, dtype=torch.float64)
    arguments = [weight.requires_grad_(), gain.requires_grad_()]
    expected = plain(*arguments, 1.3, 1e-2)
    actual = standardize_weight(*arguments, gamma=1.3, eps=1e-2)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
    for one, other in zip(
        torch.autograd.grad(actual, arguments, slope),
        torch.autograd.grad(expected, arguments, slope),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_second_derivatives():
    weight = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    gain = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(standardize_weight, (weight, gain))


def test_the_sheets_numbers():
    weight = standardize_weight(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    expected = torch.tensor([[-0.670814, -0.223605, 0.223605, 0.670814]])
    torch.testing.assert_close(weight, expected, rtol=0, atol=1e-6)
    assert weight.abs().mean().item() == pytest.approx(0.447210, abs=1e-6)


def test_mean_zero_norm_gain_and_no_memory_of_scale_and_shift():
    weight = torch.randn(5, 3, 3, 3, dtype=torch.float64)
    gain = torch.rand(5, dtype=torch.float64) + 0.5
    standard = standardize_weight(weight, gain, eps=1e-12)
    assert standard.flatten(1).mean(1).abs().max() < 1e-15
    torch.testing.assert_close(standard.flatten(1).square().sum(1), gain.square())
    other = standardize_weight(7 * weight + 3, gain, eps=1e-12)
    torch.testing.assert_close(other, standard)


def test_a_large_mean_costs_no_precision():
    weight = torch.randn(4, 64)
    shifted = (weight + 30).requires_grad_()
    exact = shifted.detach().double().requires_grad_()
    slope = torch.randn(4, 64)
    standardize_weight(shifted).backward(slope)
    plain(exact, torch.ones(4), 1.0, 1e-5).backward(slope.double())
    torch.testing.assert_close(shifted.grad.double(), exact.grad, rtol=1e-3, atol=1e-6)


def test_a_constant_filter_gives_zero_and_no_nan():
    weight = torch.full((2, 6), 3.0, requires_grad=True)
    value = standardize_weight(weight)
    value.backward(torch.ones(2, 6))
    assert torch.equal(value, torch.zeros(2, 6))
    assert torch.isfinite(weight.grad).all()


def test_a_constant_filter_has_the_same_gradient_by_every_way():
    weight = torch.randn(3, 6, dtype=torch.float64)
    weight[1] = 3.0
    weight[2] = 0.0
    weight.requires_grad_()
    slope = torch.randn(3, 6, dtype=torch.float64)
    value = standardize_weight(weight)
    (expected,) = torch.autograd.grad(value, weight, slope, retain_graph=True)
    assert expected.isfinite().all()
    (by_graph,) = torch.autograd.grad(value, weight, slope, create_graph=True)
    by_function = torch.func.grad(lambda w: (standardize_weight(w) * slope).sum())(weight.detach())
    torch.testing.assert_close(by_graph, expected)
    torch.testing.assert_close(by_function, expected)
    (second,) = torch.autograd.grad(by_graph.square().sum(), weight)
    assert second.isfinite().all()


def test_a_convolution_of_zeros_trains_compiled_and_by_its_gradients_norm():
    layer = nn.Conv2d(2, 3, 3)
    nn.init.zeros_(layer.weight)
    standardize_weights(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(torch.randn(2, 2, 4, 4)).square().sum().backward()
    parameters = list(layer.parameters())
    assert all(parameter.grad.isfinite().all() for parameter in parameters)
    loss = layer(torch.randn(2, 2, 4, 4)).square().sum()
    slopes = torch.autograd.grad(loss, parameters, create_graph=True)
    sum(slope.square().sum() for slope in slopes).backward()
    assert all(parameter.grad.isfinite().all() for parameter in parameters)


@pytest.mark.parametrize("constant", ["no gain", "gain", "weight"])
def test_second_derivatives_where_one_argument_is_constant(constant):
    weight = torch.randn(2, 4, dtype=torch.float64, requires_grad=constant != "weight")
    gain = torch.tensor([0.7, 1.2], dtype=torch.float64, requires_grad=constant == "weight")
    free = gain if constant == "weight" else weight
    gain = None if constant == "no gain" else gain
    ones = torch.ones(2, dtype=torch.float64)
    curvatures = []
    for value in (
        standardize_weight(weight, gain),
        plain(weight, ones if gain is None else gain, 1.0, 1e-5),
    ):
        (slope,) = torch.autograd.grad(value.pow(3).sum(), free, create_graph=True)
        curvatures += torch.autograd.grad(slope.square().sum(), free)
    torch.testing.assert_close(*curvatures)


def test_the_gains_are_clipped_unit_by_unit():
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 3)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(3, 2))
    standardize_weights(model)
    gain = layer.parametrizations.weight[0].gain
    assert gain.shape == (3, 1, 1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    AdaptiveClipping(optimizer, [model[2]], clipping=0.02)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    gain.grad.copy_(torch.tensor([5.0, 0.01, 0.0]).view_as(gain))
    optimizer.step()
    torch.testing.assert_close(gain.flatten(), torch.tensor([0.98, 0.99, 1.0]))


def test_the_method_is_clipped_but_for_the_classifier():
    torch.manual_seed(0)
    inputs = torch.randn(2, 2, 3, 3)
    setting = Setting(batches=((inputs, torch.tensor([0, 1])),))
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 1), nn.Flatten())
    method = METHOD + CLIPPING
    model = method.prepare(model, setting)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    method.attach(model, optimizer, setting)
    model(inputs).sum().backward()
    first, last = (
        list(layer.parametrizations.weight.parameters()) for layer in (model[0], model[2])
    )
    for parameter in (*first, *last):
        parameter.grad = torch.ones_like(parameter)
    before = [parameter.detach().clone() for parameter in (*first, *last)]
    optimizer.step()
    moved = [
        (one - parameter).flatten(1).norm(dim=1)
        for one, parameter in zip(before, (*first, *last), strict=True)
    ]
    norms = [one.flatten(1).norm(dim=1) for one in before]
    for step, norm in zip(moved[:2], norms[:2], strict=True):
        torch.testing.assert_close(step, 0.02 * norm, rtol=1e-3, atol=1e-6)
    for step, one in zip(moved[2:], before[2:], strict=True):
        torch.testing.assert_close(step, torch.ones_like(one).flatten(1).norm(dim=1))


def test_a_new_weight_can_be_written():
    layer = nn.Conv2d(2, 3, 3)
    standardize_weights(layer)
    new = torch.randn(3, 2, 3, 3)
    layer.weight = new
    assert torch.equal(layer.parametrizations.weight.original, new)
    assert torch.equal(layer.weight, standardize_weight(new))


def test_unit_variance_goes_through():
    torch.manual_seed(0)
    layer = nn.Conv2d(32, 64, 3, bias=False)
    standardize_weights(layer)
    with torch.no_grad():
        layer.parametrizations.weight[0].gain.fill_(1.5)
    output = layer(torch.randn(16, 32, 12, 12))
    assert output.var().item() == pytest.approx(1.5**2, rel=0.05)


def test_relu_networks_keep_their_variance_with_the_methods_gain():
    torch.manual_seed(0)
    layer = nn.Conv2d(32, 64, 3, bias=False)
    model = METHOD.prepare(layer, Setting(batches=()))
    output = model(torch.randn(16, 32, 12, 12)).relu()
    assert output.var().item() == pytest.approx(1.0, rel=0.06)


def test_a_parametrised_layer_saves_copies_and_becomes_plain_again():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 1), nn.Flatten())
    chosen = standardize_weights(model)
    assert list(chosen) == ["0", "2"]
    assert standardize_weights(model) == {}
    x = torch.randn(2, 2, 5, 5)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    other = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 1), nn.Flatten())
    standardize_weights(other)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), expected)
    for layer in chosen.values():
        parametrize.remove_parametrizations(layer, "weight")
    assert type(model[0]) is nn.Conv2d
    assert torch.equal(model(x), expected)


def test_it_composes_with_another_parametrisation():
    layer = nn.Conv2d(4, 4, 3)
    standardize_weights(layer)
    nn.utils.parametrizations.spectral_norm(layer)
    layer(torch.randn(1, 4, 5, 5)).sum().backward()
    assert layer.parametrizations.weight.original.grad is not None


def test_compiles_once_and_under_autocast():
    layer = nn.Conv2d(3, 4, 3)
    standardize_weights(layer)
    x = torch.randn(2, 3, 6, 6)
    expected = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(layer(x).float(), expected, rtol=0.1, atol=0.1)


def test_half_precision_weights():
    weight = torch.randn(3, 50)
    half = standardize_weight(weight.bfloat16(), torch.ones(3, dtype=torch.bfloat16))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), standardize_weight(weight), rtol=0.05, atol=0.01)


def test_bad_input():
    with pytest.raises(ValueError, match=r"WeightStandardization\(gamma=0\): expected .* above 0"):
        WeightStandardization(4, gamma=0)
    with pytest.raises(ValueError, match="several entries"):
        standardize_weights(nn.Conv2d(1, 4, 1))
    with pytest.raises(Unsuitable, match="weight-norm"):
        METHOD.prepare(nn.Linear(2, 2), Setting(batches=()))


def test_an_optimiser_from_before_is_refused():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU())
    old = torch.optim.SGD(model.parameters(), lr=0.1)
    standardize_weights(model)
    promised = (
        r"weight-standardization\(optimizer\): expected an optimiser of the model's present "
        "parameters, got one built before weight-standardization changed them; build it after"
    )
    with pytest.raises(ValueError, match=promised):
        METHOD.attach(model, old, Setting(batches=()))
    METHOD.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), Setting(batches=()))
