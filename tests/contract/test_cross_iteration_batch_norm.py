"""Cross-iteration batch normalisation against its sheet's equations, then the contracts."""

import copy
import io
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from normlab.lab.models import build_model
from normlab.method import Setting, Unsuitable
from normlab.norms.cross_iteration_batch_norm import (
    METHOD,
    CrossIterationBatchNorm,
    cross_iteration_batch_norm,
    from_batch_norm,
)
from normlab.norms.cross_iteration_window import moments_and_slopes
from normlab.surgery.recalibrate import recalibrate
from normlab.testing import LAYER_CHECKS, METHOD_CHECKS, LayerCase, MethodCase

LAYERS = {
    "2d": (lambda: nn.Conv2d(4, 4, 3, padding=1, bias=False), (5, 4, 3, 5)),
    "1d": (lambda: nn.Conv1d(4, 4, 3, padding="same", bias=False), (5, 4, 6)),
    "linear": (lambda: nn.Linear(4, 4, bias=False), (5, 4)),
}
# These are compared with the reference only: what the contract asks does not depend on them.
FURTHER = {
    "3d": (lambda: nn.Conv3d(2, 3, 2, bias=False), (3, 2, 3, 4, 3)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False), (5, 4, 3, 4)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), (5, 4, 3, 4)),
    "strided": (lambda: nn.Conv2d(2, 6, (3, 2), stride=(2, 3), bias=False), (3, 2, 8, 9)),
    "dilated": (lambda: nn.Conv1d(3, 2, 3, dilation=2, padding=1, bias=False), (2, 3, 9)),
    "circular": (
        lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular", bias=False),
        (2, 2, 4, 5),
    ),
    "uneven": (lambda: nn.Conv1d(2, 3, 4, padding="same", bias=False), (2, 2, 5)),
    "wide linear": (lambda: nn.Linear(7, 3, bias=False), (4, 7)),
}


def rows(values, like):
    return values.reshape(-1, *[1] * (like.dim() - 2))


def oracle(layer, x):
    """With weights and batch unchanged, pooling changes nothing: plain batch normalisation."""
    norm, y = layer.norm, layer.layer(x).detach()
    mean, var = norm.running_mean, norm.running_var
    if layer.training:
        axes = [axis for axis in range(y.dim()) if axis != 1]
        mean = y.sum(axes) / (y.numel() / y.shape[1])
        var = ((y - rows(mean, y)) ** 2).sum(axes) / (y.numel() / y.shape[1])
    y = (y - rows(mean, y)) / torch.sqrt(rows(var, y) + norm.eps)
    return (rows(norm.weight, y) * y + rows(norm.bias, y)).detach()


