"""An ablation study: neuron sets side by side, a matrix each, and dose curves."""

from __future__ import annotations

import math

from editing.report.ablation_results import AblatedSet, Ablation
from editing.report.curves import Curve, doses_picture
from editing.report.formats import count, number, span
from editing.report.markup import Content, Markup, element, joined, paragraph
from editing.report.matrix import Cell, heat_map
from editing.report.part import of_part, part_warning
from editing.report.tables import table
from neurons.ablation.study import set_title

LEAST_RISE = 0.1  # nats a token; less is no cause for a strong colour


def ablation_content(study: Ablation, name: str) -> Markup:
    """Everything of one study.

    Args:
        name: tells its pictures from another study's.
    """
    confidence = "" if math.isnan(study.confidence) else f" with {study.confidence:.0%} intervals over texts"
    tokens = f", {count(sum(study.tokens.values()))} tokens" if study.tokens else ""
    parts: list[Markup] = [
        paragraph(
            f"Each language's neurons are ablated ({study.way}) and every language is read without them"
            f"{tokens}{of_part(study.origin)}. Figures are rises of the negative log-likelihood in nats a token{confidence}."
        ),
        *part_warning(study.origin, "neurons"),
        _sets(study),
    ]
    most = max((abs(rise) for one in study.sets for rise in _rises(one)), default=0.0) or 1.0
    for one in study.sets:
        parts += [element("h3", set_title(one.name, one.method)), _matrix(study, one, most)]
    if any(one.doses for one in study.sets):
        parts += [element("h3", "Dose curves"), *_doses(study, name)]
    return joined(parts)


def _rises(one: AblatedSet) -> list[float]:
    return [rise for row in one.change.values() for rise in row.values() if not math.isnan(rise)]


def _sets(study: Ablation) -> Markup:
    rows: list[list[Content]] = []
    for one in study.sets:
        value, low, high = one.specificity
        largest = sum(
            all(one.change[i][i] >= one.change[i][j] for j in study.languages) and one.change[i][i] > 0
            for i in study.languages
        )
        rows.append(
            [
                one.name,
                one.method,
                span(tuple(one.neurons.values())),
                number(one.own, "+.4f"),
                number(one.other, "+.4f"),
                f"{number(value, '.2f')} [{number(low, '.2f')}, {number(high, '.2f')}]",
                f"{largest} of {len(study.languages)}",
            ]
        )
    return table(
        "Neuron sets side by side; specificity is the mean rise of the ablated language over that of the others",
        ["neuron set", "method", "neurons", "own rise", "others' rise", "specificity", "own is largest"],
        rows,
        words=(0, 1),
    )


def _matrix(study: Ablation, one: AblatedSet, most: float) -> Markup:
    rows: list[tuple[Content, list[Cell]]] = [
        (
            f"{language} ablated",
            [
                Cell(
                    value=one.change[language][other],
                    text=number(one.change[language][other], "+.3f"),
                    small=_interval(one, language, other),
                    strong=language == other,
                )
                for other in study.languages
            ],
        )
        for language in study.languages
    ]
    beside = [
        [
            count(one.neurons.get(language)),
            *(number(rises[language], "+.4f") for rises in one.controls.values()),
        ]
        for language in study.languages
    ]
    perplexities = ", ".join(f"{k} {number(study.perplexity[k], '.1f')}" for k in study.languages)
    return heat_map(
        f"{one.name}: rise of each language's NLL (columns) without each language's neurons (rows). "
        f"Perplexity unablated: {perplexities}.",
        "",
        study.languages,
        rows,
        "nats a token",
        most=most,
        least=LEAST_RISE,
        beside=["neurons", *(f"own rise, {control} neurons" for control in one.controls)],
        beside_rows=beside,
    )


def _interval(one: AblatedSet, language: str, other: str) -> str:
    if not one.intervals:
        return ""
    low, high = one.intervals[language][other]
    return "" if math.isnan(low) else f"[{number(low, '+.3f')}, {number(high, '+.3f')}]"


def _doses(study: Ablation, name: str) -> list[Markup]:
    whole = "of the model's neurons" if study.dose_of_model else "of the set"
    found = []
    for place, one in enumerate(study.sets):
        if not one.doses:
            continue
        shares = [dose.share for dose in one.doses]
        curves = []
        for language in study.languages:
            own = [dose.change[language][language] for dose in one.doses]
            ends = [
                dose.intervals[language][language] if dose.intervals else (math.nan, math.nan)
                for dose in one.doses
            ]
            others = [
                _mean([dose.change[language][k] for k in study.languages if k != language])
                for dose in one.doses
            ]
            curves.append(Curve(language, own, [low for low, _ in ends], [high for _, high in ends], others))
        found.append(
            doses_picture(
                f"{one.name}: rise of the ablated language (solid, with intervals) and mean rise of the others "
                "(dashed) as more of its neurons are ablated, the best first",
                shares,
                curves,
                f"share {whole}",
                f"{name}-doses-{place}",
            )
        )
        rows: list[list[Content]] = [
            [
                f"{100 * dose.share:.4g} %",
                span(tuple(dose.neurons.values())),
                *(f"{number(curve.own[i], '+.3f')} ({number(curve.others[i], '+.3f')})" for curve in curves),
            ]
            for i, dose in enumerate(one.doses)
        ]
        found.append(
            table(
                f"{one.name}: own language (mean of the others), nats a token",
                [f"share {whole}", "neurons", *study.languages],
                rows,
            )
        )
    return found


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
