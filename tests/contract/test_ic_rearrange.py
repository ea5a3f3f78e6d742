"""IC layers in models of any shape: in front of every weight layer but stem and shortcuts."""

import pytest
import torch
from torch import nn

from normlab.catalog import find_method
from normlab.method import Setting
from normlab.norms.ic_layer import IndependentComponent


class Block(nn.Module):
    """A residual block of no known names, with squeeze-and-excitation and a projected shortcut."""

    def __init__(self, cin, cout):
        super().__init__()
        self.expand, self.a = nn.Conv2d(cin, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.project, self.b = nn.Conv2d(8, cout, 3, padding=1, bias=False), nn.BatchNorm2d(cout)
        self.squeeze = nn.Conv2d(cout, cout, 1)
        self.short = nn.Conv2d(cin, cout, 1, bias=False) if cin != cout else nn.Identity()
        self.act = nn.SiLU()

    def forward(self, x):
        y = self.act(self.a(self.expand(x)))
        y = self.b(self.project(y))
        y = y * self.squeeze(y.mean((2, 3), keepdim=True)).sigmoid()
        return self.act(self.short(x) + y)


class Net(nn.Module):
    def __init__(self, pool):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.one, self.two = Block(4, 6), Block(6, 6)
        self.pool, self.head = pool, nn.Linear(6, 2)

    def forward(self, x):
        x = self.two(self.one(torch.relu(self.norm(self.stem(x)))))
        return self.head(self.pool(x).flatten(1) if self.pool else x.mean((2, 3)))


def prepared(pool):
    said = []
    x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    setting = Setting(batches=((x, torch.zeros(4)),), say=said.append)
    return find_method("ic-layer:drop_prob=0").prepare(Net(pool), setting), said, x


def components(model):
    return {
        name: module.num_features
        for name, module in model.named_modules()
        if isinstance(module, IndependentComponent)
    }


@pytest.mark.parametrize(
    ("pool", "readout"), [(nn.AdaptiveAvgPool2d(1), "pool.ic"), (None, "head.ic")]
)
def test_places(pool, readout):
    model, said, _ = prepared(pool)
    assert components(model) == {
        "one.expand.ic": 4, "one.project.ic": 8, "two.expand.ic": 6, "two.project.ic": 8,
        readout: 6,
    }  # fmt: skip
    assert "5 IC layers" in said[0]
    text = " ".join(said)
    assert "it is the stem: stem" in text
    assert "takes its input raw: one.short" in text
    assert "single positions: one.squeeze, two.squeeze" in text
    assert not any(type(module) is nn.BatchNorm2d for name, module in model.named_modules()
                   if not name.endswith("ic.norm"))  # fmt: skip


def test_what_it_computes():
    """The same network written out, each component as batch normalisation without its affine."""
    model, _, x = prepared(nn.AdaptiveAvgPool2d(1))

    def norm(x):
        return nn.functional.batch_norm(x, None, None, training=True)

    out = torch.relu(model.stem(x))
    for block in (model.one, model.two):
        y = block.act(block.expand.layer(norm(out)))
        y = block.project.layer(norm(y))
        y = y * block.squeeze(y.mean((2, 3), keepdim=True)).sigmoid()
        out = block.act(block.short(out) + y)
    expected = model.head(norm(out).mean((2, 3)))
    torch.testing.assert_close(model(x), expected)
