"""The workbench's networks: their size, their structure, and users' own."""

import copy
import math

import pytest
import torch
from torch import nn

from normlab.catalog import find_method
from normlab.lab.models import MODELS, build_model, model_title
from normlab.lab.models.resnet import AveragePoolShortcut, BasicBlock, ZeroPadShortcut
from normlab.method import Setting
from normlab.surgery.branches import plan_branches

ACTIVATIONS = (nn.ReLU, nn.Sigmoid, nn.Tanh)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
CASES = [
    ("mlp", {"depth": 3, "width": 12}),
    ("mlp", {"depth": 1}),
    ("plain-conv", {"depth": 6, "width": 4}),
    ("plain-conv", {"depth": 2, "width": 4, "activation": "tanh"}),
    ("resnet", {"depth": 14, "width": 4}),
    ("resnet", {"depth": 8, "width": 4, "shortcut": "projection"}),
    ("resnet", {"depth": 8, "width": 4, "shortcut": "average-pool"}),
    ("resnet", {"depth": 11, "width": 4, "block": "bottleneck"}),
    ("resnet", {"depth": 11, "width": 4, "block": "bottleneck", "shortcut": "projection"}),
]
SHAPES = [(1, 8, 8), (3, 32, 32), (1, 28, 28), (3, 5, 7), (2, 2, 2)]


def number_of_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def weight_layers(model):
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and "downsample" not in name
    ]


@pytest.mark.parametrize(
    ("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)]
)
def test_resnet_has_the_published_number_of_parameters(depth, millions):
    n = (depth - 2) // 6
    convolutions = 3 * 3 * (3 * 16 + 2 * n * 16**2)  # the first one, and the first stage
    convolutions += 3 * 3 * (16 * 32 + (2 * n - 1) * 32**2 + 32 * 64 + (2 * n - 1) * 64**2)
    norms = 2 * (16 + 2 * n * (16 + 32 + 64))
    readout = 64 * 10 + 10
    model = build_model("resnet", (3, 32, 32), 10, depth=depth)
    assert number_of_parameters(model) == convolutions + norms + readout
    # The paper rounds to two digits, and 1.73 down to 1.7.
    assert number_of_parameters(model) / 1e6 == pytest.approx(millions, abs=0.03)


@pytest.mark.parametrize("depth", [8, 14, 20, 26, 110])
def test_resnet_depth_counts_weight_layers(depth):
    model = build_model("resnet", (3, 32, 32), 10, depth=depth, width=1)
    assert len(weight_layers(model)) == depth


@pytest.mark.parametrize(
    ("name", "depth", "options"),
    [("resnet", 11, {"block": "bottleneck"}), ("resnet", 29, {"block": "bottleneck"})]
    + [("plain-conv", depth, {}) for depth in (2, 3, 4, 5, 8, 40)]
    + [("mlp", depth, {}) for depth in (1, 2, 7)],
)
def test_depth_counts_weight_layers(name, depth, options):
    model = build_model(name, (1, 8, 8), 10, depth=depth, width=2, **options)
    assert len(weight_layers(model)) == depth


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "options"), CASES)
def test_any_image_shape_trains_and_evaluates(name, options, shape):
    torch.manual_seed(0)
    model = build_model(name, shape, 7, **options)
    outputs = model(torch.randn(4, *shape))
    assert outputs.shape == (4, 7)
    outputs.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.eval()
    assert model(torch.randn(1, *shape)).shape == (1, 7)


def test_mlp_takes_features():
    assert build_model("mlp", (13,), 3, depth=2, width=4)(torch.randn(5, 13)).shape == (5, 3)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_every_activation_is_a_module_of_its_own_called_once(name, options):
    model = build_model(name, (3, 16, 16), 10, **options)
    calls = {n: 0 for n, m in model.named_modules() if isinstance(m, ACTIVATIONS)}
    for label, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, ACTIVATIONS):

            def count(module, inputs, output, label=label):
                calls[label] += 1

            module.register_forward_hook(count)
            assert not getattr(module, "inplace", False)
    model(torch.randn(2, 3, 16, 16))
    assert set(calls.values()) <= {1}
    # One after each norm, except that a residual block's last waits for the sum.
    hidden = len(weight_layers(model)) - 1
    assert len(calls) == hidden


