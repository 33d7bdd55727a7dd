"""Heat maps: tables of numbers with coloured cells and a scale below."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from editing.report.formats import number

# Ends of the scales, light enough for dark text.
WARM, COOL, FULL = (239, 138, 98), (103, 169, 207), (116, 173, 209)


@dataclass(frozen=True)
class Cell:
    """One entry.

    Attributes:
        value: decides the colour; NaN has none.
        text: of the cell.
        small: an interval, in small type below the text.
        strong: whether the text is bold.
        plain: whether the cell has no colour, because its value does not compare with the others.
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
        caption: of the table.
        head: title of the rows, then one title for each column.
        rows: name and cells of each.
        unit: of the values, for the scale.
        scale: largest absolute value of the scale; None takes that of the cells.
        min_scale: minimum of ``scale``, so that insignificant differences get no strong colour.
        signed: whether values below 0 have another colour.
        form: format of the scale's numbers.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    unit: str
    scale: float | None = None
    min_scale: float = 0.0
    signed: bool = True
    form: str = ".2f"

    @property
    def end(self) -> float:
        """The largest absolute value of the scale; 1 if no cell is coloured."""
        values = [cell.value for _, row in self.rows for cell in row if not cell.plain]
        largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0) or 1.0
        return max(self.min_scale, largest if self.scale is None else self.scale)

    @property
    def ends(self) -> tuple[str, str]:
        """The numbers at the ends of the scale."""
        return number(-self.end, self.form) if self.signed else "0", number(self.end, self.form)

    def style(self, cell: Cell) -> str | None:
        """The style attribute of a cell; None without colour."""
        shade = None if cell.plain else colour(cell.value, self.end, self.signed)
        return None if shade is None else f"background:{shade}"


def colour(value: float, end: float, signed: bool) -> str | None:
    """``#rrggbb`` of a value on a scale from 0 (white) to ``end``; None for NaN."""
    if math.isnan(value):
        return None
    fraction = max(-1.0, min(1.0, value / end))
    full = FULL if not signed else WARM if fraction > 0 else COOL
    weight = abs(fraction) if signed else max(0.0, fraction)
    mixed = (round(255 + (channel - 255) * weight) for channel in full)
    return "#" + "".join(f"{channel:02x}" for channel in mixed)
