"""Weight rescaling against its sheet's identities in float64, then the contract."""

import copy
import math
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from normlab.method import Setting, Unsuitable
from normlab.optim.weight_rescaling import (
    METHOD,
    WeightRescaler,
    find_scale_free_weights,
    rescale_,
)
from normlab.testing import METHOD_CHECKS, MethodCase
from scale_free_training import OPTIMIZERS, Training

TINY = 1e-30  # torch refuses eps = 0 in training

LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (5, 6)),
    "conv": (lambda: nn.Conv2d(6, 4, 3), (5, 6, 5, 5)),
    "grouped conv": (lambda: nn.Conv1d(6, 4, 3, groups=2), (5, 6, 7)),
    "depth-wise conv": (lambda: nn.Conv2d(4, 4, 3, groups=4), (5, 4, 5, 5)),
    "transposed conv": (lambda: nn.ConvTranspose2d(6, 4, 3), (5, 6, 3, 3)),
    "grouped transposed conv": (lambda: nn.ConvTranspose1d(6, 4, 3, groups=2), (5, 6, 4)),
}
TRACKED = {
    (2, "batch"): nn.BatchNorm1d,
    (3, "batch"): nn.BatchNorm1d,
    (4, "batch"): nn.BatchNorm2d,
    (3, "instance"): partial(nn.InstanceNorm1d, affine=True, track_running_stats=True),
    (4, "instance"): partial(nn.InstanceNorm2d, affine=True, track_running_stats=True),
}


def example(kind):
    """A layer in float64 with inputs."""
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    return make().double(), torch.randn(shape, dtype=torch.float64) + 0.5


def unit_masks(layer, x):
    """The entries of the weight that each output unit depends on, found by differentiating."""
    y = layer(x.abs())
    masks = [
        torch.autograd.grad(y[:, unit].sum(), layer.weight, retain_graph=True)[0] != 0
        for unit in range(y.shape[1])
    ]
    assert torch.stack(masks).sum(0).eq(1).all(), "each entry belongs to one unit"
    return masks


def arguments(layer):
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    return {"conv_groups": getattr(layer, "groups", 1), "transposed": transposed}


def joined(layer, norm):
    return nn.Sequential(layer, norm).double()


