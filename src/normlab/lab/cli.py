"""The command line: few verbs. Each verb loads what it needs, so that help stays quick."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="normlab",
    help="Train one network under many methods, with and without normalisation, and compare.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

DONE, FAILED, WRONG_USAGE = 0, 1, 2

DIGITS_DEFAULTS: dict[str, Any] = {"epochs": 8, "batch_size": 64}
"""The embedded task is small: short training in small batches."""


@app.command()
def compare(
    context: typer.Context,
    study_file: Annotated[
        Path | None, typer.Argument(metavar="[STUDY.toml]", help="The study as a file.")
    ] = None,
    task: Annotated[str, typer.Option(help="Task; `normlab list` names them.")] = "digits",
    data: Annotated[str | None, typer.Option(help="Folder or file of the task's data.")] = None,
    train_size: Annotated[
        int | None, typer.Option(help="Train on so many samples, classes balanced.")
    ] = None,
    model: Annotated[str, typer.Option(help="Model, or path/to/file.py:function.")] = "resnet",
    depth: Annotated[int | None, typer.Option(help="Weight layers of the model.")] = None,
    width: Annotated[int | None, typer.Option(help="Channels or units of the first stage.")] = None,
    block: Annotated[str | None, typer.Option(help="ResNet block: basic, bottleneck.")] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(help="Methods, such as: batch-norm ic-layer:drop_prob=0.1 fixup+dropout"),
    ] = None,
    reference: Annotated[str, typer.Option(help="Method the others are tested against.")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 3,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training set.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples of a batch.")] = None,
    optimizer: Annotated[str, typer.Option(help="sgd or adamw.")] = "sgd",
    lr: Annotated[float | None, typer.Option(help="Base learning rate.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Weight decay.")] = None,
    tune: Annotated[
        str | None, typer.Option(help="`lr`: search each method's rate, equal trials for all.")
    ] = None,
    tune_trials: Annotated[int, typer.Option(help="Trials of the search for each method.")] = 8,
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    checkpoint_activations: Annotated[
        bool,
        typer.Option("--checkpoint-activations", help="Recompute activations to save memory."),
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="Run folder; the same command goes on.")] = None,
) -> None:
    """Train one network under several methods side by side and write a page."""
    with plainly():
        from normlab.lab.study import make_study, read_study

        if study_file is not None:
            _refuse_beside_a_file(context)
            study = read_study(study_file)
        else:
            small = DIGITS_DEFAULTS if task == "digits" else {}
            training = _given(
                epochs=epochs,
                batch_size=batch_size,
                optimizer=optimizer,
                lr=lr,
                weight_decay=weight_decay,
                precision=precision,
                checkpoint_activations=checkpoint_activations or None,
                device=device,
            )
            small_model = {"depth": 8, "width": 8} if (task, model) == ("digits", "resnet") else {}
            content = _given(
                task=_given(name=task, data=data, train_size=train_size),
                model={"name": model} | small_model | _given(depth=depth, width=width, block=block),
                methods=methods,
                reference=reference,
                seeds=list(range(seeds)),
                training=small | training,
                tune=None if tune is None else {"parameter": tune, "trials": tune_trials},
            )
            study = make_study(content)

        from rich.console import Console

        from normlab.lab import compare as comparison
        from normlab.lab import records

        folder = out or Path("runs") / study.folder_name()
        console = Console(highlight=False)
        try:
            done = comparison.compare(study, folder, console)
        except comparison.Interrupted:
            _say(f"\nstopped; what is done is kept in {folder}\nto continue: {_command()}")
            raise typer.Exit(FAILED) from None
        if done.page is not None:
            _summarise(done.results)
            _say(f"page: {done.page}")
        failed = [result for result in done.results if result["status"] == records.FAILED]
        if failed:
            _say(f"{len(failed)} of {len(done.results)} trials failed: {failed[0]['reason']}", 2)
            raise typer.Exit(FAILED)


@app.command("convert")
def convert_model(
    model: Annotated[str, typer.Argument(help="Network: path/to/file.py:function, or a name.")],
    to: Annotated[
        str, typer.Argument(metavar="METHOD", help="A method, such as group-norm; fold or freeze.")
    ],
    shape: Annotated[str, typer.Option(help="Shape of one sample, such as 3,32,32.")],
    num_classes: Annotated[int, typer.Option(help="For a network that asks for it.")] = 10,
    depth: Annotated[int | None, typer.Option(help="Weight layers of a named network.")] = None,
    width: Annotated[int | None, typer.Option(help="Channels of its first stage.")] = None,
    block: Annotated[str | None, typer.Option(help="ResNet block: basic, bottleneck.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Weights to load: safetensors.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write the converted weights.")] = None,
    samples: Annotated[int, typer.Option(min=2, help="Samples of the example.")] = 4,
    skip: Annotated[list[str] | None, typer.Option(help="Name of a module to leave.")] = None,
    add: Annotated[
        bool, typer.Option("--add", help="Put BatchNorm in where there is none.")
    ] = False,
    allow_skipped: Annotated[
        bool, typer.Option("--allow-skipped", help="Leave layers that cannot be replaced.")
    ] = False,
    allow_none: Annotated[
        bool, typer.Option("--allow-none", help="Take a network without BatchNorm.")
    ] = False,
    same: Annotated[
        bool, typer.Option("--same", help="Insist that the outputs in evaluation stay.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done.")] = False,
) -> None:
    """Give a network another normaliser; show what was touched, what was not, and the proof."""
    with plainly():
        from normlab.lab.convert_verb import Request, convert_model

        request = Request(
            model=model,
            to=to,
            shape=_read_shape(shape),
            num_classes=num_classes,
            options=_given(depth=depth, width=width, block=block),
            samples=samples,
            weights=weights,
            out=out,
            skip=tuple(skip or ()),
            add=add,
            allow_skipped=allow_skipped,
            allow_none=allow_none,
            keeps_evaluation=True if same else None,
            dry_run=dry_run,
        )
        _say(convert_model(request))


@app.command("list")
def list_all() -> None:
    """Name all methods, tasks and models."""
    with plainly():
        from rich.console import Console
        from rich.table import Table

        from normlab.catalog import METHODS
        from normlab.lab.models import MODELS
        from normlab.lab.tasks import TASKS

        console = Console()
        rooms = {
            "methods": [(method.card.name, method.card.summary) for method in METHODS],
            "tasks": [(task.name, task.summary) for task in TASKS],
            "models": [
                *((model.name, model.summary) for model in MODELS),
                ("path/to/file.py:function", "a network of your own"),
            ],
        }
        for title, rows in rooms.items():
            table = Table(title, "", box=None, header_style="bold", pad_edge=False)
            for row in rows:
                table.add_row(*row)
            console.print(table)
            console.print()


@app.command()
def show(name: Annotated[str, typer.Argument(help="A method, such as fixup.")]) -> None:
    """Show a method's card: what it does, its paper, options, limits and departures."""
    with plainly():
        from normlab.catalog import find_method
        from normlab.lab.card_text import card_text

        method = find_method(name)
        _say("\n\n".join(card_text(part) for part in method.parts or (method,)))


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Write the page of a run anew."""
    with plainly():
        from normlab.lab.report import write_report

        _say(f"page: {write_report(folder)}")


@app.command()
def reproduce(
    paper: Annotated[
        str | None, typer.Argument(help="A claim, such as fixup; without one all are listed.")
    ] = None,
    scale: Annotated[str, typer.Option(help="small or paper.")] = "small",
    data: Annotated[
        Path | None,
        typer.Option(envvar="NORMLAB_DATA", help="Folder that holds fashion-mnist/ and so on."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; the same command goes on.")] = None,
    evidence: Annotated[Path, typer.Option(help="Folder that the verdict is appended to.")] = Path(
        "evidence"
    ),
) -> None:
    """Run a paper's claim and give a verdict."""
    with plainly():
        from rich.console import Console

        from normlab.lab import compare as comparison
        from normlab.lab.claims.verb import list_claims, reproduce_claim

        if paper is None:
            for name, statement, cost in list_claims():
                _say(f"{name}: {statement}\n    {cost}")
            return
        try:
            reproduce_claim(paper, scale, data, out, evidence, Console(highlight=False))
        except comparison.Interrupted:
            _say(f"\nstopped; what is done is kept\nto continue: {_command()}")
            raise typer.Exit(FAILED) from None


