"""The independent-component layer against its sheet's statements, then the contract."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normlab.lab.models import build_model
from normlab.method import Setting, Unsuitable
from normlab.norms.ic_layer import (
    METHOD,
    STACKINGS,
    IndependentComponent,
    IndependentComponentUnit,
    drop_neurons,
)
from normlab.norms.ic_statistics import (
    correlation_after_dropout,
    entropy,
    masked_joint,
    mutual_information,
)
from normlab.testing import LAYER_CHECKS, METHOD_CHECKS, LayerCase, MethodCase
from resnets_of_others import FunctionalResNet, TorchvisionResNet


def oracle(layer, x):
    """Normalise each channel, then multiply by a mask drawn with torch's own dropout."""
    y = torch.empty_like(x)
    for c in range(x.shape[1]):
        values = x[:, c]
        mean = values.sum() / values.numel()
        variance = ((values - mean) ** 2).sum() / values.numel()
        if not layer.training:
            mean, variance = layer.norm.running_mean[c], layer.norm.running_var[c]
        normalised = (values - mean) / torch.sqrt(variance + layer.norm.eps)
        y[:, c] = normalised * layer.norm.weight[c] + layer.norm.bias[c]
    if not layer.training:
        return y.detach()
    if layer.granularity == "element":
        return (y * F.dropout(torch.ones_like(x), layer.drop_prob)).detach()
    mask = F.dropout(torch.ones(x.shape[:2], dtype=x.dtype), layer.drop_prob)
    return torch.stack(
        [torch.stack([y[n, c] * mask[n, c] for c in range(len(y[n]))]) for n in range(len(y))]
    ).detach()


def case(shape, granularity="element"):
    return LayerCase(
        make=lambda: IndependentComponent(
            4, 0.3, granularity=granularity, spatial_dims=len(shape) - 2
        ),
        shapes=[shape],
        oracle=oracle,
        batch_statistics=True,
        batch_of_one="needs space",
        eval_differs=True,
        stochastic=True,
    )


CASES = {
    "points": case((5, 4)),
    "lines": case((5, 4, 6)),
    "maps": case((5, 4, 3, 5)),
    "volumes": case((3, 4, 2, 3, 2)),
    "channels of lines": case((5, 4, 6), "channel"),
    "channels of maps": case((5, 4, 3, 5), "channel"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("check", LAYER_CHECKS, ids=lambda check: check.__name__)
def test_contract(check, case):
    check(case)


def images(size=8, samples=8):
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(samples, 1, size, size, generator=generator)
    return x, torch.arange(samples) % 4


MODELS = {
    "resnet": ("resnet", {"depth": 8, "width": 4}),
    "bottleneck": ("resnet", {"depth": 11, "width": 4, "block": "bottleneck"}),
    "projection": ("resnet", {"depth": 14, "width": 4, "shortcut": "projection"}),
    "mlp": ("mlp", {"depth": 3, "width": 16}),
    "plain-conv": ("plain-conv", {"depth": 5, "width": 4}),
}


def make(name, num_classes=4):
    model, options = MODELS[name]
    return build_model(model, (1, 8, 8), num_classes, **options)


def prepared(name, **options):
    torch.manual_seed(0)
    return METHOD.with_options(**options).prepare(make(name), Setting(batches=(images(),)))


@pytest.mark.parametrize("stacking", STACKINGS.values())
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("check", METHOD_CHECKS, ids=lambda check: check.__name__)
def test_method_contract(check, name, stacking):
    inputs, targets = images()
    method = METHOD.with_options(stacking=stacking)
    check(MethodCase(method, lambda: make(name), inputs, targets, num_classes=4))


def test_evaluation_is_batch_norm_exactly():
    layer, norm = IndependentComponent(4, 0.5), nn.BatchNorm2d(4)
    x = torch.randn(6, 4, 3, 3)
    layer(x), norm(x)
    assert torch.equal(layer.eval()(x), norm.eval()(x))
    silent, norm = IndependentComponent(4, 0.0), nn.BatchNorm2d(4)
    assert torch.equal(silent(x), norm(x))


@pytest.mark.parametrize("drop_prob", [-0.1, 1.0, math.nan])
def test_drop_prob_out_of_range(drop_prob):
    with pytest.raises(ValueError, match=r"expected at least 0 and below 1, got .*; use 0\.05"):
        IndependentComponent(4, drop_prob)
    with pytest.raises(ValueError, match=r"ic-layer\(drop_prob"):
        prepared("mlp", drop_prob=drop_prob)


def test_order_is_norm_then_dropout():
    x = torch.randn(6, 4, 3, 3)
    torch.manual_seed(7)
    y = IndependentComponent(4, 0.4)(x)
    torch.manual_seed(7)
    assert torch.equal(y, F.dropout(F.batch_norm(x, None, None, training=True), 0.4))
    torch.manual_seed(7)
    reverse = F.batch_norm(F.dropout(x, 0.4), None, None, training=True)
    assert (y - reverse).abs().max() > 0.1


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 5), (4, 6, 5, 3), (4, 6, 2, 3, 2)])
def test_channel_granularity_draws_once_a_channel(shape):
    torch.manual_seed(7)
    y = drop_neurons(torch.ones(shape), 0.5, granularity="channel")
    maps = y.reshape(4, 6, -1)
    assert (maps == maps[..., :1]).all()
    assert y.unique().tolist() == [0, 2]
    # The same draws as for (N, C), where a channel is an element.
    torch.manual_seed(7)
    assert torch.equal(maps[..., 0], drop_neurons(torch.ones(4, 6), 0.5))


