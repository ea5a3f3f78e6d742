"""Folding an exported program against that program's own outputs, before and after lowering."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from normlab.method import Unsuitable
from normlab.surgery.fold_exported import fold_exported
from resnets_of_others import FunctionalBlock, FunctionalResNet, TorchvisionResNet

# Warns of itself in torch 2.13 whenever a program is copied.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")

LOWERINGS = {
    "exported": lambda program: program,
    "decomposed": lambda program: program.run_decompositions(),
}
lowered = pytest.mark.parametrize("lower", LOWERINGS.values(), ids=LOWERINGS)


def trained(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            with torch.no_grad():
                module.running_mean.normal_(generator=generator)
                module.running_var.uniform_(0.3, 3, generator=generator)
                for parameter in module.parameters():
                    parameter.uniform_(0.5, 2, generator=generator)
    return model.double().eval()


def norm_nodes(program):
    return [node for node in program.graph.nodes if "batch_norm" in str(node.target)]


def check(model, x, lower, *, folded, skipped=(), **options):
    """Fold the exported model; outputs stay, the old program too, and the norms named are gone."""
    x = x.double()
    program = lower(torch.export.export(trained(model), (x,), **options))
    expected, listing = program.module()(x), str(program.graph)
    state = {name: value.clone() for name, value in program.state_dict.items()}
    new, report = fold_exported(program)
    torch.testing.assert_close(new.module()(x), expected, rtol=1e-9, atol=1e-9)
    assert set(report.folded) == set(folded)
    assert set(report.skipped) == set(skipped)
    assert len(norm_nodes(new)) == len(skipped)
    left = [name for name in new.state_dict if name.endswith("running_mean")]
    assert len(left) == len(skipped)
    assert str(program.graph) == listing
    assert all(torch.equal(program.state_dict[name], value) for name, value in state.items())
    return new, report


LAYERS = {
    "linear": (nn.Linear(6, 4), nn.BatchNorm1d(4), (5, 6)),
    "linear without bias": (nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4), (5, 6)),
    "conv1d": (nn.Conv1d(6, 4, 3, padding="same"), nn.BatchNorm1d(4), (5, 6, 7)),
    "conv2d": (nn.Conv2d(6, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), (5, 6, 7, 7)),
    "grouped": (nn.Conv2d(6, 4, 3, groups=2), nn.BatchNorm2d(4), (5, 6, 7, 7)),
    "conv3d": (nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4), (5, 2, 3, 3, 3)),
    "transposed": (
        nn.ConvTranspose2d(6, 4, 3, 2, 1, 1, groups=2, bias=False),
        nn.BatchNorm2d(4),
        (5, 6, 7, 7),
    ),
    "transposed 1d": (nn.ConvTranspose1d(6, 4, 3, 2), nn.BatchNorm1d(4), (5, 6, 7)),
    "transposed 3d": (nn.ConvTranspose3d(2, 4, 2), nn.BatchNorm3d(4), (5, 2, 3, 3, 3)),
    "no affine": (nn.Linear(6, 4), nn.BatchNorm1d(4, affine=False), (5, 6)),
}


@lowered
@pytest.mark.parametrize(("layer", "norm", "shape"), LAYERS.values(), ids=LAYERS)
def test_into_the_layer_before(layer, norm, shape, lower):
    model = copy.deepcopy(nn.Sequential(layer, norm, nn.ReLU()))
    new, report = check(model, torch.randn(shape), lower, folded=["1"])
    assert report.folded == {"1": "into '0' before it"}
    assert set(new.state_dict) == {"0.weight", "0.bias"}


AFTER = {
    "linear": (nn.Linear(4, 6, bias=False), (5, 4)),
    "conv1d": (nn.Conv1d(4, 6, 3), (5, 4, 7)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, bias=False), (5, 4, 7, 7)),
    "transposed pointwise": (nn.ConvTranspose2d(4, 6, 1, groups=2), (5, 4, 3, 3)),
}


@lowered
@pytest.mark.parametrize(("layer", "shape"), AFTER.values(), ids=AFTER)
def test_into_the_layer_after(layer, shape, lower):
    norm = nn.BatchNorm2d(4) if len(shape) == 4 else nn.BatchNorm1d(4)
    model = nn.Sequential(nn.Tanh(), norm, copy.deepcopy(layer))
    _, report = check(model, torch.randn(shape), lower, folded=["1"])
    assert report.folded == {"1": "into '2' after it"}


@lowered
@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(4, 6, 3, padding=1), nn.ConvTranspose2d(4, 6, 3)],
    ids=["conv", "transposed"],
)
def test_a_shift_does_not_go_through_a_border(layer, lower):
    model = nn.Sequential(nn.Tanh(), nn.BatchNorm2d(4), copy.deepcopy(layer))
    _, report = check(model, torch.randn(3, 4, 6, 6), lower, folded=[], skipped=["1"])
    assert report.skipped["1"].endswith("at the borders of '2' its shift would differ")
    assert report.skipped["1"].startswith("'tanh' makes its input")


# Networks.


@pytest.mark.parametrize(
    ("make", "lower"),
    [
        (TorchvisionResNet, lambda program: program),
        (FunctionalResNet, lambda program: program.run_decompositions()),
        # For inference: convolutions and linear layers stay what they were.
        (FunctionalResNet, lambda program: program.run_decompositions({})),
    ],
    ids=["exported", "decomposed", "inference"],
)
def test_every_norm_of_a_post_activation_network(make, lower):
    model = make()
    names = [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    new, report = check(model, torch.randn(2, 3, 16, 16), lower, folded=names)
    assert str(report).splitlines()[0].split() == "bn1 folded into 'conv1' before it".split()
    assert "conv1.bias" in new.state_dict


@lowered
def test_a_pre_activation_network_keeps_the_norms_after_sums(lower):
    model = FunctionalResNet(*(FunctionalBlock(8, first_norm=True) for _ in range(2)))
    skipped = ["layer1.0.bn1", "layer1.1.bn1"]
    folded = ["bn1", "layer1.0.bn2", "layer1.1.bn2"]
    _, report = check(model, torch.randn(2, 3, 8, 8), lower, folded=folded, skipped=skipped)
    assert "add" in report.skipped["layer1.1.bn1"]
    assert "relu" in report.skipped["layer1.1.bn1"]


@lowered
def test_linear_layers_with_norms_on_both_sides_and_in_rows(lower):
    model = nn.Sequential(
        nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.BatchNorm1d(8), nn.ReLU(),
        nn.BatchNorm1d(8), nn.BatchNorm1d(8), nn.Linear(8, 6), nn.BatchNorm1d(6),
    )  # fmt: skip
    _, report = check(model, torch.randn(5, 4), lower, folded="12457")
    assert report.folded["4"] == "into '6' after it"
    assert report.folded["7"] == "into '6' before it"


class Depthwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, groups=3, bias=False), nn.BatchNorm2d(6)
        self.point, self.last = nn.Conv2d(6, 3, 1, bias=False), nn.BatchNorm2d(3)

    def forward(self, x):
        return {"out": self.last(self.point(F.relu6(self.norm(self.conv(x)))))}


def test_the_result_is_saved_run_on_other_sizes_lowered_and_taken_apart():
    x = torch.randn(4, 3, 8, 8).double()
    sizes = {0: torch.export.Dim("batch", min=2), 3: torch.export.Dim("width", min=4)}
    program = torch.export.export(trained(Depthwise()), (x,), dynamic_shapes={"x": sizes})
    expected = program.module()
    new, _ = fold_exported(program)
    file = io.BytesIO()
    torch.export.save(new, file)
    file.seek(0)
    others = {
        "itself": new.module(),
        "loaded": torch.export.load(file).module(),
        "decomposed": new.run_decompositions().module(),
        "unflattened": torch.export.unflatten(new),
    }
    other = torch.randn(7, 3, 8, 11).double()
    for name, model in others.items():
        torch.testing.assert_close(
            model(other)["out"],
            expected(other)["out"],
            rtol=1e-9,
            atol=1e-9,
            msg=lambda text, name=name: f"{name}: {text}",
        )
    assert {name for name, _ in new.named_parameters()} == {
        f"{layer}.{kind}" for layer in ("conv", "point") for kind in ("weight", "bias")
    }


# What forbids folding.


class Used(nn.Module):
    def __init__(self, use):
        super().__init__()
        self.layer, self.norm, self.use = nn.Linear(3, 3), nn.BatchNorm1d(3), use

    def forward(self, x):
        y = self.layer(x)
        return self.use(self, x, y)


USES = {
    "a sum": (lambda m, x, y: m.norm(y) + y, " takes the output of 'layer', too"),
    "the output": (lambda m, x, y: (m.norm(y), y), "the program takes the output of 'layer', too"),
    "the weight": (lambda m, x, y: m.norm(y) + x @ m.layer.weight, "shares a parameter"),
    "the bias": (lambda m, x, y: m.norm(y) + m.layer.bias, "shares a parameter"),
    "the layer twice": (lambda m, x, y: m.norm(y) + m.layer(x + 1), "shares a parameter"),
    "an activation between": (lambda m, x, y: m.norm(F.relu(y)), "'relu' makes its input"),
    "the user's input": (lambda m, x, y: m.norm(x) + y, "the user makes its input"),
}


@lowered
@pytest.mark.parametrize(("use", "reason"), USES.values(), ids=USES)
def test_any_other_use_forbids_it(use, reason, lower):
    _, report = check(Used(use), torch.randn(4, 3), lower, folded=[], skipped=["norm"])
    assert reason in report.skipped["norm"]


@lowered
def test_a_norm_after_two_layers_goes_into_both(lower):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.norm = nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(self.one(x)) - self.norm(self.two(x))

    x = torch.randn(4, 3).double()
    program = lower(torch.export.export(trained(Twice()), (x,)))
    new, report = fold_exported(program)
    torch.testing.assert_close(new.module()(x), program.module()(x), rtol=1e-9, atol=1e-9)
    assert sorted(report.folded.values()) == ["into 'one' before it", "into 'two' before it"]
    assert not any(name.startswith("norm") for name in new.state_dict)


@lowered
def test_weights_computed_in_the_graph_and_foreign_channels_are_kept(lower):
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.BatchNorm1d(4))
    check(model, torch.randn(5, 3), lower, folded=[], skipped=["1"])
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
    check(model, torch.randn(5, 4, 6), lower, folded=[], skipped=["1"])
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False))
    _, report = fold_exported(lower(torch.export.export(model.eval(), (torch.randn(5, 3),))))
    (reason,) = report.skipped.values()
    assert reason in ("it has no running statistics", "it was exported in training mode: export "
                      "model.eval()")  # fmt: skip


def test_a_program_exported_in_training_mode_is_reported():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).train()
    _, report = fold_exported(torch.export.export(model, (torch.randn(5, 3),)))
    assert report.skipped == {"1": "it was exported in training mode: export model.eval()"}


def test_dtype_and_wish_for_gradients_are_the_weights():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))).bfloat16()
    model[0].weight.requires_grad_(False)
    new, _ = fold_exported(torch.export.export(model, (torch.randn(2, 3, 4, 4).bfloat16(),)))
    for parameter in new.parameters():
        assert parameter.dtype is torch.bfloat16
        assert not parameter.requires_grad


def test_weights_that_would_overflow_are_kept():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, eps=1e-12)).eval()
    nn.init.constant_(model[1].weight, 1e4)
    model.half()
    nn.init.constant_(model[1].running_var, 0)
    _, report = fold_exported(torch.export.export(model, (torch.randn(2, 4).half(),)))
    assert report.skipped["1"].startswith("the weights of '0' would not be finite")


def test_a_program_without_norms_is_refused():
    program = torch.export.export(nn.Linear(2, 2), (torch.zeros(2, 2),))
    with pytest.raises(Unsuitable, match=r"fold_exported\(program\): expected a program with"):
        fold_exported(program)
