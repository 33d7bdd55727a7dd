"""The settings that were tried on the choosing part: a picture and a table, set apart from results."""

from __future__ import annotations

import math

from markupsafe import Markup

from editing.evaluation.outcome import Outcome
from editing.report.curves import Point, trade_off
from editing.report.formats import plain
from editing.report.templating import rendered
from editing.study.results import Choice


def choice_content(choice: Choice, name: str) -> Markup:
    """What was tried for one target.

    Args:
        name: tells its picture from another choice's.
    """
    rows, points, marked = [], [], []
    for place, way in enumerate(choice.tried):
        if not isinstance(way, Outcome):
            missing = (math.nan,) * 3
            rows.append((way.name, *missing, f"{plain(way.settings)} ({way.refused})"))
            continue
        settings = way.details.get("settings")
        rises = [rise for k, rise in way.nll_rise.items() if k != choice.source and not math.isnan(rise)]
        harm = max(rises, default=math.nan)
        rows.append((way.name, way.target_share, way.fluency_gap, harm, plain(settings)))
        chosen = choice.chosen.get(way.name) == settings
        marked += [place] * chosen
        points.append(Point(way.name, harm, way.target_share, chosen))
    drawing = trade_off(
        f"Target share against harm, settings for {choice.target}; larger marks were chosen",
        points,
        choice.ceiling,
        f"share {choice.target}",
        "largest NLL rise of a language but the source, nats a token",
        f"{name}-settings",
    )
    return rendered("choice", choice=choice, drawing=drawing, rows=rows, marked=marked)
