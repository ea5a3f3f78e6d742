"""Batch Kalman normalisation against its sheet's equations, the contract, and the workbench."""

import copy
import math

import pytest
import torch
from torch import nn

from normlab.lab.models import build_model
from normlab.method import Setting, Unsuitable
from normlab.norms.batch_kalman_norm import (
    METHOD,
    BatchKalmanNorm,
    from_batch_norm,
    parameter_groups,
    prepare,
)
from normlab.norms.kalman_chain import ChainedNorm
from normlab.norms.kalman_filter import Posterior
from normlab.testing import LAYER_CHECKS, METHOD_CHECKS, LayerCase, MethodCase


class WithPrior(nn.Module):
    """The layer with a fixed prior, or none, as a map from x to y."""

    def __init__(self, prior_features=3, full_prior=False, **options):
        super().__init__()
        self.norm = BatchKalmanNorm(4, prior_features=prior_features, **options)
        generator = torch.Generator().manual_seed(7)
        mean = torch.randn(prior_features, generator=generator)
        root = torch.randn(prior_features, prior_features, generator=generator)
        covariance = root @ root.T
        self.register_buffer("mean", mean)
        self.register_buffer(
            "covariance", covariance if full_prior else covariance.diagonal().clone()
        )

    def forward(self, x):
        prior = Posterior(self.mean, self.covariance) if len(self.mean) else None
        return self.norm(x, prior)[0]


def mixture(norm, x, prior):
    """Mean and covariance by the moments of a mixture, from the sheet."""
    rows = x.transpose(0, 1).reshape(x.shape[1], -1)
    z = rows.sum(1) / rows.shape[1]
    s = (rows - z[:, None]) @ (rows - z[:, None]).T / rows.shape[1]
    if prior is None:
        return z, s
    mean, before = prior
    before = torch.diag(before) if before.dim() == 1 else before
    if norm.transition_matrix is not None:
        matrix, noise = norm.transition_matrix, torch.log(1 + norm.noise_rho.exp())
        mean, before = (matrix * mean).sum(1), matrix @ before @ matrix.T + torch.diag(noise)
    q = norm.gain if norm.gain_logit is None else 1 / (1 + torch.exp(-norm.gain_logit))
    ratio = (before.diagonal() / (s.diagonal() + norm.eps)).mean()
    if norm.max_ratio is not None and rows.shape[1] > 1 and ratio >= norm.max_ratio:
        return z, s
    mu = q * z + (1 - q) * mean
    second = q * (s + z.outer(z)) + (1 - q) * (before + mean.outer(mean))
    return mu, second - mu.outer(mu)


def oracle(layer, x):
    norm = layer.norm
    mu, variance = norm.running_mean, norm.running_var
    if layer.training:
        prior = Posterior(layer.mean, layer.covariance) if len(layer.mean) else None
        mu, covariance = mixture(norm, x, prior)
        variance = covariance.diagonal()
    view = (1, -1, *[1] * (x.dim() - 2))
    y = (x - mu.reshape(view)) / (variance + norm.eps).sqrt().reshape(view)
    return (norm.weight.reshape(view) * y + norm.bias.reshape(view)).detach()


