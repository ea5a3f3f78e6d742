"""Joint statistics of micro-batches against one batch of all samples, in float64."""

import copy
import random
import threading
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.checkpoint import checkpoint

from normlab.lab.models import build_model
from normlab.norms import accumulated_batch_norm
from normlab.norms.accumulated_batch_norm import backward_jointly, forward_jointly
from normlab.norms.batch_norm import SynchronizedBatchNorm
from normlab.norms.ghost_batch_norm import GhostBatchNorm
from normlab.norms.micro_batches import kept_on_host

EXACT = {"rtol": 1e-9, "atol": 1e-12}


class Twice(nn.Module):
    """One layer serves two places, in a branch that depends on the mode, beside a frozen one."""

    def __init__(self, **options):
        super().__init__()
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 3)
        self.norm, self.frozen = nn.BatchNorm1d(4, **options), nn.BatchNorm1d(4).eval()

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        if self.training:
            x = F.relu(self.norm(x + 1), inplace=True)
        return self.last(self.frozen(x))


def mlp():
    layers = [nn.Linear(5, 7), nn.BatchNorm1d(7, momentum=0.3), nn.ReLU(), nn.Linear(7, 3)]
    return nn.Sequential(*layers, nn.BatchNorm1d(3, affine=False), nn.Linear(3, 3))


def sequences():
    layers = [nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.Conv1d(4, 3, 2)]
    return nn.Sequential(*layers, nn.BatchNorm1d(3), nn.AdaptiveAvgPool1d(1), nn.Flatten())


MODELS = {
    "mlp": (mlp, (5,)),
    "twice": (Twice, (5,)),
    "plain averages": (partial(Twice, momentum=None), (5,)),
    "without running statistics": (partial(Twice, track_running_stats=False), (5,)),
    "sequences": (sequences, (2, 9)),
    "resnet": (partial(build_model, "resnet", (2, 8, 8), 3, depth=8, width=4), (2, 8, 8)),
    "projection": (
        partial(build_model, "resnet", (2, 8, 8), 3, depth=8, width=4, shortcut="projection"),
        (2, 8, 8),
    ),
}


def made(name):
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model = make().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.rand_like(parameter))
    x = torch.randn(8, *shape, dtype=torch.float64) * 2 + 0.3
    return model, x, torch.arange(8) % 3


def split(x, targets, sizes):
    return list(zip(x.split(sizes), targets.split(sizes), strict=True))


def gradients(model):
    return [p.grad for p in model.parameters() if p.grad is not None]


def flat(model):
    return torch.cat([gradient.flatten() for gradient in gradients(model)])


def backward(model, x, targets):
    loss = F.cross_entropy(model(x), targets)
    loss.backward()
    return loss.detach()


def whole_batch(model, x, targets):
    twin = copy.deepcopy(model)
    return twin, backward(twin, x, targets)


