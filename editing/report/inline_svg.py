"""matplotlib figures as inline SVG: without URLs, and with ids that are unique in the page."""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import dataclass

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from editing.report.formats import clean

# Text stays text, so that it can be searched, read aloud and take the page's fonts; the same figure gives the same
# bytes.
_SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "broca"}
_WHOLE = re.compile(r'<svg[^>]*viewBox="([\d. ]+)"[^>]*>(.*)</svg>', re.DOTALL)
# A style sheet inside an inline SVG applies to the whole page.
_DROPPED = re.compile(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->|\s*\n(?=\s*<)", re.DOTALL)
_FONTS = re.compile(r"font-family: [^;\"]*|(font: [^;\"']*)'[^;\"]*")
_NAME = re.compile(r'(<[^<>]*\b(?:id="|href="#|clip-path="url\(#))')
_ELEMENT = Markup(
    '<svg viewBox="{}" role="img" aria-label="{}" style="width:{:.0f}px;min-width:{:.0f}px">{}</svg>'
)
_PIXELS_AN_INCH = 96
# Below this fraction of its size a figure is illegible: it scrolls instead of shrinking further.
_MIN_FRACTION = 0.62


@dataclass(frozen=True)
class Drawing:
    """A figure of the page.

    Attributes:
        caption: also the label for screen readers.
        svg: the ``<svg>`` element, which shrinks with the page.
    """

    caption: str
    svg: Markup


def drawn(figure: Figure, name: str, caption: str) -> Drawing:
    """The figure as an element of the page.

    Args:
        figure: the figure.
        name: letters, digits and hyphens; unique in the page.
        caption: of the figure.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
        # The reader's browser has the font, even if this machine does not.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    match = _WHOLE.search(buffer.getvalue())
    assert match is not None  # matplotlib always writes an svg element
    view, body = match.groups()
    body = _DROPPED.sub("", body).replace("xlink:href=", "href=")
    body = _FONTS.sub(lambda font: (font.group(1) or "font-family: ") + "sans-serif", body)
    body = _NAME.sub(rf"\g<1>{name}-", body)
    width = figure.get_figwidth() * _PIXELS_AN_INCH
    svg = _ELEMENT.format(view, caption, width, _MIN_FRACTION * width, Markup(body.strip()))
    return Drawing(caption, svg)


def label(text: str) -> str:
    """Text for matplotlib on one line, never read as a formula or hidden in a legend."""
    # matplotlib hides legend entries that begin with an underscore.
    words = " ".join(clean(text).split()).replace("$", r"\$")
    return f" {words}" if words.startswith("_") else words
