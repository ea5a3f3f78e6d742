"""Instance normalisation as `prepare` sets it up: the plain equation, then the contract."""

import pytest
import torch
from torch import nn

from normlab.method import Setting, Unsuitable
from normlab.norms.instance_norm import METHOD, from_batch_norm
from normlab.testing import LAYER_CHECKS, LayerCase
from normlab.testing.layers import keeps_memory_format


def oracle(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The equation, one map at a time."""
    y = torch.empty_like(x)
    for n in range(x.shape[0]):
        for c in range(x.shape[1]):
            mean = x[n, c].sum() / x[n, c].numel()
            variance = ((x[n, c] - mean) ** 2).sum() / x[n, c].numel()
            standard = (x[n, c] - mean) / torch.sqrt(variance + layer.eps)
            y[n, c] = layer.weight[c] * standard + layer.bias[c]
    return y.detach()


CASES = {
    "1d": LayerCase(
        lambda: from_batch_norm(nn.BatchNorm1d(4, eps=1e-3)),
        [(5, 4, 6)],
        oracle,
        refuses_wrong_input=False,
    ),
    "2d": LayerCase(
        lambda: from_batch_norm(nn.BatchNorm2d(4)),
        [(5, 4, 3, 5)],
        oracle,
        refuses_wrong_input=False,
    ),
    "3d": LayerCase(
        lambda: from_batch_norm(nn.BatchNorm3d(4)),
        [(3, 4, 2, 3, 2)],
        oracle,
        refuses_wrong_input=False,
    ),
}
# torch's InstanceNorm returns its output in the contiguous layout, as the card says.
CHECKS = [check for check in LAYER_CHECKS if check is not keeps_memory_format]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check, case):
    check(case)


def setting(*shape, said=None):
    say = (lambda _: None) if said is None else said.append
    return Setting(batches=((torch.randn(shape), torch.zeros(4)),), say=say)


def test_prepare_keeps_scale_and_shift():
    said = []
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5, eps=1e-3), nn.Flatten(2))
    model.append(nn.BatchNorm1d(5))
    with torch.no_grad():
        model[1].weight.uniform_()
        model[1].bias.uniform_()
    weight, bias = model[1].weight.clone(), model[1].bias.clone()
    model = METHOD.prepare(model, setting(4, 3, 2, 2, said=said))
    assert type(model[1]) is nn.InstanceNorm2d
    assert type(model[3]) is nn.InstanceNorm1d
    assert torch.equal(model[1].weight, weight)
    assert torch.equal(model[1].bias, bias)
    assert model[1].eps == 1e-3
    assert not model[1].track_running_stats
    assert said == ["2 layers are InstanceNorm now"]


@pytest.mark.parametrize(
    ("model", "shape", "got"),
    [
        (nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)), (4, 3), r"got shape \(N, 5\)"),
        (nn.Sequential(nn.BatchNorm2d(5)), (4, 5, 1, 1), r"got shape \(N, 5, 1, 1\)"),
        (nn.Sequential(nn.Linear(3, 5)), (4, 3), "without any"),
    ],
)
def test_one_position_is_refused_and_nothing_changed(model, shape, got):
    kinds = [type(module) for module in model]
    with pytest.raises(Unsuitable, match=f"instance-norm.*{got}"):
        METHOD.prepare(model, setting(*shape))
    assert [type(module) for module in model] == kinds
