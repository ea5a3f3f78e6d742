"""Lookahead against its limits and the rule by hand around several optimisers; the contract."""

import copy

import pytest
import torch
from torch import nn

from normlab.optim.lookahead import METHOD, Lookahead
from normlab.optim.sam import SAM
from normlab.testing import METHOD_CHECKS, MethodCase

BASES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9),
}
bases = pytest.mark.parametrize("make", BASES.values(), ids=BASES)


def weights():
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 3), (5,))
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in shapes]


def run(optimizer, parameters, steps, first=0):
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(100 + step)
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.grad = parameter.detach() + noise
        optimizer.step()
    return [parameter.detach().clone() for parameter in parameters]


def equal(ones, others):
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


@bases
def test_the_whole_way_is_the_base(make):
    parameters, others = weights(), weights()
    ours = run(Lookahead(make(parameters), k=2, alpha=1.0), parameters, 5)
    assert equal(ours, run(make(others), others, 5))


def test_half_the_way_after_each_step_halves_it():
    parameters, others = weights(), weights()
    optimizer = Lookahead(torch.optim.SGD(parameters, lr=0.1), k=1, alpha=0.5)
    ours = run(optimizer, parameters, 4)
    theirs = run(torch.optim.SGD(others, lr=0.05), others, 4)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-14)


@bases
def test_the_rule_by_hand(make):
    parameters, others = weights(), weights()
    ours = run(Lookahead(make(parameters), k=3, alpha=0.3), parameters, 7)
    base = make(others)
    slow = [other.detach().clone() for other in others]
    for step in range(7):
        run(base, others, 1, first=step)
        if step % 3 == 2:
            for i, other in enumerate(others):
                slow[i] = slow[i] + 0.3 * (other.detach() - slow[i])
                other.data.copy_(slow[i])
    for one, other in zip(ours, others, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-13, atol=1e-13)


@bases
def test_resuming_is_equal_to_the_bit(make, tmp_path):
    parameters = weights()
    optimizer = Lookahead(make(parameters), k=3)
    run(optimizer, parameters, 4)
    torch.save((parameters, optimizer.state_dict()), tmp_path / "state.pt")
    expected = run(optimizer, parameters, 4)
    loaded, state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = Lookahead(make(loaded), k=7, alpha=0.1)  # the checkpoint's values win, as in torch
    resumed.load_state_dict(state)
    assert equal(expected, run(resumed, loaded, 4))


def test_a_copy_goes_on_alike():
    parameters = weights()
    optimizer = Lookahead(BASES["adam"](parameters), k=3)
    torch.optim.lr_scheduler.StepLR(optimizer, 100)  # puts a bound step on the object
    run(optimizer, parameters, 2)
    copied, theirs = copy.deepcopy((optimizer, parameters))
    assert equal(run(optimizer, parameters, 5), run(copied, theirs, 5))


def test_a_checkpoint_of_the_base_starts_the_count():
    parameters = weights()
    base = BASES["adam"](parameters)
    run(base, parameters, 4)
    resumed = Lookahead(BASES["adam"](parameters), k=2)
    resumed.load_state_dict(base.state_dict())
    run(resumed, parameters, 3)
    assert resumed.param_groups[0]["lookahead"] == {"step": 3, "k": 2, "alpha": 0.5}


def test_slow_weights_are_lent_and_returned():
    parameters = weights()
    start = [parameter.detach().clone() for parameter in parameters]
    optimizer = Lookahead(BASES["sgd"](parameters), k=4)
    with optimizer.slow_weights():
        assert equal(parameters, start)
    fast = run(optimizer, parameters, 3)
    with optimizer.slow_weights():
        assert equal(parameters, start)
    assert equal(parameters, fast)
    with pytest.raises(KeyError), optimizer.slow_weights():
        raise KeyError
    assert equal(parameters, fast)
    run(optimizer, parameters, 1, first=3)
    with optimizer.slow_weights():
        slow = [parameter.detach().clone() for parameter in parameters]
    assert equal(parameters, slow)
    assert not equal(parameters, start)


