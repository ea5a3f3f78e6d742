"""Equal terms: what every method of a comparison shares at a given seed."""

import pytest
import torch
from rich.console import Console
from torch import nn

from normlab.catalog import find_method
from normlab.lab import records
from normlab.lab.compare import card_data, compare
from normlab.lab.processes import Processes
from normlab.lab.study import Study, make_study
from normlab.lab.tasks import load_task
from normlab.lab.tasks.task import Task
from normlab.lab.trial import Trial, make_setting, prepare

QUIET = Console(quiet=True)


def small_study(**changes) -> Study:
    content = {
        "task": {"name": "digits", "train_size": 120, "test_size": 60},
        "model": {"name": "plain-conv", "depth": 3, "width": 4},
        "methods": ["batch-norm", "filter-response-norm", "ic-layer"],
        "seeds": [0, 1],
        "training": {"epochs": 2, "batch_size": 20, "lr": 0.05, "device": "cpu"},
    }
    return make_study(content | changes)


@pytest.fixture
def seen(monkeypatch):
    """The targets of every training batch, in the order in which losses were taken."""
    batches: list[list[int]] = []
    real = Task.loss

    def watch(outputs, targets):
        if outputs.requires_grad:
            batches.append(targets.tolist())
        return real(outputs, targets)

    monkeypatch.setattr(Task, "loss", staticmethod(watch))
    return batches


def test_every_method_sees_the_same_batches_at_a_seed(tmp_path, seen):
    compare(small_study(), tmp_path, QUIET)
    steps = 2 * 6
    trials = [seen[start : start + steps] for start in range(0, len(seen), steps)]
    assert len(trials) == 6
    first, second = trials[:3], trials[3:]
    assert first[0] == first[1] == first[2]
    assert second[0] == second[1] == second[2]
    assert first[0] != second[0]
    assert first[0][:6] != first[0][6:]


def test_looking_at_examples_shifts_nothing(tmp_path, seen):
    """The batches that a method may look at are none of those that training starts with."""
    study = small_study(methods=["none"], seeds=[0])
    compare(study, tmp_path, QUIET)
    task = load_task("digits")
    trial = Trial(study, "none", 0, 0.1, tmp_path)
    setting = make_setting(trial, task, Processes("cpu"), 10, lambda _: None)
    # At batches of 20: as many as hold 128 samples.
    assert len(setting.batches) == 7
    assert setting.batches[0][1].tolist() != seen[0]


def test_methods_start_from_the_same_weights(tmp_path):
    task, processes = load_task("digits"), Processes("cpu")
    weights = {}
    for label in ("batch-norm", "none", "group-norm"):
        trial = Trial(small_study(), label, 5, 0.1, tmp_path)
        setting = make_setting(trial, task, processes, 10, lambda _: None)
        model, _ = prepare(trial, find_method(label), task, setting, processes)
        weights[label] = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    for one, two, three in zip(*weights.values(), strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


def test_half_precision_trains_and_is_recorded(tmp_path):
    single, half = tmp_path / "fp32", tmp_path / "bf16"
    study = small_study(methods=["batch-norm", "filter-response-norm"], seeds=[0])
    compare(study, single, QUIET)
    training = study.training.model_copy(update={"precision": "bf16"})
    compare(study.model_copy(update={"training": training}), half, QUIET)
    for one, two in zip(
        records.read_run(single).trials, records.read_run(half).trials, strict=True
    ):
        assert one.result is not None
        assert two.result is not None
        assert two.result["precision"] == "bf16"
        assert two.result["final_loss"] != one.result["final_loss"]
        assert two.result["final_loss"] == pytest.approx(one.result["final_loss"], rel=0.2)


def test_an_absent_device_is_refused(tmp_path):
    if torch.cuda.is_available():
        device = "mps"
    else:
        device = "cuda"
    study = small_study(training={"device": device})
    with pytest.raises(ValueError, match="use --device auto"):
        compare(study, tmp_path, QUIET)


def test_automatic_device_takes_what_is_there():
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert Processes("auto").device.type == expected


def test_cards_hold_options_and_places():
    card = card_data(find_method("ic-layer:drop_prob=0.2"))
    assert card["order"] == 5
    assert {"name": "drop_prob", "default": 0.05, "value": 0.2} in card["options"]
    assert [part["name"] for part in card_data(find_method("fixup+dropout"))["parts"]] == [
        "fixup",
        "dropout",
    ]


def test_memory_grows_with_the_batch(tmp_path):
    peaks = {}
    for size in (10, 40):
        training = {"epochs": 1, "batch_size": size, "device": "cpu"}
        study = small_study(methods=["batch-norm"], seeds=[0], training=training)
        result = compare(study, tmp_path / str(size), QUIET).results[0]
        peaks[size] = result["peak_memory_bytes"]
    assert 2 * peaks[10] < peaks[40] < 4 * peaks[10]


def test_a_rate_is_judged_on_several_seeds(tmp_path):
    tune = {"trials": 3, "seeds": 2, "low": 0.01, "high": 1.0}
    study = small_study(methods=["batch-norm"], seeds=[0], tune=tune)
    result = compare(study, tmp_path, QUIET).results[0]
    record = records.read_run(tmp_path)
    by_rate: dict[float, list[dict]] = {}
    for trial in record.tuning:
        assert trial.result is not None
        by_rate.setdefault(trial.result["lr"], []).append(trial.result)
    assert len(by_rate) == 3
    for tried in by_rate.values():
        assert [one["seed"] for one in tried] == [0, 1]
    means = {lr: sum(one["final_accuracy"] for one in tried) / 2 for lr, tried in by_rate.items()}
    assert means[result["lr"]] == max(means.values())
