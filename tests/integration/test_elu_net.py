"""The ELU networks: layer by layer, parameter counts, padding, dropout and its schedule."""

import pytest
import torch
from torch import nn

from normlab.lab.models.elu_net import (
    FINE_TUNING_18,
    DropoutStage,
    build_11,
    build_18,
    set_dropout_,
    stage_at,
)

# Units and kernels, written out from the paper's tables, with 100 classes.
EXPECTED = {
    build_11: [
        [(192, 5)],
        [(192, 1), (240, 3)],
        [(240, 1), (260, 2)],
        [(260, 1), (280, 2)],
        [(280, 1), (300, 2)],
        [(300, 1)],
        [(100, 1)],
    ],
    build_18: [
        [(384, 3)],
        [(384, 1), (384, 2), (640, 2), (640, 2)],
        [(640, 1), (768, 2), (768, 2), (768, 2)],
        [(768, 1), (896, 2), (896, 2)],
        [(896, 3), (1024, 2), (1024, 2)],
        [(1024, 1), (1152, 2)],
        [(1152, 1)],
        [(100, 1)],
    ],
}
builds = pytest.mark.parametrize("build", EXPECTED)


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def meta(build, **options):
    with torch.device("meta"):
        return build((3, 32, 32), **options)


@builds
def test_every_layer(build):
    model = meta(build, num_classes=100)
    actual = [
        [(c.out_channels, c.kernel_size[0]) for c in stack if isinstance(c, nn.Conv2d)]
        for stack in model.stacks
    ]
    assert actual == EXPECTED[build]
    for number, stack in enumerate(model.stacks):
        kinds = [type(layer).__name__ for layer in stack]
        last = number + 1 == len(model.stacks)
        plain = ["Conv2d"] if last else ["Conv2d", "ELU", "Dropout"] * len(actual[number])
        assert kinds == plain + ["MaxPool2d"] * (number < 5)


@pytest.mark.parametrize(
    ("build", "classes", "expected"),
    [
        (build_11, 100, 1_669_028),
        (build_11, 10, 1_641_938),
        (build_18, 100, 39_330_404),
        (build_18, 10, 39_226_634),
    ],
)
def test_parameters(build, classes, expected):
    assert count(meta(build, num_classes=classes)) == expected


@builds
@pytest.mark.parametrize("norm", ["none", "batch-norm"])
def test_sizes_on_the_way_and_one_pixel_of_scores(build, norm):
    model = build((3, 32, 32), 7, width_percent=2, norm=norm).eval()
    x = torch.randn(2, 3, 32, 32)
    sizes, y = [], model.pad(x)
    for stack in model.stacks:
        y = stack(y)
        sizes.append(y.shape[-1])
    assert sizes[:6] == [16, 8, 4, 2, 1, 1]
    assert y.shape == (2, 7, 1, 1)
    torch.testing.assert_close(model(x), y.flatten(1))
    assert model(x[:1]).shape == (1, 7)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    hidden = [m for m in model.modules() if isinstance(m, nn.Conv2d)][:-1]
    assert len(norms) == (len(hidden) if norm == "batch-norm" else 0)
    assert all((conv.bias is None) == bool(norms) for conv in hidden)


def test_even_kernels_look_right_and_down():
    conv = build_11((3, 32, 32), 10, width_percent=1).stacks[2][3]
    assert conv.kernel_size == (2, 2)
    with torch.no_grad():
        conv.weight.fill_(1.0)
        conv.bias.zero_()
    x = torch.zeros(1, conv.in_channels, 4, 4)
    x[..., 3, 3] = 1.0
    seen = conv(x)[0, 0] != 0
    assert seen.nonzero().tolist() == [[2, 2], [2, 3], [3, 2], [3, 3]]


def test_smaller_images_are_padded_on_all_sides():
    model = build_11((1, 28, 27), 10, width_percent=2)
    x = torch.ones(1, 1, 28, 27)
    padded = model.pad(x)[0, 0]
    assert padded.shape == (32, 32)
    assert padded.nonzero().min(0).values.tolist() == [2, 2]
    assert padded.nonzero().max(0).values.tolist() == [29, 28]
    assert model(x).shape == (1, 10)


@builds
@pytest.mark.parametrize("sides", [(64, 64), (32, 33), (28, 32), (8, 8)])
def test_images_of_another_size_are_refused(build, sides):
    model = build((3, 32, 32), 10, width_percent=1).eval()
    high, wide = sides
    with pytest.raises(ValueError, match=f"expected images of 32x32, got {high}x{wide}; build it"):
        model(torch.randn(1, 3, *sides))


