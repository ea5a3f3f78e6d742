"""Filter response normalisation against its sheet's equations, then the contract."""

import math

import pytest
import torch
from torch import nn

from normlab.catalog import find_method
from normlab.method import Setting
from normlab.norms.filter_response_norm import (
    FRN,
    FilterResponseNorm,
    ThresholdedLinearUnit,
    filter_response_norm,
    ramp_up_factor,
)
from normlab.testing import LAYER_CHECKS, LayerCase


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def oracle(layer: FilterResponseNorm, x: torch.Tensor) -> torch.Tensor:
    """The paper's equation, one map at a time."""
    y = torch.empty_like(x)
    for n in range(x.shape[0]):
        for c in range(x.shape[1]):
            eps = layer.eps + (0 if layer.eps_l is None else abs(layer.eps_l[c].item()))
            nu2 = (x[n, c] ** 2).sum() / x[n, c].numel()
            y[n, c] = layer.weight[c] * x[n, c] / torch.sqrt(nu2 + eps) + layer.bias[c]
    return y.detach()


def oracle_with_unit(layer: FRN, x: torch.Tensor) -> torch.Tensor:
    """max(y, tau), as relu(y - tau) + tau."""
    tau = layer[1].threshold.reshape(-1, *[1] * (x.dim() - 2))
    y = oracle(layer[0], x)
    return ((y - tau).clamp(min=0) + tau).detach()