@contextmanager
def plainly() -> Iterator[None]:
    """Turn a user's mistake into one line and an exit status, without a traceback."""
    from normlab.lab.records import DiskError

    try:
        yield
    except ValueError as error:
        _say(f"normlab: {error}", 2)
        raise typer.Exit(WRONG_USAGE) from None
    except DiskError as error:
        _say(f"normlab: {error}", 2)
        raise typer.Exit(FAILED) from None
    except KeyboardInterrupt:
        _say("\nstopped at once; the same command goes on from the last checkpoint", 2)
        raise typer.Exit(FAILED) from None


def _read_shape(text: str) -> tuple[int, ...]:
    parts = text.replace("x", ",").split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(
            f"convert(shape={text!r}): expected whole numbers above 0, got {text!r}; "
            "write the shape of one sample as 3,32,32"
        )
    return tuple(int(part) for part in parts)


def _refuse_beside_a_file(context: typer.Context) -> None:
    """Refuse options that a study file would silently overrule."""
    given = [
        name
        for name in context.params
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
        and name not in ("study_file", "out")
    ]
    if given:
        options = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ValueError(
            f"compare({context.params['study_file']}, {options}): expected a study file or options "
            f"that describe a study, got both; write {options} into the file"
        )


def run() -> None:
    """Run the command line with this process's arguments."""
    sys.argv[1:] = spread_methods(sys.argv[1:])
    app(prog_name="normlab")


