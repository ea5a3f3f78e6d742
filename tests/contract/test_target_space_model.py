"""The model in target space against its sheet's recursion in float64, gradients, state, export."""

import copy
import io
import pickle
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from normlab.weights.target_space_conv import TargetConv2d
from normlab.weights.target_space_layer import TargetLinear
from normlab.weights.target_space_model import TargetSpace
from normlab.weights.target_space_recurrent import TargetRecurrent

SAMPLES = 5
RIDGE = 0.05


def dense(mode="sequential", samples=SAMPLES, project=False, ridge=RIDGE, widths=(3, 4, 4, 2)):
    torch.manual_seed(0)
    layers = []
    for fan_in, fan_out in pairwise(widths):
        layers += [TargetLinear(fan_in, fan_out, samples, ridge=ridge, mode=mode), nn.Tanh()]
    realisation = torch.randn(samples, widths[0], dtype=torch.float64)
    return TargetSpace(nn.Sequential(*layers[:-1]).double(), realisation, project=project)


def convolutional(mode="sequential"):
    torch.manual_seed(0)
    options = {"ridge": RIDGE, "mode": mode}
    model = nn.Sequential(
        TargetConv2d(2, 3, 3, (2, 3, 3), stride=2, padding=1, **options),
        nn.Tanh(),
        TargetConv2d(3, 2, 2, (2, 2, 2), bias=False, **options),
        nn.Tanh(),
        nn.Flatten(),
        TargetLinear(8, 2, 2, **options),
    )
    realisation = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    return TargetSpace(model.double(), realisation, project=False)


def recurrent():
    torch.manual_seed(0)
    model = nn.Sequential(
        TargetRecurrent(2, 3, (3, 4), ridge=RIDGE),
        TargetRecurrent(3, 3, (3, 4), ridge=RIDGE, return_sequences=False),
        TargetLinear(3, 2, 3, ridge=RIDGE),
    )
    return TargetSpace(model.double(), torch.randn(3, 4, 2).double(), project=False)


def oracle(targets, realisation, x, mode="sequential", ridge=RIDGE):
    """The sheet's forward pass of a dense tanh network; also its sums on the realisation."""
    a, b, sums = realisation, x, []
    for number, wanted in enumerate(targets):
        a1, b1 = (torch.cat([z.new_ones(len(z), 1), z], dim=1) for z in (a, b))
        gram = a1.T @ a1 + ridge * torch.eye(a1.shape[1], dtype=a1.dtype)
        w = torch.linalg.inv(gram) @ a1.T @ wanted
        sums.append(a1 @ w)
        last = number == len(targets) - 1
        passed = sums[-1] if mode == "sequential" else wanted
        a, b = passed.tanh(), b1 @ w if last else (b1 @ w).tanh()
    return b, sums


def targets_of(model):
    return [layer.targets.detach() for layer in model.layers()]


@pytest.mark.parametrize("mode", ["sequential", "optimistic"])
@pytest.mark.parametrize("samples", [1, 3, 20])
def test_forward_is_the_recursion(mode, samples):
    model = dense(mode, samples)
    x = torch.randn(7, 3, dtype=torch.float64)
    expected, _ = oracle(targets_of(model), model.realisation, x, mode)
    torch.testing.assert_close(model(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), expected)


