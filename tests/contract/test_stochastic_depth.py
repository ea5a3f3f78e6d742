"""Stochastic depth against its sheet, written plainly in float64, then the contract."""

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normlab.lab.models import build_model
from normlab.method import Setting, Unsuitable
from normlab.regularizers.block_gates import (
    BlockGates,
    draw_gates,
    expected_depth,
    survival_probs,
)
from normlab.regularizers.stochastic_depth import (
    METHOD,
    StochasticBlock,
    StochasticBranch,
    gates_of,
)
from normlab.testing import METHOD_CHECKS, MethodCase
from resnets_of_others import FunctionalResNet, TorchvisionResNet

SHAPE = (2, 8, 8)


def resnet(depth=14, **options):
    torch.manual_seed(0)
    model = build_model("resnet", SHAPE, 4, depth=depth, width=4, **options)
    for name, parameter in model.named_parameters():
        if "bn" in name:
            nn.init.uniform_(parameter, 0.2, 1.2)
    return model.double()


def images(count=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *SHAPE, generator=generator, dtype=torch.float64)


def prepared(model=None, inputs=None, seed=0, **options):
    said = []
    generator = torch.Generator().manual_seed(seed)
    inputs = images() if inputs is None else inputs
    setting = Setting(
        batches=((inputs, torch.zeros(len(inputs))),), say=said.append, generator=generator
    )
    model = resnet() if model is None else model
    return METHOD.with_options(**options).prepare(model, setting), said


def blocks_of(model):
    return [module for module in model.modules() if isinstance(module, StochasticBlock)]


def set_open(model, gates):
    """Let the next passes have these gates."""
    held = gates_of(model)
    held._attached = True
    held.open = tuple(gates)
    held.mask = torch.tensor(held.open, dtype=torch.float32)


def batch_norm(norm, x, training):
    """Return what a BatchNorm makes of ``x``; statistics are those of the batch in training."""
    axes = (0, 2, 3)
    mean, variance = norm.running_mean, norm.running_var
    if training:
        mean, variance = x.mean(axes), x.var(axes, correction=0)
    shape = (1, -1, 1, 1)
    normalised = (x - mean.view(shape)) / (variance.view(shape) + norm.eps).sqrt()
    return normalised * norm.weight.view(shape) + norm.bias.view(shape)


def oracle(model, x, factors, training):
    """The workbench's network, plain, with each branch times its factor."""
    x = batch_norm(model.bn1, F.conv2d(x, model.conv1.weight, padding=1), training).relu()
    blocks = [block for stage in (model.layer1, model.layer2, model.layer3) for block in stage]
    for factor, block in zip(factors, blocks, strict=True):
        f = F.conv2d(x, block.conv1.weight, stride=block.conv1.stride, padding=1)
        f = batch_norm(block.bn1, f, training).relu()
        f = batch_norm(block.bn2, F.conv2d(f, block.conv2.weight, padding=1), training)
        if block.downsample is not None:
            x = x[:, :, ::2, ::2]
            x = torch.cat([x, torch.zeros_like(x)], 1)
        x = (factor * f + x).relu()
    return F.linear(x.mean((2, 3)), model.fc.weight, model.fc.bias)


# -- the schedule and the gates -------------------------------------------------------------------


def test_survival_schedule():
    for count in (1, 3, 54):
        for last in (0.0, 0.2, 0.5, 1.0):
            linear = survival_probs(count, last)
            assert linear == pytest.approx(
                [1 - block / count * (1 - last) for block in range(1, count + 1)]
            )
            assert expected_depth(linear) == pytest.approx(count - (1 - last) * (count + 1) / 2)
            assert survival_probs(count, last, "uniform") == (last,) * count
    assert expected_depth(survival_probs(54)) == 40.25
    assert survival_probs(54)[0] < 1


