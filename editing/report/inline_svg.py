"""A matplotlib figure as SVG inside the page: no addresses, and no name that another figure has too."""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import dataclass

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from editing.report.formats import clean

# Words stay words (they can be searched, read aloud, and take the page's fonts), and the same figure
# gives the same bytes.
_SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "broca"}
_WHOLE = re.compile(r'<svg[^>]*viewBox="([\d. ]+)"[^>]*>(.*)</svg>', re.DOTALL)
# A style sheet inside an inline SVG would be the whole page's.
_DROPPED = re.compile(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->|\s*\n(?=\s*<)", re.DOTALL)
_FONTS = re.compile(r"font-family: [^;\"]*|(font: [^;\"']*)'[^;\"]*")
_NAME = re.compile(r'(<[^<>]*\b(?:id="|href="#|clip-path="url\(#))')
_ELEMENT = Markup(
    '<svg viewBox="{}" role="img" aria-label="{}" style="width:{:.0f}px;min-width:{:.0f}px">{}</svg>'
)
_PIXELS_AN_INCH = 96
# Smaller than this share of its size, a figure's letters cannot be read: it scrolls instead.
_SMALLEST = 0.62


@dataclass(frozen=True)
class Drawing:
    """A figure of the page.

    Attributes:
        caption: says what it shows, also to those who do not see it.
        svg: the ``<svg>`` element, which shrinks with the page.
    """

    caption: str
    svg: Markup


def drawn(figure: Figure, name: str, caption: str) -> Drawing:
    """The figure as the page shows it.

    Args:
        name: unlike any other figure's of the page; letters, digits and hyphens.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
        # Whoever reads the page has the fonts of their language; that this machine lacks one is no matter.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    found = _WHOLE.search(buffer.getvalue())
    assert found is not None  # matplotlib always writes one
    view, body = found.groups()
    body = _DROPPED.sub("", body).replace("xlink:href=", "href=")
    body = _FONTS.sub(lambda font: (font.group(1) or "font-family: ") + "sans-serif", body)
    body = _NAME.sub(rf"\g<1>{name}-", body)
    width = figure.get_figwidth() * _PIXELS_AN_INCH
    svg = _ELEMENT.format(view, caption, width, _SMALLEST * width, Markup(body.strip()))
    return Drawing(caption, svg)


def label(text: str) -> str:
    """Words from a file as matplotlib shows them: never a formula, and never left out of a legend."""
    # A leading underscore hides a legend's entry.
    words = " ".join(clean(text).split()).replace("$", r"\$")
    return f" {words}" if words.startswith("_") else words
