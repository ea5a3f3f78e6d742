"""Ghost batch normalisation against a plain loop over its ghosts, then the contract."""

import copy

import pytest
import torch
from torch import nn

from normlab.lab.models import build_model
from normlab.method import Setting, Unsuitable
from normlab.norms.ghost_batch_norm import (
    METHOD,
    GhostBatchNorm,
    from_batch_norm,
    ghost_batch_norm,
)
from normlab.testing import LAYER_CHECKS, METHOD_CHECKS, LayerCase, MethodCase


def ghosts_of(x: torch.Tensor, size: int) -> list[torch.Tensor]:
    """The ghosts in order, by the rule of the sheet."""
    ghosts = [x[start : start + size] for start in range(0, len(x), size)]
    if len(ghosts) > 1 and ghosts[-1][:, 0].numel() == 1:
        ghosts[-2:] = [torch.cat(ghosts[-2:])]
    return ghosts


def normalised(layer: nn.Module, x: torch.Tensor, mean=None, variance=None) -> torch.Tensor:
    """Equation of batch normalisation, one channel at a time."""
    y = torch.empty_like(x)
    for c in range(x.shape[1]):
        values = x[:, c]
        mu = values.sum() / values.numel() if mean is None else mean[c]
        v = ((values - mu) ** 2).sum() / values.numel() if variance is None else variance[c]
        weight, bias = (layer.weight[c], layer.bias[c]) if layer.affine else (1.0, 0.0)
        y[:, c] = weight * (values - mu) / torch.sqrt(v + layer.eps) + bias
    return y.detach()


def oracle(layer: GhostBatchNorm, x: torch.Tensor) -> torch.Tensor:
    if not layer.training:
        return normalised(layer, x, layer.running_mean, layer.running_var)
    return torch.cat([normalised(layer, ghost) for ghost in ghosts_of(x, layer.ghost_size)])


SHAPES = [(6, 4), (5, 4), (5, 4, 6), (6, 4, 3, 5), (5, 4, 2, 1, 2)]
PROMISES = {
    "oracle": oracle,
    "batch_statistics": METHOD.card.batch_statistics,
    "batch_of_one": METHOD.card.batch_of_one,
    "eval_differs": METHOD.card.eval_differs,
}
CASES = {
    "two": LayerCase(lambda: GhostBatchNorm(4, ghost_size=2), SHAPES, **PROMISES),
    "four, plain": LayerCase(
        lambda: GhostBatchNorm(4, eps=1e-2, momentum=None, affine=False, ghost_size=4),
        SHAPES[2:],
        **PROMISES,
    ),
    # More ghosts than are normalised one by one.
    "many": LayerCase(
        lambda: GhostBatchNorm(4, ghost_size=2), [(20, 4), (21, 4, 3), (22, 4, 2, 2)], **PROMISES
    ),
    "one ghost": LayerCase(lambda: GhostBatchNorm(4), SHAPES[:3], **PROMISES),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("check", LAYER_CHECKS, ids=lambda check: check.__name__)
def test_contract(check, case):
    check(case)


MODELS = {
    "mlp": ({"depth": 4, "width": 16}, (1, 6, 6)),
    "plain-conv": ({"depth": 4, "width": 8}, (2, 8, 8)),
    "resnet": ({"depth": 8, "width": 8}, (2, 8, 8)),
}


@pytest.mark.parametrize("ghost_size", [4, 32])
@pytest.mark.parametrize("model", MODELS)
def test_method_contract(model, ghost_size):
    options, shape = MODELS[model]
    case = MethodCase(
        method=METHOD.with_options(ghost_size=ghost_size),
        make_model=lambda: build_model(model, shape, 4, **options),
        inputs=torch.randn(12, *shape, generator=torch.Generator().manual_seed(0)),
        targets=torch.arange(12) % 4,
        num_classes=4,
        lr=0.02,
    )
    for check in METHOD_CHECKS:
        check(case)


def pair(momentum=0.1, **options):
    """A layer with ghosts and torch's, alike."""
    torch.manual_seed(0)
    theirs = nn.BatchNorm2d(3, momentum=momentum, **options).double()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.uniform_(-2, 2)
    return from_batch_norm(copy.deepcopy(theirs), 4), theirs


def batch(*shape):
    return torch.randn(shape, dtype=torch.float64) * 3 + 1


@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0, None])
# From nine ghosts on they are normalised in one call.
@pytest.mark.parametrize("size", [3, 4, 8, 11, 21, 40, 43])
def test_it_is_torchs_layer_on_one_ghost_after_the_other(momentum, size):
    ours, theirs = pair(momentum)
    for _ in range(3):
        x = batch(size, 3, 2, 5).requires_grad_()
        twin = x.detach().clone().requires_grad_()
        y = ours(x)
        expected = torch.cat([theirs(ghost) for ghost in ghosts_of(twin, 4)])
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        dy = torch.randn_like(y)
        y.backward(dy)
        expected.backward(dy)
        torch.testing.assert_close(x.grad, twin.grad, rtol=1e-10, atol=1e-12)
    for (name, one), two in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-10, atol=1e-12, msg=name)
    for (name, one), two in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12, msg=name)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_one_ghost_is_batch_norm_to_the_bit():
    ours, theirs = pair()
    for size in (2, 4):
        x = batch(size, 3, 2, 5)
        assert torch.equal(ours(x), theirs(x))
    flat, torchs = GhostBatchNorm(3, ghost_size=4), nn.BatchNorm1d(3)
    x = torch.randn(5, 3)
    assert torch.equal(flat(x), torchs(x)), "a last ghost of one value joins the one before"
    assert torch.equal(flat.running_var, torchs.running_var)
    assert flat.num_batches_tracked.item() == 1


