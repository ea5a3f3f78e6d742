"""Save a trial's whole state so that going on from it equals never having stopped.

A checkpoint is a folder ``step-00000120`` that appears under its name only when it is complete:
weights as safetensors, the rest (optimiser, position) in a file that torch loads with
``weights_only=True``, so neither can carry code. Random states need not be kept: data order,
augmentation and the noise of every step are functions of seed and step.
"""

from __future__ import annotations

import io
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import nn

from normlab.growth.grown_widths import remembered_widths
from normlab.lab.records import write_bytes, writing

WEIGHTS = "weights.safetensors"


@dataclass
class Position:
    """Where a trial stands: what a checkpoint must know beside weights and optimiser.

    Attributes:
        step: Optimiser steps taken.
        timed_steps: Those of them whose time was taken.
        seconds: Seconds that these took; evaluation and recording are left out.
        evaluation_seconds: Seconds of evaluation so far.
        metrics_offset: Length of the metrics file in bytes.
        best_accuracy: The best evaluation so far, and the step it was made at.
        best_step: See ``best_accuracy``.
        peak_memory_bytes: The measured peak of a step, 0 while unknown.
        recent_losses: Losses of the steps since the last line of the records.
    """

    step: int = 0
    timed_steps: int = 0
    seconds: float = 0.0
    evaluation_seconds: float = 0.0
    metrics_offset: int = 0
    best_accuracy: float = -1.0
    best_step: int = 0
    peak_memory_bytes: int = 0
    recent_losses: list[float] = field(default_factory=list)


def save(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, position: Position
) -> None:
    """Write a checkpoint of this step and drop older ones.

    Args:
        folder: The trial's folder of checkpoints.
        model: The model; its whole ``state_dict`` is kept.
        optimizer: The optimiser; its whole ``state_dict`` is kept.
        position: Where the trial stands.

    Raises:
        normlab.lab.records.DiskError: It cannot be written; the older checkpoint is still there.
    """
    training = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), **asdict(position)}, training)
    partial = folder / ".partial"
    final = folder / f"step-{position.step:08d}"
    shutil.rmtree(partial, ignore_errors=True)
    save_weights(partial / WEIGHTS, model)
    write_bytes(partial / "training.pt", training.getvalue())
    with writing(final):
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    for old in folder.glob("step-*"):
        if old != final:
            shutil.rmtree(old, ignore_errors=True)


def save_weights(path: Path, model: nn.Module) -> None:
    """Write a model's whole ``state_dict`` as safetensors.

    Args:
        path: The file.
        model: The model.

    Raises:
        normlab.lab.records.DiskError: It cannot be written.
    """
    # Copies, because safetensors takes neither shared nor strided memory.
    weights = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in model.state_dict().items()
    }
    write_bytes(path, safetensors.torch.save(weights))


def load_weights(path: Path, model: nn.Module) -> None:
    """Load a model's whole ``state_dict`` from safetensors.

    Args:
        path: The file.
        model: The model, unchanged where the file does not fit.

    Raises:
        ValueError: There is no such file, it is damaged, holds values that are not finite, or is
            that of another model.
    """
    try:
        weights = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"load_weights({path}): expected a safetensors file, got {error}; check the path"
        ) from None
    own = model.state_dict()
    for what, names in {
        "weights that it lacks": own.keys() - weights.keys(),
        "weights of another model": weights.keys() - own.keys(),
        "weights of another shape": {
            name
            for name in own.keys() & weights.keys()
            if own[name].shape != weights[name].shape and remembered_widths(model) is None
        },
        "values that are not finite": {
            name for name, value in weights.items() if not torch.isfinite(value).all()
        },
    }.items():
        if names:
            raise ValueError(
                f"load_weights({path}): expected the weights of this {type(model).__name__}, got "
                f"{what}: {', '.join(sorted(names)[:5])}; give the file that belongs to it"
            )
    model.load_state_dict(weights)


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Position:
    """Restore the last complete checkpoint.

    Args:
        folder: The trial's folder of checkpoints.
        model: The model, prepared as when it was saved.
        optimizer: The optimiser, built as when it was saved.

    Returns:
        Where the trial stands; step 0 if there is no checkpoint.
    """
    found = sorted(folder.glob("step-*"))
    if not found:
        return Position()
    try:
        weights = safetensors.torch.load_file(found[-1] / WEIGHTS)
        training = torch.load(found[-1] / "training.pt", weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, EOFError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"compare(checkpoint={found[-1]}): expected a complete checkpoint, got a damaged one "
            f"({error}); delete that folder: the trial then starts anew"
        ) from None
    model.load_state_dict(weights)
    optimizer.load_state_dict(training.pop("optimizer"))
    return Position(**training)
