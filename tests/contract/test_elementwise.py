"""The activation methods: functions in float64, what is swapped and what not, the contract."""

import math

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from normlab.activations.elementwise import (
    ELU,
    GELU,
    LEAKY_RELU,
    METHODS,
    RELU,
    SELU,
    SILU,
    swap_activations,
)
from normlab.activations.srelu import SReLU, srelu
from normlab.lab.models.inception import InceptionV3
from normlab.method import Setting, Unsuitable
from normlab.norms import none
from normlab.testing import METHOD_CHECKS, MethodCase

POINTS = (-20.0, -1.0, -1e-8, 0.0, 1e-8, 3.0)
KINDS = {
    "relu": nn.ReLU,
    "leaky-relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}


def setting(inputs, said=None):
    say = (lambda _: None) if said is None else said.append
    return Setting(batches=((inputs, torch.zeros(len(inputs))),), say=say)


def one(method):
    """The activation that the method puts in place of a ReLU."""
    model = method.prepare(nn.Sequential(nn.Linear(1, 1), nn.ReLU()), setting(torch.zeros(2, 1)))
    return model[1]


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_elu_and_its_derivative(alpha):
    x = torch.tensor(POINTS, dtype=torch.float64, requires_grad=True)
    y = one(ELU.with_options(alpha=alpha))(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    for point, value, derivative in zip(POINTS, y.tolist(), slope.tolist(), strict=True):
        expected = point if point > 0 else alpha * math.expm1(point)
        assert value == pytest.approx(expected, rel=1e-15, abs=1e-300)
        assert derivative == pytest.approx(1.0 if point > 0 else alpha * math.exp(point), rel=1e-15)
        if point < 0:
            assert derivative == pytest.approx(value + alpha, rel=1e-7, abs=1e-9)
    assert (y >= -alpha).all()
    assert y[0].item() == pytest.approx(-alpha, abs=1e-8)
    assert slope[0] < 1e-8


def test_elu_gradients_and_the_limit_of_small_alpha():
    x = torch.tensor([-3.0, -0.5, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    assert gradcheck(one(ELU), x)
    small = one(ELU.with_options(alpha=1e-12))(x)
    torch.testing.assert_close(small, torch.relu(x), atol=1e-11, rtol=0)


def test_gaussian_moments():
    x = torch.randn(4_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = one(ELU)(x)
    error = 4 / math.sqrt(len(x))
    normal = 0.5 * math.erfc(1 / math.sqrt(2))
    mean = 1 / math.sqrt(2 * math.pi) + math.exp(0.5) * normal - 0.5
    assert mean == pytest.approx(0.1605, abs=5e-5)
    assert y.mean().item() == pytest.approx(mean, abs=error)
    assert y.square().mean().item() == pytest.approx(0.6449, abs=2 * error)
    assert y.var().item() == pytest.approx(0.6192, abs=2 * error)
    assert one(RELU)(x).mean().item() == pytest.approx(0.3989, abs=error)


def test_the_other_functions():
    x = torch.tensor([-2.0, -0.5, 0.0, 1.5], dtype=torch.float64)
    scale, alpha = 1.0507009873554805, 1.6732632423543772
    expected = [
        (RELU, x.clamp(min=0)),
        (LEAKY_RELU.with_options(negative_slope=0.2), torch.where(x > 0, x, 0.2 * x)),
        (SELU, scale * torch.where(x > 0, x, alpha * (x.exp() - 1))),
        (GELU, x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))),
        (SILU, x / (1 + torch.exp(-x))),
    ]
    for method, value in expected:
        torch.testing.assert_close(one(method)(x), value, rtol=1e-12, atol=1e-12)
    tanh = one(GELU.with_options(approximate="tanh"))(x)
    torch.testing.assert_close(tanh, nn.functional.gelu(x, approximate="tanh"), rtol=0, atol=0)


def test_srelu():
    x = torch.tensor([-20.0, -1.5, -0.5, 0.0, 3.0], dtype=torch.float64, requires_grad=True)
    y = SReLU()(x)
    assert y.tolist() == [max(-1.0, value) for value in x.tolist()]
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [0, 0, 1, 1, 1]
    assert torch.equal(srelu(x), torch.relu(x + 1) - 1)


def test_srelu_takes_the_place_of_others_and_gives_it_back():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ELU())
    model = swap_activations(model, SReLU, setting(torch.zeros(2, 3)), "srelu")
    assert [type(layer) for layer in model[1::2]] == [SReLU, SReLU]
    model = ELU.prepare(model, setting(torch.zeros(2, 3)))
    assert [type(layer) for layer in model[1::2]] == [nn.ELU, nn.ELU]


class Branches(nn.Module):
    """One shared activation, some of other kinds, and one called as a function."""

    def __init__(self):
        super().__init__()
        self.act = nn.ReLU(inplace=True)
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 4)
        self.tail = nn.Sequential(nn.BatchNorm1d(4), nn.GELU(), nn.Sigmoid(), nn.Softmax(1))
        self.again = self.act

    def forward(self, x):
        x = self.act(self.first(x))
        return self.tail(torch.relu(self.again(self.second(x))))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.card.name)
