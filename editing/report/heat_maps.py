"""A matrix as a heat map that can be read as numbers: a table with coloured cells and a scale beneath it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from editing.report.formats import number

# Ends of the scales, light enough for the dark text of their cells.
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


@dataclass(frozen=True)
class HeatMap:
    """A heat map.

    Attributes:
        caption: says what it shows.
        head: what the rows are, then a name a column.
        rows: name and cells.
        unit: of the values, for the scale.
        most: largest absolute value of the scale; None takes the cells' own.
        least: it is never below: differences that mean nothing are to look like nothing.
        signed: whether values below 0 have a colour of their own.
        form: of the scale's numbers.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    unit: str
    most: float | None = None
    least: float = 0.0
    signed: bool = True
    form: str = ".2f"

    @property
    def end(self) -> float:
        """The largest absolute value of the scale; 1 where nothing is coloured."""
        cells = (one for _, row in self.rows for one in row if not one.plain)
        own = max((abs(one.value) for one in cells if math.isfinite(one.value)), default=0.0) or 1.0
        return max(self.least, own if self.most is None else self.most)

    @property
    def ends(self) -> tuple[str, str]:
        """The numbers at the ends of the scale."""
        return number(-self.end, self.form) if self.signed else "0", number(self.end, self.form)

    def style(self, cell: Cell) -> str | None:
        """The attribute of a cell; None of one without colour."""
        shade = None if cell.plain else colour(cell.value, self.end, self.signed)
        return None if shade is None else f"background:{shade}"


def colour(value: float, most: float, signed: bool) -> str | None:
    """``#rrggbb`` of a value on a scale that ends at ``most``; None of what is not a number."""
    if math.isnan(value):
        return None
    share = max(-1.0, min(1.0, value / most))
    end = FULL if not signed else WARM if share > 0 else COOL
    weight = abs(share) if signed else max(0.0, share)
    mixed = (round(255 + (full - 255) * weight) for full in end)
    return "#" + "".join(f"{part:02x}" for part in mixed)
