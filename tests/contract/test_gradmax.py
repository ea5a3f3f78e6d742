"""GradMax against autograd and loops in float64: the cross term, its directions, the method."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normlab.growth import random_growth
from normlab.growth.at_zero import ClampReLU
from normlab.growth.directions import best_directions, cross_term, observe
from normlab.growth.gradmax import METHOD
from normlab.growth.new_units import (
    gradmax_units,
    norm_of_new,
    random_units,
    units_of,
    vectors,
)
from normlab.growth.pairs import clamp_relus, find_pairs
from normlab.growth.widen import widen
from normlab.lab.models import build_model
from normlab.method import Setting, Unsuitable
from normlab.testing import METHOD_CHECKS, MethodCase


def depthwise(channels, **options):
    return nn.Conv2d(channels, channels, 3, groups=channels, **options)


class Averaging(nn.Module):
    """Averages over space by a function."""

    def __init__(self):
        super().__init__()
        self.conv, self.act, self.fc = nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Linear(3, 4)

    def forward(self, x):
        return self.fc(self.act(self.conv(x)).mean((2, 3)))


def conv_pair(first, second, between=(), out=4):
    """Two convolutions with a readout that weighs every position differently."""
    return nn.Sequential(first, ClampReLU(), *between, second, nn.Tanh(), nn.Flatten(),
                         nn.LazyLinear(out))  # fmt: skip


NETWORKS = {
    "dense": (lambda: nn.Sequential(nn.Linear(5, 3), ClampReLU(), nn.Linear(3, 4)), (6, 5)),
    "leaky": (lambda: nn.Sequential(nn.Linear(5, 3), nn.LeakyReLU(), nn.Linear(3, 4)), (6, 5)),
    "sequence": (
        lambda: nn.Sequential(nn.Linear(5, 3), nn.GELU(), nn.Linear(3, 4), nn.Flatten(),
                              nn.Linear(28, 4)),
        (6, 7, 5),
    ),
    **{
        f"conv, strides {one}/{two}, size {size}": (
            lambda one=one, two=two: conv_pair(
                nn.Conv2d(2, 3, 3, one, padding=1), nn.Conv2d(3, 4, 3, two, padding=1)
            ),
            (3, 2, size, size + 1),
        )
        for one, two, size in ((1, 1, 5), (2, 1, 6), (1, 2, 6), (2, 2, 7), (3, 2, 9))
    },
    "conv, batch of one": (
        lambda: conv_pair(nn.Conv2d(2, 3, 3, 2), nn.Conv2d(3, 4, 1, 2)), (1, 2, 8, 8),
    ),
    "conv, dilated": (
        lambda: conv_pair(nn.Conv2d(2, 3, 3, dilation=2), nn.Conv2d(3, 4, 2, dilation=2)),
        (2, 2, 9, 9),
    ),
    "conv, padding same and circular": (
        lambda: conv_pair(
            nn.Conv2d(2, 3, 3, padding="same"),
            nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
        ),
        (2, 2, 5, 5),
    ),
    "conv1d": (lambda: conv_pair(nn.Conv1d(2, 3, 3), nn.Conv1d(3, 4, 3, padding=1)), (2, 2, 7)),
    "conv3d": (lambda: conv_pair(nn.Conv3d(2, 3, 2), nn.Conv3d(3, 4, 2)), (2, 2, 3, 4, 3)),
    "depth-wise between": (
        lambda: conv_pair(
            nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 4, 1),
            (depthwise(3, stride=2, padding=1), nn.SiLU()),
        ),
        (2, 2, 7, 7),
    ),
    "max pool between": (
        lambda: conv_pair(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 4, 2), (nn.MaxPool2d(2),)),
        (2, 2, 8, 8),
    ),
    "average pool and flatten": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ELU(), nn.AvgPool2d(2), nn.Flatten(),
                              nn.Linear(12, 4)),
        (3, 2, 6, 6),
    ),
    "flatten": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), ClampReLU(), nn.Flatten(), nn.Linear(12, 4)),
        (3, 2, 4, 4),
    ),
    "mean by a function": (Averaging, (3, 2, 4, 4)),
}  # fmt: skip


def network(kind):
    """A network in float64 with its first pair, inputs and targets."""
    torch.manual_seed(0)
    make, shape = NETWORKS[kind]
    x = torch.randn(shape, dtype=torch.float64)
    model = make().double()
    model(x)
    return model, find_pairs(model, x).pairs[0], x, torch.arange(len(x)) % 4


def gradients_of_new(model, pair, units, x, y):
    """Gradients of new weights by autograd, in a copy that has the new units."""
    model, pair = copy.deepcopy((model, pair))
    old = pair.width
    positions = pair.second.weight.shape[1] // old
    widen(model, {pair: units})
    wanted = [pair.first.weight, pair.second.weight]
    first, second = torch.autograd.grad(F.cross_entropy(model(x), y), wanted)
    return first[old:].flatten(1), second[:, old * positions :]


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def orthonormal(columns, count):
    return torch.linalg.qr(torch.randn(columns, count, dtype=torch.float64))[0]


@pytest.mark.parametrize("kind", NETWORKS)
def test_cross_term_gives_the_gradient_of_any_new_unit(kind):
    model, pair, x, y = network(kind)
    matrix = cross_term(pair, observe(model, [pair], x, y)[pair])
    assert matrix.shape == (vectors(pair, "incoming").shape[1], vectors(pair, "outgoing").shape[1])
    outgoing = torch.randn(2, matrix.shape[1], dtype=torch.float64)
    first, second = gradients_of_new(model, pair, units_of(pair, 2, None, outgoing), x, y)
    torch.testing.assert_close(first, pair.slope * (matrix @ outgoing.T).T, atol=1e-12, rtol=1e-9)
    assert first.abs().max() > 1e-6
    assert not second.any()


def test_cross_term_is_the_sum_over_positions_and_taps():
    """The sheet's sum, written as loops."""
    model, pair, x, y = network("conv, strides 2/1, size 6")
    seen = observe(model, [pair], x, y)[pair]
    height, width = seen.positions
    rows, columns = seen.gradients.shape[2:]
    padded = F.pad(x, (1, 1, 1, 1))
    expected = torch.zeros(2 * 9, 4 * 9, dtype=torch.float64)
    for n, i, j in itertools.product(range(len(x)), range(height), range(width)):
        patch = padded[n, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].flatten()
        arriving = torch.zeros(4, 3, 3, dtype=torch.float64)
        for a, b in itertools.product(range(3), range(3)):
            p, q = i - a + 1, j - b + 1  # the output that reads (i, j) through tap (a, b)
            if 0 <= p < rows and 0 <= q < columns:
                arriving[:, a, b] = seen.gradients[n, :, p, q]
        expected += torch.outer(patch, arriving.flatten())
    torch.testing.assert_close(cross_term(pair, seen), expected, atol=1e-13, rtol=1e-10)


