"""Dose-response figure: the harm of each method over its target-language rate, at fractions of its strength."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from editing.evaluation.outcome import Outcome
from editing.methods.keyed_edit import KEYED
from editing.report.curves import COLOURS, tidy
from editing.report.inline_svg import label
from editing.study.dose_response import harm
from neurons.neuron_sets.pictures import TITLE, title_of

WIDE, HIGH = 8.6, 4.6  # inches
ROW = 0.165  # inches, of the legend
MAX_TITLE = 34  # letters of a method's title in the legend
# Nats a token.  The axis is linear below, where harmless methods lie, some of them below zero.  It is logarithmic
# above, so that one destructive method leaves room for the others.
LINEAR = 0.01
_TICKS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
_COLOURS = COLOURS[:-1]  # black is the keyed edit's
_MARKS = "sD^vPX<"  # with six colours: the first repetition is the 43rd method
_KEYED_MARK = "o"


def is_measured(outcome: Outcome, source: str, target: str) -> bool:
    """Whether the rate and the rises that define the harm are there and finite."""
    rises = [rise for k, rise in outcome.nll_rise.items() if k not in (source, target)]
    return bool(rises) and all(map(math.isfinite, [outcome.target_share, *rises]))


def dose_figure(
    curves: Mapping[str, Sequence[Outcome]], source: str, target: str, ceiling: float, base_rate: float
) -> Figure:
    """Harm (``editing.study.dose_response``) over the target-language rate, one line for each method.

    Solid: permanent edits; dashed: hooks and prompts.  Marks are filled at full strength, hollow at fractions of it.
    Outcomes without a finite rate and harm are left out.

    Args:
        curves: title -> outcomes at fractions of the strength, ascending, each with ``details["dose"]`` and
            ``details["permanent"]``.
        source: language that is steered from.
        target: language that is steered to.
        ceiling: the unedited model's rate on target prompts; NaN is not drawn.
        base_rate: the unedited model's rate on source prompts; NaN is not drawn.
    """
    drawn = {
        title: kept
        for title, outcomes in curves.items()
        if (kept := [outcome for outcome in outcomes if is_measured(outcome, source, target)])
    }
    styles = _styles(drawn)
    # The legend also has two headings and the meanings of marks and lines.
    figure = Figure(figsize=(WIDE, max(HIGH, 0.6 + ROW * (len(drawn) + 7))), layout="constrained")
    axis = figure.subplots()
    axis.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    keys = []
    for title, outcomes in drawn.items():
        style = styles[title]
        points = [(outcome.target_share, harm(outcome, source, target)) for outcome in outcomes]
        axis.plot(*zip(*points, strict=True), markerfacecolor="white", clip_on=False, **style)
        for point, outcome in zip(points, outcomes, strict=True):
            if outcome.details["dose"] == 1:
                axis.plot(
                    *point, clip_on=False, **{**style, "linestyle": "", "zorder": style["zorder"] + 0.5}
                )
        keys.append((_is_permanent(outcomes), Line2D([], [], label=_short(title), **style)))
    meanings = [_mark("white", "part of the strength"), _mark("0.4", "the whole strength")]
    if math.isfinite(ceiling):
        meanings.append(
            axis.axvline(ceiling, color="0.3", linestyle=":", linewidth=1.2, label="ceiling", zorder=0)
        )
    if math.isfinite(base_rate):
        meanings += axis.plot(
            base_rate, 0, "*", color="0.4", markersize=11, label="unedited model", clip_on=False, zorder=1
        )
    _scale(axis)
    axis.set(
        xlabel=label(f"share of answers in {target}"),
        ylabel=f"largest NLL rise of a third language,\nnats a token (logarithmic above {LINEAR:g})",
        xlim=(-0.02, 1.02),
    )
    what = label(f"what steering {source} to {target} costs, at parts of each way's strength")
    axis.set_title(title_of(what, {}, (), WIDE - 3), fontsize=TITLE)
    groups = [
        (heading, [key for permanent, key in keys if permanent is of_group])
        for heading, of_group in (("permanent edits", True), ("hooks and prompts", False))
    ]
    handles = [handle for heading, group in groups if group for handle in (_heading(heading), *group)]
    legend = figure.legend(
        handles=[*handles, _heading(""), *meanings],
        loc="outside right upper",
        frameon=False,
        fontsize=8,
        handlelength=3,
    )
    for text in legend.get_texts():
        if text.get_text() in [heading for heading, _ in groups]:
            text.set_fontweight("bold")
    return figure


def _styles(drawn: Mapping[str, Sequence[Outcome]]) -> dict[str, dict[str, Any]]:
    """Title -> style of its line: the keyed edit is the thickest, in black, over the others."""
    others = [title for title in drawn if title != KEYED]
    styles: dict[str, dict[str, Any]] = {
        title: {
            "color": _COLOURS[index % len(_COLOURS)],
            "marker": _MARKS[index % len(_MARKS)],
            "markersize": 5.5,
            "linewidth": 1.3,
            "zorder": 2,
        }
        for index, title in enumerate(others)
    }
    if KEYED in drawn:
        black = COLOURS[-1]
        styles[KEYED] = {"color": black, "marker": _KEYED_MARK, "markersize": 7, "linewidth": 3, "zorder": 4}
    for title, style in styles.items():
        style["linestyle"] = "-" if _is_permanent(drawn[title]) else (0, (4, 2))
    return styles


def _is_permanent(outcomes: Sequence[Outcome]) -> bool:
    return bool(outcomes[-1].details.get("permanent"))


def _short(title: str) -> str:
    return label(title if len(title) <= MAX_TITLE else title[: MAX_TITLE - 1] + "\N{HORIZONTAL ELLIPSIS}")


def _heading(text: str) -> Line2D:
    return Line2D([], [], linestyle="", label=text)


def _mark(face: str, text: str) -> Line2D:
    return Line2D(
        [], [], linestyle="", marker=_KEYED_MARK, color="0.4", markerfacecolor=face, markersize=6, label=text
    )


def _scale(axis: Any) -> None:
    axis.set_yscale("symlog", linthresh=LINEAR, linscale=1)
    axis.margins(y=0.06)
    axis.yaxis.set_major_locator(FixedLocator([*(-tick for tick in reversed(_TICKS)), 0, *_TICKS]))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:g}".replace("-", "\N{MINUS SIGN}"))
    )
    tidy(axis)
