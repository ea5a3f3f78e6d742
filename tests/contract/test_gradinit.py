"""GradInit, against the iteration written out in float64 with the scales as variables."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normlab.catalog import METHODS
from normlab.inits.gradinit import METHOD, GradInit, gradinit
from normlab.inits.gradinit_steps import ScaleAdam, halves_of, joined
from normlab.lab.models import build_model
from normlab.method import Setting, Unsuitable
from normlab.norms import none
from normlab.testing import METHOD_CHECKS, MethodCase


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def mlp_logits(parameters, x):
    one, two, three, four = parameters
    return torch.tanh(x @ one.T + two) @ three.T + four


def conv():
    torch.manual_seed(1)
    layers = nn.Conv2d(1, 2, 2, bias=False), nn.BatchNorm2d(2), nn.Dropout(0.5), nn.Flatten()
    model = nn.Sequential(*layers, nn.Linear(8, 4)).double()
    nn.init.uniform_(model[1].bias, 0.02, 0.05)
    return model


def conv_logits(parameters, x):
    kernel, scale, shift, weight, last = parameters
    y = F.conv2d(x, kernel)
    mean = y.mean((0, 2, 3), keepdim=True)
    variance = (y - mean).square().mean((0, 2, 3), keepdim=True)
    y = (y - mean) / torch.sqrt(variance + 1e-5)
    y = scale.view(-1, 1, 1) * y + shift.view(-1, 1, 1)
    return y.flatten(1) @ weight.T + last


# The module, the same by hand, the shape of a sample, and which of the tensors are biases.
NETS = {"mlp": (mlp, mlp_logits, (3,), (1, 3)), "conv": (conv, conv_logits, (1, 3, 3), (2, 4))}


def data(shape, count=12, seed=5):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, *shape, dtype=torch.float64, generator=generator)
    return [(inputs[i : i + 4], torch.arange(4) % 4) for i in range(0, count, 4)]


def by_hand(net, halves, steps, options):
    """Return the scales after each step: the sheet's iteration, one tensor at a time."""
    make, logits, _, biases = NETS[net]
    start = [parameter.detach().clone() for parameter in make().parameters()]
    chosen = {
        "optimizer": "sgd", "lr": 0.1, "scale_lr": 1e-2, "max_norm": 1.0, "min_scale": 0.01,
        "min_bias_scale": 0.0, "max_scale": math.inf, "clip": 1.0, "betas": (0.9, 0.999),
        "second_order": False, "normalize_grad": True, "shared_second_moment": True,
    } | options  # fmt: skip
    one, two = chosen["betas"]
    adam = chosen["optimizer"] == "adam"
    m = [1.0] * len(start)
    mean = {kind: [0.0] * len(start) for kind in "oc"}
    square = {kind: [0.0] * len(start) for kind in "oc"}
    count = {"o": 0, "c": 0}
    history = []
    turn = iter(halves * 1000)
    for _ in range(steps):
        scales = [torch.tensor(s, dtype=torch.float64, requires_grad=True) for s in m]
        tensors = [s * w for s, w in zip(scales, start, strict=True)]
        b0, b1 = next(turn), next(turn)
        loss = F.cross_entropy(
            logits(tensors, torch.cat([b0[0], b1[0]])), torch.cat([b0[1], b1[1]])
        )
        g = torch.autograd.grad(loss, tensors, create_graph=True)
        if adam:
            norm = sum(one.abs().sum() for one in g)
        else:
            norm = sum(one.square().sum() for one in g).sqrt()
        if norm > chosen["max_norm"]:
            kind, value = "c", norm
        else:
            kind = "o"
            if adam:
                step = [one.sign() for one in g]
            else:
                step = [one / norm if chosen["normalize_grad"] else one for one in g]
            if not chosen["second_order"]:
                step = [one.detach() for one in step]
            after = [t - chosen["lr"] * s for t, s in zip(tensors, step, strict=True)]
            b2 = next(turn)
            value = (
                F.cross_entropy(logits(after, torch.cat([b0[0], b2[0]])), torch.cat([b0[1], b2[1]]))
                / chosen["lr"]
            )
        slopes = torch.autograd.grad(value, scales, allow_unused=True)
        count[kind] += 1
        place = "o" if chosen["shared_second_moment"] else kind
        square_count = sum(count.values()) if chosen["shared_second_moment"] else count[kind]
        for i, slope in enumerate(slopes):
            if m[i] * start[i].norm() == 0:
                continue
            slope = 0.0 if slope is None else slope.item()
            slope = min(max(slope, -chosen["clip"]), chosen["clip"])
            mean[kind][i] = one * mean[kind][i] + (1 - one) * slope
            square[place][i] = two * square[place][i] + (1 - two) * slope**2
            up = mean[kind][i] / (1 - one ** count[kind])
            down = math.sqrt(square[place][i] / (1 - two**square_count)) + 1e-8
            least = chosen["min_bias_scale" if i in biases else "min_scale"]
            m[i] = min(max(m[i] - chosen["scale_lr"] * up / down, least), chosen["max_scale"])
        history.append(list(m))
    return history, count