@pytest.mark.parametrize("mode", ["sequential", "optimistic"])
@pytest.mark.parametrize("make", [dense, convolutional, lambda mode: recurrent()])
def test_gradients_are_those_of_finite_differences(make, mode):
    model = make(mode)
    names, values = zip(*model.named_parameters(), strict=True)
    x = torch.randn(2, *model.realisation.shape[1:], dtype=torch.float64, requires_grad=True)

    def output(x, *values):
        return functional_call(model, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(output, (x, *values))


def test_gradients_of_gradients():
    model = dense(widths=(3, 2, 1), samples=3)
    names, values = zip(*model.named_parameters(), strict=True)
    x = torch.randn(2, 3, dtype=torch.float64)

    def output(*values):
        return functional_call(model, dict(zip(names, values, strict=True)), (x,)).sum()

    assert torch.autograd.gradgradcheck(output, values)


def test_both_modes_agree_where_targets_are_met():
    # Fewer samples than columns, of full rank, and next to no ridge: every target is met.
    one, two = (dense(mode, samples=4, ridge=1e-12) for mode in ("sequential", "optimistic"))
    x = torch.randn(7, 3, dtype=torch.float64)
    torch.testing.assert_close(one(x), two(x), atol=1e-6, rtol=1e-6)
    wanted = targets_of(one)[-1]
    torch.testing.assert_close(one(one.realisation).detach(), wanted, atol=1e-6, rtol=1e-6)
    one, two = (dense(mode, samples=20) for mode in ("sequential", "optimistic"))
    assert (one(x) - two(x)).abs().max() > 1e-2


@pytest.mark.parametrize("mode", ["sequential", "optimistic"])
def test_projection_goes_on_with_the_weights_solved_again(mode):
    model = dense(mode, samples=20)
    a, expected = model.realisation, []
    for wanted in targets_of(model):
        a1 = torch.cat([a.new_ones(len(a), 1), a], dim=1)
        gram = a1.T @ a1 + RIDGE * torch.eye(a1.shape[1], dtype=a1.dtype)
        hat = a1 @ torch.linalg.inv(gram) @ a1.T
        expected.append(hat @ wanted)
        a = (hat @ expected[-1]).tanh()
    model.project()
    for found, right in zip(targets_of(model), expected, strict=True):
        torch.testing.assert_close(found, right)


def test_a_second_projection_changes_less():
    model = dense(samples=20)
    changes = []
    for _ in range(2):
        before = [targets.clone() for targets in targets_of(model)]
        model.project()
        pairs = zip(targets_of(model), before, strict=True)
        changes.append(sum((now - then).square().sum() for now, then in pairs))
    assert changes[1] < 0.1 * changes[0]


def test_projected_targets_are_reached_up_to_the_shrinkage_of_the_ridge():
    model = dense(samples=20, project=True, ridge=1e-8)
    _, sums = oracle(targets_of(model), model.realisation, model.realisation, ridge=1e-8)
    for found, reached in zip(targets_of(model), sums, strict=True):
        torch.testing.assert_close(found, reached, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("make", [dense, convolutional, recurrent])
def test_export_computes_the_same_for_any_input(make):
    model = make()
    exported = model.to_weight_space()
    x = torch.randn(9, *model.realisation.shape[1:], dtype=torch.float64)
    torch.testing.assert_close(exported(x), model(x))
    kinds = {type(module).__module__.partition(".")[0] for module in exported.modules()}
    assert "torch" in kinds
    assert not any(isinstance(m, (TargetLinear, TargetConv2d)) for m in exported.modules())
    assert all(parameter.requires_grad for parameter in exported.parameters())
    before = model(x)
    with torch.no_grad():
        for parameter in exported.parameters():
            parameter.add_(1)
    assert torch.equal(model(x), before)
    with torch.no_grad():
        model(x)  # weights are kept from here on
        for parameter in model.to_weight_space().parameters():
            parameter.add_(1)
        torch.testing.assert_close(model(x), before)


def test_one_sample_gives_weights_of_rank_one():
    exported = dense(samples=1).to_weight_space()
    for layer in (exported[0], exported[2], exported[4]):
        assert torch.linalg.matrix_rank(layer.weight) == 1


@pytest.mark.parametrize("training", [True, False])
def test_a_sample_does_not_depend_on_its_batch(training):
    model = convolutional().train(training)
    x = torch.randn(6, 2, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(model(x)[:1], model(x[:1]), atol=1e-12, rtol=1e-12)


class Noisy(nn.Module):
    """Dropout as a module and as a function, and a shortcut."""

    def __init__(self):
        super().__init__()
        self.one, self.two = TargetLinear(3, 3, 6), TargetLinear(3, 2, 6)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        x = x + self.drop(self.one(x).relu_())
        return self.two(F.dropout(x, 0.5, self.training))


def test_dropout_is_off_for_the_realisation_and_on_for_the_batch():
    torch.manual_seed(0)
    model = TargetSpace(Noisy(), torch.randn(6, 3))
    solve, weights = model.model.two.solve, []
    model.model.two.solve = lambda x: weights.append(solve(x)) or weights[-1]
    x = torch.ones(8, 3)
    one, two = model(x), model(x)
    assert torch.equal(weights[0].weight, weights[1].weight)
    assert not torch.equal(one, two)
    assert model.model.drop.training
    model.eval()
    assert torch.equal(model(x), model(x))
    assert torch.equal(weights[0].weight, weights[-1].weight)


def test_an_activation_in_place_leaves_optimistic_targets_alone():
    layers = [
        TargetLinear(3, 4, 5, mode="optimistic"),
        nn.ReLU(inplace=True),
        TargetLinear(4, 2, 5),
    ]
    model = TargetSpace(nn.Sequential(*layers), torch.randn(5, 3))
    before = copy.deepcopy(targets_of(model))
    model(torch.randn(2, 3)).sum().backward()
    for now, then in zip(targets_of(model), before, strict=True):
        assert torch.equal(now, then)


def counted(model):
    """Count the solves of the first layer."""
    layer, calls = model.layers()[0], []
    solve = layer.solve
    layer.solve = lambda x: calls.append(x) or solve(x)
    return calls


def test_weights_are_kept_without_gradients_until_something_changes():
    model, x = dense(project=True).eval(), torch.randn(2, 3, dtype=torch.float64)
    calls = counted(model)

    def solves():
        calls.clear()
        with torch.no_grad():
            found = model(x)
        expected, _ = oracle(targets_of(model), model.realisation, x)
        torch.testing.assert_close(found, expected)
        return len(calls)

    assert solves() == 1
    assert solves() == 0
    layer = model.layers()[1]
    layer.targets.data.mul_(2)  # no version counter sees this
    assert solves() == 1
    assert solves() == 0
    model.realisation[0, 0] += 1
    assert solves() == 1
    state = {name: 3 * tensor for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)
    assert solves() == 1
    model(x).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= parameter.grad
    assert solves() == 1
    calls.clear()
    layer.float64 = not layer.float64
    with torch.no_grad():
        model(x)
    assert len(calls) == 1
    model.float()
    with torch.no_grad():
        assert model(x.float()).dtype == torch.float32
    with torch.inference_mode():
        model(x.float())
    model(x.float()).sum().backward()


def test_copies_and_checkpoints_hold_everything():
    model, x = convolutional(), torch.randn(3, 2, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = convolutional()
    other.realisation.zero_()
    for targets in targets_of(other):
        targets.zero_()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert "realisation" in other.state_dict()
    copies = [other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    assert model._kept is not None
    assert all(one._kept is None for one in copies[1:])
    for one in copies:
        assert torch.equal(one(x), expected)
    with torch.no_grad():
        for targets in targets_of(copies[1]):
            targets.zero_()
    assert torch.equal(model(x), expected)


def test_weights_are_the_same_under_autocast():
    model, x = dense(project=True).float(), torch.randn(4, 3)
    plain = model.to_weight_space()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model.to_weight_space()
        output = model(x)
        assert output.dtype == torch.bfloat16
        assert torch.equal(output, plain(x))
    assert torch.equal(plain[0].weight, mixed[0].weight)
    output.float().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_failing_pass_leaves_the_model_as_it_was():
    model = dense().train()
    model.eval()
    model.model[1].train()
    model.realisation = model.realisation[:, :2]
    with pytest.raises(ValueError, match=r"expected an input of shape \(\*, 3\), got \(5, 2\)"):
        model(torch.randn(2, 3))
    assert all(layer._pass is None and layer._solved is None for layer in model.layers())
    assert [module.training for module in model.model] == [False, True, False, False, False]


@pytest.mark.parametrize(
    ("model", "realisation", "message"),
    [
        (nn.Linear(3, 2), torch.ones(4, 3), "target layers, got Linear without any; convert it"),
        (
            nn.Sequential(TargetLinear(3, 2, 4), nn.BatchNorm1d(2)),
            torch.ones(4, 3),
            "without batch normalisation, got 1; take it out",
        ),
        (TargetLinear(3, 2, 4), torch.ones(0, 3), r"at least one sample.*got shape \(0, 3\)"),
        (TargetLinear(3, 2, 4), torch.ones(5, 3), r"got \(5, 2\); make the layer for this batch"),
        (
            TargetLinear(2, 3, 4),
            torch.ones(4, 5),
            r"TargetLinear\(x\): expected an input of shape \(\*, 2\), got \(4, 5\); make the "
            r"layer for such inputs",
        ),
        (
            TargetRecurrent(2, 3, (4, 7)),
            torch.ones(4, 7, 5),
            r"TargetRecurrent\(x\): expected .* shape \(N, T, 2\), got \(4, 7, 5\); make the layer",
        ),
        (TargetRecurrent(2, 3, (4, 7)), torch.ones(4, 2), r"\(N, T, 2\), got \(4, 2\); make"),
        (
            TargetConv2d(2, 3, 3, (4, 2, 2)),
            torch.ones(4, 5, 4, 4),
            r"TargetConv2d\(x\): expected .* shape \(N, 2, H, W\), got \(4, 5, 4, 4\); make",
        ),
        (
            TargetConv2d(2, 3, 3, (4, 2, 2)),
            torch.ones(2, 4, 4),
            r"\(N, 2, H, W\), got \(2, 4, 4\); make",
        ),
    ],
)
def test_misfits_are_refused(model, realisation, message):
    with pytest.raises(ValueError, match=message):
        TargetSpace(model, realisation)


def test_a_layer_that_the_realisation_misses_is_named():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = TargetLinear(3, 2, 4), TargetLinear(3, 2, 4)

        def forward(self, x):
            return self.one(x) + self.two(x) if self.training else self.one(x)

    model = TargetSpace(Auxiliary(), torch.ones(4, 3))
    model.eval()(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"TargetLinear\(x\): expected weights solved"):
        model.train()(torch.ones(2, 3))


def test_gradient_descent_reaches_a_nonlinear_function():
    torch.manual_seed(0)
    model = dense(samples=20, project=True, widths=(3, 8, 8, 1), ridge=1e-3).float()
    x = torch.randn(64, 3)
    wanted = (x[:, :1] * x[:, 1:2]).tanh()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(100):
        loss = F.mse_loss(model(x), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
