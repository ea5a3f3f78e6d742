"""Putting a model into target space: what is converted, what stays, then the method's contract."""

import copy
import warnings

import pytest
import torch
from torch import nn

from normlab.lab.models import build_model
from normlab.method import Setting, Unsuitable
from normlab.regularizers.dropout import METHOD as DROPOUT
from normlab.testing import METHOD_CHECKS, MethodCase
from normlab.weights.target_space import METHOD, attach, parameter_groups, target_space
from normlab.weights.target_space_conv import TargetConv2d
from normlab.weights.target_space_layer import TargetLayer, TargetLinear
from normlab.weights.target_space_model import TargetSpace
from normlab.weights.target_space_recurrent import TargetRNN

MODELS = {
    "mlp": ({"depth": 4, "width": 16}, (1, 6, 6)),
    "plain-conv": ({"depth": 5, "width": 8}, (2, 8, 8)),
    "resnet": ({"depth": 8, "width": 8}, (2, 8, 8)),
    "resnet projection": ({"depth": 8, "width": 8, "shortcut": "projection"}, (2, 8, 8)),
    "resnet bottleneck": ({"depth": 11, "width": 8, "block": "bottleneck"}, (2, 8, 8)),
}


def case(model, **options):
    keywords, shape = MODELS[model]
    return MethodCase(
        method=METHOD.with_options(**options),
        make_model=lambda: build_model(model.split()[0], shape, 4, **keywords),
        inputs=torch.randn(12, *shape, generator=torch.Generator().manual_seed(0)),
        targets=torch.arange(12) % 4,
        num_classes=4,
        lr=0.02,
    )


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("options", [{}, {"mode": "optimistic", "realisation_size": 6}], ids=str)
@pytest.mark.parametrize("check", METHOD_CHECKS, ids=lambda check: check.__name__)
def test_method_contract(check, model, options):
    check(case(model, **options))


@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_of_a_prepared_model_is_a_target(model):
    prepared = case(model).prepared()
    assert isinstance(prepared, TargetSpace)
    targets = {id(layer.targets) for layer in prepared.layers()}
    assert {id(parameter) for parameter in prepared.parameters()} == targets
    x = case(model).inputs
    torch.testing.assert_close(
        prepared.to_weight_space().eval()(x), prepared.eval()(x), atol=1e-5, rtol=1e-5
    )
    assert len(prepared.realisation) == 12


def small():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(16, 3, bias=False),
    )


def setting(num_batches=3, batch_size=4, say=lambda text: None, shape=(2, 4, 4)):
    generator = torch.Generator().manual_seed(1)
    batches = tuple(
        (torch.randn(batch_size, *shape, generator=generator), torch.zeros(batch_size).long())
        for _ in range(num_batches)
    )
    return Setting(batches=batches, say=say)


def test_batch_norm_goes_and_biases_come():
    said = []
    model = METHOD.prepare(small(), setting(say=said.append))
    inner = model.model
    assert [type(layer).__name__ for layer in inner] == [
        "TargetConv2d",
        "Identity",
        "ReLU",
        "Flatten",
        "TargetLinear",
    ]
    assert inner[0].has_bias
    assert inner[4].has_bias
    assert said == [
        "2 layers are in target space, over 12 samples",
        "1 BatchNorm layers were taken out; each layer's bias does their work",
    ]
    bare = nn.Sequential(nn.Linear(3, 2, bias=False))
    assert not target_space(bare, torch.ones(4, 3)).layers()[0].has_bias


def test_options_reach_every_layer():
    model = METHOD.prepare(
        small(), setting(), ridge=0.5, relative=True, mode="optimistic", float64=True
    )
    for layer in model.layers():
        assert (layer.ridge, layer.relative, layer.mode) == (0.5, True, "optimistic")
        assert layer.float64
    assert [layer.init_std for layer in model.layers()] == [0.1, 1.0]


def test_projection_is_an_option_and_draws_follow_the_generator():
    drawn = METHOD.prepare(small(), setting(), project=False)
    projected = METHOD.prepare(small(), setting())
    drawn.project()
    assert all(
        torch.equal(one.targets, two.targets)
        for one, two in zip(drawn.layers(), projected.layers(), strict=True)
    )


def test_the_realisation_is_what_the_example_batches_hold():
    batches = setting().batches
    model = METHOD.prepare(small(), setting(), realisation_size=6)
    torch.testing.assert_close(model.realisation[:4], batches[0][0])
    torch.testing.assert_close(model.realisation[4:], batches[1][0][:2])
    assert len(METHOD.prepare(small(), setting(50)).realisation) == 100
    model(torch.randn(1, 2, 4, 4)).sum().backward()


