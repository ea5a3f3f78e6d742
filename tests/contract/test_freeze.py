"""A frozen BatchNorm against BatchNorm in evaluation mode, and that training cannot thaw it."""

import copy

import pytest
import torch
from torch import nn

from normlab.method import Unsuitable
from normlab.surgery.freeze import FrozenBatchNorm, freeze, unfreeze
from normlab.testing import LAYER_CHECKS, LayerCase
from resnets_of_others import TorchvisionResNet


def make(**options):
    layer = FrozenBatchNorm(4, eps=1e-3, **options)
    layer.running_mean.copy_(torch.tensor([0.5, -1.0, 2.0, 0.0]))
    layer.running_var.copy_(torch.tensor([0.3, 4.0, 1.5, 0.1]))
    return layer


def oracle(layer, x):
    """The evaluation's equation, one channel at a time."""
    y = torch.empty_like(x)
    for c in range(x.shape[1]):
        deviation = (layer.running_var[c] + 1e-3) ** 0.5
        y[:, c] = (x[:, c] - layer.running_mean[c]) / deviation
        if layer.weight is not None:
            y[:, c] = y[:, c] * layer.weight[c] + layer.bias[c]
    return y.detach()


SHAPES = [(5, 4), (5, 4, 6), (5, 4, 3, 5), (3, 4, 2, 3, 2)]
CASES = {
    "frozen": LayerCase(make=make, shapes=SHAPES, oracle=oracle),
    "affine trains": LayerCase(
        make=lambda: make(train_affine=True), shapes=SHAPES[::2], oracle=oracle
    ),
    "no affine": LayerCase(make=lambda: make(affine=False), shapes=SHAPES[::2], oracle=oracle),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("check", LAYER_CHECKS, ids=lambda check: check.__name__)
def test_contract(check, case):
    check(case)


def trained(norm):
    """Return a BatchNorm with statistics and affine map as after training."""
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            if tensor is not None:
                tensor.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.num_batches_tracked.fill_(7)
    return norm


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (nn.BatchNorm1d, (4, 3)),
        (nn.BatchNorm1d, (4, 3, 5)),
        (nn.BatchNorm2d, (4, 3, 5, 5)),
        (nn.BatchNorm3d, (4, 3, 2, 2, 2)),
        (nn.SyncBatchNorm, (4, 3, 5, 5)),
    ],
)
@pytest.mark.parametrize("affine", [True, False])
def test_frozen_equals_evaluation_and_thaws_to_the_same(kind, shape, affine):
    norm = trained(kind(3, eps=1e-2, momentum=None, affine=affine))
    model = nn.Sequential(norm)
    state = copy.deepcopy(model.state_dict())
    x = torch.randn(shape)
    expected = model.eval()(x)
    model.train()
    assert freeze(model) == ["0"]
    torch.testing.assert_close(model.train()(x), expected)
    torch.testing.assert_close(model.eval()(x), expected)
    assert list(model.state_dict()) == list(state)
    assert unfreeze(model.train()) == ["0"]
    back = model[0]
    assert type(back) is kind
    assert back.training
    assert (back.eps, back.momentum, back.affine) == (1e-2, None, affine)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    assert back.running_mean is norm.running_mean
    assert back.weight is norm.weight
    assert not affine or back.weight.requires_grad


