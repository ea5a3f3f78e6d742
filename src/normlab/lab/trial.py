"""One trial: one task, model, method and seed. Prepare, train, record."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from normlab.catalog import find_method
from normlab.lab import checkpoint, records
from normlab.lab.batches import Batches
from normlab.lab.loops.supervised import Interrupted, Loop, derived_seed, loss_of, train
from normlab.lab.models import build_model
from normlab.lab.processes import Processes
from normlab.lab.study import Study, Training
from normlab.lab.tasks.task import Task
from normlab.method import Method, Setting
from normlab.surgery.checkpoint_activations import checkpoint_activations

EXAMPLE_BATCHES, EXAMPLE_SAMPLES = 4, 128
"""How many batches a method may look at before training, or more, up to so many samples."""


@dataclass(frozen=True)
class Trial:
    """One trial of a study.

    Attributes:
        study: The study it belongs to.
        method: The method's label.
        seed: The seed of data order, initial weights and noise.
        lr: The base learning rate.
        folder: Where it is recorded.
    """

    study: Study
    method: str
    seed: int
    lr: float
    folder: Path


class Watcher(Protocol):
    """What a trial tells while it runs; the progress view is one."""

    def begin(self, trial: Trial, total_steps: int, step: int) -> None:
        """A trial begins, or goes on, at ``step``."""

    def step(self, step: int, loss: Tensor) -> None:
        """A step was taken."""

    def end(self, trial: Trial, result: dict[str, Any]) -> None:
        """A trial has its result."""


def run_trial(
    trial: Trial,
    task: Task,
    processes: Processes,
    watcher: Watcher,
    stopping: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Run a trial to its result, from where it stopped if it was begun before.

    A trial that diverges, runs out of memory or raises has that as its result.

    Args:
        trial: What to run.
        task: The task's data.
        processes: Where to run.
        watcher: Is told of the progress.
        stopping: Whether the user asked to stop; asked at every step.

    Returns:
        The content of ``result.json``.

    Raises:
        Interrupted: The user asked to stop; a checkpoint was written.
        normlab.lab.records.DiskError: The records could not be written.
    """
    finished = processes.broadcast(records.read_result(trial.folder))
    if finished is not None:
        return finished
    notes: list[str] = []
    result: dict[str, Any] = {
        "method": trial.method,
        "seed": trial.seed,
        "lr": trial.lr,
        "device": str(processes.device),
        "precision": processes.precision,
        "num_processes": processes.size,
        "notes": notes,
        "reason": None,
        "diverged_at": None,
    }
    try:
        result |= _train(trial, task, processes, watcher, stopping, notes.append)
    except (Interrupted, records.DiskError):
        raise
    except Exception as error:
        # Whatever a model or a method raises is this trial's result; the others go on.
        result |= {"status": _status(error), "reason": _reason(error)}
        result |= {"traceback": traceback.format_exc()}
    if processes.first:
        records.finish_trial(trial.folder, result)
    watcher.end(trial, result)
    return result


def _train(
    trial: Trial,
    task: Task,
    processes: Processes,
    watcher: Watcher,
    stopping: Callable[[], bool],
    say: Callable[[str], None],
) -> dict[str, Any]:
    training = trial.study.training
    batches = Batches(
        task.train,
        mean=task.mean,
        std=task.std,
        batch_size=training.batch_size,
        seed=trial.seed,
        augmentation=task.augmentation,
        device=processes.device,
        rank=processes.rank,
        world_size=processes.size,
    )
    total_steps = training.epochs * batches.steps_per_epoch
    method = find_method(trial.method)
    setting = make_setting(trial, task, processes, total_steps, say)
    model, optimizer = prepare(trial, method, task, setting, processes)

    checkpoints = trial.folder / "state"
    position = checkpoint.load(checkpoints, model, optimizer)
    watcher.begin(trial, total_steps, position.step)
    loop = Loop(
        model=model,
        method=method,
        setting=setting,
        optimizer=optimizer,
        task=task,
        batches=batches,
        seed=trial.seed,
        total_steps=total_steps,
        evaluate_every=training.evaluate_every or batches.steps_per_epoch,
        schedule=training.schedule,
        warmup_steps=training.warmup_steps,
        processes=processes,
        checkpoints=checkpoints,
        on_step=watcher.step,
        stopping=stopping,
    )
    if processes.first:
        with records.MetricsWriter(trial.folder, position.metrics_offset) as metrics:
            outcome = train(loop, metrics, position)
    else:
        outcome = train(loop, records.NoMetrics(), position)
    if processes.first:
        checkpoint.save_weights(trial.folder / checkpoint.WEIGHTS, model)
    samples = position.timed_steps * batches.batch_size
    return {
        "status": outcome.status,
        "diverged_at": outcome.diverged_at,
        "step": position.step,
        "steps": total_steps,
        "final_accuracy": outcome.final.get("accuracy"),
        "final_loss": outcome.final.get("loss"),
        "best_accuracy": position.best_accuracy,
        "best_step": position.best_step,
        "seconds": position.seconds,
        "evaluation_seconds": position.evaluation_seconds,
        "samples_per_second": samples / position.seconds if position.seconds else None,
        "peak_memory_bytes": position.peak_memory_bytes or None,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "reason": None
        if outcome.diverged_at is None
        else f"the loss was no longer finite at step {outcome.diverged_at}",
    }


