"""Posteriors threaded through whole models against threading by hand."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normlab.method import Setting
from normlab.norms.batch_kalman_norm import prepare
from normlab.norms.kalman_chain import ChainedNorm
from normlab.norms.kalman_filter import Posterior, add_moments
from normlab.norms.kalman_propagation import propagate
from resnets_of_others import FunctionalBlock, FunctionalResNet, TorchvisionResNet


def prepared(model, *shape, **options):
    torch.manual_seed(0)
    said = []
    inputs = torch.randn(shape, dtype=torch.float64)
    setting = Setting(batches=((inputs, torch.zeros(shape[0])),), say=said.append)
    model = prepare(model.double(), setting, **{"gain": 0.3, **options}).train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.1 * noise)
    model.said = said
    return model, inputs


def priors(model):
    """The number of channels of each normaliser's prior, by name."""
    chained = {name: m for name, m in model.named_modules() if isinstance(m, ChainedNorm)}
    return {name: module.norm.prior_features for name, module in chained.items()}


def has_prior(model):
    chained = {name: m for name, m in model.named_modules() if isinstance(m, ChainedNorm)}
    return {name for name, module in chained.items() if module._prior is not None}


def board(model):
    (chain,) = {m._chain for m in model.modules() if isinstance(m, ChainedNorm)}
    return chain


def agree(model, by_hand, x):
    """Compare output, gradients and buffers of a model with a function of a copy of it."""
    twin = copy.deepcopy(model)
    weights = torch.randn(model(x).shape, dtype=x.dtype, generator=torch.Generator().manual_seed(3))
    model.load_state_dict(twin.state_dict())
    results = []
    for one, function in ((model, model), (twin, lambda x: by_hand(twin, x))):
        one.zero_grad()
        y = function(x)
        (y * weights).sum().backward()
        gradients = {name: p.grad for name, p in one.named_parameters()}
        results.append((y.detach(), gradients, dict(one.named_buffers())))
    torch.testing.assert_close(results[0], results[1])
    assert all(gradient is not None for gradient in results[0][1].values())


def plain():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, 6), nn.BatchNorm1d(6),
    )  # fmt: skip


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_a_sequence_passes_posteriors_on(covariance):
    model, x = prepared(plain(), 3, 2, 10, 10, covariance=covariance)
    assert priors(model) == {"1": 0, "6": 3, "11": 5}

    def by_hand(m, x):
        y, posterior = m[1].norm(m[0](x))
        y, posterior = m[6].norm(m[2:6](y), posterior)
        return m[11].norm(m[7:11](y), posterior)[0]

    agree(model, by_hand, x)


@pytest.mark.parametrize("apply_affine", [True, False])
def test_a_sequence_propagates_moments(apply_affine):
    options = {"transition": "propagate", "apply_affine": apply_affine}
    model, x = prepared(plain(), 3, 2, 10, 10, **options)
    assert has_prior(model) == {"6", "11"}

    def by_hand(m, x):
        y, posterior = m[1].norm(m[0](x))
        start = m[1].norm.output_moments() if apply_affine else posterior
        y, posterior = m[6].norm(m[2:6](y), propagate(start, list(m[2:6])))
        start = m[6].norm.output_moments() if apply_affine else posterior
        layers = [m[7], nn.AvgPool2d(2), m[9], m[10]]
        return m[11].norm(m[7:11](y), propagate(start, layers))[0]

    agree(model, by_hand, x)


def test_samples_are_drawn_once_for_each_prior():
    options = {"transition": "propagate", "propagation": "sample"}
    model, x = prepared(plain(), 3, 2, 10, 10, **options)

    def by_hand(m, x):
        torch.manual_seed(4)
        y, _ = m[1].norm(m[0](x))
        given = {"propagation": "sample", "space": (8, 8)}
        prior = propagate(m[1].norm.output_moments(), list(m[2:6]), **given)
        y, _ = m[6].norm(m[2:6](y), prior)
        given["space"] = (4, 4)
        layers = [m[7], nn.AvgPool2d(2), m[9], m[10]]
        prior = propagate(m[6].norm.output_moments(), layers, **given)
        return m[11].norm(m[7:11](y), prior)[0]

    torch.manual_seed(4)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(model(x), by_hand(twin, x))


