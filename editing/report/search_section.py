"""Section on a search: the outcome of the chosen edit, trade-off drawings, and tables of the trials."""

from __future__ import annotations

import math
from collections.abc import Callable

from markupsafe import Markup

from editing.report.curves import Point, trade_off
from editing.report.formats import plain
from editing.report.inline_svg import Drawing
from editing.report.steering_section import steering_content
from editing.report.templating import rendered
from editing.study.search_result import SearchResult
from editing.study.trial import MEASURED, WITHOUT_PLAN, Trial

_GOALS = {
    "fluency_gap": "fluency gap at most {}",
    "rise": "NLL rise of a third language at most {}",
    "share": "share at least {} of the ceiling",
}


def search_content(search: SearchResult, name: str) -> Markup:
    """The section of one search, with its result on the report part first.

    Args:
        search: the search.
        name: of the figures, unique in the page.
    """
    front = [trial for trial in search.trials if trial.number in search.front]
    return rendered(
        "search",
        search=search,
        result=steering_content(search.result, f"{name}-steering") if search.result else "",
        missed=[goal for goal, met in search.report.goals_met.items() if not met] if search.report else [],
        unchanged=sum(trial.state in WITHOUT_PLAN for trial in search.trials),
        pruned=sum(trial.state not in (MEASURED, *WITHOUT_PLAN) for trial in search.trials),
        goals=[words.format(plain(getattr(search.goals, goal))) for goal, words in _GOALS.items()],
        drawings=[
            _drawing(search, f"{name}-harm", "mean KL of third languages, nats", _harm),
            _drawing(search, f"{name}-gap", "fluency gap, nats a token", _gap),
        ],
        tables=[
            (caption, trials, [i for i, trial in enumerate(trials) if trial.number == search.chosen])
            for caption, trials in (
                ("The Pareto front; the trial set off was chosen", front),
                ("All trials", search.trials),
            )
        ],
        MEASURED=MEASURED,
    )


def _harm(trial: Trial) -> float:
    return trial.harm if trial.kl else math.nan


def _gap(trial: Trial) -> float:
    return math.nan if trial.fluency_gap is None else trial.fluency_gap


def _drawing(
    search: SearchResult, name: str, cost_label: str, cost: Callable[[Trial], float]
) -> Drawing | None:
    points = [
        Point(
            trial.method,
            cost(trial),
            trial.share,
            trial.number == search.chosen,
            trial.number in search.front,
        )
        for trial in search.trials
        if trial.state == MEASURED and trial.continuations
    ]
    caption = (
        f"What the trials reach against what they cost ({cost_label}). Ringed: on the Pareto front of share, "
        "fluency gap and KL; large: chosen. Trials that were given up are left out."
    )
    return trade_off(caption, points, search.ceiling, f"share {search.target}", cost_label, name)
