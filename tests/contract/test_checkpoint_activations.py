"""Activation checkpointing: the same numbers with less memory, and the chooser of segments."""

import copy
import io
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from normlab.lab.memory import peak_memory
from normlab.lab.models import build_model
from normlab.method import Setting
from normlab.norms.batch_norm import synchronize
from normlab.regularizers.block_gates import BlockGates
from normlab.regularizers.stochastic_depth import METHOD, StochasticBranch, gates_of
from normlab.surgery.checkpoint_activations import CheckpointedSequential, checkpoint_activations
from normlab.surgery.segments import Layer, choose_segments
from resnets_of_others import TorchvisionResNet

# -- the chooser ----------------------------------------------------------------------------------


def total(runs, chosen):
    """What is kept for all segments and the largest of them, from the definition."""
    kept, largest = 0, 0
    for run, lengths in zip(runs, chosen, strict=True):
        assert sum(lengths) == len(run)
        start = 0
        for length in lengths:
            part = run[start : start + length]
            assert length >= 1
            assert not part[0].not_first or start == 0
            kept += part[0].boundary
            largest = max(largest, sum(layer.saved for layer in part))
            start += length
    return kept, largest


def all_cuts(run):
    for bits in itertools.product([False, True], repeat=len(run) - 1):
        begins = [0, *(i + 1 for i, bit in enumerate(bits) if bit)]
        if not any(run[i].not_first for i in begins[1:]):
            yield [j - i for i, j in zip(begins, [*begins[1:], len(run)], strict=True)]


@pytest.mark.parametrize("seed", range(12))
def test_the_least_of_all_cuts(seed):
    generator = torch.Generator().manual_seed(seed)

    def layers(count):
        numbers = torch.randint(0, 20, (count, 3), generator=generator).tolist()
        return [Layer(saved, boundary, glued > 14) for saved, boundary, glued in numbers]

    runs = [layers(6), layers(4), layers(1)]
    options = list(itertools.product(*map(all_cuts, runs)))
    assert sum(total(runs, choose_segments(runs))) == min(sum(total(runs, o)) for o in options)
    for count in (3, 4, 6):
        chosen = choose_segments(runs, count)
        assert sum(map(len, chosen)) <= count
        allowed = [o for o in options if sum(map(len, o)) <= count]
        assert total(runs, chosen)[1] == min(total(runs, o)[1] for o in allowed)


@pytest.mark.parametrize("length", [1, 2, 10, 100, 1000, 5000])
def test_equal_layers_need_twice_the_root(length):
    runs = [[Layer(1, 1)] * length]
    assert sum(total(runs, choose_segments(runs))) <= 2 * math.sqrt(length) * 1.02 + 1


def test_costs_of_nothing():
    assert choose_segments([[Layer(0, 0)] * 3]) is not None
    assert sum(choose_segments([[Layer(0, 0)] * 300])[0]) == 300


# -- models ---------------------------------------------------------------------------------------


def resnet(depth=32, **options):
    torch.manual_seed(0)
    return build_model("resnet", (2, 8, 8), 4, depth=depth, width=4, **options).double()


def plain(depth=12):
    torch.manual_seed(0)
    return build_model("plain-conv", (2, 8, 8), 4, depth=depth, width=4).double()


def dense(depth=9):
    torch.manual_seed(0)
    return build_model("mlp", (2, 8, 8), 4, depth=depth, width=16).double()


def nested():
    """Sequentials in a Sequential, one of them twice, with dropout and layers that work in place.

    In place behind an odd function, so that a second pass over what it left would differ.
    """
    torch.manual_seed(0)
    shared = nn.Sequential(nn.Linear(8, 8), nn.ELU(inplace=True), nn.Dropout(0.5), nn.Tanh())
    inner = [nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ELU(inplace=True))] * 3
    last = [nn.Linear(8, 8), nn.Dropout(0.3, inplace=True), nn.Linear(8, 4)]
    front = [nn.Flatten(), nn.Linear(128, 8), shared]
    return nn.Sequential(*front, *inner, shared, *last).double()


def torchvision():
    torch.manual_seed(0)
    model = TorchvisionResNet((3, 2, 1, 1)).double()
    model.conv1 = nn.Conv2d(2, 8, 7, 2, 3, bias=False).double()
    return model


