"""The page itself: numbers, template, style and scripts put into one file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup, escape

from normlab.lab.records import STUDY, RunRecord
from normlab.lab.report import tables, words
from normlab.lab.report.colours import Style, styles
from normlab.lab.report.curves import curve
from normlab.lab.report.plotly_script import plotly_script
from normlab.lab.report.summary import (
    NOT_STARTED,
    UNDER_WAY,
    Estimate,
    MethodSummary,
    Summary,
    summarise,
)
from normlab.lab.report.verdict import digits_for, verdict

_ARXIV = re.compile(r"(arxiv:)?(\d{4}\.\d{4,5}(v\d+)?|[a-z-]+(\.[A-Z]{2})?/\d{7})", re.IGNORECASE)

# More curves than this with a band each, and nobody sees a thing.
_MOST_BANDS = 6


def render(run: RunRecord) -> str:
    """Return the page of a run as one HTML text that needs nothing beside it.

    Args:
        run: From `normlab.lab.records.read_run`.

    Returns:
        The page, with its style, its data and its scripts inside.
    """
    summary = summarise(run)
    digits = digits_for(summary)
    cards = {method.label: method.card for method in summary.methods}
    # A card's label may differ from its name; the style follows the catalogue only if they agree.
    looks = styles({label: {"name": label, **card} for label, card in cards.items()})
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_resource),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["named"] = _names_marked(list(cards))
    environment.globals.update(words=words, arxiv=_arxiv, STRIP_WIDTH=tables.STRIP_WIDTH)
    return environment.get_template("page.html.jinja").render(
        title=_title(run),
        facts=_facts(run, summary),
        verdict=verdict(summary, digits),
        summary=summary,
        looks=looks,
        tables={
            "accuracy": tables.accuracy_columns(summary, digits),
            "targets": tables.target_columns(summary, digits),
            "cost": tables.cost_columns(summary),
        },
        failures=[(m, t) for m in summary.methods for t in m.failures],
        waiting=_waiting(summary),
        study_text=_study_text(run),
        environment=_environment_rows(run.environment),
        command=run.environment.get("command"),
        tuning=_tuning(run),
        data=_for_script(_plot_data(run, summary, looks, digits)),
        has_curves=any(trial.metrics for trial in run.trials),
        style=_resource("page.css"),
        script=_resource("page.js"),
        plots_script=_resource("plots.js"),
        plotly=plotly_script(),
    )


def _resource(name: str) -> str:
    return resources.files("normlab.lab.report").joinpath(name).read_text(encoding="utf-8")


def _for_script(content: Any) -> str:
    """Return JSON that cannot end the script element it stands in, whatever the names are."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _arxiv(identifier: Any) -> str | None:
    """Return the address of a paper, or None where the text is no arXiv id."""
    match = _ARXIV.fullmatch(str(identifier or "").strip())
    return f"https://arxiv.org/abs/{match.group(2)}" if match else None


def _names_marked(labels: list[str]) -> Callable[[str], Markup]:
    """Return a filter that sets the methods' names apart from the words around them."""
    longest_first = sorted((str(escape(label)) for label in labels), key=len, reverse=True)
    names = "|".join(re.escape(label) for label in longest_first) or "(?!)"
    pattern = re.compile(rf"(?<![\w-])(?:{names})(?![\w-])")

    def named(sentence: str) -> Markup:
        return Markup(pattern.sub(r"<b>\g<0></b>", str(escape(sentence))))

    return named


def _plot_data(
    run: RunRecord, summary: Summary, looks: dict[str, Style], digits: int
) -> dict[str, Any]:
    methods = []
    for method in summary.methods:
        records = [trial for trial in run.trials if trial.method == method.label]
        methods.append(
            {
                "label": method.label,
                "reference": method.is_reference,
                **vars(looks[method.label]),
                "accuracy": curve(records, "eval", "accuracy"),
                "test": curve(records, "eval", "loss"),
                "train": curve(records, "train", "loss"),
                "failures": [
                    {"seed": t.seed, "step": t.step, "status": t.status} for t in method.failures
                ],
                "final": _ends(method.final_accuracy),
                "cost": {
                    "seconds": _ends(method.seconds),
                    "memory": _ends(method.peak_memory),
                    "parameters": {"mean": method.num_parameters},
                },
            }
        )
    return {
        "methods": methods,
        "digits": digits,
        "bands": len(methods) <= _MOST_BANDS,
    }


