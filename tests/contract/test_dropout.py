"""Dropout against its sheet's identities in float64, then the contract."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from normlab.method import Setting, Unsuitable
from normlab.regularizers.dropout import (
    METHOD,
    GaussianDropout,
    gaussian_dropout,
    monte_carlo,
    project_max_norm_,
)
from normlab.testing import LAYER_CHECKS, METHOD_CHECKS, LayerCase, MethodCase


class Scaled(GaussianDropout):
    """The contract differentiates by parameters; the layer has none, so it is given one."""

    def __init__(self, p):
        super().__init__(p)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return super().forward(self.scale * x)


def oracle(layer: Scaled, x: torch.Tensor) -> torch.Tensor:
    """Noise of mean 1 and variance (1 - keep) / keep on each value, in training only."""
    x = layer.scale.detach() * x
    if not layer.training:
        return x
    keep = 1 - 0.2
    noise = torch.randn(x.shape, dtype=x.dtype)
    return x + x * noise * ((1 - keep) / keep) ** 0.5


LAYER = LayerCase(
    make=lambda: Scaled(0.2),
    shapes=[(5, 4), (5, 4, 6), (5, 4, 3, 5)],
    oracle=oracle,
    eval_differs=True,
    stochastic=True,
    refuses_wrong_input=False,
)


@pytest.mark.parametrize("check", LAYER_CHECKS, ids=lambda check: check.__name__)
def test_layer_contract(check):
    check(LAYER)


@pytest.mark.parametrize("p", [0.2, 0.5])
def test_gaussian_moments(p):
    torch.manual_seed(0)
    count, keep = 1_000_000, 1 - p
    noise = gaussian_dropout(torch.ones(count, dtype=torch.float64), p)
    variance = (1 - keep) / keep
    assert abs(noise.mean().item() - 1) < 5 * math.sqrt(variance / count)
    assert abs(noise.var().item() - variance) < 5 * variance * math.sqrt(2 / count)


def test_gaussian_without_noise():
    x = torch.randn(3, 4)
    assert gaussian_dropout(x, 0.0) is x
    assert gaussian_dropout(x, 0.5, training=False) is x


@pytest.mark.parametrize("p", [-0.1, 1.0, math.nan])
@pytest.mark.parametrize("make", [GaussianDropout, lambda p: gaussian_dropout(torch.ones(2), p)])
def test_gaussian_probability_is_checked(make, p):
    with pytest.raises(ValueError, match=r"expected a probability of dropping.*got.*; "):
        make(p)


def small():
    """Inputs feed a hidden layer, that feeds the classifier."""
    return nn.Sequential(nn.Flatten(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))


def prepared(model=None, inputs=None, **options):
    said = []
    inputs = torch.randn(4, 2, 4) if inputs is None else inputs
    setting = Setting(batches=((inputs, torch.zeros(4)),), say=said.append)
    method = METHOD.with_options(**options)
    return method.prepare(small() if model is None else model, setting), said


def rates(model):
    """The rate in front of each linear layer, by name."""
    return {
        name: layer.input_dropout.p if hasattr(layer, "input_dropout") else 0.0
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
    }


def test_every_linear_but_the_first_is_preceded():
    model, said = prepared()
    assert rates(model) == {"1": 0.0, "3": 0.5}
    assert said == [
        "dropout stands in front of 1 linear layers",
        "layers without new dropout: 1 has the rate 0",
    ]
    assert rates(prepared(p=0.3, input_p=0.2)[0]) == {"1": 0.2, "3": 0.3}
    assert rates(prepared(p=0.0, input_p=0.2)[0]) == {"1": 0.2, "3": 0.0}


def maps():
    """The paper's networks for SVHN in small: convolutions, then linear layers."""
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.MaxPool2d(2)),
        *(nn.ReLU(), nn.ConvTranspose2d(4, 4, 1), nn.Flatten(), nn.Linear(16, 6), nn.Linear(6, 3)),
    )


def all_rates(model):
    """The rate in front of each weight layer, in order, with its kind."""
    found = [m for m in model.modules() if isinstance(m, nn.Linear) or "Conv" in type(m).__name__]
    noises = [getattr(layer, "input_dropout", None) for layer in found]
    return [(None if noise is None else (type(noise), noise.p)) for noise in noises]


