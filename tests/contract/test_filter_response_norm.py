"""Filter response normalisation against its sheet's equations, then the contract."""

import math

import pytest
import torch
from torch import nn

from normlab.catalog import find_method
from normlab.method import Setting
from normlab.norms.filter_response_norm import (
    FRN,
    FilterResponseNorm,
    ThresholdedLinearUnit,
    filter_response_norm,
    ramp_up_factor,
)
from normlab.testing import LAYER_CHECKS, LayerCase


def oracle(layer: FilterResponseNorm, x: torch.Tensor) -> torch.Tensor:
    """The paper's equation, one map at a time."""
    y = torch.empty_like(x)
    for n in range(x.shape[0]):
        for c in range(x.shape[1]):
            eps = layer.eps + (0 if layer.eps_l is None else abs(layer.eps_l[c].item()))
            nu2 = (x[n, c] ** 2).sum() / x[n, c].numel()
            y[n, c] = layer.weight[c] * x[n, c] / torch.sqrt(nu2 + eps) + layer.bias[c]
    return y.detach()


def oracle_with_unit(layer: FRN, x: torch.Tensor) -> torch.Tensor:
    """max(y, tau), as relu(y - tau) + tau."""
    tau = layer[1].threshold.reshape(-1, *[1] * (x.dim() - 2))
    y = oracle(layer[0], x)
    return ((y - tau).clamp(min=0) + tau).detach()


CASES = {
    "maps": LayerCase(
        make=lambda: FilterResponseNorm(4),
        shapes=[(5, 4, 6), (5, 4, 3, 5), (3, 4, 2, 3, 2)],
        oracle=oracle,
    ),
    "points": LayerCase(
        make=lambda: FilterResponseNorm(4, learn_eps="auto", spatial_dims=0),
        shapes=[(5, 4), (5, 4, 1, 1)],
        oracle=oracle,
    ),
    "with unit": LayerCase(
        make=lambda: FRN(4), shapes=[(5, 4, 6), (5, 4, 3, 5)], oracle=oracle_with_unit
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("check", LAYER_CHECKS, ids=lambda check: check.__name__)
def test_contract(check, case):
    check(case)


def test_the_sheets_example():
    x = torch.tensor([3.0, 4.0, 0.0, 0.0], dtype=torch.float64).reshape(1, 1, 4)
    y = filter_response_norm(x, torch.ones(1), torch.zeros(1), 1e-6)
    assert y.flatten().tolist() == pytest.approx([1.2, 1.6, 0, 0], abs=1e-6)
    assert y.flatten()[0].item() == pytest.approx(1.1999999, abs=5e-8)


def test_mean_square_of_the_output():
    x = torch.randn(3, 2, 7, dtype=torch.float64)
    y = filter_response_norm(x, torch.ones(2), torch.zeros(2), 1e-2)
    nu2 = x.square().mean(-1)
    torch.testing.assert_close(y.square().mean(-1), nu2 / (nu2 + 1e-2))


def test_scale_is_removed_and_offset_is_not():
    x = torch.randn(3, 2, 7, dtype=torch.float64)
    layer = FilterResponseNorm(2, eps=1e-30).double()
    torch.testing.assert_close(layer(5 * x), layer(x))
    assert (layer(x + 1) - layer(x)).abs().max() > 0.1


def test_zero_mean_maps_give_instance_norm():
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    x = x - x.mean((2, 3), keepdim=True)
    expected = nn.functional.instance_norm(x, eps=1e-6)
    torch.testing.assert_close(FilterResponseNorm(2, eps=1e-6).double()(x), expected)


def test_gradient_is_orthogonal_to_the_map():
    x = torch.randn(3, 2, 9, dtype=torch.float64, requires_grad=True)
    g = torch.randn(3, 2, 9, dtype=torch.float64)
    eps = 1e-3
    y = filter_response_norm(x, torch.ones(2).double(), torch.zeros(2).double(), eps)
    (grad,) = torch.autograd.grad(y, x, g)
    r2 = x.square().mean(-1) + eps
    expected = eps / r2 * (g * y).sum(-1)
    torch.testing.assert_close((x * grad).sum(-1), expected)


def test_gradient_of_the_learnt_epsilon():
    layer = FilterResponseNorm(2, learn_eps=True, eps_init=-0.2).double()
    x = torch.randn(4, 2, dtype=torch.float64)
    g = torch.randn(4, 2, dtype=torch.float64)
    layer(x).backward(g)
    r = torch.sqrt(x.square() + 1e-6 + 0.2)
    expected = 0.5 * (g * x / r**3).sum(0)  # -sign(eps_l) / 2, and eps_l is negative
    torch.testing.assert_close(layer.eps_l.grad, expected)
    assert (expected != 0).all()


def test_batch_independence_is_exact():
    x = torch.randn(6, 3, 5, 5)
    layer = FRN(3)
    assert torch.equal(layer(x)[2:3], layer(x[2:3]))
    assert torch.equal(layer.eval()(x), layer.train()(x))


def test_unit_limits():
    y = torch.randn(4, 3)
    unit = ThresholdedLinearUnit(3)
    assert torch.equal(unit(y), y.relu())
    with torch.no_grad():
        unit.threshold.fill_(-math.inf)
    assert torch.equal(unit(y), y)


def test_zero_map_gives_the_bias_and_a_finite_gradient():
    layer = FilterResponseNorm(1)
    with torch.no_grad():
        layer.bias.fill_(0.7)
    x = torch.zeros(1, 1, 4, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(layer(x), torch.full((1, 1, 4), 0.7))
    torch.testing.assert_close(x.grad, torch.full((1, 1, 4), 1e3))


@pytest.mark.parametrize("eps", [0.0, -1e-6, math.nan])
def test_eps_must_be_positive(eps):
    with pytest.raises(ValueError, match="expected a number above 0"):
        FilterResponseNorm(3, eps=eps)


def test_state_keys():
    assert set(FilterResponseNorm(3).state_dict()) == {"weight", "bias"}
    assert set(FilterResponseNorm(3, learn_eps=True).state_dict()) == {"weight", "bias", "eps_l"}


def test_ramp_up():
    cosine = [ramp_up_factor(step, 10, 110) for step in (0, 5, 10, 60, 110)]
    assert cosine == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert ramp_up_factor(3, 10, 110, ramp="linear") == pytest.approx(0.3)
    with pytest.raises(ValueError, match="warm_steps"):
        ramp_up_factor(0, 10, 10)


class Residual(nn.Module):
    """A residual block with one ReLU inside the branch and one after the sum."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()
        self.conv2, self.bn2, self.relu2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()
        self.last = nn.ReLU()

    def forward(self, x):
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out)) + x
        return self.last(self.relu2(out).mean((2, 3)))


def test_units_stand_after_norms_and_after_sums_only():
    said = []
    setting = Setting(batches=((torch.randn(4, 3, 2, 2), torch.zeros(4)),), say=said.append)
    model = find_method("filter-response-norm").prepare(Residual(), setting)
    assert isinstance(model.bn1, FilterResponseNorm)
    assert isinstance(model.bn2, FilterResponseNorm)
    assert isinstance(model.relu1, ThresholdedLinearUnit)
    assert isinstance(model.relu2, ThresholdedLinearUnit)
    assert type(model.last) is nn.ReLU
    assert said == ["2 BatchNorm layers became FRN, 2 ReLUs became TLU"]


def test_flat_input_learns_its_epsilon():
    setting = Setting(batches=((torch.randn(4, 3), torch.zeros(4)),))
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU())
    model = find_method("filter-response-norm").prepare(model, setting)
    assert model[1].eps_l is not None
