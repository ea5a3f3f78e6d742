"""Mixup against its definition, the loss that it promises, and the distribution of its share."""

import math

import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from normlab.lab.models import build_model
from normlab.method import Setting
from normlab.regularizers.mixup import METHOD, mixup
from normlab.testing import METHOD_CHECKS, MethodCase


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def data(samples=6, classes=3):
    x = torch.randn(samples, 2, 4, 4, generator=seeded(0), dtype=torch.float64)
    return x, torch.arange(samples) % classes


def share_and_order(x, mixed):
    """Read share and partners off a mixed batch, by least squares over all partners."""
    flat, out = x.flatten(1), mixed.flatten(1)
    found = []
    for i in range(len(x)):
        errors = []
        for j in range(len(x)):
            direction = flat[i] - flat[j]
            size = direction.square().sum()
            share = 1.0 if size == 0 else (((out[i] - flat[j]) @ direction) / size).item()
            error = (share * flat[i] + (1 - share) * flat[j] - out[i]).norm().item()
            errors.append((error, j, share))
        found.append(min(errors))
    return found


def test_one_share_and_one_permutation_for_a_batch():
    x, y = data()
    inputs, targets = mixup(x, y, 3, generator=seeded(3))
    found = share_and_order(x, inputs)
    assert max(error for error, _, _ in found) < 1e-12
    order = [j for _, j, _ in found]
    moved = [(i, j, share) for i, (_, j, share) in enumerate(found) if i != j]
    assert len(moved) >= 3
    assert sorted(order) == list(range(6))
    share = moved[0][2]
    assert 0 < share < 1
    assert all(other == pytest.approx(share) for _, _, other in moved)
    expected = share * torch.eye(3).double()[y] + (1 - share) * torch.eye(3).double()[y[order]]
    torch.testing.assert_close(targets, expected)


def test_the_loss_is_that_of_both_targets():
    x, y = data()
    inputs, targets = mixup(x, y, 3, generator=seeded(3))
    found = share_and_order(x, inputs)
    order = [j for _, j, _ in found]
    share = next(share for i, (_, j, share) in enumerate(found) if i != j)
    logits = torch.randn(6, 3, dtype=torch.float64)
    both = share * F.cross_entropy(logits, y) + (1 - share) * F.cross_entropy(logits, y[order])
    torch.testing.assert_close(F.cross_entropy(logits, targets), both)


@pytest.mark.parametrize("alpha", [0.2, 0.7, 1.0, 4.0])
def test_the_share_follows_its_beta_distribution(alpha):
    x, y = torch.tensor([[1.0], [0.0]], dtype=torch.float64), torch.tensor([0, 1])
    generator = seeded(7)
    shares = []
    while len(shares) < 1500:
        inputs, _ = mixup(x, y, 2, alpha, generator)
        # A batch in its own order is left as it was.
        if inputs[0] != 1:
            shares.append(inputs[0, 0].item())
    assert stats.kstest(shares, stats.beta(alpha, alpha).cdf).pvalue > 1e-3


def test_extreme_shares():
    x, y = data()
    for alpha in (1e-6, 1e-310):
        inputs, targets = mixup(x, y, 3, alpha, seeded(1))
        assert torch.isfinite(inputs).all()
        torch.testing.assert_close(targets.max(1).values, torch.ones(6).double())
    inputs, _ = mixup(x, y, 3, 1e8, seeded(3))
    shares = [share for i, (_, j, share) in enumerate(share_and_order(x, inputs)) if i != j]
    assert shares[0] == pytest.approx(0.5, abs=1e-3)


def test_draws_come_from_the_generator_alone():
    x, y = data()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one, two = mixup(x, y, 3, generator=seeded(5)), mixup(x, y, 3, generator=seeded(5))
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(mixup(x, y, 3, generator=seeded(6))[0], one[0])
    torch.manual_seed(0)
    first = mixup(x, y, 3)[0]
    torch.manual_seed(0)
    assert torch.equal(mixup(x, y, 3)[0], first)


def test_dtypes_layouts_and_probabilities():
    x, y = data()
    before = x.clone(), y.clone()
    inputs, targets = mixup(x.float().to(memory_format=torch.channels_last), y, 3)
    assert (inputs.dtype, targets.dtype) == (torch.float32, torch.float32)
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    inputs, targets = mixup(x.bfloat16(), y, 3)
    assert (inputs.dtype, targets.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])
    torch.testing.assert_close(targets.sum(1), torch.ones(6))
    smooth = torch.full((6, 3), 0.05, dtype=torch.float64) + 0.85 * F.one_hot(y, 3)
    inputs, twice = mixup(x, smooth, 3, generator=seeded(3))
    _, plain = mixup(x, y, 3, generator=seeded(3))
    torch.testing.assert_close(twice, 0.05 + 0.85 * plain)
    alone, target = mixup(x[:1], y[:1], 3)
    torch.testing.assert_close(alone, x[:1])
    torch.testing.assert_close(target, F.one_hot(y[:1], 3).double())


def test_wrong_input():
    x, y = data()
    for alpha in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"mixup\(alpha=.*expected a number above 0"):
            mixup(x, y, 3, alpha)
    with pytest.raises(ValueError, match=r"expected floating point, got torch.int64"):
        mixup(x.long(), y, 3)
    for targets in (y[:4], y.float(), torch.ones(6, 2), torch.ones(6, 3, 1)):
        with pytest.raises(ValueError, match=r"expected class numbers \(6,\) or probabilities"):
            mixup(x, targets, 3)
    with pytest.raises(ValueError, match="class numbers from 0 to 1, got 0 to 2"):
        mixup(x, y, 2)
    with pytest.raises(ValueError, match="got -1 to 1"):
        mixup(x, y - 1, 3)


MODELS = {
    "mlp": ({"depth": 4, "width": 16}, (1, 6, 6)),
    "plain-conv": ({"depth": 5, "width": 8}, (2, 8, 8)),
    "resnet": ({"depth": 8, "width": 8}, (2, 8, 8)),
}


@pytest.mark.parametrize("model", MODELS)
def test_method_contract(model):
    options, shape = MODELS[model]
    inputs, targets = torch.randn(12, *shape, generator=seeded(0)), torch.arange(12) % 4
    make = lambda: build_model(model, shape, 4, **options)  # noqa: E731
    for check in METHOD_CHECKS:
        check(MethodCase(METHOD, make, inputs, targets, num_classes=4, lr=0.02))


def test_the_methods_batch():
    x, y = data()
    setting = Setting(batches=((x, y),), num_classes=5)
    method = METHOD.with_options(alpha="0.3")
    assert method.label == "mixup:alpha=0.3"
    inputs, targets = method.batch(x, y, seeded(2), setting)
    expected = mixup(x, y, 5, 0.3, seeded(2))
    assert targets.shape == (6, 5)
    assert torch.equal(inputs, expected[0])
    assert torch.equal(targets, expected[1])
