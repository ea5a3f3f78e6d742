"""The verb `convert` on networks by name and on the user's own file."""

import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

from normlab.lab.checkpoint import load_weights, save_weights
from normlab.lab.cli import app
from normlab.lab.models import build_model

OWN = """
from torch import nn

def make():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

def bare():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
"""


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


def run(*arguments):
    done = CliRunner().invoke(app, ["convert", *map(str, arguments)])
    return done.exit_code, done.output


def test_plan_and_proof_are_printed(own):
    status, output = run(f"{own}:make", "group-norm", "--shape", "3,8,8")
    assert status == 0
    assert "1: BatchNorm2d -> GroupNorm; kept bias, weight" in output
    assert "another function, as meant" in output


@pytest.mark.parametrize("surgery", ["fold", "freeze", "batch-norm"])
def test_surgeries_that_keep_the_function(own, surgery):
    status, output = run(f"{own}:make", surgery, "--shape", "3x8x8")
    assert status == 0, output
    assert "same function: largest difference" in output


def test_a_named_network_with_weights_in_and_out(tmp_path):
    torch.manual_seed(3)
    model = build_model("resnet", (1, 8, 8), 10, depth=8, width=4)
    for _ in range(3):
        model(torch.randn(8, 1, 8, 8))
    save_weights(tmp_path / "trained.safetensors", model)
    status, output = run(
        "resnet", "fold", "--shape", "1,8,8", "--depth", 8, "--width", 4,
        "--weights", tmp_path / "trained.safetensors", "--out", tmp_path / "folded.safetensors",
    )  # fmt: skip
    assert status == 0, output
    assert "folded.safetensors" in output
    folded = safetensors.torch.load_file(tmp_path / "folded.safetensors")
    assert not any("running" in name for name in folded)
    assert not torch.equal(folded["conv1.weight"], model.conv1.weight)


def test_a_dry_run_and_options(own):
    status, output = run(f"{own}:make", "group-norm", "--shape", "3,8,8", "--dry-run")
    assert status == 0
    assert "GroupNorm" in output
    status, output = run(f"{own}:bare", "group-norm", "--shape", "3,8,8", "--add")
    assert status == 0
    assert "1 BatchNorm layers were put behind weight layers first" in output
    status, output = run(f"{own}:bare", "group-norm", "--shape", "3,8,8", "--allow-none")
    assert status == 0
    assert "no BatchNorm layer to replace" in output
    status, output = run(
        f"{own}:make", "group-norm", "--shape", "3,8,8", "--skip", "1", "--allow-none"
    )
    assert status == 0
    assert "left 1: you asked to skip it" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("{own}:make grup-norm --shape 3,8,8", "do you mean 'group-norm'"),
        ("{own}:make fodl --shape 3,8,8", "do you mean 'fold'"),
        ("{own}:make group-norm --shape 3,8,x", "expected whole numbers above 0"),
        ("{own}:make group-norm --shape 2,8,8", "expected a network that takes samples of shape"),
        ("{own}:bare group-norm --shape 3,8,8", "expected a model with nn.BatchNorm layers"),
        ("{own}:make fold --shape 3,8,8 --add", "expected these options with a method"),
        ("{own}:make fold --shape 3,8,8 --dry-run --out x", "expected one of the two"),
        ("{own}:make layer-norm --shape 3,8,8 --same", "expected the same outputs"),
        ("{own}:make fold --shape 3,8,8 --weights none", "expected a safetensors file"),
        ("{own}:lost fold --shape 3,8,8", "expected a function in"),
    ],
)
def test_a_users_mistake_is_one_line(own, arguments, message):
    status, output = run(*arguments.format(own=own).split())
    assert status == 2, output
    assert message in output
    assert "Traceback" not in output
    assert output.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("1.weight"), "weights that it lacks: 1.weight"),
        (lambda weights: weights.update(other=torch.ones(1)), "weights of another model: other"),
        (lambda weights: weights.update({"0.bias": torch.ones(3)}), "another shape: 0.bias"),
        (
            lambda weights: weights.update({"1.running_var": torch.full((4,), torch.nan)}),
            "not finite: 1.running_var",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, own, change, message):
    model = build_model(f"{own}:make", (3, 8, 8), 10)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = dict(before)
    change(weights)
    safetensors.torch.save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=message):
        load_weights(tmp_path / "w.safetensors", model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