CASES = {
    "maps": LayerCase(
        make=lambda: FilterResponseNorm(4),
        shapes=[(5, 4, 6), (5, 4, 3, 5), (3, 4, 2, 3, 2)],
        oracle=oracle,
    ),
    "points": LayerCase(
        make=lambda: FilterResponseNorm(4, learn_eps="auto", spatial_dims=0),
        shapes=[(5, 4), (5, 4, 1, 1)],
        oracle=oracle,
    ),
    "with unit": LayerCase(
        make=lambda: FRN(4), shapes=[(5, 4, 6), (5, 4, 3, 5)], oracle=oracle_with_unit
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("check", LAYER_CHECKS, ids=lambda check: check.__name__)
def test_contract(check, case):
    check(case)


def test_the_sheets_example():
    x = torch.tensor([3.0, 4.0, 0.0, 0.0], dtype=torch.float64).reshape(1, 1, 4)
    y = filter_response_norm(x, torch.ones(1), torch.zeros(1), 1e-6)
    assert y.flatten().tolist() == pytest.approx([1.2, 1.6, 0, 0], abs=1e-6)
    assert y.flatten()[0].item() == pytest.approx(1.1999999, abs=5e-8)


def test_mean_square_of_the_output():
    x = torch.randn(3, 2, 7, dtype=torch.float64)
    y = filter_response_norm(x, torch.ones(2), torch.zeros(2), 1e-2)
    nu2 = x.square().mean(-1)
    torch.testing.assert_close(y.square().mean(-1), nu2 / (nu2 + 1e-2))


def test_scale_is_removed_and_offset_is_not():
    x = torch.randn(3, 2, 7, dtype=torch.float64)
    layer = FilterResponseNorm(2, eps=1e-30).double()
    torch.testing.assert_close(layer(5 * x), layer(x))
    assert (layer(x + 1) - layer(x)).abs().max() > 0.1


def test_zero_mean_maps_give_instance_norm():
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    x = x - x.mean((2, 3), keepdim=True)
    expected = nn.functional.instance_norm(x, eps=1e-6)
    torch.testing.assert_close(FilterResponseNorm(2, eps=1e-6).double()(x), expected)


def test_gradient_is_orthogonal_to_the_map():
    x = torch.randn(3, 2, 9, dtype=torch.float64, requires_grad=True)
    g = torch.randn(3, 2, 9, dtype=torch.float64)
    eps = 1e-3
    y = filter_response_norm(x, torch.ones(2).double(), torch.zeros(2).double(), eps)
    (grad,) = torch.autograd.grad(y, x, g)
    r2 = x.square().mean(-1) + eps
    expected = eps / r2 * (g * y).sum(-1)
    torch.testing.assert_close((x * grad).sum(-1), expected)


def test_gradient_of_the_learnt_epsilon():
    layer = FilterResponseNorm(2, learn_eps=True, eps_init=-0.2).double()
    x = torch.randn(4, 2, dtype=torch.float64)
    g = torch.randn(4, 2, dtype=torch.float64)
    layer(x).backward(g)
    r = torch.sqrt(x.square() + 1e-6 + 0.2)
    expected = 0.5 * (g * x / r**3).sum(0)  # -sign(eps_l) / 2, and eps_l is negative
    torch.testing.assert_close(layer.eps_l.grad, expected)
    assert (expected != 0).all()


def test_batch_independence_is_exact():
    x = torch.randn(6, 3, 5, 5)
    layer = FRN(3)
    assert torch.equal(layer(x)[2:3], layer(x[2:3]))
    assert torch.equal(layer.eval()(x), layer.train()(x))


def test_unit_limits():
    y = torch.randn(4, 3)
    unit = ThresholdedLinearUnit(3)
    assert torch.equal(unit(y), y.relu())
    with torch.no_grad():
        unit.threshold.fill_(-math.inf)
    assert torch.equal(unit(y), y)


def test_zero_map_gives_the_bias_and_a_finite_gradient():
    layer = FilterResponseNorm(1)
    with torch.no_grad():
        layer.bias.fill_(0.7)
    x = torch.zeros(1, 1, 4, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(layer(x), torch.full((1, 1, 4), 0.7))
    torch.testing.assert_close(x.grad, torch.full((1, 1, 4), 1e3))


@pytest.mark.parametrize("eps", [0.0, -1e-6, math.nan])
def test_eps_must_be_positive(eps):
    with pytest.raises(ValueError, match="expected a number above 0"):
        FilterResponseNorm(3, eps=eps)


def test_state_keys():
    assert set(FilterResponseNorm(3).state_dict()) == {"weight", "bias"}
    assert set(FilterResponseNorm(3, learn_eps=True).state_dict()) == {"weight", "bias", "eps_l"}


def test_ramp_up():
    cosine = [ramp_up_factor(step, 10, 110) for step in (0, 5, 10, 60, 110)]
    assert cosine == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert ramp_up_factor(3, 10, 110, ramp="linear") == pytest.approx(0.3)
    with pytest.raises(ValueError, match="warm_steps"):
        ramp_up_factor(0, 10, 10)


LAYERS = {
    "norm": lambda: FilterResponseNorm(4, learn_eps=True, eps_init=-0.1),
    "unit": lambda: ThresholdedLinearUnit(4),
    "both": lambda: FRN(4, learn_eps=True),
}
every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def perturbed(layer):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return layer


def plain(layer, x):
    """What the modules compute, in torch operations that torch differentiates by itself."""
    for part in layer if isinstance(layer, FRN) else [layer]:
        shape = (-1, *[1] * (x.dim() - 2))
        if isinstance(part, FilterResponseNorm):
            axes = tuple(range(2, x.dim()))
            nu2 = x.square().mean(axes, keepdim=True) if axes else x.square()
            eps = part.eps + (0 if part.eps_l is None else part.eps_l.abs().reshape(shape))
            x = part.weight.reshape(shape) * x / (nu2 + eps).sqrt() + part.bias.reshape(shape)
        else:
            x = torch.maximum(x, part.threshold.reshape(shape))
    return x


@every_layer
@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 7), (3, 4, 5, 6), (2, 4, 3, 2, 5)])
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "strided"])
def test_gradients_are_those_of_the_plain_equations(make, shape, layout):
    layer = perturbed(make().double())
    x, g = torch.randn(2, *shape, dtype=torch.float64)
    if layout == "channels last":
        x, g = (one.movedim(1, -1).contiguous().movedim(-1, 1) for one in (x, g))
    elif layout == "strided":
        # The gradient of a sum is one number seen everywhere: nothing may be written into it.
        x, g = torch.stack([x, x], -1)[..., 0], torch.tensor(1.5).double().expand(shape)
    x.requires_grad_()
    before = g.clone()
    inputs = [x, *layer.parameters()]
    y, expected_y = layer(x), plain(layer, x)
    torch.testing.assert_close(y, expected_y)
    actual = torch.autograd.grad(y, inputs, g, retain_graph=True)
    torch.testing.assert_close(actual, torch.autograd.grad(expected_y, inputs, g))
    torch.testing.assert_close(torch.autograd.grad(y, inputs, g), actual, rtol=0, atol=0)
    assert torch.equal(g, before)
    if layout == "channels last":
        assert y.stride() == actual[0].stride() == x.stride()


@every_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_backward_keeps_one_tensor(make, dtype, memory_format):
    x = torch.randn(2, 4, 32, 32, dtype=dtype).contiguous(memory_format=memory_format)
    x.requires_grad_()
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    layer = make()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    assert sum(kept.values()) <= 1.02 * x.nbytes


