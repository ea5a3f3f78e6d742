"""RMSProp with epsilon inside the root: by hand in float64, in closed form, and beside torch's."""

import math

import pytest
import torch
from torch import nn

from normlab.lab.models import build_model
from normlab.method import Setting
from normlab.optim.rmsprop_inside_root import METHOD, RMSPropInsideRoot
from normlab.testing import METHOD_CHECKS, MethodCase

SHAPES = ((4, 3), (5,), (), (2, 3, 3, 3))


def weights():
    generator = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        for shape in SHAPES
    ]


def gradients(step):
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def run(optimizer, parameters, steps=4):
    for step in range(steps):
        for parameter, gradient in zip(parameters, gradients(step), strict=True):
            parameter.grad = gradient
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("eps", [1.0, 1e-3])
def test_four_steps_with_a_rate_that_changes(momentum, decay, eps):
    rates = (0.05, 0.05, 0.01, 0.03)
    parameters = weights()
    optimizer = RMSPropInsideRoot(
        parameters, alpha=0.7, eps=eps, momentum=momentum, weight_decay=decay
    )
    for step, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        for parameter, gradient in zip(parameters, gradients(step), strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        for parameter, gradient in zip(parameters, gradients(step), strict=True):
            assert torch.equal(parameter.grad, gradient)
    for i, weight in enumerate(weights()):
        w = weight.detach()
        square, velocity = torch.ones_like(w), torch.zeros_like(w)
        for step, rate in enumerate(rates):
            g = gradients(step)[i] + decay * w
            square = 0.7 * square + 0.3 * g**2
            velocity = momentum * velocity + rate * g / (square + eps) ** 0.5
            w = w - velocity
        torch.testing.assert_close(parameters[i].detach(), w, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("gradient", [3.0, 0.1, -2.0])
def test_a_constant_gradient_has_the_closed_form(gradient):
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = RMSPropInsideRoot([weight], lr=0.1, momentum=0.0)
    position = 0.0
    for t in range(1, 8):
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
        mean_square = 0.9**t + (1 - 0.9**t) * gradient**2
        assert optimizer.state[weight]["square_avg"].item() == pytest.approx(mean_square, rel=1e-12)
        position -= 0.1 * gradient / math.sqrt(mean_square + 1)
        if t == 1:
            first = -0.1 * gradient / math.sqrt(0.9 + 0.1 * gradient**2 + 1)
            assert weight.item() == pytest.approx(first, rel=1e-12)
        assert weight.item() == pytest.approx(position, rel=1e-12)


def test_at_epsilon_one_torchs_is_another_optimiser():
    moved = []
    for kind in (RMSPropInsideRoot, torch.optim.RMSprop):
        weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = kind([weight], lr=0.045, alpha=0.9, eps=1.0, momentum=0.9)
        weight.grad = torch.full_like(weight, 2.0)
        optimizer.step()
        moved.append(-weight.item())
    inside, outside = moved
    assert inside == pytest.approx(0.045 * 2 / math.sqrt(0.9 + 0.1 * 4 + 1), rel=1e-12)
    assert outside == pytest.approx(0.045 * 2 / (math.sqrt(0.1 * 4) + 1), rel=1e-12)
    assert inside / outside == pytest.approx(1.0766, abs=1e-3)


def test_a_new_rate_leaves_the_velocity_of_before():
    moved = []
    for kind in (RMSPropInsideRoot, torch.optim.RMSprop):
        weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = kind([weight], lr=0.1, alpha=0.9, eps=1.0, momentum=0.5)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        before = weight.item()
        optimizer.param_groups[0]["lr"] = 0.0
        optimizer.step()
        moved.append((weight.item() - before) / before)
    assert moved == pytest.approx([0.5, 0.0], abs=1e-12)


def test_the_rate_of_the_paper_is_a_step_schedule():
    optimizer = RMSPropInsideRoot([nn.Parameter(torch.ones(1))])
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.94)
    for epoch in range(9):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.045 * 0.94 ** (epoch // 2))
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1.0},
        {"alpha": 1.0},
        {"alpha": -0.1},
        {"eps": 0.0},
        {"eps": math.nan},
        {"momentum": 1.0},
        {"weight_decay": -0.1},
    ],
    ids=str,
)
def test_wrong_options_are_refused(options):
    with pytest.raises(ValueError, match=r"RMSPropInsideRoot\(.*\): expected .*, got .*; "):
        RMSPropInsideRoot(weights(), **options)


