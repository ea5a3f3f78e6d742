"""A branch that a user names is taken only if it starts at zero and still learns."""

import pytest
import torch
from torch import nn

from normlab.surgery.branches import Branch, plan_branches
from residual_networks import Joined, Skip

X = torch.ones(2, 3)


def line(*activations):
    layers = []
    for activation in activations:
        layers += [nn.Linear(3, 3)] if activation is None else [nn.Linear(3, 3), activation]
    return nn.Sequential(*layers)


def two_blocks():
    return nn.Sequential(
        nn.Linear(3, 3), Skip(line(nn.ReLU(), None)), Skip(line(nn.ReLU(), None)), nn.Linear(3, 2)
    )


@pytest.mark.parametrize(
    ("branches", "reason"),
    [
        ([("b", ("1.branch.2", "1.branch.0"))], "expected an addition behind its last layer"),
        ([("b", ("1.branch.0", "3"))], "got 3 without any, such as a readout has none"),
        ([("b", ("1.branch.0", "2.branch.2"))], r"got 1\.branch\.0, which lies elsewhere"),
        ([("b", ("0",))], "got 0 of a branch in which a way without any weight layer"),
        ([("b", ())], "expected at least one weight layer, got none"),
        ([("b", ("1.branch.1",))], r"got 1\.branch\.1 \(ReLU\); name the others"),
        (
            [("b", ("1.branch.2",)), ("b", ("2.branch.2",))],
            "a name of its own for each branch, got 'b' twice",
        ),
        ([("a", ("1.branch.2",)), ("b", ("1.branch.2",))], "of the branch a; name the others"),
    ],
)
def test_names_are_checked_against_the_pass(branches, reason):
    model = two_blocks()
    with pytest.raises(ValueError, match=reason):
        plan_branches(model, X, branches=branches)


def test_a_dead_branch_is_refused_named_or_not():
    model = nn.Sequential(nn.Linear(3, 3), Skip(line(nn.ReLU(), nn.ReLU())), nn.Linear(3, 2))
    with pytest.raises(ValueError, match="lets no gradient pass at zero; let the branch end in a"):
        plan_branches(model, X)
    with pytest.raises(ValueError, match=r"got 1\.branch\.2 of a branch that ends in 1\.branch\.3"):
        plan_branches(model, X, branches=[("b", ("1.branch.0", "1.branch.2"))])


def test_both_layers_that_end_a_branch_must_be_last():
    sides = Joined(line(None, None), line(None, None))
    model = nn.Sequential(nn.Linear(3, 3), Skip(nn.Sequential(sides, nn.Tanh())), nn.Linear(3, 2))
    names = dict(model.named_modules())
    layers = [names[f"1.branch.0.{side}.{i}"] for i in (0, 1) for side in ("one", "two")]
    plan = plan_branches(model, X, branches=[])
    with pytest.raises(ValueError, match=r"with_branch\('b'\): expected"):
        plan.with_branch(Branch("b", layers[:3]))
    branch = Branch("b", layers, num_last=2)
    assert plan.with_branch(branch).branches == (branch,)


def test_any_factor_may_be_the_last_layer():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.one(x) * self.two(x).tanh()

    model = nn.Sequential(nn.Linear(3, 3), Skip(Gated()), nn.Linear(3, 2))
    for last in ("one", "two"):
        other = "two" if last == "one" else "one"
        named = [("b", (f"1.branch.{other}", f"1.branch.{last}"))]
        plan = plan_branches(model, X, branches=named)
        assert plan.branches[0].last == (getattr(model[1].branch, last),)


class Sides(nn.Module):
    def __init__(self, join):
        super().__init__()
        self.join, self.one, self.two = join, nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.join(self.one(x), self.two(x))


def test_last_layers_that_leave_something_over_are_refused():
    gate = Sides(lambda one, two: one.sigmoid() * two)
    beside = Sides(lambda one, two: torch.cat([one, two], 1)[:, ::2])
    for sides, first, last in ((gate, "two", "one"), (beside, "one", "two")):
        model = nn.Sequential(nn.Linear(3, 3), Skip(sides), nn.Linear(3, 2))
        named = [("b", (f"1.branch.{first}", f"1.branch.{last}"))]
        with pytest.raises(ValueError, match=f"and still learn, got 1.branch.{last} of a branch"):
            plan_branches(model, X, branches=named)


def test_corrections_are_checked_too():
    model = two_blocks()
    block = model[1].branch
    plan = plan_branches(model, X).without("1.branch")
    again = plan.with_branch(Branch("mine", (block[0], block[2])))
    assert [branch.name for branch in again.branches] == ["2.branch", "mine"]
    with pytest.raises(ValueError, match="expected an addition behind its last layer, got 1"):
        plan.with_branch(Branch("mine", (block[2], block[0])))
    with pytest.raises(ValueError, match="got 3 without any, such as a readout"):
        plan.with_branch(Branch("mine", (block[0], model[3])))
    with pytest.raises(ValueError, match="expected at least one weight layer, got none"):
        plan.with_branch(Branch("mine", ()))
    for number in (0, 3):
        with pytest.raises(ValueError, match=f"expected 1 to 2 last layers, got {number}"):
            Branch("mine", (block[0], block[2]), num_last=number)


def test_a_model_that_ends_in_a_named_branch_has_no_readout():
    model = Joined(line(None, None), line(None, None))
    plan = plan_branches(model, X, branches=[("b", ("two.0", "two.1"))])
    assert not plan.heads
    assert list(plan.outside) == ["one.0", "one.1"]


def test_layers_that_the_output_does_not_depend_on_are_no_branch():
    class Wasteful(Skip):
        def __init__(self):
            super().__init__(nn.Linear(3, 3))
            self.wasted = nn.Linear(3, 3)

        def forward(self, x):
            self.wasted(x)
            return super().forward(x)

    with pytest.raises(ValueError, match="got wasted, which no call was seen of"):
        plan_branches(Wasteful(), X, branches=[("b", ("wasted",))])
