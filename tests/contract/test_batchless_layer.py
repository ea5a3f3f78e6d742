"""The layer of batchless normalisation against its sheet's equations, then the contract."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from normlab.norms.batchless_layer import BatchlessNorm, batchless_norm, collect_losses
from normlab.testing import LAYER_CHECKS, LayerCase

PARAMETRIZATIONS = ("log", "abs", "inv")


def sigma_of(layer):
    return {
        "log": lambda s: torch.exp(s),
        "abs": lambda s: s.abs() + layer.eps,
        "inv": lambda s: 1 / s,
    }[layer.std_parametrization](layer.s)


def oracle(layer, x):
    """The output is gamma (x - mu) / sigma + beta, one channel at a time."""
    y = torch.empty_like(x)
    sigma = sigma_of(layer)
    for c in range(x.shape[1]):
        y[:, c] = layer.weight[c] * (x[:, c] - layer.mu[c]) / sigma[c] + layer.bias[c]
    return y.detach()


def oracle_of_units(layer, x):
    """Statistics of (C, 1, W): every column of every channel has its own."""
    y = torch.empty_like(x)
    sigma = sigma_of(layer)
    for c in range(x.shape[1]):
        for w in range(x.shape[3]):
            z = (x[:, c, :, w] - layer.mu[c, 0, w]) / sigma[c, 0, w]
            y[:, c, :, w] = layer.weight[c, 0, w] * z + layer.bias[c, 0, w]
    return y.detach()


def written_loss(layer, x):
    """The sheet's loss, written plainly with autograd's own graph over all values."""
    shape = [1, -1, *[1] * (x.dim() - 2)]
    sigma = sigma_of(layer)
    z = (x.detach() - layer.mu.reshape(shape)) / sigma.reshape(shape)
    log_sigma = layer.s
    if layer.std_parametrization == "abs":
        log_sigma = sigma.log()
    if layer.std_parametrization == "inv":
        log_sigma = -torch.log(layer.s.abs() + layer.eps)
    loss = log_sigma.mean() + 0.5 * (z**2).mean()
    if layer.gauge_loss:
        loss = loss - log_sigma.mean().detach() - 0.5
    return layer.nll_weight * (x.shape[1] if layer.reduction == "sum" else 1) * loss


def frozen(layer):
    """The output gives mu and s no gradient, which finite differences cannot know."""
    layer.mu.requires_grad_(False)
    layer.s.requires_grad_(False)
    return layer


SHAPES = [(5, 4), (5, 4, 6), (5, 4, 3, 5), (3, 4, 2, 3, 2)]
CASES = {
    "trained": LayerCase(lambda: BatchlessNorm(4), SHAPES, oracle),
    "injected": LayerCase(lambda: BatchlessNorm(4, inject=True), SHAPES[2:3], oracle),
    "frozen": LayerCase(lambda: frozen(BatchlessNorm(4)), SHAPES, oracle),
    "abs": LayerCase(
        lambda: frozen(BatchlessNorm(4, std_parametrization="abs", eps=0.1)), SHAPES[:1], oracle
    ),
    "inv": LayerCase(
        lambda: frozen(BatchlessNorm(4, std_parametrization="inv", eps=0.1)), SHAPES[:1], oracle
    ),
    "columns": LayerCase(
        lambda: frozen(BatchlessNorm(4, shared_axes=(0, 2), sample_shape=(4, 3, 3))),
        [(5, 4, 3, 3)],
        oracle_of_units,
    ),
}


# Stopped gradients are no derivatives, and an injected mean over the batch does not add up; both
# have tests of their own below.
IMPOSSIBLE = {
    ("trained", "gradients_match_finite_differences"),
    ("injected", "gradients_match_finite_differences"),
    ("injected", "accumulates_gradients"),
}


@pytest.mark.parametrize(
    ("check", "name"),
    [
        pytest.param(check, name, id=f"{check.__name__}-{name}")
        for check in LAYER_CHECKS
        for name in CASES
        if (name, check.__name__) not in IMPOSSIBLE
    ],
)
def test_contract(check, name):
    check(CASES[name])


def example(**options):
    layer = BatchlessNorm(1, **options).double()
    layer.set_statistics(torch.tensor([1.0]), torch.tensor([2.0], dtype=torch.float64))
    return layer, torch.tensor([[1.0], [2.0], [3.0], [6.0]], dtype=torch.float64)


def test_the_sheets_example():
    layer, x = example(gauge_loss=False)
    layer(x)
    assert layer.layer_loss.item() == pytest.approx(1.63064718, abs=5e-9)
    layer, x = example()
    layer(x)
    loss = collect_losses(layer)
    loss.backward()
    assert loss.item() == pytest.approx(0.4375, abs=1e-12)
    assert layer.mu.grad.item() == pytest.approx(-0.5, abs=1e-12)
    assert layer.s.grad.item() == pytest.approx(-0.875, abs=1e-12)


def perturbed(shape=(6, 3, 4), **options):
    generator = torch.Generator().manual_seed(5)
    layer = BatchlessNorm(shape[1], **options).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            noise = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.2 + 0.5 * noise)
    return layer, torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 1


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4), (4, 3, 2, 5)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("gauge_loss", [True, False])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("std_parametrization", PARAMETRIZATIONS)
def test_loss_is_the_written_one(std_parametrization, sign, gauge_loss, reduction, shape):
    layer, x = perturbed(
        shape,
        std_parametrization=std_parametrization,
        gauge_loss=gauge_loss,
        reduction=reduction,
        nll_weight=0.7,
        eps=0.01,
    )
    with torch.no_grad():
        layer.s.mul_(sign)
    expected = written_loss(layer, x)
    layer(x)
    actual = layer.layer_loss
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)
    both = [torch.autograd.grad(loss, [layer.mu, layer.s]) for loss in (actual, expected)]
    torch.testing.assert_close(both[0], both[1], atol=1e-12, rtol=1e-12)


def test_gradients_in_closed_form():
    layer, x = perturbed((6, 3, 4))
    layer(x)
    collect_losses(layer).backward()
    sigma = layer.s.detach().exp()
    z = (x - layer.mu.detach()[:, None]) / sigma[:, None]
    torch.testing.assert_close(layer.mu.grad, -z.mean((0, 2)) / sigma / 3)
    torch.testing.assert_close(layer.s.grad, (1 - z.square().mean((0, 2))) / 3)


def test_loss_with_other_shared_axes():
    layer = BatchlessNorm(2, shared_axes=(0, 2), sample_shape=(2, 3, 4), reduction="sum").double()
    x = torch.randn(5, 2, 3, 4, dtype=torch.float64)
    layer(x)
    # Eight statistics: the sum over them of the mean over samples and rows.
    expected = 8 * 0.5 * x.square().mean() - 8 * 0.5
    torch.testing.assert_close(collect_losses(layer), expected, check_dtype=False)
    whole = BatchlessNorm(2, shared_axes=(1, 2, 3), sample_shape=(2, 3, 4))
    assert whole.mu.shape == (1, 1, 1)
    assert whole.shared_axes == (0, 1, 2, 3)


def test_gauge_changes_the_value_only():
    gradients, values = [], []
    for gauge_loss in (True, False):
        layer, x = perturbed(gauge_loss=gauge_loss)
        layer(x)
        loss = collect_losses(layer)
        gradients.append(torch.autograd.grad(loss, [layer.mu, layer.s]))
        values.append(loss.item())
    torch.testing.assert_close(gradients[0], gradients[1], atol=0, rtol=1e-14)
    assert values[1] - values[0] == pytest.approx(layer.s.mean().item() + 0.5)


def test_loss_is_zero_at_the_fit():
    layer, x = perturbed()
    layer.set_statistics(x.mean((0, 2)), x.var((0, 2), correction=0).sqrt())
    layer(x)
    assert collect_losses(layer).item() == pytest.approx(0, abs=1e-13)


def test_each_loss_trains_its_own_parameters():
    layer, x = perturbed()
    x.requires_grad_()
    y = layer(x)
    task = y.pow(3).sum()
    task.backward(retain_graph=True)
    assert layer.mu.grad is None
    assert layer.s.grad is None
    dy = 3 * y.detach() ** 2
    torch.testing.assert_close(x.grad, dy * (layer.weight * torch.exp(-layer.s))[:, None].detach())
    others = (x, layer.weight, layer.bias)
    assert torch.autograd.grad(layer.layer_loss, others, allow_unused=True) == (None, None, None)


def test_descent_finds_the_moments_and_batch_norms_output():
    torch.manual_seed(0)
    x = torch.randn(9, 3, 5, dtype=torch.float64).exp() * torch.tensor([0.5, 1, 2])[:, None] + 1
    layer = BatchlessNorm(3).double()
    for _ in range(1500):
        layer(x)
        gradients = torch.autograd.grad(collect_losses(layer), [layer.mu, layer.s])
        with torch.no_grad():
            layer.mu -= 0.5 * gradients[0]
            layer.s -= 0.5 * gradients[1]
    torch.testing.assert_close(layer.mu.detach(), x.mean((0, 2)), atol=1e-10, rtol=0)
    torch.testing.assert_close(layer.std, x.var((0, 2), correction=0).sqrt(), atol=1e-10, rtol=0)
    expected = nn.functional.batch_norm(x, None, None, training=True, eps=1e-14)
    torch.testing.assert_close(layer(x), expected, atol=1e-9, rtol=0)


def test_parametrizations_agree_at_the_same_deviation():
    x = torch.randn(5, 3, dtype=torch.float64)
    mean, std = torch.tensor([0.5, 1.0, -2.0]), torch.tensor([0.3, 2.0, 1.0])
    outputs = []
    for std_parametrization in PARAMETRIZATIONS:
        layer = BatchlessNorm(3, std_parametrization=std_parametrization).double()
        layer.set_statistics(mean, std)
        torch.testing.assert_close(layer.std, std.double(), atol=1e-6, rtol=1e-6)
        outputs.append(layer(x))
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(outputs[2], outputs[0], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("inject", [False, True])
def test_accumulated_single_samples_equal_the_batch(inject):
    def gradients(parts):
        torch.manual_seed(1)
        weight = 1 / parts if inject else 1.0
        norms = [BatchlessNorm(c, inject=inject, nll_weight=weight) for c in (5, 2)]
        model = nn.Sequential(nn.Linear(3, 5), norms[0], nn.Linear(5, 2), norms[1]).double()
        x, t = torch.randn(8, 3).double(), torch.arange(8) % 2
        for a, b in zip(x.chunk(parts), t.chunk(parts), strict=True):
            loss = nn.functional.cross_entropy(model(a), b)
            ((loss + collect_losses(model)) / parts if not inject else loss / parts).backward()
        return [parameter.grad for parameter in model.parameters()]

    torch.testing.assert_close(gradients(8), gradients(1), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("objective", [torch.sum, lambda y: y.square().mean()])
def test_injection_adds_the_losses_gradient_to_any_objective(objective):
    gradients = {}
    for inject in (True, False):
        layer, x = perturbed(inject=inject)
        x.requires_grad_()
        total = objective(layer(x)) + collect_losses(layer)
        total.backward()
        gradients[inject] = [p.grad for p in (x, *layer.parameters())]
    torch.testing.assert_close(gradients[True], gradients[False])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_injection_counts_once_under_activation_checkpointing(use_reentrant):
    gradients = []
    for checkpointed in (False, True):
        layer, x = perturbed(inject=True)
        x.requires_grad_()
        y = checkpoint(layer, x, use_reentrant=use_reentrant) if checkpointed else layer(x)
        y.sum().backward()
        gradients.append(layer.mu.grad)
    torch.testing.assert_close(gradients[1], gradients[0])


def test_calls_add_up_until_collected():
    layer, x = perturbed()
    first, second = written_loss(layer, x), written_loss(layer, 2 * x[:2])
    layer(x)
    layer(2 * x[:2])
    model = nn.Sequential(layer, layer)
    torch.testing.assert_close(layer.layer_loss, first + second)
    torch.testing.assert_close(collect_losses(model), first + second)
    assert collect_losses(model).item() == 0


def test_silent_losses_have_gradients_and_no_value():
    layer, x = perturbed()
    layer(x)
    expected = torch.autograd.grad(layer.layer_loss, [layer.mu, layer.s])
    silent = collect_losses(layer, silent=True)
    assert silent.item() == 0
    torch.testing.assert_close(torch.autograd.grad(silent, [layer.mu, layer.s]), expected)


def test_losses_of_several_precisions_are_collected():
    model = nn.ModuleList([BatchlessNorm(2), BatchlessNorm(2).double(), BatchlessNorm(2).half()])
    for layer, dtype in zip(model, (torch.float32, torch.float64, torch.float16), strict=True):
        layer(torch.full((2, 2), 3.0, dtype=dtype))
    assert collect_losses(model).item() == pytest.approx(3 * 4.0)


def test_no_loss_in_evaluation_or_without_gradients():
    layer, x = perturbed()
    layer.eval()(x)
    with torch.no_grad():
        layer.train()(x)
    assert collect_losses(layer).item() == 0


def test_nothing_to_collect_is_refused():
    with pytest.raises(ValueError, match=r"expected a model with BatchlessNorm layers, got Linear"):
        collect_losses(nn.Linear(2, 2))


def test_a_copy_after_training_holds_no_graph():
    layer, x = perturbed()
    layer(x)
    expected = layer.layer_loss
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        loss = collect_losses(twin)
        torch.testing.assert_close(loss, expected)
        loss.backward()
        assert twin.mu.grad is not None
    assert layer.mu.grad is None
    assert layer.layer_loss.item() == expected.item()


def test_state_is_four_parameters():
    layer, x = perturbed()
    layer(x)
    assert list(layer.state_dict()) == ["mu", "s", "weight", "bias"]
    bare = BatchlessNorm(3, use_output_std=False, use_output_mean=False)
    assert list(bare.state_dict()) == ["mu", "s"]
    torch.testing.assert_close(bare(x.float()), x.float())


def test_modes_agree_exactly_and_samples_are_independent():
    layer, x = perturbed((6, 3, 4, 4))
    assert torch.equal(layer.train()(x), layer.eval()(x))
    assert torch.equal(layer(x)[2:3], layer(x[2:3]))
    y = batchless_norm(x, *(v.reshape(3, 1, 1) for v in (layer.mu, (-layer.s).exp())))
    torch.testing.assert_close(y, (x - layer.mu[:, None, None]) / layer.std[:, None, None])
    assert not y.requires_grad


@pytest.mark.parametrize("std_parametrization", PARAMETRIZATIONS)
@pytest.mark.parametrize("sign", [1, -1])
def test_moved_statistics_keep_the_function(std_parametrization, sign):
    layer, x = perturbed((6, 3), std_parametrization=std_parametrization)
    with torch.no_grad():
        layer.s.mul_(sign)
    before = layer(x)
    mean, std = torch.tensor([3.0, -1.0, 0.2]).double(), torch.tensor([0.1, 4.0, 1.0]).double()
    layer.move_statistics(mean, std)
    torch.testing.assert_close(layer.mu.detach(), mean)
    torch.testing.assert_close(layer.std, std)
    torch.testing.assert_close(layer(x), before, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("missing", ["use_output_std", "use_output_mean"])
def test_moving_needs_scale_and_shift(missing):
    layer = BatchlessNorm(2, **{missing: False})
    with pytest.raises(ValueError, match="expected a BatchlessNorm with scale and shift"):
        layer.move_statistics(torch.zeros(2), torch.ones(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 0.0}, "expected a number above 0"),
        ({"init_std": -1.0}, "expected a number above 0"),
        ({"init_std": math.nan}, "expected a number above 0"),
        ({"nll_weight": -0.5}, "expected a number of at least 0"),
        ({"std_parametrization": "lgo"}, "do you mean 'log'"),
        ({"reduction": "summe"}, "do you mean 'sum'"),
        ({"shared_axes": (0, 2)}, "expected both or neither"),
        ({"shared_axes": (0, 4), "sample_shape": (3, 2)}, "expected axes from 0 to 2"),
        ({"shared_axes": (0,), "sample_shape": (4, 2)}, "expected 3 channels first"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        BatchlessNorm(3, **options)


def test_another_sample_shape_is_refused():
    layer = BatchlessNorm(3, shared_axes=(0,), sample_shape=(3, 2))
    with pytest.raises(ValueError, match=r"expected shape \(N, 3, 2\), got \(4, 3, 5\)"):
        layer(torch.zeros(4, 3, 5))