@pytest.mark.parametrize("keep", [0.95, 0.5])
def test_mutual_information_falls_with_the_square(keep):
    joint = torch.tensor([[0.4, 0.1], [0.1, 0.4]], dtype=torch.float64)
    assert mutual_information(joint).item() == pytest.approx(0.192744757, abs=5e-10)
    # The masked joint by counting all cases, with x and y from {1, 2}.
    table = torch.zeros(3, 3, dtype=torch.float64)
    for x in (1, 2):
        for y in (1, 2):
            for g in (0, 1):
                for h in (0, 1):
                    mask = (keep if g else 1 - keep) * (keep if h else 1 - keep)
                    table[g * x, h * y] += mask * joint[x - 1, y - 1]
    masked = masked_joint(joint, keep)
    torch.testing.assert_close(masked, table, atol=1e-15, rtol=0)
    independent = table.sum(1, keepdim=True) * table.sum(0, keepdim=True)
    information = (table * (table / independent).log()).sum().item()
    assert mutual_information(masked).item() == pytest.approx(information, abs=1e-15)
    assert information == pytest.approx(keep**2 * mutual_information(joint).item(), abs=1e-15)
    # Statement 2, on the margins.
    binary = -keep * math.log(keep) - (1 - keep) * math.log(1 - keep)
    expected = keep * entropy(joint.sum(1)).item() + binary
    assert entropy(masked.sum(1)).item() == pytest.approx(expected, abs=1e-15)


def test_an_atom_at_zero_breaks_the_statement():
    """With x and y from {0, 1} the value 0 and the dropped value are one."""
    keep, joint = 0.5, torch.tensor([[0.4, 0.1], [0.1, 0.4]], dtype=torch.float64)
    masked = masked_joint(joint, keep)
    merged = torch.stack([masked[0] + masked[1], masked[2]])
    merged = torch.stack([merged[:, 0] + merged[:, 1], merged[:, 2]], 1)
    assert mutual_information(merged).item() < 0.8 * keep**2 * mutual_information(joint).item()


@pytest.mark.parametrize(("mean", "expected"), [(0.0, 0.48), (1.0, 0.48 / 1.4)])
def test_correlation_after_dropout(mean, expected):
    assert correlation_after_dropout(0.8, 0.6, mean=mean) == pytest.approx(expected, abs=1e-12)
    assert correlation_after_dropout(0.8, 0.6, 2 * mean, variance=4.0) == pytest.approx(expected)
    torch.manual_seed(8)
    x = torch.randn(2, 10**6, dtype=torch.float64)
    x[1] = 0.8 * x[0] + 0.6 * x[1]
    dropped = drop_neurons(x + mean, 0.4)
    assert torch.corrcoef(dropped)[0, 1].item() == pytest.approx(expected, abs=0.005)


def test_mean_over_masks_is_the_normalised_input():
    torch.manual_seed(9)
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    for granularity in ("element", "channel"):
        layer = IndependentComponent(3, 0.2, granularity=granularity).double()
        mean = sum(layer(x) for _ in range(1000)) / 1000
        expected = F.batch_norm(x, None, None, training=True)
        # Deviation of one mask is |x| sqrt(0.2 / 0.8) = 0.5 |x|.
        assert (mean - expected).abs().max() < 5 * 0.5 * expected.abs().max() / math.sqrt(1000)


