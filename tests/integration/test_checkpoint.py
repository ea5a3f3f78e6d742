"""A checkpoint holds everything, appears whole or not at all, and runs no code."""

import pytest
import torch
from torch import nn

from normlab.lab import checkpoint
from normlab.lab.checkpoint import Position


def trained(steps: int = 2) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(27, 2))
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 2, 5, 5)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def test_everything_comes_back(tmp_path):
    model, optimizer = trained()
    position = Position(step=7, seconds=1.5, metrics_offset=99, recent_losses=[0.1, 0.2])
    checkpoint.save(tmp_path, model, optimizer, position)
    other, other_optimizer = trained(steps=1)
    assert checkpoint.load(tmp_path, other, other_optimizer) == position
    for one, two in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    for one, two in zip(optimizer.state.values(), other_optimizer.state.values(), strict=True):
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_no_checkpoint_means_the_start(tmp_path):
    model, optimizer = trained(0)
    assert checkpoint.load(tmp_path, model, optimizer) == Position()


def test_only_the_last_one_is_kept(tmp_path):
    model, optimizer = trained()
    for step in (3, 12, 100):
        checkpoint.save(tmp_path, model, optimizer, Position(step=step))
    assert [folder.name for folder in tmp_path.iterdir()] == ["step-00000100"]


def test_half_a_checkpoint_is_not_seen(tmp_path):
    model, optimizer = trained()
    checkpoint.save(tmp_path, model, optimizer, Position(step=3))
    (tmp_path / ".partial").mkdir()
    (tmp_path / ".partial" / "weights.safetensors").write_bytes(b"half")
    assert checkpoint.load(tmp_path, model, optimizer).step == 3
    checkpoint.save(tmp_path, model, optimizer, Position(step=4))
    assert checkpoint.load(tmp_path, model, optimizer).step == 4


@pytest.mark.parametrize("name", ["weights.safetensors", "training.pt"])
def test_a_damaged_one_is_named(tmp_path, name):
    model, optimizer = trained()
    checkpoint.save(tmp_path, model, optimizer, Position(step=3))
    file = tmp_path / "step-00000003" / name
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"step-00000003.*damaged.*delete that folder"):
        checkpoint.load(tmp_path, model, optimizer)


def test_tied_weights_are_saved(tmp_path):
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    model[1].weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    checkpoint.save(tmp_path, model, optimizer, Position(step=1))
    expected = model[0].weight.detach().clone()
    nn.init.zeros_(model[0].weight)
    checkpoint.load(tmp_path, model, optimizer)
    assert torch.equal(model[1].weight, expected)
