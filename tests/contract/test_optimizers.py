"""After a surgery each parameter stands in the group where a user would look for it."""

import pytest
import torch
from torch import nn

from normlab.surgery.optimizers import repoint


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())


def names_in(optimizer, model):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def decayed(model):
    """The usual two groups: weights decay, scales and shifts do not."""
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": weights, "weight_decay": 1e-4}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def step(model, optimizer):
    model(torch.randn(4, 3, 8, 8)).square().mean().backward()
    optimizer.step()


def test_new_parameters_take_the_place_of_the_old_ones():
    model = network()
    optimizer = decayed(model)
    step(model, optimizer)
    before = dict(model.named_parameters())
    momentum = optimizer.state[model[0].weight]["momentum_buffer"]
    old = model[1].weight
    model[1] = nn.GroupNorm(2, 4)
    repoint([optimizer], before, model)
    assert names_in(optimizer, model) == [["0.weight"], ["1.weight", "1.bias"]]
    assert optimizer.state[model[0].weight]["momentum_buffer"] is momentum
    assert old not in optimizer.state
    step(model, optimizer)
    assert model[1].weight in optimizer.state


def test_a_parameter_of_another_name_joins_its_module():
    model = network()
    optimizer = decayed(model)
    before = dict(model.named_parameters())
    model[1] = nn.Sequential(nn.GroupNorm(2, 4), nn.PReLU())
    repoint([optimizer], before, model)
    assert names_in(optimizer, model)[1] == ["1.0.weight", "1.0.bias", "1.1.weight"]


def test_a_parameter_where_none_was_joins_those_that_went():
    model = network()
    optimizer = decayed(model)
    before = dict(model.named_parameters())
    model[1] = nn.GroupNorm(2, 4)
    model[2] = nn.PReLU()
    repoint([optimizer], before, model)
    assert names_in(optimizer, model)[1] == ["1.weight", "1.bias", "2.weight"]


def test_parameters_that_are_gone_leave_groups_and_state():
    model = network()
    optimizer = decayed(model)
    step(model, optimizer)
    before = dict(model.named_parameters())
    model[1] = nn.Identity()
    repoint([optimizer], before, model)
    assert names_in(optimizer, model) == [["0.weight"], []]
    assert len(optimizer.state) == 1


def test_parameters_that_are_not_the_models_stay():
    model, other = network(), nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([*model.parameters(), other], lr=0.1)
    before = dict(model.named_parameters())
    model[1] = nn.GroupNorm(2, 4)
    repoint([optimizer], before, model)
    assert optimizer.param_groups[0]["params"][-1] is other
    assert len(optimizer.param_groups[0]["params"]) == 4


def test_several_optimisers_each_get_their_own():
    model = nn.ModuleDict({"one": network(), "two": network()})
    optimizers = [torch.optim.SGD(model[name].parameters(), lr=0.1) for name in model]
    before = dict(model.named_parameters())
    model["two"][1] = nn.GroupNorm(2, 4)
    repoint(optimizers, before, model)
    assert names_in(optimizers[0], model) == [["one.0.weight", "one.1.weight", "one.1.bias"]]
    assert names_in(optimizers[1], model) == [["two.0.weight", "two.1.weight", "two.1.bias"]]


def test_names_in_groups_follow():
    model = network()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    before = dict(model.named_parameters())
    model[1] = nn.Sequential(nn.GroupNorm(2, 4))
    repoint([optimizer], before, model)
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "1.0.weight", "1.0.bias"]


def test_no_guess_where_several_groups_fit():
    model = network()
    optimizer = decayed(model)
    kept = [list(group["params"]) for group in optimizer.param_groups]
    before = dict(model.named_parameters())
    model[2] = nn.PReLU()
    with pytest.raises(ValueError, match=r"expected one group for the new parameter '2\.weight'"):
        repoint([optimizer], before, model)
    assert [list(group["params"]) for group in optimizer.param_groups] == kept