def test_the_order_of_the_ghosts_decides_the_running_mean():
    layer = GhostBatchNorm(1, momentum=0.5, ghost_size=2)
    layer(torch.tensor([0.0, 8.0, 16.0, 16.0]).reshape(4, 1))
    # Means 4 and 16, variances 32 and 0: half of the last, a quarter of the first and of the start.
    assert layer.running_mean.item() == 9.0
    assert layer.running_var.item() == 0.25 * 1 + 0.25 * 32 + 0.5 * 0


def test_samples_depend_on_their_own_ghost_only():
    x = batch(8, 3, 2, 2)
    changed = x.clone()
    changed[4:] = 7 * changed[4:] + batch(4, 3, 2, 2)
    y, other = ghost_batch_norm(x, 4), ghost_batch_norm(changed, 4)
    torch.testing.assert_close(y[:4], other[:4])
    assert (ghost_batch_norm(x, 8)[:4] - y[:4]).abs().max() > 0.1


@pytest.mark.parametrize("size", [4, 8, 11])
def test_channels_last_stays_through_forward_and_backward(size):
    ours, theirs = pair()
    x = batch(size, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
    y = ours(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, torch.cat([theirs(ghost) for ghost in x.detach().split(4)]))


def test_half_precision_takes_statistics_in_single():
    x = (100 + batch(8, 3, 40)).to(torch.bfloat16)
    expected = torch.cat([normalised(nn.BatchNorm1d(3, 1e-5, affine=False), g) for g in x.split(4)])
    y = ghost_batch_norm(x, 4)
    assert y.dtype == torch.bfloat16
    expected = ghost_batch_norm(x.double(), 4)
    torch.testing.assert_close(y.double(), expected, atol=2e-3, rtol=2**-7)
    layer = GhostBatchNorm(3, momentum=1.0, ghost_size=4)
    layer(x)
    torch.testing.assert_close(layer.running_mean.double(), x[4:].double().mean((0, 2)))


def test_without_running_statistics_evaluation_takes_the_whole_batch():
    ours, theirs = pair(track_running_stats=False)
    x = batch(8, 3, 2, 2)
    assert ours(x).isfinite().all()
    assert ours.running_mean is None
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GhostBatchNorm(3, ghost_size=0), r"ghost_size=0\): expected at least 1"),
        (lambda: GhostBatchNorm(3, momentum=-0.1), r"momentum=-0\.1\): expected a number from 0"),
        (lambda: ghost_batch_norm(torch.randn(4, 3), -2), r"ghost_size=-2\): expected at least 1"),
        (lambda: METHOD.prepare(nn.BatchNorm1d(2), SETTING, ghost_size=0), "expected at least 1"),
        (lambda: GhostBatchNorm(3, ghost_size=1)(torch.randn(4, 3)), r"in a ghost, got .*\(4, 3\)"),
        (lambda: ghost_batch_norm(torch.randn(4, 3, 1), 1), "more than one value per channel in a"),
        (lambda: GhostBatchNorm(3)(torch.randn(1, 3)), r"got shape \(1, 3\); train with larger"),
        (lambda: ghost_batch_norm(torch.randn(1, 3), 4), r"got shape \(1, 3\); train with larger"),
    ],
)
def test_ghosts_that_cannot_be(call, message):
    with pytest.raises(ValueError, match=message):
        call()


SETTING = Setting(batches=((torch.randn(4, 3), torch.zeros(4)),))


def test_ghosts_of_one_sample_are_its_maps():
    x = batch(5, 3, 4)
    torch.testing.assert_close(ghost_batch_norm(x, 1), nn.functional.instance_norm(x))


def test_from_batch_norm_keeps_everything():
    norm = nn.BatchNorm2d(3, eps=1e-3, momentum=None).requires_grad_(False).eval()
    norm.running_mean.fill_(0.3)
    layer = from_batch_norm(norm, 8)
    assert layer.weight is norm.weight
    assert layer.bias is norm.bias
    assert layer.running_var is norm.running_var
    assert layer.num_batches_tracked is norm.num_batches_tracked
    assert (layer.eps, layer.momentum, layer.ghost_size, layer.training) == (1e-3, None, 8, False)
    x = torch.randn(2, 3, 2, 2)
    assert torch.equal(layer(x), norm(x))
    assert list(layer.state_dict()) == list(norm.state_dict())
    assert "ghost_size=8" in repr(layer)
    bare = from_batch_norm(nn.BatchNorm1d(3, affine=False, track_running_stats=False))
    assert (bare.weight, bare.running_mean, bare.ghost_size) == (None, None, 32)


def test_the_method_replaces_layers_and_refuses_a_model_without():
    said = []
    setting = Setting(batches=SETTING.batches, say=said.append)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU())
    parameters = list(model.parameters())
    model = METHOD.with_options(ghost_size=16).prepare(model, setting)
    assert type(model[1]) is GhostBatchNorm
    assert model[1].ghost_size == 16
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert said == ["1 BatchNorm layers normalise ghosts of 16 samples now"]
    with pytest.raises(Unsuitable, match="ghost-batch-norm"):
        METHOD.prepare(nn.Sequential(nn.Linear(3, 5)), setting)
