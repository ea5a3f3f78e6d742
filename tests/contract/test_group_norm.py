"""Group normalisation as `prepare` sets it up: the plain equation, then the contract."""

import pytest
import torch
from torch import nn

from normlab.method import Setting, Unsuitable
from normlab.norms.group_norm import METHOD, fitting_groups, from_batch_norm
from normlab.testing import LAYER_CHECKS, LayerCase


def oracle(layer: nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
    """The equation, one group of one sample at a time."""
    y = torch.empty_like(x)
    size = x.shape[1] // layer.num_groups
    for n in range(x.shape[0]):
        for c in range(x.shape[1]):
            first = c // size * size
            group = x[n, first : first + size]
            mean = group.sum() / group.numel()
            variance = ((group - mean) ** 2).sum() / group.numel()
            standard = (x[n, c] - mean) / torch.sqrt(variance + layer.eps)
            y[n, c] = layer.weight[c] * standard + layer.bias[c]
    return y.detach()


CASES = {
    "two groups": LayerCase(
        lambda: from_batch_norm(nn.BatchNorm2d(6, eps=1e-3), 2),
        [(5, 6, 4), (5, 6, 3, 5), (5, 6)],
        oracle,
        refuses_wrong_input=False,
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("check", LAYER_CHECKS, ids=lambda check: check.__name__)
def test_contract(check, case):
    check(case)


@pytest.mark.parametrize("has_space", [True, False])
@pytest.mark.parametrize("wanted", [1, 5, 32])
def test_the_number_of_groups(has_space, wanted):
    fewest = 2 if has_space else 4
    for channels in range(1, 200):
        groups = fitting_groups(channels, wanted, has_space=has_space)
        assert channels % groups == 0
        assert groups <= wanted
        assert groups == 1 or channels // groups >= fewest
        larger = [g for g in range(groups + 1, wanted + 1) if channels % g == 0]
        assert all(channels // g < fewest for g in larger)


def test_the_papers_network_has_the_papers_groups():
    widths = (64, 128, 256, 512, 1024, 2048)
    assert {fitting_groups(width, 32, has_space=True) for width in widths} == {32}
    with pytest.raises(ValueError, match="expected at least 1, got 0"):
        fitting_groups(64, 0, has_space=True)


def setting(*shape, said=None):
    say = (lambda _: None) if said is None else said.append
    return Setting(batches=((torch.randn(shape), torch.zeros(4)),), say=say)


def test_maps_and_flat_input():
    said = []
    model = nn.Sequential(
        nn.Conv2d(3, 16, 1),
        nn.BatchNorm2d(16, eps=1e-3),
        nn.AdaptiveAvgPool2d(1),
        nn.BatchNorm2d(16),
        nn.Flatten(),
        nn.BatchNorm1d(16),
    )
    with torch.no_grad():
        model[1].weight.uniform_()
        model[1].bias.uniform_()
    weight, bias = model[1].weight.clone(), model[1].bias.clone()
    model = METHOD.prepare(model, setting(4, 3, 2, 2, said=said))
    assert [type(model[i]) for i in (1, 3, 5)] == [nn.GroupNorm] * 3
    assert [model[i].num_groups for i in (1, 3, 5)] == [8, 4, 4]
    assert torch.equal(model[1].weight, weight)
    assert torch.equal(model[1].bias, bias)
    assert model[1].eps == 1e-3
    assert said == ["BatchNorm layers became GroupNorm; numbers of groups: 2 with 4, 1 with 8"]


def test_the_option():
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16))
    method = METHOD.with_options(num_groups="2")
    assert method.prepare(model, setting(4, 3, 2, 2))[1].num_groups == 2
    assert method.label == "group-norm:num_groups=2"


def test_one_value_in_a_group_is_refused():
    model = nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(1))
    with pytest.raises(Unsuitable, match="'1'"):
        METHOD.prepare(model, setting(4, 3))
    assert type(model[1]) is nn.BatchNorm1d
    with pytest.raises(Unsuitable, match="group-norm"):
        METHOD.prepare(nn.Sequential(nn.Linear(3, 5)), setting(4, 3))
