"""LAMB against its formula by hand in float64, AdamW, and the contract."""

import pytest
import torch
from torch import nn

from normlab.method import Setting
from normlab.optim.lamb import LAMB, METHOD
from normlab.testing import METHOD_CHECKS, MethodCase

SHAPES = ((4, 3), (5,), (2, 3, 3, 3))


def weights():
    generator = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        for shape in SHAPES
    ]


def gradients(step, scale=1.0):
    generator = torch.Generator().manual_seed(100 + step)
    return [scale * torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES]


def run(optimizer, parameters, steps=3, scale=1.0):
    for step in range(steps):
        for parameter, gradient in zip(parameters, gradients(step, scale), strict=True):
            parameter.grad = gradient
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


@pytest.mark.parametrize("clip", [None, 1.5])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_three_steps(decay, clip):
    lr, beta1, beta2, eps = 0.05, 0.8, 0.95, 1e-3
    parameters = weights()
    actual = run(
        LAMB(parameters, lr, (beta1, beta2), eps, decay, weight_norm_clip=clip), parameters
    )
    for i, weight in enumerate(weights()):
        w = weight.detach()
        m = v = torch.zeros_like(w)
        for step in range(3):
            g = gradients(step)[i]
            m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
            mhat, vhat = m / (1 - beta1 ** (step + 1)), v / (1 - beta2 ** (step + 1))
            u = mhat / (vhat.sqrt() + eps) + decay * w
            phi = w.norm() if clip is None else min(w.norm(), clip)
            w = w - lr * phi / u.norm() * u
        # The step counter's float32 leaves its trace in nothing but the corrections.
        torch.testing.assert_close(actual[i], w, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_without_ratio_it_is_adamw(decay):
    parameters, others = weights(), weights()
    ours = run(LAMB(parameters, 0.01, weight_decay=decay, adapt=False), parameters, 5)
    theirs = run(torch.optim.AdamW(others, 0.01, eps=1e-6, weight_decay=decay), others, 5)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_step_norm_is_a_share_of_the_weights_norm_whatever_the_gradient():
    before = [weight.detach().clone() for weight in weights()]
    ends = []
    for scale in (1.0, 10.0):
        parameters = weights()
        ends.append(run(LAMB(parameters, 0.02, eps=0.0, weight_decay=0.01), parameters, 1, scale))
    for start, one, other in zip(before, *ends, strict=True):
        assert (one - start).norm().item() == pytest.approx(0.02 * start.norm().item())
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


def test_zero_weights_take_adams_step():
    weight = nn.Parameter(torch.zeros(3))
    weight.grad = torch.ones(3)
    LAMB([weight], 0.1).step()
    assert weight.tolist() == pytest.approx([-0.1] * 3, rel=1e-5)


def test_a_late_parameter_is_corrected_by_its_own_count():
    parameters, alone = weights(), weights()
    optimizer = LAMB(parameters, 0.01)
    for step in range(3):
        for i, gradient in enumerate(gradients(step)):
            parameters[i].grad = None if i == 1 and step < 2 else gradient
        optimizer.step()
    single = LAMB([alone[1]], 0.01)
    alone[1].grad = gradients(2)[1]
    single.step()
    assert optimizer.state[parameters[1]]["step"].item() == 1
    torch.testing.assert_close(parameters[1], alone[1], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1.0},
        {"betas": (1.0, 0.9)},
        {"eps": -1.0},
        {"weight_decay": -0.1},
        {"weight_norm_clip": 0.0},
        {"betas": (0.9,)},
        {"betas": 0.9},
        {"eps": "x"},
    ],
    ids=str,
)
def test_wrong_options_are_refused(options):
    with pytest.raises(ValueError, match=r"LAMB\(.*\): expected .*, got .*; "):
        LAMB(weights(), **options)
    with pytest.raises(ValueError, match=r"LAMB\(.*\): expected .*, got .*; "):
        LAMB([{"params": weights(), **options}])


def test_resuming_is_equal_to_the_bit(tmp_path):
    parameters = weights()
    optimizer = LAMB(parameters)
    run(optimizer, parameters, 2)
    torch.save((parameters, optimizer.state_dict()), tmp_path / "state.pt")
    expected = run(optimizer, parameters)
    loaded, state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = LAMB(loaded)
    resumed.load_state_dict(state)
    for one, other in zip(expected, run(resumed, loaded), strict=True):
        assert torch.equal(one, other)


def network():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)
    )


@pytest.mark.parametrize("check", METHOD_CHECKS, ids=lambda check: check.__name__)
def test_contract(check):
    inputs = torch.randn(8, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    check(MethodCase(METHOD, network, inputs, torch.arange(8) % 3, num_classes=3, lr=0.02))


def test_the_method_takes_rate_and_decay_and_says_how_large_the_steps_are():
    said, model = [], network()
    setting = Setting(batches=(), lr=0.5, say=said.append)
    groups = [{"params": list(model.parameters()), "lr": 0.5, "weight_decay": 1e-4}]
    groups = METHOD.parameter_groups(groups, model, setting)
    method = METHOD.with_options(beta1="0.8", weight_norm_clip="10")
    optimizer = method.optimizer(groups, None)
    method.attach(model, optimizer, setting)
    assert said == ["each step moves a weight by 0.5 of its norm"]
    first, second = optimizer.param_groups
    assert (first["lr"], first["betas"], first["weight_norm_clip"]) == (0.5, (0.8, 0.999), 10)
    assert (first["weight_decay"], second["weight_decay"], second["adapt"]) == (1e-4, 0.0, False)