OPTIONS = {
    "sgd": {},
    "sgd, both kinds": {"max_norm": 0.3, "scale_lr": 0.03},
    "plain step": {"normalize_grad": False, "lr": 0.5},
    "second order": {"second_order": True, "max_norm": math.inf},
    "second order, plain step": {"second_order": True, "normalize_grad": False, "max_norm": 10.0},
    "adam": {"optimizer": "adam", "lr": 1e-2, "max_norm": 5.0},
    "adam, both kinds": {"optimizer": "adam", "lr": 1e-2, "max_norm": 1.5, "scale_lr": 0.03},
    "two second moments": {"max_norm": 0.3, "scale_lr": 0.03, "shared_second_moment": False},
    "lower bounds": {"scale_lr": 0.2, "min_scale": 0.7, "min_bias_scale": 0.5},
    "an upper bound": {"scale_lr": 0.3, "max_norm": 0.0, "clip": math.inf, "max_scale": 1.2},
    "clip": {"clip": 1e-3, "betas": (0.5, 0.9), "max_norm": 0.3},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("net", NETS)
def test_scales_equal_the_iteration_by_hand(net, options):
    model = NETS[net][0]()
    start = [parameter.detach().clone() for parameter in model.parameters()]
    halves = data(NETS[net][2], 20)
    expected, counts = by_hand(net, halves, 25, options)
    learner = GradInit(model, **options)
    turn = iter(halves * 1000)
    for number, row in enumerate(expected, start=1):
        learner.run(turn, number)
        torch.testing.assert_close(list(learner.scales.values()), row, atol=1e-10, rtol=1e-9)
    assert learner.counts == (counts["o"], counts["c"])
    assert learner.num_halves == 3 * counts["o"] + 2 * counts["c"]
    assert all(torch.equal(*pair) for pair in zip(start, model.parameters(), strict=True))
    scales = learner.finish()
    for scale, old, new in zip(scales.values(), start, model.parameters(), strict=True):
        assert torch.equal(new, old * scale)


def test_the_options_above_reach_what_they_are_for():
    for name in ("sgd, both kinds", "adam, both kinds", "two second moments", "clip"):
        _, counts = by_hand("mlp", data((3,), 20), 25, OPTIONS[name])
        assert min(counts.values()) >= 3, name
    rows, _ = by_hand("mlp", data((3,), 20), 25, OPTIONS["an upper bound"])
    assert {0.0, 1.2} <= set(rows[-1])  # a bias at 0 stays there
    rows, _ = by_hand("mlp", data((3,), 20), 25, OPTIONS["lower bounds"])
    assert {0.5, 0.7} <= set(rows[-1])


def test_a_scale_that_reached_zero_stays_and_one_at_a_bound_goes_on():
    adam = ScaleAdam(
        torch.tensor([0.0, 0.5]), 9.0, lr=1.0, betas=(0.5, 0.5), eps=0.0, shared_second_moment=True
    )
    adam.step(torch.ones(2), "objective")
    assert adam.scales.tolist() == [0.0, 0.5]
    for _ in range(3):
        adam.step(-torch.ones(2), "objective")
    assert adam.scales[0] == 0.0
    assert adam.scales[1] > 1.0


def test_autocast_and_no_grad_around_it_change_nothing():
    batch = tokens()
    plain = GradInit(everything()).measure(batch)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert GradInit(everything()).measure(batch) == plain


def test_halves_come_in_order_and_a_constraint_step_leaves_the_third():
    drawn = []
    halves = data((3,), 24)

    def turn():
        for number, half in enumerate(halves * 10):
            drawn.append(number)
            yield half

    source = turn()
    kinds = []
    GradInit(mlp(), max_norm=0.0).run(source, 2, lambda step: kinds.append(step.kind))
    assert (kinds, drawn) == (["constraint"] * 2, [0, 1, 2, 3])
    GradInit(mlp(), max_norm=math.inf).run(source, 2, lambda step: kinds.append(step.kind))
    assert (kinds[2:], drawn[4:]) == (["objective"] * 2, [4, 5, 6, 7, 8, 9])
    # A third half that is given, not drawn, is as good.
    one, two = GradInit(mlp()), GradInit(mlp())
    one.step(*halves[:3])
    two.run(iter(halves), 1)
    assert one.scales == two.scales


def test_one_weight_moves_against_the_closed_form():
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, 3.0)
    x, y = torch.full((4, 1), 0.5, dtype=torch.float64), torch.full((4, 1), 1.0).double()

    def loss(outputs, targets):
        return 0.5 * (outputs - targets).square().mean()

    learner = GradInit(model, loss, max_norm=math.inf, lr=0.1, scale_lr=0.02, clip=math.inf)
    for number in range(1, 4):
        m = learner.scales["weight"]
        # d/dm (w' x - y)^2 / 2 with w' = 3 m - 0.1 sign, over a rate that Adam cancels.
        step = 0.1 * math.copysign(1, 3 * m * 0.5 - 1)
        slope = ((3 * m - step) * 0.5 - 1) * 0.5 * 3
        learner.step((x, y), (x, y), (x, y))
        assert math.copysign(1, m - learner.scales["weight"]) == math.copysign(1, slope)
        if number == 1:
            assert learner.scales["weight"] == pytest.approx(1 - 0.02)


