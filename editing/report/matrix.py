"""A matrix as a heat map that can be read as numbers: a table with coloured cells and a scale beneath it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from editing.report.formats import number
from editing.report.markup import Content, Markup, element
from editing.report.tables import boxed, row_name

# Ends of the scales, light enough for the page's dark text.
WARM, COOL, FULL = (239, 138, 98), (103, 169, 207), (116, 173, 209)


@dataclass(frozen=True)
class Cell:
    """One entry.

    Attributes:
        value: that the colour shows; NaN has none.
        text: that is read.
        small: beneath the text, in small type: an interval.
        strong: whether it is set off.
        plain: left without colour, because it is not comparable with the others.
    """

    value: float
    text: str
    small: str = ""
    strong: bool = False
    plain: bool = False


def heat_map(
    caption: Content,
    corner: str,
    columns: Sequence[Content],
    rows: Sequence[tuple[Content, Sequence[Cell]]],
    unit: str,
    most: float | None = None,
    least: float = 0.0,
    signed: bool = True,
    form: str = ".2f",
    beside: Sequence[Content] = (),
    beside_rows: Sequence[Sequence[Content]] = (),
) -> Markup:
    """A heat map.

    Args:
        caption: says what it shows.
        corner: names what the rows are.
        columns: a name each.
        rows: name and cells.
        unit: of the values, for the scale.
        most: largest absolute value of the scale; None takes the cells' own.
        least: it is never below: differences that mean nothing are to look like nothing.
        signed: whether values below 0 have a colour of their own.
        form: of the scale's numbers.
        beside: heads of further columns without colour.
        beside_rows: their cells, for each row.
    """
    most = max(least, scale_end(rows) if most is None else most)
    head = element(
        "tr",
        element("th", corner, scope="col"),
        *(element("th", name, scope="col", class_="n") for name in columns),
        *(element("th", name, scope="col", class_="n") for name in beside),
    )
    body = []
    for place, (name, cells) in enumerate(rows):
        extra = beside_rows[place] if beside_rows else ()
        body.append(
            element(
                "tr",
                row_name(name),
                *(_cell(one, most, signed) for one in cells),
                *(element("td", value, class_="n") for value in extra),
            )
        )
    return boxed(
        caption,
        element("thead", head),
        element("tbody", *body),
        class_="heat",
        below=scale(most, unit, signed, form),
    )


def scale_end(rows: Sequence[tuple[Content, Sequence[Cell]]]) -> float:
    """The largest absolute value that is coloured; 1 where nothing is."""
    values = [
        abs(one.value) for _, cells in rows for one in cells if math.isfinite(one.value) and not one.plain
    ]
    return max(values, default=0.0) or 1.0


def colour(value: float, most: float, signed: bool) -> str | None:
    """``#rrggbb`` of a value on a scale that ends at ``most``; None of what is not a number."""
    if math.isnan(value):
        return None
    share = max(-1.0, min(1.0, value / most))
    end = FULL if not signed else WARM if share > 0 else COOL
    weight = abs(share) if signed else max(0.0, share)
    mixed = (round(255 + (full - 255) * weight) for full in end)
    return "#" + "".join(f"{part:02x}" for part in mixed)


def scale(most: float, unit: str, signed: bool, form: str) -> Markup:
    """The colours with the numbers at their ends."""
    low = number(-most, form) if signed else "0"
    return element(
        "p",
        element("span", low),
        element("span", class_="ramp signed" if signed else "ramp", role="img", aria_label="colour scale"),
        element("span", number(most, form)),
        element("span", unit, class_="unit"),
        class_="scale",
    )


def _cell(one: Cell, most: float, signed: bool) -> Markup:
    shade = None if one.plain else colour(one.value, most, signed)
    text: Content = element("strong", one.text) if one.strong else one.text
    parts: list[Content] = [text]
    if one.small:
        parts.append(element("small", one.small))
    return element("td", *parts, class_="n", style=f"background:{shade}" if shade else None)
