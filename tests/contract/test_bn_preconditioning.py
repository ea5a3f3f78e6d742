"""Preconditioning against explicit matrices and the sheet's identities, then the contract."""

import copy
import math
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normlab.lab.models import build_model
from normlab.method import Setting, Unsuitable
from normlab.norms.group_norm import METHOD as GROUP_NORM
from normlab.optim.bare_network import take_out_batch_norms
from normlab.optim.bn_preconditioning import METHOD, BatchNormPreconditioner, prepare
from normlab.optim.preconditioner import Preconditioner, map_back, precondition
from normlab.testing import METHOD_CHECKS, MethodCase

KEY = "bn_preconditioning"
OWN = {"momentum": 1.0, "relative_eps": 0.0, "eps": 0.0, "small_batch_factor": False}


def explicit(mean, square_scale, square_q):
    """P = U D / q over ``[bias, weights]``, as the sheet writes it."""
    m = len(mean)
    shift = torch.eye(m + 1, dtype=torch.float64)
    shift[0, 1:] = -mean
    scale = torch.diag(torch.cat([torch.ones(1, dtype=torch.float64), square_scale**-0.5]))
    return shift @ scale / math.sqrt(square_q)


def sgd(model, lr=0.1, **options):
    return torch.optim.SGD(model.parameters(), lr=lr, **options)


def features(*shape):
    """Inputs whose channels have means of about 10 and scales from 0.1 to 10."""
    torch.manual_seed(0)
    channels = shape[1]
    column = (channels, *(1,) * (len(shape) - 2))
    scales = torch.logspace(-1, 1, channels, dtype=torch.float64).view(column)
    means = 10 * torch.randn(channels, dtype=torch.float64).view(column)
    return torch.randn(shape, dtype=torch.float64) * scales + means


def gradients_of(model, x, *batches, **options):
    """Return a copy of the layer's gradients after transforming those of a loss on ``x``."""
    model.zero_grad()
    preconditioner = BatchNormPreconditioner(model, sgd(model), **options)
    for part in (x, *batches):
        y = model(part)
        (y.sin() * torch.arange(y.numel()).view_as(y).cos()).sum().backward()
    preconditioner.precondition_()
    preconditioner.remove()
    return [p.grad.clone() for p in model.parameters()]


def plain_gradients(model, x, *batches):
    model.zero_grad()
    for part in (x, *batches):
        y = model(part)
        (y.sin() * torch.arange(y.numel()).view_as(y).cos()).sum().backward()
    return [p.grad.clone() for p in model.parameters()]


# -- the closed form ------------------------------------------------------------------------------