def test_a_parameter_that_begins_late():
    one, two = weights()
    optimizer = Lookahead(torch.optim.Adam([one, two], lr=0.1), k=4)
    start = two.detach().clone()
    run(optimizer, [one], 2)
    two.grad = None
    assert two not in optimizer.state
    run(optimizer, [one, two], 1, first=2)
    assert torch.equal(optimizer.state[two]["slow_weight"], start)
    moved = two.detach().clone()
    run(optimizer, [one], 1, first=3)  # two keeps its gradient and takes the step
    assert torch.equal(optimizer.state[two]["slow_weight"], two)
    assert not torch.equal(two, moved)


def test_schedules_hooks_and_groups_are_shared():
    one, two = weights()
    base = torch.optim.SGD([one], lr=1.0)
    optimizer = Lookahead(base, k=1)
    optimizer.add_param_group({"params": [two], "lr": 3.0})
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state is base.state
    assert optimizer.defaults is base.defaults
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(one.detach().clone()))
    optimizer.register_step_post_hook(lambda *_: seen.append(one.detach().clone()))
    optimizer.register_state_dict_post_hook(lambda _, state: state | {"mine": 1})
    before = one.detach().clone()
    run(optimizer, [one, two], 1)
    schedule.step()
    assert [group["lr"] for group in base.param_groups] == [0.5, 1.5]
    assert equal(seen, [before, one])  # the hook after the step sees what the step ends with
    assert optimizer.state_dict()["mine"] == base.state_dict()["mine"] == 1
    optimizer.zero_grad()
    assert one.grad is None


def test_around_sam():
    ends = []
    for wrapped in (False, True):
        parameters = weights()
        optimizer = SAM(torch.optim.SGD(parameters, lr=0.1), rho=0.1)
        optimizer = Lookahead(optimizer, k=2, alpha=0.25) if wrapped else optimizer

        def closure(parameters=parameters, optimizer=optimizer):
            optimizer.zero_grad()
            loss = sum(parameter.square().sum() for parameter in parameters)
            loss.backward()
            return loss

        slow = [parameter.detach().clone() for parameter in parameters]
        for step in range(4):
            optimizer.step(closure)
            if step % 2 and not wrapped:
                for one, parameter in zip(slow, parameters, strict=True):
                    parameter.data.copy_(one.lerp_(parameter.detach(), 0.25))
        ends.append([parameter.detach() for parameter in parameters])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    "options",
    [{"k": 0}, {"k": 1.5}, {"k": "x"}, {"alpha": 0.0}, {"alpha": 1.1}, {"alpha": "x"}],
    ids=str,
)
def test_wrong_options_are_refused(options):
    with pytest.raises(ValueError, match=r"Lookahead\(.*\): expected .*, got .*; "):
        Lookahead(torch.optim.SGD(weights(), lr=0.1), **options)


def test_a_second_lookahead_is_refused():
    first = Lookahead(torch.optim.SGD(weights(), lr=0.1))
    for optimizer in (first, first.base, copy.deepcopy(first)):
        with pytest.raises(ValueError, match="without a Lookahead"):
            Lookahead(optimizer)


def test_something_else_is_refused():
    with pytest.raises(ValueError, match=r"Lookahead\(.*expected an optimiser to wrap, got 'list'"):
        Lookahead(weights())


def test_it_may_be_built_after_the_checkpoint_is_loaded():
    parameters = weights()
    optimizer = Lookahead(BASES["sgd"](parameters), k=2)
    run(optimizer, parameters, 3)
    state = copy.deepcopy(optimizer.state_dict())
    others = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    expected = run(optimizer, parameters, 2, first=3)
    base = BASES["sgd"](others)
    base.load_state_dict(state)
    assert equal(run(Lookahead(base, k=2), others, 2, first=3), expected)


@pytest.mark.parametrize("check", METHOD_CHECKS, ids=lambda check: check.__name__)
def test_contract(check):
    inputs = torch.randn(8, 2, 5, 5, generator=torch.Generator().manual_seed(0))

    def network():
        return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 3))

    check(MethodCase(METHOD.with_options(k=2), network, inputs, torch.arange(8) % 3, num_classes=3))
