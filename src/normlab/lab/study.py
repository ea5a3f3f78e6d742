"""A comparison as typed data: read from one TOML file or the command line, written with the run."""

from __future__ import annotations

import hashlib
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from normlab.lab.schedules import Schedule

DEFAULT_METHODS = (
    "batch-norm",
    "none",
    "group-norm",
    "filter-response-norm",
    "fixup",
    "weight-rescaling",
)
"""What `normlab compare` compares when nothing is said."""


class _Typed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Named(BaseModel):
    """A name, and options that the named part checks itself."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str

    @property
    def options(self) -> dict[str, Any]:
        """The options beside the name."""
        return dict(self.model_extra or {})


class TaskChoice(_Named):
    """The task: its name, where its data lies, how much of it to use, and options of its own."""

    name: str = "digits"
    data: str | None = None
    train_size: int | None = Field(default=None, ge=1)
    test_size: int | None = Field(default=None, ge=1)


class ModelChoice(_Named):
    """The model: its name or ``path/to/file.py:function``, and options such as ``depth``."""

    name: str = "resnet"


class Training(_Typed):
    """How every trial is trained.

    Attributes:
        epochs: Passes over the training set.
        batch_size: Samples of a global batch, over all processes.
        optimizer: The kind of optimiser.
        lr: The base learning rate, 0.1 for SGD and 0.001 for AdamW if nothing is said; a search
            replaces it for each method.
        momentum: Momentum of SGD.
        weight_decay: Decay of all parameters, unless a method says otherwise.
        schedule: Course of the learning rate.
        warmup_steps: Steps of linear rise in front of it.
        evaluate_every: Steps between evaluations; 0 means once an epoch.
        precision: ``bf16`` runs forward passes under autocast.
        checkpoint_activations: Whether runs of layers recompute their activations in the backward
            pass: memory grows as the square root of the depth, for one more forward pass.
        device: ``auto`` takes an accelerator if there is one.
    """

    epochs: int = Field(default=10, ge=1)
    batch_size: int = Field(default=128, ge=1)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(
        default_factory=lambda known: 1e-3 if known.get("optimizer") == "adamw" else 0.1, gt=0
    )
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0)
    schedule: Schedule = "cosine"
    warmup_steps: int = Field(default=0, ge=0)
    evaluate_every: int = Field(default=0, ge=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    checkpoint_activations: bool = False
    device: str = "auto"


class Tune(_Typed):
    """The search that gives each method its learning rate, the same number of trials for all.

    Attributes:
        parameter: What is searched.
        trials: Rates tried for each method.
        seeds: Seeds that each rate is tried on; a rate at which a method is unstable may look good
            on one.
        low: Lowest rate.
        high: Highest rate.
        hold_out: The share of the training set that judges; the test set is not seen.
        seed: Seed of the search, and the first one of its trials.
    """

    parameter: Literal["lr"] = "lr"
    trials: int = Field(default=8, ge=1)
    seeds: int = Field(default=1, ge=1)
    low: float = Field(default=1e-3, gt=0)
    high: float = Field(default=1.0, gt=0)
    hold_out: float = Field(default=0.1, gt=0, lt=1)
    seed: int = Field(default=0, ge=0)


def _from_name(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class Study(_Typed):
    """One network, one task, several methods, several seeds.

    Attributes:
        name: The study's name, on the page.
        task: The task; in a file a string is its name.
        model: The model; in a file a string is its name.
        methods: Method labels, such as ``ic-layer:drop_prob=0.1`` or ``fixup+dropout``.
        reference: The method that others are tested against; empty means ``batch-norm`` if it is
            among the methods, else the first.
        seeds: The seeds.
        targets: Accuracies for steps-to-target; empty lets the report choose.
        training: How every trial is trained.
        tune: The search for the learning rate, if any.
    """

    name: str = ""
    task: Annotated[TaskChoice, BeforeValidator(_from_name)] = TaskChoice()
    model: Annotated[ModelChoice, BeforeValidator(_from_name)] = ModelChoice()
    methods: Annotated[list[str], Field(min_length=1)] = list(DEFAULT_METHODS)
    reference: str = ""
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = [0, 1, 2]
    targets: list[Annotated[float, Field(gt=0, le=1)]] = []
    training: Training = Training()
    tune: Tune | None = None

    @property
    def reference_method(self) -> str:
        """The label of the method that the others are tested against."""
        if self.reference:
            return self.reference
        return "batch-norm" if "batch-norm" in self.methods else self.methods[0]

    def folder_name(self) -> str:
        """A name for the run folder that is the same for the same study."""
        plain = re.sub(r"[^\w.-]+", "-", f"{self.task.name}-{Path(self.model.name).stem}")
        return f"{plain}-{hashlib.blake2b(self.to_toml().encode(), digest_size=3).hexdigest()}"

    def to_toml(self) -> str:
        """Write the study as TOML, every default spelt out."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))


def read_study(path: Path) -> Study:
    """Read a study from a TOML file.

    Args:
        path: The file.

    Returns:
        The study.

    Raises:
        ValueError: No such file, not TOML, or a field that is wrong; path and line are named.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"study({path}): expected a TOML file, got {error}; check the path"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(
            f"study({path}): expected TOML, got a mistake: {error}; mend that line"
        ) from None
    return make_study(content, source=str(path), text=text)


def make_study(content: dict[str, Any], source: str = "command line", text: str = "") -> Study:
    """Build a study from plain data.

    Args:
        content: The fields.
        source: Where they come from, for messages.
        text: The TOML text, if the message can point to a line of it.

    Returns:
        The study.

    Raises:
        ValueError: A field of the wrong type, out of range, or unknown.
    """
    try:
        return Study.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(_describe(first, source, text)) from None


def _describe(error: ErrorDetails, source: str, text: str) -> str:
    path = [part for part in error["loc"] if not str(part).startswith("function-")]
    field = ".".join(str(part) for part in path)
    line = _line_of(text, [str(part) for part in path])
    place = f"{source}, line {line}" if line else source
    if error["type"] == "extra_forbidden":
        known = Study.model_fields
        for part in path[:-1]:
            annotation = known[str(part)].annotation
            room = {"training": Training, "tune": Tune}.get(str(part), annotation)
            known = getattr(room, "model_fields", known)
        from difflib import get_close_matches

        near = get_close_matches(str(path[-1]), known, n=1, cutoff=0.0)
        return f"study({place}): expected a known field, got {field}; do you mean {near[0]!r}?"
    wanted = error["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    return f"study({place}): {field}: expected {wanted}, got {error['input']!r}; change {field}"


def _line_of(text: str, path: list[str]) -> int | None:
    """Return the number of the line that sets the field, which a TOML reader does not tell."""
    table: list[str] = []
    best, found = 0, None
    for number, line in enumerate(text.splitlines(), start=1):
        if header := re.match(r"\s*\[+\s*([^\]]+?)\s*\]+", line):
            table = header[1].split(".")
            here = table
        elif key := re.match(r"\s*([\w.-]+)\s*=", line):
            here = [*table, *key[1].split(".")]
        else:
            continue
        if len(here) > best and path[: len(here)] == here:
            best, found = len(here), number
    return found