def norm_of(model, order, batch):
    loss = F.cross_entropy(model(batch[0]), batch[1])
    found = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([one.flatten() for one in found]).norm(order).item()


@pytest.mark.parametrize(("optimizer", "order"), [("sgd", 2), ("adam", 1)])
def test_a_bound_of_zero_lowers_the_gradient_norm(optimizer, order):
    model = mlp()
    batch = joined(*data((3,), 8))
    before = norm_of(model, order, batch)
    report = gradinit(
        model, [batch], num_steps=40, scale_lr=0.05, max_norm=0.0, optimizer=optimizer
    )
    after = norm_of(model, order, batch)
    assert report.gradient_norm == pytest.approx((before, after))
    assert (report.constraint_steps, report.objective_steps, report.order) == (40, 0, order)
    assert after < 0.5 * before


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("seed", range(4))
def test_a_badly_scaled_net_has_a_lower_loss_after_its_first_real_step(optimizer, seed):
    batch = joined(*data((3,), 8))
    losses = []
    for helped in (False, True):
        model = mlp(seed)
        with torch.no_grad():
            for layer in (model[0], model[2]):
                layer.weight.mul_(10)
        if helped:
            gradinit(model, [batch], optimizer=optimizer, lr=0.05, scale_lr=0.05, num_steps=60)
        kind = torch.optim.SGD if optimizer == "sgd" else torch.optim.Adam
        real = kind(model.parameters(), lr=0.05)
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        real.step()
        losses.append(F.cross_entropy(model(batch[0]), batch[1]).item())
    assert losses[1] < losses[0]


def test_adams_trial_step_is_the_first_step_of_adam():
    model = mlp()
    learner = GradInit(model, optimizer="adamw", lr=1e-2)
    batch = joined(*data((3,), 8))
    tensors = learner._scaled()
    _, found = learner._gradient(tensors, batch)
    moved = learner._moved(tensors, found, torch.tensor(1.0))
    real = torch.optim.Adam(model.parameters(), lr=1e-2, eps=1e-30)
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    real.step()
    for one, two in zip(moved.values(), model.parameters(), strict=True):
        torch.testing.assert_close(one, two)


