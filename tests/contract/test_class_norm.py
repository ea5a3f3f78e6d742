"""Class normalisation against its sheet's equations and properties, then the contract."""

import copy
import math

import pytest
import torch
from torch import nn

from normlab.lab.models import build_model
from normlab.method import Setting, Unsuitable
from normlab.norms.class_norm import (
    METHOD,
    ClassEmbedder,
    PrototypeClassifier,
    class_norm_init_,
    normalize_attributes,
    prototype_logits,
)
from normlab.norms.class_standardization import ClassStandardization, class_standardize
from normlab.testing import LAYER_CHECKS, METHOD_CHECKS, LayerCase, MethodCase


def oracle(layer: ClassStandardization, h: torch.Tensor) -> torch.Tensor:
    """Equation 9, one unit at a time; the notebook's form where it is asked for."""
    y = torch.empty_like(h)
    count = len(h)
    for unit in range(h.shape[1]):
        mean, unbiased = layer.running_mean[unit], layer.running_var[unit]
        divided = unbiased
        if layer.training:
            mean = sum(h[c, unit] for c in range(count)) / count
            squares = sum((h[c, unit] - mean) ** 2 for c in range(count))
            by_count = count if layer.divide_by == "deviation" else count - 1
            divided = squares / by_count
        if layer.divide_by == "deviation":
            y[:, unit] = (h[:, unit] - mean) / (divided + layer.eps) ** 0.5
        else:
            y[:, unit] = (h[:, unit] - mean) / (divided + layer.eps)
    return y.detach()


