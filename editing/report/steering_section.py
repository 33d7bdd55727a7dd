"""Ways of steering side by side: a table, NLL rises and KL as heat maps, and what each of them writes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from editing.report.doses_section import doses_content
from editing.report.formats import count, number, plain
from editing.report.markup import Content, Markup, element, joined, paragraph
from editing.report.matrix import Cell, heat_map
from editing.report.part import of_part, part_warning
from editing.report.samples import sample_list
from editing.report.steering_results import Steering, Way
from editing.report.tables import share_bar, table

MEANINGS = (
    (
        "share",
        "continuations identified as the language; empty ones and those that go round in circles are in none",
    ),
    ("ceiling", "share of the target when the unedited model continues target-language prompts"),
    (
        "distinct words, pairs",
        "mean share of distinct words, or of runs of two words, in a continuation; longest repeat: mean share of "
        "its words in the longest passage that it repeats",
    ),
    (
        "fluency gap",
        "nats a token by which the continuations are less likely to the unedited model than its own in the "
        "target language; above 1 is word salad",
    ),
    ("NLL rise", "rise of the negative log-likelihood of text, nats a token"),
    ("KL", "of next-token distributions, unedited to steered, nats a position; the largest third language's"),
    (
        "effectiveness, entanglement",
        "the part of the possible rise in share that was reached; root mean square change of the shares of all "
        "languages but the source on their own prompts (after arXiv 2509.13450)",
    ),
    ("relevance", "of answers, by the scorer that is named; figures of different scorers do not compare"),
)
# figure -> its head, and how it is written
FIGURES = {
    "agreement": ("second detector agrees", ".2f"),
    "sentence_share": ("sentences in the target", ".2f"),
    "distinct_pairs": ("distinct pairs", ".2f"),
    "longest_repeat": ("longest repeat", ".2f"),
    "answer_words": ("words an answer", ".1f"),
}
# Where the scales end at the least: less than this is no cause for a strong colour.
LEAST_RISE, LEAST_KL, LEAST_SHARE = 0.1, 0.1, 0.2
_OF_FIRST_TABLE = ("effectiveness", "entanglement")


def steering_content(result: Steering, name: str) -> Markup:
    """Everything that is known of one pair of languages.

    Args:
        name: tells its picture from another pair's.
    """
    samples = [(way.name, way.samples) for way in result.ways if way.samples]
    parts: list[Markup] = [
        paragraph(
            f"{count(result.continuations)} continuations of {result.source} prompts{of_part(result.origin)}; "
            f"ceiling of {result.target}: {number(result.ceiling, '.2f')}."
        ),
        *part_warning(result.origin, "directions or settings"),
        *(paragraph(note, class_="warning") for note in result.notes),
        _table(result),
        _writing(result),
        _rises(result),
        _divergences(result),
        _others(result),
    ]
    if result.curves:
        parts += [element("h3", "At parts of the strength"), doses_content(result, name)]
    if samples:
        parts += [element("h3", "What they write"), sample_list(result.source, samples)]
    settings = [(way.name, way.details["settings"]) for way in result.ways if way.details.get("settings")]
    if settings:
        parts.append(
            table(
                "Settings of each way",
                ["way", "settings"],
                [[k, plain(v)] for k, v in settings],
                words=(0, 1),
            )
        )
    return joined(parts)


def meanings() -> Markup:
    """What the figures are."""
    terms = [joined((element("dt", name), element("dd", meaning))) for name, meaning in MEANINGS]
    return element("dl", *terms, class_="meanings")


def _table(result: Steering) -> Markup:
    """What is reached and what it costs."""
    edited = any(way.details.get("components") for way in result.ways)
    effective = any("effectiveness" in way.further for way in result.ways)
    head: list[Content] = [
        "way",
        f"share {result.target}",
        f"share {result.source}",
        "fluency gap",
        f"NLL rise {result.target}",
        "largest third NLL rise",
        "largest KL",
        *(["effectiveness", "entanglement"] if effective else []),
        *(["components", "‖ΔW‖/‖W‖"] if edited else []),
    ]
    rows: list[list[Content]] = []
    for way in result.ways:
        row: list[Content] = [
            way.name,
            share_bar(way.target_share, number(way.target_share, ".2f")),
            number(way.source_share, ".2f"),
            number(way.fluency_gap, "+.2f"),
            number(way.nll_rise.get(result.target), "+.3f"),
            number(_largest(way.nll_rise, (result.source, result.target)), "+.3f"),
            number(_largest(way.kl, ()), ".3f"),
        ]
        if effective:
            row += [number(way.further.get(name), ".2f") for name in ("effectiveness", "entanglement")]
        if edited:
            row += [_components(way), _change(way)]
        rows.append(row)
    return table(
        f"{result.source} to {result.target}, all ways: what they reach and what it costs", head, rows
    )


def _writing(result: Steering) -> Markup:
    """How the answers are written."""
    further = list(
        dict.fromkeys(name for way in result.ways for name in way.further if name not in _OF_FIRST_TABLE)
    )
    failures = list(dict.fromkeys(name for way in result.ways for name in way.failures))
    relevance = list(
        dict.fromkeys((way.relevance[0], name) for way in result.ways for name in way.relevance[1])
    )
    head: list[Content] = [
        "way",
        "distinct words",
        *(_figure(name)[0] for name in further),
        *failures,
        *(f"relevance ({scorer}): {name.replace('_', ' ')}" for scorer, name in relevance),
    ]
    rows: list[list[Content]] = [
        [
            way.name,
            number(way.distinct, ".2f"),
            *(number(way.further.get(name), _figure(name)[1]) for name in further),
            *(count(way.failures.get(name)) for name in failures),
            # Figures of different scorers are never put into one column.
            *(
                number(way.relevance[1].get(name) if way.relevance[0] == scorer else None, ".2f")
                for scorer, name in relevance
            ),
        ]
        for way in result.ways
    ]
    return table("How they write", head, rows)


def _figure(name: str) -> tuple[str, str]:
    return FIGURES.get(name, (name.replace("_", " "), ".3g"))


def _others(result: Steering) -> Markup:
    """What becomes of answers in the other languages."""
    ways = [way for way in result.ways if way.others]
    if not ways:
        return joined(())
    languages = list(dict.fromkeys(language for way in ways for language in way.others))
    ceilings = {k: way.others[k].get("ceiling", math.nan) for way in ways for k in way.others}
    rows: list[tuple[Content, Sequence[Cell]]] = [
        (
            way.name,
            [
                Cell(share - ceilings[k], number(share, ".2f"))
                for k in languages
                for share in [way.others.get(k, {}).get("share", math.nan)]
            ],
        )
        for way in ways
    ]
    unedited = ", ".join(f"{k} {number(ceilings[k], '.2f')}" for k in languages)
    return heat_map(
        "Share of answers in the prompt's own language, on prompts of the other languages; coloured by the "
        f"change from the unedited model ({unedited})",
        "way",
        languages,
        rows,
        "change of the share",
        least=LEAST_SHARE,
    )


def _rises(result: Steering) -> Markup:
    ways = [way for way in result.ways if way.nll_rise]
    if not ways:
        return joined(())
    rows = [
        (
            way.name,
            [
                Cell(
                    value=way.nll_rise.get(language, math.nan),
                    text=number(way.nll_rise.get(language), "+.3f"),
                    plain=language == result.source,
                )
                for language in result.languages
            ],
        )
        for way in ways
    ]
    return heat_map(
        f"NLL rise on each language's text. The last column is {result.source}'s own text, which steering is meant "
        "to make less likely: it is left out of the scale.",
        "way",
        result.languages,
        rows,
        "nats a token",
        least=LEAST_RISE,
    )


def _divergences(result: Steering) -> Markup:
    ways = [way for way in result.ways if way.kl]
    if not ways:
        return joined(())
    languages = list(dict.fromkeys(language for way in ways for language in way.kl))
    rows: list[tuple[Content, Sequence[Cell]]] = [
        (
            way.name,
            [Cell(way.kl.get(k, math.nan), number(way.kl.get(k), ".3f")) for k in languages],
        )
        for way in ways
    ]
    return heat_map(
        "KL of next-token distributions on third languages, unedited to steered",
        "way",
        languages,
        rows,
        "nats a position",
        least=LEAST_KL,
        signed=False,
    )


def _largest(values: Mapping[str, float], without: Sequence[str]) -> float:
    kept = [value for language, value in values.items() if language not in without and not math.isnan(value)]
    return max(kept, default=math.nan)


def _components(way: Way) -> str:
    found = way.details.get("components")
    return count(found) if isinstance(found, int) and found else number(None, "")


def _change(way: Way) -> str:
    found = way.details.get("relative_change")
    return number(found if isinstance(found, float) and found else None, ".2f")
