"""Wider layers in the middle of training: the function, the optimiser, and what is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normlab.growth.new_units import random_units, units_of
from normlab.growth.pairs import find_pairs
from normlab.growth.widen import (
    NewUnits,
    added_parameters,
    growth_bytes,
    narrow,
    widen,
)
from normlab.norms.none import ChannelBias
from normlab.optim.lookahead import Lookahead


class Residual(nn.Module):
    """A block with a branch that grows inside, and a readout."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.one, self.norm, self.act = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Tanh()
        self.two, self.fc = nn.Conv2d(4, 4, 3, padding=2), nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(x)
        return self.fc((x + self.two(self.act(self.norm(self.one(x))))).mean((2, 3)))


NETWORKS = {
    "dense": (lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), (6, 5)),
    "chain": (
        lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4, bias=False), nn.Tanh(),
                              nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 3)),
        (6, 5),
    ),
    "mobile": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
            nn.Conv2d(4, 4, 3, 2, padding=1, groups=4), nn.BatchNorm2d(4, affine=False), nn.ReLU6(),
            nn.Conv2d(4, 3, 1), ChannelBias(3), nn.LeakyReLU(), nn.AvgPool2d(2), nn.Flatten(),
            nn.Linear(12, 3),
        ),
        (6, 2, 7, 7),
    ),
    "residual": (Residual, (6, 2, 6, 6)),
}  # fmt: skip

OPTIMISERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True),
    "plain sgd": lambda groups: torch.optim.SGD(groups, lr=0.1),
    "fused sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, fused=True),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.01, amsgrad=True),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01, momentum=0.5),
}


def network(kind):
    torch.manual_seed(0)
    make, shape = NETWORKS[kind]
    model, x = make().double(), torch.randn(shape, dtype=torch.float64)
    for _ in range(2):
        model(x)
    return model, x, torch.arange(len(x)) % 3


def pairs_of(model, x):
    return find_pairs(model, x).pairs


def grow(model, x, count, optimizers=(), **limits):
    wanted = dict.fromkeys(pairs_of(model, x), count)
    units = random_units(wanted, outgoing_zero=True, generator=torch.Generator().manual_seed(1))
    widen(model, units, optimizers, **limits)


def train(model, optimizer, x, y, steps=1):
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def old_part(new, old):
    return new[tuple(slice(0, size) for size in old.shape)]


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("outgoing_zero", [False, True])
def test_the_function_is_kept(kind, outgoing_zero):
    model, x, _ = network(kind)
    pairs = pairs_of(model, x)
    assert len(pairs) == {"dense": 1, "chain": 3, "mobile": 2, "residual": 1}[kind]
    widths = [pair.width for pair in pairs]
    expected = model.eval()(x)
    generator = torch.Generator().manual_seed(0)
    units = {}
    for pair in pairs:
        first, second = pair.first.weight, pair.second.weight
        incoming = torch.randn(3, first[0].numel(), generator=generator)
        outgoing = torch.randn(3, second.shape[0] * pair.num_taps, generator=generator)
        sides = (incoming, None) if outgoing_zero else (None, outgoing)
        units[pair] = units_of(pair, 3, *sides)
    widen(model, units)
    torch.testing.assert_close(model(x), expected, atol=1e-13, rtol=1e-12)
    assert [pair.width for pair in pairs] == [pair.width for pair in pairs_of(model, x)]
    assert [pair.width for pair in pairs] == [width + 3 for width in widths]
    for pair in pairs:
        sizes = {getattr(pair.first, n, None) for n in ("out_features", "out_channels")} - {None}
        assert sizes == {pair.width}


def test_what_lies_between_grows_as_the_identity():
    model, x, _ = network("mobile")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(1) if tensor.is_floating_point() else None
    before = copy.deepcopy(model.state_dict())
    grow(model, x, 2)
    after = model.state_dict()
    for name, values in before.items():
        assert torch.equal(old_part(after[name], values), values)
    for norm in ("1", "4"):
        assert after[f"{norm}.running_mean"][4:].tolist() == [0, 0]
        assert after[f"{norm}.running_var"][4:].tolist() == [1, 1]
    assert after["1.weight"][4:].tolist() == [1, 1]
    assert after["1.bias"][4:].tolist() == [0, 0]
    assert after["7.bias"][3:].tolist() == [0, 0]
    centre = torch.zeros(3, 3, dtype=torch.float64)
    centre[1, 1] = 1
    assert torch.equal(after["3.weight"][4:], centre.expand(2, 1, 3, 3))
    assert after["3.bias"][4:].tolist() == [0, 0]
    assert (model[3].groups, model[4].num_features, model[11].in_features) == (6, 6, 20)
    model.train()(x)


