"""What Fixup's general form refuses, and that nothing is changed then."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normlab.inits.fixup import prepare
from normlab.inits.fixup_any import fixup_any_
from normlab.method import Setting, Unsuitable
from normlab.surgery.branches import plan_branches
from residual_networks import Skip

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def two_layers():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


def refused(model, x, reason):
    before, text = copy.deepcopy(model.state_dict()), repr(model)
    with pytest.raises(Unsuitable, match=reason):
        prepare(model, Setting(batches=((x, x),)))
    assert repr(model) == text
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_plan_of_another_model_changes_neither():
    model = nn.Sequential(nn.Linear(8, 8), Skip(two_layers()), nn.Linear(8, 3))
    plan, copied = plan_branches(model, X), copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"expected a plan of this very model.*plan_branches"):
        fixup_any_(copied, plan, Setting(batches=((X, X),)))
    for one in (model, copied):
        assert list(one.state_dict()) == list(before)
        assert all(torch.equal(value, before[name]) for name, value in one.state_dict().items())


def test_weights_that_two_places_share():
    inside = two_layers()
    inside[2].weight = inside[0].weight
    refused(
        nn.Sequential(nn.Linear(8, 8), Skip(inside), nn.Linear(8, 3)),
        X,
        r"one that 1\.branch\.0 and 1\.branch\.2 share, which is zero in one place only",
    )
    one, two = two_layers(), two_layers()
    two[0].weight = one[2].weight
    refused(
        nn.Sequential(nn.Linear(8, 8), Skip(one), Skip(two), nn.Linear(8, 3)),
        X,
        r"one that 1\.branch\.2 and 2\.branch\.0 share",
    )
    branch, stem = two_layers(), nn.Linear(8, 8)
    stem.weight = branch[2].weight
    refused(nn.Sequential(stem, Skip(branch), nn.Linear(8, 3)), X, r"one that 1\.branch\.2 and 0")
    # Ends of two branches may share a weight: it is zero in both.
    one, two = two_layers(), two_layers()
    two[2].weight = one[2].weight
    model = nn.Sequential(nn.Linear(8, 8), Skip(one), Skip(two), nn.Linear(8, 3))
    model = prepare(model, Setting(batches=((X, X),)))
    assert torch.equal(model[1:3](X), X)


class Reading(nn.Module):
    """A readout that has the weight of the stem, or of a table that nobody reads as a layer."""

    def __init__(self, shared):
        super().__init__()
        self.shared, self.block, self.head = shared, Skip(two_layers()), nn.Linear(8, 8)
        self.head.weight = shared.weight

    def forward(self, x):
        x = self.shared(x) if isinstance(self.shared, nn.Linear) else x * self.shared.weight[0]
        return self.head(self.block(x))


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.inner = nn.Parameter(torch.randn(8, 8)), nn.Identity()


def test_a_readout_with_the_weight_of_another_layer():
    refused(Reading(nn.Linear(8, 8)), X, "one that shared and head share|one that head and shared")
    refused(Reading(Table()), X, "one that head and shared share")


class Standardised(nn.Conv2d):
    """Its output is as small as one likes, so that no absolute tolerance finds it."""

    def forward(self, x):
        weight = (self.weight - self.weight.mean()) / self.weight.std()
        return F.conv2d(x, 1e-3 * weight, self.bias, self.stride, self.padding)


class StandardisedLinear(nn.Linear):
    def forward(self, x):
        return F.linear(x, (self.weight - self.weight.mean()) / self.weight.std())


@pytest.mark.parametrize("place", ["stem", "branch", "readout"])
def test_layers_that_undo_the_scaling_of_their_weight(place):
    stem = Standardised if place == "stem" else nn.Conv2d
    inner = Standardised if place == "branch" else nn.Conv2d
    readout = StandardisedLinear if place == "readout" else nn.Linear
    branch = nn.Sequential(inner(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1))
    model = nn.Sequential(
        stem(3, 8, 3), Skip(branch), nn.AdaptiveAvgPool2d(1), nn.Flatten(), readout(8, 4)
    )
    refused(model, IMAGES, "a Standardised.*, which undoes the scaling")


class Padded(nn.Conv2d):
    """Linear in its weight, but a class of its own."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_good_layer_passes_in_any_precision(dtype):
    torch.manual_seed(0)
    branch = nn.Sequential(Padded(16, 64, 3), nn.ReLU(), Padded(64, 16, 3))
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), Skip(branch), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)
    ).to(dtype)
    x = IMAGES.to(dtype)
    model = prepare(model, Setting(batches=((x, x),)))
    assert model[1].branch[0].weight.dtype == dtype
    assert not model(x).any()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
def test_a_weight_that_is_no_parameter():
    branch = two_layers()
    nn.utils.weight_norm(branch[2])
    model = nn.Sequential(nn.Linear(8, 8), Skip(branch), nn.Linear(8, 3))
    with pytest.raises(Unsuitable, match=r"1\.branch\.2.*re-parametrisation"):
        prepare(model, Setting(batches=((X, X),)))
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    nn.utils.parametrizations.weight_norm(attention.out_proj)
    model = nn.Sequential(nn.Linear(8, 8), Attending(attention), nn.Linear(8, 3))
    with pytest.raises(Unsuitable, match=r"1\.attention.*re-parametrisation"):
        prepare(model, Setting(batches=((X[None], X),)))


class Attending(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x):
        return x + self.attention(x, x, x)[0]


def test_scalars_are_not_given_twice():
    setting = Setting(batches=((X, X),))
    model = prepare(nn.Sequential(nn.Linear(8, 8), Skip(two_layers()), nn.Linear(8, 3)), setting)
    plan = plan_branches(model, X)
    for again in (lambda: prepare(model, setting), lambda: fixup_any_(model, plan, setting)):
        with pytest.raises(
            Unsuitable, match=r"got 1\.branch\.0\.fixup_before; prepare a model onc"
        ):
            again()
