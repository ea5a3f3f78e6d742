"""How each method is drawn: the same in every report, and never by colour alone.

The eight colours are Okabe and Ito's hues, shifted until every pair stays apart for the three
kinds of colour blindness (by simulation, in the light and the dark form) and every one stands
out from the page; a test holds them to that. A method's place in the catalogue picks its colour,
unless another method of the page has it; after eight methods the colours come round again with
another dash and another marker.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

LIGHT = (
    "#251f3c",
    "#174dc0",
    "#a83210",
    "#117f50",
    "#af4d8a",
    "#389af0",
    "#ba8c0e",
    "#6c0712",
)
DARK = (
    "#f2fff3",
    "#497de7",
    "#e85b48",
    "#35cd96",
    "#cf59a5",
    "#a7c9fb",
    "#ecae1b",
    "#ecd979",
)
LIGHT_PAGE, DARK_PAGE = "#ffffff", "#16181b"

DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
MARKERS = (
    "circle",
    "square",
    "diamond",
    "triangle-up",
    "triangle-down",
    "cross",
    "x",
    "star",
)
_PLACES = len(LIGHT) * len(DASHES)


@dataclass(frozen=True)
class Style:
    """The look of one method.

    Attributes:
        light: Its colour on a light page.
        dark: Its colour on a dark page.
        dash: Its line, in plotly's spelling.
        marker: Its marker, in plotly's spelling.
    """

    light: str
    dark: str
    dash: str
    marker: str


def styles(cards: Mapping[str, Mapping[str, Any]]) -> dict[str, Style]:
    """Return the style of each method of one page.

    A plain method stands at its card's ``order``; a composite, a variant with options or a method
    outside the catalogue at a hash of its label. Of two methods with one colour on the same page
    the one with the lower order keeps it, among equals the one whose label sorts first; the other
    gets the next free colour, or with none left the next free dash.

    Args:
        cards: Label to card.

    Returns:
        Label to style, in the order given.

    Example:
        >>> styles({"batch-norm": {"name": "batch-norm", "order": 0}})["batch-norm"].dash
        'solid'
    """

    def key(label: str) -> tuple[bool, int, str]:
        order = _order(label, cards[label])
        return order is None, order or 0, label

    places: dict[str, int] = {}
    for label in sorted(cards, key=key):
        order = _order(label, cards[label])
        first = (_hash(label) if order is None else order) % _PLACES
        taken = set(places.values())
        used = {place % len(LIGHT) for place in taken}
        # The next colours with the same dash; then, eight further each, the next dashes of each.
        row, slot = divmod(first, len(LIGHT))
        fresh = (row * len(LIGHT) + (slot + step) % len(LIGHT) for step in range(len(LIGHT)))
        dashes = (
            (first + step * len(LIGHT) + step // len(DASHES)) % _PLACES for step in range(_PLACES)
        )
        candidates = chain(
            (place for place in fresh if place % len(LIGHT) not in used),
            (place for place in dashes if place not in taken),
        )
        # With more methods on a page than there are places, two must look alike.
        places[label] = next(candidates, first)
    return {label: _style(places[label]) for label in cards}


def _order(label: str, card: Mapping[str, Any]) -> int | None:
    order = card.get("order", -1)
    plain = card.get("name", label) == label
    return order if plain and isinstance(order, int) and order >= 0 else None


def _hash(label: str) -> int:
    return int.from_bytes(hashlib.sha256(label.encode()).digest()[:4], "big")


def _style(place: int) -> Style:
    slot, round_ = place % len(LIGHT), place // len(LIGHT)
    return Style(
        light=LIGHT[slot],
        dark=DARK[slot],
        dash=DASHES[round_ % len(DASHES)],
        marker=MARKERS[(slot + round_) % len(MARKERS)],
    )
