"""Folding against the unfolded model's own outputs, in float64, on layers and whole networks."""

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normlab.method import Unsuitable
from normlab.surgery.fold import fold_batch_norms
from normlab.surgery.freeze import FrozenBatchNorm, freeze
from resnets_of_others import FunctionalBlock, FunctionalResNet, TorchvisionResNet

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, FrozenBatchNorm)


def trained(model, seed=0):
    """Give every BatchNorm of a model statistics and an affine map far from the start's."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, NORMS) and module.running_mean is not None:
            with torch.no_grad():
                module.running_mean.normal_(generator=generator)
                module.running_var.uniform_(0.3, 3, generator=generator)
                for parameter in module.parameters():
                    parameter.uniform_(0.5, 2, generator=generator)
                    parameter.mul_(1 - 2 * (torch.arange(len(parameter)) % 3 == 1))
    return model.double().eval()


def norms_of(model):
    return [name for name, m in model.named_modules() if isinstance(m, NORMS)]


def check(model, x, *, folded, skipped=()):
    """Fold a model; its outputs stay, and the normalisers named are gone, the others there."""
    model, x = trained(model), x.double()
    expected = model(x)
    result = fold_batch_norms(model, x[:2])
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
    other = torch.randn_like(x)  # not only what was looked at
    assert torch.isfinite(model(other)).all()
    assert set(result.folded) == set(folded)
    assert set(result.skipped) == set(skipped) == set(norms_of(model))
    return result


# Layers: the one before, then the one after.

LINEAR = (nn.Linear(6, 4), nn.BatchNorm1d(4), (5, 6))
BEFORE = {
    "linear": LINEAR,
    "linear without bias": (nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4), (5, 6)),
    "conv1d": (nn.Conv1d(6, 4, 3, padding=1), nn.BatchNorm1d(4), (5, 6, 7)),
    "conv2d": (nn.Conv2d(6, 4, 3, 2, 1), nn.BatchNorm2d(4), (5, 6, 7, 7)),
    "grouped": (nn.Conv2d(6, 4, 3, groups=2, bias=False), nn.BatchNorm2d(4), (5, 6, 7, 7)),
    "depthwise": (nn.Conv2d(6, 12, 3, groups=6), nn.BatchNorm2d(12), (5, 6, 7, 7)),
    "conv3d": (nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4), (5, 2, 3, 3, 3)),
    "transposed 1d": (nn.ConvTranspose1d(6, 4, 3, 2), nn.BatchNorm1d(4), (5, 6, 7)),
    "transposed grouped": (
        nn.ConvTranspose2d(6, 4, 3, 2, 1, 1, groups=2, bias=False),
        nn.BatchNorm2d(4),
        (5, 6, 7, 7),
    ),
    "transposed 3d": (nn.ConvTranspose3d(2, 4, 2), nn.BatchNorm3d(4), (5, 2, 3, 3, 3)),
    "no affine": (nn.Linear(6, 4), nn.BatchNorm1d(4, affine=False), (5, 6)),
    "synchronised": (nn.Conv2d(6, 4, 3), nn.SyncBatchNorm(4), (5, 6, 7, 7)),
    "large eps": (nn.Linear(6, 4), nn.BatchNorm1d(4, eps=0.5), (5, 6)),
}


@pytest.mark.parametrize(("layer", "norm", "shape"), BEFORE.values(), ids=BEFORE)
def test_into_the_layer_before(layer, norm, shape):
    model = copy.deepcopy(nn.Sequential(layer, norm, nn.ReLU(inplace=True)))
    result = check(model, torch.randn(shape), folded=["1"])
    assert result.folded == {"1": "into '0' before it"}
    assert type(model[1]) is nn.Identity
    assert model[0].bias is not None


AFTER = {
    "linear": (nn.Linear(4, 6), (5, 4)),
    "linear without bias": (nn.Linear(4, 6, bias=False), (5, 4)),
    "conv1d": (nn.Conv1d(4, 6, 3), (5, 4, 7)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, bias=False), (5, 4, 7, 7)),
    "pointwise same": (nn.Conv2d(4, 6, 1, padding="same"), (5, 4, 7, 7)),
    "valid": (nn.Conv2d(4, 6, 3, padding="valid"), (5, 4, 7, 7)),
    "reflected": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (5, 4, 7, 7)),
    "circular": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (5, 4, 7, 7)),
    "conv3d": (nn.Conv3d(4, 6, 2, 2), (5, 4, 4, 4, 4)),
    "transposed pointwise": (nn.ConvTranspose2d(4, 6, 1, groups=2), (5, 4, 3, 3)),
}


@pytest.mark.parametrize(("layer", "shape"), AFTER.values(), ids=AFTER)
def test_into_the_layer_after(layer, shape):
    norm = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    model = nn.Sequential(nn.Tanh(), norm[len(shape)](4), copy.deepcopy(layer))
    result = check(model, torch.randn(shape), folded=["1"])
    assert result.folded == {"1": "into '2' after it"}


BORDERS = {
    "padded": nn.Conv2d(4, 6, 3, padding=1),
    "same": nn.Conv2d(4, 6, 3, padding="same"),
    "transposed": nn.ConvTranspose2d(4, 6, 3),
    "transposed pointwise, with gaps": nn.ConvTranspose2d(4, 6, 1, stride=2),
}


@pytest.mark.parametrize("layer", BORDERS.values(), ids=BORDERS)
def test_a_shift_does_not_go_through_a_border(layer):
    model = nn.Sequential(nn.Tanh(), nn.BatchNorm2d(4), copy.deepcopy(layer))
    result = check(model, torch.randn(3, 4, 6, 6), folded=[], skipped=["1"])
    assert result.skipped["1"].endswith("at the borders of '2' its shift would differ")
    assert result.skipped["1"].startswith("'0' (Tanh) makes its input")


@pytest.mark.parametrize("layer", BORDERS.values(), ids=BORDERS)
def test_a_scale_alone_does(layer):
    model = trained(nn.Sequential(nn.Tanh(), nn.BatchNorm2d(4), copy.deepcopy(layer)))
    x = torch.randn(3, 4, 6, 6).double()
    with torch.no_grad():
        model[1].running_mean.zero_()
        model[1].bias.zero_()
    expected = model(x)
    assert fold_batch_norms(model, x).folded == {"1": "into '2' after it"}
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)


def test_the_equation_by_hand():
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1, eps=0.0)).eval()
    norm = model[1]
    values = {model[0].weight: 3, model[0].bias: 1, norm.weight: 2, norm.bias: 5}
    for tensor, value in {**values, norm.running_mean: 4, norm.running_var: 16}.items():
        nn.init.constant_(tensor, value)
    fold_batch_norms(model, torch.zeros(2, 1))
    # 2 (3 x + 1 - 4) / 4 + 5
    assert model[0].weight.item() == 1.5
    assert model[0].bias.item() == 3.5


# Networks.


class Inverted(nn.Module):
    """A mobile block: expand, depthwise, project, with ReLU6 and a sum."""

    def __init__(self, width, expansion, stride=1):
        super().__init__()
        inner = width * expansion
        self.expand = nn.Sequential(
            nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU6(inplace=True)
        )
        self.depthwise = nn.Sequential(
            nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU6(inplace=True),
        )
        self.project = nn.Sequential(nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width))
        self.stride = stride

    def forward(self, x):
        out = self.project(self.depthwise(self.expand(x)))
        return x + out if self.stride == 1 else out


class Mobile(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False),
            nn.BatchNorm2d(8),
            Inverted(8, 2),
            Inverted(8, 2, stride=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(),
            nn.Linear(8, 5),
        )


def mlp():
    return nn.Sequential(
        nn.Flatten(), nn.BatchNorm1d(12),
        nn.Linear(12, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(),
        nn.Linear(8, 6), nn.ReLU(), nn.BatchNorm1d(6),
        nn.Linear(6, 6), nn.Dropout(), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2),
    )  # fmt: skip


@pytest.mark.parametrize("make", [TorchvisionResNet, FunctionalResNet, Mobile])
def test_every_norm_of_a_post_activation_network(make):
    model = make()
    check(model, torch.randn(4, 3, 32, 32), folded=norms_of(model))


def test_a_multilayer_perceptron_from_both_sides():
    result = check(mlp(), torch.randn(4, 3, 4), folded=["1", "3", "7", "10"])
    assert result.folded["1"] == "into '2' after it"
    assert result.folded["3"] == "into '2' before it"
    assert result.folded["7"] == "into '8' after it"
    assert result.folded["10"] == "into '8' before it"


def test_a_pre_activation_network_keeps_the_norms_after_sums():
    blocks = [FunctionalBlock(8, first_norm=True) for _ in range(2)]
    model = FunctionalResNet(*blocks, outer_relu=False)
    result = check(
        model,
        torch.randn(3, 3, 8, 8),
        folded=["bn1", "layer1.0.bn2", "layer1.1.bn2"],
        skipped=["layer1.0.bn1", "layer1.1.bn1"],
    )
    assert result.skipped["layer1.1.bn1"] == "'add' makes its input, and 'relu' takes its output"
    assert str(result).splitlines()[0].split() == "bn1 folded into 'conv1' before it".split()
    assert "layer1.1.bn1  kept: 'add' makes its input" in str(result)


def test_a_frozen_network_is_folded():
    model = TorchvisionResNet()
    names = freeze(model)
    check(model, torch.randn(2, 3, 32, 32), folded=names)


def test_norms_in_a_row_all_go():
    model = nn.Sequential(nn.Linear(4, 3), *(nn.BatchNorm1d(3) for _ in range(3)))
    check(model, torch.randn(5, 4), folded=["1", "2", "3"])
    model = nn.Sequential(nn.ReLU(), *(nn.BatchNorm1d(3) for _ in range(3)), nn.Linear(3, 2))
    check(model, torch.randn(5, 3), folded=["1", "2", "3"])


# What forbids folding: every other use of what the layer computes, in any form.


class Used(nn.Module):
    """A convolution, its norm, and another use of the convolution's output or weight."""

    def __init__(self, use):
        super().__init__()
        self.conv, self.norm, self.use = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), use
        self.other, self.bilinear = nn.Conv2d(3, 3, 1), Both()

    def forward(self, x):
        y = self.conv(x)
        return self.use(self, x, y)