CASES = {
    name: LayerCase(
        make=lambda make=make: CrossIterationBatchNorm(make()),
        shapes=[shape],
        oracle=oracle,
        batch_statistics=True,
        batch_of_one="needs space",
        eval_differs=True,
    )
    for name, (make, shape) in LAYERS.items()
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("check", LAYER_CHECKS, ids=lambda check: check.__name__)
def test_contract(check, case):
    check(case)


# Model options and input shape, as for all methods of the catalogue.
MODELS = {
    "mlp": ({"depth": 4, "width": 16}, (1, 6, 6)),
    "plain-conv": ({"depth": 5, "width": 8}, (2, 8, 8)),
    "resnet": ({"depth": 8, "width": 8}, (2, 8, 8)),
    "resnet projection": ({"depth": 8, "width": 8, "shortcut": "projection"}, (2, 8, 8)),
    "resnet bottleneck": ({"depth": 11, "width": 8, "block": "bottleneck"}, (2, 8, 8)),
}


@pytest.mark.parametrize(
    ("model", "share"), [*((model, 0.25) for model in MODELS), ("mlp", 0.0), ("plain-conv", 0.0)]
)
def test_method_contract(model, share):
    options, shape = MODELS[model]
    case = MethodCase(
        method=METHOD.with_options(burn_in_share=share),
        make_model=lambda: build_model(model.split()[0], shape, 4, **options),
        inputs=torch.randn(12, *shape, generator=torch.Generator().manual_seed(0)),
        targets=torch.arange(12) % 4,
        num_classes=4,
        lr=0.02,
    )
    for check in METHOD_CHECKS:
        check(case)


class Reference:
    """The sheet, plainly: lists of mean, mean square, their gradients and the weight; autograd."""

    def __init__(self, layer, window, burn_in, warmup, rho, invalid, eps=1e-5):
        self.layer, self.slots, self.burn_in, self.warmup = layer, window - 1, burn_in, warmup
        self.rho, self.invalid, self.eps = rho, invalid, eps
        self.past, self.step, self.dropped = [], 0, 0
        channels = len(layer.weight)
        self.running_mean = torch.zeros(channels).double()
        self.running_var = torch.ones(channels).double()

    def slopes(self, x):
        """Mean and mean square, and each one's gradient for its own filter, channel by channel."""
        weight = self.layer.weight
        y = self.layer(x)
        axes = [axis for axis in range(y.dim()) if axis != 1]
        mu, nu = y.mean(axes), (y * y).mean(axes)
        d_mu, d_nu = torch.zeros_like(weight), torch.zeros_like(weight)
        for j in range(len(weight)):
            d_mu[j] = torch.autograd.grad(mu[j], weight, retain_graph=True)[0][j]
            d_nu[j] = torch.autograd.grad(nu[j], weight, retain_graph=True)[0][j]
        return y, mu, nu, d_mu.detach(), d_nu.detach()

    def count(self):
        if self.warmup == "linear" and self.burn_in:
            return int(self.slots * min(self.step / self.burn_in, 1))
        return self.slots if self.step > self.burn_in else 0

    def __call__(self, x, gamma, beta):
        self.step += 1
        y, mu, nu, d_mu, d_nu = self.slopes(x)
        theta = self.layer.weight.detach().clone()
        means, squares, valid = [mu], [nu], [torch.ones_like(mu)]
        for mu_s, nu_s, d_mu_s, d_nu_s, theta_s in self.past[: self.count()]:
            change = theta - theta_s
            mean = mu_s + self.rho * (d_mu_s * change).flatten(1).sum(1)
            square = nu_s + self.rho * (d_nu_s * change).flatten(1).sum(1)
            ok = square >= mean**2
            self.dropped += int((~ok).sum())
            valid.append(ok.double() if self.invalid == "drop" else torch.ones_like(mu))
            means.append(mean)
            squares.append(torch.maximum(square, mean**2))
        valid = torch.stack(valid)
        mean = (valid * torch.stack(means)).sum(0) / valid.sum(0)
        square = (valid * torch.stack(squares)).sum(0) / valid.sum(0)
        sigma = torch.sqrt(square - mean**2 + self.eps)
        if self.warmup == "linear" or self.step > self.burn_in:
            self.past.insert(0, (mu.detach(), nu.detach(), d_mu, d_nu, theta))
            del self.past[self.slots :]
        m = y.numel() // y.shape[1]
        self.running_mean += 0.1 * (mu.detach() - self.running_mean)
        unbiased = (nu - mu**2).detach() * m / (m - 1)
        self.running_var += 0.1 * (unbiased - self.running_var)
        return rows(gamma, y) * (y - rows(mean, y)) / rows(sigma, y) + rows(beta, y)


OPTIONS = {
    "clamp": {},
    "drop": {"invalid": "drop"},
    "burn-in": {"burn_in": 2},
    "linear": {"burn_in": 5, "warmup": "linear"},
    "half": {"compensation": 0.5},
    "off": {"compensation": 0.0},
    "two": {"window": 2},
}


def trajectory(make, shape, options, steps=8, pace=0.15):
    """Train with a random walk of the weights; compare everything with the reference."""
    torch.manual_seed(0)
    weight_layer = make().double()
    twin = copy.deepcopy(weight_layer)
    layer = CrossIterationBatchNorm(weight_layer, **options).double()
    options = {"window": 4, "burn_in": 0, "warmup": "plain", "invalid": "clamp"} | options
    rho = options.pop("compensation", 1.0)
    reference = Reference(twin, rho=rho, **options)
    gamma, beta = (one.requires_grad_() for one in torch.rand(2, len(twin.weight)).double() + 0.5)
    with torch.no_grad():
        layer.norm.weight.copy_(gamma)
        layer.norm.bias.copy_(beta)
    for _ in range(steps):
        x = torch.randn(shape, dtype=torch.float64) + 0.4
        one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
        actual, expected = layer(one), reference(two, gamma, beta)
        torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-10)
        g = torch.randn_like(expected)
        names = (one, layer.layer.weight, layer.norm.weight, layer.norm.bias)
        gradients = torch.autograd.grad(actual, names, g)
        wanted = torch.autograd.grad(expected, (two, twin.weight, gamma, beta), g)
        torch.testing.assert_close(gradients, wanted, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(layer.norm.running_mean, reference.running_mean)
        torch.testing.assert_close(layer.norm.running_var, reference.running_var)
        with torch.no_grad():
            change = pace * torch.randn_like(twin.weight)
            weight_layer.weight.add_(change)
            twin.weight.add_(change)
    return layer, reference


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("kind", [*LAYERS, *FURTHER])
def test_every_weight_layer_equals_the_reference(kind):
    trajectory(*(LAYERS | FURTHER)[kind], {})


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_equals_the_reference(options):
    _, reference = trajectory(*LAYERS["2d"], options, pace=0.5)
    if options.get("invalid", "clamp") == "drop" or not options:
        assert reference.dropped > 0, "no past variance was negative, so that nothing was tested"


def test_slopes_equal_the_one_call_trick():
    layer = nn.Conv2d(3, 5, 3, bias=False).double()
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    y = layer(x)
    moments, slopes = moments_and_slopes(layer, x, y)
    (d_mu,) = torch.autograd.grad(moments.mean.sum(), layer.weight, retain_graph=True)
    (d_v,) = torch.autograd.grad(moments.variance.sum(), layer.weight)
    torch.testing.assert_close(slopes.mean.expand_as(d_mu), d_mu)
    torch.testing.assert_close(slopes.variance, d_v)
    torch.testing.assert_close(d_mu, d_mu[:1].expand_as(d_mu))  # the same for all channels


def joined(make=lambda: nn.Conv2d(3, 4, 3, bias=False), **options):
    torch.manual_seed(0)
    return CrossIterationBatchNorm(make(), **options)


@pytest.mark.parametrize("options", [{"window": 1}, {"burn_in": 9}])
def test_one_iteration_is_batch_norm(options):
    layer = joined(**options)
    plain = nn.Sequential(copy.deepcopy(layer.layer), nn.BatchNorm2d(4))
    for _ in range(3):
        x = torch.randn(2, 3, 6, 6)
        one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = layer(one), plain(two)
        assert torch.equal(y, expected)
        g = torch.randn_like(y)
        y.backward(g)
        expected.backward(g)
        assert torch.equal(one.grad, two.grad)
        for name, buffer in plain[1].named_buffers():
            assert torch.equal(getattr(layer.norm, name), buffer)
    gradients = [parameter.grad for parameter in plain.parameters()]
    torch.testing.assert_close([parameter.grad for parameter in layer.parameters()], gradients)


def test_masked_burn_in_equals_the_shortcut(monkeypatch):
    """Where the counter may not be read, as on other devices, masks do what the shortcut does."""
    one, two = joined(burn_in=2), joined(burn_in=2)
    batches = torch.randn(5, 2, 3, 6, 6)
    expected = [one(x) for x in batches]
    monkeypatch.setattr(type(two.window), "is_known_to_burn_in", lambda self: False)
    for number, (x, y) in enumerate(zip(batches, expected, strict=True), start=1):
        torch.testing.assert_close(two(x), y)
        assert two.window.num_iterations == number
        assert two.window.num_stored == max(number - 2, 0)
    assert one.window.num_stored == 3


def test_an_unused_slot_may_hold_anything():
    x = torch.randn(4, 2)
    past = torch.full((1, 2, 2), torch.nan)
    y = cross_iteration_batch_norm(x, past, used=torch.tensor([False]))
    torch.testing.assert_close(y, nn.BatchNorm1d(2)(x))


def test_constant_weights_give_the_joined_batch():
    layer = joined()
    batches = torch.randn(6, 2, 3, 6, 6)
    outputs = [layer(x) for x in batches]
    for now in range(6):
        together = layer.layer(batches[max(now - 3, 0) : now + 1].flatten(0, 1))
        torch.testing.assert_close(outputs[now], nn.BatchNorm2d(4)(together)[-2:])


def test_compensation_of_the_mean_is_exact():
    layer = joined().double()
    x = torch.randn(4, 3, 6, 6).double() + 1
    layer(x)
    with torch.no_grad():
        layer.layer.weight.add_(torch.randn_like(layer.layer.weight))
    y = layer.layer(x)
    means, variances = layer.window.compensated(layer.layer.weight)[0]
    assert (means - y.mean((0, 2, 3))).abs().max() < 1e-12
    assert (variances <= y.var((0, 2, 3), correction=0)).all()


def test_the_sheets_example():
    layer = CrossIterationBatchNorm(nn.Linear(2, 1, bias=False)).double()
    x = torch.tensor([[1.0, 0.0], [1.0, 2.0]]).double()
    with torch.no_grad():
        layer.layer.weight.copy_(torch.tensor([[1.0, 1.0]]))
    layer(x)
    assert layer.window.moments[0].flatten().tolist() == pytest.approx([2, 5 - 4])
    with torch.no_grad():
        layer.layer.weight.copy_(torch.tensor([[1.0, 2.0]]))
    mean, variance = layer.window.compensated(layer.layer.weight)[0].flatten().tolist()
    assert mean == pytest.approx(3)
    assert variance + mean**2 == pytest.approx(11)  # the true mean square is 13


def test_negative_variances_are_clamped_or_dropped():
    x = torch.tensor([[1.0], [3.0]]).double()
    past = torch.tensor([[[6.0], [-2.0]], [[2.0], [4.0]]]).double()
    clamped = cross_iteration_batch_norm(x, past, eps=1e-12)
    mean, variance = 10 / 3, (1 + 0 + 4) / 3 + (2 * (4 / 3) ** 2 + (8 / 3) ** 2) / 3
    torch.testing.assert_close(clamped, (x - mean) / variance**0.5)
    dropped = cross_iteration_batch_norm(x, past, eps=1e-12, invalid="drop")
    torch.testing.assert_close(dropped, (x - 2) / 2.5**0.5)


def test_the_present_term_is_never_dropped():
    moments = SimpleNamespace(mean=torch.ones(1), variance=torch.tensor([-1e-9]))
    past = torch.tensor([[[0.0], [-1.0]]])
    y = cross_iteration_batch_norm(torch.ones(2, 1), past, invalid="drop", moments=moments)
    assert torch.equal(y, torch.zeros(2, 1))


def test_large_means_keep_their_digits():
    layer = CrossIterationBatchNorm(nn.Linear(1, 1, bias=False))
    nn.init.ones_(layer.layer.weight)
    batches = torch.randn(4, 64, 1, dtype=torch.float64) + 1000
    for x in batches:
        y = layer(x.float())
    together = batches.flatten(0, 1)
    expected = ((together - together.mean()) / together.var(correction=0).sqrt())[-64:]
    torch.testing.assert_close(y.double(), expected, atol=5e-4, rtol=5e-4)


def test_the_ring_holds_the_last_iterations_without_graph():
    layer = joined(window=4)
    seen = []
    for _ in range(8):
        x = torch.randn(2, 3, 6, 6)
        layer(x).sum().backward()
        seen.append(layer.layer(x).mean((0, 2, 3)).detach())
        assert layer.window.moments.shape == (3, 2, 4)
        for buffer in layer.buffers():
            assert buffer.grad_fn is None
            assert not buffer.requires_grad
    newest = [(int(layer.window.num_stored) - 1 - age) % 3 for age in range(3)]
    torch.testing.assert_close(layer.window.moments[newest, 0], torch.stack(seen[:-4:-1]))


@pytest.mark.parametrize("at", [1, 3, 6])
def test_a_checkpoint_resumes_bit_equal(at):
    batches = torch.randn(10, 2, 3, 6, 6)

    def train(layer, batches):
        for x in batches:
            layer.zero_grad()
            y = layer(x)
            y.pow(3).sum().backward()
            with torch.no_grad():
                layer.layer.weight.sub_(1e-3 * layer.layer.weight.grad)
        return y

    layer, fresh = joined(burn_in=2), joined(burn_in=2)
    train(layer, batches[:at])
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(train(fresh, batches[at:]), train(layer, batches[at:]))


def test_one_value_per_channel():
    layer = CrossIterationBatchNorm(nn.Linear(3, 4, bias=False))
    x = torch.randn(1, 3)
    with pytest.raises(ValueError, match="more than one value per channel"):
        layer(x)
    assert layer.window.num_iterations == layer.norm.num_batches_tracked == 0
    layer(torch.randn(5, 3))
    mean, var = layer.norm.running_mean.clone(), layer.norm.running_var.clone()
    for _ in range(4):
        assert layer(torch.randn(1, 3)).isfinite().all()
    assert torch.equal(layer.norm.running_var, var)
    assert not torch.equal(layer.norm.running_mean, mean)
    layer(torch.randn(1, 3)).square().sum().backward()
    assert layer.layer.weight.grad.abs().sum() > 0


def test_one_value_per_channel_is_refused_in_burn_in():
    layer = CrossIterationBatchNorm(nn.Linear(3, 4, bias=False), burn_in=5)
    layer(torch.randn(5, 3))
    with pytest.raises(ValueError, match="more than one value per channel"):
        layer(torch.randn(1, 3))
    assert layer.window.num_iterations == 1


@pytest.mark.parametrize("way", ["no gradients", "frozen"])
def test_without_gradients_it_is_batch_norm(way):
    layer = joined()
    for _ in range(2):
        layer(torch.randn(2, 3, 6, 6))
    layer.layer.weight.requires_grad_(way != "frozen")
    window = copy.deepcopy(layer.window.state_dict())
    x, mean = torch.randn(2, 3, 6, 6), layer.norm.running_mean.clone()
    with torch.set_grad_enabled(way == "frozen"):
        y = layer(x)
    torch.testing.assert_close(y, nn.BatchNorm2d(4)(layer.layer(x)))
    assert not torch.equal(layer.norm.running_mean, mean)
    assert all(
        torch.equal(value, window[name]) for name, value in layer.window.state_dict().items()
    )


def test_a_frozen_normaliser_uses_its_running_statistics():
    layer = joined()
    layer.norm.eval()
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(layer(x), layer.eval()(x))
    assert layer.window.num_iterations == 0


def test_recalibration_reaches_the_normaliser():
    layer = joined()
    x = torch.randn(6, 3, 6, 6)
    recalibrate(layer, [x])
    torch.testing.assert_close(layer.norm.running_mean, layer.layer(x).mean((0, 2, 3)))
    assert layer.window.num_iterations == 0


def test_input_gradient_with_a_full_window():
    layer = joined(lambda: nn.Conv1d(2, 2, 3, bias=False)).double()
    for _ in range(4):
        layer(torch.randn(2, 2, 5).double())
    x = torch.randn(2, 2, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: copy.deepcopy(layer)(x), x)
    assert torch.autograd.gradgradcheck(lambda x: copy.deepcopy(layer)(x), x)


@pytest.mark.parametrize("kind", ["2d", "linear"])
def test_autocast_keeps_statistics_in_single_precision(kind):
    make, shape = LAYERS[kind]
    layer = joined(make)
    x = torch.randn(shape)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    low = layer.layer(x).bfloat16().float()
    _, slopes = moments_and_slopes(layer.layer, x, layer.layer(x))
    torch.testing.assert_close(layer.window.mean_slopes[0], slopes.mean)
    axes = [axis for axis in range(low.dim()) if axis != 1]
    torch.testing.assert_close(layer.window.moments[0, 0], low.mean(axes), atol=1e-2, rtol=1e-2)
    # The weight has not moved, so nothing is to be corrected, however coarse the output.
    torch.testing.assert_close(layer.window.compensated(layer.layer.weight), layer.window.moments)


def test_compiled_training_equals_eager_training():
    torch.compiler.reset()
    eager, compiled = joined(burn_in=1), joined(burn_in=1)
    graph = torch.compile(compiled, fullgraph=True, backend="eager")
    for _ in range(5):
        x = torch.randn(2, 3, 6, 6)
        torch.testing.assert_close(graph(x), eager(x))
        with torch.no_grad():
            change = 0.1 * torch.randn_like(eager.layer.weight)
            eager.layer.weight.add_(change)
            compiled.layer.weight.add_(change)
    torch.compiler.reset()


def test_without_compensation_no_slopes_are_kept():
    keys = set(joined(compensation=0.0).state_dict())
    assert "window.variance_slopes" not in keys
    assert "window.moments" in keys


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"window": 0}, "window=0"),
        ({"burn_in": -1}, "burn_in=-1"),
        ({"warmup": "slow"}, "'plain' or 'linear'"),
        ({"compensation": -0.5}, "compensation"),
        ({"invalid": "keep"}, "'clamp' or 'drop'"),
        ({"momentum": 1.5}, "momentum"),
    ],
)
def test_options_out_of_range(options, word):
    with pytest.raises(ValueError, match=word):
        joined(**options)


