"""Starting batchless normalisation from data: behind every layer mean 0 and deviation 1."""

import math

import pytest
import torch
from torch import nn

from normlab.norms.batchless_dependence import dependences
from normlab.norms.batchless_norm import BatchlessNorm
from normlab.norms.batchless_start import restart_from_data, start_from_data


def stack():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 5), nn.ReLU(), BatchlessNorm(5), nn.Linear(5, 3), nn.Tanh(), BatchlessNorm(3)
    )
    with torch.no_grad():
        for layer in (model[2], model[5]):
            layer.mu.normal_()
            layer.s.normal_()
    return model.double()


def sample(count=60):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 4, generator=generator, dtype=torch.float64) * 3 + 1


def outputs_of(model, layer, x):
    """What a layer returns, all its calls together, as (values, C)."""
    seen = []
    handle = layer.register_forward_hook(lambda *arguments: seen.append(arguments[2].detach()))
    model(x)
    handle.remove()
    return torch.cat([y.movedim(1, -1).reshape(-1, y.shape[1]) for y in seen])


def assert_standard(y, tolerance=1e-10):
    assert y.mean(0).abs().max() < tolerance
    assert (y.var(0, correction=0) - 1).abs().max() < tolerance


UNEQUAL = (7, 30, 23)


@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize("parts", [(60,), UNEQUAL, (1,) * 60])
def test_two_layers_are_standard_on_the_sample(parts, one_pass):
    model, x = stack(), sample()
    report = start_from_data(model, iter(x.split(parts)), one_pass=one_pass)
    assert report.stages == (("2",), ("5",))
    assert str(report) == "statistics set from data in 2 stages"
    for layer in (model[2], model[5]):
        assert_standard(outputs_of(model, layer, x))


def test_setting_all_layers_at_once_does_not_do():
    """The order matters: the second layer, measured before the first is set, is off."""
    model, x = stack(), sample()
    hidden = model[:5](x).detach()
    start_from_data(model, [x])
    assert (model[5].mu - hidden.mean(0)).abs().max() > 0.1


@pytest.mark.parametrize("std_parametrization", ["log", "abs", "inv"])
def test_one_batch_equals_many(std_parametrization):
    x, found = sample(), []
    for parts in ((60,), UNEQUAL):
        model = stack()
        model[2] = BatchlessNorm(5, std_parametrization=std_parametrization).double()
        start_from_data(model, [(part, None) for part in x.split(parts)])
        found.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(found[0], found[1], atol=1e-12, rtol=1e-12)


class Branches(nn.Module):
    """Two parallel layers, joined in place in a third's input; a fourth is never reached."""

    def __init__(self):
        super().__init__()
        self.last, self.unused = BatchlessNorm(4), BatchlessNorm(4)
        self.left, self.right = BatchlessNorm(2), BatchlessNorm(2)

    def forward(self, x):
        joined = torch.empty_like(x)
        joined[:, :2] = self.left(x=x[:, :2] ** 2)
        joined[:, 2:] = self.right(x[:, 2:].relu())
        return self.last(joined.cumsum(1))


@pytest.mark.parametrize("parts", [(60,), UNEQUAL])
def test_branches_share_a_stage(parts):
    model, x = Branches().double(), sample()
    report = start_from_data(model, x.split(parts))
    if len(parts) > 1:
        assert report.stages == (("left", "right"), ("last",))
    assert report.not_reached == ("unused",)
    assert "not reached and left as they were: unused" in str(report)
    assert model.unused.mu.abs().max() == 0
    for layer in (model.left, model.right, model.last):
        assert_standard(outputs_of(model, layer, x))


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.top = BatchlessNorm(4), BatchlessNorm(4)

    def forward(self, x):
        return self.top(self.norm(x).relu() + self.norm(2 * x + 1))


@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize("parts", [(60,), UNEQUAL])
def test_a_layer_called_twice_is_set_from_both_calls(parts, one_pass):
    model, x = Siamese().double(), sample()
    report = start_from_data(model, x.split(parts), one_pass=one_pass)
    assert report.stages == (("norm",), ("top",))
    for layer in (model.norm, model.top):
        assert_standard(outputs_of(model, layer, x))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.top = BatchlessNorm(4), BatchlessNorm(4)

    def forward(self, x):
        return self.top(self.norm(3 * self.norm(x) + 1))


@pytest.mark.parametrize("parts", [(60,), UNEQUAL])
def test_a_layer_fed_by_itself_is_set_from_the_call_before_that(parts):
    model, x = Recurrent().double(), sample()
    report = start_from_data(model, x.split(parts))
    assert report.fed_back == ("norm",)
    assert "norm" in str(report)
    torch.testing.assert_close(model.norm.mu.detach(), x.mean(0))
    torch.testing.assert_close(model.norm.std, x.std(0, correction=0))
    assert_standard(outputs_of(model, model.top, x))