@pytest.mark.parametrize("square_q", [1.0, 2.5])
def test_closed_form_equals_explicit_matrices(square_q):
    torch.manual_seed(0)
    mean, square = torch.randn(5).double() * 10, torch.rand(5).double() * 9 + 0.1
    weight, bias = torch.randn(3, 5).double(), torch.randn(3).double()
    matrix = explicit(mean, square, square_q)
    stacked = torch.cat([bias[:, None], weight], 1)
    statistics = Preconditioner(mean, square, square_q)
    step, bias_step = precondition(weight, bias, statistics)
    expected = stacked @ (matrix @ matrix.T)
    torch.testing.assert_close(step, expected[:, 1:], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(bias_step, expected[:, 0], atol=1e-10, rtol=1e-12)
    assert torch.linalg.eigvalsh(matrix @ matrix.T).min() > 0
    assert (step * weight).sum() + (bias_step * bias).sum() > 0

    mapped, mapped_bias = map_back(weight, bias, statistics)
    expected = stacked @ matrix.T
    torch.testing.assert_close(mapped, expected[:, 1:], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(mapped_bias, expected[:, 0], atol=1e-12, rtol=1e-12)


def test_trivial_statistics_change_nothing():
    weight, bias = torch.randn(3, 4, 3), torch.randn(3)
    step = precondition(weight, bias, Preconditioner(torch.zeros(4), torch.ones(4)))
    assert torch.equal(step[0], weight)
    assert torch.equal(step[1], bias)


def test_constant_features_are_left_alone():
    step, bias_step = precondition(
        torch.ones(1, 2), torch.ones(1), Preconditioner(torch.ones(2), torch.tensor([0.0, 1.0]))
    )
    assert step.tolist() == [[0.0, 0.0]]
    assert bias_step.tolist() == [1.0]


def test_convolution_equals_unfolding_with_tied_statistics():
    x = features(3, 4, 6, 5)
    layer = nn.Conv2d(4, 2, 3, padding=1, stride=2).double()
    weight, bias = plain_gradients(layer, x)
    mean = x.mean((0, 2, 3)).repeat_interleave(9)
    square = x.var((0, 2, 3), correction=0).repeat_interleave(9)
    matrix = explicit(mean, square, 1.0)
    expected = torch.cat([bias[:, None], weight.flatten(1)], 1) @ (matrix @ matrix.T)
    actual = gradients_of(layer, x, **OWN)
    torch.testing.assert_close(actual[0].flatten(1), expected[:, 1:], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(actual[1], expected[:, 0], rtol=1e-9, atol=1e-9)


def test_convolution_of_one_tap_equals_linear():
    x = features(7, 4)
    linear, conv = nn.Linear(4, 3).double(), nn.Conv2d(4, 3, 1).double()
    with torch.no_grad():
        conv.weight.copy_(linear.weight[:, :, None, None])
        conv.bias.copy_(linear.bias)
    expected = gradients_of(linear, x)
    actual = gradients_of(conv, x[:, :, None, None])
    torch.testing.assert_close(actual[0][:, :, 0, 0], expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["conv1d", "conv2d", "conv3d"])
def test_each_group_is_a_layer_of_its_own(kind):
    dims = int(kind[4])
    make = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    x = features(2, 6, *(4,) * dims)
    joint = make(6, 4, 3, groups=2).double()
    actual = gradients_of(joint, x)
    # The loss weighs outputs by their place, so the halves are compared on one pass of the joint.
    raw = plain_gradients(joint, x)
    for half in range(2):
        channels = x[:, 3 * half : 3 * half + 3]
        mean = 0.01 * channels.transpose(0, 1).flatten(1).mean(1)
        second = 0.99 + 0.01 * channels.square().transpose(0, 1).flatten(1).mean(1)
        var = second - mean**2
        square = var + 1e-2 * var.max() + 1e-4
        q = max(3 * 3**dims / (2 * 2**dims), 1.0)
        units = slice(2 * half, 2 * half + 2)
        step, bias = precondition(raw[0][units], raw[1][units], Preconditioner(mean, square, q))
        torch.testing.assert_close(actual[0][units], step, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(actual[1][units], bias, rtol=1e-9, atol=1e-9)


# -- what it is for -------------------------------------------------------------------------------


def test_a_step_equals_a_plain_step_behind_normalised_features():
    h = features(40, 6)
    targets = torch.randn(40, 3, dtype=torch.float64)
    mean, scale = h.mean(0), h.var(0, correction=0).sqrt()
    plain = nn.Linear(6, 3).double()
    normalised = nn.Linear(6, 3).double()
    with torch.no_grad():
        normalised.weight.copy_(plain.weight * scale)
        normalised.bias.copy_(plain.bias + plain.weight @ mean)
    optimizer = sgd(plain)
    BatchNormPreconditioner(plain, optimizer, **OWN)
    (plain(h).sin() * targets).sum().backward()
    optimizer.step()
    other = sgd(normalised)
    (normalised((h - mean) / scale).sin() * targets).sum().backward()
    other.step()
    weight = normalised.weight / scale
    torch.testing.assert_close(plain.weight, weight, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(plain.bias, normalised.bias - weight @ mean, atol=1e-9, rtol=1e-10)


def test_the_step_of_the_function_is_free_of_the_features_scale_and_shift():
    h = features(40, 6)
    scale, shift = torch.rand(6).double() + 0.5, torch.randn(6).double()
    outputs = []
    torch.manual_seed(3)
    start = nn.Linear(6, 3).double()
    for factor, offset in ((torch.ones(6).double(), torch.zeros(6).double()), (scale, shift)):
        model, x = copy.deepcopy(start), h * factor + offset
        with torch.no_grad():
            model.weight.div_(factor)
            model.bias.sub_(model.weight @ offset)
        optimizer = sgd(model, momentum=0.9)
        BatchNormPreconditioner(model, optimizer, **OWN)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).sin().sum().backward()
            optimizer.step()
        outputs.append(model(x).detach())
    torch.testing.assert_close(*outputs, atol=1e-9, rtol=1e-9)
    assert (outputs[0] - start(h)).abs().max() > 1e-2


def test_the_condition_becomes_that_of_the_correlations():
    h = features(60, 5)
    ones = torch.cat([torch.ones(60, 1).double(), h], 1)
    matrix = explicit(h.mean(0), h.var(0, correction=0), 1.0)
    conditioned = torch.linalg.cond((ones @ matrix).T @ (ones @ matrix))
    correlations = torch.eye(6).double()
    correlations[1:, 1:] = torch.corrcoef(h.T)
    assert conditioned == pytest.approx(torch.linalg.cond(correlations).item(), rel=1e-6)
    assert torch.linalg.cond(ones.T @ ones) > 1e3 * conditioned


def regression(preconditioned):
    torch.manual_seed(1)
    x = torch.randn(64, 8).double() * torch.logspace(-2, 2, 8).double() + 10
    y = torch.randn(64, 1).double()
    ones = torch.cat([torch.ones(64, 1).double(), x], 1)
    least = F.mse_loss(ones @ torch.linalg.lstsq(ones, y).solution, y).item()
    losses = []
    for lr in (0.5,) if preconditioned else torch.logspace(-7, -3, 9).tolist():
        torch.manual_seed(2)
        model = nn.Linear(8, 1).double()
        optimizer = sgd(model, lr)
        if preconditioned:
            BatchNormPreconditioner(model, optimizer, **OWN)
        for _ in range(500):
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
        if loss.isfinite():
            losses.append(loss.item() - least)
    return min(losses)


def test_badly_scaled_regression_converges_only_with_it():
    assert abs(regression(True)) < 1e-12
    assert regression(False) > 1e-3


# -- statistics -----------------------------------------------------------------------------------


def statistics_after(batches, model=None, **options):
    model = model or nn.Linear(3, 2).double()
    optimizer = sgd(model, 0.0)
    preconditioner = BatchNormPreconditioner(model, optimizer, **options)
    for x in batches:
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
    return preconditioner, optimizer.param_groups[0][KEY]


def used(preconditioner, model=None):
    (matrix,) = preconditioner.preconditioners
    return matrix.mean.double(), matrix.square_scale.double()


@pytest.mark.parametrize("debias", [False, True])
@pytest.mark.parametrize("statistics", ["moments", "batch"])
def test_running_statistics(statistics, debias):
    batches = [features(9, 3) + step for step in range(4)]
    rho = 0.8
    preconditioner, state = statistics_after(
        batches, momentum=1 - rho, statistics=statistics, debias=debias
    )
    start = 0.0 if debias else 1.0
    mean, second = torch.zeros(3).double(), torch.full((3,), start).double()
    for x in batches:
        mean = rho * mean + (1 - rho) * x.mean(0)
        new = x.square().mean(0) if statistics == "moments" else x.var(0, correction=0)
        second = rho * second + (1 - rho) * new
    known = 1 - rho**4 if debias else 1.0
    mean, second = mean / known, second / known
    var = second - mean**2 if statistics == "moments" else second
    square = var + 1e-2 * var.max() + 1e-4
    torch.testing.assert_close(used(preconditioner), (mean, square), rtol=1e-12, atol=1e-12)
    assert state["steps"] == [4]


@pytest.mark.parametrize("statistics", ["moments", "batch"])
def test_without_bias_second_moments_scale_and_nothing_shifts(statistics):
    x = features(9, 3)
    model = nn.Linear(3, 2, bias=False).double()
    preconditioner, _ = statistics_after([x], model, momentum=1.0, statistics=statistics)
    second = x.square().mean(0)
    expected = torch.zeros(3).double(), second + 1e-2 * second.max() + 1e-4
    torch.testing.assert_close(used(preconditioner), expected)
    raw, grad = plain_gradients(model, x), gradients_of(model, x, momentum=1.0)
    torch.testing.assert_close(grad[0], raw[0] / expected[1])


def test_single_samples_show_the_variance_of_the_data():
    data = features(4000, 3)
    options = {"eps": 0.0, "relative_eps": 0.0}
    moments, state = statistics_after(data[:, None], momentum=0.002, debias=True, **options)
    mean, square = used(moments)
    torch.testing.assert_close(square.sqrt(), data.std(0), rtol=0.1, atol=0)
    torch.testing.assert_close(mean, data.mean(0), rtol=0.02, atol=0.5)
    assert torch.isfinite(state["square"]).all()
    collapsed, _ = statistics_after(data[:500, None], momentum=0.02, statistics="batch", **options)
    assert used(collapsed)[1].max() < 1e-3


def test_channels_are_counted_without_padding():
    x = features(2, 3, 5, 5)
    model = nn.Conv2d(3, 2, 3, padding=2).double()
    preconditioner, _ = statistics_after([x], model, **OWN)
    torch.testing.assert_close(
        used(preconditioner), (x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0))
    )


def test_unbatched_and_sequence_inputs():
    x = features(12, 3)
    layer = nn.Linear(3, 2).double()
    for shape in ((4, 3, 3), (2, 2, 3, 3)):
        preconditioner, _ = statistics_after([x.view(shape)], layer, **OWN)
        torch.testing.assert_close(used(preconditioner), (x.mean(0), x.var(0, correction=0)))
    preconditioner, _ = statistics_after([x[0]], layer, momentum=1.0)
    torch.testing.assert_close(used(preconditioner)[0], x[0])
    image = features(1, 3, 6)[0]
    preconditioner, _ = statistics_after([image], nn.Conv1d(3, 2, 3).double(), momentum=1.0)
    torch.testing.assert_close(used(preconditioner)[0], image.mean(1))


@pytest.mark.parametrize(
    ("make", "shape", "expected"),
    [
        (lambda: nn.Linear(12, 2), (3, 12), 12 / 3),
        (lambda: nn.Linear(12, 2), (3, 2, 12), 12 / 6),
        (lambda: nn.Linear(12, 2), (24, 12), 1.0),
        (lambda: nn.Conv2d(4, 6, 3), (1, 4, 5, 5), 36 / 9),
        (lambda: nn.Conv2d(4, 6, 3, groups=2), (1, 4, 5, 5), 18 / 9),
        (lambda: nn.Conv2d(4, 6, 3, stride=2), (1, 4, 5, 5), 36 / 4),
    ],
)
def test_q_follows_rows_and_weights_of_a_unit(make, shape, expected):
    preconditioner, _ = statistics_after([torch.randn(shape).double()], make().double())
    assert float(preconditioner.preconditioners[0].square_q) == pytest.approx(expected)
    preconditioner, _ = statistics_after(
        [torch.randn(shape).double()], make().double(), small_batch_factor=False
    )
    assert preconditioner.preconditioners[0].square_q == 1.0


@pytest.mark.parametrize("statistics", ["moments", "batch"])
def test_accumulation_equals_one_batch(statistics):
    x = features(32, 4)
    results = []
    for parts in (1, 4):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 50), nn.Tanh(), nn.Linear(50, 2)).double()
        optimizer = sgd(model, momentum=0.9)
        BatchNormPreconditioner(model, optimizer, statistics=statistics, momentum=0.2)
        for _ in range(3):
            optimizer.zero_grad()
            for part in x.chunk(parts):
                (model(part).square().mean() / parts).backward()
            optimizer.step()
        results.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*results, atol=1e-10, rtol=1e-10)


