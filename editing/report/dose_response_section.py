"""Section on dose-response: the figure, and each method at its strength fractions beside the keyed edit."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from editing.evaluation.outcome import Outcome
from editing.methods.keyed_edit import KEYED
from editing.report.dose_response import LINEAR, dose_figure, is_measured
from editing.report.inline_svg import drawn
from editing.report.templating import rendered
from editing.study.dose_response import Cost, costs, harm
from editing.study.results import Report


def dose_response_content(result: Report, name: str) -> Markup:
    """The figure, a sentence on it, and the table.

    Args:
        result: a report with curves.
        name: of the figure, unique in the page.
    """
    source, target, measured = result.source, result.target, result.curves or {}
    curves = {
        title: kept
        for title, outcomes in measured.items()
        if (kept := [outcome for outcome in outcomes if is_measured(outcome, source, target)])
    }
    every = sum(map(len, measured.values()))
    base = result.outcomes[0].target_share
    min_rate = base if math.isfinite(base) else 0.0
    drawing = None
    if curves:
        caption = (
            f"Harm against the share of answers in {target}, a line a way; solid: permanent edits, dashed: hooks and "
            f"prompts. The vertical axis is logarithmic above {LINEAR:g}."
        )
        drawing = drawn(dose_figure(curves, source, target, result.ceiling, base), f"{name}-doses", caption)
    compared = costs(curves, KEYED, source, target, min_rate) if KEYED in curves else ()
    keyed_harm = {(cost.method, cost.fraction): cost.reference for cost in compared}
    # The rows of the keyed edit come first, also those that do not steer.
    rows: list[tuple[Outcome, float, bool, float | None]] = [
        (outcome, harm(outcome, source, target), False, None) for outcome in curves.get(KEYED, ())
    ]
    keyed_rows = len(rows)
    rows += [
        (outcome, harm(outcome, source, target), True, keyed_harm.get((title, outcome.details["dose"])))
        for title, outcomes in curves.items()
        for outcome in outcomes
        if title != KEYED and outcome.target_share > min_rate
    ]
    return rendered(
        "dose_response",
        result=result,
        every=every,
        left_out=every - sum(map(len, curves.values())),
        drawing=drawing,
        keyed=KEYED if KEYED in curves else None,
        sentence=_sentence(compared),
        rows=rows,
        marked=range(keyed_rows),
    )


def _sentence(compared: Sequence[Cost]) -> str:
    """At how many strength fractions of other methods the keyed edit does less harm."""
    if not compared:
        return "No dose of another way reaches a larger share than the unedited model."
    pairs = [(cost.reference, cost.harm) for cost in compared if cost.reference is not None]
    less = sum(keyed < other for keyed, other in pairs)
    more = sum(keyed > other for keyed, other in pairs)
    counts = [
        (f"the {KEYED}, at the same share or more, costs less at", less, True),
        ("the same at", len(pairs) - less - more, False),
        ("more at", more, False),
        ("does not reach the share at", len(compared) - len(pairs), False),
    ]
    doses = "dose of another way reaches" if len(compared) == 1 else "doses of other ways reach"
    clauses = ", ".join(f"{words} {many}" for words, many, always in counts if many or always)
    return f"{len(compared)} {doses} a larger share than the unedited model: {clauses}."