def test_gates_are_bernoulli_and_a_function_of_seed_and_step():
    probs, draws = (0.9, 0.5, 0.2, 0.5), 10_000
    drawn = torch.tensor([draw_gates(probs, 3, step) for step in range(draws)]).double()
    for p, mean in zip(probs, drawn.mean(0).tolist(), strict=True):
        assert abs(mean - p) < 4 * math.sqrt(p * (1 - p) / draws)
    # Neither blocks nor steps nor seeds go together.
    joint = (drawn[:, 1] * drawn[:, 3]).mean().item()
    assert abs(joint - 0.25) < 4 * math.sqrt(0.25 * 0.75 / draws)
    successive = (drawn[1:, 1] * drawn[:-1, 1]).mean().item()
    assert abs(successive - 0.25) < 4 * math.sqrt(0.25 * 0.75 / draws)
    assert draw_gates(probs, 3, 5) == draw_gates(probs, 3, 5)
    other = [draw_gates(probs, 4, step) for step in range(100)]
    assert other != [draw_gates(probs, 3, step) for step in range(100)]
    # Written down once, so that a change of the stream is noticed: it breaks resuming.
    assert [draw_gates((0.5,) * 6, 0, step) for step in (0, 1)] == GATES_OF_SEED_ZERO


GATES_OF_SEED_ZERO = [
    (False, False, True, True, True, False),
    (True, False, False, True, False, True),
]


def test_extremes_never_and_always_drop():
    for step in range(200):
        assert draw_gates((1.0, 0.0), 0, step) == (True, False)


# -- the block ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["skip", "mask"])
@pytest.mark.parametrize("scaling", ["test", "train"])
@pytest.mark.parametrize(
    "gates", [(1, 0, 1, 0, 0, 1), (0, 1, 0, 1, 1, 0), (0, 0, 0, 0, 0, 0), (1, 1, 1, 1, 1, 1)]
)
def test_training_equals_the_plain_form(gates, scaling, mode):
    model, _ = prepared(scaling=scaling, mode=mode)
    plain, x = resnet(), images()
    set_open(model, map(bool, gates))
    probs = survival_probs(6)
    factors = [b / (p if scaling == "train" else 1) for b, p in zip(gates, probs, strict=True)]
    y, expected = model(x), oracle(plain, x, factors, training=True)
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=1e-12)
    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert list(grads) == [name for name, _ in plain.named_parameters()]
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, atol=1e-11, rtol=1e-9, msg=name)
    # A dropped branch: exact zeros, not nothing.
    for gate, block in zip(gates, blocks_of(model), strict=True):
        for parameter in block.branch_parameters():
            assert bool(parameter.grad.any()) == bool(gate)