class Everything(nn.Module):
    """Convolution, several normalisers, attention, dropout, tied and zero tensors, a buffer."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.5, batch_first=True)
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(4)
        self.instance = nn.InstanceNorm1d(3, track_running_stats=True)
        self.group = nn.GroupNorm(1, 4)
        self.conv = nn.Conv1d(4, 4, 2)
        self.frozen = nn.Parameter(torch.full((4,), 0.5), requires_grad=False)
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(4, 3)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens, *, offset=None):
        x = self.encoder(self.embedding(tokens))
        x = self.instance(self.second(torch.tanh(self.first(x))))
        x = self.group(torch.relu(self.conv(x.transpose(1, 2)))).mean(2)
        x = self.norm(x) * self.frozen + (0 if offset is None else offset)
        return self.head(x)


def everything():
    torch.manual_seed(3)
    model = Everything()
    model.encoder.dropout.eval()  # a mode of its own, which must be kept
    return model


def tokens(count=12):
    generator = torch.Generator().manual_seed(2)
    return torch.randint(6, (count, 3), generator=generator), torch.arange(count) % 3


def facts(model):
    state = {name: one.clone() for name, one in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    return state, modes, [one.grad for one in model.parameters()], torch.get_rng_state()


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("max_norm", [0.0, math.inf], ids=["constraint", "objective"])
def test_steps_leave_the_model_as_it_was(optimizer, max_norm):
    model = everything()
    before = facts(model)
    learner = GradInit(model, optimizer=optimizer, max_norm=max_norm)
    with torch.no_grad(), torch.autocast("cpu"):
        learner.run(halves_of([tokens()]), 3)
    after = facts(model)
    for name, one in before[0].items():
        assert torch.equal(one, after[0][name]), name
    assert before[1:3] == after[1:3]
    assert torch.equal(before[3], after[3])
    assert all(one.requires_grad != (one is model.frozen) for one in model.parameters())
    values = learner.scales
    assert "second.weight" not in values
    assert "frozen" not in values
    assert "head.bias" not in values  # it is zero
    assert values["unused.weight"] == 1.0  # nothing depends on it
    moved = [scale for name, scale in values.items() if "unused" not in name]
    # A bias in front of a normaliser may move by rounding noise or not at all.
    assert sum(scale != 1.0 for scale in moved) > 0.7 * len(moved)
    learner.finish()
    scaled = model.state_dict()
    for name, one in before[0].items():
        factor = values.get(name.replace("second", "first"), 1)
        assert torch.equal(scaled[name], one * factor if one.is_floating_point() else one), name


def test_modes_come_back_where_a_step_fails():
    model = everything()
    before = facts(model)
    learner = GradInit(model)
    with pytest.raises(RuntimeError):
        learner.step((torch.zeros(2, 3), torch.arange(2)), tokens(2), tokens(2))
    assert facts(model)[1] == before[1]
    assert learner.num_steps == 0


def test_dropout_is_off_and_batch_statistics_are_on():
    seen = []
    model = conv()
    for layer in model:
        layer.register_forward_hook(
            lambda layer, *_: seen.append((layer.__class__, layer.training))
        )
    GradInit(model).measure(joined(*data((1, 3, 3), 8)))
    assert {kind for kind, training in seen if training} == {nn.BatchNorm2d}
    seen.clear()
    GradInit(model, normalisers=(nn.Dropout,)).measure(joined(*data((1, 3, 3), 8)))
    assert {kind for kind, training in seen if training} == {nn.BatchNorm2d, nn.Dropout}


def test_other_layers_with_running_statistics_use_those_of_the_batch():
    model = everything()
    seen = []
    model.instance.register_forward_hook(lambda layer, *_: seen.append(layer.training))
    GradInit(model).measure(tokens())
    assert seen == [True]


BY_THE_BATCH = [
    one.with_options(drop_prob=0.0) if "drop_prob" in one.defaults() else one
    for one in METHODS
    if one.card.batch_statistics
]


@pytest.mark.parametrize("model", ["mlp", "resnet"])
@pytest.mark.parametrize("method", BY_THE_BATCH, ids=lambda method: method.label)
def test_scales_are_learnt_for_the_function_of_training(method, model):
    one = case(model, method)
    prepared = one.prepared()
    outputs = copy.deepcopy(prepared).train()(one.inputs)
    loss = F.cross_entropy(outputs, one.targets).item()
    before = facts(prepared)
    learner = GradInit(prepared)
    learner.run(halves_of([(one.inputs, one.targets)]), 1)
    assert learner.scales != dict.fromkeys(learner.scales, 1.0)
    found, _ = GradInit(prepared).measure((one.inputs, one.targets))
    assert found == pytest.approx(loss, rel=1e-5)
    after = facts(prepared)
    assert all(torch.equal(value, after[0][name]) for name, value in before[0].items())
    assert before[1] == after[1]


def test_inputs_may_be_arguments_or_named():
    inputs, targets = tokens()
    offset = torch.ones(12, 1)
    plain = GradInit(everything()).measure((inputs, targets))
    assert GradInit(everything()).measure(((inputs,), targets)) == plain
    named = {"tokens": inputs, "offset": 0 * offset}
    assert GradInit(everything()).measure((named, targets)) == plain
    learner = GradInit(everything())
    learner.run(halves_of([[{"tokens": inputs, "offset": offset}, targets]]), 2)
    assert learner.measure(({"tokens": inputs, "offset": offset}, targets)) != plain


def test_no_steps_change_nothing():
    model = everything()
    before = facts(model)
    report = gradinit(model, [tokens()], num_steps=0)
    after = facts(model)
    assert all(torch.equal(one, after[0][name]) for name, one in before[0].items())
    assert set(report.scales.values()) == {1.0}
    assert report.loss[0] == report.loss[1]


def test_excluded_parameters_are_not_scaled_but_take_part():
    halves = data((3,), 20)
    model = mlp()
    learner = GradInit(model, exclude=["0", "2.bias"])
    seen = []
    learner.run(iter(halves), 1, seen.append)
    assert list(learner.scales) == ["2.weight"]
    expected, _ = by_hand("mlp", halves, 1, {})
    assert learner.scales["2.weight"] == pytest.approx(expected[0][2], abs=1e-12)
    assert seen[0].gradient_norm == pytest.approx(norm_of(mlp(), 2, joined(*halves[:2])))
    tied = GradInit(everything(), exclude=["second"])
    assert "first.weight" not in tied.scales


def test_half_precision_is_scaled_by_passes_in_float32():
    torch.manual_seed(0)
    layers = nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4)
    wide = nn.Sequential(*layers).bfloat16().float()
    half = copy.deepcopy(wide).bfloat16()
    batches = [(x.bfloat16(), y) for x, y in data((3,), 8)]
    one = gradinit(half, batches, num_steps=5)
    two = gradinit(wide, [(x.float(), y) for x, y in batches], num_steps=5)
    assert one.scales == two.scales
    for narrow, full in zip(half.parameters(), wide.parameters(), strict=True):
        assert narrow.dtype == torch.bfloat16
        assert torch.equal(narrow, full.bfloat16())


def test_a_stopped_run_goes_on_to_the_bit(tmp_path):
    batches = [tokens(8)]
    whole = GradInit(everything(), scale_lr=0.05, max_norm=0.9)
    whole.run(halves_of(batches), 12)
    assert min(whole.counts) > 0

    class Stopped(Exception):
        pass

    def stop(step):
        if step.number == 5:
            raise Stopped

    model = everything()
    first = GradInit(model, scale_lr=0.05, max_norm=0.9)
    with pytest.raises(Stopped):
        first.run(halves_of(batches), 12, stop)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = GradInit(everything(), scale_lr=0.05, max_norm=0.9)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert (second.num_steps, second.scales) == (5, first.scales)
    second.run(halves_of(batches, skip=second.num_halves), 12)
    assert second.scales == whole.scales
    assert second.finish() == whole.finish()
    for one, two in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_state_of_other_weights_is_refused():
    state = GradInit(mlp()).state_dict()
    other = mlp()
    nn.init.normal_(other[0].weight)
    for model in (other, conv()):
        with pytest.raises(ValueError, match="with the weights it has"):
            GradInit(model).load_state_dict(state)


@pytest.mark.parametrize(
    "other",
    [
        {"optimizer": "adam"},
        {"lr": 0.2},
        {"scale_lr": 0.02},
        {"max_norm": 2.0},
        {"min_scale": 0.02},
        {"min_bias_scale": 0.02},
        {"max_scale": 9.0},
        {"clip": 2.0},
        {"betas": (0.9, 0.98)},
        {"eps": 1e-6},
        {"second_order": True},
        {"normalize_grad": False},
        {"shared_second_moment": False},
        {"normalisers": (nn.Dropout,)},
    ],
    ids=str,
)
def test_a_state_of_other_options_is_refused(other):
    state = GradInit(mlp(), **other).state_dict()
    with pytest.raises(ValueError, match=r"with the options of this one.*; make this one with"):
        GradInit(mlp()).load_state_dict(state)
    GradInit(mlp(), **other).load_state_dict(state)


def test_what_is_no_state_is_refused():
    whole = GradInit(mlp()).state_dict()
    wrong = [{name: whole[name] for name in whole if name != left} for left in whole]
    wrong.append(whole | {"adam": {"scales": whole["adam"]["scales"]}})
    for state in (*wrong, {}):
        with pytest.raises(ValueError, match=r"expected what state_dict\(\) returned, got no '"):
            GradInit(mlp()).load_state_dict(state)


def test_a_stopped_gradinit_leaves_the_model_alone():
    model = mlp()

    def stop(step):
        if step.number == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gradinit(model, [joined(*data((3,), 8))], progress=stop)
    pairs = zip(mlp().parameters(), model.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_same_seed_same_scales():
    reports = [gradinit(everything(), [tokens()], num_steps=6, scale_lr=0.05) for _ in range(2)]
    assert reports[0] == reports[1]


def test_halves_cut_each_batch_and_begin_anew():
    x = torch.arange(5)
    found = halves_of([(x, x + 10), (x[:1], x[:1])])
    cut = [(one.tolist(), two.tolist()) for one, two in (next(found) for _ in range(4))]
    assert cut == [([0, 1], [10, 11]), ([2, 3, 4], [12, 13, 14]), ([0], [0]), ([0, 1], [10, 11])]
    assert next(halves_of([(x, x)], skip=3))[0].tolist() == [2, 3, 4]
    assert len(list(halves_of(iter([(x, x)] * 2)))) == 4
    assert list(halves_of([])) == []


def test_the_report_shows_before_and_after_and_every_scale():
    report = gradinit(mlp(), [joined(*data((3,), 8))], num_steps=4, scale_lr=0.1)
    text = str(report)
    for name, scale in report.scales.items():
        assert f"{name}" in text
        assert f"{scale:8.4f}" in text
    low, high = min(report.scales.values()), max(report.scales.values())
    for number in (*report.loss, *report.gradient_norm):
        assert f"{number:.4g}" in report.summary()
    assert f"scales from {low:.3g} (" in report.summary()
    assert f"to {high:.3g} (" in report.summary()


class Once(torch.autograd.Function):
    """A square that cannot be differentiated twice."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


