"""Which layers count as BatchNorm is shown by running them, not read from their names."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from normlab.method import Unsuitable
from normlab.norms.batch_norm import SynchronizedBatchNorm
from normlab.surgery.flow import trace_flow
from normlab.surgery.normalisers import (
    find_normalisers,
    make_plain,
    plain_form,
    refuse_wrapped,
)


class NormAct(nn.BatchNorm2d):
    """A fused layer in the manner of timm: norm, dropout, activation in one forward."""

    def __init__(self, num_features, act=nn.ReLU):
        super().__init__(num_features)
        self.drop = nn.Identity()
        self.act = act()

    def forward(self, x):
        x = nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training,
            self.momentum, self.eps,
        )  # fmt: skip
        if self.training:
            self.num_batches_tracked.add_(1)
        return self.act(self.drop(x))


class Twice(nn.BatchNorm2d):
    """A subclass that computes something else under the same name."""

    def forward(self, x):
        return 2 * super().forward(x)


class TwiceInTraining(nn.BatchNorm2d):
    def forward(self, x):
        return (2 if self.training else 1) * super().forward(x)


class Biased(nn.BatchNorm2d):
    """Agrees in its outputs, but keeps other running statistics."""

    def forward(self, x):
        y = super().forward(x)
        if self.training:
            self.running_var.mul_(0.5)
        return y


class Renamed(nn.BatchNorm2d):
    pass


def obstacles(model):
    return {one.name: one.obstacle for one in find_normalisers(model) if one.is_batch_norm}


def trained(layer):
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    return layer


@pytest.mark.parametrize(
    "layer", [NormAct(5), NormAct(5, nn.SiLU), Renamed(5), nn.SyncBatchNorm(5)], ids=repr
)
@pytest.mark.parametrize("training", [True, False])
def test_a_plain_form_computes_the_same(layer, training):
    layer = trained(copy.deepcopy(layer)).train(training)
    x = torch.randn(3, 5, 4, 4) * 2 + 1
    twin = copy.deepcopy(layer)
    plain = plain_form(layer, 4)
    torch.testing.assert_close(plain(x), twin(x))
    norm = next(m for m in plain.modules() if type(m) is nn.BatchNorm2d)
    assert norm.weight is layer.weight
    assert norm.running_mean is layer.running_mean
    torch.testing.assert_close(norm.running_var, twin.running_var)


@pytest.mark.parametrize("kind", [Twice, TwiceInTraining, Biased])
def test_what_computes_more_is_refused(kind):
    assert plain_form(kind(5)) is None
    assert "computes more than BatchNorm" in obstacles(nn.Sequential(kind(5)))["0"]


def test_obstacles_are_named():
    hooked, reparametrised = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    hooked.register_forward_hook(lambda *_: None)
    parametrize.register_parametrization(reparametrised, "weight", nn.Softplus())
    model = nn.Sequential(hooked, reparametrised, nn.LazyBatchNorm1d(), nn.BatchNorm1d(3))
    found = obstacles(model)
    assert "forward hooks" in found["0"]
    assert "re-parametrised" in found["1"]
    assert "lazy" in found["2"]
    assert found["3"] == ""


def test_other_normalisers_are_listed_with_the_reason():
    (layer_norm, group_norm) = find_normalisers(
        nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 3), nn.GroupNorm(1, 3))
    )
    assert (layer_norm.is_batch_norm, layer_norm.obstacle) == (
        False, "it is a LayerNorm, not BatchNorm",
    )  # fmt: skip
    assert group_norm.name == "2"


def test_make_plain_takes_fused_and_synchronised_layers_apart():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), NormAct(4), SynchronizedBatchNorm(4), nn.Flatten(),
        SynchronizedBatchNorm(16), nn.BatchNorm1d(16),
    )  # fmt: skip
    x = torch.randn(3, 3, 2, 2)
    expected = model.eval()(x)
    model, notes = make_plain(model, find_normalisers(model), trace_flow(model, x))
    torch.testing.assert_close(model(x), expected)
    assert [type(m) for m in model[1]] == [nn.BatchNorm2d, nn.Identity, nn.ReLU]
    assert [type(model[place]) for place in (2, 4, 5)] == [
        nn.BatchNorm2d, nn.BatchNorm1d, nn.BatchNorm1d,
    ]  # fmt: skip
    assert notes == [
        "1 NormAct were taken apart first", "2 SynchronizedBatchNorm were taken apart first",
    ]  # fmt: skip


def test_wrapped_models_are_refused_by_name():
    compiled = torch.compile(nn.Linear(2, 2))
    with pytest.raises(Unsuitable, match=r"OptimizedModule.*_orig_mod"):
        refuse_wrapped("convert", compiled)
    with pytest.raises(Unsuitable, match="OptimizedModule at '0'"):
        refuse_wrapped("convert", nn.Sequential(compiled))
    with pytest.raises(Unsuitable, match=r"DataParallel.*\.module"):
        refuse_wrapped("convert", nn.DataParallel(nn.Linear(2, 2)))
    with pytest.raises(Unsuitable, match="TopLevelTracedModule"):
        refuse_wrapped("convert", torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)))
    refuse_wrapped("convert", nn.Linear(2, 2))
