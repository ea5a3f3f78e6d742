"""Batch layer normalisation against its sheet's equations, then the contract."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from normlab.lab.models import build_model
from normlab.method import Setting, Unsuitable
from normlab.norms.batch_layer_norm import (
    METHOD,
    BatchLayerNorm,
    from_batch_norm,
    population_epoch,
)
from normlab.norms.batch_layer_statistics import Population, batch_layer_norm, blend_weights
from normlab.testing import LAYER_CHECKS, METHOD_CHECKS, LayerCase, MethodCase

ALL = list(itertools.product((True, False), repeat=4))


def standard(x, mean, variance, eps):
    return (x - mean) / (variance + eps) ** 0.5


def moments(values):
    """Mean and biased variance, one value after the other."""
    mean = sum(values) / len(values)
    return mean, sum((value - mean) ** 2 for value in values) / len(values)


def oracle(layer, x):
    """The sheet's equations for one batch, seen twice in training before; channels last."""
    x = x.detach()
    if layer.feature_dim == 1:
        x = x.movedim(1, -1)
    n, d = x.shape[0], x.shape[-1]
    mb, vb = moments(list(x))
    if layer.spatial == "pooled":
        mb, vb = moments(list(x.reshape(-1, d)))
        n = x.numel() // d
    mf, vf = (m.unsqueeze(-1) for m in moments(list(x.unbind(-1))))
    if not layer.training:
        vb = vb * n / (n - 1)
    w_f = 1 / layer.nominal_batch_size - 1e-4
    w_b = 1 - w_f
    y = w_f * standard(x, mf, vf, 1e-3) + w_b * standard(x, mb, vb, 1e-3)
    y = (layer.weight * y / math.sqrt(d) + layer.bias).detach()
    return y.movedim(-1, 1) if layer.feature_dim == 1 else y


def case(shape, spatial_shape, **options):
    return LayerCase(
        make=lambda: BatchLayerNorm(
            shape[1] if options.get("feature_dim", 1) == 1 else shape[-1],
            4,
            spatial_shape,
            epoch_steps=3,
            **options,
        ),
        shapes=[shape],
        oracle=oracle,
        batch_statistics=True,
        eval_differs=True,
        # The check varies axis 1, which may have any length where it is pooled over.
        refuses_wrong_input=options != {"spatial": "pooled", "feature_dim": -1},
    )