def test_training_changes_nothing_in_a_frozen_layer():
    model = nn.Sequential(nn.Linear(4, 3), trained(nn.BatchNorm1d(3)), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    model(torch.randn(6, 4)).sum().backward()
    optimizer.step()  # so that gradient and momentum are there to do harm
    freeze(model)
    frozen = copy.deepcopy(model[1].state_dict())
    linear = model[0].weight.clone()
    # What people call after freezing, and what thaws a layer in evaluation mode.
    model.train().requires_grad_(True)
    for _ in range(3):
        model(torch.randn(6, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(model[1].state_dict()[name], value) for name, value in frozen.items())
    assert not torch.equal(model[0].weight, linear)


def test_scale_and_shift_may_go_on_training():
    model = nn.Sequential(trained(nn.BatchNorm1d(3)))
    weight, mean = model[0].weight, model[0].running_mean.clone()
    before = weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freeze(model, train_affine=True)
    model.train()(torch.randn(6, 3)).square().sum().backward()
    optimizer.step()
    assert model[0].weight is weight
    assert not torch.equal(weight, before)
    assert torch.equal(model[0].running_mean, mean)


def test_gradient_reaches_the_input_with_the_scale_alone_saved():
    layer = make()
    saved = []
    x = torch.randn(8, 4, 5, 5, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel()) or t, lambda t: t
    ):
        y = layer(x)
    y.sum().backward()
    scale = (layer.running_var + 1e-3).rsqrt().view(1, 4, 1, 1)
    torch.testing.assert_close(x.grad, scale.expand_as(x))
    assert sum(saved) <= 4


def test_what_did_not_train_before_does_not_train_after():
    norm = trained(nn.BatchNorm1d(3))
    norm.weight.requires_grad_(False)
    model = nn.Sequential(norm)
    freeze(model)
    unfreeze(model)
    assert not model[0].weight.requires_grad
    assert model[0].bias.requires_grad


def test_states_load_both_ways():
    norm, frozen = trained(nn.BatchNorm2d(4)), make()
    frozen.load_state_dict(norm.state_dict())
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(frozen(x), norm.eval()(x), atol=3e-3, rtol=3e-3)  # eps differs
    other = nn.BatchNorm2d(4)
    other.load_state_dict(frozen.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(other.buffers(), norm.buffers(), strict=True))
    without = {k: v for k, v in norm.state_dict().items() if k != "num_batches_tracked"}
    make().load_state_dict(without)
    with pytest.raises(RuntimeError, match="running_var"):
        make().load_state_dict({k: v for k, v in without.items() if k != "running_var"})


def test_scale_without_shift():
    # torch 2.13 brought BatchNorm with a weight and no bias.
    norm = trained(nn.BatchNorm1d(3))
    norm.bias = None
    model = nn.Sequential(norm).eval()
    x = torch.randn(4, 3)
    expected = model(x)
    freeze(model)
    torch.testing.assert_close(model(x), expected)
    unfreeze(model)
    torch.testing.assert_close(model(x), expected)


def test_two_dtypes_in_one_layer_are_kept():
    norm = trained(nn.BatchNorm1d(3))
    norm.weight.data, norm.bias.data = norm.weight.data.bfloat16(), norm.bias.data.bfloat16()
    model = nn.Sequential(norm)
    mean = norm.running_mean.clone()
    freeze(model)
    assert torch.equal(model[0].running_mean, mean)
    assert model(torch.randn(2, 3).bfloat16()).dtype is torch.bfloat16
    unfreeze(model)
    assert torch.equal(model[0].running_mean, mean)


def test_a_residual_network_frozen_in_part():
    torch.manual_seed(0)
    model = TorchvisionResNet()
    freeze(model, only=["bn1", "layer1"])
    names = freeze(model, only=lambda name: name.startswith("layer2"))
    assert names == [f"layer2.0.{n}" for n in ("bn1", "bn2", "bn3", "downsample.1")]
    kinds = {name: type(m) for name, m in model.named_modules() if "Norm" in type(m).__name__}
    for name, kind in kinds.items():
        frozen = name.startswith(("bn1", "layer1", "layer2"))
        assert kind is (FrozenBatchNorm if frozen else nn.BatchNorm2d), name
    assert len(kinds) == 1 + 5 * 3 + 4
    assert len(freeze(model)) == 2 * 4
    assert freeze(model) == []
    assert len(unfreeze(model)) == len(kinds)


def test_a_frozen_model_is_copied_and_pickled_with_its_way_back():
    model = nn.Sequential(trained(nn.BatchNorm1d(3)))
    freeze(model)
    twin = copy.deepcopy(model)
    unfreeze(twin)
    assert type(twin[0]) is nn.BatchNorm1d
    assert isinstance(model[0], FrozenBatchNorm)


@pytest.mark.parametrize(
    ("only", "message"),
    [
        (["layer1", "layr2"], r"freeze\(only='layr2'\): expected .*; do you mean 'layer2'"),
        (["fc"], "expected to choose at least one of bn1, .*, got none"),
        (lambda name: False, "expected to choose at least one of"),
        ("bn2", r"do you mean 'bn1'"),
    ],
)
def test_a_choice_of_nothing_is_refused(only, message):
    with pytest.raises(ValueError, match=message):
        freeze(TorchvisionResNet(), only=only)


def test_what_cannot_be_frozen_is_refused_by_name_and_nothing_changed():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(ValueError, match="expected running statistics, got '1'"):
        freeze(model)
    assert type(model[0]) is nn.BatchNorm1d
    assert freeze(model, only="0") == ["0"]
    model = nn.Sequential(nn.BatchNorm1d(3))
    model[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="without hooks, got '0'"):
        freeze(model)
    with pytest.raises(Unsuitable, match=r"expected a model with nn\.BatchNorm"):
        freeze(nn.Sequential(nn.ReLU()))
    with pytest.raises(Unsuitable, match=r"itself; put it into an nn\.Sequential"):
        freeze(nn.BatchNorm1d(3))
    with pytest.raises(Unsuitable, match="expected a model with FrozenBatchNorm"):
        unfreeze(model)
