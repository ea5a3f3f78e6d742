"""Run folders that look like real ones, written without training anything."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from normlab.lab.records import (
    CARDS,
    ENVIRONMENT,
    STUDY,
    MetricsWriter,
    finish_trial,
    trial_folder,
    write_json,
    write_text,
)


@dataclass(frozen=True)
class FakeMethod:
    """How a method pretends to train.

    Attributes:
        label: Its label.
        accuracy: Where its accuracy ends, a fraction.
        spread: Standard deviation of that over seeds.
        speed: How fast it gets there; 1 reaches 63 % of the way after a tenth of the training.
        cost: Seconds for a step, relative to the others.
        order: Its place in the catalogue.
        fails: Seed to (status, share of the training done, reason).
        unfinished: Seeds that stand half-way, without a result.
        missing: Seeds that have not started.
        measured: Whether accuracies are recorded.
        parts: Labels of the methods it is composed of.
        memory: Peak memory in bytes; None as on a CPU.
    """

    label: str
    accuracy: float = 0.97
    spread: float = 0.003
    speed: float = 1.0
    cost: float = 1.0
    order: int = 0
    fails: tuple[tuple[int, str, float, str], ...] = ()
    unfinished: tuple[int, ...] = ()
    missing: tuple[int, ...] = ()
    measured: bool = True
    parts: tuple[str, ...] = ()
    memory: int | None = 180 * 2**20


REALISTIC = (
    FakeMethod("batch-norm", 0.9742, 0.0022, 1.0, 1.0, 0),
    FakeMethod("group-norm", 0.9781, 0.0020, 0.9, 1.12, 1, memory=196 * 2**20),
    FakeMethod("layer-norm", 0.9661, 0.0030, 0.8, 1.10, 2, memory=196 * 2**20),
    FakeMethod("weight-standardization", 0.9703, 0.0028, 0.75, 1.21, 9, memory=171 * 2**20),
    FakeMethod("ic-layer:drop_prob=0.1", 0.9752, 0.0035, 1.1, 1.3, 5, memory=214 * 2**20),
    FakeMethod(
        "fixup+mixup",
        0.9695,
        0.003,
        0.55,
        0.82,
        -1,
        fails=(
            (2, "diverged", 0.31, "the loss was not a number after a gradient norm of 3.1e+08"),
        ),
        parts=("fixup", "mixup"),
        memory=142 * 2**20,
    ),
    FakeMethod(
        "none",
        0.40,
        0.1,
        0.4,
        0.74,
        16,
        fails=(
            (0, "diverged", 0.06, "the loss was infinite"),
            (1, "diverged", 0.02, "the loss was infinite"),
            (2, "diverged", 0.11, "the loss was not a number"),
        ),
        memory=128 * 2**20,
    ),
)


def many_methods(count: int) -> list[FakeMethod]:
    """Return methods that all differ a little."""
    return [
        FakeMethod(
            f"method-{index:02d}" if index else "batch-norm",
            accuracy=0.96 + 0.02 * math.sin(index),
            speed=0.6 + 0.05 * index,
            cost=1.0 + 0.1 * math.cos(index),
            order=index,
        )
        for index in range(count)
    ]


def write_fake_run(
    folder: Path,
    methods: Sequence[FakeMethod] = REALISTIC,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    epochs: int = 30,
    steps_per_epoch: int = 42,
    lines_per_epoch: int = 10,
    reference: str = "batch-norm",
    targets: Sequence[float] = (),
    name: str = "digits-comparison",
) -> Path:
    """Write a run folder with the layout of `normlab.lab.records`.

    Args:
        folder: Where to write; made if missing.
        methods: How each method behaves.
        seeds: The study's seeds.
        epochs: Evaluations after the one at step 0.
        steps_per_epoch: Optimiser steps of an epoch.
        lines_per_epoch: Training lines of an epoch.
        reference: Label of the reference.
        targets: Accuracies for steps-to-target; none leaves them out of the study.
        name: The study's name.

    Returns:
        The folder.
    """
    labels = ", ".join(f'{{name = "{_toml(method.label)}"}}' for method in methods)
    wanted = f"targets = {list(targets)}\n" if targets else ""
    write_text(
        folder / STUDY,
        f'name = "{_toml(name)}"\nreference = "{_toml(reference)}"\nseeds = {list(seeds)}\n'
        f'methods = [{labels}]\n{wanted}\n[task]\nname = "digits"\n\n'
        '[model]\nname = "resnet"\ndepth = 20\n\n'
        f'[training]\nepochs = {epochs}\nbatch_size = 32\noptimizer = "sgd"\nlr = 0.1\n'
        'momentum = 0.9\nweight_decay = 0.0005\nschedule = "cosine"\nprecision = "fp32"\n',
    )
    write_json(folder / ENVIRONMENT, ENVIRONMENT_FACTS)
    write_json(folder / CARDS, {method.label: _card(method) for method in methods})
    for method in methods:
        for seed in seeds:
            if seed not in method.missing:
                _write_trial(folder, method, seed, epochs, steps_per_epoch, lines_per_epoch)
    return folder


ENVIRONMENT_FACTS = {
    "normlab": "0.1.0",
    "python": "3.11.7",
    "torch": "2.13.0+cpu",
    "platform": "Linux-6.1-x86_64",
    "device": "cpu",
    "device_name": "AMD EPYC 7B13",
    "threads": 2,
    "processes": 1,
    "commit": "4be1f0c",
    "command": "normlab compare --task digits --model resnet --depth 20 --seeds 3",
    "started": "2026-03-02T09:14:05+00:00",
    "task_title": "Handwritten digits (8 x 8)",
    "num_classes": 10,
    "train_samples": 1437,
    "test_samples": 360,
    "model_title": "ResNet-20",
    "packages": {"numpy": "2.4.6", "scikit-learn": "1.8.0"},
}


def _write_trial(
    folder: Path, method: FakeMethod, seed: int, epochs: int, per_epoch: int, lines: int
) -> None:
    noise = random.Random(f"{method.label}/{seed}")
    common = random.Random(seed).gauss(0.0, 0.002)  # what a seed does to every method
    end = min(method.accuracy + common + noise.gauss(0.0, method.spread), 0.999)
    steps = epochs * per_epoch
    failure = next((fail for fail in method.fails if fail[0] == seed), None)
    last = steps
    if failure is not None:
        last = max(1, round(failure[2] * steps))
    elif seed in method.unfinished:
        last = steps // 2
    step_seconds = 0.0123 * method.cost * noise.uniform(0.98, 1.02)

    def learned(step: int) -> float:
        return 1.0 - math.exp(-10.0 * method.speed * step / steps)

    trial = trial_folder(folder, method.label, seed)
    accuracies: list[tuple[int, float]] = []
    every = max(1, per_epoch // lines)
    with MetricsWriter(trial) as writer:
        for step in range(last + 1):
            share = learned(step)
            if step and step % every == 0:
                loss = 2.3 * (1 - share) + 0.02 / method.speed
                loss += 0.05 * noise.random() * (1.01 - share)
                if failure is not None and step > last - 3 * every:
                    loss *= 8.0
                line = {"kind": "train", "step": step, "epoch": step // per_epoch, "loss": loss}
                writer.append({**line, "lr": 0.1, "seconds": step * step_seconds})
            if method.measured and step % per_epoch == 0:
                accuracy = 0.1 + (end - 0.1) * share + noise.gauss(0, 0.012) * (1 - step / steps)
                accuracy = round(min(max(accuracy, 0.0), 1.0) * 3600) / 3600
                accuracies.append((step, accuracy))
                line = {"kind": "eval", "step": step, "epoch": step // per_epoch}
                loss = 2.3 * (1 - share) + 3.0 * (1 - end) + 0.02 * noise.random()
                seconds = step * step_seconds
                writer.append({**line, "loss": loss, "accuracy": accuracy, "seconds": seconds})
    if seed in method.unfinished:
        return
    best = max(accuracies, key=lambda pair: pair[1], default=(0, None))
    measured = failure is None and method.measured
    result: dict[str, Any] = {
        "status": "finished" if failure is None else failure[1],
        "reason": None if failure is None else failure[3],
        "method": method.label,
        "seed": seed,
        "lr": 0.1,
        "step": last,
        "steps": steps,
        "diverged_at": last if failure is not None and failure[1] == "diverged" else None,
        "final_accuracy": accuracies[-1][1] if measured else None,
        "best_accuracy": best[1] if measured else None,
        "best_step": best[0],
        "final_loss": 0.05 + 2.5 * (1 - end) if failure is None else None,
        "seconds": last * step_seconds,
        "evaluation_seconds": 0.2,
        "samples_per_second": 32 / step_seconds,
        "peak_memory_bytes": method.memory,
        "num_parameters": 272474 - (1376 if method.order not in (0, 1, 2) else 0),
        "device": "cpu",
        "precision": "fp32",
        "num_processes": 1,
        "notes": [f"replaced 19 of 19 normalisation layers by {method.label}"],
    }
    finish_trial(trial, result)


def _card(method: FakeMethod) -> dict[str, Any]:
    card = {
        "name": method.label.partition(":")[0],
        "title": method.label.partition(":")[0].replace("-", " ").capitalize(),
        "summary": "Normalises activations by statistics of the batch, then scales and shifts.",
        "room": "norms",
        "source": {
            "authors": "S. Ioffe, C. Szegedy",
            "year": 2015,
            "title": "Batch Normalization: Accelerating Deep Network Training",
            "arxiv": "1502.03167",
            "venue": "ICML",
        },
        "batch_statistics": True,
        "batch_of_one": "refused in training",
        "departures": ["The running variance is unbiased, as in public code; the paper's too."],
        "limits": ["Small batches make the statistics noisy."],
        "options": [{"name": "eps", "default": 1e-5, "meaning": "added to the variance"}],
        "order": method.order,
    }
    if method.parts:
        parts = [_card(replace(method, label=part, parts=())) for part in method.parts]
        return {**card, "name": method.label, "order": -1, "parts": parts}
    return card


def _toml(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
