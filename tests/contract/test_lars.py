"""LARS against its formula by hand in float64, SGD, and the contract."""

import copy

import pytest
import torch
from torch import nn

from normlab.method import Setting
from normlab.optim import layer_adaptation
from normlab.optim.lars import LARS, METHOD
from normlab.optim.layer_adaptation import exclude_from_adaptation, excluded_parameters
from normlab.optim.tensor_lists import tensor_norms, total_norm
from normlab.testing import METHOD_CHECKS, MethodCase
from normlab.weights.weight_standardization import standardize_weights

SHAPES = ((4, 3), (5,), (2, 3, 3, 3))


def weights(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for shape in SHAPES
    ]


def gradients(step, scale=1.0):
    generator = torch.Generator().manual_seed(100 + step)
    return [scale * torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES]


def run(optimizer, parameters, steps=3, scale=1.0):
    for step in range(steps):
        for parameter, gradient in zip(parameters, gradients(step, scale), strict=True):
            parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def by_hand(lr, mu, decay, tau, paper_momentum, rates=None, steps=3):
    """The sheet's formula, one tensor and step at a time."""
    values = [weight.detach().clone() for weight in weights()]
    velocities = [torch.zeros_like(value) for value in values]
    for step in range(steps):
        eta = lr if rates is None else rates[step]
        for i, g in enumerate(gradients(step)):
            w = values[i]
            local = tau * w.norm() / (g.norm() + decay * w.norm())
            direction = local * (g + decay * w)
            if paper_momentum:
                velocities[i] = mu * velocities[i] + eta * direction
                values[i] = w - velocities[i]
            else:
                velocities[i] = mu * velocities[i] + direction
                values[i] = w - eta * velocities[i]
    return values


@pytest.mark.parametrize("paper_momentum", [False, True])
@pytest.mark.parametrize(("mu", "decay"), [(0.0, 0.0), (0.9, 0.0), (0.0, 0.01), (0.9, 0.01)])
def test_three_steps_with_a_changing_rate(mu, decay, paper_momentum):
    parameters = weights()
    options = {"trust_coefficient": 0.02, "paper_momentum": paper_momentum}
    optimizer = LARS(parameters, 3.0, mu, decay, **options)
    rates = [3.0, 1.0, 0.5]
    for step, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        for parameter, gradient in zip(parameters, gradients(step), strict=True):
            parameter.grad = gradient
        optimizer.step()
    expected = by_hand(3.0, mu, decay, 0.02, paper_momentum, rates)
    for actual, one in zip(parameters, expected, strict=True):
        torch.testing.assert_close(actual.detach(), one, rtol=1e-13, atol=1e-13)


def test_step_norm_is_a_share_of_the_weights_norm_whatever_the_gradient():
    before = [weight.detach().clone() for weight in weights()]
    ends = []
    for scale in (1.0, 10.0):
        parameters = weights()
        ends.append(run(LARS(parameters, 2.0, 0.0, 0.0), parameters, 1, scale))
    for start, one, other in zip(before, *ends, strict=True):
        assert (one - start).norm().item() == pytest.approx(2.0 * 1e-3 * start.norm().item())
        torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("mu", [0.0, 0.9])
@pytest.mark.parametrize("paper_momentum", [False, True])
def test_excluded_equals_sgd(mu, paper_momentum):
    parameters, others = weights(), weights()
    ours = run(
        LARS(parameters, 0.1, mu, 0.01, adapt=False, paper_momentum=paper_momentum), parameters
    )
    theirs = run(torch.optim.SGD(others, 0.1, mu, weight_decay=0.01), others)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-14)


def test_zero_weights_and_zero_gradients_take_the_plain_rate_and_decay():
    zero = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    still = nn.Parameter(torch.ones(3, dtype=torch.float64))
    zero.grad, still.grad = still.detach().clone(), zero.detach().clone()
    optimizer = LARS([zero, still], 0.5, 0.0, 0.1)
    optimizer.step()
    assert zero.tolist() == [-0.5] * 3
    assert still.tolist() == pytest.approx([0.95] * 3)


def test_parameters_without_gradient_stay():
    one, two = weights()[:2]
    optimizer = LARS([one, two], 1.0)
    before = two.detach().clone()
    one.grad = torch.ones_like(one)
    optimizer.step()
    assert torch.equal(two, before)
    assert two not in optimizer.state


def test_half_precision_is_measured_in_single():
    weight = nn.Parameter(torch.full((200,), 300.0, dtype=torch.float16))  # squares overflow
    weight.grad = torch.full((200,), 300.0, dtype=torch.float16)
    LARS([weight], 100.0, 0.0, 0.0).step()
    torch.testing.assert_close(weight.float(), torch.full((200,), 270.0))


def test_dtypes_of_one_group_are_treated_apart():
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.float64))]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    LARS(parameters, 100.0, 0.0, 0.0).step()
    assert [parameter.tolist() for parameter in parameters] == [
        pytest.approx([0.9, 0.9]),
        pytest.approx([0.9, 0.9]),
    ]


