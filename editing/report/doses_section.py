"""Ways of steering at parts of their strength: drawn, and each dose beside the keyed edit that steers as far."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from editing.evaluation.outcome import Outcome
from editing.methods.keyed_edit import KEYED
from editing.report.dose_pictures import LINEAR, dose_figure, is_measured
from editing.report.inline_svg import drawn
from editing.report.templating import rendered
from editing.study.doses import Cost, costs, harm
from editing.study.results import Report


def doses_content(result: Report, name: str) -> Markup:
    """The picture, what it shows in a sentence, and the table.

    Args:
        result: with curves.
        name: tells its picture from another result's.
    """
    source, target, measured = result.source, result.target, result.curves or {}
    curves = {
        way: kept
        for way, doses in measured.items()
        if (kept := [one for one in doses if is_measured(one, source, target)])
    }
    every = sum(map(len, measured.values()))
    base = result.outcomes[0].target_share
    least = base if math.isfinite(base) else 0.0
    drawing = None
    if curves:
        caption = (
            f"Harm against the share of answers in {target}, a line a way; solid: permanent edits, dashed: hooks and "
            f"prompts. The vertical axis is logarithmic above {LINEAR:g}."
        )
        drawing = drawn(dose_figure(curves, source, target, result.ceiling, base), f"{name}-doses", caption)
    beside = costs(curves, KEYED, source, target, least) if KEYED in curves else ()
    others = {(one.way, one.dose): one.other for one in beside}
    # The keyed edit's own doses come first, and whether they steer or not.
    rows: list[tuple[Outcome, float, bool, float | None]] = [
        (one, harm(one, source, target), False, None) for one in curves.get(KEYED, ())
    ]
    own = len(rows)
    rows += [
        (one, harm(one, source, target), True, others.get((way, one.details["dose"])))
        for way, doses in curves.items()
        for one in doses
        if way != KEYED and one.target_share > least
    ]
    return rendered(
        "doses",
        result=result,
        every=every,
        left_out=every - sum(map(len, curves.values())),
        drawing=drawing,
        keyed=KEYED if KEYED in curves else None,
        sentence=_sentence(beside),
        rows=rows,
        marked=range(own),
    )


def _sentence(beside: Sequence[Cost]) -> str:
    """At how many doses of the others the keyed edit costs less."""
    if not beside:
        return "No dose of another way reaches a larger share than the unedited model."
    reached = [(one.other, one.harm) for one in beside if one.other is not None]
    less = sum(own < other for own, other in reached)
    more = sum(own > other for own, other in reached)
    counted = [
        (f"the {KEYED}, at the same share or more, costs less at", less, True),
        ("the same at", len(reached) - less - more, False),
        ("more at", more, False),
        ("does not reach the share at", len(beside) - len(reached), False),
    ]
    doses = "dose of another way reaches" if len(beside) == 1 else "doses of other ways reach"
    told = ", ".join(f"{words} {many}" for words, many, always in counted if many or always)
    return f"{len(beside)} {doses} a larger share than the unedited model: {told}."
