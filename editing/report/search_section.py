"""A search: its Pareto front drawn, and every trial in a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from editing.report.curves import Point, trade_off
from editing.report.formats import number, plain
from editing.report.markup import Content, Markup, element, joined, paragraph
from editing.report.search_results import SearchResult, Trial
from editing.report.steering_section import steering_content
from editing.report.tables import share_bar, table


def search_content(search: SearchResult, name: str) -> Markup:
    """Everything of one search, its result on the report part first.

    Args:
        name: tells its picture from another search's.
    """
    idle = sum(trial.idle for trial in search.trials)
    given_up = sum(not trial.whole for trial in search.trials) - idle
    target = search.target or "target"
    goals = f" Goals: {_goals(search.goals)}." if search.goals else ""
    parts: list[Markup] = []
    if not search.finished:
        parts.append(paragraph("The search was stopped before its end.", class_="warning"))
    for result in search.results:
        parts += [
            element("h3", "The chosen edit, on the report part"),
            _met(search),
            steering_content(result, f"{name}-steering"),
        ]
    parts += [
        element("h3", "The search"),
        paragraph(
            f"{len(search.trials)} trials, {given_up} of them given up before their end"
            f"{f' and {idle} without any change' if idle else ''}, measured on the "
            f"choosing part of the text, to choose by. Ceiling there: {number(search.ceiling, '.2f')}.{goals}"
        ),
        *(paragraph(f"Trial {search.chosen} was chosen: {search.why}.") for _ in [0] if search.why),
        _picture(
            search, target, f"{name}-harm", "mean KL of third languages, nats", lambda trial: trial.harm
        ),
        _picture(search, target, f"{name}-gap", "fluency gap, nats a token", lambda trial: trial.fluency_gap),
        _table(
            search,
            [trial for trial in search.trials if trial.number in search.front],
            "The Pareto front; the trial set off was chosen",
        ),
        _table(search, list(search.trials), "All trials"),
    ]
    return joined(parts)


def _goals(goals: Mapping[str, Any]) -> str:
    """Each with what it is a bound of."""
    forms = {
        "share": "share at least {} of the ceiling",
        "fluency_gap": "fluency gap at most {}",
        "rise": "NLL rise of a third language at most {}",
    }
    return ", ".join(forms.get(name, name + " {}").format(plain(value)) for name, value in goals.items())


def _met(search: SearchResult) -> Markup:
    if not search.met:
        return joined(())
    missed = [goal for goal, met in search.met.items() if not met]
    if missed:
        return paragraph(f"Goals not met there: {', '.join(missed)}.", class_="warning")
    return paragraph("It meets all goals there.")


def _picture(
    search: SearchResult, target: str, name: str, cost_label: str, cost: Callable[[Trial], float]
) -> Markup:
    points = [
        Point(
            trial.method,
            cost(trial),
            trial.share,
            chosen=trial.number == search.chosen,
            front=trial.number in search.front,
        )
        for trial in search.trials
        if trial.whole
    ]
    caption = (
        f"What the trials reach against what they cost ({cost_label}). Ringed: on the Pareto front of share, "
        "fluency gap and KL; large: chosen. Trials that were given up are left out."
    )
    return trade_off(caption, points, search.ceiling, f"share {target}", cost_label, name)


def _table(search: SearchResult, trials: list[Trial], caption: str) -> Markup:
    rows: list[list[Content]] = [
        [
            str(trial.number),
            trial.method,
            share_bar(trial.share, number(trial.share, ".2f")),
            number(trial.fluency_gap, "+.2f"),
            number(trial.rise, "+.3f"),
            number(trial.harm, ".4f"),
            plain(trial.settings) + ("" if trial.whole else f" ({trial.why or trial.state})"),
        ]
        for trial in trials
    ]
    return table(
        caption,
        ["trial", "method", "share", "fluency gap", "largest third NLL rise", "mean third KL", "settings"],
        rows,
        words=(0, 1, 6),
        marked=[place for place, trial in enumerate(trials) if trial.number == search.chosen],
    )