def test_many_tensors_are_treated_in_portions(monkeypatch):
    monkeypatch.setattr(layer_adaptation, "PORTION", 5)
    parameters = weights()
    actual = run(LARS(parameters, 3.0, 0.9, 0.01, trust_coefficient=0.02), parameters)
    for one, other in zip(actual, by_hand(3.0, 0.9, 0.01, 0.02, False), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


def test_norms():
    tensors = [torch.randn(3, 4), torch.randn(5).double(), torch.randn(7).half()]
    expected = torch.cat([one.double().flatten() for one in tensors]).norm()
    torch.testing.assert_close(total_norm(tensors), expected, rtol=1e-6, atol=0)
    assert tensor_norms(tensors[2:]).dtype == torch.float32


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.LayerNorm((4, 2, 2))
        self.gain = nn.Parameter(torch.ones(()))
        self.scale = nn.Parameter(torch.ones(4))
        self.fc = nn.Linear(4, 2)


def test_gains_of_standardised_weights_do_not_adapt():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Linear(1, 5))
    standardize_weights(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    excluded = [names[id(parameter)] for parameter in excluded_parameters(model)]
    assert excluded == ["0.bias", "0.parametrizations.weight.0.gain", "2.bias"]


def test_what_is_excluded():
    model = Mixed()
    excluded = {id(parameter) for parameter in excluded_parameters(model)}
    names = [name for name, p in model.named_parameters() if id(p) in excluded]
    assert names == ["gain", "scale", "conv.bias", "norm.weight", "norm.bias", "fc.bias"]
    model.fc.bias.requires_grad_(False)
    adapted, plain = exclude_from_adaptation(model, lr=2.0, weight_decay=0.1)
    assert [id(p) for p in adapted["params"]] == [id(model.conv.weight), id(model.fc.weight)]
    assert len(plain["params"]) == 5
    optimizer = LARS([adapted, plain], momentum=0.8)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
    assert [g["adapt"] for g in optimizer.param_groups] == [True, False]
    assert [g["lr"] for g in optimizer.param_groups] == [2.0, 2.0]


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1.0},
        {"momentum": 1.0},
        {"weight_decay": -0.1},
        {"trust_coefficient": 0.0},
        {"lr": "x"},
        {"lr": float("nan")},
        {"momentum": None},
    ],
    ids=str,
)
def test_wrong_options_are_refused(options):
    with pytest.raises(ValueError, match=r"LARS\(.*\): expected .*, got .*; "):
        LARS(weights(), **options)
    with pytest.raises(ValueError, match=r"LARS\(.*\): expected .*, got .*; "):
        LARS([{"params": weights(), **options}])


def test_sparse_gradients_are_refused():
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3).to_sparse()
    with pytest.raises(ValueError, match="expected dense real gradients"):
        LARS([weight]).step()


def test_closure_and_schedule():
    weight = nn.Parameter(torch.ones(3))
    optimizer = LARS([weight], 1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_resuming_is_equal_to_the_bit(tmp_path):
    parameters = weights()
    optimizer = LARS(parameters, 1.0)
    run(optimizer, parameters, 2)
    torch.save((parameters, optimizer.state_dict()), tmp_path / "state.pt")
    expected = run(optimizer, parameters)
    loaded, state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = LARS(loaded, 1.0)
    resumed.load_state_dict(state)
    for one, other in zip(expected, run(resumed, loaded), strict=True):
        assert torch.equal(one, other)
    copied = copy.deepcopy(optimizer)
    assert isinstance(copied, LARS)


def network():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)
    )


@pytest.mark.parametrize("check", METHOD_CHECKS, ids=lambda check: check.__name__)
def test_contract(check):
    inputs = torch.randn(8, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    check(MethodCase(METHOD, network, inputs, torch.arange(8) % 3, num_classes=3))


def test_the_method_says_how_large_the_steps_are():
    said, model = [], network()
    setting = Setting(batches=(), lr=0.5, say=said.append)
    groups = [{"params": list(model.parameters()), "lr": 0.5, "weight_decay": 1e-4}]
    groups = METHOD.parameter_groups(groups, model, setting)
    paper = METHOD.with_options(trust_coefficient=1e-3)
    for method in (METHOD, paper):
        method.attach(model, method.optimizer(groups, None), setting)
    assert said == [
        "at the rate 0.5 a gradient moves a weight by 0.05 of its norm",
        "at the rate 0.5 a gradient moves a weight by 0.0005 of its norm",
    ]
    assert [group["weight_decay"] for group in groups] == [1e-4, 0.0]


def test_the_method_at_a_rate_of_sgd_takes_the_papers_steps_at_a_hundred_times_that_rate():
    ends = []
    for lr, method in ((0.1, METHOD), (10.0, METHOD.with_options(trust_coefficient=1e-3))):
        parameters = weights()
        groups = [{"params": parameters, "lr": lr, "weight_decay": 5e-4}]
        ends.append(run(method.optimizer(groups, None), parameters))
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    bias = nn.Parameter(torch.zeros(2))
    bias.grad = torch.ones(2)
    METHOD.optimizer([{"params": [bias], "lr": 0.1, "weight_decay": 0.0}], None).step()
    assert bias.tolist() == pytest.approx([-0.1, -0.1])
