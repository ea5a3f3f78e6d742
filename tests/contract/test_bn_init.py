"""Batch-norm scale initialisation against its sheet's properties, then the contract."""

import copy
import math

import pytest
import torch
from torch import nn

from normlab.inits.bn_init import METHOD, bn_init_, param_groups, parameter_groups
from normlab.inits.bn_init_recipe import init_weights_, online_input_norm
from normlab.lab.models import build_model
from normlab.method import Setting, Unsuitable
from normlab.norms.filter_response_norm import FilterResponseNorm
from normlab.testing import METHOD_CHECKS, MethodCase

MODELS = {
    "mlp": ({"depth": 4, "width": 16}, (1, 6, 6)),
    "plain-conv": ({"depth": 5, "width": 8}, (2, 8, 8)),
    "resnet": ({"depth": 8, "width": 8}, (2, 8, 8)),
    "resnet bottleneck": ({"depth": 11, "width": 8, "block": "bottleneck"}, (2, 8, 8)),
}
OPTIONS = {
    "plain": {},
    "recipe": {"input_norm": True, "conv_init": "kaiming", "linear_init": "default"},
}


def setting(shape=(4, 3, 8, 8), said=None, dtype=torch.float32):
    say = (lambda _: None) if said is None else said.append
    inputs = torch.rand(shape).to(dtype)
    return Setting(batches=((inputs, torch.zeros(shape[0])),), lr=0.2, say=say)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_contract(name, options):
    chosen, shape = MODELS[name]
    generator = torch.Generator().manual_seed(0)
    case = MethodCase(
        method=METHOD.with_options(**options),
        make_model=lambda: build_model(name.split()[0], shape, 4, **chosen),
        inputs=torch.rand(12, *shape, generator=generator),
        targets=torch.arange(12) % 4,
        num_classes=4,
        lr=0.02,
    )
    for check in METHOD_CHECKS:
        check(case)


# The scale.


@pytest.mark.parametrize("scale", [0.1, 0.37])
def test_output_and_input_gradient_are_gamma_times_those_of_batch_norm(scale):
    x = torch.randn(6, 3, 4, 4, dtype=torch.float64)
    weights = torch.randn_like(x)
    plain = nn.BatchNorm2d(3).double()
    layer = bn_init_(nn.BatchNorm2d(3).double(), scale)
    results = []
    for one in (layer, plain):
        given = x.clone().requires_grad_()
        y = one(given)
        (y * weights).sum().backward()
        results.append((y.detach(), given.grad))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, scale * expected, atol=1e-14, rtol=1e-12)
    assert layer.bias.tolist() == [0, 0, 0]
    assert layer.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(layer.state_dict())


def test_shifts_become_zero_and_layers_in_skip_stay():
    model = nn.ModuleDict({name: nn.BatchNorm1d(2) for name in ("one", "two", "three")})
    model["inner"] = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.7)
    assert bn_init_(model, 0.2, skip=[model["two"], model["inner"]]) is model
    values = {name: parameter.flatten()[0].item() for name, parameter in model.named_parameters()}
    assert values == pytest.approx(
        {
            "one.weight": 0.2, "one.bias": 0.0, "two.weight": 0.7, "two.bias": 0.7,
            "three.weight": 0.2, "three.bias": 0.0, "inner.0.weight": 0.7, "inner.0.bias": 0.7,
            "inner.1.weight": 0.7, "inner.1.bias": 0.7,
        }
    )  # fmt: skip


def test_only_the_type_of_a_layer_counts():
    model = nn.Sequential(
        nn.LayerNorm(3),
        nn.GroupNorm(1, 3),
        nn.InstanceNorm1d(3, affine=True),
        nn.PReLU(3),
        FilterResponseNorm(3),
        nn.BatchNorm1d(3, affine=False),
        nn.SyncBatchNorm(3),
    )
    bn_init_(model, 0.1)
    scales = [m.weight[0].item() for m in model if getattr(m, "weight", None) is not None]
    assert scales == pytest.approx([1, 1, 1, 0.25, 1, 0.1])
    bn_init_(model, 0.3, normalisers=(FilterResponseNorm, nn.LayerNorm))
    scales = [m.weight[0].item() for m in model if getattr(m, "weight", None) is not None]
    assert scales == pytest.approx([0.3, 1, 1, 0.25, 0.3, 0.3])


