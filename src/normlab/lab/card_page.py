"""The documentation's page of each method, made from its card.

Run as a program it writes all pages, and their index, anew::

    python -m normlab.lab.card_page docs/methods
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from normlab.catalog import METHODS
from normlab.lab.card_text import code_of, facts_of, option_line
from normlab.lab.claims import CLAIMS
from normlab.method import Card, Method

ROOMS = {
    "norms": "Normalise activations",
    "inits": "Start well",
    "weights": "Re-parametrise weights",
    "optim": "Change the step",
    "regularizers": "Regularise",
    "activations": "Choose the activation",
    "growth": "Grow",
}
"""What the methods of each room do, in the order of the index."""


def card_page(method: Method) -> str:
    """Return the page of one method as Markdown.

    Args:
        method: A method of the catalogue.

    Example:
        >>> from normlab.catalog import find_method
        >>> print(card_page(find_method("none")).splitlines()[0])
        # No normalisation (`none`)
    """
    card = method.card
    parts = [f"# {card.title} (`{card.name}`)", card.summary]
    if card.best_for:
        parts.append(f"**Best for.** {card.best_for}")
    if card.source is not None:
        parts.append(f"**Source.** {_source(card)}")
    parts.append(f"**In training.** {'; '.join(facts_of(card)).capitalize()}.")
    if card.state:
        parts.append(f"**A checkpoint holds**, beyond weights: {'; '.join(card.state)}.")
    parts.append(
        "## Use\n\n```\n"
        f"normlab compare --methods {'none' if card.name == 'batch-norm' else 'batch-norm'} "
        f"{card.name}\n"
        f"normlab show {card.name}\n```"
    )
    defaults = method.defaults()
    if defaults:
        rows = "\n".join(f"- `{option_line(name, value)}`" for name, value in defaults.items())
        first = option_line(*next(iter(defaults.items())))
        parts.append(f"## Options\n\nWith their defaults; write `{card.name}:{first}`.\n\n{rows}")
    for title, entries in (("Limits", card.limits), ("Departs from the paper", card.departures)):
        if entries:
            parts.append(f"## {title}\n\n" + "\n".join(f"- {entry}" for entry in entries))
    tested = [claim for claim in CLAIMS if card.name in claim.method.split("+")]
    if tested:
        rows = "\n".join(f"- `normlab reproduce {c.name}`: {c.statement}" for c in tested)
        ledger = "Verdicts, whichever way they went, stand in the [ledger](../ledger.md)."
        parts.append(f"## Claims put to the test\n\n{rows}\n\n{ledger}")
    home = code_of(method)
    parts.append(f"Code: [`{home}`](../../src/{home})")
    return "\n\n".join(parts) + "\n"


def index_page(methods: Iterable[Method]) -> str:
    """Return the page that lists all methods by what they do."""
    chosen = list(methods)
    parts = ["# Methods", "One page each, made from the method's card."]
    for room, title in ROOMS.items():
        rows = [
            f"- [`{m.card.name}`]({m.card.name}.md): {m.card.summary}"
            for m in chosen
            if m.card.room == room
        ]
        if rows:
            parts += [f"## {title}", "\n".join(rows)]
    return "\n\n".join(parts) + "\n"


def pages() -> dict[str, str]:
    """Return the text of every page by its file's name."""
    every = {f"{method.card.name}.md": card_page(method) for method in METHODS}
    return {"README.md": index_page(METHODS), **every}


def _source(card: Card) -> str:
    source = card.source
    assert source is not None
    text = f"{source.authors}, “{source.title}”, {source.year}"
    if source.venue:
        text += f", {source.venue}"
    if source.arxiv:
        text += f", [arXiv {source.arxiv}](https://arxiv.org/abs/{source.arxiv})"
    return f"{text}."


def main(folder: Path) -> None:
    """Write every page into a folder, and remove those of methods that are no more."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = pages()
    for old in folder.glob("*.md"):
        if old.name not in wanted:
            old.unlink()
    for name, text in wanted.items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