def perturb(model):
    """Move every parameter and running statistic off its special value, scales kept positive."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.rand(parameter.shape, generator=generator).to(parameter))
    return model


def rescaler(model, x, optimizer=None, *, granularity="filter", **options):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    found = find_scale_free_weights(model, x, granularity=granularity)
    return WeightRescaler(optimizer, found.weights, **options)


@pytest.mark.parametrize("kind", LAYERS)
def test_each_unit_has_the_target_norm_and_its_direction(kind):
    layer, x = example(kind)
    before = layer.weight.detach().clone()
    scale = rescale_(layer.weight, 2.0, **arguments(layer))
    for unit, mask in enumerate(unit_masks(layer, x)):
        old, new = before[mask], layer.weight.detach()[mask]
        assert new.norm().item() == pytest.approx(2.0, abs=1e-12)
        torch.testing.assert_close(new / 2.0, old / old.norm(), atol=1e-12, rtol=0)
        assert scale[unit].item() == pytest.approx(2.0 / old.norm().item(), rel=1e-12)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("num_groups", [1, 2])
def test_a_group_of_units_has_root_k_times_the_norm(kind, num_groups):
    layer, x = example(kind)
    before = layer.weight.detach().clone()
    rescale_(layer.weight, 1.5, num_groups=num_groups, **arguments(layer))
    masks = unit_masks(layer, x)
    size = len(masks) // num_groups
    for start in range(0, len(masks), size):
        mask = torch.stack(masks[start : start + size]).any(0)
        new, old = layer.weight.detach()[mask], before[mask]
        assert new.norm().item() == pytest.approx(1.5 * math.sqrt(size), abs=1e-12)
        torch.testing.assert_close(new / new.norm(), old / old.norm(), atol=1e-12, rtol=0)


def test_zero_groups_are_left_alone():
    weight = torch.tensor([[0.0, 0.0], [1e-10, 0.0]])
    assert rescale_(weight)[0] == 1
    torch.testing.assert_close(weight, torch.tensor([[0.0, 0.0], [1.0, 0.0]]))


def test_half_precision_is_measured_in_single():
    weight = torch.full((2, 3), 300.0, dtype=torch.float16)  # squares overflow
    rescale_(weight)
    torch.testing.assert_close(weight.float().norm(dim=1), torch.ones(2), atol=1e-3, rtol=0)


@pytest.mark.parametrize("granularity", ["filter", "layer"])
@pytest.mark.parametrize(
    ("kind", "tracked"),
    [
        (kind, tracked)
        for kind, (_, shape) in LAYERS.items()
        for dims, tracked in TRACKED
        if dims == len(shape)
    ],
)
def test_the_function_is_kept_in_training_and_evaluation(kind, granularity, tracked):
    layer, x = example(kind)
    model = perturb(joined(layer, TRACKED[x.dim(), tracked](4, eps=TINY)))
    model(x)
    outputs = copy.deepcopy(model)(x), copy.deepcopy(model).eval()(x)
    weight = layer.weight.detach().clone()
    rescaler(model, x, granularity=granularity, target_norm=3.0).rescale()
    assert (layer.weight - weight).abs().max() > 0.1
    torch.testing.assert_close(copy.deepcopy(model)(x), outputs[0], atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(model.eval()(x), outputs[1], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("norm", ["group", "layer", "rms"])
def test_weight_and_bias_move_jointly_before_group_and_layer_norm(kind, norm):
    layer, x = example(kind)
    shape = layer(x).shape[1:]
    makers = {
        "group": lambda: nn.GroupNorm(2, 4, eps=TINY),
        "layer": lambda: nn.LayerNorm(shape, eps=TINY),
        "rms": lambda: nn.RMSNorm(shape, eps=TINY),
    }
    model = perturb(joined(layer, makers[norm]()))
    y, weight, bias = model(x).detach(), layer.weight.detach().clone(), layer.bias.detach().clone()
    rescaler(model, x, granularity="layer").rescale()
    torch.testing.assert_close(model(x), y, atol=1e-10, rtol=1e-10)

    groups = 2 if norm == "group" else 1
    masks = unit_masks(layer, x)
    for units in torch.arange(4).chunk(groups):
        mask = torch.stack([masks[unit] for unit in units]).any(0)
        factor = math.sqrt(len(units)) / weight[mask].norm()
        torch.testing.assert_close(layer.weight.detach()[mask], factor * weight[mask])
        torch.testing.assert_close(layer.bias.detach()[units], factor * bias[units])

    found = find_scale_free_weights(model, x)
    assert not found.weights
    assert "granularity='layer'" in found.skipped["0"]


def test_scale_free_gradients():
    layer, x = example("conv")
    model = joined(layer, nn.BatchNorm2d(4, eps=TINY))
    targets = torch.randn_like(model(x))

    def gradient():
        loss = (model(x) * targets).sum() + (model(x) ** 3).mean()
        return torch.autograd.grad(loss, layer.weight)[0]

    weight, grad = layer.weight.detach().clone(), gradient()
    assert (weight * grad).sum((1, 2, 3)).abs().max() < 1e-10
    with torch.no_grad():
        layer.weight.mul_(2.5)
    torch.testing.assert_close(gradient(), grad / 2.5, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("rescale_state", [True, False])
@pytest.mark.parametrize(("make", "normalised"), OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_rescaling_with_its_state_and_rate_keeps_the_trajectory(make, normalised, rescale_state):
    plain, rescaled = Training(units=1), Training(units=1)
    expected = plain.directions(make([plain.weight], lr=0.05))
    optimizer = make([rescaled.weight], lr=0.05)
    weights = rescaler(
        rescaled.model, rescaled.x, optimizer, target_norm=2.0, every=10**6,
        rescale_state=rescale_state,
    )  # fmt: skip
    first = rescaled.directions(optimizer, 4)
    rho = rescaled.weight.norm().item() / 2.0
    weights.rescale()
    optimizer.param_groups[0]["lr"] /= rho if normalised else rho**2
    actual = torch.cat([first, rescaled.directions(optimizer, 4)])
    difference = (actual - expected).abs().max()
    assert difference < 1e-9 if rescale_state else difference > 1e-4


def test_joint_moments_of_the_bias_are_rescaled():
    torch.manual_seed(2)
    model = joined(nn.Linear(3, 4), nn.GroupNorm(2, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(5, 3, dtype=torch.float64)
    (model(x) ** 3).sum().backward()
    optimizer.step()
    bias, weight = model[0].bias, model[0].weight
    kept = optimizer.state[bias]["momentum_buffer"].clone()
    norms = torch.stack([part.norm() for part in weight.detach().chunk(2)])
    rescaler(model, x, optimizer, granularity="layer", rescale_state=True).rescale()
    rho = (norms / math.sqrt(2)).repeat_interleave(2)
    torch.testing.assert_close(optimizer.state[bias]["momentum_buffer"], kept * rho)


def test_directions_at_equal_effective_rates_do_not_depend_on_the_target():
    runs = []
    for target in (1.0, 4.0):
        run = Training()
        rescale_(run.weight, target)
        optimizer = torch.optim.SGD([run.weight], lr=0.05 * target**2)
        rescaler(run.model, run.x, optimizer, target_norm=target)
        runs.append(run.directions(optimizer))
    torch.testing.assert_close(runs[0], runs[1], atol=1e-10, rtol=0)


def test_old_weights_in_silent_columns_decay_by_the_norms():
    run = Training(zero_columns=2)
    rescale_(run.weight)
    start = run.weight.detach()[:, 4:].clone()
    optimizer = torch.optim.SGD([run.weight], lr=0.2)
    product = torch.ones(4, 1, dtype=torch.float64)
    norms = []
    optimizer.register_step_post_hook(lambda *_: norms.append(run.weight.detach().norm(dim=1)))
    rescaler(run.model, run.x, optimizer)
    for _ in range(10):
        run.step(optimizer)
        product /= norms[-1].unsqueeze(1)
    assert product.max() < 0.99
    torch.testing.assert_close(run.weight.detach()[:, 4:], start * product, atol=1e-13, rtol=1e-10)


def test_initial_norms_as_targets():
    run = Training()
    start = run.weight.detach().clone()
    optimizer = torch.optim.SGD([run.weight], lr=0.5)
    rescaler(run.model, run.x, optimizer, target_norm="init").rescale()
    assert torch.equal(run.weight, start)
    run.step(optimizer)
    torch.testing.assert_close(run.weight.detach().norm(dim=1), start.norm(dim=1))
    assert not torch.allclose(run.weight, start)


def test_threshold_makes_the_target_an_upper_bound():
    run = Training()
    with torch.no_grad():
        run.weight.mul_(torch.tensor([[1.0], [10.0], [1.0], [10.0]]))
    before = run.weight.detach().clone()
    rescaler(run.model, run.x, target_norm=2.0, threshold=1.0).rescale()
    assert torch.equal(run.weight[::2], before[::2])
    assert run.weight.detach().norm(dim=1)[1::2].tolist() == pytest.approx([2.0, 2.0])


def test_every_counts_steps_and_the_count_is_saved():
    run = Training()
    optimizer = torch.optim.SGD([run.weight], lr=0.5)
    rescaler(run.model, run.x, optimizer, every=3)
    for step in range(1, 8):
        run.step(optimizer)
        at_target = torch.allclose(run.weight.norm(dim=1), torch.ones(4, dtype=torch.float64))
        assert at_target == (step % 3 == 0)
    fresh = torch.optim.SGD([run.weight], lr=0.5)
    rescaler(run.model, run.x, fresh, every=3)
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.state_dict()["param_groups"][0]["weight_rescaling"]["step"] == 7
    for _ in range(2):
        run.step(fresh)
    torch.testing.assert_close(run.weight.detach().norm(dim=1), torch.ones(4, dtype=torch.float64))


def test_a_checkpoint_without_rescaling_starts_the_count():
    run = Training()
    plain = torch.optim.SGD([run.weight], lr=0.5)
    optimizer = torch.optim.SGD([run.weight], lr=0.5)
    rescaler(run.model, run.x, optimizer)
    optimizer.load_state_dict(plain.state_dict())
    run.step(optimizer)
    torch.testing.assert_close(run.weight.detach().norm(dim=1), torch.ones(4, dtype=torch.float64))


def test_removing_stops():
    run = Training()
    optimizer = torch.optim.SGD([run.weight], lr=0.5)
    rescaler(run.model, run.x, optimizer).remove()
    run.step(optimizer)
    assert not torch.allclose(run.weight.norm(dim=1), torch.ones(4, dtype=torch.float64))
    rescaler(run.model, run.x, optimizer)  # a second one is welcome then


def test_two_runs_are_equal_to_the_bit():
    runs = []
    for _ in range(2):
        run = Training()
        optimizer = torch.optim.SGD([run.weight], lr=0.1, momentum=0.9)
        rescaler(run.model, run.x, optimizer)
        run.directions(optimizer, 5)
        runs.append(run.weight.detach())
    assert torch.equal(*runs)


def test_decay_on_rescaled_weights_warns():
    run = Training()
    with pytest.warns(UserWarning, match="weight decay is set on 0"):
        rescaler(run.model, run.x, torch.optim.SGD([run.weight], lr=0.1, weight_decay=1e-4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rescaler(run.model, run.x)


def refused(**options):
    run = Training()
    optimizer = options.pop("optimizer", torch.optim.SGD)([run.weight], lr=0.1)
    rescaler(run.model, run.x, optimizer, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"target_norm": 0.0},
        {"target_norm": math.nan},
        {"target_norm": "unit"},
        {"every": 0},
        {"every": 1.5},
        {"every": "2"},
        {"threshold": -1.0},
        {"threshold": "x"},
        {"granularity": "row"},
        {"rescale_state": True, "optimizer": torch.optim.RMSprop},
    ],
    ids=str,
)
def test_wrong_options_are_refused(options):
    with pytest.raises(ValueError, match=r"\): expected .*, got .*; "):
        refused(**options)


@pytest.mark.parametrize(
    "options",
    [{"target_norm": 0.0}, {"target_norm": -1.0}, {"num_groups": 3}, {"num_groups": 0}],
    ids=str,
)
def test_wrong_norms_and_groups_are_refused(options):
    with pytest.raises(ValueError, match=r"rescale_\(.*\): expected .*, got .*; give"):
        rescale_(torch.ones(4, 2), **options)


def test_a_second_rescaler_is_refused():
    run = Training()
    optimizer = torch.optim.SGD([run.weight], lr=0.1)
    rescaler(run.model, run.x, optimizer)
    with pytest.raises(ValueError, match="without a WeightRescaler"):
        rescaler(run.model, run.x, optimizer)


class Mixed(nn.Module):
    """A residual network with something of everything."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.branch = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.added = nn.Conv2d(4, 4, 1)
        self.added_bn = nn.BatchNorm2d(4)
        self.activated = nn.Conv2d(4, 4, 1)
        self.activated_bn = nn.BatchNorm2d(4)
        self.one, self.two, self.both = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.frozen, self.frozen_bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.frozen.weight.requires_grad_(False)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))
        self.grouped, self.group_norm = nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4)
        self.unused = nn.Linear(4, 4)
        self.tokens, self.positions = nn.Linear(4, 4), nn.BatchNorm1d(2)
        self.fc = nn.Linear(4, 2)
        self.out = nn.ReLU()

    def forward(self, x):
        x = torch.relu(self.bn(self.stem(x)))
        x = self.depthwise(x + self.branch(x))
        y = self.added(x)
        x = self.out(self.added_bn(y) + y)
        y = self.activated(x)
        x = self.activated_bn(y) * torch.relu(y)
        x = self.both(self.one(x)) * self.both(self.two(x))
        x = self.group_norm(self.grouped(self.normed(self.frozen_bn(self.frozen(x)))))
        x = self.positions(self.tokens(x.mean((2, 3)).unsqueeze(1).expand(-1, 2, -1)))
        return self.fc(x.mean(1))


