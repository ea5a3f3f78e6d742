"""The parametrisation of spectral normalisation: gradients, precisions, compilers, checkpoints."""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from normlab import (
    bidirectional_spectral_norm,
    checkpoint_activations,
    frozen_power_iteration,
    spectral_norm,
)
from normlab.weights import spectral_norm_parametrization
from normlab.weights.spectral_norm import SpectralNorm


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("output_axis", [0, 1])
@pytest.mark.parametrize("sides", [1, 2])
def test_gradients_of_any_order_and_of_every_kind_agree(sides, output_axis):
    weight = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    part = SpectralNorm(weight, 1.3, sides=sides, output_axis=output_axis).eval()
    assert torch.autograd.gradcheck(part, weight)
    assert torch.autograd.gradgradcheck(part, weight)
    (found,) = torch.autograd.grad(part(weight).pow(3).sum(), weight)
    by_function = torch.func.grad(lambda w: part(w).pow(3).sum())(weight.detach())
    torch.testing.assert_close(by_function, found, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("normalise", [spectral_norm, bidirectional_spectral_norm])
def test_zero_weights_train(normalise, dtype):
    layer = nn.Linear(4, 3, bias=False, dtype=dtype)
    nn.init.zeros_(layer.weight)
    normalise(layer, scale=1.5)
    original = layer.parametrizations.weight.original
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    slope = torch.randn(3, 4).to(dtype)
    layer.weight.backward(slope)
    # A weight without direction is multiplied by the scale.
    torch.testing.assert_close(original.grad, 1.5 * slope)
    target = torch.randn(3, 4)
    target *= 1.5 / torch.linalg.matrix_norm(target, 2)

    def loss():
        return (layer.weight.float() - target).square().sum()

    start = loss().item()
    for _ in range(300):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.05 * start


def test_a_zero_weight_has_the_same_gradient_by_every_way():
    weight = torch.zeros(3, 4, requires_grad=True)
    part = SpectralNorm(weight, 2.0, sides=2).eval()
    slope = torch.randn(3, 4)
    (by_graph,) = torch.autograd.grad(part(weight), weight, slope, create_graph=True)
    by_function = torch.func.grad(lambda w: (part(w) * slope).sum())(weight.detach())
    torch.testing.assert_close(by_graph, 2.0 * slope)
    torch.testing.assert_close(by_function, 2.0 * slope)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_layer_can_be_made_half_precision(dtype):
    layer = nn.Conv2d(3, 8, 3)
    bidirectional_spectral_norm(layer)
    expected = layer.weight.detach()
    layer.to(dtype)
    for training in (True, False):
        weight = layer.train(training).weight
        assert weight.dtype == dtype
        torch.testing.assert_close(weight.float(), expected, rtol=0.05, atol=0.01)
    weight.float().square().sum().backward()
    assert torch.isfinite(layer.parametrizations.weight.original.grad).all()
    layer.double().train()
    assert layer.weight.dtype == torch.float64


@pytest.mark.parametrize("normalise", [spectral_norm, bidirectional_spectral_norm])
def test_a_weight_replaced_in_evaluation_does_not_explode(normalise):
    layer = nn.Conv2d(3, 8, 3).double().eval()
    normalise(layer)
    before = layer.weight.detach()
    original = layer.parametrizations.weight.original
    with torch.no_grad():
        original.neg_()
    torch.testing.assert_close(layer.weight, -before)
    (gradient,) = torch.autograd.grad(layer.weight.pow(3).sum(), original)
    part = layer.parametrizations.weight[0]
    by_function = torch.func.grad(lambda w: part(w).pow(3).sum())(original.detach())
    torch.testing.assert_close(gradient, by_function)
    assert torch.autograd.gradcheck(part, original)


def test_sides_of_opposite_signs_do_not_cancel():
    """Vectors that keep still, of which one side's product with the new weight is negative."""
    part = SpectralNorm(torch.eye(2), sides=2).eval()
    for name, value in (("left1", [-1.0, 0.0]), ("right1", [1.0, 0.0])):
        getattr(part, name).copy_(torch.tensor(value))
    for name in ("left0", "right0"):
        getattr(part, name).copy_(torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(part(torch.eye(2)), torch.eye(2))
    torch.testing.assert_close(part(2 * torch.eye(2)), torch.eye(2))


def test_a_new_weight_can_be_written():
    layer = nn.Linear(4, 3)
    spectral_norm(layer)
    new = torch.randn(3, 4)
    layer.weight = new
    assert torch.equal(layer.parametrizations.weight.original, new)


@pytest.mark.parametrize("frozen", [False, True])
def test_recomputed_activations_repeat_the_first_forward(frozen):
    def model():
        torch.manual_seed(1)
        layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
        spectral_norm(layers)
        for layer in layers:
            with torch.no_grad():
                layer.parametrizations.weight.original.normal_()
        return layers

    plain, recomputed = model(), checkpoint_activations(model(), 2)
    x = torch.randn(3, 4)
    for one in (plain, recomputed):
        with frozen_power_iteration(one) if frozen else contextlib.nullcontext():
            output = one(x)
        output.square().sum().backward()
    for one, other in zip(plain.parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    for one, other in zip(plain.buffers(), recomputed.buffers(), strict=True):
        assert torch.equal(one, other)


def test_two_forwards_before_one_backward():
    layer = nn.Linear(4, 3)
    spectral_norm(layer)
    (layer(torch.ones(2, 4)).sum() - layer(torch.zeros(2, 4)).sum()).backward()
    assert layer.parametrizations.weight.original.grad is not None


def test_compiles_without_a_break_and_under_autocast():
    layer = nn.Linear(4, 3)
    bidirectional_spectral_norm(layer)
    x = torch.randn(2, 4)
    with frozen_power_iteration(layer):
        expected, weight = layer(x), layer.weight
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(layer.weight, weight)


def test_products_are_left_alone_by_autocast():
    """On GPUs it would take them in half precision, on the CPU it leaves them whatever one does."""
    seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), options=None):
            if function is torch.mv:
                seen.append(torch.is_autocast_enabled("cpu"))
            return function(*arguments, **options or {})

    layer = nn.Linear(4, 3)
    spectral_norm(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16), Watch():
        assert layer.weight.dtype == torch.float32
    assert seen == [False] * 3


def originals(model):
    return [layer.parametrizations.weight.original for layer in (model[0], model[2], model[4])]


@pytest.mark.slow
def test_the_compiled_gradients_are_those_of_eager_mode():
    """Small layers, whose vectors a compiler would rather compute anew in backward than keep."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.Flatten(), nn.Linear(16, 4), nn.Tanh(), nn.Linear(4, 8)
    )
    bidirectional_spectral_norm(model[0], scale=1.4)
    spectral_norm(model[1:])
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True)
    for step in range(3):
        x, slope = torch.randn(5, 3, 3, 3), torch.randn(5, 8)
        for one, other in zip(originals(model), originals(twin), strict=True):
            # Drawn anew, because the vectors hardly move once they have converged.
            with torch.no_grad():
                other.copy_(one.normal_())
            one.grad = other.grad = None
        for run in (model, compiled):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=step == 2):
                output = run(x).float()
                run(x)
            output.backward(slope)
        tolerance = 1e-2 if step == 2 else 1e-5
        for one, other in zip(originals(model), originals(twin), strict=True):
            assert (one.grad - other.grad).norm() < tolerance * one.grad.norm()
        for one, other in zip(model.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_compiled_vectors_that_move_before_backward():
    layer = nn.Linear(8, 4)
    spectral_norm(layer)
    twin = copy.deepcopy(layer)
    # The compiler's partition into forward and backward, without its kernels.
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager_decomp_partition")
    with torch.no_grad():
        original = layer.parametrizations.weight.original.normal_()
        twin.parametrizations.weight.original.copy_(original)
    x, slope = torch.randn(5, 8), torch.randn(5, 4)
    for run, of in ((layer, layer), (compiled, twin)):
        with frozen_power_iteration(of):
            output = run(x)
        run(x)
        output.backward(slope)
    torch.testing.assert_close(twin.parametrizations.weight.original.grad, original.grad)


def test_an_evaluating_graph_has_operators_of_torch_only():
    layer = nn.Linear(4, 3)
    spectral_norm(layer)
    exported = torch.export.export(layer.eval(), (torch.ones(2, 4),)).graph_module
    # Without autocast and without gradients mean graphs of their own.
    graphs = [part.graph for part in exported.modules() if isinstance(part, torch.fx.GraphModule)]
    targets = [str(node.target) for graph in graphs for node in graph.nodes]
    assert any("dot" in target or "mv" in target for target in targets)
    assert not any("normlab" in target for target in targets)


@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize("zero", [False, True])
def test_scalars_that_stay_on_a_device_give_the_same(sides, zero, monkeypatch):
    torch.manual_seed(0)
    weight = torch.randn(4, 3, 2, 2, dtype=torch.float64) * (not zero)
    weight.requires_grad_()
    slope = torch.randn_like(weight)
    part = SpectralNorm(weight, scale=1.3, sides=sides)
    other = copy.deepcopy(part)
    results = []
    for one in (part, other):
        output = one(weight)
        results.append((output, *torch.autograd.grad(output, weight, slope), *one.buffers()))
        # As on an accelerator, which nobody waits for.
        monkeypatch.setattr(spectral_norm_parametrization, "_on_host", lambda scalar: scalar)
    for number, device in zip(*results, strict=True):
        torch.testing.assert_close(number, device, rtol=1e-12, atol=1e-12)


def test_a_side_of_singular_value_zero_pulls_at_nothing():
    weight = torch.eye(2, dtype=torch.float64).unsqueeze(2).requires_grad_()
    part = SpectralNorm(weight, sides=2).eval()
    for name, place in (("left0", 0), ("right0", 1), ("left1", 0), ("right1", 0)):
        getattr(part, name).copy_(torch.eye(2)[place])
    slope = torch.tensor([[3.0, 5.0], [7.0, 11.0]], dtype=torch.float64).unsqueeze(2)
    (gradient,) = torch.autograd.grad(part(weight), weight, slope)
    # The singular values are 0 and w11: the output is 2 w / w11, which pulls at w11 alone.
    expected = 2 * slope
    expected[0, 0] -= 2 * (3.0 + 11.0)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("sides", [1, 2])
def test_a_singular_value_that_counts_as_one_has_no_derivative(sides):
    weight = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    part = SpectralNorm(weight, 1.3, sides=sides, eps=100.0).eval()
    slope = torch.randn_like(weight)
    (gradient,) = torch.autograd.grad(part(weight), weight, slope)
    torch.testing.assert_close(gradient, 1.3 * slope)


def test_vectors_of_a_graph_stay_when_the_next_forward_moves_them():
    part = SpectralNorm(torch.randn(3, 4))
    zeros = torch.zeros(3, 4, requires_grad=True)
    first = part(zeros)
    part(torch.randn(3, 4))
    first.sum().backward()
    assert torch.equal(zeros.grad, torch.ones(3, 4))


def test_shapes_can_be_asked_for_without_memory():
    layer = nn.Linear(3, 2)
    spectral_norm(layer)
    assert layer.to("meta")(torch.ones(5, 3, device="meta")).shape == (5, 2)