def weight_normalised():
    model = plain()
    for layer in [m for m in model.modules() if isinstance(m, nn.Conv2d)]:
        parametrizations.weight_norm(layer)
    return model


MODELS = {
    "resnet": resnet,
    "resnet projection": lambda: resnet(shortcut="projection"),
    "bottleneck": lambda: resnet(29, block="bottleneck"),
    "plain-conv": plain,
    "mlp": dense,
    "nested": nested,
    "torchvision": torchvision,
    "weight norm": weight_normalised,
}


def images(count=6, seed=1, size=8):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 2, size, size, generator=generator, dtype=torch.float64)


def observe(model, x):
    """Take two steps and return all that they left."""
    torch.manual_seed(7)
    x = x.clone().requires_grad_()
    seen = []
    for _ in range(2):
        model.zero_grad()
        y = model(x)
        y.square().sum().backward()
        seen += [y.detach(), x.grad.clone(), torch.rand(1)]
        seen += [parameter.grad.clone() for parameter in model.parameters()]
        seen += [buffer.clone() for buffer in model.buffers()]
    return seen


@pytest.mark.parametrize("with_example", [False, True])
@pytest.mark.parametrize("segments", [None, 8])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_numbers(name, segments, with_example):
    model, x = MODELS[name](), images()
    expected = observe(copy.deepcopy(model), x)
    names, kept = list(model.state_dict()), dict(model.named_parameters())
    state = torch.get_rng_state()
    before = copy.deepcopy(model.state_dict())
    assert checkpoint_activations(model, segments, example=x[:2] if with_example else None) is model
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert list(model.state_dict()) == names
    assert all(kept[name] is parameter for name, parameter in model.named_parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert any(part.recomputed for run in runs_of(model) for part in run.segments)
    for one, two in zip(observe(model, x), expected, strict=True):
        assert torch.equal(one, two)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), model(x))


def runs_of(model):
    return [module for module in model.modules() if isinstance(module, CheckpointedSequential)]


def test_evaluation_with_gradients():
    model, x = resnet(), images()
    twin = copy.deepcopy(model)
    checkpoint_activations(model)
    model.eval()(x).sum().backward()
    twin.eval()(x).sum().backward()
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)


def test_backward_twice_and_gradients_of_gradients():
    results = []
    for prepare in (lambda model: model, checkpoint_activations):
        model, x = prepare(resnet(14)), images().requires_grad_()
        loss = model(x).square().sum()
        loss.backward(retain_graph=True)
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        gradient.square().sum().backward()
        results.append([p.grad for p in model.parameters()] + list(model.buffers()))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, atol=1e-12, rtol=1e-10)


class Counting(nn.Module):
    """A layer whose output depends on a buffer that it changes, in place or by a new tensor."""

    def __init__(self, in_place):
        super().__init__()
        self.in_place = in_place
        self.register_buffer("count", torch.zeros(1, dtype=torch.float64))
        self.weight = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, x):
        if self.in_place:
            self.count += 1
        else:
            self.count = self.count + 1
        return torch.tanh(self.weight * x * self.count.clone())


@pytest.mark.parametrize("in_place", [False, True])
def test_recomputation_sees_the_buffers_of_the_first_pass(in_place):
    results = []
    for prepare in (lambda model: model, checkpoint_activations):
        model = prepare(nn.Sequential(*(Counting(in_place) for _ in range(6))))
        x = torch.ones(2, dtype=torch.float64)
        first, second = model(x), model(2 * x)  # the counts go on before backward
        (first.sum() + second.square().sum()).backward()
        results.append([layer.weight.grad for layer in model] + [one.count for one in model])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
    assert results[1][-1].item() == 2


def test_recomputation_may_be_repeated():
    results = []
    for prepare in (lambda model: model, checkpoint_activations):
        model = prepare(nn.Sequential(*(Counting(True) for _ in range(6))))
        x = torch.ones(2, dtype=torch.float64, requires_grad=True)
        loss = model(x).sum()
        loss.backward(retain_graph=True)
        loss.backward()
        results.append([x.grad, *(layer.weight.grad for layer in model)])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