@builds
def test_the_start_is_he_normal(build):
    torch.manual_seed(0)
    model = build((3, 32, 32), 100, width_percent=25)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    for conv in convolutions:
        assert not conv.bias.any()
        weight = conv.weight.detach()
        if weight.numel() > 3000:
            fan_out = conv.out_channels * conv.kernel_size[0] ** 2
            variance = 1 / conv.in_channels if conv is convolutions[-1] else 2 / fan_out
            assert weight.square().mean().item() == pytest.approx(variance, rel=0.1)
            # The fourth moment of a normal variable; a uniform one has 1.8.
            kurtosis = (weight**4).mean() / weight.square().mean() ** 2
            assert kurtosis.item() == pytest.approx(3.0, abs=0.4)


def rates(model):
    return [[m.p for m in stack if isinstance(m, nn.Dropout)] for stack in model.stacks]


def test_dropout_by_stack():
    model = meta(build_11, num_classes=10)
    assert rates(model) == [[0.0], [0, 0.1], [0, 0.2], [0, 0.3], [0, 0.4], [0.5], []]
    set_dropout_(model, [0.1] * 6 + [0], "all")
    assert rates(model) == [[0.1], [0.1] * 2, [0.1] * 2, [0.1] * 2, [0.1] * 2, [0.1], []]
    given = meta(build_11, num_classes=10, dropout="5-0-0-0-0-0-0")
    assert rates(given)[0] == [0.05]
    assert all(rate == [0.0] * len(rate) for rate in rates(given)[1:])
    assert not any(rate for stack in rates(meta(build_18, num_classes=10)) for rate in stack)


def test_pooling_may_come_before_dropout():
    stack = meta(build_11, num_classes=10, order="pool-dropout").stacks[1]
    assert [type(layer).__name__ for layer in stack][-3:] == ["ELU", "MaxPool2d", "Dropout"]
    assert stack[-1].p == 0.1


def test_fine_tuning():
    first, second = FINE_TUNING_18
    assert first == DropoutStage(50_000, (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.0), "all")
    assert second == DropoutStage(40_000, (0.0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.75, 0.0), "all")
    assert [stage_at(step) for step in (0, 49_999, 50_000, 89_999, 90_000)] == [
        first,
        first,
        second,
        second,
        second,
    ]
    three = (DropoutStage(3, (), "all"), DropoutStage(5, (), "all"), DropoutStage(1, (), "all"))
    found = [three.index(stage_at(step, three)) for step in (2, 3, 7, 8)]
    assert found == [0, 1, 1, 2]
    model = meta(build_18, num_classes=10)
    set_dropout_(model, second.rates, second.scope)
    assert rates(model)[5] == [0.75, 0.75]


def test_evaluation_is_deterministic_and_weights_go_round():
    model = build_11((3, 32, 32), 10, width_percent=3)
    x = torch.randn(3, 3, 32, 32)
    assert not torch.equal(model(x), model(x))
    y = model.eval()(x)
    assert torch.equal(model(x), y)
    other = build_11((3, 32, 32), 10, width_percent=3, dropout="0-0-0-0-0-0-0").eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), y)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((64,), {}),
        ((3, 33, 32), {}),
        ((3, 32, 32), {"width_percent": 0}),
        ((3, 32, 32), {"norm": "group-norm"}),
        ((3, 32, 32), {"order": "pool"}),
        ((3, 32, 32), {"dropout": "0-10"}),
        ((3, 32, 32), {"dropout": "0-10-20-30-40-50-a"}),
        ((3, 32, 32), {"dropout": "0-10-20-30-40-100-0"}),
        ((3, 32, 32), {"dropout": "0-10-20-30-40-50-10"}),
    ],
    ids=str,
)
def test_wrong_options_are_refused(shape, options):
    with pytest.raises(ValueError, match=r"\): expected .*, got .*; "):
        build_11(shape, 10, **{"width_percent": 2} | options)


@builds
def test_a_network_without_classes_is_refused(build):
    with pytest.raises(ValueError, match=r"\(num_classes=0\): expected at least 1, got 0; give"):
        build((3, 32, 32), 0, width_percent=1)


def test_an_unknown_scope_is_refused():
    with pytest.raises(ValueError, match="expected 'last' or 'all', got 'first'"):
        set_dropout_(meta(build_11, num_classes=10), [0.0] * 7, "first")
