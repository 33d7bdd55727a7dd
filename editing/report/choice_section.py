"""Section on the settings that were tried on the choosing part: a figure and a table, separate from results."""

from __future__ import annotations

import math

from markupsafe import Markup

from editing.evaluation.outcome import Outcome
from editing.report.curves import Point, trade_off
from editing.report.formats import plain
from editing.report.templating import rendered
from editing.study.results import Choice


def choice_content(choice: Choice, name: str) -> Markup:
    """The section of one target.

    Args:
        choice: the settings.
        name: of the figure, unique in the page.
    """
    rows, points, marked = [], [], []
    for index, tried in enumerate(choice.tried):
        if not isinstance(tried, Outcome):
            missing = (math.nan,) * 3
            rows.append((tried.name, *missing, f"{plain(tried.settings)} ({tried.refused})"))
            continue
        settings = tried.details.get("settings")
        rises = [rise for k, rise in tried.nll_rise.items() if k != choice.source and not math.isnan(rise)]
        harm = max(rises, default=math.nan)
        rows.append((tried.name, tried.target_share, tried.fluency_gap, harm, plain(settings)))
        chosen = choice.chosen.get(tried.name) == settings
        marked += [index] * chosen
        points.append(Point(tried.name, harm, tried.target_share, chosen))
    drawing = trade_off(
        f"Target share against harm, settings for {choice.target}; larger marks were chosen",
        points,
        choice.ceiling,
        f"share {choice.target}",
        "largest NLL rise of a language but the source, nats a token",
        f"{name}-settings",
    )
    return rendered("choice", choice=choice, drawing=drawing, rows=rows, marked=marked)
