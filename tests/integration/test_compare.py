"""Equal terms: what every method of a comparison shares at a given seed."""

from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import nn

from normlab.catalog import find_method
from normlab.lab import records
from normlab.lab.batches import Batches
from normlab.lab.checkpoint import Position
from normlab.lab.compare import card_data, compare
from normlab.lab.loops.supervised import Loop, Outcome, loss_of, train
from normlab.lab.processes import Processes
from normlab.lab.study import Study, make_study
from normlab.lab.tasks import load_task
from normlab.lab.tasks.task import Task
from normlab.lab.trial import Trial, make_setting, prepare
from normlab.method import Method, Setting

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


def train_briefly(method: Method, model: nn.Module, folder) -> Outcome:
    """Train three steps on digits with a method that need not be in the catalogue."""
    task, processes = load_task("digits"), Processes("cpu")
    setting = make_setting(Trial(small_study(), "none", 0, 0.1, folder), task, processes, 3, print)
    optimizer = method.optimizer(
        [{"params": list(model.parameters()), "lr": 0.1, "initial_lr": 0.1}], torch.optim.SGD
    )
    batches = Batches(task.train, mean=task.mean, std=task.std, batch_size=20, seed=0)
    loop = Loop(
        model=model.train(),
        method=method,
        setting=setting,
        optimizer=optimizer,
        task=task,
        batches=batches,
        seed=0,
        total_steps=3,
        evaluate_every=3,
        schedule="constant",
        warmup_steps=0,
        processes=processes,
        checkpoints=folder,
        on_step=lambda step, loss: None,
        stopping=lambda: False,
    )
    return train(loop, records.NoMetrics(), Position())


def test_a_step_of_two_passes_gets_a_closure_with_equal_noise(tmp_path):
    seen = []

    class Twice(torch.optim.SGD):
        def step(self, closure=None):
            with torch.enable_grad():
                seen.append([closure().item(), closure().item()])
            return super().step()

    card = replace(find_method("none").card, name="twice", needs_closure=True)
    method = Method(card=card, optimizer=lambda groups, make: Twice(groups, lr=0.1))
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10))
    train_briefly(method, model, tmp_path)
    assert len(seen) == 3
    assert all(first == second for first, second in seen)


def test_a_method_may_turn_targets_into_probabilities(tmp_path):
    def smooth(inputs, targets, generator, setting):
        hard = nn.functional.one_hot(targets, setting.num_classes).float()
        return inputs, 0.9 * hard + 0.1 / setting.num_classes

    method = Method(card=replace(find_method("none").card, name="smooth"), batch=smooth)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    assert train_briefly(method, model, tmp_path).status == "finished"


def test_auxiliary_heads_count_less():
    logits, targets = torch.randn(2, 3, 4), torch.tensor([0, 1, 2])
    loss = nn.functional.cross_entropy
    expected = loss(logits[0], targets) + 0.4 * loss(logits[1], targets)
    torch.testing.assert_close(loss_of((logits[0], logits[1]), targets, loss), expected)


def test_fresh_batches_are_the_same_for_the_same_index(tmp_path):
    setting = make_setting(
        Trial(small_study(), "none", 0, 0.1, tmp_path),
        load_task("digits"),
        Processes("cpu"),
        10,
        lambda _: None,
    )
    far = 3 * setting.steps_per_epoch + 1
    for index in (0, 1, far):
        for one, other in zip(setting.fresh_batch(index), setting.fresh_batch(index), strict=True):
            assert torch.equal(one, other)
    assert not torch.equal(setting.fresh_batch(0)[0], setting.fresh_batch(far)[0])
    alone = Setting(batches=setting.batches)
    assert alone.fresh_batch(len(setting.batches))[0] is setting.batches[0][0]


def test_checkpointed_activations_change_memory_and_nothing_else(tmp_path):
    model = {"name": "resnet", "depth": 32, "width": 4}
    study = small_study(model=model, methods=["batch-norm", "fixup"], seeds=[0])
    training = study.training.model_copy(update={"checkpoint_activations": True, "epochs": 1})
    plain = study.training.model_copy(update={"epochs": 1})
    for name, chosen in (("plain", plain), ("checkpointed", training)):
        compare(study.model_copy(update={"training": chosen}), tmp_path / name, QUIET)
    for method in study.methods:
        results = [
            records.read_result(records.trial_folder(tmp_path / name, method, 0))
            for name in ("plain", "checkpointed")
        ]
        one, other = results
        assert one is not None
        assert other is not None
        assert other["final_loss"] == one["final_loss"]
        assert other["peak_memory_bytes"] < 0.7 * one["peak_memory_bytes"]
