"""A matplotlib figure as SVG inside the page: no addresses, and no name that another figure has too."""

from __future__ import annotations

import io
import re

import matplotlib
from matplotlib.figure import Figure

from editing.study_report.markup import Content, Markup, element, joined, trusted

# Words stay words (they can be searched, read aloud, and take the page's fonts), and the same figure
# gives the same bytes.
_SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "broca"}
_PROLOGUE = re.compile(r"^.*?(?=<svg)", re.DOTALL)
_METADATA = re.compile(r"<metadata>.*?</metadata>", re.DOTALL)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_NAMESPACE = re.compile(r'\s+xmlns(:\w+)?="[^"]*"')
_SIZE = re.compile(r'^<svg([^>]*?)\swidth="([\d.]+)pt"([^>]*)>', re.DOTALL)
_HEIGHT = re.compile(r'\sheight="[\d.]+pt"')
_FONT = re.compile(r"(font(?:-family)?:[^;\"]*?)'[^;\"]*(?=[;\"])")
_NAME = re.compile(r'(\sid="|href="#|url\(#)')


def inline_svg(figure: Figure, name: str, says: str) -> Markup:
    """The figure as an ``<svg>`` element that shrinks with the page.

    Args:
        name: unlike any other figure's of the page; letters, digits and hyphens.
        says: what it shows, for those who do not see it.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context(_SETTINGS):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    for pattern in (_PROLOGUE, _METADATA, _COMMENT, _NAMESPACE):
        text = pattern.sub("", text)
    text = text.replace("xlink:href", "href")
    text = _NAME.sub(rf"\g<1>{name}-", text)
    text = _FONT.sub(r"\g<1>sans-serif", text)
    head, body = text.split(">", 1)
    width = float(_SIZE.match(head + ">").group(2)) if _SIZE.match(head + ">") else 480.0  # type: ignore[union-attr]
    head = _HEIGHT.sub("", re.sub(r'\swidth="[\d.]+pt"', "", head))
    label = element("x", aria_label=says)[2:].split(">", 1)[0]
    style = f' style="width:{width * 4 / 3:.0f}px"'
    return trusted(f'{head} role="img"{label}{style}>{body.strip()}')


def picture(caption: Content, drawn: Markup) -> Markup:
    """A drawing with its caption, in a box that scrolls where a screen is too narrow for it."""
    return element(
        "figure",
        element("figcaption", caption),
        element("div", joined((drawn,)), class_="scroll picture", tabindex=0, role="group"),
    )
