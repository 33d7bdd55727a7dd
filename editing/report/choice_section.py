"""The settings that were tried on the choosing part: a picture and a table, set apart from results."""

from __future__ import annotations

import math

from markupsafe import Markup

from editing.evaluation.evaluation import Outcome
from editing.report.curves import Point, trade_off
from editing.report.templating import rendered
from editing.report.tried import Choice


def choice_content(choice: Choice, source: str | None, name: str) -> Markup:
    """What was tried for one target.

    Args:
        source: language whose rise is no harm; None where it is not known.
        name: tells its picture from another choice's.
    """

    def harm(way: Outcome) -> float:
        rises = [rise for k, rise in way.nll_rise.items() if k != source and not math.isnan(rise)]
        return max(rises, default=math.nan)

    drawing = trade_off(
        f"Target share against harm, settings for {choice.target}; larger marks were chosen",
        [Point(way.name, harm(way), way.target_share, choice.is_chosen(way)) for way in choice.tried],
        choice.ceiling,
        f"share {choice.target}",
        "largest NLL rise of a language but the source, nats a token",
        f"{name}-settings",
    )
    marked = [place for place, way in enumerate(choice.tried) if choice.is_chosen(way)]
    return rendered("choice", choice=choice, drawing=drawing, harm=harm, marked=marked)
