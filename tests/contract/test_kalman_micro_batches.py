"""Parts of a batch that do not see each other, as in the public code's simulation."""

import copy

import pytest
import torch
from torch import nn

from normlab.catalog import find_method
from normlab.method import Setting
from normlab.norms.batch_kalman_norm import BatchKalmanNorm
from normlab.norms.kalman_micro_batches import MicroBatches

X = torch.randn(8, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def prepared(options=""):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    ).double()
    said = []
    setting = Setting(batches=((X, torch.zeros(8)),), say=said.append)
    return find_method(f"batch-kalman-norm{options}").prepare(model, setting), said


def test_each_part_goes_by_itself_and_the_first_moves_the_statistics():
    split, said = prepared(":micro_batches=4")
    assert isinstance(split, MicroBatches)
    assert "gain 0.1" in said[0]  # parts of 2 samples, not batches of 8
    plain, _ = prepared(":gain=0.1")
    expected = torch.cat([copy.deepcopy(plain)(part) for part in X.split(2)])
    torch.testing.assert_close(split(X), expected)
    plain(X[:2])
    for (name, one), two in zip(split.model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(one, two, msg=name)
    gradients = []
    for model, batches in ((split, [X]), (prepared(":gain=0.1")[0], X.split(2))):
        for batch in batches:
            model(batch).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_evaluation_is_the_models():
    split, _ = prepared(":micro_batches=4")
    split(X)
    split.eval()
    assert torch.equal(split(X), split.model(X))
    assert torch.equal(split(X[:1]), split.model(X[:1]))


def test_refusals():
    split, _ = prepared(":micro_batches=4")
    with pytest.raises(ValueError, match=r"expected at least 4 samples, got 3"):
        split(X[:3])
    with pytest.raises(ValueError, match=r"num_parts=0\): expected at least 1"):
        MicroBatches(nn.ReLU(), 0, (BatchKalmanNorm,))
    with pytest.raises(ValueError, match=r"micro_batches=0\): expected at least 1"):
        prepared(":micro_batches=0")
