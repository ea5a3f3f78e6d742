"""Weight rescaling over checkpoints, copies and optimisers that hold other parameters."""

import copy
import pickle

import pytest
import torch
from torch import nn

from normlab.method import Setting
from normlab.optim.sam import SAM
from normlab.optim.weight_rescaling import METHOD, WeightRescaler
from normlab.surgery.scale_free import find_scale_free_weights
from scale_free_training import Training

KEY = "weight_rescaling"


def start(run, **options):
    optimizer = torch.optim.SGD([run.weight], lr=0.5, momentum=0.9)
    WeightRescaler(optimizer, find_scale_free_weights(run.model, run.x).weights, **options)
    return optimizer


@pytest.mark.parametrize("target", [2.0, "init"])
def test_it_may_be_built_after_the_checkpoint_is_loaded(target):
    run = Training()
    optimizer = start(run, target_norm=target, every=3)
    run.directions(optimizer, 4)
    resumed = copy.deepcopy(run)
    other = torch.optim.SGD([resumed.weight], lr=0.5, momentum=0.9)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    weights = find_scale_free_weights(resumed.model, resumed.x).weights
    WeightRescaler(other, weights, target_norm=target, every=3)
    run.directions(optimizer, 4)
    resumed.directions(other, 4)
    assert torch.equal(resumed.weight, run.weight)


def test_a_number_replaces_the_initial_norms_of_a_checkpoint():
    run = Training()
    optimizer = start(run, target_norm="init")
    other = torch.optim.SGD([run.weight], lr=0.5, momentum=0.9)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    weights = find_scale_free_weights(run.model, run.x).weights
    WeightRescaler(other, weights, target_norm=2.0).rescale()
    assert run.weight.norm(dim=1).tolist() == pytest.approx([2.0] * 4)
    assert "targets" in optimizer.param_groups[0][KEY]


def test_initial_norms_of_other_weights_are_refused():
    state = start(Training(units=3), target_norm="init").state_dict()
    run = Training()
    optimizer = torch.optim.SGD([run.weight], lr=0.5, momentum=0.9)
    optimizer.load_state_dict(state)
    weights = find_scale_free_weights(run.model, run.x).weights
    with pytest.raises(ValueError, match=r"WeightRescaler\(.*expected the weights of the check"):
        WeightRescaler(optimizer, weights, target_norm="init")


@pytest.mark.parametrize("again", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copy_takes_a_rescaler_of_its_own(again):
    run = Training()
    optimizer = start(run, every=3)
    run.directions(optimizer, 4)
    model, other = again((run.model, optimizer))
    WeightRescaler(other, find_scale_free_weights(model, run.x).weights, every=3)
    assert other.param_groups[0][KEY]["step"] == 4
    copied = copy.copy(run)
    copied.model, copied.weight = model, model[0].weight
    run.directions(optimizer, 2)
    copied.directions(other, 2)
    assert torch.equal(copied.weight, run.weight)
    assert run.weight.norm(dim=1).tolist() == pytest.approx([1.0] * 4)


def test_a_second_one_is_refused_through_a_wrapper_too():
    run = Training()
    optimizer = start(run)
    weights = find_scale_free_weights(run.model, run.x).weights
    with pytest.raises(ValueError, match="without a WeightRescaler, got SAM with one"):
        WeightRescaler(SAM(optimizer), weights)


def test_an_optimiser_of_old_parameters_is_refused():
    said = []
    x = torch.randn(6, 3)
    setting = Setting(batches=((x, torch.zeros(6)),), say=said.append)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model[0] = nn.Linear(3, 4)
    with pytest.raises(ValueError, match=r"optimizer\): expected an optimiser of the model's pres"):
        METHOD.attach(model, optimizer, setting)
    assert not said
    assert KEY not in optimizer.param_groups[0]


def test_biases_that_move_along_must_be_held_too():
    x = torch.randn(6, 3)
    setting = Setting(batches=((x, torch.zeros(6)),))
    model = nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(2, 4), nn.Linear(4, 2))
    optimizer = torch.optim.SGD([model[0].weight], lr=0.1)
    with pytest.raises(ValueError, match=r"optimizer\): expected an optimiser of the model's pres"):
        METHOD.with_options(granularity="layer").attach(model, optimizer, setting)
