"""The finder of residual blocks, on the workbench's networks and on imitations of others."""

import pytest
import torch
from torch import nn

from normlab.lab.models import build_model
from normlab.method import Unsuitable
from normlab.surgery.residual import find_residual_network
from resnets_of_others import (
    FunctionalBlock,
    FunctionalResNet,
    TorchvisionResNet,
)


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
    with pytest.raises(Unsuitable, match=rf"fixup\(model\): expected .*got .*{reason}.*; "):
        find_residual_network(make(), images(), "fixup")