def convolutions(bottleneck=False):
    kernels = (1, 3, 1) if bottleneck else (3, 3)
    return [nn.Conv2d(4, 4, k, padding=k // 2, bias=False) for k in kernels]


@pytest.mark.parametrize("bottleneck", [False, True])
@pytest.mark.parametrize("stacking", STACKINGS.values())
def test_units_against_the_formulae(stacking, bottleneck):
    torch.manual_seed(10)
    unit = IndependentComponentUnit(convolutions(bottleneck), stacking=stacking, drop_prob=0.0)
    x = torch.randn(5, 4, 6, 6)
    out = x
    for layer in (module for module in unit.stages if isinstance(module, nn.Conv2d)):
        for part in stacking.split("-"):
            if part == "relu":
                out = out.clamp(min=0)
            elif part == "conv":
                out = F.conv2d(out, layer.weight, padding=layer.padding)
            else:
                out = F.batch_norm(out, None, None, training=True)
    torch.testing.assert_close(unit(x), x + out)


def test_a_silent_unit_is_the_identity():
    unit = IndependentComponentUnit(convolutions())
    for layer in unit.stages:
        if isinstance(layer, nn.Conv2d):
            nn.init.zeros_(layer.weight)
    x = torch.randn(5, 4, 6, 6)
    assert (x < 0).any()
    assert torch.equal(unit(x), x)
    block = build_model("resnet", (1, 8, 8), 10, depth=8, width=4).layer1[0]
    for layer in (block.conv1, block.conv2):
        nn.init.zeros_(layer.weight)
    assert not torch.equal(block(x), x)


def test_the_short_path_takes_the_raw_input():
    shortcut = nn.Conv2d(4, 6, 1, 2, bias=False)
    stages = [nn.Conv2d(4, 6, 3, 2, 1, bias=False), nn.Conv2d(6, 6, 3, 1, 1, bias=False)]
    nn.init.zeros_(stages[1].weight)
    unit = IndependentComponentUnit(stages, shortcut=shortcut)
    x = torch.randn(5, 4, 6, 6)
    assert torch.equal(unit(x), shortcut(x))


def weight_layers(model):
    return [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


@pytest.mark.parametrize("stacking", STACKINGS.values())
@pytest.mark.parametrize("name", MODELS)
def test_one_ic_layer_for_each_weight_layer_but_the_first(name, stacking):
    model = prepared(name, stacking=stacking)
    components = [m for m in model.modules() if isinstance(m, IndependentComponent)]
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    short = [
        layer
        for m in model.modules()
        if isinstance(m, IndependentComponentUnit) and m.shortcut is not None
        for layer in weight_layers(m.shortcut)
    ]
    assert len(components) == len(weight_layers(model)) - len(short) - 1
    assert len(norms) == len(components)
    assert len(short) == (2 if name == "projection" else 0)


@pytest.mark.parametrize("name", ["resnet", "bottleneck", "projection", "plain-conv"])
def test_each_convolution_but_the_stem_follows_an_ic_layer(name):
    model = prepared(name)
    followed = 0
    for module in model.modules():
        if isinstance(module, nn.Sequential):
            layers = list(module)
            for before, layer in zip([None, *layers], layers, strict=False):
                if isinstance(layer, nn.Conv2d) and layer is not model[0]:
                    in_shortcut = layer.kernel_size == (1, 1) and layer.stride == (2, 2)
                    assert isinstance(before, IndependentComponent) != in_shortcut
                    followed += not in_shortcut
    assert followed >= 3


def kinds(model):
    return [type(layer).__name__ for layer in model]


def test_stem_and_tail_of_each_stacking():
    stages = ["Sequential"] * 3
    tail = ["AdaptiveAvgPool2d", "Flatten", "Linear"]
    ic = "IndependentComponent"
    assert kinds(prepared("resnet")) == ["Conv2d", *stages, "ReLU", ic, *tail]
    assert kinds(prepared("resnet", stacking="B")) == ["Conv2d", "ReLU", *stages, ic, *tail]
    assert kinds(prepared("resnet", stacking="C")) == ["Conv2d", "ReLU", ic, *stages, *tail]


def test_chains():
    ic = "IndependentComponent"
    hidden = ["Linear", "ReLU", ic]
    assert kinds(prepared("mlp")) == ["Flatten", *hidden, *hidden, "Linear"]
    model = prepared("plain-conv")
    assert kinds(model)[:5] == ["Conv2d", "ReLU", "MaxPool2d", ic, "Conv2d"]
    assert kinds(model)[-6:] == ["Conv2d", "ReLU", ic, "AdaptiveAvgPool2d", "Flatten", "Linear"]
    assert kinds(prepared("plain-conv", stacking="C"))[:4] == ["Conv2d", "ReLU", ic, "MaxPool2d"]


def test_nested_chains_with_shared_and_own_activations():
    class Swish(nn.Module):
        def forward(self, x):
            return x * x.sigmoid()

    shared = nn.Tanh()
    model = nn.Sequential(
        nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), shared),
        nn.Sequential(nn.Linear(5, 6), shared, nn.Linear(6, 6)),
        nn.Sequential(Swish(), nn.Linear(6, 2)),
    )
    setting = Setting(batches=((torch.randn(4, 3), torch.zeros(4)),))
    new = METHOD.prepare(model, setting)
    ic = "IndependentComponent"
    expected = ["Linear", "Tanh", ic, "Linear", "Tanh", ic, "Linear", "Swish", ic, "Linear"]
    assert kinds(new) == expected
    assert [m.num_features for m in new if isinstance(m, IndependentComponent)] == [5, 6, 6]


@pytest.mark.parametrize("name", MODELS)
def test_weights_device_and_mode_are_kept(name):
    model = make(name).double().eval()
    weights = [layer.weight for layer in weight_layers(model)]
    inputs, targets = images()
    said = []
    setting = Setting(batches=((inputs.double(), targets),), say=said.append)
    new = METHOD.prepare(model, setting)
    assert {id(layer.weight) for layer in weight_layers(new)} == {id(w) for w in weights}
    assert all(p.dtype == torch.float64 for p in new.parameters())
    assert not any(module.training for module in new.modules())
    assert "IC layers" in said[0]


def test_torchvisions_network_and_the_pool_of_its_stem():
    setting = Setting(batches=((torch.randn(4, 3, 32, 32), torch.zeros(4)),))
    model = METHOD.with_options(drop_prob=0.0).prepare(TorchvisionResNet(), setting)
    assert kinds(model)[:3] == ["Conv2d", "MaxPool2d", "Sequential"]
    x = torch.randn(3, 3, 32, 32)
    out = F.max_pool2d(F.conv2d(x, model.conv1.weight, stride=2, padding=3), 3, 2, 1)
    stages = (model.layer1, model.layer2, model.layer3, model.layer4)
    for unit in (unit for stage in stages for unit in stage):
        branch = out
        for layer in (m for m in unit.stages if isinstance(m, nn.Conv2d)):
            branch = layer(F.batch_norm(branch.relu(), None, None, training=True))
        out = branch + (out if unit.shortcut is None else unit.shortcut[0](out))
    out = F.batch_norm(out.relu(), None, None, training=True).mean((2, 3))
    torch.testing.assert_close(model(x), F.linear(out, model.fc.weight, model.fc.bias))
    assert METHOD.prepare(FunctionalResNet(), setting)(x).shape == (3, 10)


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Custom(), "Custom without any"),
        (nn.Sequential(nn.Linear(3, 3)), "Sequential without any"),
        (nn.Sequential(nn.ReLU()), "Sequential without any"),
        (
            nn.Sequential(nn.Unflatten(1, (3, 1)), nn.Linear(1, 2), nn.Linear(2, 2)),
            "channels on the axis after the samples",
        ),
    ],
)
def test_other_models_are_refused_with_the_reason(model, reason):
    setting = Setting(batches=((torch.randn(4, 3), torch.zeros(4)),))
    with pytest.raises(Unsuitable, match=rf"ic-layer\(model\): expected .*{reason}.*; "):
        METHOD.prepare(model, setting)


