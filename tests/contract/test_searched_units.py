"""Units that are searched for, against those that GradMax gives at once."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normlab.growth.at_zero import ClampReLU
from normlab.growth.directions import cross_term, observe
from normlab.growth.new_units import gradmax_units, norm_of_new, random_units
from normlab.growth.pairs import find_pairs
from normlab.growth.searched_units import firefly, gradmax_opt
from normlab.growth.widen import widen

NETWORKS = {
    "dense": (lambda: nn.Sequential(nn.Linear(5, 4), ClampReLU(), nn.Linear(4, 3)), (24, 5)),
    "conv": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3, 2), nn.ELU(), nn.Conv2d(3, 2, 2), nn.Flatten(),
                              nn.Linear(8, 3)),
        (12, 2, 7, 7),
    ),
    "flatten": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(9, 3)),
        (12, 2, 5),
    ),
}  # fmt: skip


def network(kind):
    torch.manual_seed(0)
    make, shape = NETWORKS[kind]
    model, x = make().double(), torch.randn(shape, dtype=torch.float64)
    return model, find_pairs(model, x, names=["0"]).pairs[0], x, torch.arange(len(x)) % 3


def after(model, pair, units, x, y):
    """Loss and gradient norm of the new weights in a copy that has the units."""
    model, pair = copy.deepcopy((model, pair))
    old = pair.width
    widen(model, {pair: units})
    loss = F.cross_entropy(model(x), y)
    first, second = torch.autograd.grad(loss, [pair.first.weight, pair.second.weight])
    columns = second.flatten(1).unflatten(1, (pair.width, -1))[:, old:]
    return loss.item(), (first[old:].norm().item(), columns.norm().item())


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_search_arrives_at_the_singular_vector(kind):
    model, pair, x, y = network(kind)
    before = copy.deepcopy(model.state_dict())
    generator = torch.Generator().manual_seed(1)
    found = gradmax_opt(model, pair, 1, x, y, generator=generator)
    best = gradmax_units(model, {pair: 1}, x, y)[pair]
    norms = [after(model, pair, units, x, y)[1][0] for units in (found, best)]
    assert norms[0] == pytest.approx(norms[1], rel=0.01)
    assert norms[0] <= norms[1] * (1 + 1e-12)
    assert not found.incoming.any()
    assert found.outgoing.norm().item() == pytest.approx(norm_of_new(pair))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_several_units_of_the_search_are_no_orthonormal_set():
    model, pair, x, y = network("dense")
    sigma = torch.linalg.svdvals(cross_term(pair, observe(model, [pair], x, y)[pair]))
    found = gradmax_opt(model, pair, 2, x, y, num_steps=300)
    norm = after(model, pair, found, x, y)[1][0] / norm_of_new(pair)
    assert sigma[:2].square().sum().sqrt() < norm <= 2**0.5 * sigma[0] * (1 + 1e-12)


@pytest.mark.parametrize("kind", NETWORKS)
def test_outgoing_zeros(kind):
    model, pair, x, y = network(kind)
    generator = torch.Generator().manual_seed(1)
    found = gradmax_opt(model, pair, 2, x, y, outgoing_zero=True, generator=generator)
    assert not found.outgoing.any()
    size = norm_of_new(pair, side="incoming")
    torch.testing.assert_close(
        found.incoming.flatten(1).norm(dim=1), torch.full((2,), size, dtype=torch.float64)
    )
    loss, (first, second) = after(model, pair, found, x, y)
    assert first == 0
    assert loss == pytest.approx(F.cross_entropy(model(x), y).item())
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        drawn = random_units({pair: 2}, outgoing_zero=True, generator=generator)[pair]
        assert after(model, pair, drawn, x, y)[1][1] < second * 1.05


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("outgoing_zero", [False, True])
def test_firefly_lowers_the_loss_within_its_norms(kind, outgoing_zero):
    model, pair, x, y = network(kind)
    options = {"outgoing_zero": outgoing_zero, "generator": torch.Generator().manual_seed(1)}
    found = firefly(model, pair, 2, x, y, **options)
    assert after(model, pair, found, x, y)[0] < F.cross_entropy(model(x), y).item() - 1e-3
    incoming = found.incoming.flatten(1).norm(dim=1)
    outgoing = found.outgoing.transpose(0, 1).flatten(1).norm(dim=1)
    limits = [norm_of_new(pair, side=side) for side in ("incoming", "outgoing")]
    assert incoming.max() <= limits[0] * (1 + 1e-9)
    assert outgoing.max() <= limits[1] * (1 + 1e-9)
    full = incoming / limits[0] if outgoing_zero else outgoing / limits[1]
    torch.testing.assert_close(full, torch.ones(2, dtype=torch.float64))


def test_batch_norm_needs_outgoing_zeros():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
    x, y = torch.randn(24, 5), torch.arange(24) % 3
    (pair,) = find_pairs(model, x).pairs
    for search in (gradmax_opt, firefly):
        with pytest.raises(ValueError, match="outgoing_zero=True"):
            search(model, pair, 1, x, y)
        statistics = model[1].running_mean.clone()
        assert search(model, pair, 1, x, y, outgoing_zero=True, num_steps=2).num_units == 1
        assert torch.equal(model[1].running_mean, statistics)