def test_dependences_go_through_any_operation():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (BatchlessNorm(4) for _ in range(3))

        def forward(self, x):
            y = self.a(x)
            # Neither an index nor a detached value has a gradient.
            y = self.b(x[y.argmax(0)])
            return self.c(x) + torch.stack([y.detach(), y]).sum(0) + self.c(y)

    model = Odd().double()
    names = {name: module for name, module in model.named_modules() if name}
    with torch.no_grad():
        found = dependences(model, sample(4), names)
    a, ab = frozenset("a"), frozenset("ab")
    assert found == {"a": [frozenset()], "b": [a], "c": [frozenset(), ab]}


def test_images_and_shared_axes():
    x = torch.randn(12, 3, 4, 5).double() * 2 + torch.arange(5)
    columns = BatchlessNorm(3, shared_axes=(0, 2), sample_shape=(3, 4, 5)).double()
    for model in (BatchlessNorm(3).double(), columns):
        for batches in ([x], x.split(5)):
            model.reset_parameters()
            start_from_data(model, batches)
            axes = (0, 2) if model is columns else (0, 2, 3)
            torch.testing.assert_close(model.mu.flatten(), x.mean(axes).flatten())
            expected = x.std(axes, correction=0).flatten()
            torch.testing.assert_close(model.std.flatten(), expected)


def test_a_large_offset_costs_no_digits():
    x = sample() + 1e6
    for one_pass in (False, True):
        model = BatchlessNorm(4).double()
        with torch.no_grad():
            model.mu.fill_(1e6)
        start_from_data(model, x.split(UNEQUAL), one_pass=one_pass)
        torch.testing.assert_close(model.std, x.std(0, correction=0), atol=1e-8, rtol=0)


@pytest.mark.parametrize("parts", [(60,), UNEQUAL])
def test_constant_channels_are_floored(parts):
    x = sample()
    x[:, 1] = 2.0
    model = BatchlessNorm(4).double()
    report = start_from_data(model, x.split(parts))
    assert dict(report.floored) == {"": 1}
    assert "1 constant channels" in str(report)
    assert model.std[1].item() == pytest.approx(1e-3)
    assert torch.isfinite(model(x)).all()
    model = BatchlessNorm(4).double()
    start_from_data(model, x.split(parts), min_std=0.5)
    assert model.std[1].item() == pytest.approx(0.5)


def test_modes_and_hooks_are_restored_and_no_loss_is_left():
    model, x = stack(), sample()
    model[2].eval()
    start_from_data(model, x.split(UNEQUAL))
    assert [module.training for module in model] == [True, True, False, True, True, True]
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert model[5].layer_loss.item() == 0


@pytest.mark.parametrize("parts", [(60,), UNEQUAL])
@pytest.mark.parametrize("operation", [start_from_data, restart_from_data])
def test_values_that_are_not_finite_leave_the_model(operation, parts):
    model, x = stack(), sample()
    with torch.no_grad():
        model[3].weight[1, 2] = math.nan
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="expected finite values at layer '5', got NaN"):
        operation(model, x.split(parts))
    for now, then in zip(model.parameters(), before, strict=True):
        assert torch.equal(now.nan_to_num(), then.nan_to_num())


@pytest.mark.parametrize("operation", [start_from_data, restart_from_data])
@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "expected at least one batch, got none"),
        ([{"x": 1}], "got dict; yield the inputs alone"),
        ([torch.ones(1, 4).double()], "expected more than one value per channel at layer '2'"),
    ],
)
def test_batches_that_will_not_do(operation, batches, message):
    with pytest.raises(ValueError, match=message):
        operation(stack(), batches)


def test_other_refusals():
    with pytest.raises(ValueError, match="expected a model with BatchlessNorm layers"):
        start_from_data(nn.Linear(2, 2), [sample()])
    with pytest.raises(ValueError, match="min_std=0"):
        start_from_data(stack(), [sample()], min_std=0)


@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize("make", [stack, lambda: Recurrent().double(), lambda: Branches().double()])
def test_restarting_keeps_the_function(make, one_pass):
    model, x = make(), sample()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.rand_like(parameter))
    expected = model(x)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = restart_from_data(model, x.split(UNEQUAL), one_pass=one_pass)
    torch.testing.assert_close(model(x), expected, atol=1e-12, rtol=1e-12)
    for name in report.stages[0]:
        layer = model.get_submodule(name)
        assert not torch.equal(layer.mu, before[f"{name}.mu"])
        y = outputs_of(model, layer, x)
        assert_standard((y - layer.bias) / layer.weight, 1e-9)


def test_restarting_in_single_precision_keeps_the_function():
    model, x = stack().float(), sample().float()
    expected = model(x)
    restart_from_data(model, [x])
    torch.testing.assert_close(model(x), expected, atol=1e-6, rtol=1e-5)


def test_restarting_needs_scale_and_shift():
    model = nn.Sequential(BatchlessNorm(4), BatchlessNorm(4, use_output_mean=False)).double()
    with pytest.raises(ValueError, match="expected a BatchlessNorm with scale and shift"):
        restart_from_data(model, [sample()])
    assert model[0].mu.abs().max() == 0
