"""Every way to add closes a branch; what is added and not understood is refused."""

import pytest
import torch
from torch import nn

from normlab.method import Unsuitable
from normlab.surgery.branches import plan_branches
from residual_networks import Skip, mlp, rows


class Block(nn.Module):
    """A function of ``x``, of the modules that it is given, and of a matrix."""

    def __init__(self, function, *layers):
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)
        self.matrix, self.gain = nn.Parameter(torch.eye(3)), nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.function(self, x, *self.layers)


def block_between(function, *layers):
    """A block between a stem and another block that is found, so that something always is."""
    two = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    return nn.Sequential(nn.Linear(3, 3), Block(function, *layers), Skip(two), nn.Linear(3, 2))


JOINS = {
    "minus": lambda own, x, f: x - f(x),
    "in place": lambda own, x, f: f(x).sub_(x),
    "torch.sub": lambda own, x, f: torch.sub(x, f(x), alpha=0.5),
    "a scaled sum": lambda own, x, f: torch.addcmul(x, f(x), own.gain),
    "a sum scaled at each place": lambda own, x, f: torch.addcmul(x, f(x), own.matrix[:2]),
    "a sum scaled by a constant": lambda own, x, f: torch.addcmul(x, f(x), torch.ones(3)),
    "stacked": lambda own, x, f: torch.stack([x, f(x)]).sum(0),
    "by keyword": lambda own, x, f: x + f(input=x),
    "innermost by keyword": lambda own, x, f: x + f[2](input=f[0](input=x).relu()),
}


@pytest.mark.parametrize("join", JOINS)
def test_every_way_to_add(join):
    model = block_between(JOINS[join], mlp())
    plan = plan_branches(model, torch.ones(2, 3))
    assert rows(plan) == [
        ("1.layers.0", 2, ["1.layers.0.0", "1.layers.0.2"]),
        ("2.branch", 2, ["2.branch.0", "2.branch.2"]),
    ]
    assert list(plan.outside) == ["0"]
    assert not plan.beside


NOT_UNDERSTOOD = {
    "a matrix": (lambda own, x: x + x.relu() @ own.matrix, "which uses 1.matrix though"),
    "a turned matrix": (
        lambda own, x: x + nn.functional.linear(x, own.matrix.t() / own.matrix.std()),
        "which uses 1.matrix though",
    ),
    "another's weight behind a layer": (
        lambda own, x, f: x + nn.functional.linear(f(x), f.weight),
        r"ends in linear in 1, which uses 1\.layers\.0\.weight though its layer is not called; "
        "call the layer",
    ),
    "recurrence": (lambda own, x, f: x + f(x)[0], r"which uses 1\.layers\.0\.weight_ih_l0 though"),
    "a cell": (lambda own, x, f: x + f(x), r"which uses 1\.layers\.0\.weight_ih though"),
    "two matrices": (
        lambda own, x: x @ own.matrix + (x @ own.matrix).tanh(), "with a term made by matmul",
    ),
    "interpolation": (lambda own, x, f: torch.lerp(x, f(x), 0.5), "mixes both by lerp; add the"),
    "mean": (lambda own, x, f: torch.stack([x, f(x)]).mean(0), "mixes both by mean; add the"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_UNDERSTOOD)
def test_an_addition_that_is_not_understood_is_refused_beside_one_that_is(name):
    function, reason = NOT_UNDERSTOOD[name]
    layers = {"recurrence": [nn.LSTM(3, 3)], "a cell": [nn.GRUCell(3, 3)]}.get(name)
    model = block_between(function, *(layers or [nn.Linear(3, 3)] * ("matri" not in name)))
    with pytest.raises(Unsuitable, match=reason):
        plan_branches(model, torch.ones(2, 3))


def test_a_layers_own_further_matrices_are_seen():
    class LowRank(nn.Linear):
        def __init__(self):
            super().__init__(3, 3)
            self.down, self.up = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(2, 3))

        def forward(self, x):
            return super().forward(x) + x @ self.down @ self.up

    model = nn.Sequential(Skip(LowRank()), Skip(mlp()))
    with pytest.raises(Unsuitable, match=r"uses 0\.branch\.down though"):
        plan_branches(model, torch.ones(2, 3))


def test_any_factor_that_starts_at_zero_is_enough():
    gate = lambda own, x, one, two: x + one(x) * two(x).sigmoid()  # noqa: E731
    flipped = lambda own, x, one, two: x + two(x).sigmoid() * one(x)  # noqa: E731
    for function in (gate, flipped):
        model = block_between(function, nn.Linear(3, 3), nn.Linear(3, 3))
        branch = plan_branches(model, torch.ones(2, 3)).branches[0]
        assert branch.length == 2
        assert branch.last == (model[1].layers[0],)
    bounded = lambda own, x, one, two: x + one(x).sigmoid() * two(x).sigmoid()  # noqa: E731
    with pytest.raises(Unsuitable, match="which does not map zero to zero"):
        plan_branches(block_between(bounded, nn.Linear(3, 3), nn.Linear(3, 3)), torch.ones(2, 3))
    attend = nn.functional.scaled_dot_product_attention
    direct = lambda own, x, q, k, v: x + attend(q(x), k(x), v(x))  # noqa: E731
    model = block_between(direct, *(nn.Linear(3, 3) for _ in range(3)))
    assert plan_branches(model, torch.ones(2, 3)).branches[0].last == (model[1].layers[2],)
    positive = lambda own, x, q, k, v: x + attend(q(x), k(x), v(x).sigmoid())  # noqa: E731
    model = block_between(positive, *(nn.Linear(3, 3) for _ in range(3)))
    with pytest.raises(Unsuitable, match="which does not map zero to zero"):
        plan_branches(model, torch.ones(2, 3))
    spread = lambda own, x, f: x + f(x.mean(1, keepdim=True)).expand(2, 3)  # noqa: E731
    model = block_between(spread, nn.Linear(1, 3))
    assert plan_branches(model, torch.ones(2, 3)).branches[0].last == (model[1].layers[0],)


def test_a_vector_that_multiplies_a_weight_is_no_matrix():
    class Gained(nn.Linear):
        def __init__(self):
            super().__init__(3, 3)
            self.gain = nn.Parameter(torch.ones(3, 1))

        def forward(self, x):
            return nn.functional.linear(x, self.weight * self.gain, self.bias)

    plan = plan_branches(nn.Sequential(Skip(Gained()), nn.Linear(3, 2)), torch.ones(2, 3))
    assert rows(plan) == [("0.branch", 1, ["0.branch"])]
    assert not plan.unheld
