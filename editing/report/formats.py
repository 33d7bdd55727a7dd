"""Formats of numbers and words in the page."""

from __future__ import annotations

import math
import re
from typing import Any

from markupsafe import Markup

NOTHING = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
SHOWN_OF_DIGEST = 12
MAX_UNBROKEN = 18  # letters of a word in a row's header before it may break
_DIGEST = re.compile("[0-9a-f]{32,}")
# Characters that HTML forbids: control characters but tab and line ends, surrogates, noncharacters.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


def clean(text: str) -> str:
    """Text with the characters that HTML and XML forbid replaced."""
    return _FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)


def number(value: float | None, form: str) -> str:
    """A number in a format such as ``+.2f``: a minus sign for the hyphen, no sign before zero, a dash for None or NaN."""
    if value is None or math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return "\N{INFINITY}" if value > 0 else MINUS + "\N{INFINITY}"
    written = format(value, form)
    if not any(digit in written for digit in "123456789"):
        written = written.lstrip("+-")
    return written.replace("-", MINUS, 1) if written.startswith("-") else written


def count(value: int | None) -> str:
    """A count with separators of thousands; a dash for None."""
    return NOTHING if value is None else f"{value:,}"


def span(sizes: tuple[int, ...]) -> str:
    """The count, or the smallest and the largest if they differ."""
    if not sizes:
        return NOTHING
    low, high = min(sizes), max(sizes)
    return count(low) if low == high else f"{count(low)} to {count(high)}"


def plain(value: Any) -> str:
    """A JSON value of a settings table as short words."""
    if value is None or value == "":
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value, ".4g")
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        if len(value) > 2 and all(type(item) is int for item in value):
            low, high = value[0], value[-1]
            if list(value) == list(range(low, high + 1)):
                return f"{low} to {high}"
        return ", ".join(map(plain, value)) or "none"
    text = str(value)
    # The beginning identifies a digest; all of it would fill a line.
    return f"{text[:SHOWN_OF_DIGEST]}\N{HORIZONTAL ELLIPSIS}" if _DIGEST.fullmatch(text) else text


def breakable(text: object) -> Markup:
    """Text whose long words may break: a row's header stays visible while the row scrolls."""
    words = (
        Markup("<wbr>").join(word[i : i + MAX_UNBROKEN] for i in range(0, len(word), MAX_UNBROKEN))
        for word in str(text).split(" ")
    )
    return Markup(" ").join(words)