@pytest.mark.parametrize(("name", "options"), CASES)
def test_without_its_activation_modules_a_network_is_affine(name, options):
    torch.manual_seed(0)
    model = build_model(name, (3, 16, 16), 10, **options).double()
    model(torch.randn(8, 3, 16, 16, dtype=torch.float64))
    model.eval()
    for parent in list(model.modules()):
        for label, child in list(parent.named_children()):
            if isinstance(child, ACTIVATIONS):
                setattr(parent, label, nn.Identity())
            elif isinstance(child, nn.MaxPool2d):
                setattr(parent, label, nn.AvgPool2d(2))
    a, b = torch.randn(2, 1, 3, 16, 16, dtype=torch.float64)
    offset = model(torch.zeros_like(a))
    torch.testing.assert_close(
        model(2 * a - 3 * b) - offset, 2 * (model(a) - offset) - 3 * (model(b) - offset)
    )


@pytest.mark.parametrize(("name", "options"), CASES)
def test_no_bias_in_front_of_a_norm_and_readout_has_one(name, options):
    model = build_model(name, (3, 16, 16), 10, **options)
    *hidden, readout = weight_layers(model)
    assert all(layer.bias is None for layer in hidden)
    assert readout.bias is not None
    assert not readout.bias.any()
    norms = [module for module in model.modules() if isinstance(module, NORMS)]
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(norms) == len(convolutions) - 1
    assert all((norm.weight == 1).all() and (norm.bias == 0).all() for norm in norms)


@pytest.mark.parametrize("name", ["mlp", "plain-conv"])
def test_sequences_put_the_norm_before_the_activation(name):
    model = build_model(name, (3, 16, 16), 10, depth=5, width=4, activation="sigmoid")
    assert isinstance(model, nn.Sequential)
    kinds = [
        "W" if isinstance(m, nn.Conv2d | nn.Linear) else "N" if isinstance(m, NORMS) else "A"
        for m in model
        if isinstance(m, (nn.Conv2d, nn.Linear, *NORMS, *ACTIVATIONS))
    ]
    assert "".join(kinds) == "WNA" * 4 + "W"
    assert sum(isinstance(module, nn.Sigmoid) for module in model) == 4


@pytest.mark.parametrize(
    ("shape", "pools"), [((1, 8, 8), 2), ((1, 4, 4), 1), ((1, 3, 9), 0), ((3, 32, 32), 2)]
)
def test_plain_conv_pools_while_the_size_allows(shape, pools):
    model = build_model("plain-conv", shape, 10, depth=8, width=2)
    assert sum(isinstance(module, nn.MaxPool2d) for module in model) == pools


def test_initialisation_has_he_variance():
    torch.manual_seed(0)
    model = build_model("resnet", (3, 32, 32), 10, depth=20, width=32)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 5000:
            fan_out = module.out_channels * math.prod(module.kernel_size)
            measured = float(module.weight.detach().std())
            assert measured == pytest.approx(math.sqrt(2 / fan_out), rel=0.05)
    torch.manual_seed(0)
    model = build_model("mlp", (200,), 50, depth=3, width=200)
    first, second, readout = weight_layers(model)
    for layer, gain in ((first, 2), (second, 2), (readout, 1)):
        assert float(layer.weight.detach().std()) == pytest.approx(math.sqrt(gain / 200), rel=0.05)


