"""A method's card as plain text, for ``normlab show``."""

from __future__ import annotations

import textwrap
from functools import partial

from normlab.method import Card, Method

_BATCH_OF_ONE = {
    "as the model": "trains on a single sample where the model does",
    "trains": "trains on a single sample",
    "needs space": "trains on a single sample only where it has several positions",
    "refuses": "does not train on a single sample",
}


def card_text(method: Method, width: int = 88) -> str:
    """Return the card of one method as text.

    Args:
        method: The method.
        width: The longest line, in characters.

    Returns:
        Several lines: what it does, its source, its options, its limits, its departures.
    """
    card = method.card
    lines = [f"{card.name}: {card.title}", "", _wrap(card.summary, width)]
    if card.best_for:
        lines += [_wrap(f"Best for: {card.best_for}", width)]
    if card.source is not None:
        source = card.source
        place = ", ".join(
            part for part in (source.venue, source.arxiv and f"arXiv {source.arxiv}") if part
        )
        text = f"Source: {source.authors}, “{source.title}”, {source.year}"
        lines += [_wrap(f"{text}, {place}." if place else f"{text}.", width)]
    lines += [_wrap(f"In training: {'; '.join(facts_of(card))}.", width)]
    defaults = method.defaults()
    if defaults:
        lines += ["", "Options (name=default):"]
        lines += [f"  {option_line(name, default)}" for name, default in defaults.items()]
    for title, entries in (("Limits", card.limits), ("Departs from the paper", card.departures)):
        if entries:
            lines += ["", f"{title}:"]
            lines += [_wrap(f"- {entry}", width, indent="  ") for entry in entries]
    lines += ["", f"Code: {code_of(method)}"]
    return "\n".join(lines)


def facts_of(card: Card) -> list[str]:
    """Return what a card says about training, in a few words each."""
    facts = [_BATCH_OF_ONE[card.batch_of_one]]
    own = card.batch_of_one != "as the model"  # otherwise the model's layers decide
    if card.batch_statistics:
        facts.append("uses statistics of the batch")
    elif own:
        facts.append("each sample stands alone")
    if card.eval_differs:
        facts.append("evaluates otherwise than it trains")
    elif own:
        facts.append("the same in evaluation")
    if card.needs_closure:
        facts.append("a step takes more than one pass")
    return facts


def option_line(name: str, default: object) -> str:
    """Return an option with its default as one types it."""
    return f"{name}={default}"


def code_of(method: Method) -> str:
    """Return the path of the file that holds a method, from the package on."""
    for part in (method.prepare, method.attach, method.optimizer, method.batch, method.penalty):
        function = part.func if isinstance(part, partial) else part
        if function.__module__ != Method.__module__:
            return function.__module__.replace(".", "/") + ".py"
    card = method.card
    return f"normlab/{card.room}/{card.name.replace('-', '_')}.py"


def _wrap(text: str, width: int, indent: str = "") -> str:
    return textwrap.fill(
        text, width, initial_indent=indent, subsequent_indent=indent and indent + "  "
    )