@pytest.mark.parametrize(("scaling", "power"), [("test", 1), ("train", 0)])
def test_evaluation_multiplies_by_the_probability(scaling, power):
    model, _ = prepared(scaling=scaling, survival_prob=0.3)
    plain, x = resnet(), images()
    factors = [p**power for p in survival_probs(6, 0.3)]
    model.eval()
    expected = oracle(plain, x, factors, training=False)
    torch.testing.assert_close(model(x), expected, atol=1e-12, rtol=1e-12)
    assert torch.equal(model(x), model(x))
    torch.testing.assert_close(model(x[:1]), expected[:1], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("scaling", ["test", "train"])
def test_probability_one_is_the_plain_network_exactly(scaling):
    x = images()
    model, _ = prepared(survival_prob=1.0, scaling=scaling)
    plain = resnet()
    for training in (True, False):
        for one in (model, plain):
            one.train(training).zero_grad()
        y, expected = model(x), plain(x)
        assert torch.equal(y, expected)
        y.square().sum().backward()
        expected.square().sum().backward()
        for one, two in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(one.grad, two.grad)


def test_train_scaling_has_the_mean_of_evaluation_in_front_of_the_relu():
    gates = BlockGates((0.3,), scaling="train")
    branch = StochasticBranch(nn.Linear(3, 3).double(), gates, 0)
    x = torch.randn(2, 3, dtype=torch.float64)
    mean = torch.zeros_like(x)
    for gate, chance in ((True, 0.3), (False, 0.7)):
        gates.open = (gate,)
        mean += chance * branch(x).detach()
    torch.testing.assert_close(mean, branch.eval()(x))


@pytest.mark.parametrize("mode", ["skip", "mask"])
def test_a_dropped_branch_leaves_its_running_statistics(mode):
    model, _ = prepared(mode=mode)
    for block in blocks_of(model):
        block.bn1.running_mean.fill_(0.5)
    open_gates = (True, False, True, False, False, True)
    set_open(model, open_gates)
    before = [copy.deepcopy(dict(block.named_buffers())) for block in blocks_of(model)]
    model(images()).sum().backward()
    for gate, old, block in zip(open_gates, before, blocks_of(model), strict=True):
        for name, buffer in block.named_buffers():
            assert torch.equal(buffer, old[name]) != gate, name


def test_masked_passes_may_come_twice_before_backward():
    model, _ = prepared(mode="mask")
    (model(images()) + model(images(seed=2))).sum().backward()


def test_a_dropped_branch_is_not_computed():
    model, _ = prepared(resnet(shortcut="projection"))
    called = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
            module.register_forward_hook(lambda *_, name=name: called.append(name))
    open_gates = (True, False, True, False, True, False)
    set_open(model, open_gates)
    x = images()
    model(x).sum().backward()
    names = ["layer1.0", "layer1.1", "layer2.0", "layer2.1", "layer3.0", "layer3.1"]
    for name, gate in zip(names, open_gates, strict=True):
        assert (f"{name}.conv1" in called, f"{name}.bn2" in called) == (gate, gate)
    # A block that changes shape may be dropped; its short path is computed.
    set_open(model, (False,) * 6)
    called.clear()
    model(x)
    assert set(called) == {"conv1", "bn1"} | {
        f"layer{stage}.0.downsample.{part}" for stage in (2, 3) for part in (0, 1)
    }


def test_a_dropped_block_with_a_projection_ends_in_its_relu():
    model, _ = prepared(resnet(shortcut="projection"))
    set_open(model, (False,) * 6)
    block, x = model.layer2[0], images().repeat(1, 2, 1, 1)
    y = block(x)
    assert torch.equal(y, block.downsample(x).relu())
    assert not torch.equal(y, block.downsample(x))


def test_dropped_gradients_are_added_to_what_is_there():
    model, _ = prepared()
    set_open(model, (True,) * 6)
    model(images()).sum().backward()
    weight = model.layer2[1].conv1.weight
    before = weight.grad.clone()
    set_open(model, (False,) * 6)
    model(images()).sum().backward()
    assert torch.equal(weight.grad, before)


def test_parameters_that_do_not_train_get_no_gradient():
    model, _ = prepared()
    model.layer1[0].conv1.weight.requires_grad_(False)
    set_open(model, (False,) * 6)
    model(images()).sum().backward()
    assert model.layer1[0].conv1.weight.grad is None
    assert not model.layer1[0].conv2.weight.grad.any()
    with torch.no_grad():
        assert not model(images()).requires_grad


# -- names, copies, models of others --------------------------------------------------------------


def test_110_layers():
    model = build_model("resnet", (3, 8, 8), 10, depth=110)
    count = sum(parameter.numel() for parameter in model.parameters())
    model, said = prepared(model, torch.randn(2, 3, 8, 8))
    assert len(blocks_of(model)) == 54
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert said == [
        "a training step has 40.25 of 54 residual branches computed",
        "2 blocks that change shape keep the model's own shortcut",
    ]


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (resnet, images()),
        (lambda: resnet(20, block="bottleneck", shortcut="projection"), images()),
        (TorchvisionResNet, torch.randn(4, 3, 32, 32)),
        (FunctionalResNet, torch.randn(4, 3, 16, 16)),
    ],
    ids=["basic", "bottleneck", "torchvision", "functional"],
)
def test_state_dict_has_the_plain_networks_names(make, inputs):
    plain = make()
    model, _ = prepared(make(), inputs)
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    model.load_state_dict(plain.state_dict())
    set_open(model, (True,) * len(blocks_of(model)))
    torch.testing.assert_close(model(inputs), plain(inputs), atol=1e-5, rtol=1e-5)
    model(inputs).sum().backward()
    set_open(model, (False,) * len(blocks_of(model)))
    model(inputs).sum().backward()


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("remake", [copy.deepcopy, pickled])
def test_copies_have_gates_of_their_own(remake):
    model, _ = prepared()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    METHOD.attach(model, optimizer, Setting(batches=()))
    optimizer.step()
    twin = remake(model)
    mine, theirs = gates_of(model), gates_of(twin)
    assert {id(block.gates) for block in blocks_of(twin)} == {id(theirs)}
    assert theirs is not mine
    before, seen = mine.open, []
    for _ in range(6):
        twin(images())
        seen.append(theirs.open)
    assert seen == [draw_gates(mine.probs, mine.seed, step) for step in range(1, 7)]
    assert mine.open == before
    assert torch.equal(twin.eval()(images()), twin(images()))