def test_what_the_scale_changes_and_what_not():
    """Three stages, a head, a fixed gradient at the logits: ratios 0.1, 0.1, 1 and 1."""

    def gradients(scale):
        torch.manual_seed(0)
        stages = [
            nn.Sequential(
                nn.Conv2d(channels, 4, 3, padding=1, bias=False),
                nn.BatchNorm2d(4, eps=1e-12),
                nn.ReLU(),
            )
            for channels in (2, 4, 4)
        ]
        model = nn.Sequential(*stages, nn.Flatten(), nn.Linear(64, 3, bias=False)).double()
        x = torch.randn(5, 2, 4, 4, dtype=torch.float64)
        fixed = torch.randn(5, 3, dtype=torch.float64)
        logits = bn_init_(model, scale)(x)
        (logits * fixed).sum().backward()
        return logits.detach(), [(stage[0], stage[1]) for stage in stages]

    (small, stages), (large, others) = gradients(0.1), gradients(1.0)
    torch.testing.assert_close(small, 0.1 * large, rtol=1e-7, atol=1e-9)
    for (conv, norm), (other_conv, other_norm) in zip(stages, others, strict=True):
        torch.testing.assert_close(
            conv.weight.grad, 0.1 * other_conv.weight.grad, rtol=1e-7, atol=1e-10
        )
        torch.testing.assert_close(norm.weight.grad, other_norm.weight.grad, rtol=1e-7, atol=1e-10)
        torch.testing.assert_close(norm.bias.grad, other_norm.bias.grad, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("scale", [0.0, -0.1, math.nan, math.inf])
def test_a_scale_that_is_not_above_zero_is_refused(scale):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    before = copy.deepcopy(model.state_dict())
    for call in (
        lambda: bn_init_(model, scale),
        lambda: METHOD.prepare(model, setting((4, 3)), scale=scale, linear_init="default"),
        lambda: online_input_norm(3, scale),
    ):
        with pytest.raises(ValueError, match=r"scale=.*expected a finite number above 0, got .*;"):
            call()
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: bn_init_(m, skip=["1"]), r"skip=.*expected modules of the model, got '1'; "),
        (lambda m: bn_init_(m, skip=[nn.ReLU()]), r"skip=.*expected modules of the model"),
        (lambda m: bn_init_(m, normalisers=("norm",)), r"normalisers=.*expected classes"),
        (lambda m: param_groups(m, 0.1, 0.0, c=math.nan), r"param_groups\(c=nan\): expected"),
        (lambda m: param_groups(m, 0.1, 0.0, c=math.inf), r"c=inf.*requires_grad_\(False\)"),
        (lambda m: parameter_groups([], m, setting(), divisor=math.nan), r"bn-init\(divisor=nan"),
        (lambda m: init_weights_(m, conv_init="he"), r"conv_init='he'.*keep, kaiming, got 'he'"),
        (lambda m: init_weights_(m, linear_init="wide"), r"linear_init='wide'.*keep, default"),
        (lambda m: METHOD.prepare(m, setting(), conv_init="he"), r"bn-init\(conv_init='he'\)"),
        (lambda m: online_input_norm(3, deviation=0), r"deviation=0.*above 0, got 0; use 0.58"),
        (lambda m: online_input_norm(3, spatial_dims=4), r"spatial_dims=4.*0, 1, 2 or 3, got 4"),
    ],
)
def test_wrong_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))


def test_a_single_class_need_not_stand_in_a_tuple():
    model = bn_init_(nn.Sequential(nn.LayerNorm(3)), normalisers=nn.LayerNorm)
    assert model[0].weight[0].item() == pytest.approx(0.1)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(3, affine=False), nn.LayerNorm(3)])
def test_a_model_without_a_scale_is_refused_unchanged(norm):
    model = nn.Sequential(nn.Linear(3, 3), norm)
    weight = model[0].weight.clone()
    with pytest.raises(Unsuitable, match=r"expected a normaliser with a learnt scale.*; write"):
        METHOD.prepare(model, setting((4, 3)), linear_init="default")
    with pytest.raises(Unsuitable, match="bn-init"):
        parameter_groups([{"params": list(model.parameters())}], model, setting())
    assert torch.equal(model[0].weight, weight)


# The groups.