def test_groups_parameters_without_gradient_and_mixed_dtypes():
    generator = torch.Generator().manual_seed(3)
    single = nn.Parameter(torch.randn(3, generator=generator))
    double, idle = nn.Parameter(single.detach().double()), nn.Parameter(torch.ones(2))
    optimizer = RMSPropInsideRoot(
        [{"params": [single, idle, double]}, {"params": [other := nn.Parameter(torch.zeros(1))]}]
    )
    optimizer.param_groups[1]["lr"] = 0.0
    single.grad, double.grad = torch.ones(3), torch.ones(3).double()
    other.grad = torch.ones(1)
    before = single.detach().clone()
    loss = optimizer.step(lambda: 7)
    assert loss == 7
    assert not torch.equal(single, before)
    torch.testing.assert_close(single.double(), double)
    assert idle.tolist() == [1, 1]
    assert idle not in optimizer.state
    assert other.item() == 0.0
    single.grad = torch.ones(3).to_sparse()
    with pytest.raises(ValueError, match="dense real gradients"):
        optimizer.step()


def test_resuming_is_equal_to_the_bit(tmp_path):
    parameters = weights()
    optimizer = RMSPropInsideRoot(parameters)
    run(optimizer, parameters, 2)
    torch.save((parameters, optimizer.state_dict()), tmp_path / "state.pt")
    expected = run(optimizer, parameters)
    loaded, state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = RMSPropInsideRoot(loaded)
    resumed.load_state_dict(state)
    for one, other in zip(expected, run(resumed, loaded), strict=True):
        assert torch.equal(one, other)


def test_the_method_takes_rate_and_decay_and_clips_the_whole_gradient():
    model = nn.Linear(3, 2)
    groups = [{"params": list(model.parameters()), "lr": 0.5, "weight_decay": 1e-4}]
    setting = Setting(batches=())
    method = METHOD.with_options(alpha="0.8", eps="0.5", momentum="0", max_norm="2")
    optimizer = method.optimizer(groups, None)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.5, 1e-4)
    assert (group["alpha"], group["eps"], group["momentum"]) == (0.8, 0.5, 0.0)
    method.attach(model, optimizer, setting)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 10.0)
    optimizer.step()
    norm = math.hypot(*(float(parameter.grad.norm()) for parameter in model.parameters()))
    assert norm == pytest.approx(2.0, rel=1e-5)
    with pytest.raises(ValueError, match=r"rmsprop-inside-root\(max_norm=-1.0\): expected"):
        METHOD.with_options(max_norm="-1.0").attach(model, optimizer, setting)


MODELS = {
    "mlp": ({"depth": 4, "width": 16}, (1, 6, 6)),
    "plain-conv": ({"depth": 5, "width": 8}, (2, 8, 8)),
    "resnet": ({"depth": 8, "width": 8}, (2, 8, 8)),
    "resnet projection": ({"depth": 8, "width": 8, "shortcut": "projection"}, (2, 8, 8)),
    "resnet bottleneck": ({"depth": 11, "width": 8, "block": "bottleneck"}, (2, 8, 8)),
}


@pytest.mark.parametrize("model", MODELS)
def test_method_contract(model):
    options, shape = MODELS[model]
    inputs = torch.randn(12, *shape, generator=torch.Generator().manual_seed(0))
    make = lambda: build_model(model.split()[0], shape, 4, **options)  # noqa: E731
    case = MethodCase(METHOD, make, inputs, torch.arange(12) % 4, num_classes=4, lr=0.02)
    for check in METHOD_CHECKS:
        check(case)
