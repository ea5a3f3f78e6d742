"""Layer normalisation as `prepare` sets it up: the plain equation, then the contract."""

import pytest
import torch
from torch import nn

from normlab.method import Setting, Unsuitable
from normlab.norms.layer_norm import METHOD, from_batch_norm
from normlab.testing import LAYER_CHECKS, LayerCase


def oracle(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The equation, one sample at a time."""
    y = torch.empty_like(x)
    for n in range(x.shape[0]):
        mean = x[n].sum() / x[n].numel()
        variance = ((x[n] - mean) ** 2).sum() / x[n].numel()
        for c in range(x.shape[1]):
            standard = (x[n, c] - mean) / torch.sqrt(variance + layer.eps)
            y[n, c] = layer.weight[c] * standard + layer.bias[c]
    return y.detach()


CASES = {
    "flat": LayerCase(
        lambda: from_batch_norm(nn.BatchNorm1d(4, eps=1e-3), flat=True),
        [(5, 4)],
        oracle,
        refuses_wrong_input=False,
    ),
    "maps": LayerCase(
        lambda: from_batch_norm(nn.BatchNorm2d(4), flat=False),
        [(5, 4, 6), (5, 4, 3, 5), (5, 4)],
        oracle,
        refuses_wrong_input=False,
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("check", LAYER_CHECKS, ids=lambda check: check.__name__)
def test_contract(check, case):
    check(case)


class Both(nn.Module):
    """A network with a norm on maps, one on flat input, and one that the pass never reaches."""

    def __init__(self, width=5):
        super().__init__()
        self.conv, self.on_maps = nn.Conv2d(3, width, 1), nn.BatchNorm2d(width, eps=1e-3)
        self.on_flat, self.unused = nn.BatchNorm1d(width), nn.BatchNorm1d(width)

    def forward(self, x):
        return self.on_flat(self.on_maps(self.conv(x)).mean((2, 3)))


def setting(said=None):
    say = (lambda _: None) if said is None else said.append
    return Setting(batches=((torch.randn(4, 3, 2, 2), torch.zeros(4)),), say=say)


def test_the_flow_tells_which_layer():
    said = []
    model = Both()
    with torch.no_grad():
        model.on_maps.weight.uniform_()
        model.on_flat.bias.uniform_()
    weight, bias = model.on_maps.weight.clone(), model.on_flat.bias.clone()
    model = METHOD.prepare(model, setting(said))
    assert type(model.on_maps) is nn.GroupNorm
    assert model.on_maps.num_groups == 1
    assert type(model.on_flat) is nn.LayerNorm
    assert type(model.unused) is nn.GroupNorm
    assert torch.equal(model.on_maps.weight, weight)
    assert torch.equal(model.on_flat.bias, bias)
    assert model.on_maps.eps == 1e-3
    assert said == ["BatchNorm layers became layer normalisation, 1 of them on flat input"]


def test_a_norm_without_affine_gets_one_that_starts_neutral():
    layer = from_batch_norm(nn.BatchNorm1d(3, affine=False), flat=True)
    assert layer.weight.tolist() == [1, 1, 1]
    assert layer.bias.tolist() == [0, 0, 0]


def test_a_single_value_is_refused_and_nothing_changed():
    model = Both(width=1)
    with pytest.raises(Unsuitable, match="on_flat"):
        METHOD.prepare(model, setting())
    assert type(model.on_maps) is nn.BatchNorm2d
    with pytest.raises(Unsuitable, match="layer-norm"):
        METHOD.prepare(nn.Sequential(nn.Conv2d(3, 5, 1)), setting())
