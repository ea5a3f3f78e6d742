"""Accumulation equals one batch: sample means, token means, and who exchanges gradients when."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from normlab.optim.accumulate import accumulate, total_count


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("parts", [1, 3])
def test_micro_batches_equal_one_batch(parts):
    x = torch.randn(12, 3, dtype=torch.float64)
    model = network()
    model(x).square().mean().backward()
    expected = gradients(model)
    model.zero_grad()
    for index, part in enumerate(x.chunk(parts)):
        with accumulate(model, index, parts) as factor:
            (factor * model(part).square().mean()).backward()
    torch.testing.assert_close(gradients(model), expected, atol=1e-12, rtol=1e-12)


def test_token_means_are_weighed_by_their_counts():
    x = torch.randn(12, 3, dtype=torch.float64)
    model = network()
    model(x).square().mean().backward()
    expected = gradients(model)
    model.zero_grad()
    parts = x.split([1, 7, 4])
    counts = [len(part) for part in parts]
    for index, part in enumerate(parts):
        count, total = counts[index], total_count(counts)
        with accumulate(model, index, 3, count=count, total=total) as factor:
            (factor * model(part).square().mean()).backward()
    torch.testing.assert_close(gradients(model), expected, atol=1e-12, rtol=1e-12)


class Watched(nn.Module):
    """Notes what accumulation asks of it."""

    def __init__(self):
        super().__init__()
        self.notes = []

    @contextmanager
    def no_sync(self):
        self.notes.append("off")
        try:
            yield
        finally:
            self.notes.append("on")

    def set_requires_gradient_sync(self, flag):
        self.notes.append(flag)


def test_only_the_last_micro_batch_exchanges_gradients():
    model = Watched()
    for index in range(2):
        with accumulate(model, index, 2):
            model.notes.append("pass")
    assert model.notes == ["off", False, "pass", True, "on", True, "pass", True]
    model.notes.clear()
    with pytest.raises(RuntimeError), accumulate(model, 0, 2):
        raise RuntimeError
    assert model.notes == ["off", False, True, "on"]


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"index": 2}, "an index from 0 to 1"),
        ({"index": -1}, "an index from 0 to 1"),
        ({"num_batches": 0}, "1, 2, 3, ..."),
        ({"num_batches": "x"}, "1, 2, 3, ..."),
        ({"count": 3}, "a count of at least 0 within a total"),
        ({"total": 3}, "a count of at least 0 within a total"),
        ({"count": 0, "total": 0}, "a count of at least 0 within a total"),
        ({"count": -5, "total": 2}, "a count of at least 0 within a total"),
        ({"count": 3, "total": 2}, "a count of at least 0 within a total"),
    ],
)
def test_misuse_is_refused(wrong, expected):
    arguments = {"index": 0, "num_batches": 2} | wrong
    with (
        pytest.raises(ValueError, match=rf"accumulate\(.*expected {expected}.*, got .*; "),
        accumulate(network(), **arguments),
    ):
        pass
