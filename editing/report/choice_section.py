"""The settings that were tried on the choosing part: a picture and a table, set apart from results."""

from __future__ import annotations

import math

from editing.report.curves import Point, trade_off
from editing.report.formats import number, plain
from editing.report.markup import Content, Markup, joined, paragraph
from editing.report.steering_results import Choice, Way
from editing.report.tables import share_bar, table


def choice_content(choice: Choice, source: str | None, name: str) -> Markup:
    """What was tried for one target.

    Args:
        source: language whose rise is no harm; None where it is not known.
        name: tells its picture from another choice's.
    """
    points = [
        Point(way.name, _harm(way, source), way.target_share, _is_chosen(choice, way))
        for way in choice.tried
        if not way.refused
    ]
    rows: list[list[Content]] = []
    marked = []
    for way in choice.tried:
        if _is_chosen(choice, way):
            marked.append(len(rows))
        rows.append(
            [
                way.name,
                share_bar(way.target_share, number(way.target_share, ".2f")),
                number(way.fluency_gap, "+.2f"),
                number(_harm(way, source), "+.3f"),
                plain(way.details.get("settings")) + (f" ({way.refused})" if way.refused else ""),
            ]
        )
    ceiling = "" if math.isnan(choice.ceiling) else f" Ceiling there: {number(choice.ceiling, '.2f')}."
    return joined(
        (
            paragraph(
                "Measured on the choosing part of the text, to choose by; the results are those on the report "
                f"part.{ceiling}"
            ),
            trade_off(
                f"Target share against harm, settings for {choice.target}; larger marks were chosen",
                points,
                choice.ceiling,
                f"share {choice.target}",
                "largest NLL rise of a language but the source, nats a token",
                f"{name}-settings",
            ),
            table(
                "Settings tried; those set off were chosen",
                ["way", f"share {choice.target}", "fluency gap", "largest NLL rise", "settings"],
                rows,
                words=(0, 4),
                marked=marked,
            ),
        )
    )


def _harm(way: Way, source: str | None) -> float:
    rises = [rise for k, rise in way.nll_rise.items() if k != source and not math.isnan(rise)]
    return max(rises, default=math.nan)


def _is_chosen(choice: Choice, way: Way) -> bool:
    return not way.refused and choice.chosen.get(way.name) == way.details.get("settings")
