"""A picture of steering at parts of its strength: what each way costs at the share of answers that it reaches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from editing.evaluation.outcome import Outcome
from editing.methods.keyed_edit import KEYED
from editing.report.curves import COLOURS, plainly
from editing.report.inline_svg import label
from editing.study.doses import harm
from neurons.neuron_sets.pictures import TITLE, title_of

WIDE, HIGH = 8.6, 4.6  # inches
ROW = 0.165  # inches, of the legend
LONGEST = 34  # letters of a way's name in the legend
# Nats a token.  Below, the axis is linear: there the ways that spare other languages lie, and below zero
# some; above, logarithmic, so that one that breaks the model leaves room for the others.
LINEAR = 0.01
_STEPS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
_OTHERS = COLOURS[:-1]  # the last is black, which is the keyed edit's
_MARKS = "sD^vPX<"  # seven beside six colours: only the 43rd way would look like another
_OWN = "o"


def is_measured(outcome: Outcome, source: str, target: str) -> bool:
    """Whether its share and all rises that its harm is the largest of are numbers."""
    rises = [rise for k, rise in outcome.nll_rise.items() if k not in (source, target)]
    return all(map(math.isfinite, [outcome.target_share, *rises]))


def dose_figure(
    curves: Mapping[str, Sequence[Outcome]], source: str, target: str, ceiling: float, base_share: float
) -> Figure:
    """Harm (``editing.study.doses``) over the share of the answers in the target language, a line a way.

    Solid: permanent edits; dashed: hooks and prompts, which steer only while they run.  Marks are hollow at
    parts of the strength and filled at all of it.  Doses of which a figure was not measured are left out.

    Args:
        curves: title -> outcomes of its doses, ascending, each with ``details["dose"]`` and
            ``details["permanent"]``.
        source: language that is steered from.
        target: language that is steered to.
        ceiling: share that the unedited model reaches on target prompts; NaN is not drawn.
        base_share: share that it reaches on the source's; NaN is not drawn.
    """
    drawn = {
        title: kept
        for title, outcomes in curves.items()
        if (kept := [one for one in outcomes if is_measured(one, source, target)])
    }
    looks = _looks(drawn)
    # Two heads, and what the marks and lines mean, below the ways.
    figure = Figure(figsize=(WIDE, max(HIGH, 0.6 + ROW * (len(drawn) + 7))), layout="constrained")
    axis = figure.subplots()
    axis.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    keys = []
    for title, outcomes in drawn.items():
        look = looks[title]
        places = [(one.target_share, harm(one, source, target)) for one in outcomes]
        axis.plot(*zip(*places, strict=True), markerfacecolor="white", clip_on=False, **look)
        whole = [place for place, one in zip(places, outcomes, strict=True) if one.details["dose"] == 1]
        for place in whole:
            axis.plot(*place, clip_on=False, **{**look, "linestyle": "", "zorder": look["zorder"] + 0.5})
        keys.append((_is_permanent(outcomes), Line2D([], [], label=_short(title), **look)))
    meanings = [_mark("white", "part of the strength"), _mark("0.4", "the whole strength")]
    if math.isfinite(ceiling):
        meanings.append(
            axis.axvline(ceiling, color="0.3", linestyle=":", linewidth=1.2, label="ceiling", zorder=0)
        )
    if math.isfinite(base_share):
        meanings += axis.plot(
            base_share, 0, "*", color="0.4", markersize=11, label="unedited model", clip_on=False, zorder=1
        )
    _scaled(axis)
    axis.set(
        xlabel=label(f"share of answers in {target}"),
        ylabel=f"largest NLL rise of a third language,\nnats a token (logarithmic above {LINEAR:g})",
        xlim=(-0.02, 1.02),
    )
    what = label(f"what steering {source} to {target} costs, at parts of each way's strength")
    axis.set_title(title_of(what, {}, (), WIDE - 3), fontsize=TITLE)
    groups = [
        (head, [key for permanent, key in keys if permanent is wanted])
        for head, wanted in (("permanent edits", True), ("hooks and prompts", False))
    ]
    handles = [one for head, found in groups if found for one in (_head(head), *found)]
    legend = figure.legend(
        handles=[*handles, _head(""), *meanings],
        loc="outside right upper",
        frameon=False,
        fontsize=8,
        handlelength=3,
    )
    for text in legend.get_texts():
        if text.get_text() in [head for head, _ in groups]:
            text.set_fontweight("bold")
    return figure


def _looks(drawn: Mapping[str, Sequence[Outcome]]) -> dict[str, dict[str, Any]]:
    """How each way is drawn: the keyed edit thickest, in black, over the others."""
    others = [title for title in drawn if title != KEYED]
    found: dict[str, dict[str, Any]] = {
        title: {
            "color": _OTHERS[place % len(_OTHERS)],
            "marker": _MARKS[place % len(_MARKS)],
            "markersize": 5.5,
            "linewidth": 1.3,
            "zorder": 2,
        }
        for place, title in enumerate(others)
    }
    if KEYED in drawn:
        found[KEYED] = {"color": COLOURS[-1], "marker": _OWN, "markersize": 7, "linewidth": 3, "zorder": 4}
    for title, look in found.items():
        look["linestyle"] = "-" if _is_permanent(drawn[title]) else (0, (4, 2))
    return found


def _is_permanent(outcomes: Sequence[Outcome]) -> bool:
    return bool(outcomes[-1].details.get("permanent"))


def _short(title: str) -> str:
    return label(title if len(title) <= LONGEST else title[: LONGEST - 1] + "\N{HORIZONTAL ELLIPSIS}")


def _head(text: str) -> Line2D:
    return Line2D([], [], linestyle="", label=text)


def _mark(face: str, text: str) -> Line2D:
    return Line2D(
        [], [], linestyle="", marker=_OWN, color="0.4", markerfacecolor=face, markersize=6, label=text
    )


def _scaled(axis: Any) -> None:
    axis.set_yscale("symlog", linthresh=LINEAR, linscale=1)
    axis.margins(y=0.06)
    axis.yaxis.set_major_locator(FixedLocator([*(-step for step in reversed(_STEPS)), 0, *_STEPS]))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:g}".replace("-", "\N{MINUS SIGN}"))
    )
    plainly(axis)
