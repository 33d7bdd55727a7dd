"""Drawings: dose-response curves, and the trade-off between target-language rate and cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from editing.report.inline_svg import Drawing, drawn, label

# Colours that colour-blind readers can distinguish, also in grey (Okabe and Ito), each with its own mark.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#56b4e9", "#000000")
MARKS = "osD^vPX"
# Inches: legible at the width of a phone.
SIZE = (5.0, 3.7)
OUTLYING = 6  # times the median cost


@dataclass(frozen=True)
class Point:
    """One setting in a trade-off.

    Attributes:
        group: its method.
        cost: harm or fluency gap, nats.
        rate: target-language rate.
        chosen: whether it was chosen.
        front: whether it is on the Pareto front.
    """

    group: str
    cost: float
    rate: float
    chosen: bool = False
    front: bool = False


@dataclass(frozen=True)
class Curve:
    """The dose-response curve of an ablated language.

    Attributes:
        name: of the language.
        rise: NLL rise of the language at each dose.
        low, high: ends of the interval of each rise.
        others: mean rise of the other languages at each dose.
    """

    name: str
    rise: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    others: Sequence[float]


def trade_off(
    caption: str,
    points: Sequence[Point],
    ceiling: float,
    rate_label: str,
    cost_label: str,
    name: str,
) -> Drawing | None:
    """Rate over cost, with a colour and mark for each group and a line through the best rate at each cost.

    Args:
        caption: of the drawing.
        points: settings; those without finite values are left out.
        ceiling: drawn as a line unless NaN.
        rate_label: of the vertical axis.
        cost_label: of the horizontal axis.
        name: of the drawing, unique in the page.

    Returns:
        None if no point has finite values.
    """
    points = [point for point in points if math.isfinite(point.cost) and math.isfinite(point.rate)]
    if not points:
        return None
    has_front = any(point.front for point in points)
    groups = list(dict.fromkeys(point.group for point in points))
    figure = Figure(figsize=SIZE, layout="constrained")
    axis = figure.subplots()
    best = _envelope(points)
    axis.plot(*zip(*best, strict=True), color="0.55", linewidth=1.2, drawstyle="steps-post", zorder=1)
    for index, group in enumerate(groups):
        for point in (point for point in points if point.group == group):
            axis.plot(
                point.cost,
                point.rate,
                **style(index),
                linestyle="",
                markersize=11 if point.chosen else 6,
                markeredgecolor="black" if point.chosen or point.front else "white",
                markeredgewidth=1.6 if point.chosen else 0.8,
                alpha=1 if point.chosen or point.front or not has_front else 0.55,
                zorder=3 if point.chosen else 2,
                clip_on=False,
            )
    keys = [Line2D([], [], linestyle="", label=label(group), **style(i)) for i, group in enumerate(groups)]
    keys.append(Line2D([], [], color="0.55", linewidth=1.2, label="most reached at that cost"))
    if math.isfinite(ceiling):
        keys.append(
            axis.axhline(ceiling, color="0.3", linestyle="--", linewidth=1, label="ceiling", zorder=0)
        )
    tidy(axis)
    axis.set(
        xlabel=label(cost_label),
        ylabel=label(rate_label),
        ylim=(min(point.rate for point in points) - 0.05, 1.05),
    )
    median = max(1e-3, _median([abs(point.cost) for point in points]))
    if max(point.cost for point in points) > OUTLYING * median:
        # A few destructive settings would compress all others at the axis.
        axis.set_xscale("symlog", linthresh=median)
    figure.legend(
        handles=keys, loc="outside upper center", ncols=min(3, len(keys)), frameon=False, fontsize=9
    )
    return drawn(figure, name, caption)


def dose_response_drawing(
    caption: str, fractions: Sequence[float], curves: Sequence[Curve], dose_label: str, name: str
) -> Drawing:
    """The dose-response curves of one neuron set, doses in percent.

    Args:
        caption: of the drawing.
        fractions: the doses.
        curves: one for each language.
        dose_label: of the horizontal axis, without its unit.
        name: of the drawing, unique in the page.
    """
    figure = Figure(figsize=SIZE, layout="constrained")
    axis = figure.subplots()
    doses = [100 * fraction for fraction in fractions]
    for index, curve in enumerate(curves):
        colour = style(index)["color"]
        axis.plot(doses, curve.rise, markersize=5, linewidth=1.6, label=label(curve.name), **style(index))
        axis.plot(doses, curve.others, color=colour, linewidth=1, linestyle="--")
        if all(map(math.isfinite, [*curve.low, *curve.high])):
            axis.fill_between(doses, curve.low, curve.high, color=colour, alpha=0.13, linewidth=0)
    axis.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    tidy(axis)
    axis.set(xlabel=f"{label(dose_label)}, %", ylabel="NLL rise, nats a token")
    if len(doses) > 1 and doses[-1] > 8 * doses[0] > 0:
        axis.set_xscale("log")
        axis.minorticks_off()
    axis.set_xticks(doses, [f"{dose:.4g}" for dose in doses])
    figure.legend(loc="outside upper center", ncols=min(7, max(1, len(curves))), frameon=False, fontsize=9)
    return drawn(figure, name, caption)


def _envelope(points: Sequence[Point]) -> list[tuple[float, float]]:
    """The best rate at each cost or less, in ascending order of cost."""
    best: list[tuple[float, float]] = []
    for cost, rate in sorted((point.cost, point.rate) for point in points):
        best.append((cost, max(rate, best[-1][1]) if best else rate))
    return best


def style(index: int) -> dict[str, Any]:
    """Mark and colour of a group or curve."""
    return {"marker": MARKS[index % len(MARKS)], "color": COLOURS[index % len(COLOURS)]}


def tidy(axis: Any) -> None:
    """Remove the upper and right spines and draw a light grid."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="0.9", linewidth=0.7)
    axis.set_axisbelow(True)


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]
