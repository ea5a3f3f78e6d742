"""Preconditioned Langevin dynamics: noise and drift against matrices, and what it samples."""

import math

import pytest
import torch
from torch import nn

from normlab.optim.bnp_langevin import BatchNormPreconditionedLangevin

OWN = {"momentum": 1.0, "relative_eps": 0.0, "eps": 0.0, "small_batch_factor": False}


def data(rows=40):
    torch.manual_seed(0)
    return torch.randn(rows, 3).double() * torch.tensor([0.1, 1.0, 10.0]).double() + 5


def explicit(x, square_q=1.0):
    """P over ``[bias, weights]``."""
    matrix = torch.eye(x.shape[1] + 1).double()
    matrix[0, 1:] = -x.mean(0)
    return (
        matrix
        @ torch.diag(torch.cat([torch.ones(1).double(), 1 / x.std(0, correction=0)]))
        / math.sqrt(square_q)
    )


def stacked(layer):
    return torch.cat([layer.bias.detach()[:, None], layer.weight.detach()], 1)


def test_drift_is_the_preconditioned_gradient_of_the_energy():
    x = data()
    model = nn.Linear(3, 4).double()
    before = stacked(model)
    optimizer = BatchNormPreconditionedLangevin(model, 1e-3, 40, temperature=0.0, **OWN)
    gradient = torch.autograd.grad(
        (x @ model.weight.T + model.bias).square().mean(), [model.bias, model.weight]
    )
    gradient = torch.cat([part.view(4, -1) for part in gradient], 1)
    model(x).square().mean().backward()
    optimizer.step()
    matrix = explicit(x)
    expected = before - 0.5e-3 * 40 * gradient @ matrix @ matrix.T
    torch.testing.assert_close(stacked(model), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rows", [40, 2])
def test_noise_has_the_covariance_of_the_preconditioner(rows):
    x = data(rows)
    units = 40_000
    model = nn.Linear(3, units).double()
    options = OWN | {"small_batch_factor": True}
    optimizer = BatchNormPreconditionedLangevin(model, 0.04, 1, temperature=0.5, **options)
    before = stacked(model)
    (0 * model(x).sum()).backward()
    optimizer.step()
    noise = (stacked(model) - before) / math.sqrt(0.04 * 0.5)
    matrix = explicit(x, max(3 / rows, 1))
    expected = matrix @ matrix.T
    # In the coordinates of the normalised layer, where all entries are of one size.
    white = torch.linalg.solve(matrix, noise.T)
    covariance = white @ white.T / units
    torch.testing.assert_close(covariance, torch.eye(4).double(), atol=0.03, rtol=0)
    variance = noise.square().mean(0)
    torch.testing.assert_close(variance, expected.diagonal(), rtol=0.03, atol=0)


def test_it_samples_the_posterior_of_a_regression():
    x = data()
    units, lr = 4000, 0.02
    generator = torch.Generator().manual_seed(2)
    model = nn.Linear(3, units).double()  # each unit is a chain of its own
    torch.manual_seed(1)
    optimizer = BatchNormPreconditionedLangevin(model, lr, 1, generator=generator, **OWN)
    target = (x[:, :1] + torch.randn(40, 1).double()).expand(40, units)
    for _ in range(150):
        optimizer.zero_grad()
        (0.5 * (model(x) - target).square().sum()).backward()
        optimizer.step()
    ones = torch.cat([torch.ones(40, 1).double(), x], 1)
    matrix = explicit(x)
    chains = torch.linalg.solve(matrix, stacked(model).T)
    hessian = (ones @ matrix).T @ (ones @ matrix)
    # The stationary covariance at a finite step; the posterior's own is the inverse alone.
    expected = torch.linalg.inv(hessian) @ torch.linalg.inv(
        torch.eye(4).double() - lr / 4 * hessian
    )
    scale = expected.diagonal().sqrt()
    actual = torch.cov(chains) / scale[:, None] / scale
    torch.testing.assert_close(
        actual, expected / scale[:, None] / scale, atol=5 / math.sqrt(units), rtol=0
    )
    mean = torch.linalg.solve(matrix, torch.linalg.lstsq(ones, target[:, :1]).solution)[:, 0]
    error = (chains.mean(1) - mean) / scale
    assert error.abs().max() < 5 / math.sqrt(units)


def test_other_parameters_take_plain_steps():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.scale = nn.Linear(2, 1), nn.Parameter(torch.ones(20_000))

        def forward(self, x):
            return self.layer(x) * self.scale

    model = Scaled()
    optimizer = BatchNormPreconditionedLangevin(model, 0.01, 1)
    (0 * model(torch.randn(3, 2)).sum()).backward()
    optimizer.step()
    assert model.scale.std().item() == pytest.approx(0.1, rel=0.03)


def test_runs_resume_and_take_closures():
    runs = []
    for closure in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        generator = torch.Generator().manual_seed(5)
        optimizer = BatchNormPreconditionedLangevin(model, 1e-3, 8, generator=generator)
        for step in range(4):
            if step == 2:  # go on with another object from what the first one saved
                saved = optimizer.state_dict()
                optimizer.preconditioner.remove()
                optimizer = BatchNormPreconditionedLangevin(model, 0.5, 1, generator=generator)
                optimizer.load_state_dict(saved)

            def compute(optimizer=optimizer, model=model):
                optimizer.zero_grad()
                loss = model(torch.ones(8, 3)).square().mean()
                loss.backward()
                return loss

            if closure:
                assert optimizer.step(compute) > 0
            else:
                compute()
                optimizer.step()
        runs.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*runs)


@pytest.mark.parametrize(
    "wrong", [{"lr": 0.0}, {"num_samples": 0}, {"temperature": -1.0}, {"momentum": 2.0}], ids=str
)
def test_wrong_options_are_refused(wrong):
    options = {"lr": 0.1, "num_samples": 3} | wrong
    with pytest.raises(ValueError, match=r"expected .*, got .*; give"):
        BatchNormPreconditionedLangevin(nn.Linear(2, 1), **options)
