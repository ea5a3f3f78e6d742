"""Adaptive gradient clipping against the rule written entry by entry in float64."""

import pytest
import torch
from torch import nn

from normlab import AdaptiveClipping, clip_adaptively_
from normlab.method import Setting, Unsuitable
from normlab.optim.adaptive_clipping import METHOD, find_classifier
from normlab.optim.sam import SAM


def plain(weight, gradient, clipping, eps):
    """The sheet's rule, one unit after the other."""
    rows = [(weight, gradient)] if weight.dim() < 2 else list(zip(weight, gradient, strict=True))
    clipped = []
    for one, slope in rows:
        limit = clipping * max(one.norm().item(), eps)
        size = slope.norm().item()
        clipped.append(slope * limit / max(size, 1e-6) if size >= limit else slope)
    return clipped[0] if weight.dim() < 2 else torch.stack(clipped)


@pytest.mark.parametrize(
    "shape", [(), (1,), (5,), (4, 3), (4, 1, 1, 1), (3, 2, 3, 3), (1, 6, 1, 1)]
)
def test_equals_the_rule(shape):
    generator = torch.Generator().manual_seed(0)
    for size in (1e-5, 1e-2, 1.0):
        weight = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        weight.grad = size * torch.randn(shape, generator=generator, dtype=torch.float64)
        expected = plain(weight.detach(), weight.grad.clone(), 0.02, 1e-3)
        clip_adaptively_([weight])
        torch.testing.assert_close(weight.grad, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("weight", "gradient", "expected"),
    [
        ([[3.0, 4.0]], [[6.0, 8.0]], [[0.06, 0.08]]),
        ([[3.0, 4.0]], [[0.03, 0.04]], [[0.03, 0.04]]),
        ([[0.0, 0.0]], [[3.0, 4.0]], [[1.2e-5, 1.6e-5]]),
        ([[3.0, 4.0]], [[0.0, 0.0]], [[0.0, 0.0]]),
    ],
)
def test_the_sheets_numbers(weight, gradient, expected):
    parameter = nn.Parameter(torch.tensor(weight))
    parameter.grad = torch.tensor(gradient)
    clip_adaptively_([parameter], 0.02)
    torch.testing.assert_close(parameter.grad, torch.tensor(expected))


def test_tiny_gradients_are_divided_by_no_less_than_the_sheets_number():
    weight = nn.Parameter(torch.zeros(1, 2, dtype=torch.float64))
    weight.grad = torch.tensor([[3e-7, 4e-7]], dtype=torch.float64)
    clip_adaptively_([weight], 1e-4)  # to 1e-7, and 1e-7 / 1e-6 of it is left
    expected = torch.tensor([[3e-8, 4e-8]], dtype=torch.float64)
    torch.testing.assert_close(weight.grad, expected, rtol=1e-12, atol=0)


def test_units_are_apart_and_never_above_their_share():
    generator = torch.Generator().manual_seed(1)
    weight = nn.Parameter(torch.randn(6, 10, generator=generator))
    weight.grad = torch.randn(6, 10, generator=generator)
    weight.grad[2] *= 1e-4
    kept = weight.grad[2].clone()
    clip_adaptively_([weight], 0.05)
    share = weight.grad.norm(dim=1) / weight.detach().norm(dim=1)
    assert torch.equal(weight.grad[2], kept)
    assert (share <= 0.05 * (1 + 1e-6)).all()
    assert (share[[0, 1, 3, 4, 5]] > 0.0499).all()


def test_half_precision_does_not_overflow():
    weight = nn.Parameter(torch.full((1, 4), 2.0, dtype=torch.float16))
    weight.grad = torch.full((1, 4), 6e4, dtype=torch.float16)
    clip_adaptively_([weight], 0.5)
    torch.testing.assert_close(weight.grad, torch.full((1, 4), 1.0, dtype=torch.float16))


def test_the_optimizer_steps_with_clipped_gradients_and_spares_the_excluded():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    frozen, spared = model[0].bias.requires_grad_(False), model[2]
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    clipping = AdaptiveClipping(optimizer, exclude=[spared])
    (1e3 * model(torch.ones(5, 4)).sum()).backward()
    plainly = [p.grad.clone() for p in spared.parameters()]
    expected = plain(before[0].double(), model[0].weight.grad.double(), 0.02, 1e-3)
    optimizer.step()
    torch.testing.assert_close(before[0] - model[0].weight, expected.float())
    assert torch.equal(frozen, before[1])
    for parameter, old, slope in zip(spared.parameters(), before[2:], plainly, strict=True):
        torch.testing.assert_close(old - parameter, slope)

    clipping.remove()
    model[0].weight.grad.fill_(1.0)
    old = model[0].weight.detach().clone()
    optimizer.step()
    torch.testing.assert_close(old - model[0].weight, torch.ones_like(old))