class Residual(nn.Module):
    """A stem and two blocks, the first with more channels, padded on both sides."""

    def __init__(self, pad=(1, 2)):
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)
        self.conv1, self.norm1 = nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 6, 3, 1, 1), nn.BatchNorm2d(6)
        self.conv3, self.norm3 = nn.Conv2d(6, 6, 3, 1, 1), nn.BatchNorm2d(6)
        self.last, self.norm4 = nn.Conv2d(6, 2, 1), nn.BatchNorm2d(2)
        self.pad = pad

    def shortcut(self, x):
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, *self.pad))

    def forward(self, x):
        x = self.norm0(self.stem(x)).relu()
        x = F.relu(self.norm1(self.conv1(x)) + self.shortcut(x))
        y = F.relu(self.norm2(self.conv2(x)))
        y = self.norm3(self.conv3(y))
        y += x
        return self.norm4(self.last(F.relu(y)))


def residual_by_hand(m, x):
    x, p0 = m.norm0.norm(m.stem(x))
    x = x.relu()
    y, p1 = m.norm1.norm(m.conv1(x), p0)
    x = F.relu(y + m.shortcut(x))
    zeros = torch.zeros(6, dtype=x.dtype)
    before, after = m.pad
    padded = [torch.cat([zeros[:before], one, zeros[:after]]) for one in p0]
    sum1 = Posterior(p1.mean + padded[0], p1.variance + padded[1])
    y, p2 = m.norm2.norm(m.conv2(x), sum1)
    y, p3 = m.norm3.norm(m.conv3(F.relu(y)), p2)
    sum2 = Posterior(p3.mean + sum1.mean, p3.variance + sum1.variance)
    return m.norm4.norm(m.last(F.relu(y + x)), sum2)[0]


@pytest.mark.parametrize("pad", [(1, 2), (0, 3)])
def test_residual_sums_add_moments_and_pad_as_the_features(pad):
    model, x = prepared(Residual(pad), 3, 2, 10, 10)
    assert priors(model) == {"norm0": 0, "norm1": 3, "norm2": 6, "norm3": 6, "norm4": 6}
    agree(model, residual_by_hand, x)


def test_residual_sums_of_propagated_moments():
    model, x = prepared(Residual(), 3, 2, 10, 10, transition="propagate")
    relu = nn.ReLU()

    def by_hand(m, x):
        x, _ = m.norm0.norm(m.stem(x))
        x, o0 = x.relu(), m.norm0.norm.output_moments()
        y, _ = m.norm1.norm(m.conv1(x), propagate(o0, [relu, m.conv1]))
        x, o1 = F.relu(y + m.shortcut(x)), m.norm1.norm.output_moments()
        sum1 = add_moments([o1, propagate(o0, [relu])], [(0, 0), m.pad])
        y, _ = m.norm2.norm(m.conv2(x), propagate(sum1, [relu, m.conv2]))
        o2 = m.norm2.norm.output_moments()
        y, _ = m.norm3.norm(m.conv3(F.relu(y)), propagate(o2, [relu, m.conv3]))
        o3 = m.norm3.norm.output_moments()
        sum2 = add_moments([o3, propagate(sum1, [relu])], [(0, 0), (0, 0)])
        y, _ = m.norm4.norm(m.last(F.relu(y + x)), propagate(sum2, [relu, m.last]))
        return y

    agree(model, by_hand, x)


