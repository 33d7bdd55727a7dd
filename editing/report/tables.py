"""Tables of an evaluation for a terminal and for Markdown: a head, and rows of formatted cells."""

from __future__ import annotations

import math
from typing import Any

from editing.evaluation.outcome import Outcome
from editing.methods.keyed_edit import KEYED
from editing.study.dose_response import costs, harm
from editing.study.results import Report

Table = tuple[list[str], list[list[str]]]


def outcomes_table(report: Report) -> Table:
    """One row for each outcome; the NLL columns are rises in nats a token, KL is the largest."""
    # The source is last: the edit is meant to make its text less likely.
    languages = [report.target, *report.third_languages, report.source]
    head = [
        "",
        f"share {report.target}",
        f"share {report.source}",
        "distinct words",
        "fluency gap",
        *(f"NLL {language}" for language in languages),
        "KL",
        "components",
        "||dW||/||W||",
    ]
    return head, [
        [
            outcome.name,
            _number(outcome.target_share, ".2f"),
            _number(outcome.source_share, ".2f"),
            _number(outcome.distinct, ".2f"),
            _number(outcome.fluency_gap, "+.2f"),
            *(_number(outcome.nll_rise.get(language), "+.2f") for language in languages),
            _number(max(outcome.kl.values(), default=None), ".3f"),
            str(outcome.details.get("components") or "-"),
            _number(outcome.details.get("relative_change") or None, ".3g"),
        ]
        for outcome in report.outcomes
    ]


def methods_table(report: Report) -> Table:
    """One row for each of many methods, with one number for all third languages; the ceiling is in the title."""
    scorer = next((outcome.relevance["scorer"] for outcome in report.outcomes if outcome.relevance), None)
    head = [
        "",
        f"share {report.target}",
        "fluency gap",
        f"NLL {report.target}",
        "NLL third, largest",
        "KL, largest",
        *([f"relevance ({scorer})", "steering score"] if scorer else []),
        "effectiveness",
        "entanglement",
        "failures",
        "||dW||/||W||",
        "settings",
    ]
    return head, [
        [
            outcome.name,
            _number(outcome.target_share, ".2f"),
            _number(outcome.fluency_gap, "+.2f"),
            _number(outcome.nll_rise.get(report.target), "+.3f"),
            _number(max((outcome.nll_rise[k] for k in report.third_languages), default=None), "+.3f"),
            _number(max(outcome.kl.values(), default=None), ".3f"),
            *(_number(outcome.relevance.get(key), ".2f") for key in ("mean", "steering_score") if scorer),
            _number(outcome.effectiveness, ".2f"),
            _number(outcome.entanglement, ".3f"),
            str(sum(outcome.failures.values())),
            _number(outcome.details.get("relative_change") or None, ".3g"),
            ", ".join(f"{name} {_word(value)}" for name, value in outcome.details.get("settings", {}).items())
            or "-",
        ]
        for outcome in report.outcomes
    ]


def dose_response_table(report: Report) -> Table:
    """One row for each method and strength fraction, beside the keyed edit's harm at the same rate."""
    curves = report.curves or {}
    source, target, base = report.source, report.target, report.outcomes[0].target_share
    keyed = KEYED in curves
    keyed_harm = {
        (cost.method, cost.fraction): cost.reference
        for cost in (costs(curves, KEYED, source, target, base) if keyed else ())
    }
    head = ["", "dose", f"share {target}", "fluency gap", "NLL third, largest"]
    return head + [f"{KEYED}'s at that share"] * keyed, [
        [
            title,
            f"{outcome.details['dose']:g}",
            _number(outcome.target_share, ".2f"),
            _number(outcome.fluency_gap, "+.2f"),
            _number(harm(outcome, source, target), "+.3f"),
            *[_number(keyed_harm.get((title, outcome.details["dose"])), "+.3f")] * keyed,
        ]
        for title, outcomes in curves.items()
        for outcome in outcomes
    ]


def details_of(report: Report, outcome: Outcome) -> list[str]:
    """The measures of an outcome that the table leaves out, one line each."""
    lines = [
        f"{outcome.name}: sentences in {report.target} {outcome.sentence_share:.2f}, second detector agrees "
        f"{_number(outcome.agreement, '.2f')}, empty {outcome.failures.get('empty', 0)}, looping "
        f"{outcome.failures.get('looping', 0)}, {outcome.answer_words:.0f} words an answer"
    ]
    if outcome.relevance:
        relevance = outcome.relevance
        lines.append(
            f"relevance ({relevance['scorer']}) {relevance['mean']:.2f}, "
            f"steering score {relevance['steering_score']:.2f} (by item {relevance['item_score']:.2f})"
        )
    if outcome.others:
        lines.append(
            f"effectiveness {_number(outcome.effectiveness, '.2f')}, entanglement "
            f"{_number(outcome.entanglement, '.3f')}"
        )
    for language, other in outcome.others.items():
        lines.append(
            f"on {language} prompts: share {language} {other.share:.2f} (unedited {other.ceiling:.2f}), "
            f"fluency gap {_number(other.fluency_gap, '+.2f')}, longest repeat "
            f"{other.longest_repeat:.2f}, {other.answer_words:.0f} words"
        )
    return lines


def _number(value: float | None, form: str) -> str:
    return "-" if value is None or math.isnan(value) else format(value, form)


def _word(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