def one_unit():
    """The sheet's unit, of length 5, and a function that leaves it a gradient of length 10."""
    weight = nn.Parameter(torch.tensor([[3.0, 4.0]]))

    def backward(gradient=(6.0, 8.0)):
        weight.grad = None
        loss = (weight * torch.tensor([gradient])).sum()
        loss.backward()
        return loss.detach()

    return weight, backward


@pytest.mark.parametrize("named", [False, True])
def test_what_a_closure_leaves_is_clipped(named):
    weight, backward = one_unit()
    optimizer = torch.optim.SGD([weight], lr=1.0)
    clipping = AdaptiveClipping(optimizer)
    for _ in range(2):  # the second time the gradients of the first are still there
        before = weight.detach().clone()
        loss = optimizer.step(closure=backward) if named else optimizer.step(backward)
        assert loss == (before * torch.tensor([[6.0, 8.0]])).sum()
        share = 0.02 * before.norm() / 10
        torch.testing.assert_close(before - weight, share * torch.tensor([[6.0, 8.0]]))
    clipping.remove()
    before = weight.detach().clone()
    optimizer.step(backward)
    torch.testing.assert_close(before - weight, torch.tensor([[6.0, 8.0]]))


def test_under_sam_the_gradient_of_the_second_pass_is_clipped_once():
    weight, backward = one_unit()
    optimizer = SAM(torch.optim.SGD([weight], lr=1.0), rho=5.0)
    AdaptiveClipping(optimizer)
    seen = []

    def closure():
        seen.append(weight.detach().clone())
        return backward((6.0, 8.0) if len(seen) == 1 else (0.0, 9.0))

    optimizer.step(closure)
    # The ascent went along the whole of the first gradient ...
    torch.testing.assert_close(seen[1], torch.tensor([[6.0, 8.0]]))
    # ... and the limit is that of the weights as they were, not of the perturbed ones.
    torch.testing.assert_close(weight.detach(), torch.tensor([[3.0, 3.9]]))


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("gradient", [(6.0, 8.0), (0.03, 0.04), (0.0, 0.0)])
def test_a_fused_optimiser_that_unscales_by_itself_is_clipped_alike(gradient, by_hand):
    weight, backward = one_unit()
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=True)
    AdaptiveClipping(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(1))
    backward(gradient)
    expected = weight.detach() - plain(weight.detach(), weight.grad.clone(), 0.02, 1e-3)
    weight.grad.mul_(1024)
    if by_hand:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    torch.testing.assert_close(weight.detach(), expected)


def test_the_method_spares_the_classifier():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    said = []
    setting = Setting(batches=((torch.ones(5, 4), torch.zeros(5)),), say=said.append)
    METHOD.attach(model, optimizer, setting)
    (1e3 * model(torch.randn(5, 4)).sum()).backward()
    before = [parameter.grad.clone() for parameter in model.parameters()]
    optimizer.step()
    same = [torch.equal(p.grad, old) for p, old in zip(model.parameters(), before, strict=True)]
    assert same == [False, False, True, True]
    assert said == ["gradients are clipped unit by unit, but those of 2"]


def test_the_classifier_is_the_last_layer_called():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.readout = nn.Linear(3, 2)
            self.first = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))

        def forward(self, x):
            return self.readout(self.first(x)).relu()

    model = Backwards()
    assert find_classifier(model, torch.zeros(1, 4)) is model.readout
    nn.utils.parametrizations.weight_norm(model.readout)
    assert find_classifier(model, torch.zeros(1, 4)) is model.readout


def test_a_single_module_may_be_left_out():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    AdaptiveClipping(optimizer, exclude=model[1])
    (1e3 * model(torch.ones(5, 4)).sum()).backward()
    before = [parameter.grad.clone() for parameter in model.parameters()]
    optimizer.step()
    same = [torch.equal(p.grad, old) for p, old in zip(model.parameters(), before, strict=True)]
    assert same == [False, False, True, True]


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1, 1, 4])).sum().backward()
    with pytest.raises(ValueError, match=r"got a sparse one of shape \(5, 3\); .* sparse=False"):
        clip_adaptively_(embedding.parameters())


def test_bad_input():
    with pytest.raises(ValueError, match=r"clip_adaptively_\(clipping=0\): expected .* above 0"):
        clip_adaptively_([], 0)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1.0)
    with pytest.raises(ValueError, match=r"eps=-1"):
        AdaptiveClipping(optimizer, eps=-1)
    with pytest.raises(ValueError, match=r"AdaptiveClipping\(exclude=\['1'\]\): expected modules"):
        AdaptiveClipping(optimizer, exclude=["1"])
    assert not optimizer._optimizer_step_pre_hooks
    setting = Setting(batches=((torch.ones(2, 2), torch.zeros(2)),))
    with pytest.raises(Unsuitable, match="weight layers"):
        METHOD.attach(nn.ReLU(), optimizer, setting)