@every_layer
def test_derivatives_of_the_gradient(make):
    layer = perturbed(make().double())
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    values = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradgradcheck(run, (x, *values))

    def loss(x):
        return (layer(x) ** 3).sum()

    expected = torch.autograd.functional.hessian(lambda x: (plain(layer, x) ** 3).sum(), x)
    for vectorize in (False, True):
        actual = torch.autograd.functional.hessian(loss, x, vectorize=vectorize)
        torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.func.hessian(loss)(x), expected)


@every_layer
def test_many_gradients_at_once_and_forward_mode(make):
    layer = perturbed(make().double())
    x, g, tangent = torch.randn(3, 2, 4, 3, dtype=torch.float64)
    x.requires_grad_()
    several = torch.stack([g, 2 * g])
    (rows,) = torch.autograd.grad(layer(x), x, several, is_grads_batched=True)
    (row,) = torch.autograd.grad(layer(x), x, g)
    torch.testing.assert_close(rows, torch.stack([row, 2 * row]))
    # Parameters of each sample, as per-sample gradients take them.
    each = torch.func.vmap(torch.func.grad(lambda x: (layer(x[None]) ** 2).sum()))(x)
    (expected,) = torch.autograd.grad((layer(x) ** 2).sum(), x)
    torch.testing.assert_close(each, expected)
    with torch.autograd.forward_ad.dual_level():
        dual = layer(torch.autograd.forward_ad.make_dual(x.detach(), tangent))
        moved = torch.autograd.forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close((moved * g).sum(), (tangent * row).sum())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("make", [LAYERS["unit"], LAYERS["both"]], ids=["unit", "both"])
def test_a_tie_is_shared(make, memory_format):
    layer = make().double()
    x = torch.zeros(2, 4, 3, 3, dtype=torch.float64).contiguous(memory_format=memory_format)
    x.requires_grad_()
    g = torch.rand_like(x)
    inputs = [x, *layer.parameters()]
    actual = torch.autograd.grad(layer(x), inputs, g)
    torch.testing.assert_close(actual, torch.autograd.grad(plain(layer, x), inputs, g))
    torch.testing.assert_close(actual[-1], 0.5 * g.sum((0, 2, 3)))


@every_layer
def test_what_is_frozen_gets_no_gradient(make):
    layer = make()
    for frozen in layer.parameters():
        layer.requires_grad_(True)
        layer.zero_grad()
        frozen.requires_grad_(False)
        layer(torch.randn(2, 4, 3, requires_grad=True)).sum().backward()
        trained = [p for p in layer.parameters() if p is not frozen]
        assert frozen.grad is None
        assert all(p.grad is not None for p in trained)
    x = torch.randn(2, 4, 3, requires_grad=True)
    layer.requires_grad_(False)(x).sum().backward()
    assert x.grad is not None


@every_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_are_near_single(make, dtype):
    # Rounded beforehand, so that both precisions see the same threshold.
    layer = perturbed(make()).to(dtype)
    x = torch.randn(8, 4, 16, 16).to(dtype)
    g = torch.randn(8, 4, 16, 16).to(dtype)
    results = []
    for kind in (torch.float32, dtype):
        inputs = [x.to(kind).requires_grad_(), *layer.to(kind).parameters()]
        results.append(torch.autograd.grad(layer(inputs[0]), inputs, g.to(kind)))
        assert all(one.dtype == kind for one in results[-1])
    for single, half in zip(*results, strict=True):
        assert (half.float() - single).norm() < 0.02 * single.norm()


@every_layer
def test_a_compiled_layer_trains_alike(make):
    layer = perturbed(make().double())
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    expected = torch.autograd.grad(layer(x).square().sum(), inputs)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(x).square().sum(), inputs)
    torch.testing.assert_close(actual, expected)
    torch.compiler.reset()


@pytest.mark.parametrize("shape", [(6, 3, 1, 1), (6, 3, 16, 16), (40, 64, 40, 40)])
def test_batch_independence_is_exact_at_any_size(shape):
    x = torch.randn(shape)
    layer = perturbed(FRN(shape[1]))
    assert torch.equal(layer(x)[2:3], layer(x[2:3]))