def test_hooks_of_a_block_are_kept():
    plain = resnet()
    called = []
    plain.layer1[0].register_forward_hook(lambda *_: called.append(1))
    model, _ = prepared(plain)
    called.clear()
    model(images())
    assert called == [1]


# -- steps ----------------------------------------------------------------------------------------


def test_unattached_gates_count_training_forwards():
    model, _ = prepared()
    gates, seen = gates_of(model), []
    for _ in range(5):
        model(images())
        seen.append(gates.open)
        model.eval()(images())
        model.train()
    assert seen == [draw_gates(survival_probs(6), gates.seed, step) for step in range(5)]


def test_attached_gates_count_steps():
    model, _ = prepared()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    METHOD.attach(model, optimizer, Setting(batches=()))
    gates, seen = gates_of(model), []
    for _ in range(6):
        model(images()).sum().backward()
        seen.append(gates.open)
        model(images(seed=2))  # a second pass in the same step, as in accumulation
        assert gates.open == seen[-1]
        optimizer.step()
    assert seen == [draw_gates(survival_probs(6), gates.seed, step) for step in range(6)]
    assert len(set(seen)) > 1


def test_a_checkpoint_holds_seed_and_step():
    model, _ = prepared(seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    METHOD.attach(model, optimizer, Setting(batches=()))
    for _ in range(3):
        optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed, _ = prepared(seed=2)
    other = torch.optim.SGD(resumed.parameters(), lr=0.1)
    METHOD.attach(resumed, other, Setting(batches=()))
    other.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(5):
        assert gates_of(resumed).open == gates_of(model).open
        optimizer.step()
        other.step()


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("set_to_none", [False, True])
def test_freeze_skipped(freeze, set_to_none):
    model, _ = prepared(survival_prob=0.0, schedule="uniform")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    METHOD.with_options(freeze_skipped=freeze).attach(model, optimizer, Setting(batches=()))
    weight, stem = model.layer1[0].conv1.weight, model.conv1.weight
    before, stem_before = weight.detach().clone(), stem.detach().clone()
    for _ in range(2):
        optimizer.zero_grad(set_to_none=set_to_none)
        model(images()).sum().backward()
        optimizer.step()
    assert torch.equal(weight, before) == freeze
    if not freeze:
        torch.testing.assert_close(weight, before * (1 - 0.1 * 0.1) ** 2)
    assert not torch.equal(stem, stem_before)


def test_an_optimiser_has_gates_once():
    model, _ = prepared()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    METHOD.attach(model, optimizer, Setting(batches=()))
    with pytest.raises(ValueError, match="counts steps for gates already"):
        METHOD.attach(model, optimizer, Setting(batches=()))


# -- one's own model ------------------------------------------------------------------------------


class Own(nn.Module):
    """A residual network without normalisers, with an operation in place after each sum."""

    def __init__(self, mode="skip"):
        super().__init__()
        gates = BlockGates((0.5, 0.5, 0.5), mode=mode, seed=4)
        self.blocks = nn.ModuleList(
            StochasticBranch(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), gates, i) for i in range(3)
        )
        gates.follow(self)

    def forward(self, x):
        for block in self.blocks:
            x = block(x, 2 * x).relu_()
        return x


@pytest.mark.parametrize("mode", ["skip", "mask"])
def test_branches_of_ones_own(mode):
    torch.manual_seed(0)
    model, x = Own(mode).double(), torch.randn(5, 4, dtype=torch.float64)
    seen = set()
    for _ in range(12):
        model.zero_grad()
        y = model(x)
        y.sum().backward()
        expected, gates = x, model.blocks[0].gates.open
        for gate, block in zip(gates, model.blocks, strict=True):
            expected = (2 * expected + gate * block.branch(expected)).relu()
            assert bool(block.branch[0].weight.grad is not None)
            assert gate or not block.branch[0].weight.grad.any()
        torch.testing.assert_close(y, expected)
        seen.add(gates)
    assert len(seen) > 3
    expected = x
    for block in model.blocks:
        expected = (2 * expected + 0.5 * block.branch(expected)).relu()
    torch.testing.assert_close(model.eval()(x), expected)


