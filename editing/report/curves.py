"""Dose curves, and what is reached against what it costs, drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from editing.report.inline_svg import Drawing, drawn, label

# Colours that stay apart for colour-blind eyes and in grey (Okabe and Ito), each with a mark of its own.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#56b4e9", "#000000")
MARKS = "osD^vPX"
# Inches: on a phone it fills the width with letters that can still be read.
SIZE = (5.0, 3.7)
OUTLYING = 6  # times the median cost


@dataclass(frozen=True)
class Point:
    """One setting: its group, what it costs, what it reaches, whether it was chosen, whether on the front."""

    group: str
    cost: float
    reach: float
    chosen: bool = False
    front: bool = False


@dataclass(frozen=True)
class Curve:
    """A language's dose curve: its own rise with an interval at each dose, and the others' mean rise."""

    name: str
    own: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    others: Sequence[float]


def trade_off(
    caption: str,
    points: Sequence[Point],
    ceiling: float,
    reach_label: str,
    cost_label: str,
    name: str,
) -> Drawing | None:
    """Reach over cost, a colour and mark a group, the best at each cost joined; None where no point has both numbers.

    Args:
        caption: says what it shows.
        points: settings; those with a number missing are left out.
        ceiling: drawn as a line; NaN is not.
        reach_label: of the vertical axis.
        cost_label: of the horizontal axis.
        name: of the figure in the page.
    """
    points = [one for one in points if math.isfinite(one.cost) and math.isfinite(one.reach)]
    if not points:
        return None
    ringed = any(one.front for one in points)
    groups = list(dict.fromkeys(one.group for one in points))
    figure = Figure(figsize=SIZE, layout="constrained")
    axis = figure.subplots()
    best = _envelope(points)
    axis.plot(*zip(*best, strict=True), color="0.55", linewidth=1.2, drawstyle="steps-post", zorder=1)
    for place, group in enumerate(groups):
        for one in (one for one in points if one.group == group):
            axis.plot(
                one.cost,
                one.reach,
                **look(place),
                linestyle="",
                markersize=11 if one.chosen else 6,
                markeredgecolor="black" if one.chosen or one.front else "white",
                markeredgewidth=1.6 if one.chosen else 0.8,
                alpha=1 if one.chosen or one.front or not ringed else 0.55,
                zorder=3 if one.chosen else 2,
                clip_on=False,
            )
    keys = [Line2D([], [], linestyle="", label=label(group), **look(i)) for i, group in enumerate(groups)]
    keys.append(Line2D([], [], color="0.55", linewidth=1.2, label="most reached at that cost"))
    if math.isfinite(ceiling):
        keys.append(
            axis.axhline(ceiling, color="0.3", linestyle="--", linewidth=1, label="ceiling", zorder=0)
        )
    plainly(axis)
    axis.set(
        xlabel=label(cost_label),
        ylabel=label(reach_label),
        ylim=(min(one.reach for one in points) - 0.05, 1.05),
    )
    usual = max(1e-3, _median([abs(one.cost) for one in points]))
    if max(one.cost for one in points) > OUTLYING * usual:
        # A few settings that break the model would press all others against the axis.
        axis.set_xscale("symlog", linthresh=usual)
    figure.legend(
        handles=keys, loc="outside upper center", ncols=min(3, len(keys)), frameon=False, fontsize=9
    )
    return drawn(figure, name, caption)


def doses_picture(
    caption: str, shares: Sequence[float], curves: Sequence[Curve], dose_label: str, name: str
) -> Drawing:
    """The curves of one neuron set, doses in percent.

    Args:
        caption: says what it shows.
        shares: the doses.
        curves: a language each.
        dose_label: of the horizontal axis, without its unit.
        name: of the figure in the page.
    """
    figure = Figure(figsize=SIZE, layout="constrained")
    axis = figure.subplots()
    doses = [100 * share for share in shares]
    for place, curve in enumerate(curves):
        colour = look(place)["color"]
        axis.plot(doses, curve.own, markersize=5, linewidth=1.6, label=label(curve.name), **look(place))
        axis.plot(doses, curve.others, color=colour, linewidth=1, linestyle="--")
        if all(map(math.isfinite, [*curve.low, *curve.high])):
            axis.fill_between(doses, curve.low, curve.high, color=colour, alpha=0.13, linewidth=0)
    axis.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    plainly(axis)
    axis.set(xlabel=f"{label(dose_label)}, %", ylabel="NLL rise, nats a token")
    if len(doses) > 1 and doses[-1] > 8 * doses[0] > 0:
        axis.set_xscale("log")
        axis.minorticks_off()
    axis.set_xticks(doses, [f"{dose:.4g}" for dose in doses])
    figure.legend(loc="outside upper center", ncols=min(7, max(1, len(curves))), frameon=False, fontsize=9)
    return drawn(figure, name, caption)


def _envelope(points: Sequence[Point]) -> list[tuple[float, float]]:
    """The most that is reached at each cost or less, from the least cost to the largest."""
    best: list[tuple[float, float]] = []
    for cost, reach in sorted((one.cost, one.reach) for one in points):
        best.append((cost, max(reach, best[-1][1]) if best else reach))
    return best


def look(place: int) -> dict[str, Any]:
    """Mark and colour of the group, or curve, of this number."""
    return {"marker": MARKS[place % len(MARKS)], "color": COLOURS[place % len(COLOURS)]}


def plainly(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="0.9", linewidth=0.7)
    axis.set_axisbelow(True)


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]
