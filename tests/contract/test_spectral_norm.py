"""Spectral normalisation, one- and two-sided, against singular values from a decomposition."""

import contextlib
import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from normlab import (
    bidirectional_spectral_norm,
    frozen_power_iteration,
    spectral_norm,
)
from normlab.method import Setting, Unsuitable
from normlab.weights.spectral_norm import BIDIRECTIONAL, METHOD, SpectralNorm

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


def test_each_training_forward_takes_the_steps_asked_for():
    one, three = nn.Linear(9, 7).double(), nn.Linear(9, 7).double()
    for layer, steps in ((one, 1), (three, 3)):
        layer.load_state_dict(nn.Linear(9, 7).double().state_dict())
        spectral_norm(layer, n_power_iterations=steps)
    three.load_state_dict(one.state_dict())
    with torch.no_grad():
        for layer in (one, three):
            layer.parametrizations.weight.original.copy_(torch.eye(7, 9) + torch.ones(7, 9))
    for _ in range(3):
        expected = one.weight
    torch.testing.assert_close(three.weight, expected)


def test_a_generator_gives_the_same_vectors():
    layer = nn.Linear(5, 5)
    nn.init.eye_(layer.weight)

    def left(register):
        made = copy.deepcopy(layer)
        register(made, torch.Generator().manual_seed(3))
        return made.parametrizations.weight[0].left0

    for register in (
        lambda made, generator: spectral_norm(made, generator=generator),
        lambda made, generator: bidirectional_spectral_norm(made, generator=generator),
        lambda made, generator: METHOD.prepare(made, Setting(batches=(), generator=generator)),
    ):
        assert torch.equal(left(register), left(register))
    assert not torch.equal(left(lambda made, _: spectral_norm(made)), left(register))


@pytest.mark.parametrize("method", [METHOD, BIDIRECTIONAL])
def test_the_methods_take_their_sides_and_scale(method):
    said = []
    setting = Setting(batches=(), say=said.append)
    layer = method.with_options(scale=1.6).prepare(nn.Conv2d(3, 6, 3).double(), setting)
    for _ in range(400):
        weight = layer.weight
    first, second = (torch.linalg.svdvals(m)[0].item() for m in matrices(layer, weight))
    expected = first if method is METHOD else (first + second) / 2
    assert expected == pytest.approx(1.6, abs=1e-6)
    assert said == ["the weights of 1 layers are divided by their largest singular value"]


def test_a_layer_in_evaluation_is_normalised_without_a_step():
    layer = nn.Linear(4, 3).eval()
    spectral_norm(layer)
    assert torch.equal(layer.weight, layer.weight)


@pytest.mark.parametrize("widths", [{}, {"kdim": 3, "vdim": 5}])
def test_attention(widths):
    layer = nn.MultiheadAttention(4, 2, batch_first=True, **widths)
    chosen = bidirectional_spectral_norm(layer)
    assert list(chosen) == ["", "out_proj"]
    names = [name for name, _ in layer.named_parameters() if name.endswith("original")]
    assert len(names) == (4 if widths else 2)
    for _ in range(300):
        weight = layer.q_proj_weight if widths else layer.in_proj_weight
    assert torch.linalg.matrix_norm(weight, 2).item() == pytest.approx(1.0, abs=1e-4)
    inputs = [torch.randn(2, 6, size) for size in (4, *(widths.values() or (4, 4)))]
    output = layer(*inputs)[0]
    output.sum().backward()
    torch.testing.assert_close(layer.eval()(*inputs)[0], output, rtol=1e-3, atol=1e-4)


def test_what_is_left_is_said():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(3, 4)
            self.readout = nn.Linear(4, 2)

    said = []
    METHOD.prepare(Model(), Setting(batches=(), say=said.append))
    assert said[1] == "2 other weights are left as they are, such as lstm.weight_ih_l0"


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


def test_bias_is_left_alone():
    layer = nn.Linear(4, 3)
    bias = layer.bias.detach().clone()
    spectral_norm(layer, scale=0.5)
    assert torch.equal(layer(torch.zeros(1, 4))[0], bias)


def test_bad_input():
    for options, name in (
        ({"scale": 0}, "scale=0"),
        ({"scale": math.inf}, "scale=inf"),
        ({"scale": math.nan}, "scale=nan"),
        ({"n_power_iterations": 0}, "n_power_iterations=0"),
    ):
        layer = nn.Linear(2, 2)
        got = name.partition("=")[2]
        with pytest.raises(
            ValueError, match=rf"SpectralNorm\({name}\): expected .*, got {got}; give"
        ):
            spectral_norm(layer, **options)
        assert not parametrize.is_parametrized(layer)
    with pytest.raises(ValueError, match="two axes"):
        SpectralNorm(torch.ones(3))
    with pytest.raises(Unsuitable, match="nothing to normalise"):
        METHOD.prepare(nn.ReLU(), Setting(batches=()))
    with pytest.raises(Unsuitable, match="got LSTM without any; there is nothing to normalise"):
        spectral_norm(nn.LSTM(3, 4))


@pytest.mark.parametrize("normalise", [spectral_norm, bidirectional_spectral_norm])
def test_weights_that_cannot_be_normalised(normalise):
    twice = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    normalise(twice[1])
    for model, got in (
        (twice, "one that is; take that off first"),
        (nn.Sequential(nn.Linear(4, 3), nn.LazyLinear(2)), "a lazy one; run the model once"),
        (nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2, device="meta")), "one on the meta device"),
    ):
        with pytest.raises(Unsuitable, match=rf"{normalise.__name__}\(1.weight\): .* got {got}"):
            normalise(model)
        assert not parametrize.is_parametrized(model[0])
