"""Batch growth against large batches trained plainly, then the contract."""

import copy
import io
import math

import pytest
import torch
from torch import nn

from normlab.lab.models import build_model
from normlab.method import Setting
from normlab.optim.asam import ASAM
from normlab.optim.batch_growth import METHOD, BatchGrowth, grown_batch_size
from normlab.optim.lookahead import Lookahead
from normlab.optim.sam import SAM
from normlab.testing import METHOD_CHECKS, MethodCase

KEY = "batch_growth"


def example(make=torch.optim.SGD, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    return model, make(model.parameters(), lr=1.0, **options)


def batch(number):
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(number)).double()


def train(model, optimizer, rates, start=0, closure=False):
    for number, rate in enumerate(rates, start=start):
        for group in optimizer.param_groups:
            group["lr"] = rate

        def compute(number=number):
            optimizer.zero_grad()
            loss = model(batch(number)).square().mean()
            loss.backward()
            return loss

        if closure:
            assert optimizer.step(compute) > 0
        else:
            compute()
            optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def plainly(model, optimizer, plan):
    """Train by a list of ``(rate, batches)``."""
    number = 0
    for rate, size in plan:
        optimizer.param_groups[0]["lr"] = rate
        x = torch.cat([batch(number + i) for i in range(size)])
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        number += size
    return [p.detach() for p in model.parameters()]


def same(one, other):
    return all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def test_schedule_function():
    assert grown_batch_size(128, 1.0, 50_000) == (128, 1.0)
    assert grown_batch_size(100, 0.1, 10_000) == (1000, pytest.approx(1.0))
    # Beyond the cap the rate does the rest: noise ~ rate / batch falls as in the plain schedule.
    for factor in (1.0, 0.5, 0.04, 0.001):
        size, rate = grown_batch_size(128, factor, 50_000)
        assert size <= 5000
        assert rate / (size / 128) == pytest.approx(factor)
        assert rate <= 1 + 1e-9
    assert grown_batch_size(128, 0.0, 50_000) == (5000, 0.0)
    assert grown_batch_size(128, 0.1, 500) == (128, pytest.approx(0.1))
    for wrong in ({"rate_factor": 1.5}, {"rate_factor": 0.5, "max_share": 0.0}):
        with pytest.raises(ValueError, match=r"grown_batch_size\(.*expected .*, got .*; "):
            grown_batch_size(128, num_samples=500, **wrong)


OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.01}),
    "adam": (torch.optim.Adam, {}),
}


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize(("make", "options"), OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_constant_or_rising_rate_changes_nothing(make, options, closure):
    rates = [0.01, 0.02, 0.03, 0.03, 0.03]
    model, optimizer = example(make, **options)
    expected = train(model, optimizer, rates)
    model, optimizer = example(make, **options)
    assert same(train(model, BatchGrowth(optimizer, 8), rates, closure=closure), expected)


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize(("make", "options"), OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_lower_rates_become_larger_batches(make, options, closure):
    rates = [0.06] * 2 + [0.03] * 4 + [0.02] * 3 + [0.006] * 4
    plan = [(0.06, 1)] * 2 + [(0.06, 2)] * 2 + [(0.06, 3)] + [(0.024, 4)]  # the cap is 4
    model, optimizer = example(make, **options)
    expected = plainly(model, optimizer, plan)
    model, optimizer = example(make, **options)
    actual = train(model, BatchGrowth(optimizer, 4), rates, closure=closure)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)


def test_the_rates_of_a_falling_schedule_add_up():
    model, base = example()
    taken = []
    base.register_step_pre_hook(lambda *_: taken.append(base.param_groups[0]["lr"]))
    optimizer = BatchGrowth(base, 5)
    rates = [0.5 * (1 + math.cos(math.pi * step / 60)) for step in range(60)]
    train(model, optimizer, rates)
    left = sum(optimizer.param_groups[0][KEY]["rates"])
    assert sum(taken) + left == pytest.approx(sum(rates))
    assert len(taken) < 40
    assert max(taken) <= 1.3
    assert optimizer.param_groups[0]["lr"] == rates[-1]


def test_groups_keep_their_own_rates():
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(3)]
    groups = [{"params": weights[:1], "lr": 1.0}, {"params": weights[1:], "lr": 0.1}]
    optimizer = BatchGrowth(torch.optim.SGD(groups), 8)
    for factor in (1.0, 0.5, 0.5):
        optimizer.param_groups[0]["lr"] = factor
        optimizer.param_groups[1]["lr"] = 0.1 * factor
        for weight in weights[:2]:
            weight.grad = torch.ones(1)
        optimizer.step()
    assert [weight.item() for weight in weights] == pytest.approx([-2.0, -0.2, 0.0])


def test_a_parameter_without_gradient_in_some_batches():
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = BatchGrowth(torch.optim.Adam(weights, lr=1.0), 8)
    for number, rate in enumerate((1.0, 0.5, 0.5)):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        weights[0].grad = torch.ones(1)
        if number == 1:
            weights[1].grad = torch.ones(1)
        optimizer.step()
    assert weights[1].item() == pytest.approx(-1.0)
    assert weights[1].grad.item() == 0.5


