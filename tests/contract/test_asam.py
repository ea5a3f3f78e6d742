"""ASAM against its formula in float64, its invariance, and the contract; the rest: test_sam.py."""

import pytest
import torch
from torch import nn

from normlab.optim.asam import ASAM, METHOD
from normlab.testing import METHOD_CHECKS, MethodCase


def test_the_formula_on_a_quadratic():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    a, w = root @ root.T / 6, torch.randn(6, generator=generator, dtype=torch.float64)
    parts = [nn.Parameter(w[:2].clone()), nn.Parameter(w[2:].view(2, 2).clone())]
    lr, rho, eta = 0.1, 0.3, 0.02
    optimizer = ASAM(torch.optim.SGD(parts, lr=lr), rho, eta=eta)

    def compute():
        optimizer.zero_grad()
        joined = torch.cat([part.flatten() for part in parts])
        loss = joined @ a @ joined / 2
        loss.backward()
        return loss

    optimizer.step(compute)
    g, size = a @ w, w.abs() + eta
    perturbed = w + rho * size.square() * g / (size * g).norm()
    actual = torch.cat([part.detach().flatten() for part in parts])
    torch.testing.assert_close(actual, w - lr * a @ perturbed, rtol=1e-13, atol=1e-13)


def test_it_does_not_matter_how_scale_is_shared_between_layers():
    perturbed = []
    for factor in (1.0, 8.0):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 1, bias=False))
        model.double()
        with torch.no_grad():
            model[0].weight.mul_(factor)
            model[2].weight.div_(factor)
        x = torch.randn(5, 3, dtype=torch.float64)
        model(x).square().sum().backward()
        ASAM(torch.optim.SGD(model.parameters(), lr=0.1), eta=0.0).first_step()
        perturbed.append(model(x).detach())
    torch.testing.assert_close(*perturbed, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("options", [{"rho": -1.0}, {"eta": -1.0}], ids=str)
def test_wrong_options_are_refused(options):
    base = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(ValueError, match=r"ASAM\(.*=-1.0\): expected .*, got -1.0; "):
        ASAM(base, **options)


def network():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)
    )


@pytest.mark.parametrize("check", METHOD_CHECKS, ids=lambda check: check.__name__)
def test_contract(check):
    inputs = torch.randn(8, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    method = METHOD.with_options(rho=0.7)
    check(MethodCase(method, network, inputs, torch.arange(8) % 3, num_classes=3))