class Both(nn.Module):
    def forward(self, a, b):
        return a * b


@dataclass
class Outputs:
    logits: torch.Tensor
    features: torch.Tensor


USES = {
    "a sum": lambda m, x, y: m.norm(y) + y,
    "a sum after": lambda m, x, y: (m.norm(y), y + 1)[0],
    "another module": lambda m, x, y: m.norm(y) + m.other(y),
    "a second argument": lambda m, x, y: m.bilinear(m.norm(y), y),
    "an index": lambda m, x, y: m.norm(y) + y[:, :1],
    "in place, before": lambda m, x, y: m.norm(y.mul_(2)),
    "in place, after": lambda m, x, y: (m.norm(y), y.mul_(2))[0],
    "a view": lambda m, x, y: m.norm(y.view(y.shape)),
    "the output": lambda m, x, y: (m.norm(y), y),
    "an output in a dictionary": lambda m, x, y: {"a": m.norm(y), "b": [y]},
    "an output in a dataclass": lambda m, x, y: Outputs(m.norm(y), y),
    "the function of the weight": lambda m, x, y: m.norm(y) + F.conv2d(x, m.conv.weight),
    "the layer twice": lambda m, x, y: m.norm(y) + m.conv(x + 1),
    "the norm twice": lambda m, x, y: m.norm(y) + m.norm(x),
    "an activation between": lambda m, x, y: m.norm(F.relu(y)),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_any_other_use_forbids_it(use):
    model = trained(Used(use))
    x = torch.randn(3, 3, 4, 4).double()
    state = copy.deepcopy(model.state_dict())
    result = fold_batch_norms(model, x)
    assert list(result.skipped) == ["norm"]
    assert result.skipped["norm"]
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())