SHAPES = [(5, 4, 6), (5, 4, 3, 5), (3, 4, 2, 2, 2), (5, 4)]
COMMON = {"oracle": oracle, "batch_statistics": True, "eval_differs": True}
CASES = {
    "linear": LayerCase(lambda: WithPrior(), SHAPES, **COMMON),
    "full": LayerCase(
        lambda: WithPrior(covariance="full", full_prior=True, gain=0.6), SHAPES[:2], **COMMON
    ),
    "learnt gain": LayerCase(
        lambda: WithPrior(learn_gain=True, max_ratio=None, full_prior=True), SHAPES[:1], **COMMON
    ),
    "propagate": LayerCase(
        lambda: WithPrior(4, transition="propagate", full_prior=True), SHAPES[:1], **COMMON
    ),
    "discarded": LayerCase(lambda: WithPrior(max_ratio=1e-3), SHAPES[:1], **COMMON),
    "without prior": LayerCase(
        lambda: WithPrior(0), SHAPES[::3], **COMMON, batch_of_one="needs space"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("check", LAYER_CHECKS, ids=lambda check: check.__name__)
def test_contract(check, case):
    check(case)


def random_prior(channels=3):
    return Posterior(torch.randn(channels).double(), torch.rand(channels).double() + 0.5)


@pytest.mark.parametrize("gain", [None, 1.0])
def test_without_a_prior_or_with_gain_one_it_is_batch_norm(gain):
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64) + 2
    norm = nn.BatchNorm2d(3).double()
    layer = BatchKalmanNorm(3, gain=gain or 0.1).double()
    y, (mean, variance) = layer(x, None if gain is None else random_prior())
    torch.testing.assert_close(y, norm(x))
    torch.testing.assert_close(layer.running_mean, norm.running_mean)
    torch.testing.assert_close(layer.running_var - 0.9, (norm.running_var - 0.9) * 99 / 100)
    torch.testing.assert_close(mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(variance, x.var((0, 2, 3), correction=0))


def test_with_gain_zero_samples_do_not_see_each_other():
    x, prior = torch.randn(4, 3, 5, dtype=torch.float64), random_prior()
    layer = BatchKalmanNorm(3, gain=0.0).double()
    y, posterior = layer(x, prior)
    assert torch.equal(layer(x[:1], prior)[0], y[:1])
    expected = (x - prior.mean[:, None]) / (prior.variance[:, None] + 0.01 + 1e-5).sqrt()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(posterior.variance, prior.variance + 0.01)


def test_one_value_per_channel_trains_with_a_prior():
    x, prior = torch.randn(1, 3, 1, 1, dtype=torch.float64, requires_grad=True), random_prior()
    layer = BatchKalmanNorm(3, gain=0.25).double()
    y, posterior = layer(x, prior)
    predicted = prior.variance + 0.01
    variance = 0.75 * predicted + 0.25 * 0.75 * (x.flatten() - prior.mean).square()
    torch.testing.assert_close(posterior.variance, variance)
    y.square().sum().backward()
    assert torch.isfinite(x.grad).all()
    with pytest.raises(ValueError, match="expected more than one value per channel"):
        layer(x)


def test_starting_values():
    layer = BatchKalmanNorm(3, prior_features=5, learn_gain=True, gain=0.2)
    assert torch.equal(layer.transition_matrix, torch.eye(3, 5))
    torch.testing.assert_close(nn.functional.softplus(layer.noise_rho), torch.full((3,), 0.01))
    assert layer.noise_rho[0].item() == pytest.approx(-4.600166, abs=1e-6)
    assert layer.gain_logit.sigmoid().item() == pytest.approx(0.2)
    keys = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    assert set(layer.state_dict()) == keys | {"transition_matrix", "noise_rho", "gain_logit"}
    assert set(BatchKalmanNorm(3, prior_features=0, learn_gain=True).state_dict()) == keys
    assert set(BatchKalmanNorm(3, transition="propagate").state_dict()) == keys
    assert BatchKalmanNorm(3).gain == 0.1


def test_running_statistics_follow_the_posterior():
    layer = BatchKalmanNorm(3, momentum=0.3).double()
    plain = BatchKalmanNorm(3, momentum=None).double()
    means, variances = [], []
    mean, variance = torch.zeros(3).double(), torch.ones(3).double()
    for _ in range(3):
        x, prior = torch.randn(2, 3, dtype=torch.float64), random_prior()
        _, posterior = layer(x, prior)
        plain(x, prior)
        mean, variance = (
            0.7 * old + 0.3 * new for old, new in zip((mean, variance), posterior, strict=True)
        )
        means.append(posterior.mean)
        variances.append(posterior.variance)
    torch.testing.assert_close(layer.running_mean, mean)
    torch.testing.assert_close(layer.running_var, variance)
    torch.testing.assert_close(plain.running_mean, torch.stack(means).mean(0))
    torch.testing.assert_close(plain.running_var, torch.stack(variances).mean(0))
    assert not layer.running_mean.requires_grad


def test_evaluation_is_independent_of_the_prior_and_returns_the_running_moments():
    layer = BatchKalmanNorm(3)
    layer(torch.randn(4, 3), Posterior(torch.ones(3), torch.ones(3)))
    layer.eval()
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(1, 3)
    y, posterior = layer(x)
    assert torch.equal(layer(x, Posterior(torch.full((3,), 9.0), torch.ones(3)))[0], y)
    assert torch.equal(posterior.mean, layer.running_mean)
    assert torch.equal(posterior.variance, layer.running_var)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def test_a_posterior_carries_gradients_into_the_layer_before():
    first, second = (BatchKalmanNorm(3, prior_features=p).double() for p in (0, 3))
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    _, prior = first(x)
    y, _ = second(torch.randn(4, 3, dtype=torch.float64), prior)
    y.square().sum().backward()
    assert (x.grad.abs() > 0).any()


def test_identical_layers_with_a_perfect_transition_agree():
    x = torch.randn(4, 3, 2, dtype=torch.float64)
    first = BatchKalmanNorm(3, prior_features=0).double()
    for gain in (0.0, 0.4, 1.0):
        second = BatchKalmanNorm(3, gain=gain).double()
        nn.init.constant_(second.noise_rho, -800.0)
        y, prior = first(x)
        torch.testing.assert_close(second(x, prior), (y, prior))


def test_saved_bytes_are_one_input():
    layer, x, saved = BatchKalmanNorm(3), torch.randn(8, 3, 20, 20, requires_grad=True), {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    prior = Posterior(torch.randn(3), torch.ones(3))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x, prior)
    assert sum(saved.values()) < 1.1 * x.untyped_storage().nbytes()


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 1.5},
        {"gain": -0.1},
        {"gain": math.nan},
        {"gain": 1.0, "learn_gain": True},
        {"max_ratio": 0.0},
        {"transition": "lineal"},
        {"covariance": "dense"},
        {"covariance": "full", "transition": "propagate"},
        {"covariance": "full", "num_features": 65},
    ],
)
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match=r"BatchKalmanNorm\(.*expected .*, got .*; use "):
        BatchKalmanNorm(**{"num_features": 4, **options})


