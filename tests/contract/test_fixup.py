"""Fixup against its sheet's formulae and counts, then the contract."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normlab.catalog import find_method
from normlab.inits.fixup import (
    METHOD,
    Branch,
    branch_factor,
    find_branches,
    fixup_,
    he_normal_,
    parameter_groups,
    scalars_of,
)
from normlab.inits.fixup_blocks import (
    FixupBasicBlock,
    FixupBottleneck,
    FixupClassifier,
    ScalarBias,
    ScalarScale,
)
from normlab.inits.fixup_transformer import (
    FixupAttention,
    FixupDecoder,
    FixupDecoderLayer,
    FixupEncoder,
    FixupEncoderLayer,
    FixupFeedForward,
    fixup_transformer_,
)
from normlab.lab.models import build_model
from normlab.method import Setting, Unsuitable
from normlab.surgery.residual import find_residual_network
from normlab.testing import LAYER_CHECKS, METHOD_CHECKS, LayerCase, MethodCase
from resnets_of_others import FunctionalBlock, FunctionalResNet, TorchvisionResNet


def conv(channels, out, kernel, stride=1):
    return nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False)


def basic(channels=2):
    return FixupBasicBlock(conv(channels, channels, 3), conv(channels, channels, 3))


def bottleneck():
    return FixupBottleneck(conv(2, 3, 1), conv(3, 3, 3), conv(3, 2, 1))


def oracle_basic(block, x):
    """The sheet's y = relu(conv2(relu(conv1(x + b1) + b2) + b3) * s + b4 + x)."""
    b1, b2, b3, b4 = (getattr(block, f"bias{i}").value for i in range(1, 5))
    u = F.conv2d(x + b1, block.conv1.weight, padding=1)
    v = (u + b2).clamp(min=0)
    w = F.conv2d(v + b3, block.conv2.weight, padding=1) * block.scale.value + b4
    return (w + x).clamp(min=0).detach()


def oracle_bottleneck(block, x):
    b1, b2, b3, b4, b5, b6 = (getattr(block, f"bias{i}").value for i in range(1, 7))
    u = (F.conv2d(x + b1, block.conv1.weight) + b2).clamp(min=0)
    v = (F.conv2d(u + b3, block.conv2.weight, padding=1) + b4).clamp(min=0)
    w = F.conv2d(v + b5, block.conv3.weight) * block.scale.value + b6
    return (w + x).clamp(min=0).detach()