def test_a_checkpoint_in_the_middle_of_a_step():
    rates = [0.06] * 2 + [0.02] * 6
    model, optimizer = example(**OPTIMIZERS["sgd"][1])
    growth = BatchGrowth(optimizer, 8)
    train(model, growth, rates[:4])
    assert growth.param_groups[0][KEY]["batches"] == 2
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": growth.state_dict()}, file)
    expected = train(model, growth, rates[4:], start=4)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model, optimizer = example(**OPTIMIZERS["sgd"][1])
    growth = BatchGrowth(optimizer, 8)
    model.load_state_dict(saved["model"])
    growth.load_state_dict(saved["optimizer"])
    assert same(train(model, growth, rates[4:], start=4), expected)


def test_a_schedule_of_torch_drives_it():
    model, optimizer = example()
    growth = BatchGrowth(optimizer, 8)
    schedule = torch.optim.lr_scheduler.StepLR(growth, 2, 0.5)
    taken = []
    growth.register_step_post_hook(lambda *_: taken.append(growth.param_groups[0]["lr"]))
    for number in range(6):
        growth.zero_grad()
        model(batch(number)).square().mean().backward()
        growth.step()
        schedule.step()
    # Four batches would make the third; only two have come.
    assert taken == [1.0, 1.0, 1.0]
    assert copy.deepcopy(growth).param_groups[0][KEY]["batches"] == 2


@pytest.mark.parametrize("cap", [0, 1.5, None, "2"])
def test_wrong_caps_are_refused(cap):
    with pytest.raises(ValueError, match=r"max_batches=.*expected .*, got .*; "):
        BatchGrowth(example()[1], cap)


def test_a_second_one_is_refused():
    with pytest.raises(ValueError, match="without a BatchGrowth, got BatchGrowth with one"):
        BatchGrowth(BatchGrowth(example()[1], 2))


def case(lr=0.02):
    return MethodCase(
        method=METHOD,
        make_model=lambda: build_model("resnet", (2, 8, 8), 4, depth=8, width=8),
        inputs=torch.randn(12, 2, 8, 8, generator=torch.Generator().manual_seed(0)),
        targets=torch.arange(12) % 4,
        num_classes=4,
        lr=lr,
    )


def test_contract():
    for check in METHOD_CHECKS:
        check(case())


def test_the_cap_is_a_share_of_the_epoch():
    said = []
    setting = Setting(batches=(), steps_per_epoch=37, say=said.append)
    model, _ = example()
    groups = METHOD.parameter_groups([{"params": list(model.parameters())}], model, setting)
    optimizer = METHOD.optimizer(groups, lambda groups: torch.optim.SGD(groups, lr=0.1))
    assert optimizer.param_groups[0]["max_batches"] == 3
    assert said == ["up to 3 batches make one step as the learning rate falls"]
    with pytest.raises(ValueError, match="max_share"):
        METHOD.with_options(max_share=2.0).parameter_groups([], model, setting)


@pytest.mark.parametrize("kind", [SAM, ASAM, torch.optim.LBFGS])
@pytest.mark.parametrize("between", [lambda base: base, Lookahead], ids=["bare", "wrapped"])
def test_what_needs_a_closure_cannot_grow(kind, between):
    model, base = example()
    needy = kind(model.parameters()) if kind is torch.optim.LBFGS else kind(base)
    with pytest.raises(
        ValueError, match=f"BatchGrowth.*needs no closure, got {kind.__name__}; let"
    ):
        BatchGrowth(between(needy), 2)
    with pytest.raises(ValueError, match="expected an optimiser to wrap, got 'list'"):
        BatchGrowth(list(model.parameters()), 2)


def test_sam_around_it_grows():
    model, base = example()
    train(model, SAM(BatchGrowth(base, 4)), [0.1, 0.05, 0.05], closure=True)
    assert base.param_groups[0][KEY]["batches"] == 0


def test_the_highest_rate_is_that_of_a_warm_up_too():
    model, optimizer = example()
    expected = plainly(model, optimizer, [(0.02, 1), (0.06, 1), (0.06, 2)])
    model, optimizer = example()
    actual = train(model, BatchGrowth(optimizer, 8), [0.02, 0.06, 0.03, 0.03])
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)


def test_a_refused_cap_leaves_the_optimiser_free():
    optimizer = example()[1]
    with pytest.raises(ValueError, match="max_batches='8'") as kept:
        BatchGrowth(optimizer, "8")
    assert BatchGrowth(optimizer, 8).param_groups[0][KEY]["batches"] == 0
    assert kept.type is ValueError


def test_it_may_be_built_after_the_checkpoint_is_loaded():
    rates = [0.06] * 2 + [0.02] * 6
    model, base = example(**OPTIMIZERS["sgd"][1])
    growth = BatchGrowth(base, 8)
    train(model, growth, rates[:4])
    saved = copy.deepcopy((model.state_dict(), growth.state_dict()))
    expected = train(model, growth, rates[4:], start=4)
    model, base = example(**OPTIMIZERS["sgd"][1])
    model.load_state_dict(saved[0])
    base.load_state_dict(saved[1])
    assert same(train(model, BatchGrowth(base, 8), rates[4:], start=4), expected)
    with pytest.raises(ValueError, match="without a BatchGrowth"):
        BatchGrowth(growth, 8)