def test_the_finder_takes_what_is_free_of_scale_and_says_why_not():
    torch.manual_seed(0)
    found = find_scale_free_weights(Mixed(), torch.randn(2, 3, 4, 4))
    assert [weight.name for weight in found.weights] == ["stem", "branch.0"]
    matters = "the outputs change with its scale"
    together = "its units are free of scale only together: use granularity='layer'"
    assert found.skipped == {
        "depthwise": matters,
        "added": matters,
        "activated": together,
        "one": "its normaliser serves another layer, too",
        "two": "its normaliser serves another layer, too",
        "frozen": "it is frozen",
        "normed": "its weight is re-parametrised",
        "grouped": together,
        "unused": "it is not called",
        "tokens": "its output units are not the channels of the normaliser",
        "fc": matters,
    }


def test_whole_layers_whose_scale_is_lost_further_on_are_told_apart_by_running_statistics():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 4)
    found = find_scale_free_weights(Mixed(), x, granularity="layer")
    assert {weight.name for weight in found.weights} == {"stem", "branch.0", "grouped"}
    assert found.skipped["tokens"] == "its output units are not the channels of the normaliser"
    cannot = "running statistics further on cannot move along"
    assert found.skipped["activated"] == cannot
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 4)
    assert find_scale_free_weights(Mixed(), x).skipped["activated"] == cannot