def test_same_seed_same_weights():
    def weights():
        torch.manual_seed(3)
        return build_model("resnet", (1, 8, 8), 10, depth=8, width=4).state_dict()

    for one, other in zip(weights().values(), weights().values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("stride", [1, 2])
def test_zero_pad_shortcut_keeps_every_stride_th_pixel(stride):
    x = torch.randn(2, 3, 8, 6)
    out = ZeroPadShortcut(stride, new_channels=2)(x)
    assert torch.equal(out[:, :3], x[:, :, ::stride, ::stride])
    assert out.shape[1] == 5
    assert not out[:, 3:].any()


@pytest.mark.parametrize("size", [(8, 6), (7, 5), (4, 1), (1, 1)])
@pytest.mark.parametrize("stride", [1, 2])
def test_average_pool_shortcut_averages_the_pixels_there_are(stride, size):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    out = AveragePoolShortcut(stride, new_channels=2)(x)
    high, wide = (math.ceil(side / stride) for side in size)
    assert out.shape == (2, 5, high, wide)
    for i in range(high):
        for j in range(wide):
            rows = slice(i * stride, (i + 1) * stride)
            window = x[:, :, rows, j * stride : (j + 1) * stride]
            torch.testing.assert_close(out[:, :3, i, j], window.mean((2, 3)))
    assert not out[:, 3:].any()


@pytest.mark.parametrize(
    "method", ["stochastic-depth", "fixup", "ic-layer", "none", "weight-norm", "bn-init"]
)
@pytest.mark.parametrize("size", [16, 9])
def test_methods_work_on_average_pool_shortcuts(method, size):
    torch.manual_seed(0)
    model = build_model("resnet", (3, size, size), 4, depth=14, width=4, shortcut="average-pool")
    assert len(plan_branches(model, torch.randn(2, 3, size, size)).branches) == 6
    x = torch.randn(8, 3, size, size)
    method = find_method(method)
    setting = Setting(batches=((x, torch.arange(8) % 4),), num_classes=4)
    model = method.prepare(model, setting)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    method.attach(model, optimizer, setting)
    outputs = model.train()(x)
    assert outputs.shape == (8, 4)
    outputs.square().sum().backward()
    optimizer.step()
    pools = [module for module in model.modules() if isinstance(module, AveragePoolShortcut)]
    assert len(pools) == 2


def test_last_activation_of_a_block_follows_the_sum():
    block = BasicBlock(3, 3, 1, "zero-pad")
    nn.init.zeros_(block.bn2.weight)
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(block(x), x.clamp(min=0))


def test_resnet_keeps_torchvision_names():
    model = build_model("resnet", (3, 8, 8), 10, depth=11, width=2, block="bottleneck")
    names = [name for name, _ in model.named_children()]
    assert names == ["conv1", "bn1", "relu", "layer1", "layer2", "layer3", "avgpool", "fc"]
    block = [name for name, _ in model.layer2[0].named_children()]
    expected = ["conv1", "bn1", "relu1", "conv2", "bn2", "relu2", "conv3", "bn3"]
    assert block == [*expected, "downsample", "relu3"]
    assert build_model("resnet", (3, 8, 8), 10, depth=8).layer1[0].downsample is None


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mlp", {"depth": 3, "width": 32}),
        ("plain-conv", {"depth": 4, "width": 8}),
        ("resnet", {"depth": 8, "width": 4}),
    ],
)
def test_networks_learn(name, options):
    torch.manual_seed(0)
    inputs, targets = torch.randn(64, 1, 8, 8), torch.arange(64) % 4
    model = build_model(name, (1, 8, 8), 4, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.1
    copy.deepcopy(model).load_state_dict(model.state_dict())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnett", {}, "did you mean 'resnet'"),
        ("zzz", {}, "expected mlp, plain-conv, resnet, .* or path/to/file.py:function"),
        ("resnet", {"dept": 20}, "expected depth, width, block, shortcut, .* mean 'depth'"),
        ("resnet", {"depth": 21}, r"6n \+ 2 .*got 21; .* 20 and 26"),
        ("resnet", {"depth": 4}, "got 4; the nearest possible depths: 8$"),
        ("resnet", {"depth": -5}, "got -5; the nearest possible depths: 8$"),
        ("resnet", {"depth": 20, "block": "bottleneck"}, None),
        ("resnet", {"depth": 21, "block": "bottleneck"}, r"9n \+ 2 .* 20 and 29"),
        ("resnet", {"depth": 20.0}, "expected a whole number, got 20.0"),
        ("resnet", {"depth": True}, "expected a whole number, got True"),
        ("resnet", {"width": 0}, "expected at least 1"),
        ("resnet", {"block": "bottle"}, "expected basic or bottleneck"),
        ("resnet", {"shortcut": "pool"}, "expected zero-pad, average-pool or projection"),
        ("resnet", {"shortcut": 3}, "expected a word, got 3"),
        ("mlp", {"depth": 0}, "expected at least 1"),
        ("mlp", {"activation": "gelu"}, "expected one of relu, sigmoid, tanh"),
        ("plain-conv", {"depth": 1}, "expected at least 2"),
        ("plain-conv", {"width": 0}, "expected at least 1"),
        ("plain-conv", {"activation": "gelu"}, "expected one of relu, sigmoid, tanh"),
    ],
)
def test_what_cannot_be_built_is_refused(name, options, message):
    if message is None:
        build_model(name, (3, 8, 8), 10, **options)
        return
    with pytest.raises(ValueError, match=message):
        build_model(name, (3, 8, 8), 10, **options)


