"""Weight normalisation against its sheet: the formula for each layer, gradients, and the method."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from normlab.lab.models import build_model
from normlab.method import Setting, Unsuitable
from normlab.testing import METHOD_CHECKS, MethodCase
from normlab.weights.mean_only_batch_norm import MeanOnlyBatchNorm
from normlab.weights.weight_norm import (
    METHOD,
    check_optimizers,
    param_groups,
    parameter_groups,
    prepare,
    remove_weight_norm,
    weight_normalize,
)
from normlab.weights.weight_norm_parametrization import (
    GroupedTransposedWeightNorm,
    weight_normed,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def unit_vectors(layer, weight):
    """The weights of each output unit, one vector a unit, picked one by one."""
    if not isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return [weight[i].reshape(-1) for i in range(weight.shape[0])]
    each_in, each_out = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    return [
        torch.cat([weight[group * each_in + i, j].reshape(-1) for i in range(each_in)])
        for group in range(layer.groups)
        for j in range(each_out)
    ]


LAYERS = {
    "linear": (lambda: nn.Linear(5, 3), (4, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 3, 3, 3)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (2, 4, 5, 5)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 5)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 5)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 3, 2), (2, 2, 3, 3, 3)),
    "transposed, grouped": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "transposed, depthwise": (lambda: nn.ConvTranspose1d(4, 4, 3, groups=4), (2, 4, 5)),
}
every_layer = pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)


def normed(make):
    """A layer in float64 before and after, and what was registered."""
    plain = make().double()
    layer = weight_normalize(copy.deepcopy(plain))
    (one,) = weight_normed(layer)
    return plain, layer, one


@every_layer
def test_registration_leaves_the_function(make, shape):
    plain, layer, one = normed(make)
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(layer(x), plain(x))
    with torch.no_grad():
        one.direction.mul_(3.7)
    torch.testing.assert_close(layer(x), plain(x))


@every_layer
def test_each_unit_has_its_own_length(make, shape):
    _, layer, one = normed(make)
    lengths = one.length.flatten()
    with torch.no_grad():
        one.length.copy_((torch.randn(len(lengths)) * 2).reshape(one.length.shape))
        one.direction.normal_()
    vectors = unit_vectors(layer, layer.weight)
    directions = unit_vectors(layer, one.direction)
    assert len(vectors) == len(lengths)
    for vector, length, direction in zip(vectors, lengths, directions, strict=True):
        torch.testing.assert_close(vector, length * direction / direction.square().sum().sqrt())
        torch.testing.assert_close(vector.norm(), length.abs())


@every_layer
def test_a_length_scales_its_output_channel_only(make, shape):
    _, layer, one = normed(make)
    x = torch.randn(shape, dtype=torch.float64)
    layer.bias.data.zero_()
    before = layer(x)
    with torch.no_grad():
        one.length.view(-1)[1].mul_(2)
    factors = torch.ones(before.shape[1], dtype=torch.float64)
    factors[1] = 2
    factors = factors.reshape(-1, *[1] * (before.dim() - 2))
    torch.testing.assert_close(layer(x), before * factors)


@every_layer
def test_gradients_are_the_sheets(make, shape):
    plain, layer, one = normed(make)
    with torch.no_grad():
        one.direction.mul_(1.9)
        one.length.view(-1)[0].mul_(-1.0)
        plain.weight.copy_(layer.weight)
    x = torch.randn(shape, dtype=torch.float64)
    weights = torch.randn_like(plain(x))
    (weights * plain(x).sin()).sum().backward()
    (weights * layer(x).sin()).sum().backward()
    rows = zip(
        *(
            unit_vectors(layer, tensor)
            for tensor in (plain.weight.grad, one.direction, one.direction.grad)
        ),
        one.length.flatten(),
        one.length.grad.flatten(),
        strict=True,
    )
    for dw, v, dv, g, dg in rows:
        norm = v.norm()
        torch.testing.assert_close(dg, (dw @ v) / norm)
        torch.testing.assert_close(dv, g / norm * dw - g * dg / norm**2 * v)
        projected = dw - v * (v @ dw) / norm**2
        torch.testing.assert_close(dv, g / norm * projected)
        assert abs((dv @ v).item()) < 1e-10 * dw.norm().item() * max(1, norm.item())


def test_a_plain_step_lengthens_the_direction_by_its_square():
    _, layer, one = normed(lambda: nn.Linear(5, 3))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.3)
    layer(torch.randn(4, 5, dtype=torch.float64)).square().sum().backward()
    before = one.direction.detach().clone()
    optimizer.step()
    update = one.direction - before
    torch.testing.assert_close(
        one.direction.square().sum(1), before.square().sum(1) + update.square().sum(1)
    )


def test_grouped_transposed_norm_differentiates():
    norm = GroupedTransposedWeightNorm(2)
    weight = torch.randn(4, 3, 2, dtype=torch.float64)
    g, v = norm.right_inverse(weight)
    torch.testing.assert_close(norm(g, v), weight)
    assert g.shape == (2, 1, 3, 1)
    assert torch.autograd.gradcheck(norm, (g.requires_grad_(), v.clone().requires_grad_()))


RECURRENT = {
    "rnn": lambda: nn.RNN(3, 4, num_layers=2, bidirectional=True),
    "lstm": lambda: nn.LSTM(3, 4),
    "lstm projected": lambda: nn.LSTM(3, 4, proj_size=2),
    "gru": lambda: nn.GRU(3, 4, batch_first=True, bias=False),
    "rnn cell": lambda: nn.RNNCell(3, 4),
    "lstm cell": lambda: nn.LSTMCell(3, 4),
    "gru cell": lambda: nn.GRUCell(3, 4),
}
every_recurrent = pytest.mark.parametrize("make", RECURRENT.values(), ids=RECURRENT)


def first_output(layer, x):
    result = layer(x)
    while isinstance(result, tuple):
        result = result[0]
    return result


def sequence(layer):
    shape = (5, 3) if isinstance(layer, nn.RNNCellBase) else (5, 2, 3)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@every_recurrent
def test_recurrent_weights_have_lengths_of_their_own(make):
    plain = make()
    layer = weight_normalize(copy.deepcopy(plain))
    x = sequence(plain)
    torch.testing.assert_close(first_output(layer, x), first_output(plain, x))
    weights = [name for name, p in plain.named_parameters() if p.dim() == 2]
    found = {one.tensor: one for one in weight_normed(layer)}
    assert list(found) == weights
    for name, one in found.items():
        rows = getattr(plain, name).norm(dim=1, keepdim=True)
        torch.testing.assert_close(one.length.detach(), rows)
        with torch.no_grad():  # after the first pass: nothing may be remembered from it
            one.length.mul_(1.5)
            getattr(plain, name).mul_(1.5)
    torch.testing.assert_close(first_output(layer, x), first_output(plain, x))
    first_output(layer, x).square().sum().backward()
    # The first state of a cell is zero, and so is the gradient of what it is multiplied with.
    reached = [one for one in found.values() if not one.tensor.endswith("_hh")]
    assert all(one.length.grad.any() and one.direction.grad.any() for one in reached)


@every_recurrent
def test_recurrent_layers_are_copied_converted_and_saved(make):
    layer = weight_normalize(make())
    x = sequence(layer)
    expected = first_output(layer, x)
    twin = copy.deepcopy(layer)  # the layer holds weights with a graph now
    fresh = weight_normalize(make())
    fresh.load_state_dict(layer.state_dict())
    for other in (twin, fresh):
        torch.testing.assert_close(first_output(other, x), expected)
    with torch.no_grad():
        weight_normed(twin)[0].length.mul_(3)
    torch.testing.assert_close(first_output(layer, x), expected)
    assert not torch.allclose(first_output(twin, x), expected)
    wide = first_output(layer.double(), x.double())
    torch.testing.assert_close(wide.float(), expected)
    copy.deepcopy(layer)
    first_output(layer, x.double())
    twin = copy.deepcopy(remove_weight_norm(layer))
    for other in (twin, layer):
        torch.testing.assert_close(first_output(other, x.double()), wide)
    assert set(layer.state_dict()) == set(make().state_dict())


ATTENTION = {
    "one matrix": (lambda: nn.MultiheadAttention(4, 2, batch_first=True), (4, 4, 4)),
    "three matrices": (
        lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=5, batch_first=True),
        (4, 3, 5),
    ),
}


@pytest.mark.parametrize(("make", "sizes"), ATTENTION.values(), ids=ATTENTION)
def test_attention_has_a_length_for_each_row(make, sizes):
    plain = make()
    inputs = [torch.randn(2, 3, size) for size in sizes]
    layer = weight_normalize(copy.deepcopy(plain))
    torch.testing.assert_close(layer(*inputs)[0], plain(*inputs)[0])
    found = {f"{one.name}.{one.tensor}".lstrip("."): one for one in weight_normed(layer)}
    weights = [name for name, parameter in plain.named_parameters() if parameter.dim() == 2]
    assert sorted(found) == sorted(weights)
    for name, one in found.items():
        rows = plain.get_parameter(name).norm(dim=1, keepdim=True)
        torch.testing.assert_close(one.length.detach(), rows)
        with torch.no_grad():
            one.length.mul_(1.5)
            plain.get_parameter(name).mul_(1.5)
    expected = plain(*inputs)[0]
    torch.testing.assert_close(layer(*inputs)[0], expected)
    layer(*inputs)[0].square().sum().backward()
    assert all(one.length.grad.any() and one.direction.grad.any() for one in found.values())
    torch.testing.assert_close(copy.deepcopy(layer)(*inputs)[0], expected)
    remove_weight_norm(layer)
    torch.testing.assert_close(layer(*inputs)[0], expected)
    assert set(layer.state_dict()) == set(plain.state_dict())


def test_every_weight_of_a_transformer_is_normalised():
    model = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    plain, said = copy.deepcopy(model), []
    x = torch.randn(6, 3, 4)
    prepared = prepare(copy.deepcopy(model), settings((3, 4), said))
    assert said[0] == "4 weights are given by length and direction"
    assert "not called, left alone: self_attn.out_proj" in said[1]
    assert "self_attn.in_proj" not in said[1]
    weight_normalize(model)
    assert [one.tensor for one in weight_normed(model)].count("in_proj_weight") == 1
    for mode in (True, False):
        torch.testing.assert_close(model.train(mode)(x), plain.train(mode)(x))
        with torch.no_grad():  # torch has a path of its own for it
            torch.testing.assert_close(model(x), plain(x))
    prepared(x).sum().backward()


def network():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 4, 3, groups=2), nn.Flatten(),
        nn.Linear(4 * 5 * 5, 3),
    )  # fmt: skip


def test_removal_keeps_the_function_and_the_names():
    plain = network()
    model = weight_normalize(copy.deepcopy(plain))
    x = torch.randn(2, 2, 5, 5)
    with torch.no_grad():
        for one in weight_normed(model):
            one.length.mul_(1.3)
    expected = model(x)
    assert remove_weight_norm(model) is model
    torch.testing.assert_close(model(x), expected)
    assert set(model.state_dict()) == set(plain.state_dict())
    assert all(type(one) is type(two) for one, two in zip(model, plain, strict=True))
    assert all(
        isinstance(layer.weight, nn.Parameter) for layer in model if hasattr(layer, "weight")
    )
    assert not weight_normed(model)


def test_removal_from_a_copy_leaves_the_original():
    model = weight_normalize(network())
    x = torch.randn(2, 2, 5, 5)
    expected = model(x)
    twin = remove_weight_norm(copy.deepcopy(model))
    torch.testing.assert_close(twin(x), expected)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(remove_weight_norm(model)(x), expected)


def test_removal_of_frozen_weights():
    model = weight_normalize(nn.Linear(3, 2)).requires_grad_(False)
    remove_weight_norm(model)
    assert isinstance(model.weight, nn.Parameter)
    assert not model.weight.requires_grad


def test_others_compose_on_top():
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    layer = nn.Linear(4, 3, bias=False)
    x = torch.randn(2, 4)
    expected = 2 * layer(x)
    weight_normalize(layer)
    parametrize.register_parametrization(layer, "weight", Doubled())
    torch.testing.assert_close(layer(x), expected)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match="got Doubled on top of it; remove that first"):
        remove_weight_norm(layer)
    assert list(layer.state_dict()) == list(before)
    torch.testing.assert_close(layer(x), expected)


def test_state_survives_saving():
    model, fresh = weight_normalize(network()), weight_normalize(network())
    x = torch.randn(2, 2, 5, 5)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    keys = set(model[0].state_dict())
    prefix = "parametrizations.weight.original"
    assert keys == {"bias", f"{prefix}0", f"{prefix}1"}


def test_a_compiled_model_trains_alike():
    model = weight_normalize(network())
    x = torch.randn(2, 2, 5, 5)
    expected = torch.autograd.grad(model(x).square().sum(), tuple(model.parameters()))
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(x).square().sum(), tuple(model.parameters()))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_is_kept(dtype):
    model = weight_normalize(network().to(dtype))
    assert all(parameter.dtype == dtype for parameter in model.parameters())
    assert model(torch.randn(2, 2, 5, 5, dtype=dtype)).dtype == dtype


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.outer = nn.Linear(3, 3)
        self.outer.weight = self.inner.weight


def zero_row():
    layer = nn.Linear(3, 2)
    layer.weight.data[1] = 0
    return layer


def nan_channel():
    layer = nn.ConvTranspose2d(4, 4, 3, groups=2)
    layer.weight.data[3, 1, 0, 0] = torch.nan
    return layer


def zero_depthwise():
    layer = nn.ConvTranspose1d(2, 2, 3, groups=2)
    layer.weight.data[1] = 0
    return layer


def infinite_row():
    layer = nn.Linear(3, 2)
    layer.weight.data[1, 0] = torch.inf
    return layer


def large_half(value, shape=(4096, 2)):
    layer = nn.Linear(*shape).half()
    nn.init.constant_(layer.weight, value)
    return layer


def test_lengths_that_half_precision_holds_are_kept():
    layer = large_half(500.0)  # squares are out of range, their root is not
    weight_normalize(layer)
    assert weight_normed(layer)[0].length.flatten().tolist() == [32000.0, 32000.0]
    assert (layer.weight == 500.0).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: large_half(2000.0), "lengths that torch.float16 holds, got inf in units 0, 1;"),
        (infinite_row, "lengths that torch.float32 holds, got inf in unit 1;"),
        (zero_row, "weight_normalize.1.weight.: expected weights other than zero .* in unit 1;"),
        (nan_channel, "zeros or NaN in unit 3; start them at random"),
        (zero_depthwise, "in unit 1;"),
        (Tied, "got one shared by 1.inner.weight and 1.outer.weight; untie"),
        (lambda: parametrizations.orthogonal(nn.Linear(3, 3)), "got a parametrised one"),
        (lambda: weight_normalize(nn.Linear(3, 3)), "got a parametrised one"),
        (lambda: weight_normalize(nn.LSTM(3, 3)), "got a parametrised one"),
        (lambda: nn.LazyLinear(3), "got a lazy one; run the model once"),
    ],
)
def test_what_cannot_be_normalised_is_refused(make, message):
    model = nn.Sequential(nn.Linear(3, 3), make())
    before = list(model.state_dict())
    with pytest.raises(Unsuitable, match=message):
        weight_normalize(model)
    assert list(model.state_dict()) == before
    assert type(model[0]) is nn.Linear
    weight_normalize(model, skip=[model[1]])
    assert [one.name for one in weight_normed(model) if one.name[0] == "0"] == ["0"]


def test_nothing_to_normalise():
    with pytest.raises(Unsuitable, match="got ReLU without any"):
        weight_normalize(nn.ReLU())


def test_frozen_weights_are_left_and_shared_modules_are_one():
    shared = nn.Linear(3, 3)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(3, 2))
    model[3].requires_grad_(False)
    weight_normalize(model)
    assert [one.name for one in weight_normed(model)] == ["0"]
    assert type(model[3]) is nn.Linear


def test_groups_of_the_optimiser():
    model = weight_normalize(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
    model[1].bias.requires_grad_(False)
    decayed, kept = param_groups(model, lr=0.2, weight_decay=0.1)
    (one,) = weight_normed(model)
    assert [id(p) for p in kept["params"]] == [id(one.length), id(one.direction)]
    assert [id(p) for p in decayed["params"]] == [id(model[0].bias), id(model[1].weight)]
    assert (kept["lr"], kept["weight_decay"]) == (0.2, 0.0)
    assert (decayed["lr"], decayed["weight_decay"]) == (0.2, 0.1)
    groups = [{"params": list(model.parameters()), "weight_decay": 0.1}]
    setting = Setting(batches=())
    assert parameter_groups(groups, model, setting, decay=True) == groups
    assert [g["weight_decay"] for g in parameter_groups(groups, model, setting)] == [0.1, 0.0]


def test_an_optimiser_from_before_is_refused():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    old = torch.optim.SGD(model.parameters(), lr=0.1)
    weight_normalize(model)
    promised = (
        r"weight-norm\(optimizer\): expected an optimiser of the model's present parameters, got "
        "one built before weight-norm changed them; build it after"
    )
    with pytest.raises(ValueError, match=promised):
        METHOD.attach(model, old, Setting(batches=()))
    two = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in model]
    check_optimizers(model, *two)
    with pytest.raises(ValueError, match=promised):
        check_optimizers(model, two[0])
    model[1].requires_grad_(False)
    check_optimizers(model, two[0])


# Model options and input shape, as for the methods of the catalogue.
MODELS = {
    "mlp": ({"depth": 4, "width": 16}, (1, 6, 6)),
    "plain-conv": ({"depth": 5, "width": 8}, (2, 8, 8)),
    "resnet": ({"depth": 8, "width": 8}, (2, 8, 8)),
    "resnet projection": ({"depth": 8, "width": 8, "shortcut": "projection"}, (2, 8, 8)),
    "resnet bottleneck": ({"depth": 11, "width": 8, "block": "bottleneck"}, (2, 8, 8)),
}
OPTIONS = ({}, {"mean_only": True}, {"start": False})


def case(model, options):
    choices, shape = MODELS[model]
    generator = torch.Generator().manual_seed(0)
    return MethodCase(
        method=METHOD.with_options(**options),
        make_model=lambda: build_model(model.split()[0], shape, 4, **choices),
        inputs=torch.randn(12, *shape, generator=generator),
        targets=torch.arange(12) % 4,
        num_classes=4,
        lr=0.02,
    )


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_method_contract(model, options):
    one = case(model, options)
    for check in METHOD_CHECKS:
        check(one)


def settings(shape, said, batches=2, **changes):
    drawn = tuple((torch.randn(30, *shape) + 0.5, torch.arange(30) % 4) for _ in range(batches))
    return replace(Setting(batches=drawn, say=said.append), **changes)


def pre_activations(model, inputs):
    """What each weight layer gives, by name."""
    seen = {}
    handles = [
        layer.register_forward_hook(lambda m, i, o, name=name: seen.__setitem__(name, o.detach()))
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d))
    ]
    model(inputs)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mean_only", [False, True])
def test_every_layer_starts_normalised_on_all_batches(name, mean_only):
    options, shape = MODELS[name]
    model = build_model(name.split()[0], shape, 4, **options).double()
    norms = sum(type(m).__name__.startswith("BatchNorm") for m in model.modules())
    layers = sum(isinstance(m, (nn.Linear, nn.Conv2d)) for m in model.modules())
    said = []
    setting = settings(shape, said)
    batches = tuple((inputs.double(), targets) for inputs, targets in setting.batches)
    model = prepare(model, replace(setting, batches=batches), mean_only=mean_only)
    outputs = pre_activations(model, torch.cat([inputs for inputs, _ in batches]))
    assert len(outputs) == layers == len(weight_normed(model))
    for output in outputs.values():
        axes = [axis for axis in range(output.dim()) if axis != 1]
        variance, mean = torch.var_mean(output, axes, correction=0)
        torch.testing.assert_close(variance, torch.ones_like(variance), atol=1e-6, rtol=0)
        if not mean_only:
            assert mean.abs().max() < 1e-6
    kinds = [type(m).__name__ for m in model.modules()]
    assert not any(kind.startswith("BatchNorm") for kind in kinds)
    assert kinds.count("MeanOnlyBatchNorm") == (norms if mean_only else 0)
    # The mean-only layers shift; only the classifier has no such layer behind it.
    biased = [m for m in model.modules() if getattr(m, "bias", None) is not None]
    weighted = [m for m in biased if not isinstance(m, MeanOnlyBatchNorm)]
    assert len(weighted) == (layers - norms if mean_only else layers)
    assert said[0].startswith(f"{norms} BatchNorm layers became")
    assert said[1] == f"{layers} weights are given by length and direction"
    count = layers - norms if mean_only else layers  # the others have no bias to set the mean
    words = "1 layer starts" if count == 1 else f"{count} layers start"
    assert said[2].startswith(f"{words} at mean 0 and variance 1")
    model(torch.randn(1, *shape, dtype=torch.float64))


def test_directions_are_drawn_as_published_or_kept():
    model = nn.Sequential(nn.Linear(400, 50), nn.ReLU(), nn.Linear(50, 10))
    kept = [layer.weight.detach().clone() for layer in (model[0], model[2])]
    setting = settings((400,), [])
    drawn = prepare(copy.deepcopy(model), setting, v_std=0.05)
    for one in weight_normed(drawn):
        assert one.direction.std().item() == pytest.approx(0.05, rel=0.1)
    model = prepare(model, setting)
    for one, weight in zip(weight_normed(model), kept, strict=True):
        assert torch.equal(one.direction, weight)
    unstarted = prepare(nn.Linear(400, 5), setting, start=False, v_std=0.05)
    assert torch.equal(weight_normed(unstarted)[0].length, torch.ones(5, 1))
    assert not unstarted.bias.any()


def test_the_seed_decides_the_directions():
    def directions(seed):
        setting = settings((6,), [], generator=torch.Generator().manual_seed(seed))
        return weight_normed(prepare(nn.Linear(6, 3), setting, v_std=0.05))[0].direction

    assert torch.equal(directions(1), directions(1))
    assert not torch.equal(directions(1), directions(2))


class Transformed(nn.Module):
    """A recurrent layer and a zero layer, which is drawn anew, in front of a frozen one."""

    def __init__(self):
        super().__init__()
        self.recurrent = nn.GRU(3, 4, batch_first=True)
        self.zero = nn.Linear(4, 4, bias=False)
        nn.init.zeros_(self.zero.weight)
        self.frozen = nn.Linear(4, 2).requires_grad_(False)

    def forward(self, x):
        return self.frozen(self.zero(self.recurrent(x)[0])[:, -1])


def test_models_with_other_layers():
    model, said = Transformed(), []
    frozen = copy.deepcopy(model.frozen.state_dict())
    recurrent = copy.deepcopy(model.recurrent)
    with pytest.raises(Unsuitable, match="units 0, 1, 2, 3"):
        prepare(copy.deepcopy(model), settings((5, 3), []))
    setting = settings((5, 3), said)
    prepare(model, setting, v_std=0.05)
    assert [one.name for one in weight_normed(model)] == ["recurrent", "recurrent", "zero"]
    assert all(torch.equal(model.frozen.state_dict()[key], frozen[key]) for key in frozen)
    x = setting.batches[0][0]
    torch.testing.assert_close(model.recurrent(x)[0], recurrent(x)[0])
    assert said == [
        "3 weights are given by length and direction",
        "1 layer starts at mean 0 and variance 1",
    ]


def test_a_failed_preparation_leaves_the_model():
    model = build_model("resnet", (2, 8, 8), 4, depth=8, width=4)
    state = copy.deepcopy(model.state_dict())
    setting = settings((2, 8, 8), [])
    setting.batches[1][0][3, 1, 2, 2] = torch.inf
    with pytest.raises(ValueError, match="expected finite output of conv1"):
        prepare(model, setting)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert type(model.conv1) is nn.Conv2d
    assert type(model.bn1) is nn.BatchNorm2d


@pytest.mark.parametrize("v_std", [-0.1, float("inf"), float("nan")])
def test_the_deviation_is_checked(v_std):
    with pytest.raises(ValueError, match="expected a finite number of at least 0"):
        prepare(nn.Linear(2, 2), settings((2,), []), v_std=v_std)


def test_a_model_without_weights_is_refused():
    with pytest.raises(Unsuitable, match="got Flatten without any"):
        prepare(nn.Flatten(), settings((2,), []))


def test_the_root_may_be_a_batch_norm_in_a_sequence():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2, bias=False))
    model = prepare(model, settings((3,), []), mean_only=True)
    assert isinstance(model[0], MeanOnlyBatchNorm)
    assert model[1].bias is not None  # nothing behind it shifts