def test_samples_taken_in_parts_give_the_same(monkeypatch):
    model, pair, x, y = network("conv, strides 1/1, size 5")
    seen = observe(model, [pair], x, y)[pair]
    whole = cross_term(pair, seen)
    monkeypatch.setattr("normlab.growth.directions._CHUNK", 1)
    torch.testing.assert_close(cross_term(pair, seen), whole)


def plain_convs(padding, size, first_stride=1):
    torch.manual_seed(1)
    model = conv_pair(
        nn.Conv2d(2, 3, 3, first_stride, padding=padding), nn.Conv2d(3, 4, 3, padding=padding)
    ).double()
    x, y = torch.randn(4, 2, size, size, dtype=torch.float64), torch.arange(4)
    model(x)
    (pair,) = find_pairs(model, x, names=["0"]).pairs
    seen = observe(model, [pair], x, y)[pair]
    return cross_term(pair, seen), cross_term(pair, seen, kind="aux")


def test_auxiliary_cross_term_is_exact_only_without_padding():
    for stride in (1, 2):
        exact, auxiliary = plain_convs(0, 9, stride)
        torch.testing.assert_close(auxiliary, exact, atol=1e-12, rtol=1e-9)
    errors = []
    for size in (5, 9, 33):
        exact, auxiliary = plain_convs(1, size)
        errors.append(((auxiliary - exact).norm() / exact.norm()).item())
    assert errors[0] > errors[1] > errors[2] > 0.01