@pytest.mark.parametrize("name", ["resnet", "plain-conv"])
def test_features_are_refused_where_images_are_needed(name):
    with pytest.raises(ValueError, match="use the model mlp"):
        build_model(name, (13,), 10)


def test_titles():
    assert model_title("resnet", {"depth": 56}) == "ResNet-56"
    assert model_title("resnet") == "ResNet-20"
    assert model_title("resnet", {"depth": 20, "width": 16}) == "ResNet-20"
    assert model_title("resnet", {"width": 8}) == "ResNet-20, width 8"
    assert model_title("mlp", {"activation": "tanh"}) == "MLP-4, activation tanh"
    assert model_title("models/mine.py:Net", {"size": 3}) == "Net (mine.py), size 3"
    assert [model_title(entry.name) for entry in MODELS] == [
        "MLP-4",
        "plain ConvNet-8",
        "ResNet-20",
        "Inception-v3",
        "ELU-Net-11",
        "ELU-Net-18",
    ]


@pytest.fixture
def own(tmp_path):
    (tmp_path / "neighbour.py").write_text("WIDTH = 5\n")
    path = tmp_path / "mine.py"
    path.write_text(
        "from dataclasses import dataclass\n"
        "from math import prod\n"
        "from torch import nn\n"
        "from neighbour import WIDTH\n"
        "@dataclass\n"
        "class Options:\n"
        "    width: int = WIDTH\n"
        "def fixed():\n"
        "    return nn.Linear(2, Options().width)\n"
        "def flexible(input_shape, num_classes, width=3):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(prod(input_shape), width),\n"
        "                         nn.Linear(width, num_classes))\n"
        "def eager(**everything):\n"
        "    return nn.Linear(everything['width'], everything['num_classes'])\n"
        "def wanting(num_classes, channels):\n"
        "    return nn.Linear(channels, num_classes)\n"
        "class Net(nn.Linear):\n"
        "    def __init__(self, num_classes):\n"
        "        super().__init__(4, num_classes)\n"
        "def raising():\n"
        "    raise KeyError('no such layer')\n"
        "def nothing():\n"
        "    pass\n"
        "constant = 3\n"
    )
    return path


def test_own_model_gets_what_it_names(own):
    assert build_model(f"{own}:fixed", (1, 8, 8), 10).out_features == 5
    model = build_model(f"{own}:flexible", (1, 8, 8), 10, width=6)
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 10)
    assert model[1].out_features == 6
    assert build_model(f"{own}:eager", (1, 8, 8), 10, width=6).in_features == 6
    assert build_model(f"{own}:wanting", (1, 8, 8), 10, channels=6).in_features == 6
    assert build_model(f"{own}:Net", (1, 8, 8), 10).out_features == 10


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        ("flexibel", {}, "got no 'flexibel'; did you mean 'flexible'"),
        ("flexible", {"widht": 3}, "expected input_shape, num_classes, width|expected width"),
        ("fixed", {"width": 3}, "expected no options, got 'width'"),
        ("wanting", {}, "expected values for channels"),
        ("raising", {}, "got KeyError: 'no such layer'"),
        ("nothing", {}, "expected a torch.nn.Module, got NoneType"),
        ("constant", {}, "expected a function, got int"),
    ],
)
def test_own_model_that_cannot_be_used_names_the_cause(own, function, options, message):
    with pytest.raises(ValueError, match=message):
        build_model(f"{own}:{function}", (1, 8, 8), 10, **options)


def test_own_file_that_cannot_be_used_names_the_cause(tmp_path):
    with pytest.raises(ValueError, match=r"expected a file, got no .*absent.py"):
        build_model(f"{tmp_path / 'absent.py'}:build", (1, 8, 8), 10)
    broken = tmp_path / "broken.py"
    broken.write_text("def build(:\n")
    with pytest.raises(ValueError, match="got SyntaxError"):
        build_model(f"{broken}:build", (1, 8, 8), 10)
    broken.write_text("import no_such_module\n")
    with pytest.raises(ValueError, match=r"got ModuleNotFoundError: .*no_such_module"):
        build_model(f"{broken}:build", (1, 8, 8), 10)