class PreActivation(nn.Module):
    """Two blocks that normalise first, behind a stem without normaliser."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 3, 3)
        self.norm1, self.conv1 = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, 1, 1)
        self.norm2, self.conv2 = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, 1, 1)
        self.norm3 = nn.BatchNorm2d(3)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.conv1(F.relu(self.norm1(x)))
        x = x + self.conv2(F.relu(self.norm2(x)))
        return self.norm3(x)


@pytest.mark.parametrize("transition", ["linear", "propagate"])
def test_a_term_that_a_normaliser_took_has_its_posterior(transition):
    model, x = prepared(PreActivation(), 4, 2, 6, 6, transition=transition)
    assert has_prior(model) == {"norm2", "norm3"}

    def branch(norm, posterior, conv):
        if transition == "linear":
            return posterior
        return propagate(norm.output_moments(), [nn.ReLU(), conv])

    def by_hand(m, x):
        x = m.stem(x)
        y, p1 = m.norm1.norm(x)
        x = x + m.conv1(F.relu(y))
        pads = [(0, 0), (0, 0)]
        prior = add_moments([p1, branch(m.norm1.norm, p1, m.conv1)], pads)
        y, p2 = m.norm2.norm(x, prior)
        x = x + m.conv2(F.relu(y))
        prior = add_moments([p2, branch(m.norm2.norm, p2, m.conv2)], pads)
        return m.norm3.norm(x, prior)[0]

    agree(model, by_hand, x)


@pytest.mark.parametrize("transition", ["linear", "propagate"])
@pytest.mark.parametrize(
    ("make", "size"),
    [
        (TorchvisionResNet, 32),
        (FunctionalResNet, 8),
        (lambda: FunctionalResNet(FunctionalBlock(8, True), FunctionalBlock(8, True)), 8),
    ],
)
def test_resnets_of_others_have_a_prior_everywhere_but_at_the_stem(make, size, transition):
    model, x = prepared(make(), 2, 3, size, size, transition=transition)
    assert set(priors(model)) - has_prior(model) == {"bn1"}
    assert f"{len(priors(model)) - 1} have a prior, 1 stay plain" in model.said[0]
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


class Joined(nn.Module):
    """A concatenation with the input, then an activation whose moments nobody propagates."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3)
        self.conv2, self.norm2 = nn.Conv1d(5, 4, 1), nn.BatchNorm1d(4)
        self.conv3, self.norm3 = nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)

    def forward(self, x):
        x = torch.cat([x, self.norm1(self.conv1(x))], 1)
        return self.norm3(self.conv3(torch.tanh(self.norm2(self.conv2(x)))))


def test_unknown_moments_leave_a_layer_without_prior():
    model, x = prepared(Joined(), 4, 2, 5)
    assert has_prior(model) == {"norm3"}
    twin = copy.deepcopy(model)
    y, _ = twin.norm1.norm(twin.conv1(x))
    y, posterior = twin.norm2.norm(twin.conv2(torch.cat([x, y], 1)))
    torch.testing.assert_close(model(x), twin.norm3.norm(twin.conv3(y.tanh()), posterior)[0])
    model, x = prepared(Joined(), 4, 2, 5, transition="propagate")
    assert has_prior(model) == set()
    assert "0 have a prior, 3 stay plain" in model.said[0]
    assert model(x).shape == (4, 4, 5)


class Twice(nn.Module):
    """One encoder for two inputs."""

    def __init__(self):
        super().__init__()
        self.encoder = Residual()

    def forward(self, x):
        return self.encoder(x) - self.encoder(x.flip(1))


def test_a_model_called_twice_has_the_prior_of_each_call():
    model, x = prepared(Twice(), 3, 2, 10, 10)
    assert has_prior(model) == {f"encoder.norm{number}" for number in (1, 2, 3, 4)}

    def by_hand(m, x):
        return residual_by_hand(m.encoder, x) - residual_by_hand(m.encoder, x.flip(1))

    agree(model, by_hand, x)


class Repeated(nn.Module):
    """Two layers run several times: the first one's predecessor is not the same each time."""

    def __init__(self, crossed=False):
        super().__init__()
        self.stem, self.norm0 = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.layer1, self.norm1 = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.layer2, self.norm2 = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.crossed = crossed

    def forward(self, x):
        x = self.norm0(self.stem(x))
        if self.crossed:
            one, two = self.norm1(self.layer1(x)), self.norm1(self.layer1(-x))
            return self.norm2(self.layer2(one)) + two
        for _ in range(2):
            x = self.norm1(self.layer1(x))
            x = self.norm2(self.layer2(x))
        return x


def test_layers_called_again_have_a_prior_only_if_it_is_the_same():
    assert has_prior(prepared(Repeated(), 4, 3)[0]) == {"norm2"}
    # What norm2 needs is overwritten by the second call of norm1 before it is asked for.
    assert has_prior(prepared(Repeated(crossed=True), 4, 3)[0]) == {"norm1"}
    for crossed in (False, True):
        model, x = prepared(Repeated(crossed), 4, 3)
        model(x).sum().backward()


