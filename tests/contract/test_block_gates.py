"""Gates under what repeats, moves, compiles or overflows a pass."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from normlab.lab.models import build_model
from normlab.method import Setting
from normlab.regularizers.block_gates import BlockGates, draw_gates, survival_probs
from normlab.regularizers.stochastic_depth import (
    METHOD,
    StochasticBlock,
    StochasticBranch,
    gates_of,
)

SHAPE = (2, 8, 8)
SETTING = Setting(batches=())


def images(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, *SHAPE, generator=generator, dtype=torch.float64)


def prepared(depth=14, **options):
    torch.manual_seed(0)
    model = build_model("resnet", SHAPE, 4, depth=depth, width=4).double()
    setting = Setting(batches=((images(), torch.zeros(6)),))
    return METHOD.with_options(**options).prepare(model, setting)


def set_open(model, gates):
    held = gates_of(model)
    held._attached = True
    held.open = tuple(gates)
    held.mask = torch.tensor(held.open, dtype=torch.float32)


# -- activation checkpointing ---------------------------------------------------------------------


class InBlocks(nn.Module):
    """A network whose own code recomputes each residual block."""

    def __init__(self, model, reentrant):
        super().__init__()
        self.model, self.reentrant = model, reentrant

    def forward(self, x):
        x = self.model.relu(self.model.bn1(self.model.conv1(x)))
        for stage in (self.model.layer1, self.model.layer2, self.model.layer3):
            for block in stage:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.model.fc(self.model.avgpool(x).flatten(1))


def steps(mode, attached, wrap=None):
    """Train eight steps; return what was drawn, and each step's outputs and gradients."""
    model = prepared(mode=mode)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    if attached:
        METHOD.attach(model, optimizer, SETTING)
    forward = model if wrap is None else wrap(model)
    drawn, found = [], []
    for step in range(8):
        optimizer.zero_grad()
        y = forward(images(step).requires_grad_())
        drawn.append(gates_of(model).open)
        y.square().sum().backward()
        assert gates_of(model).open == drawn[-1]
        found.append([y.detach(), *(p.grad.clone() for p in model.parameters())])
        optimizer.step()
    return drawn, found


def whole(reentrant):
    return lambda model: lambda x: checkpoint(model, x, use_reentrant=reentrant)


def in_blocks(reentrant):
    def wrap(model):
        wrapped = InBlocks(model, reentrant)
        # The model itself is not called, so its forwards cannot be counted.
        gates_of(model).follow(wrapped)
        return wrapped

    return wrap


@pytest.mark.parametrize("wrap", [whole, in_blocks])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("mode", ["skip", "mask"])
def test_what_is_computed_again_has_the_same_gates(mode, attached, reentrant, wrap):
    drawn, expected = steps(mode, attached)
    again, found = steps(mode, attached, wrap(reentrant))
    assert again == drawn
    assert len(set(drawn)) > 2
    for one, two in zip(found, expected, strict=True):
        for a, b in zip(one, two, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_branch_of_ones_own_is_computed_again(reentrant):
    gates = BlockGates((0.5, 0.5, 0.5), seed=4)
    torch.manual_seed(0)
    model = nn.Sequential(*(StochasticBranch(nn.Linear(4, 4), gates, i) for i in range(3)))
    gates.follow(model)
    plain = copy.deepcopy(model)
    x = torch.randn(5, 4, requires_grad=True)
    for _ in range(8):
        for one in (plain, model):
            one.zero_grad()
        plain(x).square().sum().backward()
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
        assert gates.open == gates_of(plain).open
        for one, two in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one.grad, two.grad)


def test_passes_of_one_attached_step_may_be_computed_again_late():
    found = []
    for run in (
        lambda model, x: model(x),
        lambda model, x: checkpoint(model, x, use_reentrant=False),
    ):
        model = prepared()
        METHOD.attach(model, torch.optim.SGD(model.parameters(), lr=0.05), SETTING)
        (run(model, images(1)).sum() + run(model, images(2)).square().sum()).backward()
        found.append([p.grad for p in model.parameters()])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, atol=1e-12, rtol=1e-10)