class Squares(nn.Module):
    def forward(self, x):
        return Once.apply(x)


def test_what_cannot_be_differentiated_twice_is_named():
    model = nn.Sequential(mlp(), Squares())
    with pytest.raises(ValueError, match="twice, got: a function marked once_diff"):
        GradInit(model, max_norm=0.0).step(*data((3,)))
    with pytest.raises(ValueError, match="twice, got: a function marked once_diff"):
        GradInit(model, max_norm=math.inf, second_order=True).step(*data((3,)))
    # A step of the objective needs no second derivative.
    assert GradInit(model, max_norm=math.inf).step(*data((3,))).kind == "objective"


def test_a_loss_that_is_not_finite_is_refused_and_the_scales_stay():
    model = mlp()
    with torch.no_grad():
        model[2].weight.mul_(math.inf)
    learner = GradInit(model, scale_lr=0.1)
    with pytest.raises(ValueError, match="a finite loss"):
        learner.step(*data((3,)))
    assert (learner.num_steps, set(learner.scales.values())) == (0, {1.0})


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "rmsprop"},
        {"lr": 0.0},
        {"scale_lr": math.nan},
        {"max_norm": -1.0},
        {"min_scale": 1.5},
        {"min_bias_scale": -0.1},
        {"max_scale": 0.5},
        {"clip": 0.0},
        {"betas": (0.9, 1.0)},
        {"betas": (0.9,)},
        {"eps": -1e-8},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=r"GradInit\(\w+=.*\): expected .*, got .*; give "):
        GradInit(mlp(), **options)