class Kernel(nn.Module):
    """A layer of nobody else's: the weight has another name, and the norm is a function."""

    def __init__(self, norm):
        super().__init__()
        self.kernel, self.norm = nn.Parameter(torch.randn(4, 3)), norm

    def forward(self, x):
        return self.norm(nn.functional.linear(x, self.kernel))


class OwnNorm(nn.Module):
    def forward(self, x):
        return x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()


OWN = {
    "own module": (OwnNorm(), "layer", 1),
    "function over features": (lambda y: nn.functional.layer_norm(y, (4,)), "layer", 1),
    "function over groups": (
        lambda y: nn.functional.group_norm(10 * y.repeat(1, 3), 6),
        "layer",
        1,
    ),
    "function over the batch": (lambda y: (y - y.mean(0)) / y.std(0), "filter", 4),
    "behind a ReLU": (
        nn.Sequential(nn.ReLU(), nn.BatchNorm1d(4, track_running_stats=False)),
        "filter",
        4,
    ),
    "direction of each sample": (nn.functional.normalize, "layer", 1),
}


@pytest.mark.parametrize(("norm", "granularity", "groups"), OWN.values(), ids=OWN)
def test_normalisers_of_any_kind_are_understood(norm, granularity, groups):
    torch.manual_seed(0)
    model = nn.Sequential(Kernel(norm), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    x = torch.randn(6, 3)
    expected = model(x)
    found = find_scale_free_weights(model, x, granularity=granularity)
    assert [(weight.name, weight.num_groups) for weight in found.weights] == [("0.kernel", groups)]
    assert found.skipped == {"3": "the outputs change with its scale"}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    WeightRescaler(optimizer, found.weights, target_norm=20.0).rescale()
    torch.testing.assert_close(model(x), expected, atol=1e-2, rtol=1e-2)


def test_statistics_that_lie_behind_an_activation_keep_a_weight_from_moving():
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.BatchNorm1d(4))
    found = find_scale_free_weights(model, torch.randn(6, 3))
    assert found.skipped == {"0": "running statistics further on cannot move along"}