CASES = {
    divide_by: LayerCase(
        make=lambda divide_by=divide_by: ClassStandardization(4, divide_by=divide_by),
        shapes=[(5, 4), (9, 4)],
        oracle=oracle,
        # Here the rows of a batch are classes.
        batch_statistics=True,
        batch_of_one="refuses",
        eval_differs=True,
    )
    for divide_by in ("deviation", "variance")
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("check", LAYER_CHECKS, ids=lambda check: check.__name__)
def test_layer_contract(check, case):
    check(case)


def classifier(class_norm=False, **options) -> PrototypeClassifier:
    attributes = torch.rand(4, 6, generator=torch.Generator().manual_seed(1))
    embedder = ClassEmbedder(6, 10, 32, class_norm=class_norm)
    return PrototypeClassifier(embedder, attributes, **options)


@pytest.mark.parametrize(
    "options",
    [{}, {"divide_by": "variance"}, {"initialize": False}, {"standardize": False}],
    ids=str,
)
@pytest.mark.parametrize("check", METHOD_CHECKS, ids=lambda check: check.__name__)
def test_method_contract(check, options):
    generator = torch.Generator().manual_seed(0)
    check(
        MethodCase(
            method=METHOD.with_options(**options),
            make_model=classifier,
            inputs=torch.randn(12, 10, generator=generator).relu(),
            targets=torch.arange(12) % 4,
            num_classes=4,
            lr=0.02,
        )
    )


# Standardisation.


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_the_deviation_form_is_batch_norm_without_affine(momentum):
    ours = ClassStandardization(3, eps=1e-3, momentum=momentum).double()
    torchs = nn.BatchNorm1d(3, eps=1e-3, momentum=momentum, affine=False).double()
    for _ in range(3):
        h = 2 * torch.randn(7, 3, dtype=torch.float64) + 1
        gradients = []
        for layer in (ours, torchs):
            given = h.clone().requires_grad_()
            y = layer(given)
            (y * y.detach().cos()).sum().backward()
            gradients.append(given.grad)
        torch.testing.assert_close(ours(h), torchs(h))
        torch.testing.assert_close(*gradients)
    assert ours.state_dict().keys() == torchs.state_dict().keys()
    for one, two in zip(ours.buffers(), torchs.buffers(), strict=True):
        torch.testing.assert_close(one, two)
    torch.testing.assert_close(ours.eval()(h), torchs.eval()(h))
    torchs.load_state_dict(ours.state_dict())


def test_the_notebooks_form():
    """(h - mean) / (unbiased variance + 1e-5), running statistics with a share of 0.1."""
    layer = ClassStandardization(3, divide_by="variance").double()
    mean, variance = torch.zeros(3).double(), torch.ones(3).double()
    for _ in range(2):
        h = 3 * torch.randn(6, 3, dtype=torch.float64) + 1
        expected = (h - h.mean(0)) / (h.var(0) + 1e-5)
        torch.testing.assert_close(layer(h), expected)
        torch.testing.assert_close(class_standardize(h, divide_by="variance"), expected)
        mean, variance = 0.9 * mean + 0.1 * h.mean(0), 0.9 * variance + 0.1 * h.var(0)
    torch.testing.assert_close(layer.running_mean, mean)
    torch.testing.assert_close(layer.running_var, variance)
    torch.testing.assert_close(layer.eval()(h), (h - mean) / (variance + 1e-5))


def test_mean_variance_and_the_order_of_classes():
    h = 4 * torch.randn(9, 5, dtype=torch.float64) + 2
    y = class_standardize(h, eps=0.5)
    v = h.var(0, correction=0)
    torch.testing.assert_close(y.mean(0), torch.zeros(5).double())
    torch.testing.assert_close(y.var(0, correction=0), v / (v + 0.5))
    order = torch.randperm(9)
    torch.testing.assert_close(class_standardize(h[order], eps=0.5), y[order])
    torch.testing.assert_close(class_standardize(h), ClassStandardization(5).double()(h))


def test_statistics_of_half_precision_are_taken_in_single():
    h = torch.randn(300, 4) + 50
    y = ClassStandardization(4)(h.bfloat16())
    assert y.dtype == torch.bfloat16
    expected = class_standardize(h.bfloat16().float())
    torch.testing.assert_close(y.float(), expected, atol=0.02, rtol=0.01)


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_broken_statistics_are_refused_at_loading(name, value):
    model = nn.Sequential(ClassStandardization(3))
    state = model.state_dict()
    state[f"0.{name}"] = torch.tensor([1.0, value, 1.0])
    if name == "running_mean" and value == -1.0:
        model.load_state_dict(state)
        return
    with pytest.raises(ValueError, match=rf"load_state_dict\(0.{name}\): expected finite .*; take"):
        model.load_state_dict(state)
    assert torch.equal(model[0].running_mean, torch.zeros(3))


# Attributes, logits, the last layer.


def test_attributes_get_a_mean_square_of_one():
    attributes = torch.rand(5, 7, dtype=torch.float64) + 0.1
    normal = normalize_attributes(attributes)
    torch.testing.assert_close(normal.square().mean(1), torch.ones(5).double())
    scaled = attributes * torch.tensor([[1e-3], [1], [3], [50], [1e4]]).double()
    torch.testing.assert_close(normalize_attributes(scaled), normal)
    torch.testing.assert_close(normal / normal[:, :1], attributes / attributes[:, :1])
    assert torch.equal(normalize_attributes(torch.zeros(1, 3)), torch.zeros(1, 3))


def test_logits_by_the_formula():
    x, p = torch.randn(4, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    logits = prototype_logits(x, p, 3.0)
    for n in range(4):
        for c in range(3):
            cosine = (x[n] * p[c]).sum() / (x[n].square().sum() * p[c].square().sum()).sqrt()
            torch.testing.assert_close(logits[n, c], 9 * cosine)
    lengths = [torch.rand(count, 1).double() + 0.01 for count in (4, 3)]
    torch.testing.assert_close(prototype_logits(lengths[0] * x, lengths[1] * p, 3.0), logits)
    torch.testing.assert_close(prototype_logits(x, p, 6.0), 4 * logits)
    assert prototype_logits(x, x, 3.0).abs().max() <= 9 * (1 + 1e-12)
    assert prototype_logits(x.bfloat16(), p.bfloat16()).dtype == torch.bfloat16


def test_variance_of_the_logits():
    """Near 1 at g = d^(1/4) for features with zero mean."""
    generator = torch.Generator().manual_seed(0)
    x, p = (torch.randn(300, 2048, generator=generator) for _ in range(2))
    assert prototype_logits(x, p, 2048**0.25).var().item() == pytest.approx(1.0, abs=0.05)


def test_a_dead_prototype_has_a_logit_and_a_gradient_of_zero():
    before = torch.tensor([[-1.0, -2.0], [1.0, 2.0]], requires_grad=True)
    logits = prototype_logits(torch.tensor([[1.0, 1.0]]), before.relu())
    assert logits[0, 0].item() == 0
    logits.sum().backward()
    assert before.grad[0].tolist() == [0, 0]
    assert before.grad.isfinite().all()
    assert before.grad[1].any()
    assert torch.equal(prototype_logits(torch.zeros(1, 2), before.relu()), torch.zeros(1, 2))


def test_seen_scale():
    x, p = torch.rand(4, 6), torch.rand(3, 6)
    seen = torch.tensor([True, False, True])
    plain = prototype_logits(x, p)
    torch.testing.assert_close(
        prototype_logits(x, p, seen=seen, seen_scale=0.95),
        plain * torch.tensor([0.95, 1.0, 0.95]),
    )
    assert torch.equal(prototype_logits(x, p, seen=seen), plain)


def test_start_of_the_last_layer():
    layer = nn.Linear(1024, 2048)
    bias = layer.bias.clone()
    assert class_norm_init_(layer, generator=torch.Generator().manual_seed(0)) is layer
    assert layer.weight.abs().max().item() == pytest.approx(1.19604e-3, rel=1e-4)
    assert layer.weight.var().item() == pytest.approx(1 / (1024 * 2048), rel=0.01)
    assert layer.weight.mean().abs() < 1e-5
    assert torch.equal(layer.bias, bias)


def test_variance_before_the_logits_are_scaled():
    """Var <x, p> is 1 behind S, plus d_x / (3 d_h) by torch's bias; without S it is anything."""
    generator = torch.Generator().manual_seed(0)
    d_h, d_x = 256, 512
    hidden = 7 * torch.rand(200, d_h, generator=generator)
    x = torch.randn(2000, d_x, generator=generator)
    last = class_norm_init_(nn.Linear(d_h, d_x), generator=generator)
    bound = 1 / math.sqrt(d_h)
    nn.init.uniform_(last.bias, -bound, bound, generator=generator)
    with torch.no_grad():
        standard = class_standardize(hidden)
        assert (x @ last(standard).T).var().item() == pytest.approx(1 + d_x / (3 * d_h), rel=0.1)
        last.bias.zero_()
        assert (x @ last(standard).T).var().item() == pytest.approx(1, rel=0.1)
        assert (x @ last(hidden).T).var().item() > 5


# Embedder and classifier.


@pytest.mark.parametrize("divide_by", ["deviation", "variance"])
@pytest.mark.parametrize("training", [True, False])
def test_embedder_by_the_formula(divide_by, training):
    torch.manual_seed(0)
    embedder = ClassEmbedder(6, 10, 16, divide_by=divide_by).double()
    attributes = torch.rand(7, 6, dtype=torch.float64)
    embedder(attributes)
    embedder.train(training)
    twin = copy.deepcopy(embedder)

    def dense(layer, h):
        return h @ layer.weight.T + layer.bias

    h = attributes / attributes.square().mean(1, keepdim=True).sqrt()
    h = dense(twin.linear2, dense(twin.linear1, h).clamp(min=0))
    h = oracle(twin.standardize2, oracle(twin.standardize1, h).clamp(min=0))
    torch.testing.assert_close(embedder(attributes), dense(twin.linear3, h).clamp(min=0))
    torch.testing.assert_close(embedder.train(training)(5 * attributes), twin(attributes))


def test_a_prototype_depends_on_the_other_classes_in_training_only():
    embedder = ClassEmbedder(6, 10, 16).double()
    attributes = torch.rand(7, 6, dtype=torch.float64)
    some, every = embedder(attributes[:3]), embedder(attributes)
    assert (some - every[:3]).abs().max() > 1e-4
    embedder.eval()
    torch.testing.assert_close(embedder(attributes[:3]), embedder(attributes)[:3])
    assert embedder(attributes[:1]).shape == (1, 10)


def test_unseen_classes_take_part_in_evaluation_only():
    torch.manual_seed(0)
    seen = torch.tensor([True, False, True, True])
    model = classifier(class_norm=True, scale=3.0, seen=seen, seen_scale=0.95)
    x = torch.rand(5, 10)
    expected = prototype_logits(x, copy.deepcopy(model.embedder)(model.attributes[[0, 2, 3]]), 3.0)
    logits = model(x)
    assert logits.shape == (5, 4)
    torch.testing.assert_close(logits[:, [0, 2, 3]], expected)
    assert (logits[:, 1] == -math.inf).all()
    targets = torch.tensor([0, 2, 3, 0, 2])
    loss = nn.functional.cross_entropy(logits, targets)
    renumbered = torch.tensor([0, 1, 2, 0, 1])
    torch.testing.assert_close(loss, nn.functional.cross_entropy(expected, renumbered))
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model.embedder.linear3.weight.grad.any()
    model.eval()
    plain = prototype_logits(x, model.embedder(model.attributes), 3.0)
    torch.testing.assert_close(model(x), plain * torch.tensor([0.95, 1.0, 0.95, 0.95]))


def test_no_image_shifts_the_statistics():
    torch.manual_seed(0)
    one = classifier(class_norm=True)
    two = copy.deepcopy(one)
    one(torch.rand(1, 10))
    two(9 * torch.rand(8, 10))
    for a, b in zip(one.buffers(), two.buffers(), strict=True):
        assert torch.equal(a, b)
    assert one.embedder.standardize1.num_batches_tracked == 1


# The method.


def setting(said=None):
    say = (lambda _: None) if said is None else said.append
    return Setting(batches=((torch.rand(4, 10), torch.zeros(4)),), say=say)


@pytest.mark.parametrize(
    ("standardize", "initialize"), [(True, True), (True, False), (False, True)]
)
def test_prepare_completes_a_plain_embedder(standardize, initialize):
    said = []
    model = classifier().double().eval()
    embedder = model.embedder
    weight = embedder.linear3.weight.clone()
    places = (embedder.standardize1, embedder.standardize2)
    assert all(type(place) is nn.Identity for place in places)
    prepared = METHOD.prepare(
        model, setting(said), divide_by="variance", standardize=standardize, initialize=initialize
    )
    assert prepared is model
    for layer in (embedder.standardize1, embedder.standardize2):
        assert isinstance(layer, ClassStandardization) == standardize
        if standardize:
            assert layer.divide_by == "variance"
            assert layer.running_mean.dtype == torch.float64
            assert not layer.training
    assert embedder.standardize1 is not embedder.standardize2 or not standardize
    bound = math.sqrt(3 / (32 * 10))
    assert torch.equal(embedder.linear3.weight, weight) != initialize
    if initialize:
        assert embedder.linear3.weight.abs().max().item() == pytest.approx(bound, rel=0.05)
    assert len(said) == 1
    assert ("standardisation" in said[0]) == standardize
    assert ("initialisation" in said[0]) == initialize


def test_draws_come_from_the_settings_generator():
    weights = []
    for seed in (1, 2):
        model = classifier()
        torch.manual_seed(seed)
        weights.append(METHOD.prepare(model, setting()).embedder.linear3.weight)
    assert torch.equal(*weights)


def test_prepared_equals_built():
    torch.manual_seed(0)
    prepared = METHOD.prepare(classifier(), setting())
    built = classifier(class_norm=True)
    built.load_state_dict(prepared.state_dict())
    x = torch.rand(3, 10)
    assert torch.equal(prepared(x), built(x))
    assert str(prepared) == str(built)


@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_other_models_are_refused_unchanged(name):
    model = build_model(name, (1, 8, 8), 4, depth=8, width=4)
    before = str(model)
    with pytest.raises(Unsuitable, match=r"ClassEmbedder, got .* is no layer for images: take"):
        METHOD.prepare(model, setting())
    assert str(model) == before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ClassStandardization(4)(torch.rand(1, 4)), r"at least two classes .*, got 1; "),
        (lambda: class_standardize(torch.rand(1, 4)), r"at least two classes in training, got 1"),
        (lambda: ClassStandardization(4)(torch.rand(3, 4, 2)), r"\(K, 4\).*no layer for images"),
        (lambda: class_standardize(torch.rand(2, 4), divide_by="std"), r"divide_by='std'"),
        (lambda: ClassStandardization(4, divide_by="sd"), r"'deviation' or 'variance', got 'sd'"),
        (lambda: ClassStandardization(4, eps=0.0), r"eps=0.0.*above 0, got 0.0; use 1e-5"),
        (lambda: ClassStandardization(4, momentum=1.5), r"momentum=1.5.*from 0 to 1, or None"),
        (lambda: ClassEmbedder(4, 3, 2)(torch.rand(2, 5)), r"ClassEmbedder\(input\): expected"),
        (lambda: ClassEmbedder(4, 3, 2)(torch.ones(2, 4).int()), r"floating point, got torch.int"),
        (lambda: ClassEmbedder(4, 3, 2)(torch.rand(1, 4)), r"at least two classes"),
        (lambda: prototype_logits(torch.rand(2, 3), torch.rand(2, 4)), r"prototype_logits\(input"),
        (lambda: prototype_logits(torch.rand(2, 3), torch.rand(2, 3), 0.0), r"scale=0.0.*use 5"),
        (
            lambda: prototype_logits(torch.rand(2, 3), torch.rand(2, 3), seen_scale=-1),
            r"\(seen_scale=-1\): expected a finite number above 0, got -1; use 0.95",
        ),
        (lambda: classifier(seen=torch.tensor([True, False])), r"boolean for each of 4 classes"),
        (lambda: classifier(seen=torch.tensor([1, 0, 1, 1])), r"got torch.int64 of shape \(4,\)"),
        (lambda: classifier(seen=torch.zeros(4, dtype=torch.bool)), r"one of them true"),
        (lambda: METHOD.prepare(classifier(), setting(), divide_by="sd"), r"class-norm\(divide_by"),
        (
            lambda: METHOD.prepare(classifier(), setting(), standardize=False, initialize=False),
            r"expected one of them to be true, got neither; leave",
        ),
    ],
)
def test_wrong_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