def test_nothing_else_in_that_model_forbids_it():
    model = Used(lambda m, x, y: m.norm(y) + m.other(x))
    check(model, torch.randn(3, 3, 4, 4), folded=["norm"])


def test_a_use_that_calls_two_names_the_reason():
    model = trained(Used(USES["another module"]))
    reason = fold_batch_norms(model, torch.randn(2, 3, 4, 4).double()).skipped["norm"]
    assert reason.startswith("'other' (Conv2d) takes the output of 'conv', too")


def pair(first=None):
    return nn.Sequential(first or nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())


def tied():
    model = nn.Sequential(*pair(), nn.Conv2d(3, 3, 1))
    model[3].weight = model[0].weight
    return model


def hooked(index, name="register_forward_hook"):
    model = pair()
    getattr(model[index], name)(lambda *_: None)
    return model


def watched_container():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3))
    model[0].register_forward_hook(lambda *_: None)  # somebody collects features here
    return model


class Standardised(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


def replaced_forward():
    model = pair()
    forward = model[0].forward
    model[0].forward = lambda x: forward(x) + 1
    return model


FORBIDDEN = {
    "tied": (tied, "'0' shares a parameter"),
    "hook on the layer": (lambda: hooked(0), "a hook of '0' takes the output of '0', too"),
    "hook on the norm": (lambda: hooked(1), "it has hooks"),
    "hook before": (lambda: hooked(0, "register_forward_pre_hook"), "a hook of '0' takes"),
    "hook on gradients": (lambda: hooked(0, "register_full_backward_hook"), "'0' has hooks"),
    "hook around": (watched_container, "a hook of '0' takes the output of '0.0', too"),
    "another forward": (replaced_forward, "makes its input|'0' has hooks"),
    "a subclass": (lambda: pair(Standardised(3, 3, 1)), "of class Standardised"),
    "parametrised": (
        lambda: pair(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1))),
        "'0' is re-parametrised",
    ),
    "no statistics": (
        lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)),
        "it has no running statistics",
    ),
}


