"""Inception-v3: the published sizes, torchvision's outputs, and what cannot be built."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from normlab.lab import records
from normlab.lab.compare import compare
from normlab.lab.loops.supervised import loss_of
from normlab.lab.models.inception import InceptionV3, build
from normlab.lab.models.inception_modules import AuxiliaryHead, Recipe
from normlab.lab.study import make_study
from normlab.method import Setting
from normlab.norms import group_norm, none
from zoo_models import torchvision_models

# The sheet's table: what leaves each part, in order.
SHAPES = {
    "Conv2d_1a_3x3": (32, 149),
    "Conv2d_2a_3x3": (32, 147),
    "Conv2d_2b_3x3": (64, 147),
    "maxpool1": (64, 73),
    "Conv2d_3b_1x1": (80, 73),
    "Conv2d_4a_3x3": (192, 71),
    "maxpool2": (192, 35),
    "Mixed_5b": (256, 35),
    "Mixed_5c": (288, 35),
    "Mixed_5d": (288, 35),
    "Mixed_6a": (768, 17),
    "Mixed_6b": (768, 17),
    "Mixed_6c": (768, 17),
    "Mixed_6d": (768, 17),
    "Mixed_6e": (768, 17),
    "Mixed_7a": (1280, 8),
    "Mixed_7b": (2048, 8),
    "Mixed_7c": (2048, 8),
}
PAPER_STEM = {
    "Conv2d_3b_3x3": (80, 71),
    "Conv2d_4a_3x3": (192, 35),
    "Conv2d_4b_3x3": (288, 35),
}


def on_meta(**options):
    with torch.device("meta"):
        return InceptionV3(**options)


def outputs_of_parts(model, x):
    found = {}
    for name, module in model.named_children():
        module.register_forward_hook(lambda _, __, out, name=name: found.update({name: out.shape}))
    model(x)
    return found


def narrow(**options):
    torch.manual_seed(0)
    return InceptionV3(5, 2, width_percent=1, **options)


def image(side=75, samples=2, channels=2):
    shape = (samples, channels, side, side)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def number_of_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_parameters_are_as_published():
    assert number_of_parameters(on_meta()) == 23_834_568
    with_head = on_meta(auxiliary=True)
    assert number_of_parameters(with_head) == 27_161_264
    assert number_of_parameters(with_head.AuxLogits) == 3_326_696


def test_multiplications_are_as_counted():
    model = on_meta(auxiliary=True).eval()
    counts = []

    def count(module, inputs, output):
        counts.append(output.numel() * module.weight[0].numel())

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    model(torch.empty(1, 3, 299, 299, device="meta"))
    assert sum(counts) == 5_713_216_096
    assert len(counts) == 95


def test_every_part_has_the_shape_of_the_table():
    model = on_meta(auxiliary=True)
    found = outputs_of_parts(model, torch.empty(2, 3, 299, 299, device="meta"))
    expected = {name: (2, width, side, side) for name, (width, side) in SHAPES.items()}
    assert {name: tuple(found[name]) for name in expected} == expected
    assert tuple(found["AuxLogits"]) == (2, 1000)
    assert [name for name in found if name in expected] == list(expected)


def test_the_papers_stem():
    model = on_meta(stem="paper")
    found = outputs_of_parts(model, torch.empty(2, 3, 299, 299, device="meta"))
    kept = {name: SHAPES[name] for name in SHAPES if "Mixed" in name or "_2" in name}
    for name, (width, side) in (kept | PAPER_STEM).items():
        assert tuple(found[name]) == (2, width, side, side)
    assert "maxpool2" not in found
    assert model.Mixed_5b.branch1x1.conv.in_channels == 288


def torchvisions(**options):
    torch.manual_seed(0)
    return torchvision_models().inception_v3(init_weights=False, num_classes=7, **options)


def with_weights_of(other, **options):
    # Built without storage, so that the weights are neither drawn nor copied.
    model = on_meta(num_classes=7, **options)
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
    return model


def test_evaluation_equals_torchvision():
    theirs = torchvisions(aux_logits=False)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # so that one batch gives statistics of the size that data have
    with torch.no_grad():
        theirs.train()(image(75, 4, channels=3))
        ours = with_weights_of(theirs).eval()
        theirs.eval()
        for side in (75, 112):
            x = image(side, 3, channels=3)
            expected = theirs(x)
            assert expected.std(0).min() > 0.01
            torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)


def test_training_equals_torchvision_with_both_heads():
    theirs = torchvisions(aux_logits=True, dropout=0.0).train()
    ours = with_weights_of(theirs, auxiliary=True, dropout=0.0).train()
    x = image(299, channels=3)
    with torch.no_grad():
        expected, actual = theirs(x), ours(x)
    assert type(actual) is tuple
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer, rtol=1e-5, atol=1e-5)


def test_images_normalised_for_imagenet_are_turned_into_what_the_weights_need():
    torch.manual_seed(0)
    plain = InceptionV3(5, width_percent=1, bn_momentum=1.0).double().train()
    plain(image(samples=4, channels=3).double())
    turning = InceptionV3(5, width_percent=1, transform_input=True).double().eval()
    turning.load_state_dict(plain.eval().state_dict())
    pixels = torch.rand(2, 3, 75, 75, dtype=torch.float64)
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64).view(3, 1, 1)
    actual, expected = turning((pixels - mean) / std), plain((pixels - 0.5) / 0.5)
    assert (plain(pixels) - expected).abs().max() > 1e-4
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_the_auxiliary_head_is_there_in_training_alone():
    model = narrow(auxiliary=True, bn_momentum=0.3)
    x, y = image(299), torch.tensor([0, 1])
    outputs = model.train()(x)
    assert [one.shape for one in outputs] == [(2, 5), (2, 5)]
    loss = loss_of(outputs, y, F.cross_entropy)
    main, other = (F.cross_entropy(one, y) for one in outputs)
    torch.testing.assert_close(loss, main + 0.4 * other)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.eval()(image()).shape == (2, 5)
    assert any(name.startswith("AuxLogits.") for name in model.state_dict())
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.3)}


def test_a_trial_trains_both_heads(tmp_path):
    model = {"name": "inception-v3", "width_percent": 1, "resize": 299, "auxiliary": "yes"}
    study = make_study(
        {
            "task": {"name": "digits", "train_size": 8, "test_size": 4},
            "model": model,
            "methods": ["batch-norm"],
            "seeds": [0],
            "training": {"epochs": 1, "batch_size": 4, "lr": 1e-6, "device": "cpu"},
        }
    )
    compare(study, tmp_path, Console(quiet=True))
    (trial,) = records.read_run(tmp_path).trials
    assert trial.result["reason"] is None
    assert trial.result["status"] == records.FINISHED
    losses = {line["kind"]: line["loss"] for line in trial.metrics}
    # Neither head knows anything yet: each has the loss of guessing among ten.
    assert losses["train"] == pytest.approx(1.4 * math.log(10), rel=0.05)
    assert losses["eval"] == pytest.approx(math.log(10), rel=0.01)


def test_dropout_stands_in_front_of_the_readout():
    model = narrow(dropout=1.0)
    assert torch.equal(model(image()), model.fc.bias.expand(2, 5))
    assert not torch.equal(model.eval()(image()), model.fc.bias.expand(2, 5))


def test_evaluation_does_not_depend_on_the_batch():
    model = narrow(bn_momentum=1.0).double()
    model(image(samples=4).double())
    model.eval()
    x = image(samples=3).double()
    outputs = model(x)
    assert outputs.std(0).min() > 0.01
    torch.testing.assert_close(outputs[1:2], model(x[1:2]), rtol=1e-9, atol=1e-9)


def test_one_sample_trains_unless_a_map_is_one_pixel():
    assert narrow().train()(image(107, samples=1)).shape == (1, 5)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        narrow().train()(image(75, samples=1))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        narrow(auxiliary=True).train()(image(299, samples=1))


def test_larger_maps_are_averaged_in_the_auxiliary_head():
    torch.manual_seed(0)
    head = AuxiliaryHead(8, 3, Recipe(width_percent=5)).eval()
    x = torch.randn(2, 8, 23, 26)
    maps = head.conv1(head.conv0(F.avg_pool2d(x, 5, 3)))
    assert maps.shape[2:] == (3, 4)
    torch.testing.assert_close(head(x), maps.mean((2, 3)) @ head.fc.weight.T + head.fc.bias)


@pytest.mark.parametrize(
    ("percent", "expected"),
    [(100, [32, 48, 80, 448]), (50, [16, 24, 40, 224]), (12, [8, 8, 8, 56]), (1, [8, 8, 8, 8])],
)
def test_widths_are_multiples_of_eight(percent, expected):
    recipe = Recipe(width_percent=percent)
    assert [recipe.channels(width) for width in (32, 48, 80, 448)] == expected
    assert recipe.channels(768) == max(8, 8 * math.floor(768 * percent / 800 + 0.5))


@pytest.mark.parametrize(("counted", "corner"), [(True, 4 / 9), (False, 1.0)])
def test_average_pooling_with_and_without_the_zeros_around(counted, corner):
    model = narrow(count_include_pad=counted)
    pools = [module for module in model.modules() if isinstance(module, nn.AvgPool2d)]
    assert len(pools) == 3 + 4 + 2
    for pool in pools:
        pooled = pool(torch.ones(1, 1, 4, 4))
        assert pooled.shape == (1, 1, 4, 4)
        assert pooled[0, 0, 0, 0].item() == pytest.approx(corner)
        assert pooled[0, 0, 1, 1].item() == pytest.approx(1.0)


def test_a_pair_of_flat_kernels_is_a_separable_square_one():
    torch.manual_seed(0)
    recipe = Recipe(width_percent=1)
    flat = recipe.unit(2, 8, (1, 7), same=True).get_submodule("conv").double()
    tall = recipe.unit(8, 8, (7, 1), same=True).get_submodule("conv").double()
    square = torch.einsum("omy,mix->oiyx", tall.weight[..., 0], flat.weight[:, :, 0])
    x = image(12).double()
    torch.testing.assert_close(tall(flat(x)), F.conv2d(x, square, padding=3))


def test_initialisation():
    torch.manual_seed(0)
    model = InceptionV3(40, width_percent=25, auxiliary=True)
    head = model.AuxLogits
    stds = {head.conv1.conv: 0.01, head.fc: 0.001}
    shrunk = 0.8796  # the deviation of a normal variable cut at two deviations
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            std, weight = stds.get(module, 0.1), module.weight.detach()
            assert weight.abs().max() <= 2 * std * (1 + 1e-6)
            if weight.numel() > 5000:
                assert float(weight.std()) == pytest.approx(shrunk * std, rel=0.05)
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert not module.bias.any()


def test_small_images_are_enlarged_for_the_workbench():
    torch.manual_seed(0)
    model = build((2, 28, 20), 5, width_percent=1).eval()
    plain = narrow().eval()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(2, 2, 28, 20)
    enlarged = F.interpolate(x, (75, 75), mode="bilinear", align_corners=False)
    assert torch.equal(model(x), plain(enlarged))
    assert build((2, 96, 75), 5, width_percent=1).resize is None
    assert build((2, 96, 75), 5, width_percent=1, resize=128).resize is not None
    assert build((2, 299, 320), 5, width_percent=1, auxiliary="yes").AuxLogits is not None
    assert build((2, 28, 28), 5, width_percent=1, resize=299, auxiliary="yes").resize is not None
    assert build((2, 28, 28), 5, width_percent=1, dropout_percent=20).dropout.p == 0.2


def test_every_activation_is_a_module_called_once_and_methods_find_the_norms():
    model = narrow()
    calls = []
    activations = [module for module in model.modules() if isinstance(module, nn.ReLU)]
    for module in activations:
        module.register_forward_hook(lambda module, *_: calls.append(module))
    model(image())
    assert len(activations) == 94
    assert len(calls) == len(set(calls)) == 94
    setting = Setting(batches=((image(), torch.tensor([0, 1])),), num_classes=5)
    for method in (group_norm.METHOD, none.METHOD):
        changed = method.prepare(narrow(), setting)
        assert not any(isinstance(module, nn.BatchNorm2d) for module in changed.modules())
        assert changed.eval()(image()).shape == (2, 5)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((13,), {}, r"expected images \(C, H, W\), got 1 dimensions; use the model mlp"),
        ((3, 32, 32), {"resize": 0}, "at least 75x75, got 32x32; use resize=75"),
        ((3, 32, 32), {"resize": 64}, "expected 0 or at least 75, got 64"),
        ((3, 100, 299), {"auxiliary": "yes"}, "at least 299x299, got 100x299; use resize=299"),
        ((3, 32, 32), {"auxiliary": "yes"}, "expected 0 or at least 299 with an auxiliary head"),
        ((3, 32, 32), {"auxiliary": "maybe"}, "expected no or yes, got 'maybe'"),
        ((3, 32, 32), {"stem": "other"}, "expected released or paper, got 'other'"),
        ((3, 32, 32), {"width_percent": 0}, "expected a number of at least 1, got 0"),
        ((3, 32, 32), {"dropout_percent": 101}, "expected a number from 0 to 100, got 101"),
    ],
)
def test_what_cannot_be_built_is_refused(shape, options, message):
    with pytest.raises(ValueError, match=message):
        build(shape, 10, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "expected a number of at least 1, got 0"),
        ({"bn_momentum": 2.0}, "expected a number from 0 to 1, got 2.0"),
        ({"bn_momentum": -0.1}, "expected a number from 0 to 1, got -0.1"),
        ({"bn_eps": -1.0}, "expected a number above 0, got -1.0"),
        ({"bn_eps": 0.0}, "expected a number above 0, got 0.0"),
        ({"bn_eps": math.nan}, "expected a number above 0, got nan"),
        ({"dropout": 1.5}, "expected a probability from 0 to 1, got 1.5"),
    ],
)
def test_what_has_no_meaning_is_refused(options, message):
    (name,) = options
    with pytest.raises(ValueError, match=rf"inception-v3\({name}=.*{message}; change {name}"):
        on_meta(width_percent=1, **options)


def test_images_that_are_too_small_are_refused():
    with pytest.raises(ValueError, match=r"at least 75x75, got 74x80; build it with resize=75"):
        narrow()(torch.zeros(2, 2, 74, 80))
    model = narrow(auxiliary=True)
    with pytest.raises(ValueError, match=r"at least 299x299 for the auxiliary head, got 298x298"):
        model(image(298))
    with pytest.raises(ValueError, match=r"at least 17x17, .*, got 16x17"):
        model.AuxLogits(torch.zeros(2, 40, 16, 17))
    with pytest.raises(ValueError, match="False for images of 2 channels"):
        narrow(transform_input=True)
