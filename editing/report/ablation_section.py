"""An ablation study: neuron sets side by side, a matrix each, and dose curves."""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any

from markupsafe import Markup

from editing.report.curves import Curve, doses_picture
from editing.report.formats import count, number, span
from editing.report.heat_maps import Cell, HeatMap
from editing.report.inline_svg import Drawing
from editing.report.provenance import provenance
from editing.report.templating import rendered
from neurons.ablation.matrix import perplexity
from neurons.ablation.study import SetOutcome, Study, set_title

LEAST_RISE = 0.1  # nats a token; less is no cause for a strong colour


def ablation_content(study: Study, name: str) -> Markup:
    """Everything of one study.

    Args:
        name: tells its pictures from another study's.
    """
    most = max((_most(one) for one in study.sets), default=0.0) or 1.0
    return rendered(
        "ablation",
        part=provenance(study.metadata).part,
        way=f"mean of {study.settings.mean_of}" if study.settings.mean_of else study.settings.way,
        confidence=study.settings.confidence,
        tokens=sum(study.tokens),
        sets=[_row(one) for one in study.sets],
        matrices=[(set_title(one.name, one.method), _matrix(study, one, most)) for one in study.sets],
        doses=[_doses(study, one, f"{name}-doses-{i}") for i, one in enumerate(study.sets) if one.doses],
    )


def _most(one: SetOutcome) -> float:
    return max((abs(x) for x in one.own.change.flatten().tolist() if not math.isnan(x)), default=0.0)


def _row(one: SetOutcome) -> list[str]:
    found, own = one.specificity, one.own.change.diagonal()
    largest = int(((own >= one.own.change.amax(1)) & (own > 0)).sum())
    low, high = (number(end, ".2f") for end in found.interval)
    return [
        one.name,
        one.method,
        span(one.sizes),
        number(found.own, "+.4f"),
        number(found.other, "+.4f"),
        f"{number(found.value, '.2f')} [{low}, {high}]",
        f"{largest} of {len(own)}",
    ]


def _matrix(study: Study, one: SetOutcome, most: float) -> HeatMap:
    controls = {control: draws for control, draws in one.controls.items() if draws}
    rows = []
    for i, language in enumerate(study.languages):
        cells = [
            Cell(value, number(value, "+.3f"), _interval(low, high), strong=i == j)
            for j, (value, low, high) in enumerate(
                zip(*(ends[i].tolist() for ends in (one.own.change, one.own.low, one.own.high)), strict=True)
            )
        ]
        beside = [
            number(fmean(float(draw.change[i, i]) for draw in draws), "+.4f") for draws in controls.values()
        ]
        cells += [Cell(math.nan, text, plain=True) for text in (count(one.sizes[i]), *beside)]
        rows.append((f"{language} ablated", cells))
    unablated = ", ".join(
        f"{language} {number(perplexity(nll), '.1f')}"
        for language, nll in zip(study.languages, study.baseline.tolist(), strict=True)
    )
    return HeatMap(
        f"{one.name}: rise of each language's NLL (columns) without each language's neurons (rows). Perplexity "
        f"unablated: {unablated}.",
        ["", *study.languages, "neurons", *(f"own rise, {control} neurons" for control in controls)],
        rows,
        "nats a token",
        most=most,
        least=LEAST_RISE,
    )


def _interval(low: float, high: float) -> str:
    return "" if math.isnan(low) else f"[{number(low, '+.3f')}, {number(high, '+.3f')}]"


def _doses(study: Study, one: SetOutcome, name: str) -> tuple[Drawing, dict[str, Any]]:
    """The curves, and the caption, head and rows of their table."""
    share = f"share of the {'model' if study.settings.dose_of_model else 'set'}"
    share += "'s neurons" if study.settings.dose_of_model else ""
    doses = sorted(one.doses, key=lambda dose: dose.share)
    curves = []
    for i, language in enumerate(study.languages):
        own, low, high = (
            [float(getattr(dose.changes, end)[i, i]) for dose in doses] for end in ("change", "low", "high")
        )
        rows = [dose.changes.change[i].tolist() for dose in doses]
        others = [fmean(row[:i] + row[i + 1 :]) if len(row) > 1 else math.nan for row in rows]
        curves.append(Curve(language, own, low, high, others))
    caption = (
        f"{one.name}: rise of the ablated language (solid, with intervals) and mean rise of the others (dashed) as "
        "more of its neurons are ablated, the best first"
    )
    table = {
        "caption": f"{one.name}: own language (mean of the others), nats a token",
        "head": [share, "neurons", *study.languages],
        "rows": [
            [
                f"{100 * dose.share:.4g} %",
                span(dose.sizes),
                *(f"{number(curve.own[i], '+.3f')} ({number(curve.others[i], '+.3f')})" for curve in curves),
            ]
            for i, dose in enumerate(doses)
        ],
    }
    return doses_picture(caption, [dose.share for dose in doses], curves, share, name), table
