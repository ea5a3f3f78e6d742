"""The supervised loop: one model, one loss, one optimiser step a batch.

Everything that is drawn at random in a step (order, augmentation, a method's draws, dropout) is a
function of seed and step, so a run that was stopped goes on exactly where it was, and several
processes agree without talking.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normlab.lab import checkpoint
from normlab.lab.batches import Batches, evaluation_batches
from normlab.lab.checkpoint import Position
from normlab.lab.memory import peak_memory
from normlab.lab.processes import Processes
from normlab.lab.records import MetricsWriter, NoMetrics
from normlab.lab.schedules import Schedule, rate_factor
from normlab.lab.tasks.task import Task
from normlab.method import Method, Setting
from normlab.surgery.flow import evaluating

LINES_PER_EPOCH = 20
"""How many lines of training loss an epoch leaves in the records, unless its steps are few."""

STEPS_PER_LINE = 5
"""The fewest steps behind a line: a short step must not wait for its record."""

CHECKPOINT_SECONDS = 10.0
"""How much work a killed process may lose, unless saving takes long itself."""

CHECKPOINT_SHARE = 0.02
"""How large a part of the time may go into checkpoints."""

EVALUATION_BATCH = 500

AUXILIARY_WEIGHT = 0.4
"""What the loss of an auxiliary head counts beside the first's, as in the Inception networks."""


class Interrupted(Exception):
    """The user asked to stop; a checkpoint was written."""


@dataclass(frozen=True)
class Loop:
    """All that one trial's training needs.

    Attributes:
        model: The prepared model, on the device.
        method: The method, for its parts that act within a step.
        setting: What the method may know.
        optimizer: Its groups carry ``initial_lr``.
        task: Data, loss and metric.
        batches: The training batches.
        seed: The trial's seed.
        total_steps: When to end.
        evaluate_every: Steps between evaluations; the start and the end are evaluated as well.
        schedule: The learning rate's course.
        warmup_steps: Steps of linear rise before it.
        processes: Where it runs.
        checkpoints: The folder of checkpoints.
        on_step: Called after every step with the step and its loss.
        stopping: Whether the user asked to stop.
    """

    model: nn.Module
    method: Method
    setting: Setting
    optimizer: torch.optim.Optimizer
    task: Task
    batches: Batches
    seed: int
    total_steps: int
    evaluate_every: int
    schedule: Schedule
    warmup_steps: int
    processes: Processes
    checkpoints: Path
    on_step: Callable[[int, Tensor], None]
    stopping: Callable[[], bool]


@dataclass(frozen=True)
class Outcome:
    """How training ended: the status, the step at which the loss left the finite numbers."""

    status: Literal["finished", "diverged"]
    diverged_at: int | None
    final: dict[str, float]