def test_children_with_hooks_or_of_another_kind_are_called():
    layer, x = perturbed(FRN(4)), torch.randn(2, 4, 3)
    expected = layer(x)
    assert list(layer.state_dict()) == ["0.weight", "0.bias", "1.threshold"]
    seen = []
    handle = layer[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    torch.testing.assert_close(layer(x), expected)
    handle.remove()
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], layer[0](x))
    layer[1] = nn.Identity()
    torch.testing.assert_close(layer(x), seen[0])


class Residual(nn.Module):
    """A residual block with one ReLU inside the branch and one after the sum."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()
        self.conv2, self.bn2, self.relu2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()
        self.last = nn.ReLU()

    def forward(self, x):
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out)) + x
        return self.last(self.relu2(out).mean((2, 3)))


def prepared(model, x):
    said = []
    setting = Setting(batches=((x, torch.zeros(len(x))),), say=said.append)
    return find_method("filter-response-norm").prepare(model, setting), said


def test_units_stand_after_norms_and_after_sums_only():
    model, said = prepared(Residual(), torch.randn(4, 3, 2, 2))
    assert type(model.bn1) is FRN
    assert type(model.relu1) is nn.Identity
    assert isinstance(model.bn2, FilterResponseNorm)
    assert isinstance(model.relu2, ThresholdedLinearUnit)
    assert type(model.last) is nn.ReLU
    assert said == [
        "2 BatchNorm layers became FRN, 2 ReLUs became TLU, 1 of them in the norm's place"
    ]


def test_scale_shift_and_kind_of_the_norm_are_kept():
    model = Residual().double()
    with torch.no_grad():
        model.bn1.weight.copy_(torch.tensor([1.0, 2.0, 3.0]))
        model.bn1.bias.copy_(torch.tensor([4.0, 5.0, 6.0]))
    model.bn1.eval()
    model, _ = prepared(model, torch.randn(4, 3, 2, 2).double())
    assert model.bn1[0].weight.tolist() == [1, 2, 3]
    assert model.bn1[0].bias.tolist() == [4, 5, 6]
    assert model.bn1[1].threshold.dtype == torch.float64
    assert not model.bn1[0].training


class Shared(nn.Module):
    """One ReLU after two norms; ``forward`` is handed in."""

    def __init__(self, forward):
        super().__init__()
        self.bn1, self.bn2, self.relu = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.ReLU()
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


READERS = {
    "the norm is returned": lambda m, x: (m.bn2(m.relu(y := m.bn1(x))), {"features": [y]}),
    "a sum of the norm is returned": lambda m, x: (m.bn2(m.relu(y := m.bn1(x))), y + x),
    "a function reads the norm": lambda m, x: m.bn2(m.relu(y := m.bn1(x)) * y.sigmoid()),
    "a layer reads the norm": lambda m, x: m.relu(y := m.bn1(x)) + m.bn2(y),
    "the norm runs twice": lambda m, x: m.bn2(m.relu(m.bn1(x)) + m.bn1(x)),
}


@pytest.mark.parametrize("forward", READERS.values(), ids=READERS)
def test_a_norm_with_another_reader_keeps_its_unit_apart(forward):
    model, _ = prepared(Shared(forward), torch.randn(4, 3, 2, 2))
    assert isinstance(model.bn1, FilterResponseNorm)
    assert isinstance(model.bn2, FilterResponseNorm)
    assert isinstance(model.relu, ThresholdedLinearUnit)


def test_one_relu_after_several_norms_becomes_a_threshold_each():
    model, said = prepared(
        Shared(lambda m, x: m.relu(m.bn2(m.relu(m.bn1(x))))), torch.randn(4, 3, 2, 2)
    )
    assert type(model.bn1) is type(model.bn2) is FRN
    assert model.bn1[1].threshold is not model.bn2[1].threshold
    assert type(model.relu) is nn.Identity
    assert said == [
        "2 BatchNorm layers became FRN, 2 ReLUs became TLU, 2 of them in the norm's place"
    ]


def test_one_relu_after_a_norm_and_a_sum_stays():
    model, said = prepared(
        Shared(lambda m, x: m.relu(m.bn2(m.relu(m.bn1(x))) + x)), torch.randn(4, 3, 2, 2)
    )
    assert type(model.relu) is nn.ReLU
    assert isinstance(model.bn1, FilterResponseNorm)
    assert said[0].endswith("one module or function serves several places: relu")


def test_flat_input_learns_its_epsilon():
    setting = Setting(batches=((torch.randn(4, 3), torch.zeros(4)),))
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU())
    model = find_method("filter-response-norm").prepare(model, setting)
    assert model[1][0].eps_l is not None