@pytest.mark.parametrize("kind", ["chain", "mobile"])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_the_optimiser_goes_on(name, kind):
    model, x, y = network(kind)
    names = [name for name, _ in model.named_parameters()]
    half = len(names) // 2
    own = dict(model.named_parameters())
    groups = [
        {"params": [own[name] for name in names[half:]], "weight_decay": 0.1, "mine": "kept"},
        {"params": [own[name] for name in names[:half]]},
    ]
    optimizer = OPTIMISERS[name](groups)
    train(model, optimizer, x, y, 3)
    before = {name: dict(optimizer.state[p]) for name, p in model.named_parameters()}
    settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(1))
    grow(model, x, 2, [optimizer])

    own = dict(model.named_parameters())
    expected = [[own[name] for name in names[half:]], [own[name] for name in names[:half]]]
    for group, parameters, values in zip(optimizer.param_groups, expected, settings, strict=True):
        assert [id(p) for p in group["params"]] == [id(p) for p in parameters]
        assert {k: v for k, v in group.items() if k != "params"} == values
    assert set(optimizer.state) <= set(own.values())
    for name_, parameter in own.items():
        state = optimizer.state.get(parameter, {})
        assert state.keys() == before[name_].keys()
        for key, old in before[name_].items():
            new = state[key]
            if isinstance(old, torch.Tensor) and old.dim():
                assert new.shape == parameter.shape
                assert torch.equal(old_part(new, old), old)
                assert new.abs().sum() == pytest.approx(old.abs().sum().item())
            else:
                assert new == old
    train(model, optimizer, x, y, 2)
    assert len(seen) == 2


FIRST_VALUES = {
    "lookahead": (lambda ps: Lookahead(torch.optim.SGD(ps, lr=0.1), k=5), "slow_weight", None),
    "asgd": (lambda ps: torch.optim.ASGD(ps, lr=0.1), "ax", None),
    "rprop": (lambda ps: torch.optim.Rprop(ps, lr=0.07), "step_size", 0.07),
    "adagrad": (lambda ps: torch.optim.Adagrad(ps, initial_accumulator_value=0.5), "sum", 0.5),
    "adam": (lambda ps: torch.optim.Adam(ps), "exp_avg_sq", 0.0),
}


@pytest.mark.parametrize(("make", "key", "value"), FIRST_VALUES.values(), ids=FIRST_VALUES)
def test_state_for_new_weights_is_that_before_a_first_step(make, key, value):
    model, x, y = network("dense")
    optimizer = make(model.parameters())
    train(model, optimizer, x, y, 3)
    old = optimizer.state[model[0].weight][key].clone()
    (pair,) = pairs_of(model, x)
    widen(model, random_units({pair: 2}), [optimizer])
    for layer, axis in ((model[0], 0), (model[2], 1)):
        new = optimizer.state[layer.weight][key].narrow(axis, 4, 2)
        weight = layer.weight.detach().narrow(axis, 4, 2)
        torch.testing.assert_close(new, weight if value is None else torch.full_like(new, value))
    assert torch.equal(optimizer.state[model[0].weight][key][:4], old)
    train(model, optimizer, x, y, 6)


def test_a_graph_from_before_is_still_good():
    model, x, y = network("chain")
    loss = F.cross_entropy(model(x), y)
    old = list(model.parameters())
    values = [parameter.detach().clone() for parameter in old]
    expected = torch.autograd.grad(loss, old, retain_graph=True)
    grow(model, x, 2)
    for one, two in zip(torch.autograd.grad(loss, old), expected, strict=True):
        assert torch.equal(one, two)
    assert all(torch.equal(*pair) for pair in zip(old, values, strict=True))
    assert not {id(p) for p in old} & {id(p) for p in model[0].parameters()}


def test_neighbours_that_grow_at_once_and_one_after_the_other():
    model, x, _ = network("chain")
    pairs = pairs_of(model, x)
    torch.manual_seed(1)
    units = {
        pair: NewUnits(
            torch.randn(2, pair.first.weight.shape[1]), torch.randn(pair.second.weight.shape[0], 2)
        )
        for pair in pairs
    }
    middle = model[2].weight.detach().clone()
    widen(model, units)
    weight = model[2].weight
    assert torch.equal(weight[:4, :4], middle)
    torch.testing.assert_close(weight[4:, :4], units[pairs[1]].incoming.double())
    torch.testing.assert_close(weight[:4, 4:], units[pairs[0]].outgoing.double())
    assert not weight[4:, 4:].any()