def test_other_orders_need_a_network_that_can_be_built_anew():
    setting = Setting(batches=((torch.randn(4, 3), torch.zeros(4)),))
    model = nn.Sequential(nn.Linear(3, 3), Custom(), nn.Linear(3, 3))
    with pytest.raises(Unsuitable, match=r"1 \(Custom\)"):
        METHOD.with_options(stacking="C").prepare(model, setting)


def test_wrong_words_are_refused():
    with pytest.raises(ValueError, match="do you mean 'relu-ic-conv'"):
        prepared("mlp", stacking="relu-ic-con")
    with pytest.raises(ValueError, match="expected 'element' or 'channel'"):
        prepared("mlp", granularity="pixel")
    with pytest.raises(ValueError, match=r"momentum=1\.5\): expected a number from 0 to 1"):
        IndependentComponent(4, momentum=1.5)
    with pytest.raises(ValueError, match="expected 0, 1, 2 or 3"):
        IndependentComponent(4, spatial_dims=4)
    with pytest.raises(ValueError, match="set spatial_dims=0"):
        IndependentComponent(4)(torch.randn(3, 4))


def test_batch_of_one():
    IndependentComponent(4)(torch.randn(1, 4, 2, 2)).sum().backward()
    with pytest.raises(ValueError, match=r"more than one value per channel .* such as group-norm"):
        IndependentComponent(4, spatial_dims=0)(torch.randn(1, 4))


def test_state_keys():
    keys = {f"norm.{key}" for key in nn.BatchNorm2d(4).state_dict()}
    assert set(IndependentComponent(4).state_dict()) == keys