def test_auxiliary_cross_term_is_refused_where_it_has_no_meaning():
    model, pair, x, y = network("max pool between")
    with pytest.raises(ValueError, match="kind='exact'"):
        cross_term(pair, observe(model, [pair], x, y)[pair], kind="aux")


def test_observing_leaves_no_trace():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(), nn.Linear(4, 3)
    )
    x, y = torch.randn(8, 5), torch.zeros(8, dtype=torch.long)
    pairs = find_pairs(model, x).pairs
    before, noise = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    observe(model, pairs, x, y)
    assert equal(before, model.state_dict())
    assert torch.equal(noise, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model)


def test_gradients_are_right_where_the_output_is_changed_in_place():
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    two = copy.deepcopy(one)
    two[3].inplace = True
    x, y = torch.randn(8, 5), torch.zeros(8, dtype=torch.long)
    seen = [observe(m, p := find_pairs(m, x).pairs, x, y)[p[0]].gradients for m in (one, two)]
    assert torch.equal(*seen)
    assert (seen[0] == 0).any()


@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
def test_directions_are_singular_vectors_with_a_fixed_sign(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    found, values = best_directions(matrix, 4)
    _, expected_values, right = torch.linalg.svd(matrix)
    torch.testing.assert_close(values, expected_values[:4])
    torch.testing.assert_close((found * right[:4].T).sum(0).abs(), torch.ones(4).double())
    assert (found.gather(0, found.abs().argmax(0, keepdim=True)) > 0).all()
    torch.testing.assert_close(best_directions(-matrix, 4)[0], found)


def test_directions_beyond_the_rank_are_random_and_orthogonal():
    torch.manual_seed(0)
    matrix = torch.outer(torch.randn(6), torch.randn(5)).double()
    one, values = best_directions(matrix, 5, torch.Generator().manual_seed(1))
    two, _ = best_directions(matrix, 5, torch.Generator().manual_seed(2))
    torch.testing.assert_close(one.T @ one, torch.eye(5).double())
    assert (values > 0).tolist() == [True, False, False, False, False]
    assert torch.equal(one[:, 0], two[:, 0])
    assert not torch.allclose(one[:, 1], two[:, 1])
    more, _ = best_directions(torch.zeros(6, 5).double(), 7)
    torch.testing.assert_close(more.norm(dim=0), torch.ones(7).double())


@pytest.mark.parametrize("kind", ["dense", "leaky", "conv, strides 1/2, size 6", "flatten"])
@pytest.mark.parametrize("count", [1, 3])
def test_gradient_norm_is_that_of_the_singular_values(kind, count):
    model, pair, x, y = network(kind)
    matrix = cross_term(pair, observe(model, [pair], x, y)[pair])
    sigma = torch.linalg.svdvals(matrix)
    units = gradmax_units(model, {pair: count}, x, y)[pair]
    size = 0.5 * pair.second.weight.transpose(0, 1).reshape(pair.width, -1).norm(dim=1).mean()
    torch.testing.assert_close(
        units.outgoing.transpose(0, 1).flatten(1).norm(dim=1), size.detach().expand(count)
    )
    first, _ = gradients_of_new(model, pair, units, x, y)
    expected = pair.slope * size.item() * sigma[:count].square().sum().sqrt().item()
    assert first.norm().item() == pytest.approx(expected, rel=1e-9)
    assert not units.incoming.any()
    for _ in range(1000 if count == 1 else 200):
        # Vectors that are chosen apart may be better, near copies of the first one.
        other = size * orthonormal(matrix.shape[1], count)
        assert pair.slope * (matrix @ other).norm() <= expected * (1 + 1e-12)


def test_norm_rules():
    _, pair, _, _ = network("flatten")
    weight = pair.second.weight.detach().view(4, 3, 4)
    mean = sum(weight[:, unit].norm().item() for unit in range(3)) / 3
    assert norm_of_new(pair) == pytest.approx(0.5 * mean)
    assert norm_of_new(pair, scale=2.0, norm="fixed") == 2.0
    incoming = pair.first.weight.detach().flatten(1).norm(dim=1).mean().item()
    assert norm_of_new(pair, scale=1.0, side="incoming") == pytest.approx(incoming)
    for options in ({"scale": 0.0}, {"norm": "max"}):
        with pytest.raises(ValueError, match=r"norm_of_new\(.*expected .* got .*; give"):
            norm_of_new(pair, **options)


@pytest.mark.parametrize("kind", ["dense", "conv, strides 2/1, size 6", "flatten"])
@pytest.mark.parametrize("outgoing_zero", [False, True])
@pytest.mark.parametrize("positive", [False, True])
def test_random_units_have_the_norm_on_one_side(kind, outgoing_zero, positive):
    model, pair, x, _ = network(kind)
    options = {"outgoing_zero": outgoing_zero, "positive": positive}
    made = [
        random_units({pair: 3}, generator=torch.Generator().manual_seed(s), **options)[pair]
        for s in (0, 0, 1)
    ]
    incoming, outgoing = made[0].incoming.flatten(1), made[0].outgoing.transpose(0, 1).flatten(1)
    chosen, zeros = (incoming, outgoing) if outgoing_zero else (outgoing, incoming)
    size = norm_of_new(pair, side="incoming" if outgoing_zero else "outgoing")
    torch.testing.assert_close(chosen.norm(dim=1), torch.full((3,), size, dtype=torch.float64))
    assert not zeros.any()
    assert (chosen >= 0).all().item() is positive
    assert torch.equal(made[0].incoming, made[1].incoming)
    assert torch.equal(made[0].outgoing, made[1].outgoing)
    assert not torch.equal(*(torch.cat([u.incoming.flatten(), u.outgoing.flatten()])
                             for u in made[1:]))  # fmt: skip
    expected = model(x)
    widen(model, {pair: made[0]})
    torch.testing.assert_close(model(x), expected, atol=1e-13, rtol=1e-12)


def test_batch_norm_between_needs_outgoing_zeros():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
    x, y = torch.randn(8, 5), torch.arange(8) % 3
    (pair,) = find_pairs(model, x).pairs
    with pytest.raises(ValueError, match="outgoing_zero=True"):
        gradmax_units(model, {pair: 1}, x, y)
    with pytest.raises(ValueError, match="outgoing_zero=True"):
        random_units({pair: 1})
    expected = model.train()(x), model.eval()(x)
    widen(model, random_units({pair: 2}, outgoing_zero=True))
    torch.testing.assert_close(model.eval()(x), expected[1])
    assert model[1].num_features == 6
    model[1].running_mean.normal_()
    torch.testing.assert_close(model.train()(x), expected[0])


def test_torch_relu_between_is_refused_until_clamped():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    x, y = torch.randn(8, 5), torch.arange(8) % 3
    pairs = find_pairs(model, x).pairs
    with pytest.raises(ValueError, match="clamp_relus"):
        gradmax_units(model, {pairs[0]: 1}, x, y)
    expected = model(x)
    clamp_relus(model, pairs)
    assert torch.equal(model(x), expected)
    (pair,) = find_pairs(model, x).pairs
    widen(model, gradmax_units(model, {pair: 1}, x, y))
    F.cross_entropy(model(x), y).backward()
    assert model[0].weight.grad[4:].any()


def test_first_outputs_of_several_are_taken():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
            self.side = nn.Linear(5, 3)

        def forward(self, x):
            return self.body(x), self.side(x)

    torch.manual_seed(0)
    model, x, y = Two(), torch.randn(8, 5), torch.arange(8) % 3
    (pair,) = find_pairs(model, x).pairs
    two = gradmax_units(model, {pair: 1}, x, y)[pair]
    (pair,) = find_pairs(model.body, x).pairs
    assert torch.equal(two.outgoing, gradmax_units(model.body, {pair: 1}, x, y)[pair].outgoing)


# -- the methods ----------------------------------------------------------------------------------

MODELS = {
    "mlp": ({"depth": 4, "width": 16}, (1, 6, 6)),
    "plain-conv": ({"depth": 5, "width": 8}, (2, 8, 8)),
    "resnet": ({"depth": 8, "width": 8}, (2, 8, 8)),
    "resnet bottleneck": ({"depth": 11, "width": 8, "block": "bottleneck"}, (2, 8, 8)),
}
# In 20 steps these grow after steps 2 to 13: the contract's checkpoint of step 3 lies between.
EARLY = {"start": 0.1}
METHODS = {
    "gradmax": METHOD.with_options(**EARLY),
    "gradmax, round-robin": METHOD.with_options(**EARLY, round_robin=True, norm="fixed"),
    "random": random_growth.METHOD.with_options(**EARLY, positive=True),
    "random, norms kept": random_growth.METHOD.with_options(**EARLY, keep_norms=True),
}


def case(method, model):
    options, shape = MODELS[model]
    return MethodCase(
        method=METHODS[method],
        make_model=lambda: build_model(model.split()[0], shape, 4, **options),
        inputs=torch.randn(12, *shape, generator=torch.Generator().manual_seed(0)),
        targets=torch.arange(12) % 4,
        num_classes=4,
        lr=0.02,
    )


@pytest.mark.parametrize(
    ("method", "model"),
    [*(("gradmax", model) for model in MODELS), *((method, "resnet") for method in METHODS)],
)
def test_contract(method, model):
    for check in METHOD_CHECKS:
        check(case(method, model))


@pytest.mark.parametrize("method", METHODS)
def test_the_checkpoint_of_the_contract_lies_between_growths(method):
    one = case(method, "mlp")
    model = one.prepared().train()
    optimizer = one.optimizer(model)
    sizes = []
    for number in range(6):
        one.step(model, optimizer, number)
        sizes.append(sum(parameter.numel() for parameter in model.parameters()))
    assert sizes[0] < sizes[2] < sizes[5]


@pytest.mark.parametrize("method", ["gradmax", "gradmax, round-robin"])
@pytest.mark.parametrize("model", MODELS)
def test_training_ends_at_the_width_of_the_model(method, model):
    one = case(method, model)
    shapes = [tuple(p.shape) for p in one.make_model().parameters() if p.dim() > 1]
    grown = one.prepared().train()
    optimizer = one.optimizer(grown)
    assert [tuple(p.shape) for p in grown.parameters() if p.dim() > 1] != shapes
    for number in range(20):
        one.step(grown, optimizer, number)
    assert [tuple(p.shape) for p in grown.parameters() if p.dim() > 1] == shapes


def test_growth_keeps_the_outputs_in_training():
    one = case("gradmax", "resnet")
    model = one.prepared().eval()
    optimizer = one.optimizer(model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    expected, before = model(one.inputs), sum(p.numel() for p in model.parameters())
    for number in range(14):
        one.step(model, optimizer, number)
        torch.testing.assert_close(model(one.inputs), expected, atol=1e-5, rtol=1e-5)
    assert sum(p.numel() for p in model.parameters()) > before


def test_prepare_says_what_it_does_and_takes_norms_between_out():
    said = []
    x = torch.randn(4, 2, 8, 8)
    setting = Setting(batches=((x, torch.arange(4)),), say=said.append, total_steps=100)
    torch.manual_seed(0)
    wide = build_model("resnet", (2, 8, 8), 4, depth=8, width=8).eval()
    model = METHOD.prepare(copy.deepcopy(wide), setting)
    first = model.layer1[0]
    assert type(first.bn1) is nn.Identity
    assert type(first.bn2) is nn.BatchNorm2d
    assert type(first.relu1) is ClampReLU
    assert not first.conv1.bias.any()
    kept = wide.layer1[0]
    assert torch.equal(first.conv1.weight, kept.conv1.weight[:2])
    torch.testing.assert_close(first.conv2.weight, 2 * kept.conv2.weight[:, :2])
    METHOD.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), setting)
    assert said[:2] == [
        "3 normalisers between layers that grow became biases",
        "3 ReLUs have derivative 1 at zero, where new units stand",
    ]
    assert said[-1] == (
        "3 pairs of layers grow from [2, 4, 8] to [8, 16, 32] units in 12 growths, after steps "
        "20 to 64"
    )