SHAPES = [(5, 2, 3, 5)]
CASES = {
    "basic": LayerCase(basic, SHAPES, oracle_basic, refuses_wrong_input=False),
    "bottleneck": LayerCase(bottleneck, SHAPES, oracle_bottleneck, refuses_wrong_input=False),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("check", LAYER_CHECKS, ids=lambda check: check.__name__)
def test_contract(check, case):
    check(case)


def images(samples=8, channels=1, size=8):
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(samples, channels, size, size, generator=generator)
    return x, torch.arange(samples) % 4


MODELS = {
    "zero-pad": {"depth": 14, "width": 8},
    "projection": {"depth": 14, "width": 8, "shortcut": "projection"},
    "bottleneck": {"depth": 20, "width": 8, "block": "bottleneck"},
    "bottleneck, projection": {
        "depth": 20, "width": 8, "block": "bottleneck", "shortcut": "projection",
    },
}  # fmt: skip


def make(name):
    return build_model("resnet", (1, 8, 8), 4, **MODELS[name])


def prepared(name, **options):
    torch.manual_seed(0)
    return METHOD.with_options(**options).prepare(make(name), Setting(batches=(images(),)))


def blocks_of(model):
    return [m for m in model.modules() if isinstance(m, (FixupBasicBlock, FixupBottleneck))]


def branch_convolutions(block):
    return [m for name, m in block.named_children() if name.startswith("conv")]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("check", METHOD_CHECKS, ids=lambda check: check.__name__)
def test_method_contract(check, name):
    inputs, targets = images()
    check(MethodCase(METHOD, lambda: make(name), inputs, targets, num_classes=4))


@pytest.mark.parametrize("name", MODELS)
def test_a_fresh_network_is_silent(name):
    model = prepared(name)
    x, targets = images()
    logits = model(x)
    assert torch.equal(logits, torch.zeros(8, 4))
    assert F.cross_entropy(logits, targets).item() == pytest.approx(math.log(4), abs=1e-6)
    for block in blocks_of(model):
        x = torch.randn(3, branch_convolutions(block)[0].in_channels, 4, 4)
        expected = x if block.shortcut is None else block.shortcut(x)
        assert torch.equal(block(x), expected.relu())


@pytest.mark.parametrize("name", MODELS)
def test_standard_deviations(name):
    """Every weight by its own formula, within five standard errors."""
    model = prepared(name)
    blocks = blocks_of(model)

    def check(layer, factor):
        weight = layer.weight
        fan_out = weight.shape[0] * weight.shape[2] * weight.shape[3]
        deviation = math.sqrt(2 / fan_out) * factor
        error = 5 / math.sqrt(2 * weight.numel())
        assert weight.std().item() == pytest.approx(deviation, rel=error)
        assert abs(weight.mean().item()) < 5 * deviation / math.sqrt(weight.numel())

    check(model.conv1, 1)
    assert len(blocks) == 6
    for block in blocks:
        *scaled, last = branch_convolutions(block)
        m = len(scaled) + 1
        for layer in scaled:
            check(layer, 6 ** (-1 / (2 * m - 2)))
        assert not last.weight.any()
        if block.shortcut is not None:
            for layer in block.shortcut.modules():
                if isinstance(layer, nn.Conv2d):
                    check(layer, 1)


def test_branch_factor():
    assert branch_factor(16, 2) == pytest.approx(1 / math.sqrt(16))
    assert branch_factor(16, 3) == pytest.approx(16 ** (-1 / 4))
    assert branch_factor(64, 4) == pytest.approx(64 ** (-1 / 6))
    assert branch_factor(64, 1) == 1
    for m in (2, 3, 4, 5):
        assert branch_factor(7, m) ** (m - 1) == pytest.approx(7**-0.5)


@pytest.mark.parametrize(("depth", "length"), [(20, 9), (32, 15), (44, 21), (56, 27), (110, 54)])
def test_counts_of_the_cifar_networks(depth, length):
    setting = Setting(batches=(images(2, 3),))
    model = METHOD.prepare(build_model("resnet", (3, 8, 8), 10, depth=depth), setting)
    assert len(blocks_of(model)) == length
    scalars = [m for m in model.modules() if isinstance(m, (ScalarBias, ScalarScale))]
    assert len(scalars) == 5 * length + 2
    assert sum(isinstance(m, ScalarScale) for m in scalars) == length
    # 3x3 convolutions of widths 16, 32, 64, and the readout.
    n = length // 3
    inner = 9 * sum((2 * n - 1) * w * w + w * max(16, w // 2) for w in (16, 32, 64))
    expected = 9 * 3 * 16 + inner + 650 + len(scalars)
    assert sum(p.numel() for p in model.parameters()) == expected


def test_counts_of_bottlenecks():
    model = prepared("bottleneck")
    scalars = [m for m in model.modules() if isinstance(m, (ScalarBias, ScalarScale))]
    assert len(scalars) == 7 * 6 + 2


@pytest.mark.parametrize("name", MODELS)
def test_no_normaliser_and_no_bias_of_a_convolution_is_left(name):
    model = make(name)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.bias = nn.Parameter(torch.ones(module.out_channels))
    model = METHOD.prepare(model, Setting(batches=(images(),)))
    assert not any(isinstance(m, nn.modules.batchnorm._NormBase) for m in model.modules())
    assert all(m.bias is None for m in model.modules() if isinstance(m, nn.Conv2d))
    assert type(model.bn1) is ScalarBias
    assert type(model.fc) is FixupClassifier
    assert torch.equal(model(images()[0]), torch.zeros(8, 4))


def perturb(model):
    with torch.no_grad():
        for number, scalar in enumerate(scalars_of(model)):
            scalar.add_(0.01 * (number % 7) + 0.02)
        for block in blocks_of(model):
            he_normal_(branch_convolutions(block)[-1])
        model.fc.weight.normal_()


@pytest.mark.parametrize("shortcut", ["zero-pad", "projection"])
def test_whole_network_against_the_formulae(shortcut):
    name = "zero-pad" if shortcut == "zero-pad" else "projection"
    model = prepared(name).double()
    perturb(model)
    x = images()[0].double()
    out = (F.conv2d(x, model.conv1.weight, padding=1) + model.bn1.value).clamp(min=0)
    for block in (block for stage in (model.layer1, model.layer2, model.layer3) for block in stage):
        b1, b2, b3, b4 = (getattr(block, f"bias{i}").value for i in range(1, 5))
        stride = block.conv1.stride[0]
        v = (F.conv2d(out + b1, block.conv1.weight, None, stride, 1) + b2).clamp(min=0)
        w = F.conv2d(v + b3, block.conv2.weight, padding=1) * block.scale.value + b4
        if block.shortcut is None:
            identity = out
        elif shortcut == "zero-pad":
            kept = (out + b1)[:, :, ::stride, ::stride]
            identity = torch.cat([kept, torch.zeros_like(kept)], 1)
        else:
            identity = F.conv2d(out + b1, block.shortcut[0].weight, None, stride)
        out = (w + identity).clamp(min=0)
    features = out.mean((2, 3)) + model.fc.before.value
    expected = features @ model.fc.weight.T + model.fc.bias
    assert expected.abs().max() > 1
    torch.testing.assert_close(model(x), expected)


def nonzero(parameter):
    return parameter.grad is not None and bool(parameter.grad.any())


@pytest.mark.parametrize("name", MODELS)
def test_first_backward_reaches_the_classifier_only(name):
    model = prepared(name)
    x, targets = images()
    F.cross_entropy(model(x), targets).backward()
    reached = {name for name, p in model.named_parameters() if nonzero(p)}
    assert reached == {"fc.weight"} or reached == {"fc.weight", "fc.bias"}
    # One step of the readout, then every branch's last layer has a gradient.
    with torch.no_grad():
        model.fc.weight -= 0.1 * model.fc.weight.grad
    model.zero_grad()
    F.cross_entropy(model(x), targets).backward()
    for block in blocks_of(model):
        assert nonzero(branch_convolutions(block)[-1].weight)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_behind_a_readout_that_is_not_zero(name):
    model = prepared(name)
    nn.init.normal_(model.fc.weight)
    x, targets = images()
    F.cross_entropy(model(x), targets).backward()
    for block in blocks_of(model):
        *scaled, last = branch_convolutions(block)
        biases = [m for name, m in block.named_children() if name.startswith("bias")]
        assert not any(nonzero(layer.weight) for layer in scaled)
        assert not any(nonzero(bias.value) for bias in biases[1:-1])
        assert not nonzero(block.scale.value)
        assert nonzero(last.weight)
        assert nonzero(biases[-1].value)
        assert nonzero(biases[0].value) == (block.shortcut is not None)


def deep(length, fixup=True):
    torch.manual_seed(1)
    blocks = [basic(6) for _ in range(length)]
    if fixup:
        fixup_([Branch(str(i), (b.conv1, b.conv2)) for i, b in enumerate(blocks)])
    else:
        for block in blocks:
            he_normal_(block.conv1)
            he_normal_(block.conv2)
    head = FixupClassifier(6, 4)
    nn.init.normal_(head.weight, std=1 / math.sqrt(6))
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


def change_of_one_step(model, eta=0.01):
    """How far one step moves the logits, with the scalars and the readout's bias held."""
    torch.manual_seed(2)
    x, targets = torch.rand(4, 6, 6, 6), torch.arange(4)
    before = model(x)
    F.cross_entropy(before, targets).backward()
    held = {id(p) for p in scalars_of(model)}
    with torch.no_grad():
        for parameter in model.parameters():
            if id(parameter) not in held:
                parameter -= eta * parameter.grad
        return (model(x) - before).abs().max().item()


def test_one_step_moves_the_function_alike_at_any_depth():
    changes = [change_of_one_step(deep(length)) for length in (10, 100, 1000)]
    assert min(changes) > 0
    assert max(changes) < 5 * min(changes), changes


def test_without_fixup_the_depth_overflows():
    x = torch.rand(4, 6, 6, 6, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert deep(10)(x).abs().max() < 10
        assert deep(100, fixup=False)(x).abs().max() > 1e9
        assert not torch.isfinite(deep(400, fixup=False)(x)).all()


@pytest.mark.slow
def test_ten_thousand_layers():
    model = build_model("resnet", (1, 4, 4), 4, depth=9998, width=2)
    x, targets = images(4, size=4)
    model = METHOD.prepare(model, Setting(batches=((x, targets),)))
    groups = [{"params": list(model.parameters()), "lr": 0.1}]
    optimizer = torch.optim.SGD(METHOD.parameter_groups(groups, model, Setting(batches=())))
    losses = []
    for _ in range(3):
        loss = F.cross_entropy(model(x), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0], losses


@pytest.mark.parametrize("name", MODELS)
def test_batch_independence_and_modes(name):
    model = prepared(name)
    perturb(model)
    x = images()[0]
    whole = model(x)
    torch.testing.assert_close(model(x[2:3]), whole[2:3])
    assert torch.equal(model.eval()(x), whole)


def test_state_dict_keeps_the_scalars():
    model, fresh = prepared("projection"), prepared("projection")
    perturb(model)
    fresh.load_state_dict(model.state_dict())
    x = images()[0]
    assert torch.equal(fresh(x), model(x))
    assert model(x).any()
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_parameter_groups():
    model = prepared("projection")
    own = list(model.parameters())
    scalars = scalars_of(model)
    assert len(scalars) == 5 * 6 + 2 + 1
    assert any(scalar is model.fc.bias for scalar in scalars)
    assert not any(scalar is model.fc.weight for scalar in scalars)
    setting = Setting(batches=(), lr=0.3)
    given = [{"params": own, "lr": 0.5, "weight_decay": 1e-4}]

    def split(**options):
        groups = METHOD.with_options(**options).parameter_groups(given, model, setting)
        listed = [id(p) for group in groups for p in group["params"]]
        assert sorted(listed) == sorted(id(p) for p in own)
        others, small = groups
        assert {id(p) for p in small["params"]} == {id(p) for p in scalars}
        assert (others["lr"], others["weight_decay"]) == (0.5, 1e-4)
        return small["lr"], small["weight_decay"]

    assert split() == (pytest.approx(0.05), 1e-4)
    assert split(scalar_lr_factor=0.2) == (pytest.approx(0.1), 1e-4)
    assert split(decay_scalars=False) == (pytest.approx(0.05), 0.0)
    assert split(scalar_lr=0.01) == (0.01, 1e-4)
    others, small = parameter_groups([{"params": own}], model, setting)
    assert (others["lr"], small["lr"]) == (0.3, pytest.approx(0.03))


def test_stem_by_torchs_default():
    setting = Setting(batches=(images(),))
    model = METHOD.with_options(stem_init="default").prepare(make("zero-pad"), setting)
    bound = 1 / math.sqrt(9)
    assert 0.8 * bound < model.conv1.weight.abs().max() <= bound
    assert prepared("zero-pad").conv1.weight.abs().max() > bound
    with pytest.raises(ValueError, match="expected 'he' or 'default'"):
        prepared("zero-pad", stem_init="xavier")


def test_torchvisions_structure():
    x = torch.randn(3, 3, 32, 32)
    setting = Setting(batches=((x, torch.zeros(3)),))
    model = METHOD.prepare(TorchvisionResNet(base_width=128), setting)
    blocks = blocks_of(model)
    assert [type(block) for block in blocks] == [FixupBottleneck] * 5
    assert type(model) is TorchvisionResNet
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    deviation = math.sqrt(2 / (64 * 9)) * 5 ** (-1 / 4)
    assert blocks[2].conv2.weight.shape[0] == 32
    expected = deviation * math.sqrt(64 / 32)
    assert blocks[2].conv2.weight.std().item() == pytest.approx(expected, rel=0.05)
    he_normal_(blocks[0].conv3)
    nn.init.normal_(model.fc.weight)
    out = F.relu(F.conv2d(x, model.conv1.weight, None, 2, 3))
    out = F.max_pool2d(out, 3, 2, 1)
    for block in blocks:
        branch = block.conv3(block.conv2(block.conv1(out).relu()).relu())
        out = (branch + (out if block.shortcut is None else block.shortcut[0](out))).relu()
    torch.testing.assert_close(model(x), out.mean((2, 3)) @ model.fc.weight.T)
    functional = METHOD.prepare(FunctionalResNet(), setting)
    assert torch.equal(functional(x), torch.zeros(3, 10))


def test_a_network_without_a_norm_after_the_stem():
    model = FunctionalResNet()
    model.bn1 = nn.Identity()
    setting = Setting(batches=((torch.randn(3, 3, 8, 8), torch.zeros(3)),))
    model = METHOD.prepare(model, setting)
    assert len(scalars_of(model)) == 5 * 2 + 2 + 1


@pytest.mark.parametrize("name", ["mlp", "plain-conv"])
def test_plain_networks_are_refused(name):
    model = build_model(name, (1, 8, 8), 4)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(Unsuitable, match=r"fixup\(model\): expected a ResNet with residual blocks"):
        METHOD.prepare(model, Setting(batches=(images(),)))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_an_optimiser_from_before_is_refused():
    model = make("projection")
    old = torch.optim.SGD(model.parameters(), lr=0.1)
    model = METHOD.prepare(model, Setting(batches=(images(),)))
    promised = (
        r"fixup\(optimizer\): expected an optimiser of the model's present parameters, got one "
        "built before fixup changed them; build it after"
    )
    with pytest.raises(ValueError, match=promised):
        METHOD.attach(model, old, Setting(batches=()))
    METHOD.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), Setting(batches=()))


class Preactivation(nn.Module):
    """Somebody's own residual branch of linear layers with biases."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(50, 50) for _ in range(layers))

    def forward(self, x):
        out = x
        for layer in self.layers:
            out = layer(out.relu())
        return x + out


class Standardised(nn.Conv2d):
    def forward(self, x):
        axes = (1, 2, 3)
        weight = self.weight - self.weight.mean(axes, keepdim=True)
        weight = weight / (self.weight.std(axes, keepdim=True) + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


def changed_convolutions(change):
    model = FunctionalResNet()
    for block in model.layer1:
        change(block)
    return model


def make_standardised(block):
    block.conv2 = Standardised(8, 8, 3, 1, 1, bias=False)


def make_hooked(block):
    block.conv2.register_forward_hook(lambda module, inputs, output: output + 1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda block: nn.utils.parametrizations.weight_norm(block.conv2), "re-parametrisation"),
        (lambda block: nn.utils.parametrizations.spectral_norm(block.conv1), "re-parametrisation"),
        (make_standardised, r"layer1\.0\.conv2, a Standardised, which undoes the scaling"),
        (make_hooked, "expected every block to start as its short path|take the hooks off"),
    ],
)
def test_convolutions_that_do_more_are_refused_in_the_papers_form(change, reason):
    model = changed_convolutions(change)
    before, text = copy.deepcopy(model.state_dict()), repr(model)
    with pytest.raises(Unsuitable, match=reason):
        METHOD.prepare(model, Setting(batches=((torch.randn(3, 3, 8, 8), torch.zeros(3)),)))
    assert repr(model) == text
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class BlockWith(FunctionalBlock):
    """A basic block with a function between its convolutions."""

    def __init__(self, between):
        super().__init__(8)
        self.between = [between]

    def forward(self, x):
        out = self.between[0](self, self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + x)


def noisy_in_training(block, x):
    return F.relu(x * torch.rand_like(x) if block.training else x)


def bounded(block, x):
    return F.relu6(x)


def dropped(block, x):
    return F.dropout(F.relu(x), 0.5, block.training)


def copied(block, x):
    return F.relu(x).contiguous()


@pytest.mark.parametrize("between", [noisy_in_training, bounded, dropped, copied])
def test_a_block_with_another_function_keeps_it(between):
    """What rebuilding the block would lose: the general form leaves the block's own forward."""
    said = []
    x = torch.randn(3, 3, 8, 8)
    setting = Setting(batches=((x, torch.zeros(3)),), say=said.append)
    model = FunctionalResNet(BlockWith(between), BlockWith(between))
    with pytest.raises(Unsuitable, match="computes something else"):
        find_residual_network(model, x, "stochastic-depth")
    rng = torch.get_rng_state()
    model = METHOD.prepare(model, setting)
    assert torch.equal(torch.get_rng_state(), rng)
    assert type(model.layer1[0]) is BlockWith
    assert "in the general form" in said[0]
    x = 50 * torch.rand(2, 8, 4, 4)
    assert torch.equal(model.layer1[0](x), x)


@pytest.mark.filterwarnings("ignore:.*jit.script.*")
def test_a_bound_that_nobody_sees_called_shows_on_large_inputs():
    def clipped(x: torch.Tensor) -> torch.Tensor:
        return x.clamp(0.0, 60.0)

    scripted = torch.jit.script(clipped)
    model = FunctionalResNet(BlockWith(lambda block, x: scripted(x)))
    with pytest.raises(Unsuitable, match="computes something else"):
        find_residual_network(model, torch.randn(3, 3, 8, 8), "fixup")


def test_what_layers_compute_in_training_is_theirs():
    """A re-parametrised weight moves in each training pass: the block is of the plain form."""
    model = FunctionalResNet()
    for block in model.layer1:
        nn.utils.parametrizations.spectral_norm(block.conv1)
    before = copy.deepcopy(model.state_dict())
    network = find_residual_network(model, torch.randn(3, 3, 8, 8), "stochastic-depth")
    assert len(network.blocks) == 2
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_shortcuts_functions_are_its_own():
    said = []
    setting = Setting(batches=(images(),), say=said.append)
    METHOD.prepare(make("zero-pad"), setting)
    assert "in the paper's block form" in said[0]


def test_preparing_twice_is_refused():
    setting = Setting(batches=(images(),))
    model = METHOD.prepare(make("zero-pad"), setting)
    with pytest.raises(Unsuitable, match=r"got bn1; prepare a model once"):
        METHOD.prepare(model, setting)


def test_stochastic_depth_stands_in_front():
    x, targets = images()
    setting = Setting(batches=((x, targets),))
    depth = find_method("stochastic-depth")
    with pytest.raises(Unsuitable, match=r"prepare stochastic-depth before that one"):
        (METHOD + depth).prepare(make("zero-pad"), setting)
    both = depth + METHOD
    model = both.prepare(make("zero-pad"), setting)
    own = [{"params": list(model.parameters()), "lr": 0.1}]
    optimizer = torch.optim.SGD(both.parameter_groups(own, model, setting))
    both.attach(model, optimizer, setting)
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(model(x), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(4), abs=1e-6)
    assert losses[-1] < losses[0] - 0.005


def test_branches_of_ones_own():
    torch.manual_seed(3)
    model = nn.Sequential(*(Preactivation(m) for m in (1, 2, 3, 4)), nn.Linear(50, 10))
    branches = find_branches(
        model, lambda m: list(m.layers) if isinstance(m, Preactivation) else None
    )
    assert [branch.name for branch in branches] == ["0", "1", "2", "3"]
    fixup_(branches, head=model[4], generator=torch.Generator().manual_seed(0))
    x = torch.randn(3, 50)
    assert torch.equal(model[:4](x), x)
    assert torch.equal(model(x), torch.zeros(3, 10))
    for m, block in enumerate(model[:4], start=1):
        assert not block.layers[-1].weight.any()
        for layer in block.layers[:-1]:
            expected = math.sqrt(2 / 50) * 4 ** (-1 / (2 * m - 2))
            assert layer.weight.std().item() == pytest.approx(expected, rel=0.08)
            assert not layer.bias.any()
    fixup_(branches[1:2], num_branches=100)
    expected = math.sqrt(2 / 50) / 10
    assert model[1].layers[0].weight.std().item() == pytest.approx(expected, rel=0.08)
    with pytest.raises(ValueError, match="got none"):
        fixup_([])
    with pytest.raises(ValueError, match="got odd without"):
        fixup_([Branch("odd", ())])


def test_convolutions_with_a_bias_are_refused():
    with pytest.raises(ValueError, match="bias=False"):
        FixupBasicBlock(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))


class Translator(nn.Module):
    def __init__(self, encoder_layers=2, decoder_layers=3, dropout=0.0, tied=False):
        super().__init__()
        self.embedding = nn.Embedding(30, 64, padding_idx=0)
        self.encoder = FixupEncoder(
            FixupEncoderLayer(64, 4, 96, dropout) for _ in range(encoder_layers)
        )
        self.decoder = FixupDecoder(
            FixupDecoderLayer(64, 4, 96, dropout) for _ in range(decoder_layers)
        )
        self.output = nn.Linear(64, 30, bias=False)
        if tied:
            self.output.weight = self.embedding.weight

    def forward(self, source, target):
        memory = self.encoder(self.embedding(source))
        return self.output(self.decoder(self.embedding(target), memory))


def translator(**options):
    torch.manual_seed(4)
    model = Translator(**options)
    fixup_transformer_(model, model.output, generator=torch.Generator().manual_seed(0))
    return model


def test_transformer_is_silent_at_the_start():
    model = translator()
    x = torch.randn(2, 5, 64)
    assert torch.equal(model.encoder(x), x)
    assert torch.equal(model.decoder(x, torch.randn(2, 7, 64)), x)
    words = torch.randint(1, 30, (2, 5))
    assert torch.equal(model(words, words), torch.zeros(2, 5, 30))


def test_transformer_counts_and_deviations():
    model = translator()
    length = 2 * 2 + 3 * 3
    branches = [m for m in model.modules() if isinstance(m, (FixupAttention, FixupFeedForward))]
    assert len(branches) == length
    for branch in branches:
        if isinstance(branch, FixupAttention):
            weight, factor = branch.input_projection.weight, length ** (-1 / 6)
            assert not branch.output_projection.weight.any()
        else:
            weight, factor = branch.linear1.weight, length ** (-1 / 2)
            assert not branch.linear2.weight.any()
        bound = factor * math.sqrt(6 / (weight.shape[0] + weight.shape[1]))
        assert 0.99 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    # Three shifts and a scale in a feed-forward branch, one of each in attention, and the ends.
    feed_forwards, attentions = 2 + 3, 2 + 2 * 3
    assert len(scalars_of(model)) == 4 * feed_forwards + 2 * attentions + 3
    assert all(m.bias is None for m in model.modules() if isinstance(m, nn.Linear))
    assert model.embedding.weight.std().item() == pytest.approx(1 / 8, rel=0.06)
    assert not model.embedding.weight[0].any()
    assert translator(tied=True).output.weight[1:].all()


def perturbed_translator(**options):
    model = translator(**options).double()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            if parameter.numel() == 1:
                parameter.add_(0.02 * (number % 5 + 1))
            else:
                parameter.normal_(std=0.2)
    return model


def attend(layer, x, memory, visible=None):
    """Attention with one loop over heads, in the order of the sheet."""
    d = x.shape[-1]
    shifted = x + layer.shift.value
    source = shifted if memory is None else memory
    weight = layer.input_projection.weight
    q, k, v = shifted @ weight[:d].T, source @ weight[d : 2 * d].T, source @ weight[2 * d :].T
    heads, size = [], d // layer.num_heads
    for start in range(0, d, size):
        part = slice(start, start + size)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(size)
        if visible is not None:
            scores = scores.masked_fill(~visible, -math.inf)
        heads.append(scores.softmax(-1) @ v[..., part])
    return x + (torch.cat(heads, -1) @ layer.output_projection.weight.T) * layer.scale.value


def feed(layer, x):
    u = (x + layer.shift1.value) @ layer.linear1.weight.T
    v = (u + layer.shift2.value).clamp(min=0) + layer.shift3.value
    return x + (v @ layer.linear2.weight.T) * layer.scale.value


def test_transformer_against_the_formulae():
    model = perturbed_translator()
    source, target = torch.randint(1, 30, (2, 6)), torch.randint(1, 30, (2, 5))
    x = model.embedding.weight[source]
    for layer in model.encoder.layers:
        x = feed(layer.feed_forward, attend(layer.self_attention, x, None))
    memory = (x + model.encoder.shift.value) * model.encoder.scale.value
    x = model.embedding.weight[target]
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    for layer in model.decoder.layers:
        x = attend(layer.self_attention, x, None, causal)
        x = feed(layer.feed_forward, attend(layer.cross_attention, x, memory))
    expected = (x + model.decoder.shift.value) @ model.output.weight.T
    torch.testing.assert_close(model(source, target), expected)


def test_transformer_masks():
    model = perturbed_translator()
    x = torch.randn(1, 4, 64, dtype=torch.float64)
    padded = torch.cat([x, torch.randn(1, 2, 64, dtype=torch.float64)], 1)
    mask = torch.tensor([[True] * 4 + [False] * 2])
    memory = model.encoder(x)
    torch.testing.assert_close(model.encoder(padded, mask=mask)[:, :4], memory)
    y = torch.randn(1, 3, 64, dtype=torch.float64)
    longer = model.encoder(padded, mask=mask)
    expected = model.decoder(y, memory)
    torch.testing.assert_close(model.decoder(y, longer, memory_mask=mask), expected)


def test_transformer_dropout_and_training():
    model = translator(dropout=0.3)
    words = torch.randint(1, 30, (4, 6))
    groups = parameter_groups(
        [{"params": list(model.parameters())}], model, Setting(batches=(), lr=0.003)
    )
    optimizer = torch.optim.Adam(groups)
    losses = []
    for _ in range(60):
        loss = F.cross_entropy(model(words, words).flatten(0, 1), words.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(30), abs=1e-5)
    assert losses[-1] < 0.5 * losses[0]
    assert not torch.equal(model(words, words), model(words, words))
    model.eval()
    assert torch.equal(model(words, words), model(words, words))


def test_transformer_refusals():
    with pytest.raises(ValueError, match="divides 6"):
        FixupAttention(6, 4)
    with pytest.raises(ValueError, match="Linear without any"):
        fixup_transformer_(nn.Linear(2, 2))
    model = Translator()
    with pytest.raises(ValueError, match=r"got Linear with one.* or a FixupClassifier"):
        fixup_transformer_(model, nn.Linear(64, 30))


def test_the_output_embeddings_bias_is_a_scalar():
    model = Translator()
    model.output = FixupClassifier(64, 30)
    nn.init.ones_(model.output.weight)
    nn.init.ones_(model.output.bias)
    fixup_transformer_(model, model.output)
    words = torch.randint(1, 30, (2, 5))
    assert torch.equal(model(words, words), torch.zeros(2, 5, 30))
    assert any(scalar is model.output.bias for scalar in scalars_of(model))
