"""HTML elements from strings: everything is escaped that an element of ours did not make itself."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

# What HTML may not hold at all: control characters but tab and line ends, surrogates, noncharacters.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
_VOID = frozenset(("meta", "br", "col"))
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Markup(str):
    """A string that is HTML already, made by ``element`` or ``trusted``."""

    __slots__ = ()


Content = str | Markup


def clean(text: str) -> str:
    """Text without what no HTML or XML document may hold."""
    return _FORBIDDEN.sub(REPLACEMENT, text)


def escaped(text: str) -> Markup:
    """Text as HTML shows it, in an element or in a quoted attribute; Markup as it is."""
    if isinstance(text, Markup):
        return text
    return Markup(html.escape(clean(text), quote=True))


def trusted(text: str) -> Markup:
    """Text of the program's own that is HTML: never what came from a file."""
    return Markup(text)


def joined(parts: Iterable[Content], between: str = "") -> Markup:
    """One piece after another, each escaped unless it is Markup."""
    return Markup(between.join(escaped(part) for part in parts))


def element(tag: str, /, *children: Content, **attributes: str | int | None) -> Markup:
    """``<tag attributes>children</tag>``.

    Args:
        tag: of the element.
        children: its content; what is not Markup is escaped.
        attributes: in this order; ``class_`` is written as class and ``data_label`` as data-label, and
            one whose value is None is left out.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escaped(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if tag in _VOID:
        return Markup(f"<{tag}{written}>")
    return Markup(f"<{tag}{written}>{joined(children)}</{tag}>")


def paragraph(*children: Content, class_: str | None = None) -> Markup:
    return element("p", *children, class_=class_)
