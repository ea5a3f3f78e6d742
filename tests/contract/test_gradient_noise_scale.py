"""The noise scale of gradients whose noise and signal are known."""

import math

import pytest
import torch
from torch import nn

from normlab.optim.gradient_noise_scale import GradientNoiseScale, NoiseScale, noise_scale


def gaussian(batch, signal, deviation, generator):
    return signal + deviation / math.sqrt(batch) * torch.randn(
        signal.shape, generator=generator, dtype=signal.dtype
    )


def test_expected_square_norms_give_the_scale_exactly():
    square, trace = 3.0, 60.0
    for small, big in ((1, 2), (8, 64)):
        found = noise_scale(square + trace / small, square + trace / big, small, big)
        assert (found.noise, found.signal) == pytest.approx((trace, square))
        assert found.scale == pytest.approx(20.0)
        assert found.suggested_batch_size == 20


def test_no_signal_gives_no_suggestion():
    assert NoiseScale(4.0, -0.1).scale == math.inf
    assert NoiseScale(4.0, -0.1).suggested_batch_size is None
    assert NoiseScale(-1.0, 1.0).scale == 0.0
    assert NoiseScale(-1.0, 1.0).suggested_batch_size == 1


def test_gaussian_gradients():
    generator = torch.Generator().manual_seed(0)
    signal = torch.full((50,), 0.2, dtype=torch.float64)  # |G|^2 = 2
    weight = nn.Parameter(torch.zeros(50, dtype=torch.float64))
    meter = GradientNoiseScale([weight], momentum=0.001)
    for _ in range(3000):
        parts = [gaussian(4, signal, 0.6, generator) for _ in range(8)]
        weight.grad = parts[0] / 8  # as accumulation with the loss divided leaves it
        meter.small(4, multiply=8)
        weight.grad = sum(parts) / 8
        meter.big(32)
    found = meter.estimate()
    assert found.num_estimates == 3000
    assert found.noise == pytest.approx(50 * 0.36, rel=0.05)
    assert found.signal == pytest.approx(2.0, rel=0.05)
    assert found.scale == pytest.approx(9.0, rel=0.08)


def test_accumulation_measures_what_the_formula_says():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    unused = nn.Parameter(torch.zeros(2))
    x = torch.randn(8, 3, dtype=torch.float64)

    def square(part):
        gradients = torch.autograd.grad(model(part).square().mean(), list(model.parameters()))
        return sum(g.square().sum() for g in gradients).item()

    meter = GradientNoiseScale([*model.parameters(), unused], momentum=0.3)
    for _ in range(2):
        model.zero_grad()
        for number, part in enumerate(x.chunk(4)):
            (model(part).square().mean() / 4).backward()
            if number == 0:
                meter.small(2, multiply=4)
        meter.big(8)
    expected = noise_scale(square(x[:2]), square(x), 2, 8)
    found = meter.estimate()
    assert (found.noise, found.signal) == pytest.approx((expected.noise, expected.signal), rel=1e-6)


def test_averages_are_corrected_and_saved():
    weight = nn.Parameter(torch.zeros(1))
    meter = GradientNoiseScale([weight], momentum=0.1)
    noises = []
    for number in range(3):
        weight.grad = torch.full((1,), 2.0 + number)
        meter.small(1)
        weight.grad = torch.ones(1)
        meter.big(2)
        noises.append(2 * ((2.0 + number) ** 2 - 1))
    weights = [0.1 * 0.9 ** (2 - number) for number in range(3)]
    expected = sum(w * n for w, n in zip(weights, noises, strict=True)) / sum(weights)
    assert meter.estimate().noise == pytest.approx(expected)
    other = GradientNoiseScale([weight], momentum=0.1)
    other.load_state_dict(meter.state_dict())
    assert other.estimate() == meter.estimate()


def test_misuse_is_refused():
    weight = nn.Parameter(torch.zeros(1))
    meter = GradientNoiseScale([weight])
    with pytest.raises(ValueError, match="expected gradients, got none"):
        meter.small(1)
    with pytest.raises(ValueError, match="a small batch measured before"):
        meter.big(2)
    with pytest.raises(ValueError, match="at least one pair"):
        meter.estimate()
    weight.grad = torch.ones(1)
    meter.small(4)
    with pytest.raises(ValueError, match="below the big one"):
        meter.big(4)
    with pytest.raises(ValueError, match="momentum=0"):
        GradientNoiseScale([weight], momentum=0.0)
