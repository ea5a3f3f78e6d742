"""Which constants are the gain of a branch, and which are something else."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normlab.inits.fixup import prepare
from normlab.method import Setting

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


class Swish(nn.Module):
    """A learnt slope inside an activation; in the middle of a branch or at its end."""

    def __init__(self):
        super().__init__()
        self.alpha = nn.Parameter(torch.full((8,), 1.7))

    def forward(self, x):
        return x * torch.sigmoid(self.alpha * x)


class Block(nn.Module):
    """All constants in the block itself: one multiplies the branch, the others do not."""

    def __init__(self, add=torch.add, start=1e-6, end=False):
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.resweight = nn.Parameter(torch.full((8,), start))
        self.alpha = nn.Parameter(torch.full((8,), 1.7))
        self.logit_scale = nn.Parameter(torch.full((1,), 2.3))
        self.add, self.act, self.end = [add], Swish(), Swish() if end else nn.Identity()

    def forward(self, x):
        out = self.act(F.silu(self.alpha * self.one(x))) * self.logit_scale.exp()
        out = self.end(self.two(out)).unsqueeze(1) * self.resweight.view(1, 1, -1)
        return self.add[0](x, out.flatten(1))


@pytest.mark.parametrize("start", [1e-6, 0.0])
@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("add", [torch.add, torch.sub, lambda x, out: out.add_(x)])
def test_only_what_multiplies_the_branch_behind_its_last_layer(add, end, start):
    said = []
    model = nn.Sequential(nn.Linear(8, 8), Block(add, start, end), nn.Linear(8, 3))
    model = prepare(model, Setting(batches=((X, X),), say=said.append))
    block = model[1]
    assert torch.equal(block.resweight, torch.ones(8))
    assert torch.equal(block.alpha, torch.full((8,), 1.7))
    assert torch.equal(block.logit_scale, torch.full((1,), 2.3))
    assert torch.equal(block.act.alpha, torch.full((8,), 1.7))
    if end:
        assert torch.equal(block.end.alpha, torch.full((8,), 1.7))
    assert "gains that start at 1: 1.resweight" in said
    nn.init.normal_(model[2].weight)
    model(X).square().sum().backward()
    assert block.two.weight.grad.any()


def test_a_gain_in_front_of_a_shift():
    """The shift is a parameter: the addition that closes the branch is the next one."""

    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
            self.shift, self.gain = (
                nn.Parameter(torch.zeros(8)),
                nn.Parameter(torch.full((8,), 0.1)),
            )

        def forward(self, x):
            return x + (self.two(self.one(x).relu()) + self.shift) * self.gain

    model = nn.Sequential(nn.Linear(8, 8), Shifted(), nn.Linear(8, 3))
    model = prepare(model, Setting(batches=((X, X),)))
    assert torch.equal(model[1].gain, torch.ones(8))


def test_a_gain_of_unlike_values_stays():
    model = nn.Sequential(nn.Linear(8, 8), Block(), nn.Linear(8, 3))
    values = torch.arange(1.0, 9)
    model[1].resweight.data.copy_(values)
    model = prepare(model, Setting(batches=((X, X),)))
    assert torch.equal(model[1].resweight, values)


def test_a_factor_in_front_of_the_readout_is_no_gain():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.full((8,), 0.3))

        def forward(self, x):
            return x * self.scale

    model = nn.Sequential(nn.Linear(8, 8), Scaled(), Block(), Scaled(), nn.Linear(8, 3))
    model = prepare(model, Setting(batches=((X, X),)))
    for i in (1, 3):
        assert torch.equal(model[i].scale, torch.full((8,), 0.3))


def test_addcmul_and_half_precision():
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
            self.factor = nn.Parameter(torch.full((8,), 1e-3))

        def forward(self, x):
            return torch.addcmul(x, self.two(self.one(x).relu()), self.factor)

    x = X.bfloat16()
    model = nn.Sequential(nn.Linear(8, 8), Fused(), nn.Linear(8, 3)).bfloat16()
    model = prepare(model, Setting(batches=((x, x),)))
    assert torch.equal(model[1].factor, torch.ones(8, dtype=torch.bfloat16))