def test_looking_changes_nothing():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    model[1].eval()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    found = find_scale_free_weights(model, torch.randn(2, 3, generator=torch.Generator()))
    assert [weight.name for weight in found.weights] == ["0"]
    assert torch.equal(torch.rand(3), expected)
    assert modes == [m.training for m in model.modules()]
    assert all(p.grad is None for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_shared_weights_are_rescaled_once():
    torch.manual_seed(3)
    conv = nn.Conv1d(3, 3, 1)
    norms = [nn.BatchNorm1d(3, eps=TINY), nn.BatchNorm1d(3, eps=TINY)]
    model = perturb(nn.Sequential(conv, norms[0], nn.ReLU(), conv, norms[1]).double())
    x = torch.randn(6, 3, 4, dtype=torch.float64)
    model(x)
    expected = copy.deepcopy(model).eval()(x)
    found = find_scale_free_weights(model, x)
    assert len(found.weights) == 1
    rescaler(model, x, target_norm=2.0).rescale()
    torch.testing.assert_close(model.eval()(x), expected)

    tied = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    tied[2].weight = tied[0].weight
    assert len(find_scale_free_weights(tied, torch.randn(4, 3)).weights) == 1
    head = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    head[2].weight = head[0].weight
    assert not find_scale_free_weights(head, torch.randn(4, 3)).weights


def test_weights_outside_the_optimiser_are_left_alone():
    model = nn.Sequential(
        nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 3), nn.BatchNorm1d(3)
    )
    before = model[0].weight.detach().clone()
    optimizer = torch.optim.SGD(model[3].parameters(), lr=0.1)
    rescaler(model, torch.randn(4, 3), optimizer).rescale()
    assert torch.equal(model[0].weight, before)
    torch.testing.assert_close(model[3].weight.detach().norm(dim=1), torch.ones(3))


