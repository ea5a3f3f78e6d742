"""Spectral normalisation, one- and two-sided, against singular values from a decomposition."""

import contextlib
import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from normlab import bidirectional_spectral_norm, frozen_power_iteration, spectral_norm
from normlab.method import Setting, Unsuitable
from normlab.weights.spectral_norm import METHOD, SpectralNorm

LAYERS = {
    "linear": lambda: nn.Linear(5, 3),
    "conv": lambda: nn.Conv2d(3, 6, 3),
    "grouped conv": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "conv1d": lambda: nn.Conv1d(3, 5, 4),
    "transposed conv": lambda: nn.ConvTranspose2d(3, 6, 3),
    "embedding": lambda: nn.Embedding(7, 4),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def matrices(layer, weight):
    """M1 with output channels as rows, M2 with input channels as rows, entry by entry."""
    transposed = isinstance(layer, nn.ConvTranspose2d)
    by_output = weight.transpose(0, 1) if transposed else weight
    rows = [by_output[i].reshape(-1) for i in range(by_output.shape[0])]
    columns = [by_output[:, i].reshape(-1) for i in range(by_output.shape[1])]
    return torch.stack(rows), torch.stack(columns)


def converged(layer, normalise, **options):
    normalise(layer, **options)
    for _ in range(400):
        weight = layer.weight
    return weight


@pytest.mark.parametrize("scale", [1.0, 1.6])
@pytest.mark.parametrize("kind", LAYERS)
def test_singular_values_at_convergence(kind, scale):
    layer = LAYERS[kind]().double()
    plain = layer.weight.detach().clone()
    one = converged(copy.deepcopy(layer), spectral_norm, scale=scale)
    first, second = (torch.linalg.svdvals(m)[0] for m in matrices(layer, one))
    assert first.item() == pytest.approx(scale, abs=1e-6)
    two = converged(copy.deepcopy(layer), bidirectional_spectral_norm, scale=scale)
    first, second = (torch.linalg.svdvals(m)[0] for m in matrices(layer, two))
    assert (first + second).item() / 2 == pytest.approx(scale, abs=1e-6)
    for weight in (one, two):
        ratio = weight / plain
        torch.testing.assert_close(ratio, ratio.flatten()[0].expand_as(ratio))


def test_equals_torch_at_convergence():
    for kind in ("linear", "conv"):
        layer = LAYERS[kind]().double()
        theirs = converged(copy.deepcopy(layer), nn.utils.parametrizations.spectral_norm)
        ours = converged(copy.deepcopy(layer), spectral_norm)
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
    layer = LAYERS["linear"]().double()
    both = converged(copy.deepcopy(layer), bidirectional_spectral_norm)
    torch.testing.assert_close(both, converged(layer, spectral_norm), rtol=1e-8, atol=1e-10)


def test_one_step_of_power_iteration():
    """First v from the stored u, then u from v, then sigma = u^T M v."""
    layer = nn.Conv2d(3, 4, 2).double()
    weight = layer.weight.detach().clone()
    bidirectional_spectral_norm(layer, scale=0.7)
    part = layer.parametrizations.weight[0]
    sigmas = []
    for side, matrix in enumerate(matrices(layer, weight)):
        v = matrix.T @ getattr(part, f"left{side}")
        v = v / v.norm()
        u = matrix @ v
        u = u / u.norm()
        sigmas.append(u @ matrix @ v)
    expected = 0.7 * weight / (sum(sigmas) / 2)
    torch.testing.assert_close(layer.weight, expected, rtol=1e-10, atol=0)


def test_gradient_takes_the_vectors_as_constants():
    for normalise, sides in ((spectral_norm, 1), (bidirectional_spectral_norm, 2)):
        layer = nn.Conv2d(3, 4, 2).double()
        normalise(layer)
        part, original = layer.parametrizations.weight[0], layer.parametrizations.weight.original
        slope = torch.randn_like(original)
        layer.weight.backward(slope)
        free = original.detach().clone().requires_grad_()
        sigma = 0
        for side, matrix in zip(range(sides), matrices(layer, free), strict=False):
            sigma = sigma + getattr(part, f"left{side}") @ matrix @ getattr(part, f"right{side}")
        (free / (sigma / sides)).backward(slope)
        torch.testing.assert_close(original.grad, free.grad, rtol=1e-10, atol=1e-12)
        assert abs((original.grad * original).sum().item()) < 1e-12


@pytest.mark.parametrize("output_axis", [0, 1])
@pytest.mark.parametrize("sides", [1, 2])
def test_gradients_of_any_order_and_of_every_kind_agree(sides, output_axis):
    weight = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    part = SpectralNorm(weight, 1.3, sides=sides, output_axis=output_axis).eval()
    assert torch.autograd.gradcheck(part, weight)
    assert torch.autograd.gradgradcheck(part, weight)
    (found,) = torch.autograd.grad(part(weight).pow(3).sum(), weight)
    by_function = torch.func.grad(lambda w: part(w).pow(3).sum())(weight.detach())
    torch.testing.assert_close(by_function, found, rtol=1e-10, atol=1e-12)


def test_scale_of_the_weight_is_lost():
    layer = nn.Conv2d(3, 4, 3).double()
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight.mul_(7)
    one, two = (
        converged(layer, bidirectional_spectral_norm),
        converged(other, bidirectional_spectral_norm),
    )
    torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-8)


