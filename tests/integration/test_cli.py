"""The verbs as a person uses them, mistakes above all: a message, an exit status, no traceback."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from normlab.lab import records
from normlab.lab.cli import app, spread_methods

SMALL = (
    "--task digits --train-size 200 --model mlp --depth 3 --width 16 --epochs 2 --batch-size 20 "
    "--lr 0.05 --device cpu --seeds 1"
).split()


def run(*arguments: str):
    """Run a verb as the command line would."""
    return CliRunner().invoke(app, spread_methods([str(word) for word in arguments]))


def refused(result, *parts: str, status: int = 2) -> None:
    """Check that a mistake ends with its message and status, and nothing else."""
    text = result.output
    assert result.exit_code == status, text
    assert isinstance(result.exception, SystemExit | None.__class__), result.exception
    assert "Traceback" not in text
    for part in parts:
        assert part in text, text


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    result = run("compare", *SMALL, "--methods", "batch-norm", "none", "--out", folder)
    assert result.exit_code == 0, result.output
    return folder, result.output


def test_compare_leaves_records_and_a_page(finished):
    folder, output = finished
    assert f"page: {folder / 'report.html'}" in output
    page = (folder / "report.html").read_text()
    assert "batch-norm" in page
    run_record = records.read_run(folder)
    assert {trial.method for trial in run_record.trials} == {"batch-norm", "none"}
    for trial in run_record.trials:
        assert trial.result is not None
        assert trial.result["status"] == "finished"
        assert trial.result["peak_memory_bytes"] > 0
        assert trial.result["samples_per_second"] > 0
        evaluations = [line for line in trial.metrics if line["kind"] == "eval"]
        assert [line["step"] for line in evaluations] == [0, 10, 20]
        assert evaluations[-1]["accuracy"] == trial.result["final_accuracy"]
    assert run_record.environment["task_title"]
    assert run_record.cards["batch-norm"]["source"]["arxiv"] == "1502.03167"


def test_the_same_command_again_trains_nothing(finished):
    folder, _ = finished
    before = {path: path.stat().st_mtime_ns for path in folder.glob("trials/*/*/*")}
    result = run("compare", *SMALL, "--methods", "batch-norm", "none", "--out", folder)
    assert result.exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in folder.glob("trials/*/*/*")} == before


def test_methods_may_be_added(finished):
    folder, _ = finished
    result = run("compare", *SMALL, "--methods", "batch-norm", "none", "dropout", "--out", folder)
    assert result.exit_code == 0, result.output
    assert "dropout" in {trial.method for trial in records.read_run(folder).trials}


def test_a_folder_of_another_study_is_refused(finished):
    folder, _ = finished
    again = [*SMALL, "--epochs", "3", "--methods", "batch-norm", "none", "dropout"]
    refused(run("compare", *again, "--out", folder), "epochs: 2, not 3", "choose another --out")


def test_report_is_written_anew(finished):
    folder, _ = finished
    (folder / "report.html").unlink()
    assert run("report", folder).exit_code == 0
    assert (folder / "report.html").exists()


def test_a_study_file_runs(tmp_path):
    study = tmp_path / "study.toml"
    study.write_text(
        'task = {name = "digits", train_size = 100}\nmethods = ["none"]\nseeds = [3]\n'
        '[model]\nname = "mlp"\ndepth = 2\nwidth = 8\n[training]\nepochs = 1\ndevice = "cpu"\n'
    )
    result = run("compare", study, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "run/trials/none/3/result.json").exists()


def test_options_beside_a_study_file_are_refused(tmp_path):
    study = tmp_path / "study.toml"
    study.write_text('methods = ["none"]\n')
    refused(run("compare", study, "--epochs", "3"), "--epochs", "got both")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (["--methods", "batchnorm"], ["do you mean 'batch-norm'"]),
        (["--methods", "none", "none"], ["'none' twice"]),
        (["--methods", "dropout:q=1"], ["do you mean 'p'"]),
        (["--methods", "fixup"], ["residual", "method fixup, model mlp"]),
        (["--task", "digitz"], ["'digits'"]),
        (["--model", "mpl"], ["'mlp'"]),
        (["--model", "absent.py:make"], ["absent.py"]),
        (["--epochs", "0"], ["training.epochs"]),
        (["--epochs", "-1"], ["training.epochs"]),
        (["--lr", "0"], ["training.lr"]),
        (["--optimizer", "sdg"], ["training.optimizer"]),
        (["--task", "fashion-mnist"], ["train-images-idx3-ubyte.gz"]),
        (["--task", "fashion-mnist", "--data", "absent"], ["absent", "train-images-idx3-ubyte.gz"]),
        (["--task", "npz", "--data", "absent.npz"], ["absent.npz"]),
        (["--device", "tpu"], ["tpu", "auto"]),
        (["--reference", "dropout"], ["expected one of the methods compared"]),
        (["--tune", "depth"], ["tune.parameter"]),
        (["--train-size", "99999"], ["train_size"]),
    ],
)
def test_mistakes(tmp_path, changes, parts):
    result = run("compare", *SMALL, "--out", tmp_path / "run", *changes)
    refused(result, *parts)


def test_wrong_usage_of_the_shell():
    assert run("compare", "--sedes", "3").exit_code == 2
    assert run("comprae").exit_code == 2


def test_report_of_a_folder_without_a_study(tmp_path):
    refused(run("report", tmp_path), "study.toml")
    refused(run("report", tmp_path / "absent"), "no folder")


def test_a_damaged_record_is_named(tmp_path, finished):
    folder, _ = finished
    damaged = folder / "trials/none/0/result.json"
    whole = damaged.read_text()
    try:
        damaged.write_text(whole[: len(whole) // 2])
        refused(run("report", folder), "result.json", "damaged")
    finally:
        damaged.write_text(whole)


MODELS = """
import torch
from torch import nn


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        if self.training:
            raise RuntimeError("no such luck")
        return self.fc(x.flatten(1))