def test_other_mistakes_are_refused():
    halves = data((3,))
    with pytest.raises(ValueError, match=r"do you mean '0\.weight'"):
        GradInit(mlp(), exclude=["0.weigth"])
    with pytest.raises(Unsuitable, match="not zero"):
        GradInit(nn.Flatten())
    with pytest.raises(Unsuitable, match="not zero"):
        GradInit(mlp(), exclude=["0", "2"])
    with pytest.raises(ValueError, match="got none after 1"):
        GradInit(mlp()).run(iter(halves), 3)
    with pytest.raises(ValueError, match="at least two half-batches"):
        gradinit(mlp(), [])
    with pytest.raises(ValueError, match="number of samples only"):
        GradInit(mlp()).step(halves[0], (torch.zeros(4, 2).double(), halves[1][1]), halves[2])
    with pytest.raises(ValueError, match=r"pairs \(inputs, targets\)"):
        gradinit(mlp(), [(halves[0][0],)])
    for number in (-1, 2.5):
        with pytest.raises(ValueError, match=f"num_steps={number}.: expected a whole number"):
            gradinit(mlp(), [halves[0]], num_steps=number)
    with pytest.raises(ValueError, match=r"gradinit\(max_nrom=.*do you mean 'max_norm'\?"):
        gradinit(mlp(), [halves[0]], max_nrom=1.0)
    learner = GradInit(mlp())
    learner.finish()
    for call in (
        learner.finish,
        lambda: learner.step(*halves),
        lambda: learner.measure(halves[0]),
        lambda: learner.load_state_dict(learner.state_dict()),
    ):
        with pytest.raises(ValueError, match="make a new GradInit"):
            call()


