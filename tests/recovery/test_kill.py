"""A run killed at any moment and started again ends as if nothing had happened, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

# Checkpoints follow each other closely, so that most kills find one half written or just replaced.
RUN = """
import sys
from normlab.lab.loops import supervised
supervised.CHECKPOINT_SECONDS = float(sys.argv.pop(1))
supervised.CHECKPOINT_SHARE = 0.5
from normlab.lab.cli import run
run()
"""
ARGUMENTS = (
    "compare --task digits --train-size 300 --model mlp --depth 4 --width 32 --epochs 12 "
    "--batch-size 20 --lr 0.05 --seeds 1 --methods batch-norm dropout "
).split()


def command(out: Path, apart: str = "0.03") -> list[str]:
    return [sys.executable, "-c", RUN, apart, *ARGUMENTS, "--out", str(out)]


def environment() -> dict[str, str]:
    source = Path(__file__).parents[2] / "src"
    return {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}


def outcome(folder: Path) -> dict:
    """Everything that must be equal: weights, metrics and results, without times."""
    found = {}
    for result in sorted(folder.glob("trials/*/*/result.json")):
        trial = result.parent
        lines = [json.loads(line) for line in (trial / "metrics.jsonl").read_text().splitlines()]
        timed = {"seconds", "evaluation_seconds", "samples_per_second"}
        found[trial.parent.name] = {
            "weights": safetensors.torch.load_file(trial / "weights.safetensors"),
            "metrics": [{k: v for k, v in line.items() if k not in timed} for line in lines],
            "result": {k: v for k, v in json.loads(result.read_text()).items() if k not in timed},
        }
    return found


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    # No checkpoint at all is written here: checkpoints must change nothing either.
    subprocess.run(
        command(folder, apart="1000"), check=True, capture_output=True, env=environment()
    )
    return outcome(folder)


def assert_same(one: dict, two: dict) -> None:
    assert one.keys() == two.keys()
    for method in one:
        assert one[method]["metrics"] == two[method]["metrics"]
        assert one[method]["result"] == two[method]["result"]
        for name, weights in one[method]["weights"].items():
            assert torch.equal(weights, two[method]["weights"][name]), f"{method}: {name}"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_and_continued_equals_uninterrupted(tmp_path, uninterrupted, seed):
    moments = random.Random(seed)
    kills = 0
    for _ in range(30):
        process = subprocess.Popen(
            command(tmp_path), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        started = time.monotonic()
        # The kill must fall into training, which begins when the first trial's records appear.
        while process.poll() is None and not list(tmp_path.glob("trials/*/*/metrics.jsonl")):
            assert time.monotonic() - started < 120
            time.sleep(0.005)
        time.sleep(moments.uniform(0.0, 0.6) if kills == 0 else moments.uniform(2.0, 6.0))
        if process.poll() is not None:
            assert process.returncode == 0, process.stderr.read().decode()
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        if kills == 3:
            subprocess.run(command(tmp_path), check=True, capture_output=True, env=environment())
            break
    assert kills >= 1
    assert_same(outcome(tmp_path), uninterrupted)


def test_interrupt_stops_cleanly_and_says_how_to_continue(tmp_path, uninterrupted):
    process = subprocess.Popen(
        command(tmp_path), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    started = time.monotonic()
    while process.poll() is None and not list(tmp_path.glob("trials/*/*/metrics.jsonl")):
        assert time.monotonic() - started < 120
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 1, output
    assert "to continue: normlab compare" in output
    assert "Traceback" not in output
    assert (tmp_path / "report.html").exists()
    subprocess.run(command(tmp_path), check=True, capture_output=True, env=environment())
    assert_same(outcome(tmp_path), uninterrupted)


def test_a_second_process_on_the_folder_is_refused(tmp_path):
    long = [*command(tmp_path), "--epochs", "2000"]
    first = subprocess.Popen(long, env=environment(), stdout=subprocess.DEVNULL)
    try:
        started = time.monotonic()
        while not list(tmp_path.glob("trials/*/*/metrics.jsonl")):
            assert time.monotonic() - started < 120
            time.sleep(0.01)
        second = subprocess.run(long, env=environment(), capture_output=True, text=True)
    finally:
        first.kill()
        first.wait()
    assert second.returncode == 2
    assert f"in use by process {first.pid}" in second.stderr
    assert "Traceback" not in second.stderr