def test_the_papers_rates_of_convolutional_networks():
    x = torch.randn(4, 2, 4, 4)
    model, said = prepared(maps(), x, input_p=0.1, conv_p=0.25)
    assert all_rates(model) == [(nn.Dropout, rate) for rate in (0.1, 0.25, 0.25, 0.5, 0.5)]
    assert said == ["dropout stands in front of 2 linear and 3 convolutional layers"]
    assert list(model.state_dict()) == list(maps().state_dict())
    plain, said = prepared(maps(), x)
    assert all_rates(plain) == [None] * 3 + [(nn.Dropout, 0.5)] * 2
    assert said == ["dropout stands in front of 2 linear layers"]
    only, said = prepared(nn.Sequential(nn.Dropout2d(), *maps()[:6]), x, conv_p=0.5, input_p=0.2)
    assert all_rates(only) == [None] + [(nn.Dropout, 0.5)] * 2
    assert said == [
        "dropout stands in front of 2 convolutional layers",
        "layers without new dropout: 1 has its own dropout",
    ]


def test_dropout_of_maps_is_by_value():
    keep = 0.75
    layer = nn.Conv2d(5, 5, 1, bias=False).double()
    model, _ = prepared(
        nn.Sequential(nn.Identity(), layer), torch.randn(2, 5, 4, 4).double(), input_p=1 - keep
    )
    with torch.no_grad():
        layer.weight.copy_(torch.eye(5)[..., None, None])
    x = torch.randn(40, 5, 10, 10, dtype=torch.float64)
    y = model(x).detach()
    mask = (y != 0).double()
    torch.testing.assert_close(y, x * mask / keep)
    for axes, count in (((2, 3), 100), ((0, 1), 200)):  # neither whole maps nor whole positions
        share = mask.mean(axes)
        assert (share - keep).abs().max() < 5 * math.sqrt(keep * (1 - keep) / count)


def test_gaussian_noise_in_place_of_a_mask():
    model, _ = prepared(maps(), torch.randn(4, 2, 4, 4), conv_p=0.25, noise="gaussian")
    rates = [None, 0.25, 0.25, 0.5, 0.5]
    assert all_rates(model) == [rate and (GaussianDropout, rate) for rate in rates]
    with pytest.raises(ValueError, match="expected 'bernoulli' or 'gaussian', got 'normal'; use"):
        prepared(noise="normal")