def prepare(
    trial: Trial, method: Method, task: Task, setting: Setting, processes: Processes
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return the model as the method leaves it, and its optimiser.

    Args:
        trial: Study, seed and learning rate.
        method: The method.
        task: The task; the model fits its shapes.
        setting: What the method may know.
        processes: The device.

    Raises:
        normlab.Unsuitable: The method does not fit the model.
    """
    training = trial.study.training
    torch.manual_seed(derived_seed(trial.seed, "weights"))
    choice = trial.study.model
    model = build_model(choice.name, task.input_shape, task.num_classes, **choice.options)
    model = method.prepare(model.to(processes.device), setting).to(processes.device).train()
    groups = [
        {
            "params": [parameter for parameter in model.parameters() if parameter.requires_grad],
            "lr": trial.lr,
            "weight_decay": training.weight_decay,
        }
    ]
    groups = method.parameter_groups(groups, model, setting)
    for group in groups:
        group["initial_lr"] = group["lr"]
    optimizer = method.optimizer(groups, lambda groups: _make_optimizer(groups, training))
    method.attach(model, optimizer, setting)
    if training.checkpoint_activations:
        # Last, because methods look for plain sequences of layers.
        checkpoint_activations(model, example=setting.batches[0][0][:2])
    return model, optimizer


def make_setting(
    trial: Trial,
    task: Task,
    processes: Processes,
    total_steps: int,
    say: Callable[[str], None],
) -> Setting:
    """Return what a method may know of a trial, with example batches drawn apart from training."""
    training = trial.study.training
    examples = Batches(
        task.train,
        mean=task.mean,
        std=task.std,
        batch_size=training.batch_size,
        seed=derived_seed(trial.seed, "examples"),
        augmentation=task.augmentation,
        device=processes.device,
    )
    wanted = max(EXAMPLE_BATCHES, math.ceil(EXAMPLE_SAMPLES / examples.batch_size))
    count = min(wanted, examples.steps_per_epoch)
    return Setting(
        batches=tuple(examples.batch(0, number) for number in range(count)),
        loss=lambda outputs, targets: loss_of(outputs, targets, task.loss),
        num_classes=task.num_classes,
        optimizer=training.optimizer,
        lr=trial.lr,
        total_steps=total_steps,
        steps_per_epoch=examples.steps_per_epoch,
        generator=torch.Generator().manual_seed(derived_seed(trial.seed, "preparation")),
        say=say,
        draw=lambda index: examples.batch(*divmod(index, examples.steps_per_epoch)),
    )


def _make_optimizer(groups: list[dict[str, Any]], training: Training) -> torch.optim.Optimizer:
    # One kernel for all parameters; the plain form spends longer calling than computing.
    fused = all(
        parameter.device.type in ("cpu", "cuda")
        for group in groups
        for parameter in group["params"]
    )
    if training.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=training.lr, fused=fused)
    return torch.optim.SGD(groups, lr=training.lr, momentum=training.momentum, fused=fused)


def _status(error: Exception) -> str:
    text = str(error).lower()
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return records.OUT_OF_MEMORY
    if isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate" in text):
        return records.OUT_OF_MEMORY
    return records.FAILED


def _reason(error: Exception) -> str:
    """Return the error in one line, with the place in the user's code where it happened."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    first_line = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first_line} ({Path(frame.filename).name}:{frame.lineno})"