class Uncounted(nn.Module):
    """Batch normalisation whose buffers are moved by torch's kernel alone."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(4, dtype=torch.float64))
        self.register_buffer("running_var", torch.ones(4, dtype=torch.float64))

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, training=True)


def test_statistics_that_no_counter_tells_of_are_moved_once():
    results = []
    for prepare in (lambda model: model, checkpoint_activations):
        torch.manual_seed(0)
        model = prepare(nn.Sequential(*(Uncounted() for _ in range(6))))
        x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
        model(x).square().sum().backward()
        results.append([buffer.clone() for buffer in model.buffers()])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@pytest.mark.parametrize("mode", ["skip", "mask"])
def test_stochastic_depth_keeps_its_gates(mode):
    results = []
    for prepare in (lambda model: model, checkpoint_activations):
        setting = Setting(batches=((images(), torch.zeros(6)),))
        model = prepare(METHOD.with_options(mode=mode).prepare(resnet(), setting))
        # The second forward draws other gates before the first one is recomputed.
        loss = model(images()).square().sum() + model(images(seed=3)).square().sum()
        drawn = gates_of(model).open
        loss.backward()
        assert gates_of(model).open == drawn
        results.append([p.grad for p in model.parameters()] + list(model.buffers()))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_dropped_branches_are_not_recomputed():
    calls = []
    gates = BlockGates((1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0))
    branches = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(8)]
    model = nn.Sequential(*(StochasticBranch(f, gates, i) for i, f in enumerate(branches)))
    for index, block in enumerate(model):
        block.branch[0].register_forward_hook(lambda *_, index=index: calls.append(index))
    gates.follow(model)
    checkpoint_activations(model, 4)(torch.randn(2, 4)).sum().backward()
    assert {index: calls.count(index) for index in set(calls)} == {0: 2, 2: 2, 4: 2, 6: 1, 7: 1}


# -- memory ---------------------------------------------------------------------------------------


def saved_bytes(model, x):
    """What one forward keeps for backward, each storage once; parameters left out."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return sum(t.untyped_storage().nbytes() for a, t in kept.items() if a not in own)


def step_memory(model, x):
    with peak_memory(model, wanted=True) as peak:
        model(x).sum().backward()
    held = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    gradients = sum(parameter.nbytes for parameter in model.parameters())
    return peak[0] - held - gradients


def chain(length):
    return nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(length)))


def test_memory_grows_as_the_root_of_depth():
    x = torch.randn(512, 8)
    plain, less = (
        {length: step_memory(prepare(chain(length)), x) for length in (64, 1024)}
        for prepare in (lambda model: model, checkpoint_activations)
    )
    assert plain[1024] / plain[64] > 14
    assert less[1024] / less[64] < 5  # the root of 16 is 4
    assert less[1024] < plain[1024] / 10


@pytest.mark.parametrize("name", ["resnet", "plain-conv", "mlp", "torchvision"])
def test_memory_falls_on_any_model(name):
    x = images(32)
    plain, less = MODELS[name](), MODELS[name]()
    checkpoint_activations(less, example=x[:2])
    assert step_memory(less, x) < 0.75 * step_memory(plain, x)
    assert saved_bytes(less, x) < 0.7 * saved_bytes(plain, x)


def test_an_example_lowers_the_memory_of_unequal_stages():
    x = images(16, size=16)
    blind, seeing = resnet(56), resnet(56)
    checkpoint_activations(blind)
    checkpoint_activations(seeing, example=x[:2])
    assert step_memory(seeing, x) < step_memory(blind, x)
    # Blocks of the first stage hold twice the bytes of those of the second.
    lengths = [max(len(part.names) for part in run.segments) for run in runs_of(seeing)]
    assert lengths[0] < lengths[1] < lengths[2]


def test_measuring_holds_nothing():
    model, x = chain(200), torch.randn(512, 8)
    with peak_memory(model, wanted=True) as peak:
        checkpoint_activations(model, example=x)
    held = sum(parameter.nbytes for parameter in model.parameters())
    assert peak[0] - held < 6 * x.nbytes


# -- what else may happen to the model ------------------------------------------------------------


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("remake", [copy.deepcopy, pickled])
def test_copies(remake):
    model = checkpoint_activations(resnet())
    twin = remake(model)
    assert [run.segments for run in runs_of(twin)] == [run.segments for run in runs_of(model)]
    for one, two in zip(observe(twin, images()), observe(model, images()), strict=True):
        assert torch.equal(one, two)