@pytest.mark.parametrize(("make", "reason"), FORBIDDEN.values(), ids=FORBIDDEN)
def test_what_forbids_folding_is_named(make, reason):
    model, x = trained(make()), torch.randn(3, 3, 4, 4).double()
    expected = model(x)
    result = fold_batch_norms(model, x)
    assert not result.folded
    (text,) = result.skipped.values()
    assert any(part in text for part in reason.split("|")), text
    assert torch.equal(model(x), expected)


def test_an_uncalled_norm_is_kept():
    model = pair()
    model.spare = nn.BatchNorm2d(3)
    model.forward = lambda x: model[2](model[1](model[0](x)))
    check(model, torch.randn(2, 3, 4, 4), folded=["1"], skipped=["spare"])


def test_channels_must_be_the_layers_own():
    x = torch.randn(5, 4, 6)
    result = check(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)), x, folded=[], skipped=["1"])
    assert result.skipped["1"].startswith("its channels are not those of '0'")
    check(nn.Sequential(nn.Tanh(), nn.BatchNorm1d(4), nn.Linear(6, 4)), x, folded=[], skipped=["1"])
    # Unbatched (C, L) is (N, C) to the normaliser.
    model = trained(nn.Sequential(nn.Conv1d(4, 6, 1), nn.BatchNorm1d(6)))
    assert not fold_batch_norms(model, torch.randn(4, 6).double()).folded


# Parameters.


def test_parameters_stay_the_same_objects_and_keep_their_wish_for_gradients():
    model = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
    model.append(nn.BatchNorm2d(3))
    model[0].weight.requires_grad_(False)
    weights = [model[0].weight, model[2].weight, model[2].bias]
    check(model, torch.randn(2, 3, 4, 4), folded=["1", "3"])
    assert [model[0].weight, model[2].weight, model[2].bias] == weights
    assert not model[0].bias.requires_grad
    assert model[2].bias.requires_grad
    assert set(model.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_half_precision_is_computed_in_double():
    model = trained(nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8))).bfloat16()
    exact = copy.deepcopy(model).double()
    x = torch.randn(5, 64).bfloat16()
    fold_batch_norms(model, x)
    fold_batch_norms(exact, x.double())
    assert model[0].weight.dtype is torch.bfloat16
    assert torch.equal(model[0].weight, exact[0].weight.bfloat16())
    assert torch.equal(model[0].bias, exact[0].bias.bfloat16())


def test_weights_that_would_overflow_are_kept():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    nn.init.constant_(model[1].running_var, 1e-12)
    nn.init.constant_(model[1].weight, 1e4)
    model.half()
    model[1].eps = 1e-12
    before = model[0].weight.clone()
    result = fold_batch_norms(model, torch.zeros(2, 4).half())
    assert result.skipped["1"].startswith("the weights of '0' would not be finite")
    assert torch.equal(model[0].weight, before)


def test_channels_last_weights_keep_their_layout():
    model = pair(nn.Conv2d(4, 3, 3)).to(memory_format=torch.channels_last)
    check(model, torch.randn(2, 4, 5, 5), folded=["1"])
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


# Refusals.


def test_training_mode_is_refused_and_nothing_is_changed():
    model = pair()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"expected evaluation mode.*call model.eval\(\) first"):
        fold_batch_norms(model, torch.randn(2, 3, 4, 4))
    model.eval()[1].train()
    with pytest.raises(ValueError, match="got 1 in training mode"):
        fold_batch_norms(model, torch.randn(2, 3, 4, 4))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())


def test_a_model_without_norms_is_refused():
    with pytest.raises(Unsuitable, match=r"fold_batch_norms\(model\): expected a model with"):
        fold_batch_norms(nn.Linear(2, 2).eval(), torch.zeros(2, 2))


def test_hooks_are_removed_when_the_model_raises():
    model = pair().eval()
    with pytest.raises(RuntimeError):
        fold_batch_norms(model, torch.randn(2, 5, 4, 4))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
