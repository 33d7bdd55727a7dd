"""Section on steering: a table of the methods, heat maps of NLL rises and KL, and samples of each method."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from editing.evaluation.lens import LanguageLens
from editing.evaluation.outcome import Outcome
from editing.report.dose_response_section import dose_response_content
from editing.report.formats import count, number, plain
from editing.report.heat_maps import Cell, HeatMap
from editing.report.inline_svg import drawn
from editing.report.lens_figure import lens_figure, lens_table
from editing.report.provenance import provenance
from editing.report.templating import rendered
from editing.study.results import Report

# Field of an Outcome -> title of its column, and format.
COLUMNS = {
    "distinct": ("distinct words", ".2f"),
    "agreement": ("second detector agrees", ".2f"),
    "answer_words": ("words an answer", ".1f"),
    "distinct_pairs": ("distinct pairs", ".2f"),
    "longest_repeat": ("longest repeat", ".2f"),
    "sentence_share": ("sentences in the target", ".2f"),
}
# Minimum ends of the scales: smaller values get no strong colour.
MIN_RISE, MIN_KL, MIN_RATE_CHANGE = 0.1, 0.1, 0.2


def steering_content(result: Report, name: str) -> Markup:
    """The section of one pair of languages.

    Args:
        result: the report.
        name: of the figures, unique in the page.
    """
    outcomes = result.outcomes
    head, rows = _writing(outcomes)
    return rendered(
        "steering",
        result=result,
        part=provenance(result.about).part,
        edited=any(outcome.details.get("components") for outcome in outcomes),
        effective=any(outcome.effectiveness is not None for outcome in outcomes),
        detail=_detail,
        largest=_largest,
        head=head,
        rows=rows,
        maps=[heat_map for heat_map in _maps(result) if heat_map.rows],
        doses=dose_response_content(result, name) if result.curves else "",
        lens=result.lens and _lens(result.lens, result, name),
        samples=samples_by_prompt(outcomes),
        settings=[
            (outcome.name, plain(settings))
            for outcome in outcomes
            if (settings := outcome.details.get("settings"))
        ],
    )


def _lens(lens: LanguageLens, result: Report, name: str) -> dict[str, Any]:
    """The figure of the logit lens, and the caption, head and rows of its table."""
    tokens = ", ".join(f"{language} {count(number)}" for language, number in lens.tokens.items())
    caption = (
        f"Logit lens: mass of the tokens of {result.source}, {result.target} and the other languages after each layer, "
        f"at the last token of {count(lens.positions)} {result.source} prompts. The unedited model is dashed. The last "
        "layer is the model's own next token."
    )
    head, rows = lens_table(lens, result.source, result.target)
    return {
        "drawing": drawn(lens_figure(lens, result.source, result.target), f"{name}-lens", caption),
        "caption": f"The same in numbers. Tokens of the vocabulary that are a language's own: {tokens}.",
        "head": head,
        "rows": rows,
    }


def samples_by_prompt(outcomes: Sequence[Outcome]) -> dict[str, list[tuple[str, str, str]]]:
    """Prompt -> (method, continuation, language) of each method; prompts and continuations on one line."""
    samples: dict[str, list[tuple[str, str, str]]] = {}
    for outcome in outcomes:
        for sample in outcome.samples:
            prompt = " ".join(sample.prompt.split())
            samples.setdefault(prompt, []).append((outcome.name, sample.line, sample.language))
    return samples


def _writing(outcomes: Sequence[Outcome]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table on the answers; each relevance scorer has its own columns."""
    columns = [
        field for field in COLUMNS if any(not math.isnan(getattr(outcome, field)) for outcome in outcomes)
    ]
    failures = _keys(outcome.failures for outcome in outcomes)
    relevance = _keys(
        {(str(outcome.relevance.get("scorer", "")), key): 0 for key in outcome.relevance if key != "scorer"}
        for outcome in outcomes
    )
    head = [
        "way",
        *(COLUMNS[field][0] for field in columns),
        *failures,
        *(f"relevance ({scorer}): {key.replace('_', ' ')}" for scorer, key in relevance),
    ]
    rows = [
        [
            outcome.name,
            *(number(getattr(outcome, field), COLUMNS[field][1]) for field in columns),
            *(count(outcome.failures.get(key)) for key in failures),
            *(
                number(
                    outcome.relevance.get(key) if outcome.relevance.get("scorer") == scorer else None, ".2f"
                )
                for scorer, key in relevance
            ),
        ]
        for outcome in outcomes
    ]
    return head, rows


def _maps(result: Report) -> list[HeatMap]:
    """Heat maps of NLL rises, KL, and rates of answers in the other languages."""
    outcomes, source, target = result.outcomes, result.source, result.target
    rises = _keys(outcome.nll_rise for outcome in outcomes)
    # The source is last: steering is meant to make its text less likely.
    rises = [target, *(k for k in rises if k not in (target, source)), source] if rises else []
    third = _keys(outcome.kl for outcome in outcomes)
    others = _keys(outcome.others for outcome in outcomes)
    unedited = {k: other.ceiling for outcome in outcomes for k, other in outcome.others.items()}
    rates = [
        (outcome.name, {k: outcome.others[k].share if k in outcome.others else math.nan for k in others})
        for outcome in outcomes
        if outcome.others
    ]
    unedited_rates = ", ".join(f"{k} {number(unedited[k], '.2f')}" for k in others)
    return [
        HeatMap(
            f"NLL rise on each language's text. The last column is {source}'s own text, which steering is meant to "
            "make less likely: it is left out of the scale.",
            ["way", *rises],
            [
                (outcome.name, _cells(outcome.nll_rise, rises, "+.3f", (source,)))
                for outcome in outcomes
                if outcome.nll_rise
            ],
            "nats a token",
            min_scale=MIN_RISE,
        ),
        HeatMap(
            "KL of next-token distributions on third languages, unedited to steered",
            ["way", *third],
            [(outcome.name, _cells(outcome.kl, third, ".3f")) for outcome in outcomes if outcome.kl],
            "nats a position",
            min_scale=MIN_KL,
            signed=False,
        ),
        HeatMap(
            "Share of answers in the prompt's own language, on prompts of the other languages; coloured by the change "
            f"from the unedited model ({unedited_rates})",
            ["way", *others],
            [
                (name, [Cell(rate - unedited[k], number(rate, ".2f")) for k, rate in by_language.items()])
                for name, by_language in rates
            ],
            "change of the share",
            min_scale=MIN_RATE_CHANGE,
        ),
    ]


def _cells(
    values: Mapping[str, float], keys: Sequence[str], form: str, left_out: Collection[str] = ()
) -> list[Cell]:
    return [Cell(values.get(k, math.nan), number(values.get(k), form), plain=k in left_out) for k in keys]


def _keys(mappings: Iterable[Mapping[Any, Any]]) -> list[Any]:
    """The keys of all mappings, each once, in order."""
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def _largest(values: Mapping[str, float], without: Sequence[str] = ()) -> float:
    kept = [value for language, value in values.items() if language not in without and not math.isnan(value)]
    return max(kept, default=math.nan)


def _detail(outcome: Outcome, name: str) -> float | None:
    """A number in the details; None if it is 0 or missing."""
    value = outcome.details.get(name)
    return value if isinstance(value, int | float) and value else None
