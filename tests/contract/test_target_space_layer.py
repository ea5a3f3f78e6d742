"""The dense layer of target space against the hat matrix, and what every target layer refuses."""

import warnings

import pytest
import torch
from torch import nn

from normlab.weights.target_space_layer import TargetLinear
from normlab.weights.target_space_model import TargetSpace


def dense(bias=True, samples=6, **options):
    torch.manual_seed(0)
    layer = TargetLinear(3, 2, samples, bias, **options).double()
    with torch.no_grad():
        layer.targets.copy_(torch.randn(samples, 2, dtype=torch.float64))
    return layer, torch.randn(samples, 3, dtype=torch.float64)


def hat(x, ridge, bias=True):
    ones = torch.ones(len(x), 1, dtype=x.dtype)
    rows = torch.cat([ones, x], dim=1) if bias else x
    gram = rows.T @ rows + ridge * torch.eye(rows.shape[1], dtype=x.dtype)
    return rows @ torch.linalg.inv(gram) @ rows.T, rows


@pytest.mark.parametrize("bias", [True, False])
def test_output_on_the_realisation_is_the_hat_matrix_times_the_targets(bias):
    layer, x = dense(bias, ridge=0.2)
    model = TargetSpace(layer, x, project=False)
    matrix, rows = hat(x, 0.2, bias)
    torch.testing.assert_close(model(x), matrix @ layer.targets)
    solved = layer.solve(x)
    gram = rows.T @ rows + 0.2 * torch.eye(rows.shape[1])
    weights = torch.linalg.inv(gram) @ rows.T @ layer.targets
    torch.testing.assert_close(solved.weight.T, weights[1:] if bias else weights)
    if bias:
        torch.testing.assert_close(solved.bias, weights[0])
    else:
        assert solved.bias is None


def test_weights_are_linear_in_the_targets():
    layer, x = dense()
    before = layer.solve(x)
    shift = torch.randn(3, 2, dtype=torch.float64)
    with torch.no_grad():
        layer.targets.add_(x @ shift)
    with torch.no_grad():
        moved = layer.solve(x).weight - before.weight
        layer.targets.copy_(x @ shift)
        torch.testing.assert_close(moved, layer.solve(x).weight)


def test_relative_ridge_is_multiplied_by_the_rows():
    layer, x = dense(ridge=0.2, relative=True)
    other, _ = dense(ridge=0.2 * 6)
    torch.testing.assert_close(layer.solve(x).weight, other.solve(x).weight)


def test_positions_are_rows():
    torch.manual_seed(0)
    layer = TargetLinear(3, 2, (4, 5)).double()
    flat = TargetLinear(3, 2, 20).double()
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    with torch.no_grad():
        flat.targets.copy_(layer.targets.reshape(20, 2))
    torch.testing.assert_close(layer.solve(x), flat.solve(x.reshape(20, 3)))


def test_float64_solves_in_float64():
    layer, x = dense(ridge=1e-4)
    exact = layer.solve(x).weight
    layer, x = layer.float(), x.float()
    single = layer.solve(x).weight
    layer.float64 = True
    double = layer.solve(x).weight
    assert double.dtype == torch.float32
    assert (double - exact).abs().max() <= (single - exact).abs().max()
    assert not torch.equal(single, double)


def test_half_precision_solves_in_float32():
    layer, x = dense()
    exact = layer.solve(x).weight.float()
    half = layer.to(torch.bfloat16).solve(x.to(torch.bfloat16)).weight
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, atol=0.03, rtol=0.03)


def test_initial_targets_are_normal_and_cut_at_two_deviations():
    layer = TargetLinear(2, 100, 200, init_std=0.5)
    targets = layer.targets.detach()
    assert targets.abs().max() <= 1.0
    # The standard deviation of a normal one that is cut at two.
    assert targets.std().item() == pytest.approx(0.5 * 0.8796, rel=0.02)
    again = [
        TargetLinear(2, 3, 4, generator=torch.Generator().manual_seed(5)).targets for _ in range(2)
    ]
    assert torch.equal(*again)


def test_one_sample_gives_weights_of_rank_one():
    layer, x = dense(samples=1, ridge=0.01)
    assert torch.linalg.matrix_rank(layer.solve(x).weight) == 1


def test_a_layer_by_itself_asks_for_a_realisation():
    layer, x = dense()
    with pytest.raises(
        ValueError, match=r"TargetLinear\(x\): expected weights solved.*TargetSpace"
    ):
        layer(x)


def test_a_second_call_in_a_pass_is_refused():
    layer = TargetLinear(3, 3, 6)
    with pytest.raises(ValueError, match=r"expected one call.*second one; use an ordinary layer"):
        TargetSpace(nn.Sequential(layer, layer), torch.randn(6, 3))
    assert layer._pass is None
    assert layer._solved is None


def test_a_realisation_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"targets \(6, 2\), got \(5, 2\); make the layer"):
        TargetSpace(TargetLinear(3, 2, 6), torch.randn(5, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ridge": -0.1}, r"TargetLinear\(ridge=-0\.1\): expected.*; use"),
        ({"ridge": float("nan")}, r"finite number of at least 0, got nan"),
        ({"mode": "hopeful"}, r"expected 'sequential' or 'optimistic', got 'hopeful'"),
        ({"rows": 0}, r"all at least 1, got targets of shape \(0, 2\)"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TargetLinear(3, 2, **{"rows": 6, **options})


def test_zero_ridge_warns_once_when_the_layer_is_made():
    with pytest.warns(UserWarning, match="a ridge of 0 takes the pseudo-inverse"):
        layer, x = dense(ridge=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.solve(x)