def test_evaluation_and_passes_without_gradients_are_not_counted():
    model = nn.Linear(3, 2).double()
    preconditioner = BatchNormPreconditioner(model, sgd(model), momentum=1.0)
    x = features(9, 3)
    with torch.no_grad():
        model(100 * x)
    model.eval()(100 * x).sum().backward()
    model.train()(x).sum().backward()
    model(x[:0]).sum().backward()
    preconditioner.precondition_()
    torch.testing.assert_close(used(preconditioner)[0], x.mean(0))
    assert float(preconditioner.preconditioners[0].square_q) == 1.0


def test_an_uncalled_layer_is_left_alone_and_said_once():
    model = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])
    optimizer = sgd(model)
    preconditioner = BatchNormPreconditioner(model, optimizer)
    for step in range(2):
        model[0](torch.randn(4, 3)).sum().backward()
        model[1].weight.grad = torch.ones(2, 3)
        if step == 0:
            with pytest.warns(UserWarning, match="was not called in training"):
                preconditioner.precondition_()
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                preconditioner.precondition_()
        assert torch.equal(model[1].weight.grad, torch.ones(2, 3))
    state = optimizer.param_groups[0][KEY]
    assert state["steps"] == [2, 0]
    assert state["mean"][3:].tolist() == [0.0] * 3
    assert state["square"][3:].tolist() == [1.0] * 3
    assert preconditioner.preconditioners[1] is None