def test_all_of_the_kinds_become_one_and_nothing_else(method):
    kind, said = KINDS[method.card.name], []
    model = method.prepare(Branches(), setting(torch.randn(4, 3), said))
    assert type(model.act) is type(model.tail[1]) is kind
    assert model.again is model.act
    assert not getattr(model.act, "inplace", False)
    kept = [type(model.tail[i]) for i in (0, 2, 3)]
    assert kept == [nn.BatchNorm1d, nn.Sigmoid, nn.Softmax]
    assert said[0].startswith("2 activations became")
    assert said[1] == "activations called as functions stay: relu in Branches"


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        return nn.functional.silu(torch.relu(self.fc(x)))


class Unused(Functional):
    def __init__(self):
        super().__init__()
        self.act = nn.ReLU()


def test_what_only_training_calls_is_swapped_but_not_counted():
    said = []
    model = InceptionV3(3, 2, width_percent=1, auxiliary=True)
    model = ELU.prepare(model, setting(torch.randn(2, 2, 75, 75), said))
    assert type(model.AuxLogits.conv0.relu) is nn.ELU
    assert not any(isinstance(module, nn.ReLU) for module in model.modules())
    assert said == [
        "94 activations became ELU(alpha=1.0)",
        "and some that evaluation does not call: AuxLogits.conv0.relu, AuxLogits.conv1.relu",
    ]


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Unused(), "got none that is called, only act and these called as functions: relu in Unus"),
        (Functional(), "called as functions: relu in Functional, silu in Functional; write"),
        (nn.Sequential(nn.Linear(3, 3), nn.Tanh()), "got none; write each activation"),
    ],
)
def test_models_without_activation_modules_are_unsuitable(model, why):
    with pytest.raises(Unsuitable, match=why):
        ELU.prepare(model, setting(torch.zeros(2, 3)))


def test_a_transformer_layer_does_not_fall_back_in_evaluation():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)
    for method in METHODS:
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, activation=nn.ReLU(), batch_first=True)
        layer = method.prepare(layer, setting(x))
        expected = layer(x)
        with torch.no_grad():
            torch.testing.assert_close(layer.eval()(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (ELU, {"alpha": 0.0}),
        (ELU, {"alpha": -1.0}),
        (ELU, {"alpha": math.nan}),
        (ELU, {"alpha": math.inf}),
        (LEAKY_RELU, {"negative_slope": 1.0}),
        (LEAKY_RELU, {"negative_slope": -0.1}),
        (GELU, {"approximate": "erf"}),
    ],
    ids=lambda value: getattr(value, "label", str(value)),
)
def test_wrong_options_are_refused(method, options):
    with pytest.raises(ValueError, match=r"\): expected .*, got .*; use "):
        one(method.with_options(**options))


def network():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)
    )


CASES = {method.label: method for method in (*METHODS, none.METHOD + ELU)}


@pytest.mark.parametrize("label", CASES)
@pytest.mark.parametrize("check", METHOD_CHECKS, ids=lambda check: check.__name__)
def test_contract(check, label):
    inputs = torch.randn(8, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    check(MethodCase(CASES[label], network, inputs, torch.arange(8) % 3, num_classes=3, lr=0.02))