def same_buffers(one, two):
    for (name, mine), theirs in zip(one.named_buffers(), two.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("sizes", [[2, 2, 2, 2], [1] * 8, [3, 1, 4], [8]], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_micro_batches_are_one_batch(name, sizes):
    model, x, targets = made(name)
    twin = copy.deepcopy(model)
    for _ in range(2):  # the second time, gradients add up and running statistics go on
        expected = backward(twin, x, targets)
        loss = backward_jointly(model, split(x, targets, sizes), F.cross_entropy)
        torch.testing.assert_close(loss, expected, **EXACT)
        assert len(gradients(model)) == len(gradients(twin)) > 0
        for mine, theirs in zip(gradients(model), gradients(twin), strict=True):
            torch.testing.assert_close(mine, theirs, **EXACT)
        same_buffers(model, twin)
    assert not loss.requires_grad


@pytest.mark.parametrize("sizes", [[2, 2, 2, 2], [3, 1, 4]], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_input_gradients_are_those_of_one_batch(name, sizes):
    model, x, _ = made(name)
    twin, whole = copy.deepcopy(model), x.clone().requires_grad_()
    expected, dy = twin(whole), torch.randn(8, 3, dtype=torch.float64)
    expected.backward(dy)
    parts = [part.clone().requires_grad_() for part in x.split(sizes)]
    with forward_jointly(model, parts) as outputs:
        torch.testing.assert_close(torch.cat(outputs), expected, **EXACT)
        torch.cat(outputs).backward(dy)
    torch.testing.assert_close(torch.cat([part.grad for part in parts]), whole.grad, **EXACT)
    same_buffers(model, twin)


def plainly(norm, parts):
    """Batch normalisation of parts whose samples differ in size, by autograd through one mean."""
    outputs = [torch.empty_like(part) for part in parts]
    for c in range(norm.num_features):
        values = torch.cat([part[:, c].flatten() for part in parts])
        mean = values.sum() / len(values)
        variance = ((values - mean) ** 2).sum() / len(values)
        for part, y in zip(parts, outputs, strict=True):
            scale = norm.weight[c] / torch.sqrt(variance + norm.eps)
            y[:, c] = scale * (part[:, c] - mean) + norm.bias[c]
    return outputs


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_samples_of_different_sizes(layout):
    norm = nn.BatchNorm2d(3, eps=1e-2).double()
    with torch.no_grad():
        norm.weight.uniform_(-2, 2)
    shapes = [(2, 3, 5, 4), (1, 3, 1, 1), (3, 3, 2, 7)]
    parts = [torch.randn(shape).double().add(0.4).to(memory_format=layout) for shape in shapes]
    mine, theirs = ([part.clone().requires_grad_() for part in parts] for _ in range(2))
    factors = [torch.randn_like(part) for part in parts]

    def weighted(outputs):
        sum((y * factor).sum() for y, factor in zip(outputs, factors, strict=True)).backward()
        return [parameter.grad.clone() for parameter in norm.parameters()]

    expected = plainly(norm, theirs)
    by_hand = weighted(expected)
    norm.zero_grad()
    with forward_jointly(norm, mine) as outputs:
        torch.testing.assert_close(outputs, expected, **EXACT)
        assert all(y.is_contiguous(memory_format=layout) for y in outputs)
        torch.testing.assert_close(weighted(outputs), by_hand, **EXACT)
    torch.testing.assert_close([x.grad for x in mine], [x.grad for x in theirs], **EXACT)
    values = torch.cat([part.transpose(0, 1).flatten(1) for part in parts], dim=1)
    torch.testing.assert_close(norm.running_mean, 0.1 * values.mean(1), **EXACT)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * values.var(1), **EXACT)
    assert norm.num_batches_tracked.item() == 1


def test_single_precision_and_a_large_mean():
    x = 300 + torch.randn(8, 4, 6)
    norm, twin = nn.BatchNorm1d(4), nn.BatchNorm1d(4).double()
    with forward_jointly(norm, x.split(2)) as outputs:
        torch.testing.assert_close(torch.cat(outputs).double(), twin(x.double()), atol=2e-4, rtol=0)
    torch.testing.assert_close(norm.running_var.double(), twin.running_var, rtol=1e-5, atol=0)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("half", ["autocast", "bfloat16"])
def test_half_precision(half, exact):
    model, x, targets = made("resnet")
    twin, _ = whole_batch(model, x, targets)
    model, x = model.float(), x.float()
    if half == "bfloat16":
        model, x = model.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=half == "autocast"):
        backward_jointly(model, split(x, targets, 4), F.cross_entropy, exact=exact)
    if exact:
        difference = (flat(model).double() - flat(twin)).norm() / flat(twin).norm()
        assert difference < 0.1
    for mine, theirs in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(mine.double(), theirs.double(), atol=0.02, rtol=0.02)


def of_its_own(norm, x, mean, variance):
    """The joint moments, whose gradient is that of means over the micro-batch alone."""
    axes = [axis for axis in range(x.dim()) if axis != 1]
    shape = (-1, *(1,) * (x.dim() - 2))
    squares = (x - mean.reshape(shape)).square().mean(axes)
    mean = (mean + x.mean(axes) - x.mean(axes).detach()).reshape(shape)
    variance = (variance + squares - squares.detach()).reshape(shape)
    weight, bias = norm.weight.reshape(shape), norm.bias.reshape(shape)
    return weight * (x - mean) / (variance + norm.eps).sqrt() + bias


@pytest.mark.parametrize("sizes", [[2, 2, 2, 2], [3, 1, 4]], ids=str)
def test_the_approximation_takes_the_means_of_each_micro_batch(sizes):
    model, x, targets = made("resnet")
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    moments = {}

    def keep(norm, inputs):
        values = inputs[0].detach().transpose(0, 1).flatten(1)
        moments[norm] = (values.mean(1), values.var(1, correction=0))

    hooks = [norm.register_forward_pre_hook(keep) for norm in norms]
    twin, expected = whole_batch(model, x, targets)  # the copy's hooks note under its own layers
    for hook in hooks:
        hook.remove()
    approximate = copy.deepcopy(model)
    copies = [module for module in approximate.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm, known in zip(copies, moments.values(), strict=True):
        norm.forward = lambda x, norm=norm, known=known: of_its_own(norm, x, *known)
    for one, target in split(x, targets, sizes):
        (len(one) / 8 * F.cross_entropy(approximate(one), target)).backward()

    loss = backward_jointly(model, split(x, targets, sizes), F.cross_entropy, exact=False)
    torch.testing.assert_close(loss, expected, **EXACT)
    same_buffers(model, twin)
    for mine, theirs in zip(gradients(model), gradients(approximate), strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)
    assert (flat(model) - flat(twin)).norm() > 0.05 * flat(twin).norm()


def error(model, x, targets, size, run):
    """Relative error and cosine of a gradient against the joint batch's."""
    twin, _ = whole_batch(model, x, targets)
    model = copy.deepcopy(model)
    run(model, split(x, targets, size))
    mine, theirs = flat(model), flat(twin)
    cosine = F.cosine_similarity(mine, theirs, dim=0).item()
    return ((mine - theirs).norm() / theirs.norm()).item(), cosine


def plain_accumulation(model, micro_batches):
    for x, targets in micro_batches:
        (F.cross_entropy(model(x), targets) / len(micro_batches)).backward()


def test_how_far_the_approximation_is_from_the_gradient():
    digits = load_digits()
    x = torch.tensor(digits.images[:32]).unsqueeze(1) / 8 - 1
    targets = torch.tensor(digits.target[:32])
    torch.manual_seed(0)
    model = build_model("resnet", (1, 8, 8), 10, depth=20, width=8).double()

    def approximately(model, micro_batches):
        backward_jointly(model, micro_batches, F.cross_entropy, exact=False)

    off = {size: error(model, x, targets, size, approximately) for size in (4, 8, 16, 32)}
    plain = error(model, x, targets, 4, plain_accumulation)
    assert 0.3 < off[4][0] < 0.7
    assert off[4][1] > 0.8
    assert off[4][0] < 0.75 * plain[0]
    assert off[4][0] > 1.2 * off[8][0] > 1.44 * off[16][0] > 0.05
    assert off[32][0] < 1e-12


def test_without_batch_statistics_micro_batches_go_one_by_one():
    model, x, targets = made("mlp")
    model.eval()
    events = []
    model[0].register_forward_hook(lambda *_: events.append("forward"))
    model[0].weight.register_post_accumulate_grad_hook(lambda _: events.append("backward"))
    twin, expected = whole_batch(model, x, targets)
    events.clear()
    loss = backward_jointly(model, split(x, targets, [3, 1, 4]), F.cross_entropy)
    torch.testing.assert_close(loss, expected, **EXACT)
    torch.testing.assert_close(gradients(model), gradients(twin), **EXACT)
    assert events == ["forward", "backward"] * 3


def test_only_one_micro_batch_is_alive_in_the_approximation():
    model, x, targets = made("resnet")
    events = []
    model.fc.register_forward_hook(lambda *_: events.append(torch.is_grad_enabled()))
    model.fc.weight.register_post_accumulate_grad_hook(lambda _: events.append("backward"))
    backward_jointly(model, split(x, targets, 2), F.cross_entropy, exact=False)
    assert events == [False] * 4 + [True, "backward"] * 4


def test_the_exact_form_saves_no_more_than_one_batch(monkeypatch):
    model, x, targets = made("resnet")

    def counted(sizes):
        def pack(tensor):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)

    whole, parts = {}, {}
    with counted(whole):
        loss = F.cross_entropy(copy.deepcopy(model)(x), targets)
    monkeypatch.setattr(accumulated_batch_norm, "_saving", lambda *_: counted(parts))
    backward_jointly(model, split(x, targets, 2), F.cross_entropy)
    assert loss.requires_grad
    assert 0.9 * sum(whole.values()) < sum(parts.values()) < 1.1 * sum(whole.values())


@pytest.mark.parametrize("exact", [True, False])
def test_kept_on_host(exact, monkeypatch):
    model, x, targets = made("resnet")
    twin, _ = whole_batch(model, x, targets)
    packed = []

    def on_host(model, offload):
        hooks = kept_on_host(model)
        own = hooks.pack_hook

        def pack(tensor):
            packed.append((tensor, own(tensor)[1]))
            return own(tensor)

        hooks.pack_hook = pack
        return hooks

    monkeypatch.setattr(accumulated_batch_norm, "_saving", on_host)
    sizes = 2 if exact else 8
    loss = backward_jointly(model, split(x, targets, sizes), F.cross_entropy, exact=exact)
    assert loss.isfinite()
    torch.testing.assert_close(gradients(model), gradients(twin), **EXACT)
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    stayed = [a for a, b in packed if a.untyped_storage().data_ptr() == b.data_ptr()]
    assert stayed
    assert {tensor.untyped_storage().data_ptr() for tensor in stayed} <= weights
    assert len(packed) > 2 * len(stayed)


@pytest.mark.parametrize("exact", [True, False])
def test_offload_changes_nothing_on_a_cpu(exact):
    model, x, targets = made("mlp")
    twin = copy.deepcopy(model)
    for one, offload in ((model, True), (twin, False)):
        backward_jointly(one, split(x, targets, 2), F.cross_entropy, exact=exact, offload=offload)
    torch.testing.assert_close(gradients(model), gradients(twin), rtol=0, atol=0)


def test_both_passes_draw_the_same_noise_and_each_micro_batch_its_own():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 40), nn.Dropout(0.5), nn.BatchNorm1d(40), nn.Dropout(0.5), nn.Linear(40, 3)
    )
    drawn = []
    model[1].register_forward_hook(lambda _, x, y: drawn.append(y.detach() == 0))
    outputs = {False: [], True: []}
    model.register_forward_hook(lambda _, x, y: outputs[torch.is_grad_enabled()].append(y.detach()))
    micro_batches = [(torch.ones(2, 5), torch.zeros(2, dtype=torch.long)) for _ in range(3)]

    def run(seed):
        drawn.clear()
        torch.manual_seed(seed)
        loss = backward_jointly(model, micro_batches, F.cross_entropy, exact=False)
        return loss, torch.rand(1)

    first = run(1)
    assert all(torch.equal(a, b) for a, b in zip(drawn[:3], drawn[3:], strict=True))
    assert not torch.equal(drawn[0], drawn[1])
    for before, after in zip(outputs[False], outputs[True], strict=True):
        torch.testing.assert_close(before, after)
    assert run(1) == first
    second = run(2)
    assert second != first
    torch.manual_seed(2)
    assert second[1] != torch.rand(1), "the generator has not moved"