def test_layout_type_and_freedom_are_kept():
    model, x, _ = network("residual")
    model = model.float().to(memory_format=torch.channels_last)
    model.two.weight.requires_grad_(False)
    model.two.weight.requires_grad_(True)
    model.one.bias.requires_grad_(False)
    grow(model, x.float(), 2)
    assert model.one.weight.is_contiguous(memory_format=torch.channels_last)
    assert not model.one.weight.is_contiguous()
    assert model.one.weight.dtype is torch.float32
    assert not model.one.bias.requires_grad
    assert model.one.weight.requires_grad


@pytest.mark.parametrize("kind", NETWORKS)
def test_sizes_are_known_beforehand(kind):
    model, x, y = network(kind)
    optimizer = OPTIMISERS["adamw"](model.parameters())
    train(model, optimizer, x, y)
    counts = dict.fromkeys(pairs_of(model, x), 3)
    before = sum(p.numel() for p in model.parameters())
    total = before + added_parameters(counts)
    needed = growth_bytes(counts, [optimizer])
    old = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    for limits in ({"max_parameters": total - 1}, {"max_bytes": needed - 1}):
        with pytest.raises(ValueError, match=r"widen\(max_.*expected .* got .*; add fewer"):
            grow(model, x, 3, [optimizer], **limits)
    assert {id(tensor) for tensor in model.state_dict(keep_vars=True).values()} == old
    grow(model, x, 3, [optimizer], max_parameters=total, max_bytes=needed)
    assert sum(p.numel() for p in model.parameters()) == total
    new = [t for t in model.state_dict(keep_vars=True).values() if id(t) not in old]
    size = sum(t.numel() * t.element_size() * (3 if t.requires_grad else 1) for t in new)
    assert needed == size


@pytest.mark.parametrize("moment", range(1, 9))
def test_running_out_of_memory_changes_nothing(monkeypatch, moment):
    from normlab.growth import replace_tensors
    from normlab.growth import widen as growth

    model, x, y = network("chain")
    optimizer = OPTIMISERS["adam"](model.parameters())
    train(model, optimizer, x, y)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    held = [id(p) for p in model.parameters()]
    fit, calls = replace_tensors.fit, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 3 * moment:
            raise torch.OutOfMemoryError("no memory")
        return fit(*arguments)

    monkeypatch.setattr(replace_tensors, "fit", failing)
    monkeypatch.setattr(growth, "fit", failing)
    with pytest.raises(torch.OutOfMemoryError):
        grow(model, x, 2, [optimizer])
    assert [id(p) for p in model.parameters()] == held
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == held
    torch.testing.assert_close((model.state_dict(), optimizer.state_dict()), saved, atol=0, rtol=0)
    assert (model[0].out_features, model[2].in_features) == (4, 4)
    train(model, optimizer, x, y)


def test_wrong_units_and_optimisers_are_refused():
    model, x, y = network("dense")
    (pair,) = pairs_of(model, x)
    with pytest.raises(ValueError, match=r"outgoing\): expected shape \(3, 2\), got \(3, 1\)"):
        widen(model, {pair: NewUnits(torch.zeros(2, 5), torch.zeros(3, 1))})
    with pytest.raises(ValueError, match=r"incoming\): expected shape \(2, 5\)"):
        widen(model, {pair: NewUnits(torch.zeros(2, 4), torch.zeros(3, 2))})
    stale = torch.optim.SGD(copy.deepcopy(model).parameters(), lr=0.1)
    with pytest.raises(ValueError, match="the model's present parameters"):
        widen(model, {pair: NewUnits(torch.zeros(2, 5), torch.zeros(3, 2))}, [stale])
    factored = torch.optim.Adafactor(model.parameters())
    train(model, factored, x, y)
    with pytest.raises(ValueError, match=r"optimizer=Adafactor\): expected state"):
        widen(model, {pair: NewUnits(torch.zeros(2, 5), torch.zeros(3, 2))}, [factored])
    assert pair.width == 4


@pytest.mark.parametrize("kind", NETWORKS)
def test_narrowing_keeps_the_first_units_and_the_variance(kind):
    model, x, _ = network(kind)
    whole = copy.deepcopy(model.state_dict())
    pair = pairs_of(model, x)[-1]
    first, second = pair.first.weight.detach().clone(), pair.second.weight.detach().clone()
    positions = second.shape[1] // pair.width
    factor = (pair.width / 2) ** 0.5
    narrow(pair, 2)
    assert torch.equal(pair.first.weight, first[:2])
    torch.testing.assert_close(pair.second.weight.detach(), factor * second[:, : 2 * positions])
    model.train()(x)
    assert pairs_of(model, x)[-1].width == 2
    assert whole.keys() == model.state_dict().keys()
    for width in (0, 3):
        with pytest.raises(ValueError, match="expected 1 to 2 units"):
            narrow(pair, width)
