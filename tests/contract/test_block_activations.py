"""Activations of stochastic blocks: those that stand in the block are the ones that are called."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normlab.activations.elementwise import ELU, RELU
from normlab.lab.models import build_model
from normlab.method import Setting, Unsuitable
from normlab.regularizers.stochastic_depth import METHOD, StochasticBlock, gates_of
from resnets_of_others import FunctionalResNet, TorchvisionResNet

SHAPE = (2, 8, 8)
PATTERN = (True, False, True, False, False, True)


def resnet(**options):
    torch.manual_seed(0)
    options = {"depth": 14, "width": 4} | options
    return build_model("resnet", SHAPE, 4, **options).double()


def prepared(model, *methods, shape=SHAPE):
    generator = torch.Generator().manual_seed(0)
    kind = next(model.parameters()).dtype
    inputs = torch.randn(4, *shape, generator=generator, dtype=kind)
    said = []
    setting = Setting(batches=((inputs, torch.zeros(4)),), generator=generator, say=said.append)
    for method in methods:
        model = method.prepare(model, setting)
    return model, inputs, said


def set_open(model, gates):
    held = gates_of(model)
    held._attached = True
    held.open = tuple(gates)
    held.mask = torch.tensor(held.open, dtype=torch.float32)


def blocks_of(model):
    return [module for module in model.modules() if isinstance(module, StochasticBlock)]


def activations_called(model, kind, run):
    """Return the names of the activations of this kind, and how often each one was called."""
    calls = {name: 0 for name, module in model.named_modules() if type(module) is kind}

    def count(name):
        def hook(*_):
            calls[name] += 1

        return hook

    handles = [model.get_submodule(name).register_forward_hook(count(name)) for name in calls]
    run()
    for handle in handles:
        handle.remove()
    return calls


@pytest.mark.parametrize(
    ("make", "shape", "count"),
    [
        (resnet, SHAPE, {1}),
        (lambda: resnet(depth=11, block="bottleneck"), SHAPE, {1}),
        (lambda: resnet(shortcut="projection"), SHAPE, {1}),
        # One module in three places of each block, one in the stem.
        (TorchvisionResNet, (3, 32, 32), {1, 3}),
    ],
    ids=["basic", "bottleneck", "projection", "torchvision"],
)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("other", [ELU, RELU], ids=["elu", "relu"])
def test_every_activation_is_called(make, shape, count, training, other):
    model, inputs, _ = prepared(make(), METHOD, other, shape=shape)
    set_open(model, (True,) * len(blocks_of(model)))
    kind = nn.ELU if other is ELU else nn.ReLU
    calls = activations_called(model, kind, lambda: model.train(training)(inputs))
    assert set(calls.values()) == count


def oracle(model, x, factors, activation):
    """The workbench's network in training, each branch times its factor."""
    x = activation(F.batch_norm(model.conv1(x), None, None, training=True))
    blocks = [block for stage in (model.layer1, model.layer2, model.layer3) for block in stage]
    for factor, block in zip(factors, blocks, strict=True):
        out = activation(F.batch_norm(block.conv1(x), None, None, training=True))
        out = F.batch_norm(block.conv2(out), None, None, training=True)
        if block.downsample is not None:
            x = x[:, :, ::2, ::2]
            x = torch.cat([x, torch.zeros_like(x)], 1)
        x = activation(factor * out + x)
    return model.fc(x.mean((2, 3)))


@pytest.mark.parametrize("mode", ["skip", "mask"])
@pytest.mark.parametrize("gates", [PATTERN, (False,) * 6, (True,) * 6])
def test_with_elu_training_equals_the_plain_form(gates, mode):
    model, inputs, said = prepared(resnet(), METHOD.with_options(mode=mode), ELU)
    assert "13 activations became ELU(alpha=1.0)" in said
    set_open(model, gates)
    expected = oracle(resnet(), inputs, gates, F.elu)
    torch.testing.assert_close(model(inputs), expected, atol=1e-12, rtol=1e-12)


def test_elu_first_is_refused():
    model = resnet()
    with pytest.raises(Unsuitable, match=r"expected convolutions, .* got relu \(ELU\)"):
        prepared(model, ELU, METHOD)
    assert not blocks_of(model)


def test_a_dropped_block_ends_in_its_activation_but_for_a_second_relu():
    model, inputs, _ = prepared(resnet(shortcut="projection"), METHOD)
    set_open(model, (False,) * 6)
    calls = activations_called(model, nn.ReLU, lambda: model(inputs))
    # Those behind another block pass on what a ReLU made, unless a projection stands between.
    ends = ["relu", "layer1.0.relu2", "layer2.0.relu2", "layer3.0.relu2"]
    assert [name for name, times in calls.items() if times] == ends


@pytest.mark.parametrize("place", ["relu", "layer1.0.relu2"])
def test_a_relu_behind_another_activation_is_applied(place):
    """A single activation is replaced: the block behind it must not pass on negative values."""
    model, inputs, _ = prepared(resnet(), METHOD)
    owner, _, name = place.rpartition(".")
    setattr(model.get_submodule(owner), name, nn.ELU())
    made = {}
    for number in (0, 1):
        block = model.layer1[number]
        block.register_forward_hook(lambda _, given, out, n=number: made.update({n: (given, out)}))
    behind = 0 if place == "relu" else 1
    set_open(model, (behind == 1, *(False,) * 5))
    model(inputs)
    (given,), out = made[behind]
    assert (given < 0).any()
    assert torch.equal(out, given.relu())


@pytest.mark.parametrize("trained", [True, False])
def test_an_activation_in_place_leaves_the_input_of_a_dropped_block(trained):
    model, _, _ = prepared(TorchvisionResNet(), METHOD, shape=(3, 32, 32))
    set_open(model, (False,) * 5)
    block = model.layer1[1].requires_grad_(trained)
    block.row[0].relu = nn.ELU()
    x = torch.randn(2, 32, 8, 8, requires_grad=True)
    given = 1 * x
    y = block(given)
    assert torch.equal(given, x)
    assert torch.equal(y, x.relu())
    y.sum().backward()
    assert torch.equal(x.grad, (x > 0).float())


def test_relus_called_as_functions_stay_functions():
    model, inputs, _ = prepared(FunctionalResNet(), METHOD, shape=(3, 16, 16))
    assert [block.activation_names for block in blocks_of(model)] == [(None, None)] * 2
    for gates in ((True, True), (False, False)):
        set_open(model, gates)
        model(inputs).sum().backward()


def test_names_of_activations_are_those_of_their_places():
    model, _, _ = prepared(resnet(depth=11, block="bottleneck"), METHOD)
    assert blocks_of(model)[0].activation_names == ("relu1", "relu2", "relu3")
    model, _, _ = prepared(TorchvisionResNet(), METHOD, shape=(3, 32, 32))
    assert blocks_of(model)[0].activation_names == ("relu",) * 3


class OtherNames(nn.Module):
    """timm's names: activations with empty places around them, and registered last one first."""

    def __init__(self, channels):
        super().__init__()
        self.act2 = nn.ReLU()
        self.conv1 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.drop = nn.Identity()
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        out = self.drop(self.act1(self.drop(self.bn1(self.conv1(x)))))
        return self.act2(self.drop(x + self.bn2(self.conv2(out))))


def test_names_are_found_by_what_is_computed():
    model, _, _ = prepared(FunctionalResNet(OtherNames(8)), METHOD, shape=(3, 16, 16))
    assert blocks_of(model)[0].activation_names == ("act1", "act2")