def test_models_that_cannot_grow_are_unsuitable_and_stay_as_they_are():
    class Sized(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.act, self.two = nn.Conv2d(2, 8, 1), nn.ReLU(), nn.Linear(8, 3)

        def forward(self, x):
            return self.two(self.act(self.one(x)).reshape(-1, 8, 9).mean(2).view(-1, 8))

    setting = Setting(batches=((torch.randn(4, 2, 3, 3), torch.arange(4) % 3),))
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(3, 3))
    with pytest.raises(Unsuitable, match="no activation before"):
        METHOD.prepare(model, setting)
    model = Sized()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(Unsuitable):
        METHOD.prepare(model, setting)
    assert type(model.act) is nn.ReLU
    assert equal(before, model.state_dict())


def test_an_optimiser_from_before_is_refused():
    one = case("gradmax", "mlp")
    model = one.make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model = METHOD.prepare(model, one.setting())
    with pytest.raises(ValueError, match="one built before gradmax changed them; build it after"):
        METHOD.attach(model, optimizer, one.setting())


@pytest.mark.parametrize("options", [{"start": 0.8}, {"end": 1.5}, {"num_growths": 0}], ids=str)
def test_wrong_options_are_refused(options):
    one = case("gradmax", "mlp")
    model = one.prepared()
    with pytest.raises(ValueError, match=r"gradmax\(.*expected .* got"):
        METHOD.attach(model, torch.optim.SGD(model.parameters()), one.setting(), **options)
    for fraction in (0.0, 1.5, math.nan):
        with pytest.raises(ValueError, match="width_fraction"):
            METHOD.prepare(one.make_model(), one.setting(), width_fraction=fraction)