# -- closures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_freeze_skipped_with_a_closure(freeze, named):
    model = prepared(survival_prob=0.0, schedule="uniform")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    METHOD.with_options(freeze_skipped=freeze).attach(model, optimizer, SETTING)
    weight, stem = model.layer1[0].conv1.weight, model.conv1.weight
    before, stem_before = weight.detach().clone(), stem.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = model(images()).square().sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure=closure) if named else optimizer.step(closure)
    assert loss.item() > 0
    assert torch.equal(weight, before) == freeze
    assert not torch.equal(stem, stem_before)
    assert gates_of(model).step == 1


# -- the mask -------------------------------------------------------------------------------------


def test_a_dropped_branch_may_overflow():
    results = []
    for mode in ("skip", "mask"):
        model = prepared(mode=mode).float()
        set_open(model, (True, False, True, True, False, True))
        with torch.no_grad():
            for block in (model.layer1[1], model.layer3[0]):
                block.bn2.weight.fill_(3e38)
        y = model(images().float())
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad for p in model.parameters()), *model.buffers()])
    for one, two in zip(*results, strict=True):
        assert torch.isfinite(two).all()
        torch.testing.assert_close(two, one)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_branch_of_ones_own_may_overflow(value):
    gates = BlockGates((0.0,), mode="mask")
    gates.draw()
    branch = StochasticBranch(nn.Linear(3, 3), gates, 0)
    nn.init.constant_(branch.branch.bias, value)
    x = torch.randn(2, 3, requires_grad=True)
    y = branch(x)
    assert torch.equal(y, x)
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones(2, 3))
    assert not branch.branch.weight.grad.any()


def test_the_mask_follows_the_input():
    """No accelerator is needed to see it: the meta device is another one, too."""
    model = prepared(mode="mask")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    METHOD.attach(model, optimizer, SETTING)
    assert gates_of(model).mask.device.type == "cpu"
    model.to("meta")
    assert model(images().to("meta")).device.type == "meta"
    assert gates_of(model).mask.device.type == "meta"


# -- the compiler ---------------------------------------------------------------------------------


def counting():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return backend, graphs


@pytest.mark.parametrize("attached", [False, True])
def test_skipping_survives_the_compiler(attached):
    torch._dynamo.reset()
    model = prepared(depth=20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    if attached:
        METHOD.attach(model, optimizer, SETTING)
    backend, graphs = counting()
    compiled = torch.compile(model, backend=backend)
    called = []
    for index, block in enumerate(m for m in model.modules() if isinstance(m, StochasticBlock)):
        block.conv1.register_forward_hook(lambda *_, index=index: called.append(index))
    seen, counts = set(), []
    # More patterns of gates than the compiler is willing to make graphs.
    for step in range(12):
        gates = draw_gates(survival_probs(9), gates_of(model).seed, step)
        called.clear()
        y = compiled(images())
        assert called == [index for index, gate in enumerate(gates) if gate]
        twin = copy.deepcopy(model)
        gates_of(twin)._attached = True
        torch.testing.assert_close(y, twin(images()))
        y.sum().backward()
        optimizer.step()
        seen.add(gates)
        counts.append(len(graphs))
    assert len(seen) > 8
    # Stem and readout.
    assert counts == [2] * 12
    compiled.eval()(images())
    assert len(graphs) == 3


def test_skipped_branches_of_ones_own_survive_the_compiler():
    torch._dynamo.reset()
    gates = BlockGates((0.5,) * 5, seed=4)
    torch.manual_seed(0)
    model = nn.Sequential(*(StochasticBranch(nn.Linear(4, 4), gates, i) for i in range(5)))
    gates.follow(model)
    backend, graphs = counting()
    compiled = torch.compile(model, backend=backend)
    x, seen = torch.randn(3, 4), set()
    for _ in range(20):
        y, expected = compiled(x), x
        for gate, block in zip(gates.open, model, strict=True):
            expected = expected + gate * F.linear(expected, block.branch.weight, block.branch.bias)
        torch.testing.assert_close(y, expected)
        seen.add(gates.open)
    assert len(seen) > 8
    assert not graphs
