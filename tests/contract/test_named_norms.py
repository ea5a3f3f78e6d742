"""A layer named like a normaliser goes only where it normalises, and may be kept."""

import pytest
import torch
from torch import nn

from normlab.surgery.branches import plan_branches
from residual_networks import Skip


class InputNormalize(nn.Module):
    """With constants of the data set."""

    def forward(self, x):
        return (x - 2) / 5


class RootNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))

    def forward(self, x, shift=0.0):
        return x * self.gain * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() + shift


class BatchStatisticsNorm(nn.Module):
    """Its own statistics in training, running ones afterwards."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        if self.training:
            return (x - x.mean(0)) / x.std(0)
        return x - self.mean


class FrozenNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(3))
        self.register_buffer("running_var", torch.ones(3))

    def forward(self, x):
        return (x - self.running_mean) / self.running_var.sqrt()


class NormedActivation(nn.Sequential):
    pass


class FailingNorm(nn.Module):
    """Takes only what it was given in the pass."""

    def forward(self, x):
        if not (x == 1).all():
            raise ValueError
        return x


def plan_with(*layers):
    model = nn.Sequential(*layers, Skip(nn.Linear(3, 3)), nn.Linear(3, 2))
    return plan_branches(model, torch.ones(2, 3))


@pytest.mark.parametrize(
    ("norm", "goes"),
    [
        (InputNormalize(), False),
        (RootNorm(), True),
        (RootNorm().half().float(), True),
        (BatchStatisticsNorm(), True),
        (FrozenNorm(), True),
        (FailingNorm(), False),
        (nn.LayerNorm(3), True),
    ],
)
def test_by_what_it_computes(norm, goes):
    assert list(plan_with(norm).norms) == (["0"] if goes else [])


def test_half_precision_and_second_arguments():
    class TurnedNorm(RootNorm):
        def forward(self, x, shift):
            return torch.lerp(super().forward(x), shift, 0.1)

    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.layer = TurnedNorm(), nn.Linear(3, 3)

        def forward(self, x):
            return self.layer(self.norm(x, shift=torch.ones(3, dtype=x.dtype)))

    model = nn.Sequential(Shifted(), Skip(nn.Linear(3, 3)), nn.Linear(3, 2)).bfloat16()
    plan = plan_branches(model, torch.ones(2, 3, dtype=torch.bfloat16))
    assert list(plan.norms) == ["0.norm"]


def test_the_norm_in_a_wrapper_goes_alone():
    wrapped = NormedActivation(nn.LayerNorm(3), nn.ReLU())
    assert list(plan_with(wrapped).norms) == ["0.0"]


def test_nothing_is_left_on_the_model():
    norm = BatchStatisticsNorm().eval()
    plan_with(norm)
    assert not norm.training
    assert not norm._forward_pre_hooks


def test_a_norm_may_be_kept():
    branch = nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 3), nn.LayerNorm(3), nn.Dropout())
    model = nn.Sequential(nn.LayerNorm(3), Skip(branch), nn.LayerNorm(3), nn.Linear(3, 2))
    plan = plan_branches(model, torch.ones(2, 3))
    kept = plan.keep_norm("2").keep_norm("1.branch.0")
    assert list(kept.norms) == ["0", "1.branch.2"]
    assert list(kept.without("1.branch.1").norms) == ["0", "1.branch.2"]
    assert len(plan.norms) == 4
    with pytest.raises(ValueError, match=r"got '1'; the normalisers are 0, 1\.branch\.0, "):
        plan.keep_norm("1")
    with pytest.raises(ValueError, match=r"got one behind the last layer of 1\.branch\.1, which"):
        plan.keep_norm("1.branch.2")