def test_attaching_without_preparing_is_refused():
    one = case("gradmax", "mlp")
    model = one.make_model()
    with pytest.raises(ValueError, match="the model that prepare returned"):
        METHOD.attach(model, torch.optim.SGD(model.parameters()), one.setting())


@pytest.mark.parametrize("count", [0, -1, 1.5])
def test_counts_of_units_are_checked(count):
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    x, y = torch.randn(4, 4), torch.zeros(4, dtype=torch.long)
    (pair,) = find_pairs(model, x).pairs
    with pytest.raises(ValueError, match=r"gradmax_units\(wanted=.*expected 1, 2, 3, \.\.\. new"):
        gradmax_units(model, {pair: count}, x, y)
    with pytest.raises(ValueError, match=r"random_units\(wanted=.*expected 1, 2, 3, \.\.\. new"):
        random_units({pair: count})


def test_units_beside_zeros_would_never_learn():
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    nn.init.zeros_(model[2].weight)
    x, y = torch.randn(4, 4), torch.zeros(4, dtype=torch.long)
    (pair,) = find_pairs(model, x).pairs
    with pytest.raises(ValueError, match=r"norm_of_new\(0\): expected outgoing weights that"):
        gradmax_units(model, {pair: 1}, x, y)
    assert gradmax_units(model, {pair: 1}, x, y, norm="fixed")[pair].outgoing.norm() > 0.4


def test_a_network_that_diverged_grows_at_random():
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    x, y = torch.randn(4, 4), torch.zeros(4, dtype=torch.long)
    (pair,) = find_pairs(model, x).pairs
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    assert torch.isfinite(gradmax_units(model, {pair: 1}, x, y)[pair].outgoing).all()
