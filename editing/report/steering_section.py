"""Ways of steering side by side: a table, NLL rises and KL as heat maps, and what each of them writes."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from editing.evaluation.outcome import Outcome
from editing.report.doses_section import doses_content
from editing.report.formats import count, number, plain
from editing.report.heat_maps import Cell, HeatMap
from editing.report.provenance import provenance
from editing.report.templating import rendered
from editing.study.results import Report

# Figure of an Outcome -> its head, and how it is written.
FIGURES = {
    "distinct": ("distinct words", ".2f"),
    "agreement": ("second detector agrees", ".2f"),
    "answer_words": ("words an answer", ".1f"),
    "distinct_pairs": ("distinct pairs", ".2f"),
    "longest_repeat": ("longest repeat", ".2f"),
    "sentence_share": ("sentences in the target", ".2f"),
}
# Where the scales end at the least: less than this is no cause for a strong colour.
LEAST_RISE, LEAST_KL, LEAST_SHARE = 0.1, 0.1, 0.2


def steering_content(result: Report, name: str) -> Markup:
    """Everything that is known of one pair of languages.

    Args:
        name: tells its picture from another pair's.
    """
    ways = result.outcomes
    head, rows = _writing(ways)
    return rendered(
        "steering",
        result=result,
        part=provenance(result.about).part,
        edited=any(way.details.get("components") for way in ways),
        effective=any(way.effectiveness is not None for way in ways),
        detail=_detail,
        largest=_largest,
        head=head,
        rows=rows,
        maps=[one for one in _maps(result) if one.rows],
        doses=doses_content(result, name) if result.curves else "",
        samples=samples_by_prompt(ways),
        settings=[(way.name, plain(found)) for way in ways if (found := way.details.get("settings"))],
    )


def samples_by_prompt(ways: Sequence[Outcome]) -> dict[str, list[tuple[str, str, str]]]:
    """Prompt -> (way, what it writes after it, language) of each way, words one space apart: line ends say nothing."""
    found: dict[str, list[tuple[str, str, str]]] = {}
    for way in ways:
        for one in way.samples:
            prompt = " ".join(one.prompt.split())
            found.setdefault(prompt, []).append((way.name, one.line, one.language))
    return found


def _writing(ways: Sequence[Outcome]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: how the answers are written.  Figures of different scorers are never in one column."""
    figures = [key for key in FIGURES if any(not math.isnan(getattr(way, key)) for way in ways)]
    failures = _keys(way.failures for way in ways)
    relevance = _keys(
        {(str(way.relevance.get("scorer", "")), key): 0 for key in way.relevance if key != "scorer"}
        for way in ways
    )
    head = [
        "way",
        *(FIGURES[key][0] for key in figures),
        *failures,
        *(f"relevance ({scorer}): {key.replace('_', ' ')}" for scorer, key in relevance),
    ]
    rows = [
        [
            way.name,
            *(number(getattr(way, key), FIGURES[key][1]) for key in figures),
            *(count(way.failures.get(key)) for key in failures),
            *(
                number(way.relevance.get(key) if way.relevance.get("scorer") == scorer else None, ".2f")
                for scorer, key in relevance
            ),
        ]
        for way in ways
    ]
    return head, rows


def _maps(result: Report) -> list[HeatMap]:
    """NLL rises, KL, and what becomes of answers in the other languages."""
    ways, source, ends = result.outcomes, result.source, (result.target, result.source)
    rises = _keys(way.nll_rise for way in ways)
    # The source last: that its own text becomes less likely is what steering is for.
    rises = [*ends[:1], *(k for k in rises if k not in ends), source] if rises else []
    third, others = _keys(way.kl for way in ways), _keys(way.others for way in ways)
    unedited = {k: one.ceiling for way in ways for k, one in way.others.items()}
    shares = [
        (way.name, {k: way.others[k].share if k in way.others else math.nan for k in others})
        for way in ways
        if way.others
    ]
    known = ", ".join(f"{k} {number(unedited[k], '.2f')}" for k in others)
    return [
        HeatMap(
            f"NLL rise on each language's text. The last column is {source}'s own text, which steering is meant to "
            "make less likely: it is left out of the scale.",
            ["way", *rises],
            [(way.name, _cells(way.nll_rise, rises, "+.3f", (source,))) for way in ways if way.nll_rise],
            "nats a token",
            least=LEAST_RISE,
        ),
        HeatMap(
            "KL of next-token distributions on third languages, unedited to steered",
            ["way", *third],
            [(way.name, _cells(way.kl, third, ".3f")) for way in ways if way.kl],
            "nats a position",
            least=LEAST_KL,
            signed=False,
        ),
        HeatMap(
            "Share of answers in the prompt's own language, on prompts of the other languages; coloured by the change "
            f"from the unedited model ({known})",
            ["way", *others],
            [
                (name, [Cell(share - unedited[k], number(share, ".2f")) for k, share in of.items()])
                for name, of in shares
            ],
            "change of the share",
            least=LEAST_SHARE,
        ),
    ]


def _cells(
    values: Mapping[str, float], keys: Sequence[str], form: str, left_out: Collection[str] = ()
) -> list[Cell]:
    return [Cell(values.get(k, math.nan), number(values.get(k), form), plain=k in left_out) for k in keys]


def _keys(mappings: Iterable[Mapping[Any, Any]]) -> list[Any]:
    """Keys of all, each once, in order."""
    return list(dict.fromkeys(key for one in mappings for key in one))


def _largest(values: Mapping[str, float], without: Sequence[str] = ()) -> float:
    kept = [value for language, value in values.items() if language not in without and not math.isnan(value)]
    return max(kept, default=math.nan)


def _detail(way: Outcome, name: str) -> float | None:
    """A number among the details; None where it is 0 or none."""
    found = way.details.get(name)
    return found if isinstance(found, int | float) and found else None
