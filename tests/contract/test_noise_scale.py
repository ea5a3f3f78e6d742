"""The noise scale from square norms, and that of a model, beside its closed form."""

import math

import pytest
import torch
from torch import nn

from normlab.optim.noise_scale import NoiseScale, measure_noise_scale, noise_scale


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


class Mean(nn.Module):
    """Predicts a vector; its squared error has the gradient ``weight - mean(targets)``."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, dtype=torch.float64))
        self.unused = nn.Parameter(torch.zeros(2))
        self.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)

    def forward(self, inputs):
        return self.weight.expand(len(inputs), -1)


def half_square(outputs, targets):
    return 0.5 * (outputs - targets).square().sum(1).mean()


def targets_of(count, batch, generator):
    """Batches whose gradient at zero has the signal 2 and, for each sample, the noise 18."""
    return [
        (torch.zeros(batch, 1), -0.2 + 0.6 * torch.randn(batch, 50, generator=generator).double())
        for _ in range(count)
    ]


def test_a_model_is_measured_as_the_formula_says():
    batches = targets_of(3, 4, torch.Generator().manual_seed(0))
    found = measure_noise_scale(Mean(50), iter(batches), half_square)
    means = [-y.mean(0) for _, y in batches]
    small = sum(float(m @ m) for m in means) / 3
    whole = sum(means) / 3
    big = float(whole @ whole)
    assert found.signal == pytest.approx((12 * big - 4 * small) / 8, rel=1e-12)
    assert found.noise == pytest.approx((small - big) / (1 / 4 - 1 / 12), rel=1e-12)
    assert found.num_estimates == 1


def test_many_measurements_find_the_true_scale():
    generator = torch.Generator().manual_seed(1)
    model = Mean(50)
    found = [
        measure_noise_scale(model, targets_of(4, 4, generator), half_square) for _ in range(1500)
    ]
    assert sum(one.noise for one in found) / 1500 == pytest.approx(50 * 0.36, rel=0.05)
    assert sum(one.signal for one in found) / 1500 == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_the_caller_moves(dtype):
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 2))
    model.to(dtype)
    batches = [(torch.randn(6, 3, dtype=dtype), torch.randint(2, (6,))) for _ in range(3)]
    nn.functional.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [p.grad.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    with torch.no_grad():
        found = measure_noise_scale(model, batches)
    assert math.isfinite(found.noise)
    assert found.noise > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(p.grad, gradient)


def test_a_compiled_model_is_measured_as_it_was_written():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    batches = [(torch.randn(4, 3), torch.randint(2, (4,))) for _ in range(2)]

    def refuse(graph, inputs):
        raise AssertionError("a copy was compiled")

    compiled = torch.compile(model, backend=refuse)
    assert measure_noise_scale(compiled, batches) == measure_noise_scale(model, batches)


@pytest.mark.parametrize("sizes", [(), (4,), (4, 3)])
def test_batches_that_cannot_be_compared_are_refused(sizes):
    batches = [(torch.randn(n, 3), torch.randint(2, (n,))) for n in sizes]
    with pytest.raises(ValueError, match=r"expected at least two of one size, got \["):
        measure_noise_scale(nn.Linear(3, 2), batches)


def test_a_model_without_gradients_is_refused():
    model = nn.Linear(3, 2).requires_grad_(False)
    batches = [(torch.randn(4, 3), torch.randint(2, (4,))) for _ in range(2)]
    with pytest.raises(ValueError, match="expected a model with parameters that learn"):
        measure_noise_scale(model, batches)


def test_a_model_that_cannot_be_copied_is_refused():
    model = nn.Linear(3, 2)
    del model.weight
    model.weight = torch.ones(2, 3, requires_grad=True) * 2
    with pytest.raises(ValueError, match="expected a model that can be copied, got Only Tensors"):
        measure_noise_scale(model, [])
