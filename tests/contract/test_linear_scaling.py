"""The scaling rules by their formulas, the warm-up step by step, then the contract."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR

from normlab.lab.models import build_model
from normlab.method import Setting
from normlab.optim.linear_scaling import METHOD, WarmUp, scaled_lr, warm_up
from normlab.testing import METHOD_CHECKS, MethodCase


def sgd(lr=1.0):
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)


def steps(optimizer, count, *schedules):
    """The rates at which steps are taken."""
    rates = []
    handle = optimizer.register_step_pre_hook(
        lambda *_: rates.append(optimizer.param_groups[0]["lr"])
    )
    for _ in range(count):
        optimizer.step()
        for schedule in schedules:
            schedule.step()
    handle.remove()
    return rates


def test_rules():
    assert scaled_lr(0.1, 512) == pytest.approx(0.2)
    assert scaled_lr(0.1, 64) == pytest.approx(0.025)
    assert scaled_lr(0.1, 64, reference=16, rule="sqrt") == pytest.approx(0.2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0},
        {"batch_size": "x"},
        {"batch_size": 1, "reference": 0},
        {"batch_size": 1, "rule": "x"},
    ],
)
def test_wrong_rules_are_refused(wrong):
    with pytest.raises(ValueError, match=r"scaled_lr\(.*\): expected .*, got .*; "):
        scaled_lr(0.1, **wrong)


def test_warm_up_is_linear_and_hands_over():
    optimizer = sgd(0.8)
    schedule = warm_up(optimizer, 4, 0.25)
    expected = [0.2, 0.35, 0.5, 0.65, 0.8, 0.8]
    assert steps(optimizer, 6, schedule) == pytest.approx(expected)
    optimizer = sgd(0.8)
    schedule = warm_up(optimizer, 4, 0.25, StepLR(optimizer, 2, 0.1))
    expected = [0.2, 0.35, 0.5, 0.65, 0.8, 0.8, 0.08, 0.08, 0.008]
    assert steps(optimizer, 9, schedule) == pytest.approx(expected)


def test_hooks_rise_around_any_schedule_and_restore():
    plain, warm = sgd(0.8), sgd(0.8)
    schedules = [CosineAnnealingLR(optimizer, 20) for optimizer in (plain, warm)]
    WarmUp(warm, 4, 0.25)
    base = steps(plain, 8, schedules[0])
    factors = [0.25, 0.4375, 0.625, 0.8125, 1, 1, 1, 1]
    expected = [rate * factor for rate, factor in zip(base, factors, strict=True)]
    assert steps(warm, 8, schedules[1]) == pytest.approx(expected)
    assert warm.param_groups[0]["lr"] == plain.param_groups[0]["lr"]


def test_the_count_is_saved_and_removed():
    optimizer = sgd()
    warm = WarmUp(optimizer, 10, 0.5)
    steps(optimizer, 4)
    other = sgd()
    resumed = WarmUp(other, 10, 0.5)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.factor == warm.factor == pytest.approx(0.7)
    plain = sgd()
    other.load_state_dict(plain.state_dict())  # a checkpoint without warm-up starts it
    assert steps(other, 1) == [0.5]
    warm.remove()
    assert "linear_scaling" not in optimizer.param_groups[0]
    assert steps(optimizer, 1) == [1.0]


@pytest.mark.parametrize(
    ("count", "start"), [(0, 0.5), (1.5, 0.5), ("x", 0.5), (2, 0.0), (2, 1.1), (2, "x")]
)
@pytest.mark.parametrize("make", [WarmUp, warm_up])
def test_wrong_rises_are_refused(make, count, start):
    with pytest.raises(ValueError, match=f"{make.__name__}.*expected .*, got .*; "):
        make(sgd(), count, start)


def test_a_second_one_is_refused():
    optimizer = sgd()
    WarmUp(optimizer, 2, 0.5)
    with pytest.raises(ValueError, match="without a WarmUp"):
        WarmUp(optimizer, 2, 0.5)


def failing(*_):
    raise torch.OutOfMemoryError


def fail(optimizer, where):
    """Take a step that raises in the closure, or after the rates were scaled."""
    handles = [optimizer.register_step_pre_hook(failing)] if where == "step" else []
    arguments = {"closure": ((failing,), {}), "keyword": ((), {"closure": failing})}
    args, kwargs = arguments.get(where, ((), {}))
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step(*args, **kwargs)
    for handle in handles:
        handle.remove()


places = pytest.mark.parametrize("where", ["closure", "keyword", "step"])


@places
def test_steps_that_raise_leave_the_rate_and_the_count(where):
    optimizer = sgd()
    warm = WarmUp(optimizer, 4, 0.2)
    for _ in range(2):
        fail(optimizer, where)
    assert warm.factor == pytest.approx(0.2)
    assert steps(optimizer, 2) == pytest.approx([0.2, 0.4])
    assert optimizer.param_groups[0]["lr"] == 1.0
    fail(optimizer, where)
    warm.remove()
    assert optimizer.param_groups[0]["lr"] == 1.0


@places
def test_a_schedule_goes_on_after_a_step_that_raised(where):
    optimizer = sgd()
    WarmUp(optimizer, 4, 0.2)
    fail(optimizer, where)
    optimizer.param_groups[0]["lr"] = 0.5
    assert steps(optimizer, 1) == pytest.approx([0.1])
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("where", ["closure", "keyword"])
def test_a_schedule_that_multiplies_sees_the_rate_between_steps(where):
    optimizer = sgd()
    schedule = CosineAnnealingLR(optimizer, 10)
    WarmUp(optimizer, 4, 0.2)
    fail(optimizer, where)
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * (1 + math.cos(math.pi / 10)))


def test_a_checkpoint_after_a_step_that_raised_has_the_rate():
    optimizer, other = sgd(), sgd()
    WarmUp(optimizer, 4, 0.2)
    fail(optimizer, "step")
    other.load_state_dict(optimizer.state_dict())
    WarmUp(other, 4, 0.2)
    assert steps(other, 1) == pytest.approx([0.2])
    assert other.param_groups[0]["lr"] == 1.0


@pytest.mark.parametrize("again", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_it_may_be_built_on_a_copy_or_after_the_checkpoint_is_loaded(again):
    optimizer = sgd()
    WarmUp(optimizer, 10, 0.5)
    steps(optimizer, 4)
    assert WarmUp(again(optimizer), 10, 0.5).factor == pytest.approx(0.7)
    other = sgd()
    other.load_state_dict(optimizer.state_dict())
    assert WarmUp(other, 10, 0.5).factor == pytest.approx(0.7)


def setting(said, batch=32):
    batches = ((torch.zeros(batch, 3), torch.zeros(batch)),)
    return Setting(batches=batches, lr=0.1, total_steps=50, steps_per_epoch=4, say=said.append)


def test_the_method_scales_every_group_and_warms_up():
    said = []
    model = nn.Linear(3, 1)
    groups = [{"params": [model.weight], "lr": 0.2}, {"params": [model.bias]}]
    method = METHOD.with_options(reference_batch_size=8, warmup_epochs=2.0)
    groups = method.parameter_groups(groups, model, setting(said))
    assert [group["lr"] for group in groups] == pytest.approx([0.8, 0.4])
    optimizer = torch.optim.SGD(groups)
    method.attach(model, optimizer, setting(said))
    rates = steps(optimizer, 9)
    assert rates[0] == pytest.approx(0.2)
    assert rates[4] == pytest.approx(0.5)
    assert rates[8] == pytest.approx(0.8)
    assert said == [
        "learning rates are multiplied by 4 for the size of the batch",
        "the rate rises over 8 of 50 steps",
    ]
    root = METHOD.with_options(reference_batch_size=8, rule="sqrt")
    (group,) = root.parameter_groups([{"params": [model.weight]}], model, setting([]))
    assert group["lr"] == pytest.approx(0.2)


def test_smaller_batches_scale_down_without_warm_up():
    said = []
    model = nn.Linear(3, 1)
    (group,) = METHOD.parameter_groups([{"params": [model.weight]}], model, setting(said))
    assert group["lr"] == pytest.approx(0.1 / 8)
    optimizer = torch.optim.SGD([group])
    METHOD.attach(model, optimizer, setting(said))
    assert not optimizer._optimizer_step_pre_hooks
    assert "no warm-up" in said[-1]
    with pytest.raises(ValueError, match="warmup_epochs"):
        METHOD.with_options(warmup_epochs=-1.0).attach(model, optimizer, setting(said))


@pytest.mark.parametrize("reference", [6, 256])
def test_contract(reference):
    case = MethodCase(
        method=METHOD.with_options(reference_batch_size=reference),
        make_model=lambda: build_model("resnet", (2, 8, 8), 4, depth=8, width=8),
        inputs=torch.randn(12, 2, 8, 8, generator=torch.Generator().manual_seed(0)),
        targets=torch.arange(12) % 4,
        num_classes=4,
        lr=0.02,
    )
    for check in METHOD_CHECKS:
        check(case)