def network():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 6, 2, groups=2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )


def group_network():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)
    )


def bound(**options):
    """The method with options that no command line can give it yet bound by hand."""
    return replace(METHOD, attach=partial(METHOD.attach, **options))


def case(method, make_model=network):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(8, 2, 5, 5, generator=generator)
    return MethodCase(method, make_model, inputs, torch.arange(8) % 3, num_classes=3)


CASES = {
    "unit norm": case(METHOD),
    "initial norms, every other step": case(bound(target_norm="init", every=2)),
    "layers": case(METHOD.with_options(granularity="layer", every=2, rescale_state=True)),
    "group norm": case(METHOD.with_options(granularity="layer"), group_network),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("check", METHOD_CHECKS, ids=lambda check: check.__name__)
def test_contract(check, case):
    check(case)


def test_initial_norms_survive_a_checkpoint_on_disk(tmp_path):
    one = case(bound(target_norm="init"))
    model = one.prepared().train()
    norms = model[0].weight.detach().flatten(1).norm(dim=1)
    optimizer = one.optimizer(model)
    one.step(model, optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    with torch.no_grad():
        model[0].weight.mul_(3)  # a resumed process meets other weights when it attaches
    resumed = one.optimizer(model)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    one.step(model, resumed)
    torch.testing.assert_close(model[0].weight.detach().flatten(1).norm(dim=1), norms)


def test_the_method_frees_rescaled_weights_of_decay_and_says_what_it_skips():
    said = []
    model = network()
    setting = Setting(batches=((torch.randn(4, 2, 5, 5), torch.zeros(4)),), say=said.append)
    groups = [{"params": list(model.parameters()), "lr": 0.1, "weight_decay": 1e-4}]
    groups = METHOD.parameter_groups(groups, model, setting)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert [decay[id(p)] for p in model.parameters()] == [0, *[1e-4] * 3, 0, *[1e-4] * 5]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        METHOD.attach(model, torch.optim.SGD(groups), setting)
    assert said == [
        "2 weights are rescaled by filter",
        "not rescaled, because the outputs change with its scale: 8",
    ]


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (nn.Sequential(nn.Conv2d(2, 2, 5), nn.Flatten()), "0: the outputs change"),
        (group_network(), "granularity='layer'"),
        (nn.Flatten(), "there is no such layer"),
    ],
)
def test_models_without_scale_free_weights_are_unsuitable(model, why):
    setting = Setting(batches=((torch.randn(4, 2, 5, 5), torch.zeros(4)),))
    with pytest.raises(Unsuitable, match=why):
        METHOD.prepare(model, setting)
