"""Records on disk: appended, atomic, readable by anybody."""

import json
import math
import os
import subprocess
import sys

import pytest

from normlab.lab import records


def test_lines_after_a_checkpoint_are_dropped(tmp_path):
    with records.MetricsWriter(tmp_path) as metrics:
        metrics.append({"step": 1})
        offset = metrics.flush()
        metrics.append({"step": 2})
    with records.MetricsWriter(tmp_path, offset) as metrics:
        metrics.append({"step": 3})
    assert [line["step"] for line in records._read_lines(tmp_path / "metrics.jsonl")] == [1, 3]


def test_half_a_line_at_the_end_is_passed_over(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"ste')
    assert list(records._read_lines(tmp_path / "metrics.jsonl")) == [{"step": 1}]


def test_numbers_that_json_cannot_hold_become_none(tmp_path):
    path = tmp_path / "x.json"
    records.write_json(path, {"a": math.nan, "b": [math.inf, 1.5], "c": {"d": 1}})
    assert json.loads(path.read_text()) == {"a": None, "b": [None, 1.5], "c": {"d": 1}}


def test_a_failed_write_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    records.write_json(path, 1)

    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(records.DiskError, match=r"No space left.*goes on from what is recorded"):
        records.write_json(path, 2)
    assert json.loads(path.read_text()) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("label", ["fixup+dropout", "ic-layer:drop_prob=0.1", "a/b <script>"])
def test_any_label_has_a_folder_and_comes_back(tmp_path, label):
    folder = records.trial_folder(tmp_path, label, 3)
    assert folder.resolve().parent.parent == (tmp_path / "trials").resolve()
    records.finish_trial(folder, {"status": "finished"})
    assert records.read_trial(folder).method == label
    assert [trial.seed for trial in records._read_trials(tmp_path / "trials")] == [3]


def test_finishing_drops_the_checkpoint(tmp_path):
    (tmp_path / "state" / "step-00000001").mkdir(parents=True)
    records.finish_trial(tmp_path, {"status": "finished"})
    assert not (tmp_path / "state").exists()


def test_the_lock_ends_with_its_process(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from normlab.lab import records\n"
        f"with records.hold(Path({str(tmp_path)!r})):\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(records.RecordError, match=f"process {process.pid}"), records.hold(tmp_path):
        pass
    process.kill()
    process.wait()
    process.stdout.close()
    with records.hold(tmp_path):
        assert (tmp_path / "lock").read_text() == str(os.getpid())


def test_reading_needs_no_torch():
    code = "import sys, normlab.lab.records; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