CASES = {
    "points": case((5, 4), ()),
    "lines": case((5, 4, 3), (3,)),
    "maps": case((5, 4, 3, 2), (3, 2)),
    "volumes": case((3, 4, 2, 3, 2), (2, 3, 2)),
    "sequences": case((5, 3, 3), (3,), feature_dim=-1),
    "pooled maps": case((5, 4, 3, 5), (), spatial="pooled"),
    "pooled points": case((5, 4), (), spatial="pooled"),
    "pooled sequences": case((5, 3, 3), (), spatial="pooled", feature_dim=-1),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("check", LAYER_CHECKS, ids=lambda check: check.__name__)
def test_contract(check, case):
    check(case)


MODELS = {
    "mlp": ({"depth": 4, "width": 16}, (1, 6, 6)),
    "plain-conv": ({"depth": 5, "width": 8}, (2, 8, 8)),
    "resnet": ({"depth": 8, "width": 8}, (2, 8, 8)),
    "resnet projection": ({"depth": 8, "width": 8, "shortcut": "projection"}, (2, 8, 8)),
    "resnet bottleneck": ({"depth": 11, "width": 8, "block": "bottleneck"}, (2, 8, 8)),
}


def method_case(model, method=METHOD):
    options, shape = MODELS[model]
    generator = torch.Generator().manual_seed(0)
    return MethodCase(
        method=method,
        make_model=lambda: build_model(model.split()[0], shape, 4, **options),
        inputs=torch.randn(12, *shape, generator=generator),
        targets=torch.arange(12) % 4,
        num_classes=4,
        lr=0.02,
    )


@pytest.mark.parametrize("check", METHOD_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("model", MODELS)
def test_method(model, check):
    check(method_case(model))


@pytest.mark.parametrize(
    "options",
    [
        {"spatial": "pooled"},
        {"scale_by_dim": False, "batch_weight": 1.0},
        {"weighting": "reference"},
        {"batch_size": "actual", "unbiased": False, "epoch_steps": 5},
    ],
    ids=str,
)
@pytest.mark.parametrize("check", METHOD_CHECKS, ids=lambda check: check.__name__)
def test_method_with_options(check, options):
    check(method_case("resnet", METHOD.with_options(**options)))


EXAMPLE = torch.tensor([[1.0, 3.0], [5.0, 11.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        ("convex", [[-0.70688598, -0.00030698], [0.00011686, 0.70707609]]),
        ("reference", [[-0.70674457, -0.00016556], [-0.00002454, 0.70693468]]),
    ],
)
def test_the_sheets_examples(weighting, expected):
    expected = torch.tensor(expected, dtype=torch.float64)
    weights = blend_weights(2, weighting=weighting)
    y = batch_layer_norm(EXAMPLE, weights=weights)
    torch.testing.assert_close(y, expected, atol=5e-9, rtol=0)
    layer = BatchLayerNorm(2, 2, weighting=weighting).double()
    torch.testing.assert_close(layer(EXAMPLE), expected, atol=5e-9, rtol=0)


def test_weights():
    for size in range(1, 51):
        assert sum(blend_weights(size)) == pytest.approx(1, abs=1e-15)
        reference = blend_weights(size, weighting="reference")
        assert reference == pytest.approx((1 / size - 1e-4, 1 - 1 / size - 1e-4), abs=1e-15)
    assert blend_weights(1)[0] == pytest.approx(0.9999)
    assert blend_weights(4, zeta=0.1) == pytest.approx((0.15, 0.85))


def inputs(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(*shape, generator=generator, dtype=torch.float64) + 1


def test_a_batch_of_one_is_layer_norm():
    x = inputs(1, 6)
    expected = 0.9999 * nn.functional.layer_norm(x, (6,), eps=1e-3) / math.sqrt(6)
    torch.testing.assert_close(BatchLayerNorm(6, 1).double()(x), expected)


@pytest.mark.parametrize("shape", [(7, 3), (7, 3, 4), (7, 3, 4, 2), (5, 3, 2, 4, 2)])
def test_limits(shape):
    x = inputs(*shape)
    weight, bias = inputs(3, seed=1), inputs(3, seed=2)
    fixed = {"scale_by_dim": False, "weight": weight, "bias": bias}
    # Per position each channel and place is a feature of its own.
    places = math.prod(shape[2:])
    expected = nn.functional.batch_norm(
        x.flatten(1), None, None, weight.repeat_interleave(places),
        bias.repeat_interleave(places), training=True, eps=1e-3,
    ).reshape(shape)  # fmt: skip
    torch.testing.assert_close(batch_layer_norm(x, weights=(0.0, 1.0), **fixed), expected)
    expected = nn.functional.batch_norm(x, None, None, weight, bias, training=True, eps=1e-3)
    pooled = batch_layer_norm(x, weights=(0.0, 1.0), spatial="pooled", **fixed)
    torch.testing.assert_close(pooled, expected)
    last = nn.functional.layer_norm(x.movedim(1, -1), (3,), weight, bias, eps=1e-3)
    actual = batch_layer_norm(x, weights=(1.0, 0.0), **fixed)
    torch.testing.assert_close(actual, last.movedim(-1, 1))
    layer = BatchLayerNorm(3, 9, shape[2:], weights=(1.0, 0.0), scale_by_dim=False).double()
    torch.testing.assert_close(layer(x), nn.functional.layer_norm(
        x.movedim(1, -1), (3,), eps=1e-3).movedim(-1, 1))  # fmt: skip


def test_features_last_after_a_recurrent_layer():
    torch.manual_seed(0)
    lstm = nn.LSTM(3, 6, batch_first=True).double()
    sequence = lstm(inputs(5, 4, 3))[0].detach()
    last = BatchLayerNorm(6, 5, (4,), feature_dim=-1, epoch_steps=1).double()
    second = BatchLayerNorm(6, 5, (4,), epoch_steps=1).double()
    for _ in range(2):  # training, then evaluation
        y = last(sequence)
        torch.testing.assert_close(y, second(sequence.mT).mT)
        assert y.stride() == sequence.stride()
        last.eval(), second.eval()
    assert last.population_batch.shape == (2, 6, 4)


@pytest.mark.parametrize("spatial", ["position", "pooled"])
def test_equal_batches_agree_with_batch_norms_plain_averages(spatial):
    batches = [inputs(5, 3, 4, seed=seed) for seed in range(4)]
    layer = BatchLayerNorm(3, 5, (4,) if spatial == "position" else (), spatial=spatial).double()
    norm = nn.BatchNorm1d(12 if spatial == "position" else 3, momentum=None).double()
    with population_epoch(layer):
        for x in batches:
            layer(x)
            norm(x.flatten(1) if spatial == "position" else x)
    kept = layer.population_moments()
    torch.testing.assert_close(kept.batch_mean.flatten(), norm.running_mean)
    torch.testing.assert_close(kept.batch_variance.flatten(), norm.running_var)
    mf, vf = zip(*(moments(list(x.unbind(1))) for x in batches), strict=True)
    for actual, expected in ((kept.layer_mean, mf), (kept.layer_variance, vf)):
        over = 0 if spatial == "position" else (0, 1)
        torch.testing.assert_close(actual[0], (sum(expected) / 4).mean(over))


@pytest.mark.parametrize("spatial", ["position", "pooled"])
def test_unequal_batches_count_by_their_size(spatial):
    batches = [inputs(size, 3, 2, seed=size) for size in (5, 1, 2)]
    layer = BatchLayerNorm(3, 5, (2,) if spatial == "position" else (), spatial=spatial).double()
    with population_epoch(layer):
        for x in batches:
            layer(x)
    if spatial == "pooled":
        batches = [x.movedim(1, -1).reshape(-1, 3) for x in batches]
    sizes = [len(x) for x in batches]
    each = [moments(list(x)) for x in batches]
    mean = sum(n * m for n, (m, _) in zip(sizes, each, strict=True)) / sum(sizes)
    variance = sum(n * v for n, (_, v) in zip(sizes, each, strict=True))
    variance = variance / sum(n - 1 for n in sizes)
    kept = layer.population_moments()
    torch.testing.assert_close(kept.batch_mean, mean)
    torch.testing.assert_close(kept.batch_variance, variance)
    features = [moments(list(x.unbind(1))) for x in batches]
    for actual, place in ((kept.layer_mean, 0), (kept.layer_variance, 1)):
        expected = torch.cat([one[place] for one in features]).mean(0)
        torch.testing.assert_close(actual[0], expected)


@pytest.mark.parametrize("asked", ALL, ids=lambda asked: "".join("FT"[s] for s in asked))
def test_every_choice_of_switches(asked):
    layer = BatchLayerNorm(3, 4, (2,)).double()
    with population_epoch(layer):
        for seed in range(3):
            layer(inputs(4, 3, 2, seed=seed))
    layer.eval()
    layer.population = Population(*asked)
    x = inputs(6, 3, 2, seed=9) * 3
    kept = layer.population_moments()
    mb, vb = moments(list(x))
    mf, vf = (m.unsqueeze(1) for m in moments(list(x.unbind(1))))
    mb = kept.batch_mean if asked[0] else mb
    vb = kept.batch_variance if asked[1] else vb
    mf = kept.layer_mean.unsqueeze(1) if asked[2] else mf
    vf = kept.layer_variance.unsqueeze(1) if asked[3] else vf
    w_f = 1 / 4 - 1e-4
    y = w_f * standard(x, mf, vf, 1e-3) + (1 - w_f) * standard(x, mb, vb, 1e-3)
    torch.testing.assert_close(layer(x), y / math.sqrt(3))
    alone = torch.cat([layer(sample[None]) for sample in x])
    assert torch.allclose(alone, layer(x)) == (asked[0] and asked[1])


def test_without_population_evaluation_is_training():
    layer = BatchLayerNorm(3, 4, (2,), population=Population.read("FFFF")).double()
    x = inputs(4, 3, 2)
    expected = layer(x)
    assert torch.equal(layer.eval()(x), expected)  # and asks for no finalised epoch


def test_weights_of_a_small_last_batch():
    x = inputs(2, 3)
    nominal = BatchLayerNorm(3, 8, epoch_steps=1).double()
    actual = BatchLayerNorm(3, 8, epoch_steps=1, batch_size="actual").double()
    fixed = BatchLayerNorm(3, 8, weights=(0.3, 0.9), batch_size="actual").double()
    torch.testing.assert_close(nominal(x), batch_layer_norm(x, weights=blend_weights(8)))
    torch.testing.assert_close(actual(x), batch_layer_norm(x, weights=blend_weights(2)))
    torch.testing.assert_close(fixed(x), batch_layer_norm(x, weights=(0.3, 0.9)))
    assert torch.equal(actual.eval()(x), nominal.eval()(x))


def test_reference_keeps_the_layers_moments_by_place():
    batches = [inputs(3, 4, 2, seed=seed) for seed in range(2)]
    layer = BatchLayerNorm(4, 3, (2,), weighting="reference").double()
    with population_epoch(layer):
        for x in batches:
            layer(x)
    each = [moments(list(x.unbind(1))) for x in batches]
    kept = layer.population_moments()
    torch.testing.assert_close(kept.layer_mean, sum(m for m, _ in each) / 2)
    torch.testing.assert_close(kept.layer_variance, sum(v for _, v in each) / 2 * 3 / 2)
    layer.eval()
    layer.population = Population(True, True, True, True)
    mf, vf = (m.unsqueeze(1) for m in (kept.layer_mean, kept.layer_variance))
    w_f, w_b = 1 / 3 - 1e-4, 1 - 1 / 3 - 1e-4
    x = batches[0]
    y = w_f * standard(x, mf, vf, 1e-3)
    y = y + w_b * standard(x, kept.batch_mean, kept.batch_variance, 1e-3)
    torch.testing.assert_close(layer(x), y / 2)
    with pytest.raises(ValueError, match="expected 3 samples for population values"):
        layer(x[:2])
    layer.population = Population()
    assert layer(x[:2]).shape == (2, 4, 2)


def test_reference_with_small_batches():
    """A place has an average over the batches that reach it; an unreached one is refused."""
    layer = BatchLayerNorm(4, 3, weighting="reference", epoch_steps=9).double()
    first, second = inputs(2, 4), inputs(1, 4, seed=1)
    layer(first)
    layer(second)
    means = torch.stack([(2 * first.mean(1)[0] + second.mean(1)[0]) / 3, first.mean(1)[1]])
    torch.testing.assert_close(layer.averages("epoch").layer[0, :2], means)
    layer.population = Population(layer_mean=True)
    with pytest.raises(ValueError, match=r"training batches of 3 samples .* got at most 2"):
        layer.eval()(inputs(3, 4))
    layer.train()
    with pytest.raises(ValueError, match="at most nominal_batch_size=3 samples"):
        layer(inputs(4, 4))
    pooled = BatchLayerNorm(4, 3, weighting="reference", spatial="pooled").double()
    x = inputs(3, 4, 5)
    pooled(x)
    expected = x.mean((1, 2))
    torch.testing.assert_close(pooled.averages("epoch").layer[0], expected)


def test_reference_with_one_position():
    """A spatial axis of length 1 is an axis all the same."""
    layer = BatchLayerNorm(4, 3, (1,), weighting="reference").double()
    x = inputs(3, 4, 1)
    layer(x)
    torch.testing.assert_close(layer.averages("epoch").layer[0], x.mean(1))


def test_an_epoch_that_was_not_ended_is_refused():
    layer = BatchLayerNorm(3, 4)
    with pytest.raises(ValueError, match=r"finalised population .* call finalize_population\(\)"):
        layer.eval()(torch.randn(4, 3))
    layer.train()(torch.randn(4, 3))
    with pytest.raises(ValueError, match="finalised population"):
        layer.eval()(torch.randn(4, 3))
    layer.finalize_population()
    layer(torch.randn(1, 3))
    with pytest.raises(ValueError, match="got none"):
        layer.finalize_population()
    layer.train()(torch.randn(4, 3))
    for letters in ("TFFF", "FTFF", "FFTF", "FFFT"):
        layer.population = Population.read(letters)
        with pytest.raises(ValueError, match="finalised population"):
            layer.eval()(torch.randn(4, 3))


def test_a_compiled_evaluation_of_no_epoch_is_not_a_number():
    layer = BatchLayerNorm(3, 4, (2,)).eval()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert compiled(torch.randn(4, 3, 2)).isnan().all()
    with population_epoch(layer):
        layer.train()(torch.randn(4, 3, 2))
    x = torch.randn(2, 3, 2)
    expected = layer.eval()(x)
    torch.testing.assert_close(compiled(x), expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_single_values_have_no_variance(compiled):
    layer = BatchLayerNorm(3, 1, epoch_steps=2)
    for _ in range(2):
        assert layer(torch.randn(1, 3)).isfinite().all()
    layer.eval()
    if compiled:
        run = torch.compile(layer, fullgraph=True, backend="eager")
        assert run(torch.randn(4, 3)).isnan().all()
    with pytest.raises(ValueError, match="set unbiased=False"):
        layer(torch.randn(4, 3))
    layer.population = Population.read("TFTT")
    assert layer(torch.randn(4, 3)).isfinite().all()
    layer.population, layer.unbiased = Population.read("TTFF"), False
    assert layer(torch.randn(4, 3)).isfinite().all()
    assert (layer.population_moments().batch_variance == 0).all()
    pooled = BatchLayerNorm(3, 1, spatial="pooled", epoch_steps=2)
    pooled(torch.randn(1, 3, 2))
    assert pooled.eval()(torch.randn(1, 3, 2)).isfinite().all()
    # One larger batch is enough.
    layer.train()(torch.randn(1, 3))
    layer(torch.randn(2, 3))
    layer.unbiased = True
    assert layer.eval()(torch.randn(1, 3)).isfinite().all()


def test_reset_empties_the_buffers():
    layer = BatchLayerNorm(3, 4, (2,), epoch_steps=2)
    fresh = copy.deepcopy(dict(layer.named_buffers()))
    for _ in range(3):
        layer(torch.randn(4, 3, 2))
    assert layer.population_counts.tolist() == [2, 8]
    assert layer.epoch_counts.tolist() == [1, 4]
    layer.reset_population()
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, fresh[name]), name


def test_own_epochs():
    """Evaluation takes the last full epoch; in the first one what there is; before, 0 and 1."""
    layer = BatchLayerNorm(3, 4, epoch_steps=2).double()
    batches = [inputs(4, 3, seed=seed) for seed in range(5)]
    kept = layer.population_moments()
    assert (kept.batch_mean == 0).all()
    assert (kept.batch_variance == 1).all()
    assert (kept.layer_mean == 0).all()
    assert (kept.layer_variance == 1).all()
    expected = [batches[:1], batches[:2], batches[:2], batches[2:4], batches[2:4]]
    for x, behind in zip(batches, expected, strict=True):
        layer.train()(x)
        before = copy.deepcopy(dict(layer.named_buffers()))
        layer.eval()(x)
        for name, buffer in layer.named_buffers():
            assert torch.equal(buffer, before[name]), f"evaluation changed {name}"
        kept = layer.population_moments()
        mean = sum(one.mean(0) for one in behind) / len(behind)
        torch.testing.assert_close(kept.batch_mean, mean)
        variance = sum(one.var(0) for one in behind) / len(behind)
        torch.testing.assert_close(kept.batch_variance, variance)


def test_what_was_not_a_number_leaves_with_its_epoch():
    layer = BatchLayerNorm(3, 4, epoch_steps=1)
    layer(torch.full((4, 3), math.nan))
    layer(torch.randn(4, 3))
    assert layer.eval()(torch.randn(2, 3)).isfinite().all()


def test_the_epochs_context_restores():
    model = nn.ModuleList([BatchLayerNorm(3, 4, epoch_steps=2), BatchLayerNorm(3, 4)])
    x = torch.randn(4, 3)
    for _ in range(3):
        model[0](x)
    before = copy.deepcopy(model.state_dict())

    def stopped():
        with population_epoch(model):
            model[0](2 * x)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stopped()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert model[0].epoch_steps == 2
    with population_epoch(model):
        for factor in (1, 2, 3):  # more than its own epoch
            model[0](factor * x)
    torch.testing.assert_close(model[0].population_moments().batch_mean, 2 * x.mean(0))
    assert model[0].epoch_steps == 2
    assert torch.equal(model[1].population_batch, before["1.population_batch"])
    with (
        pytest.raises(ValueError, match="got Linear without any"),
        population_epoch(nn.Linear(2, 2)),
    ):
        pass


def test_saving_keeps_buffers_and_counts():
    layer = BatchLayerNorm(3, 4, (2,), epoch_steps=3)
    for seed in range(4):
        layer(inputs(4, 3, 2, seed=seed).float())
    other = BatchLayerNorm(3, 4, (2,), epoch_steps=3)
    other.load_state_dict(layer.state_dict())
    for seed in range(4, 7):
        x = inputs(4, 3, 2, seed=seed).float()
        assert torch.equal(layer(x), other(x))
    for (name, one), two in zip(layer.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(one, two), name
    assert set(layer.state_dict()) == {
        "weight", "bias", "epoch_batch", "epoch_layer", "epoch_counts",
        "population_batch", "population_layer", "population_counts",
    }  # fmt: skip


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_impossible_statistics_are_not_loaded(value):
    layer = BatchLayerNorm(3, 4)
    for name in ("epoch_batch", "population_layer"):
        state = copy.deepcopy(layer.state_dict())
        state[name][1] = value
        with pytest.raises(ValueError, match=rf"load_state_dict\(0\.{name}\): expected finite"):
            nn.Sequential(layer).load_state_dict({f"0.{key}": v for key, v in state.items()})
    assert (layer.population_layer[1] == 1).all()


def test_half_precision_counts_on():
    """Sums in bfloat16 stop growing after some hundred batches; averages stay where they are."""
    layer = BatchLayerNorm(2, 4).bfloat16()
    x = torch.tensor([[1.0, 5.0], [3.0, 9.0]], dtype=torch.bfloat16)
    with population_epoch(layer):
        for _ in range(600):
            layer(x)
    assert layer.population_counts.tolist() == [600, 1200]
    assert layer.population_moments().batch_mean.tolist() == [2.0, 7.0]
    assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_features": 0}, "num_features=0.*whole number above 0"),
        ({"nominal_batch_size": 0}, "nominal_batch_size=0"),
        ({"nominal_batch_size": 2.5}, r"nominal_batch_size=2\.5"),
        ({"spatial_shape": (3, 0)}, r"spatial_shape\[1\]=0"),
        ({"spatial_shape": (3,), "spatial": "pooled"}, "expected .* with spatial='pooled'"),
        ({"epoch_steps": 0}, "epoch_steps=0"),
        ({"feature_dim": 2}, "expected 1 or -1"),
        ({"eps": 0.0}, "eps=0.0.*above 0"),
        ({"eps": math.nan}, "eps=nan"),
        ({"zeta": -0.1}, "zeta=-0.1"),
        ({"zeta": 1.0}, "zeta=1.0"),
        ({"weights": (0.1,)}, "two numbers"),
        ({"weights": (0.1, math.nan)}, "two numbers"),
        ({"spatial": "pool"}, "do you mean 'pooled'"),
        ({"weighting": "ref"}, "do you mean 'reference'"),
        ({"batch_size": "actuel"}, "do you mean 'actual'"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        BatchLayerNorm(**{"num_features": 3, "nominal_batch_size": 4, **arguments})


def test_input_of_another_shape():
    layer = BatchLayerNorm(3, 4, (2,))
    for x in (torch.randn(4, 3, 5), torch.randn(4, 3), torch.randn(4, 3, 2, 2)):
        with pytest.raises(ValueError, match=r"positions of shape \(2,\), got .* or spatial='poo"):
            layer(x)
    with pytest.raises(ValueError, match=r"set spatial_shape=\(5, 6\)"):
        BatchLayerNorm(3, 4)(torch.randn(4, 3, 5, 6))
    with pytest.raises(ValueError, match=r"expected shape \(N, \*, 3\), got \(4, 2, 5\)"):
        BatchLayerNorm(3, 4, (2,), feature_dim=-1)(torch.randn(4, 2, 5))
    pooled = BatchLayerNorm(3, 4, spatial="pooled", epoch_steps=5)
    for shape in ((4, 3, 5), (2, 3, 2, 2), (4, 3)):
        assert pooled(torch.randn(shape)).shape == shape
        assert pooled.eval()(torch.randn(shape)).shape == shape
        pooled.train()


@pytest.mark.parametrize("letters", ["TTF", "TTFX", "ttff", ""])
def test_letters(letters):
    with pytest.raises(ValueError, match="four letters"):
        Population.read(letters)


def test_what_is_kept_of_a_batch_norm():
    norm = nn.BatchNorm2d(3)
    norm.train()(torch.randn(8, 3, 2, 2) + 5)
    nn.init.uniform_(norm.weight)
    nn.init.uniform_(norm.bias)
    layer = from_batch_norm(norm, 4, (2, 5), epoch_steps=1)
    assert torch.equal(layer.weight, norm.weight)
    assert torch.equal(layer.bias, norm.bias)
    kept = layer.population_moments()
    ones = torch.ones(3, 2, 5)
    assert torch.equal(kept.batch_mean, norm.running_mean[:, None, None] * ones)
    assert torch.equal(kept.batch_variance, norm.running_var[:, None, None] * ones)
    bare = from_batch_norm(nn.BatchNorm1d(3, affine=False, track_running_stats=False), 4)
    assert (bare.weight == 1).all()


class Twice(nn.Module):
    """One normaliser in two places, of equal or different size."""

    def __init__(self, stride):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, stride, padding=1)
        self.norm = nn.BatchNorm2d(1)
        self.unused = nn.BatchNorm2d(1) if stride == 3 else None

    def forward(self, x):
        x = self.norm(self.conv(x))
        return self.norm(x if self.unused else self.conv(x)).flatten(1)


def setting(x, **facts):
    return Setting(batches=((x, torch.zeros(len(x))),), **facts)


def test_preparing_reads_size_shape_and_epoch():
    said = []
    facts = setting(torch.randn(6, 1, 4, 4), total_steps=55, say=said.append)
    model = METHOD.prepare(Twice(1), facts)
    assert model.norm.spatial_shape == (4, 4)
    assert model.norm.nominal_batch_size == 6
    assert model.norm.epoch_steps == 5
    assert model.norm.population == Population()
    assert said == ["1 BatchNorm layers became BatchLayerNorm, for batches of 6 and epochs of "
                    "5 steps"]  # fmt: skip
    options = METHOD.with_options(
        nominal_batch_size="9", batch_weight="0.25", population="FTFF", epoch_steps=7, eps=0.1,
        spatial="pooled", scale_by_dim="false", unbiased="false", batch_size="actual",
    )  # fmt: skip
    norm = options.prepare(Twice(2), facts).norm
    assert (norm.nominal_batch_size, norm.weights) == (9, (0.75, 0.25))
    assert norm.population == Population(batch_mean=False)
    assert (norm.epoch_steps, norm.eps, norm.spatial, norm.batch_size) == (
        7,
        0.1,
        "pooled",
        "actual",
    )
    assert not norm.scale_by_dim
    assert not norm.unbiased
    assert norm.spatial_shape == ()


def test_models_that_do_not_fit_are_left_alone():
    x = torch.randn(6, 1, 4, 4)
    for model, word in (
        (Twice(2), r"norm to see maps of one size, got \[\(1, 1\), \(2, 2\)\]"),
        (Twice(3), "unused to see maps .* none in evaluation mode"),
        (nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), "without any"),
    ):
        before = str(model)
        with pytest.raises(Unsuitable, match=word):
            METHOD.prepare(model, setting(x))
        assert str(model) == before
    flat = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16))
    with pytest.raises(Unsuitable, match="batches of one sample; take unbiased=false"):
        METHOD.prepare(flat, setting(x[:1]))
    assert METHOD.with_options(population="TFFF").prepare(flat, setting(x[:1])) is flat
    with pytest.raises(ValueError, match="four letters"):
        METHOD.with_options(population="TT").prepare(Twice(1), setting(x))