def test_other_buffers_are_updated_once_and_survive_an_error():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))
            self.fail_at = None

        def forward(self, x):
            self.seen = self.seen + 1
            if self.seen == self.fail_at:
                raise RuntimeError("enough")
            return x

    for exact in (True, False):
        model, x, targets = made("mlp")
        model.append(Counter())
        backward_jointly(model, split(x, targets, 2), F.cross_entropy, exact=exact)
        assert model[-1].seen.item() == 4
    state = copy.deepcopy(model.state_dict())
    model[-1].fail_at = 6
    with pytest.raises(RuntimeError, match="enough"):
        backward_jointly(model, split(x, targets, 2), F.cross_entropy, exact=False)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


class Failing(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.armed = mlp(), True

    def forward(self, x):
        x = self.body(x)
        if self.armed and len(x) == 3:
            raise OSError("the disk is gone")
        return x


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("where", ["model", "loss"])
def test_an_error_leaves_the_model_as_it_was(where, exact):
    torch.manual_seed(0)
    model, threads = Failing(), threading.active_count()
    model.armed = where == "model"
    state = copy.deepcopy(model.state_dict())
    micro_batches = split(torch.randn(7, 5), torch.arange(7) % 3, [3, 2, 2])

    def loss(outputs, targets):
        if where == "loss":
            raise OSError("the disk is gone")
        return F.cross_entropy(outputs, targets)

    with pytest.raises(OSError, match="the disk is gone"):
        backward_jointly(model, micro_batches, loss, exact=exact)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert not gradients(model)
    assert threading.active_count() == threads
    assert all("forward" not in module.__dict__ for module in model.modules())
    model.armed = False
    backward_jointly(model, micro_batches, F.cross_entropy, exact=exact)
    assert gradients(model)


def test_a_forward_of_somebody_else_comes_back():
    model, x, targets = made("mlp")
    own = model[1].forward
    model[1].forward = own
    backward_jointly(model, split(x, targets, 2), F.cross_entropy)
    assert model[1].__dict__["forward"] is own


def test_hooks_of_the_layers_run():
    model, x, targets = made("mlp")
    shapes = []
    model[1].register_forward_hook(lambda _, inputs, output: shapes.append(output.shape))
    backward_jointly(model, split(x, targets, [3, 5]), F.cross_entropy)
    assert shapes == [(3, 7), (5, 7)]


class Detector(nn.Module):
    """Takes a list of images of different sizes and returns the loss itself."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2)

    def forward(self, images, targets, factor=1.0):
        pixels = [self.norm(self.conv(image[None])).relu().mean((0, 2, 3)) for image in images]
        return factor * (torch.stack(pixels).sum(1) - targets).square().mean()


@pytest.mark.parametrize("form", [tuple, dict])
def test_lists_of_images_and_several_arguments(form):
    torch.manual_seed(0)
    model = Detector()
    images = [torch.randn(1, 4, size) for size in (3, 4, 5, 6)]
    parts = [(images[:2], torch.ones(2)), (images[2:], torch.zeros(2))]
    if form is dict:
        parts = [{"images": a, "targets": b, "factor": 1.0} for a, b in parts]
    loss = backward_jointly(model, [(part, None) for part in parts], lambda loss, _: loss)
    assert loss.isfinite()
    assert model.norm.num_batches_tracked.item() == 2  # its forward calls the layer twice
    assert model.conv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("exact", [True, False])
def test_weights(exact):
    model, x, targets = made("mlp")
    twin = copy.deepcopy(model)
    with forward_jointly(twin, x.split([3, 5])) as outputs:
        losses = [
            F.cross_entropy(y, t) for y, t in zip(outputs, targets.split([3, 5]), strict=True)
        ]
    micro_batches = split(x, targets, [3, 5])
    for weights in ([2.0, 0.5], None):
        loss = backward_jointly(
            copy.deepcopy(model), micro_batches, F.cross_entropy, weights=weights, exact=exact
        )
        a, b = weights or (3 / 8, 5 / 8)
        torch.testing.assert_close(loss, (a * losses[0] + b * losses[1]).detach(), **EXACT)


def test_a_loss_over_several_micro_batches():
    model, x, _ = made("mlp")
    twin = copy.deepcopy(model)
    expected = twin(x)
    (expected @ expected.T).square().sum().backward()
    with forward_jointly(model, x.split(2)) as outputs:
        y = torch.cat(outputs)
        (y @ y.T).square().sum().backward()
    torch.testing.assert_close(gradients(model), gradients(twin), **EXACT)


def test_without_gradients_statistics_are_taken():
    model, x, _ = made("resnet")
    twin = copy.deepcopy(model)
    with torch.no_grad(), forward_jointly(model, x.split(2)) as outputs:
        torch.testing.assert_close(torch.cat(outputs), twin(x), **EXACT)
        assert not outputs[0].requires_grad
    same_buffers(model, twin)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = mlp()

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=False)


class Wandering(nn.Module):
    """Leaves a layer out for some micro-batches, or in the second pass."""

    def __init__(self, skip):
        super().__init__()
        self.first, self.second, self.skip = nn.BatchNorm1d(5), nn.BatchNorm1d(5), skip

    def forward(self, x):
        x = self.first(x)
        return x if self.skip(x) else self.second(x)


def twisted(make, *subclass):
    model = mlp()
    model[1] = make(7, *subclass)
    return model


class OwnNorm(nn.BatchNorm1d):
    pass


BATCHES = [(torch.randn(2, 5), torch.zeros(2, dtype=torch.long)) for _ in range(3)]
REFUSED = {
    "no micro-batch": (mlp, [], r"at least one micro-batch, got none; "),
    "not a batch": (mlp, [({}, 0)], r"begin with a tensor \(N, ...\).* got dict; give weights"),
    "synchronised": (
        lambda: twisted(SynchronizedBatchNorm),
        BATCHES,
        r"got SynchronizedBatchNorm at '1', and its processes would wait",
    ),
    "torch's synchronised": (
        lambda: twisted(nn.SyncBatchNorm),
        BATCHES,
        "got SyncBatchNorm at '1', and its processes would wait",
    ),
    "ghosts": (lambda: twisted(GhostBatchNorm), BATCHES, "got GhostBatchNorm at '1', and a subcl"),
    "subclass": (lambda: twisted(OwnNorm), BATCHES, "a subclass may do more than normalise; put"),
    "one value": (mlp, [(torch.randn(1, 5), torch.zeros(1).long())], r"joint batch, got .*\(1, 7"),
    "channels": (lambda: nn.BatchNorm1d(4), BATCHES, r"expected shape \(N, 4, \*\), got \(2, 5\)"),
    "rank": (lambda: nn.BatchNorm2d(5), BATCHES, "expected 4D input"),
    "integers": (
        lambda: nn.BatchNorm1d(5),
        [(torch.zeros(2, 5, dtype=torch.long), None)],
        "expected floating point",
    ),
    "checkpointing": (Checkpointed, BATCHES, "without activation checkpointing"),
}


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case, exact):
    make, micro_batches, message = REFUSED[case]
    model = make()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        backward_jointly(model, micro_batches, F.cross_entropy, exact=exact)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize("exact", [True, False])
def test_micro_batches_that_go_different_ways(exact):
    model = Wandering(lambda x: len(x) == 3)
    micro_batches = split(torch.randn(7, 5), torch.arange(7) % 3, [2, 2, 3])
    with pytest.raises(ValueError, match=r"micro-batch 0 at 'second' and micro-batch 2 at the end"):
        backward_jointly(model, micro_batches, F.cross_entropy, exact=exact)


def test_passes_that_go_different_ways():
    for second in (True, False):
        model = Wandering(lambda x, second=second: x.requires_grad == second)
        model.first.requires_grad_()
        with pytest.raises(ValueError, match="in both passes, got others in the second one"):
            backward_jointly(model, BATCHES, F.cross_entropy, exact=False)


def test_a_subclass_in_evaluation_mode_is_left_alone():
    model = twisted(OwnNorm)
    model[1].eval()
    backward_jointly(model, BATCHES, F.cross_entropy)
    assert model[1].num_batches_tracked.item() == 0
    assert model[4].num_batches_tracked.item() == 1


def test_misuse():
    model = mlp()
    with torch.no_grad(), pytest.raises(ValueError, match=r"leave the torch\.no_grad block"):
        backward_jointly(model, BATCHES, F.cross_entropy)
    with pytest.raises(ValueError, match="expected 3 numbers, got 2"):
        backward_jointly(model, BATCHES, F.cross_entropy, weights=[1, 1])
    with pytest.raises(ValueError, match="forward_jointly"), forward_jointly(model, []):
        pass


def test_order_of_micro_batches_does_not_matter():
    model, x, targets = made("resnet")
    micro_batches = split(x, targets, [3, 1, 4])
    twin = copy.deepcopy(model)
    backward_jointly(model, micro_batches, F.cross_entropy)
    random.Random(0).shuffle(micro_batches)
    backward_jointly(twin, micro_batches, F.cross_entropy)
    torch.testing.assert_close(gradients(model), gradients(twin), **EXACT)
