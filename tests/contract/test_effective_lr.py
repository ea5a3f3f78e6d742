"""Rates that move directions alike at different norms, by training in float64 side by side."""

import copy
import math

import pytest
import torch

from normlab.optim.effective_lr import LearningRateScaling, equilibrium_norm, equivalent_lr
from normlab.optim.weight_rescaling import WeightRescaler
from normlab.surgery.scale_free import find_scale_free_weights
from scale_free_training import OPTIMIZERS, Training


@pytest.mark.parametrize(("make", "normalised"), OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_rates_at_other_norms_are_equivalent(make, normalised):
    one, two = Training(), Training(scale=3.0)
    lr = equivalent_lr(0.05, 1.0, 3.0, normalised=normalised)
    assert lr == pytest.approx(0.05 * (3 if normalised else 9))
    expected = one.directions(make([one.weight], lr=0.05))
    torch.testing.assert_close(
        two.directions(make([two.weight], lr=lr)), expected, atol=1e-9, rtol=0
    )
    assert (expected[-1] - expected[0]).abs().max() > 1e-2


def test_scaling_the_rate_keeps_the_effective_rate():
    one, two = Training(units=1), Training(units=1)
    target = one.weight.norm().item()
    rescaling = torch.optim.SGD([one.weight], lr=0.3)
    weights = find_scale_free_weights(one.model, one.x).weights
    WeightRescaler(rescaling, weights, target_norm=target)
    scaling = torch.optim.SGD([two.weight], lr=0.3)
    LearningRateScaling(scaling, find_scale_free_weights(two.model, two.x).weights)
    torch.testing.assert_close(
        two.directions(scaling), one.directions(rescaling), atol=1e-10, rtol=0
    )
    assert scaling.param_groups[0]["lr"] == 0.3
    assert two.weight.norm() > 1.05 * target
    reference = scaling.state_dict()["param_groups"][0]["reference_square_norm"]
    assert reference == pytest.approx(target**2)


def test_equilibrium_of_growth_and_decay():
    lr, decay, gradient, square = 0.1, 1e-2, 0.7, 1.0
    for _ in range(100_000):  # a gradient of norm g / ||w||, orthogonal to w
        square = square * (1 - lr * decay) ** 2 + (lr * gradient) ** 2 / square
    norm = equilibrium_norm(lr, decay, gradient)
    assert math.sqrt(square) == pytest.approx(norm, rel=1e-3)
    assert equivalent_lr(lr, norm) == pytest.approx(math.sqrt(2 * lr * decay) / gradient)


def scaling(run, lr=0.3):
    optimizer = torch.optim.SGD([run.weight], lr=lr)
    return optimizer, find_scale_free_weights(run.model, run.x).weights


def test_a_step_that_raises_leaves_the_rate():
    run = Training(units=1)
    optimizer, weights = scaling(run)
    LearningRateScaling(optimizer, weights)
    run.directions(optimizer, 3)

    def failing():
        raise KeyError

    for _ in range(2):
        with pytest.raises(KeyError):
            optimizer.step(failing)
    assert optimizer.param_groups[0]["lr"] == 0.3


def test_it_may_be_built_after_the_checkpoint_is_loaded_but_not_twice():
    run = Training(units=1)
    optimizer, weights = scaling(run)
    LearningRateScaling(optimizer, weights)
    run.directions(optimizer, 3)
    with pytest.raises(ValueError, match="without a LearningRateScaling"):
        LearningRateScaling(optimizer, weights)
    resumed = copy.deepcopy(run)
    other, weights = scaling(resumed)
    other.load_state_dict(optimizer.state_dict())
    LearningRateScaling(other, weights)
    assert torch.equal(resumed.directions(other), run.directions(optimizer))


@pytest.mark.parametrize(
    "call",
    [
        lambda: equivalent_lr(0.1, 0.0),
        lambda: equivalent_lr(0.1, 1.0, -1.0),
        lambda: equilibrium_norm(0.1, 0.0, 1.0),
    ],
)
def test_wrong_norms_and_decays_are_refused(call):
    with pytest.raises(ValueError, match=r"\(.*\): expected a number above 0, got .*; give"):
        call()
