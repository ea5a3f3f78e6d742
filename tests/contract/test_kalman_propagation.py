"""Moments carried through layers against what the layers make of many random maps."""

import math

import pytest
import torch
from torch import nn

from normlab.norms.kalman_filter import Posterior
from normlab.norms.kalman_propagation import can_propagate, propagate

PRIOR = Posterior(
    torch.tensor([0.5, -1.0, 0.0, 2.0]).double(), torch.tensor([1.0, 0.5, 2.0, 0.3]).double()
)


def conv(*args, **kwargs):
    layer = nn.Conv2d(*args, **kwargs).double()
    nn.init.uniform_(layer.bias, 0.2, 0.6)
    return layer


def rectified(mean, variance):
    """Mean and variance of max(0, X) by a fine sum over the density."""
    x = torch.linspace(-12, 12, 50_001, dtype=torch.float64) * math.sqrt(variance) + mean
    density = torch.exp(-((x - mean) ** 2) / (2 * variance))
    density /= density.sum()
    first = (density * x.relu()).sum()
    return first, (density * x.relu() ** 2).sum() - first**2


def measured(layers, space, samples=20_000):
    """Moments of the centre of what the layers make of random maps."""
    torch.manual_seed(0)
    shape = (samples, 4, *space)
    view = (1, 4, *[1] * len(space))
    x = torch.randn(shape, dtype=torch.float64) * PRIOR.variance.sqrt().view(view)
    x = x + PRIOR.mean.view(view)
    for layer in layers:
        x = layer(x)
    centre = x[(slice(None), slice(None), *(size // 2 for size in x.shape[2:]))]
    return Posterior(centre.mean(0), centre.var(0))


def test_the_sheets_rectified_normal():
    mean, variance = propagate(
        Posterior(torch.zeros(1).double(), torch.ones(1).double()), [nn.ReLU()]
    )
    assert mean.item() == pytest.approx(0.398942, abs=1e-6)
    assert variance.item() == pytest.approx(0.340845, abs=1e-6)


@pytest.mark.parametrize(("mean", "variance"), [(0.5, 1.0), (-2.0, 0.7), (3.0, 4.0), (0.0, 1e-3)])
def test_rectified_moments(mean, variance):
    values = [torch.tensor([value], dtype=torch.float64) for value in (mean, variance)]
    actual = propagate(Posterior(*values), [nn.ReLU()])
    for one, expected in zip(actual, rectified(mean, variance), strict=True):
        assert one.item() == pytest.approx(expected.item(), rel=1e-6)


def test_far_from_zero_nothing_cancels_in_single_precision():
    prior = Posterior(torch.tensor([1e4, -1e4]), torch.ones(2))
    mean, variance = propagate(prior, [nn.ReLU()])
    torch.testing.assert_close(mean, torch.tensor([1e4, 0.0]))
    torch.testing.assert_close(variance, torch.tensor([1.0, 0.0]))


# Weights of a seed of their own: what else is collected must not decide what is measured.
with torch.random.fork_rng(devices=[]):
    torch.manual_seed(0)
    CHAINS = {
        "convolution": ([conv(4, 3, 3)], (3, 3)),
        "grouped": ([conv(4, 6, 3, groups=2, stride=2)], (5, 5)),
        "relu and convolution": ([nn.ReLU(), conv(4, 3, 3, dilation=2)], (5, 5)),
        "linear": ([nn.ReLU(), nn.Linear(4, 3).double()], ()),
        "flattened": ([nn.Flatten(), nn.Linear(16, 3).double()], (2, 2)),
        "average": ([nn.ReLU(), nn.AvgPool2d((2, 3)), nn.Conv2d(4, 2, 1).double()], (2, 3)),
        "maximum": ([nn.ReLU(inplace=True), nn.MaxPool2d(3), nn.Conv2d(4, 2, 1).double()], (3, 3)),
        "maximum alone": ([nn.MaxPool1d(4)], (4,)),
        "dropout": ([nn.ReLU(), nn.Dropout(0.3), nn.Conv1d(4, 2, 1).double()], (1,)),
        "no dropout": ([nn.Dropout(0.3).eval(), nn.Sequential(), nn.Identity()], (1,)),
    }


@pytest.mark.parametrize(("layers", "space"), CHAINS.values(), ids=CHAINS)
def test_analytic_moments_are_those_of_samples(layers, space):
    with torch.no_grad():
        mean, variance = propagate(PRIOR, layers)
        expected = measured(layers, space)
    deviation = expected.variance.sqrt()
    # 20 000 samples: a mean is off by 0.007 deviations, a variance by about 1.5 %.
    assert ((mean - expected.mean).abs() < 0.025 * deviation).all()
    assert ((variance / expected.variance - 1).abs() < 0.06).all()


def test_sampling_gives_the_analytic_moments_on_a_large_map():
    torch.manual_seed(0)
    layers = [nn.ReLU(), conv(4, 3, 3)]
    with torch.no_grad():
        analytic = propagate(PRIOR, layers)
        sampled = propagate(PRIOR, layers, propagation="sample", space=(200, 200))
    assert ((sampled.mean - analytic.mean).abs() < 0.05 * analytic.variance.sqrt()).all()
    assert ((sampled.variance / analytic.variance - 1).abs() < 0.05).all()


def test_sampling_takes_one_map_of_the_size_given():
    layer = conv(4, 3, 3, padding=1)
    torch.manual_seed(5)
    actual = propagate(PRIOR, [nn.ReLU(), layer], propagation="sample", space=(5, 6))
    torch.manual_seed(5)
    noise = torch.randn(1, 4, 5, 6, dtype=torch.float64)
    deviation = PRIOR.variance.sqrt().reshape(1, 4, 1, 1)
    maps = layer((PRIOR.mean.reshape(1, 4, 1, 1) + deviation * noise).relu())
    torch.testing.assert_close(actual.mean, maps.mean((0, 2, 3)))
    torch.testing.assert_close(actual.variance, maps.var((0, 2, 3), correction=0))


def test_sampling_without_space_draws_many():
    torch.manual_seed(0)
    sampled = propagate(PRIOR, [nn.Linear(4, 3).double()], propagation="sample")
    assert (sampled.variance > 0).all()


@pytest.mark.parametrize("propagation", ["analytic", "sample"])
def test_a_scale_that_starts_at_zero_has_finite_gradients(propagation):
    scale = torch.zeros(4, requires_grad=True)
    shift = torch.tensor([0.0, 1.0, -1.0, 0.0], requires_grad=True)
    layers = [nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 2, 1)]
    prior = Posterior(shift, scale.square())
    mean, variance = propagate(prior, layers, propagation=propagation, space=(4, 4))
    (mean.sum() + variance.sum()).backward()
    assert torch.isfinite(scale.grad).all()
    assert torch.isfinite(shift.grad).all()


def test_gradients_through_moments_and_weights():
    class Carry(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = conv(4, 2, 3, groups=2)

        def forward(self, *prior):
            layers = [nn.ReLU(), nn.MaxPool2d(2), self.layer]
            return tuple(propagate(Posterior(*prior), layers))

    carry = Carry()

    def run(mean, variance, weight, bias):
        values = {"layer.weight": weight, "layer.bias": bias}
        return torch.func.functional_call(carry, values, (mean, variance))

    inputs = [*PRIOR, carry.layer.weight, carry.layer.bias]
    assert torch.autograd.gradcheck(run, [one.detach().clone().requires_grad_() for one in inputs])


def test_a_full_covariance_counts_by_its_diagonal():
    full = Posterior(PRIOR.mean, torch.diag(PRIOR.variance) + 0.1 * (1 - torch.eye(4).double()))
    layers = [nn.ReLU(), conv(4, 3, 3)]
    torch.testing.assert_close(propagate(full, layers), propagate(PRIOR, layers))


def test_half_precision_weights_and_autocast_keep_wide_moments():
    layer = nn.Conv2d(4, 3, 3)
    prior = Posterior(*(one.float() for one in PRIOR))
    expected = propagate(prior, [nn.ReLU(), layer])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(propagate(prior, [nn.ReLU(), layer]), expected)
    for propagation in ("analytic", "sample"):
        half = propagate(prior, [layer.bfloat16()], propagation=propagation, space=(9, 9))
        assert {one.dtype for one in half} == {torch.float32}


def test_forward_hooks_do_not_see_random_maps():
    layer, seen = conv(4, 3, 3), []
    layer.register_forward_hook(lambda *_: seen.append(1))
    propagate(PRIOR, [layer], propagation="sample", space=(5, 5))
    assert not seen


@pytest.mark.parametrize(
    "layer",
    [nn.Tanh(), nn.ConvTranspose2d(4, 4, 2), nn.Sequential(nn.ReLU()), nn.AdaptiveAvgPool2d(1)],
)
def test_other_layers_are_refused(layer):
    assert not can_propagate(layer)
    with pytest.raises(
        ValueError, match=f"expected convolutions.*got {type(layer).__name__}; start"
    ):
        propagate(PRIOR, [layer])


@pytest.mark.parametrize("layer", [nn.Conv2d(5, 3, 1), nn.Linear(6, 3)])
def test_weights_for_other_channels_are_refused(layer):
    with pytest.raises(ValueError, match=r"for 4 channels, got [56]; give"):
        propagate(PRIOR, [layer])


def test_an_unknown_propagation_is_refused():
    with pytest.raises(ValueError, match="expected 'analytic' or 'sample', got 'exact'"):
        propagate(PRIOR, [], propagation="exact")