@pytest.mark.parametrize(
    ("layer", "word"),
    [
        (nn.Conv2d(3, 4, 3), "bias=False"),
        (nn.ConvTranspose2d(3, 4, 3, bias=False), "nn.Conv1d.*got ConvTranspose2d"),
        (nn.ReLU(), "got ReLU"),
    ],
)
def test_other_layers_are_refused(layer, word):
    with pytest.raises(ValueError, match=word):
        CrossIterationBatchNorm(layer)


def test_a_bias_is_taken_out_and_evaluation_kept():
    layer, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-3, momentum=0.3)
    x = torch.randn(5, 3, 6, 6)
    norm(layer(x))
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.uniform_()
    expected = norm.eval()(layer(x))
    weights = layer.weight, norm.weight, norm.bias
    joint = from_batch_norm(norm, layer, window=3)
    assert not joint.training
    torch.testing.assert_close(joint(x), expected)
    assert joint.layer.bias is None
    assert (joint.norm.eps, joint.norm.momentum) == (1e-3, 0.3)
    for one, two in zip(joint.parameters(), weights, strict=True):
        assert one is two


@pytest.mark.parametrize(
    ("norm", "options"),
    [
        (nn.BatchNorm2d(4), {"window": 0}),
        (nn.BatchNorm2d(4), {"windows": 2}),
        (nn.BatchNorm2d(5), {}),
        (nn.BatchNorm2d(4, track_running_stats=False), {}),
    ],
)
def test_a_refusal_leaves_the_pair_as_it_was(norm, options):
    layer = nn.Conv2d(3, 4, 3)
    before = copy.deepcopy((layer.state_dict(), norm.state_dict()))
    with pytest.raises((ValueError, TypeError)):
        from_batch_norm(norm, layer, **options)
    for module, state in zip((layer, norm), before, strict=True):
        assert module.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


