"""Ways of steering at parts of their strength: drawn, and each dose beside the keyed edit that steers as far."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from editing.evaluation.evaluation import Outcome
from editing.report.dose_pictures import LINEAR, dose_figure, is_measured
from editing.report.formats import number
from editing.report.inline_svg import inline_svg, picture
from editing.report.markup import Content, Markup, joined, paragraph
from editing.report.steering_results import Steering
from editing.report.tables import share_bar, table
from editing.study.comparison import KEYED
from editing.study.doses import Cost, costs, harm

_NOT_REACHED = "not reached"

Curves = Mapping[str, Sequence[Outcome]]


def doses_content(result: Steering, name: str) -> Markup:
    """The picture, what it shows in a sentence, and the table.

    Args:
        result: with curves.
        name: tells its picture from another result's.
    """
    source, target = result.source, result.target
    curves = {
        way: kept
        for way, doses in result.curves.items()
        if (kept := [one for one in doses if is_measured(one, source, target)])
    }
    left_out = sum(map(len, result.curves.values())) - sum(map(len, curves.values()))
    parts: list[Markup] = [
        paragraph(
            "Each way's chosen setting is measured again at parts of its strength, on the same text. Harm is the "
            f"largest NLL rise of a language that is neither {source} nor {target}, nats a token: low and to the "
            "right is best."
        )
    ]
    if left_out:
        parts.append(
            paragraph(
                f"Left out, since a figure of them is missing: {left_out} of "
                f"{sum(map(len, result.curves.values()))} doses.",
                class_="warning",
            )
        )
    if not curves:
        return joined(parts)
    base = result.ways[0].target_share if result.ways else math.nan
    caption = (
        f"Harm against the share of answers in {target}, a line a way; solid: permanent edits, dashed: hooks and "
        f"prompts. The vertical axis is logarithmic above {LINEAR:g}."
    )
    figure = dose_figure(curves, source, target, result.ceiling, base)
    parts.append(picture(caption, inline_svg(figure, f"{name}-doses", caption)))
    least = base if math.isfinite(base) else 0.0
    if KEYED in curves:
        beside = costs(curves, KEYED, source, target, least)
        parts += [paragraph(_sentence(beside)), _beside_keyed(curves, beside, result)]
    else:
        parts.append(_alone(curves, least, result))
    return joined(parts)


def _sentence(beside: Sequence[Cost]) -> str:
    """At how many doses of the others the keyed edit costs less."""
    if not beside:
        return "No dose of another way reaches a larger share than the unedited model."
    reached = [(one.other, one.harm) for one in beside if one.other is not None]
    cheaper = sum(own < other for own, other in reached)
    dearer = sum(own > other for own, other in reached)
    counted = [
        f"the {KEYED}, at the same share or more, costs less at {cheaper}",
        *([f"the same at {len(reached) - cheaper - dearer}"] if cheaper + dearer < len(reached) else []),
        *([f"more at {dearer}"] if dearer else []),
        *(
            [f"does not reach the share at {len(beside) - len(reached)}"]
            if len(reached) < len(beside)
            else []
        ),
    ]
    doses = "dose of another way reaches" if len(beside) == 1 else "doses of other ways reach"
    return f"{len(beside)} {doses} a larger share than the unedited model: {', '.join(counted)}."


def _beside_keyed(curves: Curves, beside: Sequence[Cost], result: Steering) -> Markup:
    gaps = {(way, one.details["dose"]): one.fluency_gap for way, doses in curves.items() for one in doses}
    own = [_row(KEYED, one, result) for one in curves[KEYED]]
    rows: list[list[Content]] = [[*row, ""] for row in own]
    for one in beside:
        rows.append(
            [
                *_figures(one.way, one.dose, one.share, gaps[one.way, one.dose], one.harm),
                _NOT_REACHED if one.other is None else number(one.other, "+.4f"),
            ]
        )
    return table(
        f"Every dose beside the {KEYED}'s least harm at that share or more; set off: the {KEYED}'s own doses. Doses "
        "of other ways that reach no larger share than the unedited model are left out.",
        [*_head(result), f"{KEYED}'s harm"],
        rows,
        marked=range(len(own)),
    )


def _alone(curves: Curves, least: float, result: Steering) -> Markup:
    rows = [
        _row(way, one, result) for way, doses in curves.items() for one in doses if one.target_share > least
    ]
    return table(
        "Every dose; those that reach no larger share than the unedited model are left out.",
        _head(result),
        rows,
    )


def _head(result: Steering) -> list[Content]:
    return ["way", "dose", f"share {result.target}", "fluency gap", "harm"]


def _row(way: str, one: Outcome, result: Steering) -> list[Content]:
    cost = harm(one, result.source, result.target)
    return _figures(way, one.details["dose"], one.target_share, one.fluency_gap, cost)


def _figures(way: str, dose: float, share: float, gap: float, cost: float) -> list[Content]:
    return [
        way,
        f"{number(100 * dose, '.4g')} %",
        share_bar(share, number(share, ".2f")),
        number(gap, "+.2f"),
        number(cost, "+.4f"),
    ]
