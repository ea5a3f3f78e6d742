"""The verb `convert`: a network by name or from the user's file, another normaliser, the proof."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normlab.catalog import find_method
from normlab.conversion import convert, fold, freeze
from normlab.lab.checkpoint import load_weights, save_weights
from normlab.lab.models import build_model
from normlab.surgery.conversion import Conversion

SURGERIES = {"fold": fold, "freeze": freeze}
"""What the verb does besides methods: both keep the outputs in evaluation."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user asked for.

    Attributes:
        model: As `build_model` takes it.
        to: A method with its options, ``fold`` or ``freeze``.
        shape: The shape of one sample.
        num_classes: For a network that asks for it.
        options: Further options of the network.
        samples: Samples of the random example that the outputs are compared on.
        weights: A safetensors file to load before, or None.
        out: A safetensors file to write the converted weights to, or None.
        skip: Names of modules to leave.
        add: As in `normlab.convert`.
        allow_skipped: As in `normlab.convert`.
        allow_none: As in `normlab.convert`.
        keeps_evaluation: As in `normlab.convert`.
        dry_run: Whether only to show what would happen.
    """

    model: str
    to: str
    shape: tuple[int, ...]
    num_classes: int = 10
    options: dict[str, Any]
    samples: int = 4
    weights: Path | None = None
    out: Path | None = None
    skip: tuple[str, ...] = ()
    add: bool = False
    allow_skipped: bool = False
    allow_none: bool = False
    keeps_evaluation: bool | None = None
    dry_run: bool = False


def convert_model(request: Request) -> str:
    """Convert a network and return what was done, in words.

    Args:
        request: What the user asked for.

    Returns:
        Plan and proof, and where the weights were written.

    Raises:
        ValueError: Whatever the user asked for and cannot have, with the reason.
        normlab.lab.records.DiskError: The weights could not be written.
    """
    if request.out is not None and request.dry_run:
        raise ValueError(
            "convert(out, dry_run): expected one of the two, got both; leave --out out, because a "
            "dry run changes nothing"
        )
    torch.manual_seed(0)
    model = build_model(request.model, request.shape, request.num_classes, **request.options)
    if request.weights is not None:
        load_weights(request.weights, model)
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    example = torch.randn(request.samples, *request.shape).to(device)
    done = _convert(model.eval(), request, example)
    lines = [str(done)]
    if request.out is not None:
        save_weights(request.out, done.model)
        lines.append(f"weights: {request.out}")
    return "\n".join(lines)


def _convert(model: nn.Module, request: Request, example: torch.Tensor) -> Conversion:
    try:
        if request.to in SURGERIES:
            _refuse_options_of_methods(request)
            return SURGERIES[request.to](model, example, dry_run=request.dry_run)
        return convert(
            model,
            find_method(request.to, besides=tuple(SURGERIES)),
            example,
            skip=request.skip,
            add=request.add,
            allow_skipped=request.allow_skipped,
            allow_none=request.allow_none,
            keeps_evaluation=request.keeps_evaluation,
            dry_run=request.dry_run,
        )
    except (RuntimeError, IndexError, TypeError) as error:
        raise ValueError(
            f"convert({request.model}): expected a network that takes samples of shape "
            f"{request.shape}, got {type(error).__name__}: {error}; give another --shape"
        ) from None


def _refuse_options_of_methods(request: Request) -> None:
    given = {
        "--skip": request.skip,
        "--add": request.add,
        "--allow-skipped": request.allow_skipped,
        "--allow-none": request.allow_none,
        "--same": request.keeps_evaluation,
    }
    asked = [name for name, value in given.items() if value]
    if asked:
        raise ValueError(
            f"convert({request.to}, {', '.join(asked)}): expected these options with a method, got "
            f"them with {request.to}; leave them out"
        )