def test_layers_that_are_replaced_later_are_used():
    model = checkpoint_activations(plain())
    synchronize(model)
    used = []
    for module in model.modules():
        if "Synchronized" in type(module).__name__:
            module.register_forward_hook(lambda *_: used.append(1))
    model(images())
    assert used


def test_layers_that_are_added_later_are_not_forgotten():
    model = checkpoint_activations(plain())
    model.append(nn.Identity())
    with pytest.raises(ValueError, match="call checkpoint_activations"):
        model(images())
    checkpoint_activations(model)
    model(images())


def test_called_again_it_plans_anew():
    model = checkpoint_activations(resnet(), 3)
    assert [len(run.segments) for run in runs_of(model)] == [1, 1, 1]
    checkpoint_activations(model, 9, example=images())
    assert len(runs_of(model)) == 3
    assert 6 < sum(len(run.segments) for run in runs_of(model)) <= 9
    expected = observe(resnet(), images())
    assert all(map(torch.equal, observe(model, images()), expected))


def test_hooks_of_a_sequential_in_a_sequential_are_called():
    model = chain(8)
    called = []
    model[3].register_forward_hook(lambda *_: called.append(1))
    checkpoint_activations(model)(torch.randn(2, 8)).sum().backward()
    assert 1 <= len(called) <= 2
    assert any("3" in segment.names for segment in model.segments)


def test_hooks_that_come_later_are_called_and_may_go_again():
    shared = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5)), shared, nn.Tanh(), shared)
    x, called = torch.randn(2, 8), []
    expected = observe_chain(copy.deepcopy(model), x)
    checkpoint_activations(model, 6)
    handle = shared.register_forward_hook(lambda *_: called.append(1))
    for one, two in zip(observe_chain(model, x), expected, strict=True):
        torch.testing.assert_close(one, two)
    assert 2 <= len(called) <= 4
    handle.remove()
    for one, two in zip(observe_chain(model, x), expected, strict=True):
        assert torch.equal(one, two)


def observe_chain(model, x):
    y = model(x)
    return [y, *torch.autograd.grad(y.square().sum(), list(model.parameters()))]


class ActsFirst(nn.Module):
    """A block that changes its input in place, as pre-activation blocks may."""

    def __init__(self, act):
        super().__init__()
        self.act, self.linear = act, nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(self.act(x))


class ActsByFunction(ActsFirst):
    def forward(self, x):
        return self.linear(nn.functional.silu(x, inplace=True))


@pytest.mark.parametrize(
    "make", [lambda: ActsFirst(nn.SiLU(True)), lambda: ActsByFunction(nn.Tanh())]
)
def test_blocks_whose_first_act_is_in_place(make):
    torch.manual_seed(0)
    layers = [part for _ in range(4) for part in (nn.Linear(8, 8), make())]
    model, x = nn.Sequential(*layers), torch.randn(3, 8)
    expected = observe_chain(copy.deepcopy(model), x)
    checkpoint_activations(model, 4, example=x)
    for one, two in zip(observe_chain(model, x), expected, strict=True):
        assert torch.equal(one, two)


def test_a_first_layer_that_acts_in_place_is_seen_without_an_example():
    torch.manual_seed(0)
    layers = [part for _ in range(4) for part in (nn.Linear(8, 8), ActsFirst(nn.ReLU(True)))]
    model, x = nn.Sequential(*layers), torch.randn(3, 8)
    expected = observe_chain(copy.deepcopy(model), x)
    for one, two in zip(observe_chain(checkpoint_activations(model, 4), x), expected, strict=True):
        assert torch.equal(one, two)


def test_refusals():
    with pytest.raises(ValueError, match="got Linear without any; put the repeated layers"):
        checkpoint_activations(nn.Linear(2, 2))
    model = resnet()
    with pytest.raises(ValueError, match=r"expected at least 3, one for each.*got 2; leave it"):
        checkpoint_activations(model, 2)
    assert not runs_of(model)
    with pytest.raises(RuntimeError):
        checkpoint_activations(model, example=torch.zeros(2, 5, 8, 8, dtype=torch.float64))
    assert not runs_of(model)
    assert not any(module._forward_hooks for module in model.modules())