def test_several_calls_and_shared_weights_count_together():
    x = features(10, 3)
    shared, other = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()
    other.weight, other.bias = shared.weight, shared.bias
    for first, second in ((shared, shared), (shared, other)):
        model = nn.ModuleList([first, second])
        preconditioner = BatchNormPreconditioner(model, sgd(model), **OWN)
        raw = torch.autograd.grad((first(x[:4]).sum() + second(x[4:]).sum()), first.weight)[0]
        preconditioner._watcher.take()
        model.zero_grad()
        (first(x[:4]).sum() + second(x[4:]).sum()).backward()
        preconditioner.precondition_()
        assert len(preconditioner.layers) == 1
        torch.testing.assert_close(used(preconditioner), (x.mean(0), x.var(0, correction=0)))
        assert not torch.allclose(first.weight.grad, raw)
        preconditioner.remove()


def test_what_is_not_supported_is_named():
    embedding, tied, alone = nn.Embedding(5, 3), nn.Linear(3, 5), nn.Linear(3, 3)
    tied.weight = embedding.weight
    computed = nn.utils.spectral_norm(nn.Linear(3, 3))
    frozen = nn.Linear(3, 3)
    modules = {
        "embedding": embedding, "tied": tied, "up": nn.ConvTranspose1d(3, 3, 2),
        "computed": computed, "frozen": frozen, "alone": alone,
        "attention": nn.MultiheadAttention(3, 1), "norm": nn.LayerNorm(3),
    }  # fmt: skip
    model = nn.ModuleDict(modules)
    held = [p for p in model.parameters() if p is not frozen.weight]
    preconditioner = BatchNormPreconditioner(model, torch.optim.SGD(held, lr=0.1))
    assert preconditioner.layers == [[alone]]
    notes = {note.partition(":")[0]: note for note in preconditioner.skipped}
    assert set(notes) >= {"embedding", "tied", "up", "computed", "frozen", "attention"}
    assert not any(name.startswith("norm") for name in notes)
    assert "shares a parameter" in notes["tied"]
    assert "not in the optimiser" in notes["frozen"]
    assert "computed from others" in notes["computed"]