def train(loop: Loop, metrics: MetricsWriter | NoMetrics, position: Position) -> Outcome:
    """Train from ``position`` to the end.

    Args:
        loop: Model, data and plan.
        metrics: Takes one line for each stretch of training and each evaluation.
        position: Where to start, kept up to date throughout.

    Returns:
        How it ended. A loss that is not finite ends it at once.

    Raises:
        Interrupted: The user asked to stop.
    """
    model, optimizer, processes = loop.model, loop.optimizer, loop.processes
    per_epoch = loop.batches.steps_per_epoch
    lines_apart = max(STEPS_PER_LINE, per_epoch // LINES_PER_EPOCH)
    forward, wrapped = processes.distribute(model), list(model.parameters())
    recent = [torch.tensor(loss, device=processes.device) for loss in position.recent_losses]
    final = _evaluate(loop, metrics, position) if position.step == 0 else {}
    saved_at, saving_took = time.monotonic(), 0.0
    stopwatch = _Stopwatch(processes.device)

    while position.step < loop.total_steps:
        step = position.step
        epoch, index = divmod(step, per_epoch)
        # Counting bytes slows a step down, so the step that is measured is not timed.
        measured = position.peak_memory_bytes == 0 and processes.size == 1
        if not measured:
            stopwatch.start()
            position.timed_steps += 1

        with peak_memory(model, wanted=measured) as peak:
            rate = rate_factor(step, loop.total_steps, loop.schedule, loop.warmup_steps)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * rate
            if processes.size > 1 and not _same(wrapped, model.parameters()):
                # The network grew: what wraps it still waits for gradients of the old parameters.
                forward, wrapped = processes.distribute(model), list(model.parameters())
            loss = _step(loop, forward, step, *loop.batches.batch(epoch, index))
        if measured:
            position.peak_memory_bytes = peak[0]
        position.step += 1
        recent.append(loss.detach())
        loop.on_step(position.step, recent[-1])

        ended = position.step == loop.total_steps
        at_line = position.step % lines_apart == 0 or index + 1 == per_epoch or ended
        at_evaluation = position.step % loop.evaluate_every == 0 or ended
        # Several processes must act alike, so they look up from the work only at lines.
        looks_up = processes.size == 1 or at_line
        stopping = looks_up and processes.any(loop.stopping())
        apart = max(CHECKPOINT_SECONDS, saving_took / CHECKPOINT_SHARE)
        saving = looks_up and (stopping or time.monotonic() - saved_at > apart)
        if not (at_line or at_evaluation or saving):
            continue

        position.seconds += stopwatch.stop()
        if at_line:
            losses = processes.sum(torch.stack(recent).double()) / processes.size
            recent.clear()
            bad = (~torch.isfinite(losses)).nonzero()
            mean = losses.mean().item()
            line: dict[str, Any] = {"kind": "train", "step": position.step, "epoch": epoch}
            rate = optimizer.param_groups[0]["lr"]
            metrics.append(line | {"loss": mean, "lr": rate, "seconds": position.seconds})
            if len(bad):
                return Outcome("diverged", position.step - len(losses) + 1 + int(bad[0]), final)
        if at_evaluation:
            final = _evaluate(loop, metrics, position)
            metrics.flush()
        if saving and processes.first and not ended:
            began = time.monotonic()
            position.metrics_offset = metrics.flush()
            position.recent_losses = [loss.item() for loss in recent]
            checkpoint.save(loop.checkpoints, model, optimizer, position)
            saved_at = time.monotonic()
            saving_took = saved_at - began
        if stopping and not ended:
            raise Interrupted
    return Outcome("finished", None, final)


def _step(loop: Loop, forward: nn.Module, step: int, inputs: Tensor, targets: Tensor) -> Tensor:
    """Take one step and return its loss, without penalty."""
    method, optimizer, processes = loop.method, loop.optimizer, loop.processes
    generator = torch.Generator().manual_seed(derived_seed(loop.seed, "method", step))
    inputs, targets = method.batch(inputs, targets, generator, loop.setting)
    noise = derived_seed(loop.seed, "noise", step, processes.rank)
    losses = []

    def compute() -> Tensor:
        # A second pass through the same batch sees the noise of the first.
        _seed_noise(noise, processes.device)
        optimizer.zero_grad(set_to_none=True)
        with processes.autocast():
            losses.append(loop.setting.loss(forward(inputs), targets))
            penalty = method.penalty(loop.model)
        total = losses[-1] if penalty is None else losses[-1] + penalty
        total.backward()
        return total

    if method.card.needs_closure:
        optimizer.step(compute)  # pyright: ignore[reportCallIssue, reportArgumentType]
    else:
        compute()
        optimizer.step()
    return losses[0]


def loss_of(
    outputs: Tensor | tuple[Tensor, ...], targets: Tensor, loss: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Return the loss of a model's training output, auxiliary heads included.

    Args:
        outputs: Logits, or a tuple of logits and those of auxiliary heads, as Inception's.
        targets: The targets of all of them.
        loss: The loss of one head.
    """
    if isinstance(outputs, Tensor):
        return loss(outputs, targets)
    main, *others = outputs
    return loss(main, targets) + sum(AUXILIARY_WEIGHT * loss(other, targets) for other in others)


def _same(ones: Iterable[nn.Parameter], others: Iterable[nn.Parameter]) -> bool:
    return all(one is other for one, other in zip_longest(ones, others))


def evaluate(model: nn.Module, task: Task, processes: Processes) -> tuple[float, float]:
    """Return mean loss and accuracy of a model on a task's test split, in evaluation mode.

    Args:
        model: The model, on the device; its modes are restored.
        task: The task.
        processes: Each takes its share of the samples.
    """
    totals = torch.zeros(3, dtype=torch.float64, device=processes.device)
    batches = evaluation_batches(
        task.test,
        mean=task.mean,
        std=task.std,
        batch_size=EVALUATION_BATCH,
        device=processes.device,
        rank=processes.rank,
        world_size=processes.size,
    )
    with evaluating(model), torch.no_grad():
        for inputs, targets in batches:
            with processes.autocast():
                outputs = model(inputs).float()
            totals[0] += task.loss(outputs, targets) * len(targets)
            totals[1] += task.count_correct(outputs, targets)
            totals[2] += len(targets)
    loss, correct, count = processes.sum(totals).tolist()
    return loss / count, correct / count


def derived_seed(*parts: int | str) -> int:
    """Return a seed that is a fixed function of its parts and unlike that of any other parts."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _evaluate(
    loop: Loop, metrics: MetricsWriter | NoMetrics, position: Position
) -> dict[str, float]:
    started = time.perf_counter()
    loss, accuracy = evaluate(loop.model, loop.task, loop.processes)
    position.evaluation_seconds += time.perf_counter() - started
    if accuracy > position.best_accuracy:
        position.best_accuracy, position.best_step = accuracy, position.step
    epoch = position.step // loop.batches.steps_per_epoch
    line: dict[str, Any] = {"kind": "eval", "step": position.step, "epoch": epoch}
    metrics.append(line | {"loss": loss, "accuracy": accuracy, "seconds": position.seconds})
    return {"accuracy": accuracy, "loss": loss}


def _seed_noise(seed: int, device: torch.device) -> None:
    # torch.manual_seed reaches for every kind of device and takes a stack trace for each one that
    # is not there: half a millisecond a step.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


class _Stopwatch:
    """Adds up the time between start and stop, on a device that may run behind."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._started: float | None = None

    def start(self) -> None:
        if self._started is None:
            self._started = time.perf_counter()

    def stop(self) -> float:
        if self._started is None:
            return 0.0
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        elapsed = time.perf_counter() - self._started
        self._started = None
        return elapsed
