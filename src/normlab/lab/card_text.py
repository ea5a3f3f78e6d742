"""A method's card as plain text, for ``normlab show``."""

from __future__ import annotations

import textwrap

from normlab.method import Method

_BATCH_OF_ONE = {
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
    facts = [
        _BATCH_OF_ONE[card.batch_of_one],
        "uses statistics of the batch" if card.batch_statistics else "each sample stands alone",
        "evaluates otherwise than it trains" if card.eval_differs else "the same in evaluation",
    ]
    lines += [_wrap(f"In training: {'; '.join(facts)}.", width)]
    defaults = method.defaults()
    if defaults:
        lines += ["", "Options (name=default):"]
        lines += [f"  {name}={default}" for name, default in defaults.items()]
    for title, entries in (("Limits", card.limits), ("Departs from the paper", card.departures)):
        if entries:
            lines += ["", f"{title}:"]
            lines += [_wrap(f"- {entry}", width, indent="  ") for entry in entries]
    lines += ["", f"Code: normlab/{card.room}/{card.name.replace('-', '_')}.py"]
    return "\n".join(lines)


def _wrap(text: str, width: int, indent: str = "") -> str:
    return textwrap.fill(
        text, width, initial_indent=indent, subsequent_indent=indent and indent + "  "
    )