# -- as a method ----------------------------------------------------------------------------------

MODELS = {
    "mlp": ({"depth": 4, "width": 16}, (1, 6, 6)),
    "resnet": ({"depth": 8, "width": 8}, (2, 8, 8)),
}


def case(model, method=METHOD):
    options, shape = MODELS[model]
    generator = torch.Generator().manual_seed(0)
    return MethodCase(
        method=method,
        make_model=lambda: build_model(model, shape, 4, **options),
        inputs=torch.randn(12, *shape, generator=generator),
        targets=torch.arange(12) % 4,
        num_classes=4,
        lr=0.02,
    )


CASES = {
    "mlp": case("mlp"),
    "resnet": case("resnet", METHOD.with_options(num_steps=6)),
    "without normalisers": case("mlp", none.METHOD + METHOD.with_options(second_order=True)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("check", METHOD_CHECKS, ids=lambda check: check.__name__)
def test_contract(check, case):
    check(case)


@pytest.mark.parametrize(
    ("epoch", "total", "expected"), [(1, 20, 20), (1, 3, 3), (120, 900, 120), (500, 900, 390)]
)
def test_the_method_takes_an_epoch_within_bounds(epoch, total, expected, monkeypatch):
    taken = []
    monkeypatch.setattr(
        "normlab.inits.gradinit.gradinit",
        lambda *_, num_steps, **others: (
            taken.append((num_steps, others["lr"])) or gradinit(*_, num_steps=1)
        ),
    )
    x = torch.randn(4, 3).double()
    setting = Setting(((x, torch.arange(4)),), steps_per_epoch=epoch, total_steps=total, lr=0.3)
    METHOD.prepare(mlp(), setting)
    assert taken == [(expected, 0.3)]


def test_the_method_runs_on_fresh_batches_and_says_what_it_found():
    halves = [*data((3,), 48, seed=7)]
    batches = [joined(*halves[i : i + 2]) for i in range(0, 12, 2)]
    drawn, said = [], []

    def draw(index):
        drawn.append(index)
        return batches[index % len(batches)]

    setting = Setting(
        ((torch.zeros(1, 3), torch.zeros(1)),), lr=0.05, optimizer="adamw", draw=draw,
        say=said.append,
    )  # fmt: skip
    model = METHOD.with_options(num_steps=4, scale_lr=0.02, beta2=0.98).prepare(mlp(), setting)
    assert drawn == list(range(6))
    options = {"optimizer": "adam", "lr": 0.05, "max_norm": 1000.0, "betas": (0.9, 0.98)}
    expected, _ = by_hand("mlp", halves, 4, options | {"scale_lr": 0.02})
    for scale, old, new in zip(expected[-1], mlp().parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(new, old * scale)
    (sentence,) = said
    assert sentence.startswith("GradInit took 4 steps for the loss and 0 for the gradient norm")


def test_options_come_from_a_command_line():
    method = METHOD.with_options(max_norm="inf", clip="inf", second_order="true", num_steps="3")
    assert method.label == "gradinit:clip=inf,max_norm=inf,num_steps=3,second_order=True"


def test_a_model_without_weights_is_unsuitable():
    setting = Setting(((torch.zeros(4, 3), torch.zeros(4)),))
    with pytest.raises(Unsuitable):
        METHOD.prepare(nn.Flatten(), setting)
