"""What the finder of scale-free weights makes of biases, masks, sharing, compilers and noise.

Most of it is tested with weight rescaling, in test_weight_rescaling.py.
"""

import copy

import pytest
import torch
from torch import nn

from normlab.optim.weight_rescaling import WeightRescaler
from normlab.surgery.invariance import Twin
from normlab.surgery.scale_free import find_scale_free_weights

CANNOT_MOVE = "running statistics further on cannot move along"


class RootMeanSquare(nn.Module):
    """Normalises each channel of each sample, without taking the mean away."""

    def forward(self, x):
        return x / (x.square().mean((2, 3), keepdim=True) + 1e-12).sqrt()


def network(norm, **options):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, **options), norm, nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)
    )


def inputs():
    return torch.randn(6, 2, 5, 5, generator=torch.Generator().manual_seed(1))


def test_each_filter_moves_with_its_bias_where_the_mean_is_kept():
    model, x = network(RootMeanSquare()), inputs()
    expected, conv = model(x), model[0]
    before = conv.weight.detach().clone(), conv.bias.detach().clone()
    (found,) = find_scale_free_weights(model, x).weights
    assert (found.num_groups, found.biases) == (4, (conv.bias,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    WeightRescaler(optimizer, [found], target_norm=3.0).rescale()
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    factor = 3.0 / before[0].flatten(1).norm(dim=1)
    torch.testing.assert_close(conv.weight.detach(), factor.view(-1, 1, 1, 1) * before[0])
    torch.testing.assert_close(conv.bias.detach(), factor * before[1])


@pytest.mark.parametrize("norm", [RootMeanSquare(), nn.GroupNorm(2, 4)], ids=["own", "group"])
def test_a_frozen_bias_keeps_its_weight_where_it_is(norm):
    model = network(norm)
    model[0].bias.requires_grad_(False)
    found = find_scale_free_weights(model, inputs(), granularity="layer")
    assert not found.weights
    assert found.skipped["0"] == "its bias is frozen"


def test_a_frozen_bias_that_a_normaliser_takes_away_does_not_matter():
    model = network(nn.BatchNorm2d(4))
    model[0].bias.requires_grad_(False)
    assert [one.name for one in find_scale_free_weights(model, inputs()).weights] == ["0"]


def test_a_bias_that_the_optimiser_does_not_hold_keeps_its_weight_where_it_is():
    model = network(nn.GroupNorm(2, 4))
    before = copy.deepcopy(model.state_dict())
    weights = find_scale_free_weights(model, inputs(), granularity="layer").weights
    held = [parameter for parameter in model.parameters() if parameter is not model[0].bias]
    rescaler = WeightRescaler(torch.optim.SGD(held, lr=0.1), weights)
    assert not rescaler.weights
    rescaler.rescale()
    assert all(map(torch.equal, model.state_dict().values(), before.values()))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("granularity", ["filter", "layer"])
def test_masks_in_front_of_running_statistics(bias, granularity):
    model = network(nn.Sequential(nn.Dropout2d(0.3), nn.BatchNorm2d(4)), bias=bias)
    found = find_scale_free_weights(model, inputs(), granularity=granularity)
    assert found.skipped["0"] == CANNOT_MOVE


@pytest.mark.parametrize("granularity", ["filter", "layer"])
def test_layers_of_two_kinds_that_share_a_weight(granularity):
    torch.manual_seed(0)
    conv, transposed = nn.Conv1d(4, 4, 1, bias=False), nn.ConvTranspose1d(4, 4, 1, bias=False)
    transposed.weight = conv.weight
    model = nn.Sequential(conv, nn.BatchNorm1d(4), nn.ReLU(), transposed, nn.BatchNorm1d(4))
    found = find_scale_free_weights(model, torch.randn(6, 4, 3), granularity=granularity)
    assert not found.weights
    assert found.skipped == {"0": "its weight is shared with a layer of another kind"}


def test_noise_is_the_same_whenever_one_looks():
    model = network(nn.Sequential(nn.BatchNorm2d(4), nn.Dropout(0.5)))
    gradients = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        gradients.append(Twin(model, inputs()).of(model[0].weight).grad)
    assert torch.equal(*gradients)


def refuse(*_):
    raise AssertionError("the compiler was asked")


def whole(model):
    return torch.compile(model, backend=refuse)


def part(model):
    model[0] = torch.compile(model[0], backend=refuse)
    return model


def in_place(model):
    model.compile(backend=refuse)
    return model


@pytest.mark.parametrize("how", [whole, part, in_place])
def test_what_is_compiled_runs_as_it_was_written(how):
    model, x = network(nn.BatchNorm2d(4)), inputs()
    convolution = model[0].weight
    found = find_scale_free_weights(how(model), x)
    assert [one.weight for one in found.weights] == [convolution]
    assert list(found.skipped.values()) == ["the outputs change with its scale"]
