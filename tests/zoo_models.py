"""Real architectures to convert: torchvision's and timm's, which only tests import.

Beside a CPU build of torch the published torchvision raises on import, because one operator of its
extension is missing; declaring that operator lets everything else work.
"""

import sys
import warnings
from functools import cache

import torch
from torch import nn

# Family to a small member of it. Those below a line of their own need a certain input size.
TIMM = {
    "ResNet": "resnet10t",
    "ResNet with anti-aliasing": "resnetblur18",
    "ResNet-V2": "resnetv2_18",
    "SE-ResNet": "legacy_seresnet18",
    "SK-ResNet": "skresnet18",
    "ResNeSt": "resnest14d",
    "RegNet-X": "regnetx_002",
    "RegNet-Y": "regnety_002",
    "MobileNet-V2": "mobilenetv2_035",
    "MobileNet-V3": "mobilenetv3_small_050",
    "MobileNet-V4": "mobilenetv4_conv_small",
    "MNASNet": "mnasnet_small",
    "SemNASNet": "semnasnet_075",
    "SPNASNet": "spnasnet_100",
    "HardCoRe-NAS": "hardcorenas_a",
    "FBNet": "fbnetc_100",
    "LCNet": "lcnet_035",
    "TinyNet": "tinynet_e",
    "EfficientNet-Lite": "tf_efficientnet_lite0",
    "MixNet": "mixnet_s",
    "GhostNet": "ghostnet_050",
    "RepGhostNet": "repghostnet_050",
    "ReXNet": "rexnet_100",
    "DLA": "dla46_c",
    "VoVNet": "ese_vovnet19b_slim",
    "GENet": "gernet_s",
    "ECA-ResNeXt": "eca_resnext26ts",
    "HGNet-V2": "hgnetv2_b0",
    "RepVGG": "repvgg_a0",
    "StarNet": "starnet_s1",
    "EfficientViT": "efficientvit_b0",
    "MobileViT": "mobilevit_xxs",
    "InceptionNeXt": "inception_next_atto",
    "DPN": "dpn48b",
    "Xception": "xception41p",
}


@cache
def torchvision_models():
    """Return ``torchvision.models``, whatever torch build it was made for."""
    try:
        import torchvision
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision

        torchvision.operators_declared_for_tests = library
    return torchvision.models


def timm_model(name: str) -> nn.Module:
    """Return a model of timm with ten classes."""
    torchvision_models()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import timm

        return timm.create_model(name, num_classes=10)


def torchvision_model(name: str) -> nn.Module:
    """Return a model of torchvision with ten classes; a giant classifier becomes a small one."""
    models = torchvision_models()
    options = {}
    if name in ("googlenet", "inception_v3"):
        # Auxiliary heads need inputs of 299 pixels.
        options = {"init_weights": False, "aux_logits": False}
    if name.startswith("vgg"):
        model = models.get_model(name, init_weights=False)
        model.avgpool = nn.AdaptiveAvgPool2d(1)
        model.classifier = nn.Linear(512, 10)
        return model
    return models.get_model(name, num_classes=10, **options)


TORCHVISION = {
    "resnet18": 64,
    "resnet50": 64,
    "vgg11_bn": 32,
    "mobilenet_v3_small": 64,
    "efficientnet_b0": 64,
    "densenet121": 32,
    "inception_v3": 75,
    "googlenet": 64,
}
"""Name to the side of its input."""
