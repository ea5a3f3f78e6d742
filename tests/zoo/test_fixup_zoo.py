"""Fixup on real architectures: silent at the start, no normaliser left, every branch alive."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normlab.inits.fixup import prepare, scalars_of
from normlab.inits.fixup_blocks import FixupClassifier, ScalarBias, ScalarScale
from normlab.method import Setting, Unsuitable
from normlab.surgery.branches import plan_branches
from normlab.surgery.flow import evaluating
from zoo_models import timm_model, torchvision_model, torchvision_models

SIDE = 32


def vision_transformer():
    torchvision_models()
    from torchvision.models import VisionTransformer

    return VisionTransformer(SIDE, 8, 2, 2, 24, 48, num_classes=10)


def shallow(name, **options):
    torchvision_models()
    import timm

    return timm.create_model(name, num_classes=10, **options)


# The model, its branches' m, the scalar biases and the readout's place.
MODELS = {
    "torchvision resnet18": (lambda: torchvision_model("resnet18"), [2] * 8, 4 * 8 + 2),
    "torchvision resnet50": (lambda: torchvision_model("resnet50"), [3] * 16, 6 * 16 + 2),
    "torchvision vit": (vision_transformer, [4, 2] * 2, 4 * 2 + 1),
    "torchvision convnext": (lambda: torchvision_model("convnext_tiny"), [3] * 18, 4 * 18 + 1),
    "timm resnet": (lambda: timm_model("resnet10t"), [2] * 4, 4 * 4 + 2 + 2),
    "timm resnet50": (lambda: timm_model("resnet50"), [3] * 16, 6 * 16 + 2),
    # Norm and ReLU stand in front of the fork; the last pair in front of the readout.
    "timm preactivation": (lambda: timm_model("resnetv2_18"), [2] * 8, 4 * 8 + 2),
    "timm vit": (
        lambda: shallow("vit_tiny_patch16_224", img_size=SIDE, depth=2), [4, 2] * 2, 5 * 2 + 1,
    ),
    "timm convnext": (lambda: timm_model("convnext_atto"), [3] * 12, 4 * 12 + 1),
    "timm regnet": (lambda: timm_model("regnety_002"), [3] * 13, 6 * 13 + 2),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_fixup_on_a_real_network(name):
    make, lengths, biases = MODELS[name]
    torch.manual_seed(0)
    model, x = make(), torch.randn(2, 3, SIDE, SIDE)
    plan = plan_branches(model, x)
    assert [branch.length for branch in plan.branches] == lengths
    said = []
    model = prepare(model, Setting(batches=((x, x),), say=said.append))
    known = "paper's block form" in said[0]
    assert known == ("torchvision resnet" in name)
    for training in (True, False):
        assert torch.equal(model.train(training)(x), torch.zeros(2, 10))
    kinds = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
    assert not [n for n, m in model.named_modules() if isinstance(m, kinds)]
    assert sum(isinstance(m, ScalarBias) for m in model.modules()) == biases
    assert sum(isinstance(m, ScalarScale) for m in model.modules()) == len(lengths)
    assert len(scalars_of(model)) == biases + len(lengths) + 1

    # With a readout that reads, every last layer has a gradient, and evaluation is training.
    heads = [
        m
        for m in model.modules()
        if isinstance(m, FixupClassifier)
        or ("fixup_before" in m._modules and not {"fixup_scale", "fixup_after"} & {*m._modules})
        if getattr(m, "bias", None) is not None
    ]
    assert len(heads) == 1
    nn.init.normal_(heads[0].weight)
    if "convnext" not in name:  # its stochastic depth is random in training
        with evaluating(model), torch.no_grad():
            expected = model(x)
        torch.testing.assert_close(model.train()(x), expected)
    F.cross_entropy(model(x), torch.tensor([0, 1])).backward()
    silent = [
        m
        for m in model.modules()
        if isinstance(m, (nn.Linear, nn.Conv2d)) and m not in heads and not m.weight.any()
    ]
    assert len(silent) == len(lengths)
    assert all(m.weight.grad is not None and m.weight.grad.any() for m in silent)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("legacy_seresnet18", r"ends in layer1\.0\.relu, which lets no gradient pass at zero"),
        ("repvgg_a0", "terms with 1 and 1 weight layers"),
        ("nf_resnet26", "a ScaledStdConv2d, which undoes the scaling"),
        ("ese_vovnet19b_slim", "nothing is added"),
    ],
)
def test_refusals_have_a_reason(name, reason):
    x = torch.randn(2, 3, 64, 64)
    with pytest.raises(Unsuitable, match=reason):
        prepare(timm_model(name), Setting(batches=((x, x),)))