class Skipping(nn.Module):
    """A layer that is left out at will."""

    def __init__(self):
        super().__init__()
        self.layer1, self.norm1 = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.layer2, self.norm2 = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.layer3, self.norm3 = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.skip = False

    def forward(self, x):
        x = self.norm1(self.layer1(x))
        if not self.skip:
            x = self.norm2(self.layer2(x))
        return self.norm3(self.layer3(x))


def test_a_layer_behind_a_skipped_one_takes_no_stale_posterior():
    model, x = prepared(Skipping(), 4, 3)
    model(x)
    model.skip = True
    y, _ = model.norm3.norm(model.layer3(model.norm1.norm(model.layer1(x))[0]))
    torch.testing.assert_close(model(x), y)
    model.norm2(x)  # a call of a part leaves its posterior behind
    torch.testing.assert_close(model(x), y)


def test_frozen_layers_give_their_running_moments():
    model, x = prepared(Skipping(), 4, 3)
    model(x)
    model.norm1.eval()
    twin = copy.deepcopy(model)
    prior = Posterior(twin.norm1.norm.running_mean, twin.norm1.norm.running_var)
    y, prior = twin.norm2.norm(twin.layer2(twin.norm1.norm(twin.layer1(x))[0]), prior)
    torch.testing.assert_close(model(x), twin.norm3.norm(twin.layer3(y), prior)[0])


def test_evaluation_needs_no_chain():
    model, x = prepared(Residual(), 3, 2, 10, 10)
    model(x)
    model.eval()
    y = model(x)
    torch.testing.assert_close(model(x[:1]), y[:1])
    for chained in (m for m in model.modules() if isinstance(m, ChainedNorm)):
        chained._prior = chained._posterior = None
    assert torch.equal(model(x), y)


def test_nothing_of_a_forward_pass_is_kept():
    model, x = prepared(Residual(), 3, 2, 10, 10)
    kept = []
    model.conv2.register_forward_hook(lambda _, inputs, output: kept.append(weakref.ref(output)))
    model(x)
    gc.collect()
    assert kept[0]() is None
    assert not board(model).values


def test_nothing_is_kept_when_the_model_raises():
    model, x = prepared(Residual(), 3, 2, 10, 10)

    def fail(*_):
        raise KeyError

    model.last.register_forward_hook(fail)
    with pytest.raises(KeyError):
        model(x)
    assert not board(model).values


@pytest.mark.parametrize("options", [{}, {"transition": "propagate"}])
def test_copies_have_their_own_chain(options):
    model, x = prepared(Residual(), 3, 2, 10, 10, **options)
    model.norm0(model.stem(x))  # a call of a part leaves its posterior behind
    assert board(model).values
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    copies = [copy.deepcopy(model), saved, pickle.loads(pickle.dumps(model))]
    expected = model(x)
    for other in copies:
        assert not board(other).values
        assert board(other) is not board(model)
        own = set(other.modules())
        layers = [layer for node in board(other).nodes for layer in node.layers]
        assert all(layer in own for layer in layers if not isinstance(layer, nn.ReLU))
        torch.testing.assert_close(other(x), expected)
        assert not board(other).values
    assert not set(model.state_dict()) - {
        *(name for name, _ in model.named_parameters()),
        *(name for name, _ in model.named_buffers()),
    }


def test_very_deep_models_are_planned_copied_and_run():
    torch.manual_seed(0)
    layers = []
    for _ in range(150):
        layers += [nn.Linear(2, 2), nn.BatchNorm1d(2), nn.ReLU()]
    model, x = prepared(nn.Sequential(*layers), 4, 2, gain=0.95)
    assert len(has_prior(model)) == 149
    pickle.dumps(copy.deepcopy(model))
    copy.deepcopy(model[-2])
    assert torch.isfinite(model(x)).all()


@pytest.mark.parametrize("options", [{}, {"transition": "propagate"}])
def test_a_whole_model_compiles_into_one_graph(options):
    torch.compiler.reset()
    model, x = prepared(plain(), 3, 2, 10, 10, **options)
    twin, count = copy.deepcopy(model), []

    def backend(graph, _):
        count.append(1)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), twin(x))
    assert len(count) == 1
    assert not board(model).values
    torch.compiler.reset()