def spread_methods(arguments: list[str]) -> list[str]:
    """Let ``--methods a b c`` mean ``--methods a --methods b --methods c``.

    Example:
        >>> spread_methods(["--methods", "fixup", "none", "--seeds", "3"])
        ['--methods', 'fixup', '--methods', 'none', '--seeds', '3']
    """
    spread: list[str] = []
    among_methods = False
    for argument in arguments:
        if argument.startswith("-"):
            among_methods = argument == "--methods"
            spread += [] if among_methods else [argument]
        elif among_methods and not argument.endswith(".toml"):
            spread += ["--methods", argument]
        else:
            among_methods = False
            spread.append(argument)
    return spread


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _command() -> str:
    import shlex

    return shlex.join(["normlab", *sys.argv[1:]])


def _say(text: str, stream: int = 1) -> None:
    # Of several processes that train one model, the first one speaks.
    if os.environ.get("RANK", "0") == "0":
        typer.echo(text, err=stream == 2)


def _summarise(results: list[dict[str, Any]]) -> None:
    """Print each method's mean accuracy, best first."""
    from normlab.lab import records

    accuracies: dict[str, list[float]] = {}
    for result in results:
        ended = result["status"] == records.FINISHED
        accuracies.setdefault(result["method"], [])
        accuracies[result["method"]] += [result["final_accuracy"]] if ended else []
    for label in sorted(accuracies, key=lambda label: -_mean(accuracies[label])):
        values = accuracies[label]
        count = sum(result["method"] == label for result in results)
        mean = f"{100 * _mean(values):6.2f} %" if values else "   none"
        _say(f"{mean}  {label}  ({len(values)} of {count} trials finished)")


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else -1.0