def test_a_prior_of_another_size_is_refused():
    layer = BatchKalmanNorm(4, prior_features=3)
    with pytest.raises(ValueError, match=r"expected the moments of 3 channels, got .*\(4,\); set"):
        layer(torch.randn(2, 4), Posterior(torch.zeros(4), torch.ones(4)))
    with pytest.raises(ValueError, match="expected the moments of 0 channels"):
        BatchKalmanNorm(4, prior_features=0)(torch.randn(2, 4), random_prior(4))


def test_from_batch_norm_keeps_what_evaluation_needs():
    norm = nn.BatchNorm2d(3, eps=1e-3, momentum=0.2)
    nn.init.uniform_(norm.weight)
    norm(torch.randn(4, 3, 2, 2) * 3 + 1)
    layer = from_batch_norm(norm, gain=0.7)
    assert (layer.eps, layer.momentum, layer.gain) == (1e-3, 0.2, 0.7)
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(layer.eval()(x)[0], norm.eval()(x))
    torch.testing.assert_close(layer.output_moments(), Posterior(layer.bias, layer.weight**2))
    bare = from_batch_norm(nn.BatchNorm1d(3, affine=False, track_running_stats=False))
    assert bare.weight is None
    assert bare(x)[0].shape == x.shape
    torch.testing.assert_close(bare.output_moments(), Posterior(torch.zeros(3), torch.ones(3)))


MODELS = {
    "mlp": ({"depth": 4, "width": 16}, (1, 6, 6)),
    "plain-conv": ({"depth": 5, "width": 8}, (2, 8, 8)),
    "resnet": ({"depth": 8, "width": 8}, (2, 8, 8)),
    "resnet projection": ({"depth": 8, "width": 8, "shortcut": "projection"}, (2, 8, 8)),
    "resnet bottleneck": ({"depth": 11, "width": 8, "block": "bottleneck"}, (2, 8, 8)),
}
VARIANTS = {
    "linear": {},
    "full": {"covariance": "full", "learn_gain": True, "gain": 0.5},
    "propagate": {"transition": "propagate"},
    "sample": {"transition": "propagate", "propagation": "sample", "apply_affine": False},
}


