"""Which module's output goes into which, over any control flow."""

import pytest
import torch
from torch import nn

from normlab.surgery.flow import Sum, evaluating, trace_flow


class Branching(nn.Module):
    def __init__(self, functional=False):
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.ReLU()
        self.inner = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(inplace=True))
        self.last = nn.ReLU()
        self.functional = functional

    def forward(self, x):
        out = self.norm(self.conv(x))
        out = torch.relu(out) if self.functional else self.relu(out)
        for _ in range(2):
            out = self.inner(out)
        return self.last(out + x)


def test_followers_and_predecessors():
    model = Branching()
    flow = trace_flow(model, torch.randn(2, 2, 3, 3))
    assert [call.name for call in flow.followers(model.conv)] == ["norm"]
    assert [call.name for call in flow.followers(model.norm)] == ["relu"]
    assert flow.predecessor(model.norm) is model.conv
    assert flow.predecessor(model.conv) is None
    assert not flow.functional_relus


def test_a_container_hands_on_what_its_last_child_made():
    model = Branching()
    flow = trace_flow(model, torch.randn(2, 2, 3, 3))
    first, second = flow.of(model.inner[0])
    assert first.source.module is model.relu
    assert second.source.module is model.inner[1]


def test_an_addition_is_seen_with_its_terms():
    model = Branching()
    (call,) = trace_flow(model, torch.randn(2, 2, 3, 3)).of(model.last)
    assert isinstance(call.source, Sum)
    assert [getattr(term, "module", None) for term in call.source.terms] == [model.inner[1], None]


def test_a_functional_relu_is_named_with_its_owner():
    model = nn.Sequential(Branching(functional=True))
    (call,) = trace_flow(model, torch.randn(2, 2, 3, 3)).functional_relus
    assert call.owner == "0"
    assert call.sources[0].module is model[0].norm


def test_a_sum_that_a_container_returns_stays_a_sum():
    class Unit(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 1)

        def forward(self, x):
            return x + self.conv(x)

    model = nn.Sequential(Unit(), nn.ReLU())
    (call,) = trace_flow(model, torch.randn(2, 2, 3, 3)).of(model[1])
    assert isinstance(call.source, Sum)


def test_the_model_is_left_as_it_was():
    model = Branching().train()
    model.relu.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trace_flow(model, torch.randn(2, 2, 3, 3))
    assert model.training
    assert not model.relu.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_hooks_and_modes_are_restored_after_an_error():
    model = Branching().train()
    with pytest.raises(RuntimeError):
        trace_flow(model, torch.randn(2, 5, 3, 3))
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_evaluating_restores_each_mode_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())

    def fail() -> None:
        with evaluating(model):
            assert not model[0].training
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [module.training for module in model] == [True, False]