class Exploding(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 10)
        self.steps = 0

    def forward(self, x):
        self.steps += self.training
        y = self.fc(x.flatten(1))
        return y * float("nan") if self.steps > 7 else y


class Greedy(Exploding):
    def forward(self, x):
        if self.training:
            torch.empty(2**50)
        return self.fc(x.flatten(1))


def broken():
    return Broken()


def exploding(input_shape, num_classes):
    return Exploding()


def greedy():
    return Greedy()


def not_a_model():
    return 3
"""


def own_model(tmp_path, name: str, *more: str):
    (tmp_path / "own.py").write_text(MODELS)
    arguments = [word for word in SMALL if word not in ("--depth", "3", "--width", "16")]
    model = f"{tmp_path / 'own.py'}:{name}"
    return run(
        "compare", *arguments, "--model", model, "--methods", "dropout:input_p=0.1", *more,
        "--out", tmp_path / "run",
    )  # fmt: skip


def test_a_model_that_raises_is_a_result(tmp_path):
    result = own_model(tmp_path, "broken")
    refused(result, "no such luck", "1 of 1 trials failed", status=1)
    trial = records.read_run(tmp_path / "run").trials[0]
    assert trial.result is not None
    assert trial.result["status"] == "failed"
    assert "own.py" in trial.result["reason"]
    assert (tmp_path / "run/report.html").exists()


def test_divergence_is_a_result_with_its_step(tmp_path):
    result = own_model(tmp_path, "exploding")
    assert result.exit_code == 0, result.output
    trial = records.read_run(tmp_path / "run").trials[0]
    assert trial.result is not None
    assert trial.result["status"] == "diverged"
    assert trial.result["diverged_at"] == 8
    assert "step 8" in result.output


def test_running_out_of_memory_is_a_result(tmp_path):
    own_model(tmp_path, "greedy")
    trial = records.read_run(tmp_path / "run").trials[0]
    assert trial.result is not None
    assert trial.result["status"] == "out-of-memory"


def test_what_is_not_a_model_is_refused(tmp_path):
    refused(own_model(tmp_path, "not_a_model"), "not_a_model")
    refused(own_model(tmp_path, "absent"), "absent")


def test_one_failing_trial_does_not_stop_the_others(tmp_path, monkeypatch):
    from normlab.lab import trial

    real = trial.build_model

    def fails_at_times(*arguments, **options):
        if torch.initial_seed() == trial.derived_seed(1, "weights"):
            raise RuntimeError("only seed 1")
        return real(*arguments, **options)

    monkeypatch.setattr(trial, "build_model", fails_at_times)
    result = run("compare", *SMALL, "--seeds", "3", "--methods", "none", "--out", tmp_path / "run")
    assert result.exit_code == 1
    status = {t.seed: t.result["status"] for t in records.read_run(tmp_path / "run").trials}
    assert status == {0: "finished", 1: "failed", 2: "finished"}


def test_a_full_disk_loses_nothing_recorded(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    real, writes = os.fsync, []

    def fill_up(descriptor: int) -> None:
        writes.append(descriptor)
        # study, environment, cards, then the first trial's weights and result; then no space.
        if len(writes) > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    arguments = ["compare", *SMALL, "--methods", "none", "dropout", "--out", folder]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fill_up)
        refused(run(*arguments), "No space left", "run the same command again", status=1)
    kept = json.loads((folder / "trials/none/0/result.json").read_text())
    assert kept["status"] == "finished"
    assert not list(folder.rglob(".*partial"))
    assert run(*arguments).exit_code == 0
    assert json.loads((folder / "trials/none/0/result.json").read_text()) == kept


def test_a_failing_write_of_metrics(tmp_path, monkeypatch):
    def fail(writer):
        with records.writing(Path("metrics.jsonl")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(records.MetricsWriter, "flush", fail)
    refused(
        run("compare", *SMALL, "--methods", "none", "--out", tmp_path / "run"),
        "No space left",
        status=1,
    )


def test_the_search_gives_every_method_the_same_trials(tmp_path):
    result = run(
        "compare", *SMALL, "--epochs", "1", "--methods", "none", "batch-norm",
        "--tune", "lr", "--tune-trials", "3", "--out", tmp_path / "run",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    record = records.read_run(tmp_path / "run")
    tried = {m: [t for t in record.tuning if t.method == m] for m in ("none", "batch-norm")}
    assert [len(trials) for trials in tried.values()] == [3, 3]
    for trial in record.trials:
        assert trial.result is not None
        finished = [t.result for t in tried[trial.method] if t.result is not None]
        best = max(finished, key=lambda r: (r["final_accuracy"], -r["final_loss"], r["lr"]))
        assert trial.result["lr"] == best["lr"]
        assert f"{trial.method}: the search chose lr {best['lr']:g}" in result.output


def test_list_and_show():
    listed = run("list")
    assert listed.exit_code == 0
    for name in ("filter-response-norm", "fashion-mnist", "plain-conv"):
        assert name in listed.output
    shown = run("show", "ic-layer")
    assert shown.exit_code == 0
    assert "1905.05928" in shown.output
    assert "drop_prob=0.05" in shown.output
    refused(run("show", "fixupp"), "do you mean 'fixup'")


def test_methods_may_be_separated_by_spaces():
    assert spread_methods(["compare", "--methods", "a", "b", "s.toml"]) == [
        "compare", "--methods", "a", "--methods", "b", "s.toml",
    ]  # fmt: skip