# -- around the optimiser -------------------------------------------------------------------------


def run(steps, *, by_hand=False, closure=False, made=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    optimizer = sgd(model, momentum=0.9)
    preconditioner = BatchNormPreconditioner(model, optimizer)
    for step in range(steps):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step)) + 3

        def compute(x=x):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        if closure:
            assert optimizer.step(compute) > 0
            continue
        compute()
        if by_hand:
            preconditioner.precondition_()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def test_by_hand_and_closures_equal_the_hook():
    expected = run(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # editing twice would find layers that were not called
        others = run(4, by_hand=True), run(4, closure=True)
    for other in others:
        assert all(torch.equal(*pair) for pair in zip(expected, other, strict=True))


def test_a_pass_for_the_log_changes_nothing_after_an_edit_by_hand():
    parameters = []
    for logged in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 2))
        optimizer = sgd(model, momentum=0.9)
        preconditioner = BatchNormPreconditioner(model, optimizer)
        for step in range(3):
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step)) + 3
            optimizer.zero_grad()
            model(x).square().mean().backward()
            preconditioner.precondition_()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            if logged:
                model(x[:1])
            optimizer.step()
        assert optimizer.param_groups[0][KEY]["steps"] == [3, 3]
        parameters.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*parameters, strict=True))


def test_a_further_backward_after_an_edit_by_hand_is_transformed():
    model = nn.Linear(4, 2).double()
    optimizer = sgd(model, 1.0)
    preconditioner = BatchNormPreconditioner(model, optimizer, **OWN)
    model(features(9, 4)).sum().backward()
    preconditioner.precondition_()
    optimizer.zero_grad()
    x = 2 * features(9, 4)
    raw = plain_gradients(model, x)
    mean, square = x.mean(0), x.var(0, correction=0)
    step, _ = precondition(*raw, Preconditioner(mean, square))
    preconditioner._watcher.take()  # that pass
    before = model.weight.detach().clone()
    y = model(x)
    optimizer.zero_grad()
    (y.sin() * torch.arange(y.numel()).view_as(y).cos()).sum().backward()
    optimizer.step()
    torch.testing.assert_close(before - model.weight.detach(), step, rtol=1e-8, atol=1e-8)