def _ends(estimate: Estimate | None) -> dict[str, Any]:
    if estimate is None:
        return {"mean": None}
    low, high = estimate.interval or (None, None)
    return {"mean": estimate.mean, "low": low, "high": high, "count": len(estimate.values)}


def _facts(run: RunRecord, summary: Summary) -> list[tuple[str, str]]:
    """The line under the title: what was trained on what, how often, on which machine."""
    study, environment = run.study, run.environment
    training = study.get("training") or {}
    task = environment.get("task_title") or (study.get("task") or {}).get("name")
    model = environment.get("model_title") or (study.get("model") or {}).get("name")
    samples = environment.get("train_samples")
    data = f"{task}, {words.plural(samples, 'training sample')}" if task and samples else task
    rule = [
        str(training["optimizer"]).upper() if training.get("optimizer") else "",
        f"learning rate {words.rate(training['lr'])}"
        if isinstance(training.get("lr"), int | float)
        else "",
        f"{training['schedule']} schedule" if training.get("schedule") else "",
        f"batch {training['batch_size']}" if training.get("batch_size") else "",
        words.plural(training["epochs"], "epoch")
        if isinstance(training.get("epochs"), int)
        else "",
        str(training.get("precision") or ""),
    ]
    processes = environment.get("processes") or 1
    device = environment.get("device_name") or environment.get("device")
    if device and processes > 1:
        device = f"{device}, {processes} processes"
    size = words.plural(len(summary.methods), "method")
    facts = [
        ("Model", model),
        ("Data", data),
        ("Training", ", ".join(part for part in rule if part)),
        ("Compared", f"{size}, {words.plural(len(summary.seeds), 'seed')} each"),
        ("Machine", device),
        ("Started", str(environment.get("started") or "").replace("T", " ")[:16]),
    ]
    return [(name, str(value)) for name, value in facts if value]


def _waiting(summary: Summary) -> list[tuple[MethodSummary, str]]:
    """What is still to come, a line for each method."""
    lines = []
    for method in summary.methods:
        running = [t for t in method.trials if t.status == UNDER_WAY]
        parts = [f"seed {t.seed} under way at step {t.step:,}" for t in running]
        missing = [str(t.seed) for t in method.trials if t.status == NOT_STARTED]
        if missing:
            noun = "seed" if len(missing) == 1 else "seeds"
            parts.append(f"{noun} {words.listing(missing)} not started")
        if parts:
            lines.append((method, "; ".join(parts)))
    return lines


def _study_text(run: RunRecord) -> str:
    return (run.folder / STUDY).read_text(encoding="utf-8").strip()


def _environment_rows(environment: dict[str, Any]) -> list[tuple[str, str]]:
    shown = {"command", "packages", "task_title", "model_title"}
    rows = [
        (name.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value))
        for name, value in environment.items()
        if name not in shown and value is not None
    ]
    packages = environment.get("packages")
    if isinstance(packages, dict):
        rows += [(str(name), str(version)) for name, version in packages.items()]
    return rows


def _title(run: RunRecord) -> str:
    """Return the study's name, or what was trained on what."""
    model, task = (run.environment.get(name) for name in ("model_title", "task_title"))
    return str(run.study.get("name") or (f"{model} on {task}" if model and task else "Comparison"))


def _tuning(run: RunRecord) -> str:
    """Say how the learning rates were found, where they were searched for."""
    tune = run.study.get("tune")
    if not isinstance(tune, dict) or not tune:
        return ""
    done = sum(trial.result is not None for trial in run.tuning)
    trials = f"{tune['trials']} trials" if tune.get("trials") else "the same number of trials"
    what = {"lr": "learning rate"}.get(str(tune.get("parameter")), str(tune.get("parameter")))
    return (
        f"The {what} was searched for with {trials} for each method "
        f"({words.plural(done, 'trial')} on record), on data that the test does not use."
    )