class Mixed(nn.Module):
    """One of each kind of parameter that the sheet rules on."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.frn = FilterResponseNorm(4, learn_eps=True)
        self.weight_of_prelu = nn.PReLU(4)
        self.layer_norm = nn.LayerNorm(4)
        self.table_norm = nn.LayerNorm((4, 4))
        self.one = nn.Linear(4, 1)
        self.weight = nn.Parameter(torch.tensor(1.0))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.shared = self.one


def names_of(model, groups):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [sorted(names[id(parameter)] for parameter in group["params"]) for group in groups]


def test_groups_by_the_rulings():
    model = Mixed()
    groups = param_groups(model, lr=0.5, weight_decay=1e-3, c=50)
    assert names_of(model, groups) == [
        sorted(
            [
                "conv.bias", "norm.bias", "frn.weight", "frn.bias", "frn.eps_l", "one.bias",
                "weight_of_prelu.weight", "layer_norm.weight", "layer_norm.bias", "weight",
            ]
        ),
        ["norm.weight"],
        ["conv.weight", "one.weight", "table_norm.bias", "table_norm.weight"],
    ]  # fmt: skip
    assert [group["lr"] for group in groups] == [0.5, 0.01, 0.5]
    assert [group["weight_decay"] for group in groups] == [0, 0, 1e-3]
    torch.optim.SGD(groups, lr=1.0)


def test_groups_when_other_normalisers_are_asked_for():
    model = Mixed()
    kinds = (FilterResponseNorm, nn.LayerNorm)
    _, scales, weights = names_of(model, param_groups(model, 0.5, 1e-3, normalisers=kinds))
    assert scales == ["frn.weight", "layer_norm.weight", "norm.weight", "table_norm.weight"]
    assert weights == ["conv.weight", "one.weight"]


@pytest.mark.parametrize("c", [1, 0.5, 0, -3])
def test_a_divisor_up_to_one_keeps_the_rate(c):
    model = Mixed()
    assert [group["lr"] for group in param_groups(model, 0.5, 0.0, c)] == [0.5] * 3
    groups = parameter_groups([{"params": list(model.parameters())}], model, setting(), divisor=c)
    assert {group["lr"] for group in groups} == {0.2}


def test_the_methods_groups_keep_what_the_groups_before_say():
    model = Mixed()
    own = [model.conv.weight, model.conv.bias, model.norm.weight]
    others = [p for p in model.parameters() if all(p is not mine for mine in own)]
    before = [
        {"params": own, "lr": 0.4, "weight_decay": 0.1, "momentum": 0.5},
        {"params": others, "weight_decay": 0.2},
    ]
    found = {
        name: (group["lr"], group["weight_decay"], group.get("momentum"))
        for group in parameter_groups(before, model, setting())
        for name in names_of(model, [group])[0]
    }
    assert found.keys() == dict(model.named_parameters()).keys()
    assert found["conv.weight"] == (0.4, 0.1, 0.5)
    assert found["conv.bias"] == (0.4, 0.0, 0.5)
    assert found["norm.weight"] == (0.004, 0.0, 0.5)
    assert found["norm.bias"] == (0.2, 0.0, None)
    assert found["one.weight"] == (0.2, 0.2, None)
    assert found["layer_norm.weight"] == (0.2, 0.0, None)
    assert len(before) == 2
    assert before[0]["params"] is own


def test_one_step_of_sgd():
    model = bn_init_(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    groups = param_groups(model, lr=0.3, weight_decay=0.5, c=20)
    optimizer = torch.optim.SGD(groups, lr=99.0)
    model(torch.randn(6, 3, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    rates = {"1.weight": 0.3 / 20}
    for name, parameter in model.named_parameters():
        decay = 0.5 if name in ("0.weight", "2.weight") else 0.0
        step = rates.get(name, 0.3) * (parameter.grad + decay * before[name])
        torch.testing.assert_close(parameter.detach(), before[name] - step)


def test_scale_one_and_divisor_one_are_plain_batch_norm_bit_for_bit():
    x, targets = torch.randn(8, 2, 6, 6), torch.arange(8) % 3
    states = []
    for ours in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
        )
        if ours:
            model = METHOD.prepare(model, setting(), scale=1.0)
            groups = param_groups(model, 0.1, 1e-2, c=1)
        else:
            groups = [
                {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
                {"params": [p for p in model.parameters() if p.dim() > 1]},
            ]
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=1e-2)
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), targets).backward()
            optimizer.step()
        states.append(model.state_dict())
    for one, two in zip(*(state.values() for state in states), strict=True):
        assert torch.equal(one, two)


# The input's normaliser.


def test_deviation_of_a_rectified_normal():
    draws = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0)).relu()
    exact = math.sqrt(1 / 2 - 1 / (2 * math.pi))
    assert draws.std().item() == pytest.approx(exact, abs=2e-3)
    assert online_input_norm(1, 1.0).weight.item() == pytest.approx(round(exact, 2))


@pytest.mark.parametrize(
    ("spatial_dims", "kind"),
    [(0, nn.BatchNorm1d), (1, nn.BatchNorm1d), (2, nn.BatchNorm2d), (3, nn.BatchNorm3d)],
)
def test_input_norm_in_training_and_evaluation(spatial_dims, kind):
    layer = online_input_norm(3, 0.2, spatial_dims=spatial_dims).double()
    assert type(layer) is kind
    assert layer.state_dict().keys() == kind(3).state_dict().keys()
    x = 0.49 + 0.25 * torch.randn(500, 3, *(3,) * spatial_dims, dtype=torch.float64)
    y = layer(x)
    axes = [axis for axis in range(y.dim()) if axis != 1]
    zeros, spread = torch.zeros(3).double(), torch.full((3,), 0.2 * 0.58).double()
    torch.testing.assert_close(y.mean(axes), zeros, atol=1e-9, rtol=0)
    torch.testing.assert_close(y.std(axes, correction=0), spread, atol=1e-4, rtol=0)
    y.square().sum().backward()
    assert layer.bias.grad is None
    assert layer.weight.grad is not None
    mean, variance = layer.running_mean.clone(), layer.running_var.clone()
    first = layer.eval()(x)[0].reshape(3, -1)[:, 0]
    expected = 0.116 * (x[0].reshape(3, -1)[:, 0] - mean) / (variance + 1e-5).sqrt()
    torch.testing.assert_close(first, expected)


def test_input_norm_stands_in_front_of_the_model():
    said = []
    model = build_model("resnet", (3, 8, 8), 4, depth=8, width=4).double().eval()
    inner_keys = set(model.state_dict())
    whole = METHOD.prepare(
        model, setting(said=said, dtype=torch.float64), scale=0.2, input_norm=True
    )
    assert [name for name, _ in whole.named_children()] == ["input_norm", "model"]
    assert whole.model is model
    assert set(model.state_dict()) == inner_keys
    assert type(whole.input_norm) is nn.BatchNorm2d
    assert whole.input_norm.weight.dtype == torch.float64
    assert not any(module.training for module in whole.modules())
    assert whole.input_norm.weight.tolist() == pytest.approx([0.116] * 3)
    assert model.bn1.weight[0].item() == pytest.approx(0.2)
    assert any("BatchNorm of their own" in sentence for sentence in said)
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(whole(x), model(0.116 * x / math.sqrt(1 + 1e-5)))
    first, scales, _ = param_groups(whole, 0.1, 0.0)
    assert any(p is whole.input_norm.weight for p in scales["params"])
    assert all(p is not whole.input_norm.bias for p in first["params"])


@pytest.mark.parametrize(
    ("shape", "dtype"), [((4,), torch.float32), ((4, 3), torch.int64), ((2,) * 6, torch.float32)]
)
def test_inputs_without_channels_are_refused_and_the_model_unchanged(shape, dtype):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    weight = model[0].weight.clone()
    with pytest.raises(Unsuitable, match=r"input_norm=True\): expected floating point"):
        METHOD.prepare(model, setting(shape, dtype=dtype), input_norm=True, linear_init="reference")
    assert torch.equal(model[0].weight, weight)
    assert model[1].weight.tolist() == [1, 1, 1]


# The weights' start.


def test_convolutions_are_kaiming_normal_by_their_inputs():
    layer = init_weights_(nn.Conv2d(64, 96, 3, groups=2), generator=torch.Generator())
    assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / (32 * 9)), rel=0.03)
    assert (layer.weight.abs() > 2 * layer.weight.std()).any()
    assert not layer.bias.any()


@pytest.mark.parametrize(("linear_init", "squared"), [("default", 1), ("reference", 6)])
def test_the_range_of_linear_layers(linear_init, squared):
    layer = init_weights_(nn.Linear(50, 400), linear_init=linear_init)
    bound = math.sqrt(squared / 50)
    assert layer.weight.abs().max().item() == pytest.approx(bound, rel=1e-3)
    assert layer.weight.abs().max().item() <= bound * (1 + 1e-6)
    assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not layer.bias.any()


def test_layers_stay_unless_asked_and_draws_come_from_the_settings_generator():
    def model():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2)
        )

    start = model()
    kept = METHOD.prepare(model(), setting())
    for number in (0, 3):
        assert torch.equal(kept[number].weight, start[number].weight)
        assert torch.equal(kept[number].bias, start[number].bias)
    drawn = [
        METHOD.prepare(model(), setting(), conv_init="kaiming", linear_init="default")
        for _ in range(2)
    ]
    for number in (0, 3):
        assert torch.equal(drawn[0][number].weight, drawn[1][number].weight)
        assert not torch.equal(drawn[0][number].weight, start[number].weight)
        assert not drawn[0][number].bias.any()
    half = METHOD.prepare(model(), setting(), conv_init="kaiming")
    assert torch.equal(half[3].weight, start[3].weight)
