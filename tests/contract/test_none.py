"""The bias that stands where a BatchNorm stood, then the contract."""

import pytest
import torch
from torch import nn

from normlab.method import Setting, Unsuitable
from normlab.norms.none import METHOD, ChannelBias
from normlab.testing import LAYER_CHECKS, LayerCase


def oracle(layer: ChannelBias, x: torch.Tensor) -> torch.Tensor:
    """One channel at a time."""
    return torch.stack([x[:, c] + layer.bias[c] for c in range(x.shape[1])], dim=1).detach()


CASE = LayerCase(lambda: ChannelBias(4), [(5, 4), (5, 4, 6), (5, 4, 3, 5), (3, 4, 2, 3, 2)], oracle)


@pytest.mark.parametrize("check", LAYER_CHECKS, ids=lambda check: check.__name__)
def test_contract(check):
    check(CASE)


def test_it_starts_as_the_identity():
    x = torch.randn(3, 4, 2)
    assert torch.equal(ChannelBias(4)(x), x)


def test_it_is_the_bias_the_convolution_would_have():
    said = []
    setting = Setting(batches=((torch.randn(4, 3, 5, 5), torch.zeros(4)),), say=said.append)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU())
    model = METHOD.prepare(model, setting)
    assert said == ["1 BatchNorm layers became channel biases"]
    with torch.no_grad():
        model[1].bias.uniform_(-1, 1)
    x = setting.batches[0][0]
    expected = nn.functional.conv2d(x, model[0].weight, model[1].bias).relu()
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(Unsuitable, match="none"):
        METHOD.prepare(nn.Sequential(nn.Linear(3, 5)), setting)
