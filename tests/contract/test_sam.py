"""SAM against its closed form in float64; what it and its kin must leave alone; the contract."""

import copy
import math

import pytest
import torch
from torch import nn

from normlab.optim.asam import ASAM
from normlab.optim.lookahead import Lookahead
from normlab.optim.sam import METHOD, SAM, attach
from normlab.testing import METHOD_CHECKS, MethodCase

kinds = pytest.mark.parametrize("kind", [SAM, ASAM])


class Quadratic:
    """The loss w A w / 2 of a weight that stands in two tensors."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
        self.matrix = root @ root.T / 6
        start = torch.randn(6, generator=generator, dtype=torch.float64)
        self.parts = [nn.Parameter(start[:2].clone()), nn.Parameter(start[2:].view(2, 2).clone())]

    def vector(self):
        return torch.cat([part.detach().flatten() for part in self.parts])

    def closure(self, optimizer):
        def compute():
            optimizer.zero_grad()
            w = torch.cat([part.flatten() for part in self.parts])
            loss = w @ self.matrix @ w / 2
            loss.backward()
            return loss

        return compute


def test_the_closed_form_on_a_quadratic():
    problem = Quadratic()
    lr, rho = 0.1, 0.3
    optimizer = SAM(torch.optim.SGD(problem.parts, lr=lr), rho)
    a, w = problem.matrix, problem.vector()
    identity = torch.eye(6, dtype=torch.float64)
    loss = optimizer.step(problem.closure(optimizer))
    expected = (identity - lr * a @ (identity + rho * a / (a @ w).norm())) @ w
    torch.testing.assert_close(problem.vector(), expected, rtol=1e-13, atol=1e-13)
    assert loss.item() == pytest.approx((w @ a @ w / 2).item(), rel=1e-13)


@kinds
def test_without_radius_it_is_the_base(kind):
    ends = []
    for wrap in (lambda base: base, lambda base: kind(base, rho=0.0)):
        problem = Quadratic()
        optimizer = wrap(torch.optim.Adam(problem.parts, lr=0.1))
        for _ in range(4):
            optimizer.step(problem.closure(optimizer))
        ends.append(problem.vector())
    assert torch.equal(*ends)


@kinds
def test_two_steps_by_hand_equal_the_closure(kind):
    ends = []
    for by_hand in (False, True):
        problem = Quadratic()
        optimizer = kind(torch.optim.SGD(problem.parts, lr=0.1, momentum=0.9))
        compute = problem.closure(optimizer)
        for _ in range(3):
            if by_hand:
                compute()
                optimizer.first_step()
                compute()
                optimizer.second_step()
            else:
                optimizer.step(compute)
        ends.append(problem.vector())
    assert torch.equal(*ends)


@kinds
def test_each_group_may_have_its_radius(kind):
    problem = Quadratic()
    groups = [{"params": [problem.parts[0]], "rho": 0.0}, {"params": [problem.parts[1]]}]
    optimizer = kind(torch.optim.SGD(groups, lr=0.1), rho=0.3)
    problem.closure(optimizer)()
    before = [part.detach().clone() for part in problem.parts]
    optimizer.first_step()
    assert torch.equal(problem.parts[0], before[0])
    assert not torch.equal(problem.parts[1], before[1])


def test_a_gradient_of_zero_moves_nothing():
    weight = nn.Parameter(torch.ones(3))
    optimizer = SAM(torch.optim.SGD([weight], lr=0.1))
    weight.grad = torch.zeros(3)
    optimizer.first_step()
    assert weight.tolist() == [1, 1, 1]


@kinds
def test_half_precision(kind):
    weight = nn.Parameter(torch.full((4,), 0.5, dtype=torch.bfloat16))
    optimizer = kind(torch.optim.SGD([weight], lr=0.1), rho=1.0)
    weight.grad = torch.full((4,), 1e-3, dtype=torch.bfloat16)
    optimizer.first_step()
    # Unit length over four entries; ASAM's is in units of about half.
    moved = 0.5 if kind is SAM else 0.5 * 0.51
    assert weight.float().tolist() == pytest.approx([0.5 + moved] * 4, rel=2e-2)


def test_a_length_is_not_rounded_to_half_precision():
    # In float16 the length 2 / (6e-8 x 100) is infinite.
    weight = nn.Parameter(torch.zeros(100, 100, dtype=torch.float16))
    weight.grad = torch.full_like(weight, 6e-8)
    optimizer = SAM(torch.optim.SGD([weight], lr=0.1), rho=2.0)
    optimizer.first_step()
    torch.testing.assert_close(weight.float(), torch.full((100, 100), 0.02), rtol=1e-2, atol=0)


def normalised(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


def closure_of(model, optimizer, x):
    def compute():
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    return compute


@kinds
def test_statistics_come_from_the_first_pass_only(kind):
    model = normalised()
    x = torch.randn(8, 3)
    optimizer = kind(torch.optim.SGD(model.parameters(), lr=0.1), rho=1.0, model=model)
    once = copy.deepcopy(model)
    once(x)
    optimizer.step(closure_of(model, optimizer, x))
    for one, other in zip(model.buffers(), once.buffers(), strict=True):
        assert torch.equal(one, other)
    assert model[1].num_batches_tracked == 1


def test_without_the_model_both_passes_count():
    model = normalised()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer.step(closure_of(model, optimizer, torch.randn(8, 3)))
    assert model[1].num_batches_tracked == 2


@kinds
def test_an_error_in_the_second_pass_puts_everything_back(kind):
    model = normalised()
    optimizer = kind(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    plain = closure_of(model, optimizer, torch.randn(8, 3))
    passes = []

    def failing():
        passes.append(1)
        if len(passes) == 2:
            raise KeyError("interrupted")
        return plain()

    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(KeyError, match="interrupted"):
        optimizer.step(failing)
    for one, other in zip(model.parameters(), before, strict=True):
        assert torch.equal(one, other)
    optimizer.step(plain)  # and it goes on


def test_hooks_run_once_where_the_gradients_are_applied():
    problem = Quadratic()
    optimizer = SAM(torch.optim.SGD(problem.parts, lr=0.1), rho=0.5)
    seen = []
    start = problem.vector()

    def note(*_):
        gradient = torch.cat([part.grad.flatten() for part in problem.parts])
        seen.append((problem.vector(), gradient))

    optimizer.register_step_pre_hook(note)
    optimizer.register_step_post_hook(note)
    optimizer.step(problem.closure(optimizer))
    assert len(seen) == 2
    assert torch.equal(seen[0][0], start)
    assert not torch.allclose(seen[0][1], problem.matrix @ start)
    assert torch.equal(seen[1][0], problem.vector())


def test_schedules_and_groups_are_shared():
    problem = Quadratic()
    base = torch.optim.SGD(problem.parts, lr=1.0)
    optimizer = SAM(base)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step(problem.closure(optimizer))
    schedule.step()
    assert base.param_groups[0]["lr"] == 0.5
    copied = copy.deepcopy(optimizer)
    assert copied.param_groups[0]["lr"] == 0.5
    assert copied.base is not base


@kinds
def test_misuse_is_refused(kind):
    problem = Quadratic()
    optimizer = kind(torch.optim.SGD(problem.parts, lr=0.1))
    with pytest.raises(ValueError, match=r"step\(closure=None\): expected a closure"):
        optimizer.step()
    with pytest.raises(ValueError, match="expected perturbed weights"):
        optimizer.second_step()
    problem.closure(optimizer)()
    optimizer.first_step()
    with pytest.raises(ValueError, match="expected unperturbed weights"):
        optimizer.first_step()
    for rho in (-1.0, math.inf, "x"):
        with pytest.raises(ValueError, match=rf"{kind.__name__}\(rho={rho!r}\): expected"):
            kind(torch.optim.SGD(problem.parts, lr=0.1), rho=rho)
        groups = [{"params": problem.parts, "rho": rho}]
        with pytest.raises(ValueError, match=rf"{kind.__name__}\(rho={rho!r}\): expected"):
            kind(torch.optim.SGD(groups, lr=0.1))
    with pytest.raises(ValueError, match="expected an optimiser to wrap, got 'list'"):
        kind(problem.parts)


@kinds
@pytest.mark.parametrize("inner", [SAM, ASAM, torch.optim.LBFGS])
def test_a_base_that_needs_a_closure_is_refused(kind, inner):
    problem = Quadratic()
    base = torch.optim.SGD(problem.parts, lr=0.1)
    base = inner(problem.parts) if inner is torch.optim.LBFGS else Lookahead(inner(base))
    with pytest.raises(ValueError, match=f"{kind.__name__}.*no closure, got {inner.__name__}; let"):
        kind(base)


def test_attach_finds_the_wrapper_and_refuses_others():
    model = normalised()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    inner = SAM(base)
    attach(model, Lookahead(inner), None)
    assert inner.model is model
    with pytest.raises(ValueError, match="expected SAM or a wrapper around it"):
        attach(model, base, None)


@kinds
def test_resuming_is_equal_to_the_bit(kind, tmp_path):
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))

    def start():
        model = normalised().train()
        base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        return model, kind(base, model=model)

    def train(model, optimizer):
        return [optimizer.step(closure_of(model, optimizer, x)).item() for _ in range(3)]

    model, optimizer = start()
    train(model, optimizer)
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "state.pt")
    expected = train(model, optimizer)
    resumed, theirs = start()
    states = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(states[0])
    theirs.load_state_dict(states[1])
    assert train(resumed, theirs) == expected
    assert all(map(torch.equal, model.state_dict().values(), resumed.state_dict().values()))


def network():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)
    )


@pytest.mark.parametrize("check", METHOD_CHECKS, ids=lambda check: check.__name__)
def test_contract(check):
    inputs = torch.randn(8, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    check(MethodCase(METHOD, network, inputs, torch.arange(8) % 3, num_classes=3))


def test_gradients_that_overflow_do_not_hide():
    weight = nn.Parameter(torch.ones(2))
    optimizer = SAM(torch.optim.SGD([weight], lr=0.1))

    def compute():
        optimizer.zero_grad()
        loss = (weight * math.inf).sum()
        loss.backward()
        return loss

    optimizer.step(compute)
    assert not torch.isfinite(weight).any()