class Convolutional(nn.Module):
    """Functions stand between the modules; the only linear layer is called by its argument."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv1d(2, 5, 1), nn.Linear(5, 3)

    def forward(self, x):
        return self.fc(input=torch.relu(self.conv(x)).mean(2))


def test_a_linear_layer_behind_a_convolution_does_not_read_the_raw_input():
    model, _ = prepared(Convolutional(), input_p=0.2)
    assert rates(model) == {"fc": 0.5}
    x = torch.randn(64, 2, 4)
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def test_a_normalised_input_is_still_the_raw_input():
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(8), nn.Linear(8, 4), nn.Linear(4, 3))
    assert rates(prepared(model)[0]) == {"2": 0.0, "3": 0.5}


def test_dropout_of_the_models_own_is_kept():
    model = nn.Sequential(
        nn.Linear(8, 4), nn.Dropout(0.1), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)
    )
    model, said = prepared(model, torch.randn(4, 8))
    assert rates(model) == {"0": 0.0, "2": 0.0, "4": 0.5}
    assert "2 has its own dropout" in said[1]


def test_a_linear_layer_that_is_never_called_is_left_alone():
    model = small()
    model.spare = nn.Linear(2, 2)
    model.forward = lambda x: nn.Sequential.forward(model[:4], x)
    model, said = prepared(model)
    assert rates(model)["spare"] == 0.0
    assert "spare is not called" in said[1]


def test_the_mask_is_inverted_dropout_of_units_and_samples():
    keep = 0.7
    layer = nn.Sequential(nn.Linear(200, 200), nn.Linear(200, 200, bias=False)).double()
    model, _ = prepared(layer, torch.randn(4, 200, dtype=torch.float64), p=1 - keep)
    with torch.no_grad():
        model[1].weight.copy_(torch.eye(200))
    x = torch.randn(300, 200, dtype=torch.float64)
    hidden = model[0](x).detach().requires_grad_()
    torch.manual_seed(0)
    y = model[1](hidden)
    mask = (y != 0).double()
    torch.testing.assert_close(y, hidden * mask / keep)
    for share in (mask.mean(0), mask.mean(1)):  # no unit and no sample is always kept or dropped
        assert (share - keep).abs().max() < 5 * math.sqrt(keep * (1 - keep) / 200)
    assert abs(mask.mean().item() - keep) < 4 * math.sqrt(keep * (1 - keep) / mask.numel())
    g = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(y, hidden, g)
    torch.testing.assert_close(gradient, mask * g / keep)


def test_mean_over_masks_equals_evaluation_of_a_linear_net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    model, _ = prepared(model, x)
    expected = model.eval()(x)
    passes = 4000
    outputs = torch.stack([monte_carlo(model, x, 1) for _ in range(passes)])
    error = outputs.std(0) / math.sqrt(passes)
    assert ((outputs.mean(0) - expected).abs() < 5 * error).all()
    torch.manual_seed(1)
    average = monte_carlo(model, x, passes)
    assert ((average - expected).abs() < 5 * error).all()


def test_ridge_identity_over_all_masks():
    """The mean loss over the 64 masks of two samples of three units, each as likely as p says."""
    torch.manual_seed(0)
    x, y = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 1, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 1, bias=False)).double()
    model, _ = prepared(model, x, p=0.2)
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(3))
    keep, w = 0.8, model[1].weight.detach().flatten()
    ridge = (y - x @ w[:, None]).square().sum() + (1 - keep) / keep * (
        w.square() * x.square().sum(0)
    ).sum()
    exact = torch.zeros((), dtype=torch.float64)
    for bits in itertools.product([0.0, 1.0], repeat=6):
        mask = torch.tensor(bits, dtype=torch.float64).reshape(2, 3)
        chance = keep ** sum(bits) * (1 - keep) ** (6 - sum(bits))
        exact += chance * (y - (mask * x / keep) @ w[:, None]).square().sum()
    assert exact.item() == pytest.approx(ridge.item(), rel=1e-12)

    model.train()
    draws = torch.stack([(y - model(x)).square().sum().detach() for _ in range(5000)])
    assert abs(draws.mean() - ridge) < 5 * draws.std() / math.sqrt(len(draws))


def test_max_norm():
    torch.manual_seed(0)
    weight = torch.randn(50, 9, dtype=torch.float64) * torch.linspace(0.1, 3, 50).unsqueeze(1)
    before = weight.clone()
    project_max_norm_([weight], 3.0)
    for old, new in zip(before, weight, strict=True):
        if old.norm() <= 3.0:
            assert torch.equal(new, old)
        else:
            torch.testing.assert_close(new, 3.0 * old / old.norm(), atol=1e-12, rtol=0)
    assert 5 < (before.norm(dim=1) > 3.0).sum() < 45


def test_max_norm_of_units_with_one_weight_each():
    for shape in ((3,), (3, 1), (3, 1, 1)):
        weight = torch.tensor([3.0, -4.0, 0.5]).reshape(shape)
        project_max_norm_([weight], 2.0)
        assert weight.flatten().tolist() == [2.0, -2.0, 0.5]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_max_norm_twice_is_once(dtype):
    torch.manual_seed(0)
    weight = (10 * torch.randn(200, 700)).to(dtype)
    project_max_norm_([weight], 3.0)
    once = weight.clone()
    project_max_norm_([weight], 3.0)
    assert torch.equal(weight, once)
    largest = torch.finfo(dtype).eps + 2e-6
    assert (weight.double().norm(dim=1) / 3 - 1).abs().max() < largest


LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (2, 6)),
    "grouped conv": (lambda: nn.Conv2d(6, 4, 3, groups=2), (2, 6, 4, 4)),
    "transposed conv": (lambda: nn.ConvTranspose1d(6, 4, 3), (2, 6, 4)),
    "grouped transposed conv": (lambda: nn.ConvTranspose2d(6, 4, 3, groups=2), (2, 6, 3, 3)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_max_norm_of_a_model_is_by_output_unit(kind):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer = make().double()
    with torch.no_grad():
        layer.weight.mul_(3)
    y = layer(torch.rand(shape, dtype=torch.float64) + 0.1)
    masks = [
        torch.autograd.grad(y[:, unit].sum(), layer.weight, retain_graph=True)[0] != 0
        for unit in range(4)
    ]
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    bound = sorted(weight[mask].norm().item() for mask in masks)[1]
    project_max_norm_(nn.Sequential(layer), bound)
    assert torch.equal(layer.bias, bias)
    for mask in masks:
        factor = min(1.0, bound / weight[mask].norm().item())
        torch.testing.assert_close(layer.weight.detach()[mask], factor * weight[mask])


def test_max_norm_passes_over_frozen_weights_and_norms():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(9.0)
    model[0].weight.requires_grad_(False)
    project_max_norm_(model, 3.0)
    assert model[0].weight.eq(9).all()
    assert model[1].weight.eq(9).all()
    assert model[2].bias.eq(9).all()
    torch.testing.assert_close(model[2].weight.detach(), torch.full((4, 4), 1.5))


def test_max_norm_option_projects_after_each_step():
    method = METHOD.with_options(max_norm="0.1")
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    setting = Setting(batches=((torch.randn(4, 8), torch.zeros(4)),))
    method.attach(model, optimizer, setting)
    model(torch.randn(4, 8)).square().sum().backward()
    optimizer.step()
    for layer in (model[1], model[3]):
        assert layer.weight.norm(dim=1).max() < 0.1 + 1e-6
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"expected a number above 0"):
            METHOD.with_options(max_norm=bad).attach(model, optimizer, setting)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize(
    "reparametrise", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm]
)
def test_max_norm_refuses_weights_that_cannot_be_set(reparametrise):
    model = small()
    reparametrise(model[3])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    setting = Setting(batches=((torch.randn(4, 8), torch.zeros(4)),))
    before = model[1].weight.detach().clone()
    for project in (
        lambda: project_max_norm_(model, 1e-3),
        lambda: METHOD.with_options(max_norm=1e-3).attach(model, optimizer, setting),
    ):
        with pytest.raises(Unsuitable, match="got 3 with a re-parametrised one, which cannot"):
            project()
    assert torch.equal(model[1].weight, before)
    with pytest.raises(Unsuitable, match="linear or convolutional layers, got LSTM without any"):
        project_max_norm_(nn.LSTM(2, 3), 3.0)


def test_max_norm_says_what_it_leaves_alone():
    model = nn.ModuleDict(
        {"a": nn.MultiheadAttention(4, 2), "l": nn.LSTM(4, 4), "n": nn.LayerNorm(4)}
    )
    said = []
    setting = Setting(batches=((torch.randn(4, 8), torch.zeros(4)),), say=said.append)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    METHOD.with_options(max_norm=3.0).attach(model, optimizer, setting)
    left = "a.in_proj_weight, l.weight_ih_l0, l.weight_hh_l0"
    assert said == [f"max_norm leaves these weights alone: {left}"]
    model = small()
    METHOD.with_options(max_norm=3.0).attach(model, torch.optim.SGD(model.parameters()), setting)
    assert len(said) == 1


class Failing(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop, self.norm, self.fail = nn.Dropout(0.5), nn.BatchNorm1d(3), False
        self.noise = GaussianDropout(0.5)

    def forward(self, x):
        if self.fail:
            raise RuntimeError("no")
        return self.noise(self.drop(self.norm(x)))


@pytest.mark.parametrize("fail", [False, True])
def test_monte_carlo_restores_every_mode(fail):
    model = Failing()
    model.train()
    model.drop.eval()
    model.fail = fail
    before = {name: module.training for name, module in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    if fail:
        with pytest.raises(RuntimeError):
            monte_carlo(model, torch.randn(4, 3), 3)
    else:
        monte_carlo(model, torch.randn(4, 3), 3)
    assert {name: module.training for name, module in model.named_modules()} == before
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), f"{name} moved"


def test_monte_carlo_averages_what_is_asked_for():
    model = Failing().eval()
    x = torch.randn(4, 3)
    torch.manual_seed(0)
    actual = monte_carlo(model, x, 5, transform=lambda y: y.softmax(1))
    torch.manual_seed(0)
    model.drop.train()
    model.noise.train()
    with torch.no_grad():
        expected = torch.stack([model(x).softmax(1) for _ in range(5)]).mean(0)
    torch.testing.assert_close(actual, expected)
    assert not actual.requires_grad
    for wrong in (lambda: monte_carlo(small(), x, 5), lambda: monte_carlo(model, x, 0)):
        with pytest.raises(ValueError, match=r"expected at least one pass.*got.*; "):
            wrong()


def test_weights_go_back_and_forth():
    plain = small()
    model, _ = prepared()
    model.load_state_dict(plain.state_dict())
    x = torch.randn(4, 2, 4)
    assert torch.equal(model.eval()(x), plain(x))
    assert list(model.state_dict()) == list(plain.state_dict())


def test_unsuitable_models():
    with pytest.raises(Unsuitable, match="there is no linear layer"):
        prepared(nn.Flatten())
    with pytest.raises(Unsuitable, match="set input_p"):
        prepared(nn.Sequential(nn.Flatten(), nn.Linear(8, 3)))
    for options in ({"p": 1.0}, {"input_p": -0.5}, {"conv_p": 1.0}):
        with pytest.raises(ValueError, match="expected a probability of dropping"):
            prepared(**options)


def deep():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3)
    )


def case(**options):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(8, 2, 4, generator=generator)
    method = METHOD.with_options(**options)
    return MethodCase(method, deep, inputs, torch.arange(8) % 3, num_classes=3, lr=0.1)


def convolutional_case():
    inputs = torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    method = METHOD.with_options(input_p=0.1, conv_p=0.25, noise="gaussian", max_norm=4.0)
    return MethodCase(method, maps, inputs, torch.arange(8) % 3, num_classes=3, lr=0.05)


CASES = {
    "plain": case(),
    "paper": case(input_p=0.2, max_norm=1.0),
    "convolutional": convolutional_case(),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("check", METHOD_CHECKS, ids=lambda check: check.__name__)
def test_contract(check, case):
    check(case)