def test_deviation_of_a_random_kernel():
    layer = nn.Conv2d(64, 128, 3)
    nn.init.normal_(layer.weight)
    weight = converged(layer, bidirectional_spectral_norm)
    rows, columns = 128, 64
    one = math.sqrt(rows) + math.sqrt(columns * 9)
    two = math.sqrt(columns) + math.sqrt(rows * 9)
    assert weight.std().item() == pytest.approx(2 / (one + two), rel=0.02)


@pytest.mark.parametrize("normalise", [spectral_norm, bidirectional_spectral_norm])
def test_zero_weights_stay_zero_and_can_be_revived(normalise):
    layer = nn.Conv2d(3, 4, 3)
    nn.init.zeros_(layer.weight)
    normalise(layer)
    output = layer(torch.randn(2, 3, 5, 5)).sum()
    output.backward()
    original = layer.parametrizations.weight.original
    assert torch.equal(layer.weight, torch.zeros_like(original))
    assert torch.isfinite(original.grad).all()
    with torch.no_grad():
        original.normal_()
    for _ in range(200):
        weight = layer.weight
    first, second = (torch.linalg.svdvals(m)[0] for m in matrices(layer, weight))
    mean = first if normalise is spectral_norm else (first + second) / 2
    assert mean.item() == pytest.approx(1.0, abs=1e-3)


def test_vectors_move_in_training_only_and_not_while_frozen():
    layer = nn.Conv2d(3, 8, 3)
    bidirectional_spectral_norm(layer)
    x = torch.randn(1, 3, 5, 5)
    names = ("left0", "right0", "left1", "right1")
    part = layer.parametrizations.weight[0]

    def vectors():
        return [getattr(part, name).clone() for name in names]

    def unmoved(before):
        return all(torch.equal(one, two) for one, two in zip(before, vectors(), strict=True))

    layer.eval()
    before, outputs = vectors(), layer(x)
    assert torch.equal(layer(x), outputs)
    assert unmoved(before)
    layer.train()
    with frozen_power_iteration(layer):
        layer(x)
    assert unmoved(before)
    with contextlib.suppress(KeyError), frozen_power_iteration(layer):
        raise KeyError
    layer(x)
    assert not unmoved(before)


def test_two_forwards_before_one_backward():
    layer = nn.Linear(4, 3)
    spectral_norm(layer)
    (layer(torch.ones(2, 4)).sum() - layer(torch.zeros(2, 4)).sum()).backward()
    assert layer.parametrizations.weight.original.grad is not None


def test_a_checkpoint_holds_the_vectors():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(27, 2))
    bidirectional_spectral_norm(model)
    model(torch.randn(2, 2, 5, 5))
    other = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(27, 2))
    bidirectional_spectral_norm(other)
    other.load_state_dict(model.state_dict())
    x = torch.randn(2, 2, 5, 5)
    twin = copy.deepcopy(model)
    expected = model(x)
    assert torch.equal(other(x), expected)
    assert torch.equal(twin(x), expected)
    plain = model.eval()(x)
    for layer in (model[0], model[2]):
        parametrize.remove_parametrizations(layer, "weight")
    torch.testing.assert_close(model(x), plain)


def test_compiles_without_a_break_and_under_autocast():
    layer = nn.Linear(4, 3)
    bidirectional_spectral_norm(layer)
    x = torch.randn(2, 4)
    with frozen_power_iteration(layer):
        expected = layer(x)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            weight = layer.weight
    assert weight.dtype == torch.float32


def test_bias_is_left_alone():
    layer = nn.Linear(4, 3)
    bias = layer.bias.detach().clone()
    spectral_norm(layer, scale=0.5)
    assert torch.equal(layer(torch.zeros(1, 4))[0], bias)


def test_bad_input():
    for options, name in (
        ({"scale": 0}, "scale=0"),
        ({"n_power_iterations": 0}, "n_power_iterations=0"),
    ):
        layer = nn.Linear(2, 2)
        with pytest.raises(ValueError, match=rf"SpectralNorm\({name}\): expected .*, got 0; give"):
            spectral_norm(layer, **options)
        assert not parametrize.is_parametrized(layer)
    with pytest.raises(ValueError, match="two axes"):
        SpectralNorm(torch.ones(3))
    with pytest.raises(Unsuitable, match="nothing to normalise"):
        METHOD.prepare(nn.ReLU(), Setting(batches=()))
