"""Residual networks as strangers write them, small, for tests."""

import torch
import torch.nn.functional as F
from torch import nn


def conv(channels, out, kernel=3, stride=1, groups=1):
    return nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False, groups=groups)


class PreactivationBlock(nn.Module):
    """As in wide residual networks: norm and ReLU in front, a projection of the activated input."""

    def __init__(self, channels, out, stride=1):
        super().__init__()
        self.first_norm, self.first = nn.BatchNorm2d(channels), conv(channels, out, 3, stride)
        self.second_norm, self.second = nn.BatchNorm2d(out), conv(out, out)
        self.drop = nn.Dropout(0.3)
        changes = channels != out or stride > 1
        self.match = conv(channels, out, 1, stride) if changes else None

    def forward(self, x):
        out = F.relu(self.first_norm(x), inplace=False)
        short = x if self.match is None else self.match(out)
        out = self.second(self.drop(F.relu(self.second_norm(self.first(out)))))
        out += short
        return out


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels):
        super().__init__()
        self.shrink, self.grow = nn.Conv2d(channels, 2, 1), nn.Conv2d(2, channels, 1)

    def forward(self, x):
        pooled = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.grow(F.relu(self.shrink(pooled))))


class PostactivationBlock(nn.Module):
    """ReLU behind the sum; one ReLU module for all places; a gate at the end of the branch."""

    def __init__(self, channels, out, stride=1, gate=False):
        super().__init__()
        self.reduce, self.norm_a = conv(channels, 3, 1), nn.BatchNorm2d(3)
        self.middle, self.norm_b = conv(3, 3, 3, stride, groups=3), nn.BatchNorm2d(3)
        self.expand, self.norm_c = conv(3, out, 1), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.gate = Gate(out) if gate else nn.Identity()
        changes = channels != out or stride > 1
        self.short = (
            nn.Sequential(nn.AvgPool2d(stride), conv(channels, out, 1), nn.BatchNorm2d(out))
            if changes
            else nn.Sequential()
        )

    def forward(self, x):
        out = self.relu(self.norm_a(self.reduce(x)))
        out = self.relu(self.norm_b(self.middle(out)))
        out = self.gate(self.norm_c(self.expand(out)))
        return self.relu(self.short(x) + out)


class DropPath(nn.Module):
    """Stochastic depth."""

    def forward(self, x):
        if not self.training:
            return x
        return x * (torch.rand(len(x), *(1,) * (x.dim() - 1)) > 0.3) / 0.7


class LayerScale(nn.Module):
    """A learnt factor for each channel, nearly zero at first."""

    def __init__(self, dim):
        super().__init__()
        self.factor = nn.Parameter(1e-5 * torch.ones(dim))

    def forward(self, x):
        return x * self.factor


class Attention(nn.Module):
    """Query, key and value in one layer or in three; by torch's function or by products."""

    def __init__(self, dim, stacked=True, fused=True):
        super().__init__()
        self.stacked, self.fused = stacked, fused
        if stacked:
            self.qkv = nn.Linear(dim, 3 * dim)
        else:
            self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        if self.stacked:
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (one(x).unflatten(-1, (2, -1)).transpose(1, 2) for one in self.maps())
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1) @ v
        return self.proj(out.transpose(1, 2).flatten(2))

    def maps(self):
        return self.q, self.k, self.v


class TransformerBlock(nn.Module):
    def __init__(self, dim=8, multihead=False, **options):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = (
            nn.MultiheadAttention(dim, 2, batch_first=True)
            if multihead
            else Attention(dim, **options)
        )
        self.multihead = multihead
        self.ls1, self.ls2, self.drop = LayerScale(dim), LayerScale(dim), DropPath()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)

    def forward(self, x):
        y = self.norm1(x)
        y = self.attn(y, y, y, need_weights=False)[0] if self.multihead else self.attn(y)
        x = x + self.drop(self.ls1(y))
        return x + self.drop(self.ls2(self.fc2(self.act(self.fc1(self.norm2(x))))))


class Vision(nn.Module):
    """A Transformer for images, with a class token and positions; read from it or the mean."""

    def __init__(self, blocks=2, dim=8, read_token=False, **options):
        super().__init__()
        self.patches = nn.Conv2d(2, dim, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, dim))
        self.position = nn.Parameter(torch.randn(1, 5, dim))
        self.blocks = nn.Sequential(*(TransformerBlock(dim, **options) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 4)
        self.read_token = read_token

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        x = self.norm(self.blocks(x))
        return self.head(x[:, 0] if self.read_token else x.mean(1))


class Convolutional(nn.Module):
    """A stem, blocks, a last norm with ReLU for blocks that leave it out, and a readout."""

    def __init__(self, block=PreactivationBlock, last_norm=True, **options):
        super().__init__()
        self.stem = conv(2, 4)
        self.blocks = nn.Sequential(
            block(4, 4, **options), block(4, 6, 2, **options), block(6, 6, **options)
        )
        self.last_norm = nn.Sequential(nn.BatchNorm2d(6), nn.ReLU()) if last_norm else None
        self.readout = nn.Linear(6, 4)

    def forward(self, x):
        x = self.blocks(self.stem(x))
        x = x if self.last_norm is None else self.last_norm(x)
        return self.readout(x.mean((2, 3)))


class Skip(nn.Module):
    """``x`` plus what a module makes of it."""

    def __init__(self, branch):
        super().__init__()
        self.branch = branch

    def forward(self, x):
        return x + self.branch(x)


class Joined(nn.Module):
    """The sum of what two modules make of ``x``."""

    def __init__(self, one, two):
        super().__init__()
        self.one, self.two = one, two

    def forward(self, x):
        return self.one(x) + self.two(x)


def mlp():
    """Two layers of three numbers, for a branch."""
    return nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))


def rows(plan):
    """Name, m and layers of each branch of a plan."""
    names = plan.graph.names
    return [(b.name, b.length, [names[x] for x in b.layers]) for b in plan.branches]


NETWORKS = {
    "preactivation": lambda: Convolutional(),
    "postactivation": lambda: Convolutional(PostactivationBlock, last_norm=False),
    "gated": lambda: Convolutional(PostactivationBlock, last_norm=False, gate=True),
    "stacked attention": lambda: Vision(),
    "three maps, products": lambda: Vision(stacked=False, fused=False),
    "multihead attention": lambda: Vision(multihead=True),
}
