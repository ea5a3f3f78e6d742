"""Numbers as a reader wants to see them. Missing numbers are an en dash."""

from __future__ import annotations

import math

NOTHING = "–"
_THIN = "\u202f"  # a narrow space that does not break
_MINUS = "−"


def percent(fraction: float | None, digits: int = 1) -> str:
    """Return a fraction as per cent: ``97.9 %``."""
    return NOTHING if fraction is None else f"{_number(100 * fraction, digits)}{_THIN}%"


def points(fraction: float, digits: int = 1, sign: bool = False) -> str:
    """Return a difference of fractions in percentage points, without the unit: ``−0.4``."""
    text = _number(100 * fraction, digits)
    return f"+{text}" if sign and fraction > 0 and text.strip("0.,") else text


def plural(count: int, noun: str, nouns: str | None = None) -> str:
    """Return ``1 seed``, ``3 seeds``."""
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"


def listing(names: list[str]) -> str:
    """Return ``a, b and c``."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def number(value: float | None) -> str:
    """Return a number with three digits or more: ``5,120``, ``77.4``, ``0.052``."""
    if value is None:
        return NOTHING
    if value == 0 or abs(value) >= 100:
        return _sign(f"{value:,.0f}")
    digits = 2 - math.floor(math.log10(abs(value)))
    return _number(value, min(digits, 6)) if abs(value) >= 1e-4 else _sign(f"{value:.1e}")


def width(value: float) -> str:
    """Return half the width of an interval, with two digits: ``0.016``."""
    return number(value) if value >= 10 else f"{value:.2g}"


def duration(seconds: float | None, digits: int = 3) -> str:
    """Return a time: ``3.1 s``, ``12 min 5 s``, ``2 h 10 min``."""
    if seconds is None:
        return NOTHING
    if seconds < 99.5:
        return f"{number(seconds) if digits > 2 else width(seconds)}{_THIN}s"
    whole = round(seconds)
    if whole < 6000:
        return f"{whole // 60}{_THIN}min {whole % 60}{_THIN}s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,}{_THIN}h {minutes % 60}{_THIN}min"


def size(count: float | None) -> str:
    """Return a number of bytes: ``12.4 MiB``."""
    if count is None:
        return NOTHING
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{number(count)}{_THIN}{unit}"
        count /= 1024
    return f"{number(count)}{_THIN}GiB"


def magnitude(count: float | None) -> str:
    """Return a large count: ``77.0 k``, ``23.5 M``."""
    if count is None:
        return NOTHING
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale and count >= 1e4:
            return f"{number(count / scale)}{_THIN}{unit}"
    return f"{count:,.0f}"


def p_value(value: float | None) -> str:
    """Return a p-value with two digits: ``0.21``, ``0.0042``, ``< 0.0001``."""
    if value is None:
        return NOTHING
    if value < 1e-4:
        return "<" + _THIN + "0.0001"
    return f"{value:.2f}" if value >= 0.0995 else f"{value:.2g}"


def rate(value: float) -> str:
    """Return a learning rate as it would be typed."""
    return f"{value:.4g}"


def _number(value: float, digits: int) -> str:
    return _sign(f"{value:,.{digits}f}")


def _sign(text: str) -> str:
    # "-0.0" is a rounding of nothing; it has no sign.
    if text.startswith("-"):
        return text[1:] if not text.strip("-0.,") else _MINUS + text[1:]
    return text