def test_decay_acts_after_the_transform():
    model = nn.Linear(3, 2)
    optimizer = sgd(model, 0.1, weight_decay=0.5)
    BatchNormPreconditioner(model, optimizer)
    before = model.weight.detach().clone()
    (model(torch.randn(4, 3)).sum() * 0).backward()
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), 0.95 * before)


def test_half_precision():
    model = nn.Linear(300, 2).to(torch.bfloat16)
    optimizer = sgd(model)
    BatchNormPreconditioner(model, optimizer, momentum=1.0)
    model(torch.randn(8, 300).to(torch.bfloat16) + 5).sum().backward()
    optimizer.step()
    assert torch.isfinite(model.weight).all()
    assert optimizer.param_groups[0][KEY]["mean"].dtype == torch.float64


def test_removing_leaves_a_vanilla_model():
    model, plain = nn.Linear(3, 2), nn.Linear(3, 2)
    preconditioner = BatchNormPreconditioner(model, optimizer := sgd(model))
    assert set(model.state_dict()) == {"weight", "bias"}
    assert isinstance(optimizer.state_dict()["param_groups"][0][KEY]["mean"], torch.Tensor)
    preconditioner.remove()
    assert vars(model).keys() == vars(plain).keys()
    assert not model._forward_hooks
    assert KEY not in optimizer.param_groups[0]
    assert not optimizer._optimizer_step_pre_hooks
    BatchNormPreconditioner(model, optimizer)  # another one is welcome then


def test_copies_are_not_watched():
    model = nn.Linear(3, 2)
    preconditioner = BatchNormPreconditioner(model, sgd(model))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin(torch.ones(2, 3)).sum().backward()
    assert preconditioner._watcher.empty


def test_wrong_checkpoints_are_refused():
    model = nn.Linear(3, 2)
    optimizer = sgd(model)
    BatchNormPreconditioner(model, optimizer)
    other = sgd(wide := nn.Linear(4, 2))
    BatchNormPreconditioner(wide, other)
    optimizer.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match=r"statistics of 3 features, got 4"):
        optimizer.step()
    state = sgd(model).state_dict()
    optimizer.load_state_dict(state)  # one without statistics starts them
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0][KEY]["mean"][0] = math.nan
    optimizer.load_state_dict(state)
    with pytest.raises(ValueError, match="finite statistics"):
        optimizer.step()


def trained(model, optimizer, steps):
    for step in range(steps):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step)) + 3
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def test_it_goes_on_from_a_checkpoint_loaded_before_it_is_built():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = sgd(model, momentum=0.9)
    BatchNormPreconditioner(model, optimizer, momentum=0.3)
    trained(model, optimizer, 2)
    resumed = copy.deepcopy(model)
    again = sgd(resumed, momentum=0.9)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    BatchNormPreconditioner(resumed, again, momentum=0.3)
    # The copy of an optimiser keeps the statistics and loses what acts on its steps.
    copied, copied_optimizer = copy.deepcopy((model, optimizer))
    BatchNormPreconditioner(copied, copied_optimizer, momentum=0.3)
    for one, its in ((model, optimizer), (resumed, again), (copied, copied_optimizer)):
        trained(one, its, 3)
        assert its.param_groups[0][KEY]["steps"] == [5]
        torch.testing.assert_close(its.param_groups[0][KEY], optimizer.param_groups[0][KEY])
        assert torch.equal(one.weight, model.weight)
        assert torch.equal(one.bias, model.bias)


def test_a_wrong_checkpoint_is_refused_when_it_is_built_too():
    model, other = nn.Linear(3, 2), nn.Linear(4, 2)
    saved = sgd(other)
    BatchNormPreconditioner(other, saved)
    optimizer = sgd(model)
    optimizer.load_state_dict(saved.state_dict())
    with pytest.raises(ValueError, match=r"statistics of 3 features, got 4; load a checkpoint"):
        BatchNormPreconditioner(model, optimizer)
    assert not model._forward_hooks
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.0}, {"momentum": 1.1}, {"momentum": math.nan}, {"eps": -1.0},
        {"relative_eps": math.inf}, {"statistics": "running"},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_options_are_refused(options):
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=f"expected .*, got .*; give .*|{next(iter(options))}"):
        BatchNormPreconditioner(model, sgd(model), **options)