class Branches(nn.Module):
    """One good pair with a bias, and a BatchNorm for each reason to stay."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.twice, self.bn2, self.bn3 = (
            nn.Conv2d(3, 3, 1),
            nn.BatchNorm2d(3),
            nn.BatchNorm2d(3),
        )
        self.up, self.bn4 = nn.ConvTranspose2d(3, 3, 1), nn.BatchNorm2d(3)
        self.again, self.bn5 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.used, self.bn6 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.bare, self.bn7 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn3(self.twice(self.bn2(self.twice(x))))
        x = self.bn4(self.up(x)).relu()
        x = self.bn5(self.bn5(self.again(x)))
        x = self.bn7(self.bare(x))
        y = self.used(x)
        return self.bn6(y) + y


def test_what_does_not_fit_stays_and_is_told():
    said = []
    setting = Setting(
        batches=((torch.randn(4, 3, 2, 2), torch.zeros(4)),), total_steps=40, say=said.append
    )
    model = Branches()
    model.bn1.eval()
    model = METHOD.prepare(model, setting)
    assert isinstance(model.conv1, CrossIterationBatchNorm)
    assert not model.conv1.training
    assert type(model.bn1) is nn.Identity
    assert model.conv1.window.burn_in == 10
    for name in ("bn2", "bn3", "bn4", "bn5", "bn6", "bn7"):
        assert isinstance(getattr(model, name), nn.BatchNorm2d), name
        assert f"{name} (" in said[0]
    assert "1 weight layers" in said[0]
    for reason in ("called 2 times", "no convolution", "more than once", "something else"):
        assert reason in said[0]
    model.train()(torch.randn(4, 3, 2, 2)).sum().backward()


def test_a_model_without_a_pair_is_refused_unchanged():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.BatchNorm1d(4))
    setting = Setting(batches=((torch.randn(4, 3), torch.zeros(4)),))
    with pytest.raises(Unsuitable, match=r"2 \(no convolution or linear layer"):
        METHOD.prepare(model, setting)
    assert type(model[2]) is nn.BatchNorm1d
    good = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    for options in ({"window": 0}, {"burn_in_share": 1.5}):
        with pytest.raises(ValueError, match=next(iter(options))):
            METHOD.with_options(**options).prepare(good, setting)
        assert good[0].bias is not None
        assert type(good[1]) is nn.BatchNorm1d


def test_a_linear_layer_on_sequences_stays():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(5))
    setting = Setting(batches=((torch.randn(4, 5, 3), torch.zeros(4)),))
    with pytest.raises(Unsuitable, match=r"more than \(N, C\)"):
        METHOD.prepare(model, setting)


def test_parametrised_weights_are_followed():
    layer = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3, bias=False))
    joint = CrossIterationBatchNorm(layer)
    x = torch.randn(2, 3, 6, 6)
    joint(x)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(2)
    means = joint.window.compensated(layer.weight)[0, 0]
    torch.testing.assert_close(means, layer(x).mean((0, 2, 3)))