@pytest.mark.parametrize("size", [13, 0])
def test_fewer_samples_than_asked_for_are_refused(size):
    model = small()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError,
        match=rf"target-space\(realisation_size={size}\): expected 1 to 12.*, got {size}; ask for "
        "fewer",
    ):
        METHOD.prepare(model, setting(), realisation_size=size)
    assert model.state_dict().keys() == state.keys()


class Odd(nn.Module):
    """Layers that cannot be converted, beside one that can."""

    def __init__(self):
        super().__init__()
        self.twice = nn.Linear(4, 4)
        self.embedding, self.tied = nn.Embedding(4, 4), nn.Linear(4, 4)
        self.tied.weight = self.embedding.weight
        self.never = nn.Linear(4, 4)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.line = nn.Conv1d(4, 4, 1)
        self.norm = nn.LayerNorm(4)
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        x = self.frozen(self.normed(self.tied(self.twice(self.twice(x)))))
        return self.last(self.norm(self.line(x[:, :, None]).flatten(1)))


def test_what_cannot_be_converted_keeps_its_weights():
    said = []
    model = Odd()
    weights = {name: p for name, p in model.named_parameters() if not name.startswith("last")}
    model = target_space(model, torch.randn(5, 4), say=said.append)
    assert [type(layer) for layer in model.layers()] == [TargetLinear]
    kept = {name.removeprefix("model."): p for name, p in model.named_parameters()}
    assert all(kept[name] is weight for name, weight in weights.items())
    told = said[-1]
    for reason in (
        "twice is called 2 times",
        "tied shares its weight",
        "never is called 0 times",
        "normed makes its weight from others",
        "frozen is frozen",
        "line is of another kind (Conv1d)",
    ):
        assert reason in told, told
    x = torch.randn(3, 4)
    torch.testing.assert_close(model.to_weight_space()(x), model(x))
    model(x).sum().backward()
    assert model.model.twice.weight.grad is not None


class Recurrent(nn.Module):
    """Recurrent layers of torch: one that can be converted, one that cannot."""

    def __init__(self, kind=nn.LSTM, batch_first=True, **options):
        super().__init__()
        self.first = nn.RNN(4, 6, batch_first=batch_first, **options)
        self.second, self.last = kind(6, 5, batch_first=batch_first), nn.Linear(5, 3)

    def forward(self, x):
        x = x if self.first.batch_first else x.transpose(0, 1)
        states, _ = self.second(self.first(x)[0])
        return self.last(states[:, -1] if self.first.batch_first else states[-1])


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", [{}, {"nonlinearity": "relu", "bias": False}], ids=str)
def test_a_recurrent_layer_of_torch_is_converted(batch_first, options):
    said = []
    plain = Recurrent(nn.RNN, batch_first, **options)
    names = list(plain.state_dict())
    model = target_space(plain, torch.randn(5, 7, 4), mode="optimistic", ridge=0.2, say=said.append)
    first, second, last = model.layers()
    assert type(first) is type(second) is TargetRNN
    assert said == ["3 layers are in target space, over 5 samples"]
    assert first.targets.shape == (5, 7, 6)
    assert (first.has_bias, first.nonlinearity) == (
        options.get("bias", True),
        options.get("nonlinearity", "tanh"),
    )
    assert [layer.init_std for layer in model.layers()] == [1.0, 1.0, 1.0]
    assert [layer.ridge for layer in model.layers()] == [0.2, 0.2, 0.2]
    assert (first.mode, last.mode) == ("sequential", "optimistic")
    x = torch.randn(2, 9, 4)
    model(x).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    exported = model.to_weight_space()
    assert list(exported.state_dict()) == names
    torch.testing.assert_close(exported(x), model(x))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_other_recurrent_layers_keep_their_weights_with_a_warning(kind):
    with pytest.warns(
        UserWarning, match=rf"weights stay: second is of another kind \({kind.__name__}"
    ):
        model = target_space(Recurrent(kind), torch.randn(5, 7, 4))
    assert [type(layer) for layer in model.layers()] == [TargetRNN, TargetLinear]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        target_space(Recurrent(kind), torch.randn(5, 7, 4), say=lambda text: None)
        target_space(nn.Sequential(nn.Linear(4, 2)), torch.randn(5, 4))


class Called(nn.Module):
    """One recurrent layer, called as a test asks."""

    def __init__(self, call, **options):
        super().__init__()
        self.cell, self.last = nn.RNN(4, 6, batch_first=True, **options), nn.Linear(6, 3)
        self.call = call

    def forward(self, x):
        return self.last(self.call(self.cell, x)[1][-1])