def test_misfits_are_refused():
    model = nn.Linear(3, 2)
    optimizer = sgd(model)
    with pytest.raises(ValueError, match="present parameters"):
        BatchNormPreconditioner(nn.Linear(3, 2), optimizer)
    BatchNormPreconditioner(model, optimizer)
    with pytest.raises(ValueError, match="expected an optimiser without a BatchNormPreconditioner"):
        BatchNormPreconditioner(model, optimizer)
    assert len(model._forward_hooks) == 1
    with pytest.raises(Unsuitable, match=r"nn\.Linear or"):
        prepare(nn.LayerNorm(3), Setting(batches=((torch.ones(2, 3), torch.zeros(2)),)))


# -- the network without BatchNorm ----------------------------------------------------------------


class PreActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.norm1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm3, self.head = nn.BatchNorm2d(4), nn.Linear(4, 3, bias=False)

    def forward(self, x):
        x = self.stem(x)
        branch = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return self.head(F.relu(self.norm3(x + branch)).mean((2, 3)))


def test_layers_in_front_of_a_norm_get_the_bias():
    model = PreActivation().double().eval()
    model, norms, biases = take_out_batch_norms(model, torch.randn(3, 2, 5, 5).double())
    assert (norms, biases) == (3, 3)
    for layer in (model.stem, model.conv1, model.conv2):
        assert torch.equal(layer.bias, torch.zeros(4).double())
    assert model.head.bias is None
    assert type(model.norm3) is nn.Identity
    assert not model.norm3.training


def test_an_optimiser_built_before_is_refused():
    model = nn.Sequential(
        nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)
    )
    optimizer = sgd(model)
    setting = Setting(batches=((torch.randn(5, 3), torch.zeros(5)),))
    model = METHOD.prepare(model, setting)
    with pytest.raises(
        ValueError,
        match=r"bn-preconditioning\(optimizer\): expected an optimiser of the model's present "
        r"parameters, got one built before bn-preconditioning changed them; build it after",
    ):
        METHOD.attach(model, optimizer, setting)
    assert not any(module._forward_hooks for module in model.modules())
    METHOD.attach(model, sgd(model), setting)


def test_other_normalisers_stay():
    model = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.GroupNorm(2, 4))
    same, *counts = take_out_batch_norms(model, torch.zeros(2, 2, 4, 4))
    assert same is model
    assert counts == [0, 0]
    assert model[0].bias is None


MODELS = {
    "mlp": ({"depth": 4, "width": 16}, (1, 6, 6)),
    "plain-conv": ({"depth": 5, "width": 8}, (2, 8, 8)),
    "resnet": ({"depth": 8, "width": 8}, (2, 8, 8)),
    "resnet projection": ({"depth": 8, "width": 8, "shortcut": "projection"}, (2, 8, 8)),
    "resnet bottleneck": ({"depth": 11, "width": 8, "block": "bottleneck"}, (2, 8, 8)),
}


@pytest.mark.parametrize("method", [METHOD, GROUP_NORM + METHOD], ids=lambda method: method.label)
@pytest.mark.parametrize("model", MODELS)
def test_contract(model, method):
    options, shape = MODELS[model]
    case = MethodCase(
        method=method,
        make_model=lambda: build_model(model.split()[0], shape, 4, **options),
        inputs=torch.randn(12, *shape, generator=torch.Generator().manual_seed(0)),
        targets=torch.arange(12) % 4,
        num_classes=4,
        lr=0.02,
    )
    for check in METHOD_CHECKS:
        check(case)
    said = []
    Setting(batches=((case.inputs, case.targets),), say=said.append)
    assert not any(
        isinstance(m, nn.modules.batchnorm._BatchNorm) for m in case.prepared().modules()
    )


def test_what_was_done_is_said():
    said = []
    x = torch.randn(4, 1, 6, 6)
    setting = Setting(batches=((x, torch.zeros(4)),), say=said.append, optimizer="adamw")
    model = METHOD.prepare(build_model("mlp", (1, 6, 6), 4, depth=3, width=8), setting)
    METHOD.attach(model, sgd(model), setting)
    assert said[0] == "2 BatchNorm layers were taken out, 2 layers got a bias"
    assert said[1] == "the gradients of 3 layers are preconditioned"
    assert "Adam" in said[2]