def test_a_dropped_branch_does_not_hand_out_its_input():
    gates = BlockGates((0.0,))
    gates.draw()
    x = torch.ones(2, 3)
    for parameters in (True, False):
        branch = StochasticBranch(nn.Linear(3, 3).requires_grad_(parameters), gates, 0)
        branch(x).mul_(2)
    assert torch.equal(x, torch.ones(2, 3))


def test_the_masked_form_compiles_once_for_all_gates():
    torch._dynamo.reset()
    model, _ = prepared(resnet(8), mode="mask")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    METHOD.attach(model, optimizer, Setting(batches=()))
    count = 0

    def backend(graph, inputs):
        nonlocal count
        count += 1
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x, seen = images(), set()
    for _ in range(5):
        twin = copy.deepcopy(model)
        gates_of(twin)._attached = True
        torch.testing.assert_close(compiled(x), twin(x))
        for one, two in zip(model.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(one, two)
        seen.add(gates_of(model).open)
        optimizer.step()
    assert len(seen) > 1
    assert count == 1


def test_gates_that_count_forwards_compile_once_too():
    torch._dynamo.reset()
    model, _ = prepared(resnet(8), mode="mask")
    count = 0

    def backend(graph, inputs):
        nonlocal count
        count += 1
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    x, gates, seen = images(), gates_of(model), set()
    for step in range(6):
        compiled(x)
        assert gates.open == draw_gates(gates.probs, gates.seed, step)
        seen.add(gates.open)
    assert len(seen) > 1
    assert count == 1


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"survival_prob": 1.5}, r"expected a probability of keeping, from 0 to 1, got 1\.5"),
        ({"survival_prob": math.nan}, "expected a probability of keeping"),
        ({"schedule": "cosine"}, "expected 'linear' or 'uniform', got 'cosine'"),
        ({"scaling": "both"}, "expected 'test' or 'train', got 'both'"),
        ({"mode": "drop"}, "expected 'skip' or 'mask', got 'drop'"),
    ],
)
def test_options_out_of_range(options, message):
    model = resnet()
    with pytest.raises(ValueError, match=message):
        prepared(model, **options)
    assert not blocks_of(model)


def test_misfits():
    with pytest.raises(Unsuitable, match="residual blocks"):
        prepared(build_model("mlp", SHAPE, 4), images().float())
    with pytest.raises(ValueError, match="prepare it first"):
        gates_of(resnet())
    with pytest.raises(ValueError, match="expected at least 1, got 0"):
        survival_probs(0)
    with pytest.raises(ValueError, match=r"expected 0 to 0, got 1; make gates for as many"):
        StochasticBranch(nn.Linear(1, 1), BlockGates((0.5,)), 1)


@pytest.mark.parametrize("mode", ["skip", "mask"])
def test_gates_that_were_never_drawn(mode):
    branch = StochasticBranch(nn.Linear(2, 2), BlockGates((0.5,), mode=mode), 0)
    with pytest.raises(ValueError, match="call follow"):
        branch(torch.ones(1, 2))
    branch.eval()(torch.ones(1, 2))


CASES = {
    "resnet": {"depth": 8, "width": 8},
    "resnet projection": {"depth": 8, "width": 8, "shortcut": "projection"},
    "resnet bottleneck": {"depth": 11, "width": 8, "block": "bottleneck"},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "options", [{}, {"mode": "mask"}, {"scaling": "train"}, {"freeze_skipped": True}], ids=str
)
@pytest.mark.parametrize("check", METHOD_CHECKS, ids=lambda check: check.__name__)
def test_method_contract(check, options, name):
    generator = torch.Generator().manual_seed(0)
    check(
        MethodCase(
            method=METHOD.with_options(**options),
            make_model=lambda: build_model("resnet", SHAPE, 4, **CASES[name]),
            inputs=torch.randn(12, *SHAPE, generator=generator),
            targets=torch.arange(12) % 4,
            num_classes=4,
            lr=0.02,
        )
    )
