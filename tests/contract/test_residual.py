"""The finder of residual blocks, on the workbench's networks and on imitations of others."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normlab.lab.models import build_model
from normlab.method import Unsuitable
from normlab.surgery.residual import find_residual_network


class TorchvisionBottleneck(nn.Module):
    """torchvision's block: one ReLU module in all places."""

    def __init__(self, inplanes, planes, stride=1, base_width=64, downsample=None):
        super().__init__()
        width = planes * base_width // 64
        self.conv1 = nn.Conv2d(inplanes, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class TorchvisionResNet(nn.Module):
    """torchvision's ImageNet network with four stages of one or two bottlenecks."""

    def __init__(self, blocks=(2, 1, 1, 1), base_width=64, planes=8, num_classes=10):
        super().__init__()
        self.inplanes = planes
        self.conv1 = nn.Conv2d(3, planes, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        for stage, count in enumerate(blocks):
            layer = self._make_layer(planes * 2**stage, count, min(stage + 1, 2), base_width)
            setattr(self, f"layer{stage + 1}", layer)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(self.inplanes, num_classes)

    def _make_layer(self, planes, count, stride, base_width):
        projection = nn.Sequential(
            nn.Conv2d(self.inplanes, 4 * planes, 1, stride, bias=False), nn.BatchNorm2d(4 * planes)
        )
        layers = [TorchvisionBottleneck(self.inplanes, planes, stride, base_width, projection)]
        self.inplanes = 4 * planes
        layers += [
            TorchvisionBottleneck(4 * planes, planes, 1, base_width) for _ in range(count - 1)
        ]
        return nn.Sequential(*layers)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class FunctionalBlock(nn.Module):
    """A basic block with ReLUs as functions and an empty sequence for an identity shortcut."""

    def __init__(self, channels, before_the_sum=False, first_norm=False):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        self.before_the_sum = before_the_sum
        self.first_norm = first_norm

    def forward(self, x):
        if self.first_norm:
            out = self.conv1(F.relu(self.bn1(x)))
            return self.conv2(F.relu(self.bn2(out))) + self.shortcut(x)
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.before_the_sum:
            return F.relu(out) + self.shortcut(x)
        return F.relu(out + self.shortcut(x))


class FunctionalResNet(nn.Module):
    """A CIFAR network with ReLUs and pool as functions, and `linear` for the readout."""

    def __init__(self, *blocks, width=8, outer_relu=True):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = nn.Sequential(*(blocks or (FunctionalBlock(width), FunctionalBlock(width))))
        self.linear = nn.Linear(width, 10)
        self.outer_relu = outer_relu

    def forward(self, x):
        x = self.bn1(self.conv1(x))
        x = self.layer1(F.relu(x) if self.outer_relu else x)
        return self.linear(F.avg_pool2d(x, x.shape[-1]).flatten(1))


def images(channels=3, size=16):
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("shortcut", ["zero-pad", "projection"])
@pytest.mark.parametrize(("block", "depth", "layers"), [("basic", 14, 2), ("bottleneck", 20, 3)])
def test_workbench_networks(block, depth, layers, shortcut):
    options = {"depth": depth, "width": 4, "block": block, "shortcut": shortcut}
    model = build_model("resnet", (1, 8, 8), 10, **options)
    network = find_residual_network(model, images(1, 8), "test")
    assert [b.name for b in network.blocks] == [f"layer{i}.{j}" for i in (1, 2, 3) for j in (0, 1)]
    assert {len(b.convolutions) for b in network.blocks} == {layers}
    assert [b.stride for b in network.blocks] == [1, 1, 2, 1, 2, 1]
    assert network.blocks[2].in_channels == network.blocks[1].out_channels
    changing = [b.shortcut is not None for b in network.blocks]
    assert changing[1:] == [False, True, False, True, False]
    first = network.blocks[0]
    assert first.norms == tuple(getattr(first.module, f"bn{i + 1}") for i in range(layers))
    assert network.stem is model.conv1
    assert network.stem_norm is model.bn1
    assert network.stem_pool is None
    assert network.pool is model.avgpool
    assert network.head is model.fc


@pytest.mark.parametrize("base_width", [64, 128])
def test_torchvisions_structure(base_width):
    model = TorchvisionResNet(base_width=base_width)
    network = find_residual_network(model, images(size=32), "test")
    assert len(network.blocks) == 5
    assert network.stem_pool is model.maxpool
    assert network.blocks[1].shortcut is None
    assert network.blocks[2].shortcut is model.layer2[0].downsample
    assert network.blocks[0].convolutions[1].out_channels == 8 * base_width // 64


def test_functional_form():
    network = find_residual_network(FunctionalResNet(), images(), "test")
    assert [block.name for block in network.blocks] == ["layer1.0", "layer1.1"]
    assert [block.shortcut for block in network.blocks] == [None, None]
    assert network.pool is None


def test_the_model_is_left_as_it_was():
    model = TorchvisionResNet().train()
    model.layer1[0].bn1.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    find_residual_network(model, images(size=32), "test")
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model.layer1[0].bn1.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_bare_shortcut_has_no_norms():
    model = TorchvisionResNet()
    network = find_residual_network(model, images(size=32), "test")
    block = network.blocks[0]
    convolution = block.shortcut[0]
    x = torch.randn(2, 8, 5, 5)
    block.shortcut[1].bias.data.fill_(1.0)
    assert torch.equal(network.bare_shortcut(block)(x), convolution(x))
    assert network.bare_shortcut(network.blocks[1]) is None


def squeezed():
    block = FunctionalBlock(8)
    block.squeeze = nn.Linear(8, 8)
    return FunctionalResNet(block)


def dropped():
    model = TorchvisionResNet()
    model.drop = nn.Dropout(0.5)
    return model


def unread():
    model = FunctionalResNet()
    model.linear = nn.Conv2d(8, 10, 1)
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: build_model("mlp", (3, 16, 16), 10), "Sequential without any"),
        (lambda: build_model("plain-conv", (3, 16, 16), 10), "Sequential without any"),
        (lambda: nn.Sequential(FunctionalBlock(3)), "another conv1"),
        (unread, "another fc"),
        (squeezed, r"layer1\.0\.squeeze \(Linear\)"),
        (dropped, r"drop \(Dropout\)"),
        (lambda: FunctionalResNet(FunctionalBlock(8, first_norm=True)), "computes something else"),
        (lambda: FunctionalResNet(FunctionalBlock(8, before_the_sum=True)), r"layer1\.0"),
        (lambda: FunctionalResNet(outer_relu=False), "FunctionalResNet around its blocks"),
    ],
)
def test_other_models_are_refused_with_the_reason(make, reason):
    with pytest.raises(Unsuitable, match=rf"fixup\(model\): expected .*got .*{reason}.*; do "):
        find_residual_network(make(), images(), "fixup")
