"""Two processes that train one model equal one process with the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

# Dropout draws other noise on each process, so methods with noise agree in distribution only.
METHODS = ["batch-norm", "none", "filter-response-norm", "group-norm", "fixup", "weight-rescaling"]
ARGUMENTS = (
    "-m normlab compare --task digits --train-size 320 --model resnet --depth 8 --width 4 "
    "--epochs 2 --batch-size 32 --lr 0.05 --seeds 1 --device cpu --methods"
).split() + METHODS


def run(launcher: list[str], out: Path) -> str:
    source = Path(__file__).parents[2] / "src"
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, *ARGUMENTS, "--out", str(out)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    run([sys.executable], one)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    output = run([sys.executable, *torchrun], two)
    # The second process stays silent.
    assert output.count("page:") == 1
    return one, two


def metrics(folder: Path, method: str) -> list[dict]:
    lines = (folder / "trials" / method / "0" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_same_losses_and_weights(folders, method):
    one, two = folders
    # This layer divides a nearly empty map by as little as 1e-3 and thresholds what comes out, so
    # it magnifies the rounding of two orders of summation; the others stay within 1e-6.
    tolerance = 2e-2 if method == "filter-response-norm" else 1e-5
    for first, second in zip(metrics(one, method), metrics(two, method), strict=True):
        assert first["step"] == second["step"]
        assert second["loss"] == pytest.approx(first["loss"], rel=tolerance)
    weights = [
        safetensors.torch.load_file(folder / "trials" / method / "0" / "weights.safetensors")
        for folder in folders
    ]
    for name, value in weights[0].items():
        torch.testing.assert_close(
            weights[1][name], value, atol=tolerance, rtol=tolerance, msg=name
        )


@pytest.mark.slow
def test_the_records_say_how_many_processes(folders):
    results = [
        json.loads((folder / "trials" / "none" / "0" / "result.json").read_text())
        for folder in folders
    ]
    assert [result["num_processes"] for result in results] == [1, 2]