def case(model, **options):
    model_options, shape = MODELS[model]
    generator = torch.Generator().manual_seed(0)
    return MethodCase(
        method=METHOD.with_options(**options),
        make_model=lambda: build_model(model.split()[0], shape, 4, **model_options),
        inputs=torch.randn(12, *shape, generator=generator),
        targets=torch.arange(12) % 4,
        num_classes=4,
        lr=0.02,
    )


PAIRS = [("linear", model) for model in MODELS]
PAIRS += [(name, model) for name in list(VARIANTS)[1:] for model in ("mlp", "resnet")]


@pytest.mark.parametrize(("variant", "model"), PAIRS)
def test_method(variant, model):
    for check in METHOD_CHECKS:
        check(case(model, **VARIANTS[variant]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_micro_batches_train(variant):
    micro = case("resnet", **{"gain": 0.1, **VARIANTS[variant]})
    model = micro.prepared().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for epoch in range(12):
        total = 0.0
        for start in range(0, 12, 2):
            inputs, targets = micro.inputs[start : start + 2], micro.targets[start : start + 2]
            torch.manual_seed(epoch)
            loss = nn.functional.cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        losses.append(total)
    assert losses[-1] < 0.8 * losses[0]


def layers_of(model):
    return [module.norm for module in model.modules() if isinstance(module, ChainedNorm)]


@pytest.mark.parametrize(("size", "gain"), [(2, 0.1), (4, 0.1), (5, 0.95), (64, 0.95)])
def test_the_recipe_takes_the_gain_from_the_batch(size, gain):
    said = []
    inputs = torch.randn(size, 2, 8, 8)
    setting = Setting(batches=((inputs, torch.zeros(size)),), say=said.append)
    model = prepare(build_model("plain-conv", (2, 8, 8), 4, depth=3, width=70), setting)
    assert {layer.gain for layer in layers_of(model)} == {gain}
    assert said == [
        f"2 BatchNorm layers became BatchKalmanNorm with gain {gain}: 1 have a prior, 1 stay plain "
        "batch normalisation"
    ]
    model = prepare(build_model("plain-conv", (2, 8, 8), 4, depth=3), setting, gain=0.5)
    assert {layer.gain for layer in layers_of(model)} == {0.5}


def test_layers_with_few_values_are_not_guarded():
    def ratios(size, name, shape, **options):
        setting = Setting(batches=((torch.randn(size, *shape), torch.zeros(size)),))
        model = prepare(build_model(name, shape, 4), setting, **options)
        return {layer.max_ratio for layer in layers_of(model)}

    assert ratios(2, "mlp", (1, 4, 4)) == {None}
    assert ratios(8, "mlp", (1, 4, 4)) == {100.0}
    assert ratios(2, "resnet", (1, 8, 8)) == {100.0}
    assert ratios(2, "resnet", (1, 8, 8), max_ratio=math.inf) == {math.inf}


def test_wide_layers_stay_diagonal_and_bad_options_change_nothing():
    setting = Setting(batches=((torch.randn(4, 2, 8, 8), torch.zeros(4)),))
    model = build_model("plain-conv", (2, 8, 8), 4, depth=4, width=32)
    before = str(model)
    for options in (
        {"covariance": "dense"},
        {"transition": "lineal"},
        {"propagation": "exact"},
        {"gain": 2.0},
    ):
        with pytest.raises(ValueError, match=r"expected .*, got .*; use"):
            prepare(model, setting, **options)
        assert str(model) == before
    full = prepare(model, setting, covariance="full")
    kinds = {layer.num_features: layer.covariance for layer in layers_of(full)}
    assert kinds == {32: "full", 64: "full", 128: "diagonal"}
    with pytest.raises(Unsuitable, match="without any"):
        prepare(nn.Sequential(nn.Linear(2, 2)), setting)


def test_transition_noise_and_gain_do_not_decay():
    micro = case("mlp", learn_gain=True)
    model = micro.prepared()
    groups = micro.optimizer(model).param_groups
    exempt = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    names = {name.rpartition(".")[2] for name, p in model.named_parameters() if id(p) in exempt}
    assert names == {"transition_matrix", "noise_rho", "gain_logit"}
    group = {"params": list(model.parameters()), "weight_decay": 0.1}
    assert parameter_groups([group], model, micro.setting(), decay=True) == [group]