@pytest.mark.parametrize(
    ("call", "options", "reason"),
    [
        (lambda cell, x: cell(x), {"num_layers": 2}, "has several layers or directions"),
        (lambda cell, x: cell(x), {"bidirectional": True}, "has several layers or directions"),
        (lambda cell, x: cell(x, torch.zeros(1, len(x), 6)), {}, "is given a first state"),
        (lambda cell, x: cell(x, hx=torch.zeros(1, len(x), 6)), {}, "is given a first state"),
        (
            lambda cell, x: (None, cell(x[:, 0])[0][None]),
            {},
            "does not take one tensor with a batch",
        ),
        (
            lambda cell, x: cell(nn.utils.rnn.pack_padded_sequence(x, [7] * len(x), True)),
            {},
            "does not take one tensor with a batch",
        ),
    ],
)
def test_recurrent_layers_of_other_forms_keep_their_weights(call, options, reason):
    with pytest.warns(UserWarning, match=f"weights stay: cell {reason}"):
        model = target_space(Called(call, **options), torch.randn(5, 7, 4))
    assert [type(layer) for layer in model.layers()] == [TargetLinear]
    assert not model.model.cell._forward_pre_hooks
    torch.testing.assert_close(model.to_weight_space()(x := torch.randn(2, 7, 4)), model(x))


def test_models_without_a_place_are_refused():
    with pytest.raises(Unsuitable, match=r"target_space\(model\): expected an nn.Linear.*Conv1d"):
        target_space(nn.Sequential(nn.Conv1d(2, 2, 1)), torch.ones(3, 2, 4))
    with pytest.raises(Unsuitable, match="there is no such layer"):
        target_space(nn.Sequential(nn.ReLU()), torch.ones(3, 2))
    model = nn.Sequential(nn.Linear(2, 2), nn.SyncBatchNorm(2))
    with pytest.raises(Unsuitable, match=r"got 1 \(SyncBatchNorm\); take it out first"):
        target_space(model, torch.ones(3, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ridge": -1.0}, r"target_space\(ridge=-1\.0\): expected a finite number"),
        ({"mode": "bold"}, r"expected 'sequential' or 'optimistic', got 'bold'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        METHOD.prepare(small(), setting(), **options)


def test_a_conversion_that_fails_leaves_the_model():
    model = small()
    before = list(model)
    huge = torch.full((3, 2, 4, 4), 1e30)
    with pytest.raises(ValueError, match="raise ridge"):
        target_space(model.double(), huge.double(), ridge=1e-8)
    assert list(model) == before
    assert model(torch.randn(4, 2, 4, 4).double()).shape == (4, 3)


def test_dropout_in_front_of_a_layer_comes_along():
    method = DROPOUT.with_options(p=0.5) + METHOD
    model = method.prepare(small(), setting())
    x = torch.randn(8, 2, 4, 4)
    assert not torch.equal(model(x), model(x))
    exported = model.to_weight_space()
    assert not torch.equal(exported(x), exported(x))
    torch.testing.assert_close(exported.eval()(x), model.eval()(x))


def test_targets_have_groups_of_their_own():
    model = target_space(Odd(), torch.randn(5, 4), say=lambda text: None)
    groups = [{"params": list(model.parameters()), "lr": 0.1, "weight_decay": 1e-4}]
    weights, targets = parameter_groups(groups, model, setting(), lr_factor=100.0)
    assert targets["params"] == [layer.targets for layer in model.layers()]
    assert (targets["lr"], targets["weight_decay"]) == (pytest.approx(10.0), 0.0)
    assert (weights["lr"], weights["weight_decay"]) == (0.1, 1e-4)
    (_, targets) = parameter_groups(groups, model, setting(), decay_targets=True)
    assert (targets["lr"], targets["weight_decay"]) == (0.1, 1e-4)
    with pytest.raises(ValueError, match=r"lr_factor=0\.0\): expected a number above 0"):
        parameter_groups(groups, model, setting(), lr_factor=0.0)


def test_an_optimiser_built_before_is_refused():
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model = METHOD.prepare(model, setting())
    with pytest.raises(
        ValueError,
        match=r"target-space\(optimizer\): expected an optimiser of the model's present "
        r"parameters, got one built before target-space changed them; build it after",
    ):
        attach(model, optimizer, setting())
    attach(model, torch.optim.SGD(model.parameters(), lr=0.1), setting())
    assert any(isinstance(module, TargetLayer) for module in model.modules())
    assert isinstance(model.model[0], TargetConv2d)


def test_any_optimiser_trains_it():
    x, classes = torch.randn(12, 2, 4, 4), torch.arange(12) % 3
    for make in (
        lambda p: torch.optim.SGD(p, lr=1.0),
        lambda p: torch.optim.Adam(p, lr=0.02, fused=True),
        lambda p: torch.optim.RMSprop(p, lr=0.01),
    ):
        torch.manual_seed(0)
        model = target_space(small(), x, ridge=1e-3)
        optimizer = make(model.parameters())
        first = None
        for _ in range(30):
            loss = nn.functional.cross_entropy(model(x), classes)
            first = loss.item() if first is None else first
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss.item() < 0.7 * first
