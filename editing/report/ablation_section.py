"""Section on an ablation study: a table of the neuron sets, a matrix for each, and dose-response curves."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import fmean
from typing import Any

from markupsafe import Markup

from editing.report.curves import Curve, dose_response_drawing
from editing.report.formats import count, number, span
from editing.report.heat_maps import Cell, HeatMap
from editing.report.inline_svg import Drawing
from editing.report.provenance import provenance
from editing.report.templating import rendered
from neurons.ablation.accuracy import ACCURACY
from neurons.ablation.matrix import largest_is_own, perplexity
from neurons.ablation.report import MEASURED
from neurons.ablation.study import Effects, SetOutcome, Study, set_title, units_of

MIN_SCALE = 0.1  # nats a token: smaller rises get no strong colour


def ablation_content(study: Study, name: str) -> Markup:
    """The section of one study.

    Args:
        study: the study.
        name: of the figures, unique in the page.
    """
    scale = max(map(_largest_change, study.sets), default=0.0) or 1.0
    return rendered(
        "ablation",
        part=provenance(study.metadata).part,
        units=units_of(study),
        way=f"mean of {study.settings.mean_of}" if study.settings.mean_of else study.settings.way,
        confidence=study.settings.confidence,
        tokens=sum(study.tokens),
        sets=[_row(outcome) for outcome in study.sets],
        matrices=[
            (set_title(outcome.name, outcome.method), matrix)
            for outcome in study.sets
            for matrix in (_losses(study, outcome, scale), *_answers(study, outcome))
        ],
        doses=[
            _dose_response(study, outcome, f"{name}-doses-{i}")
            for i, outcome in enumerate(study.sets)
            if outcome.doses
        ],
    )


def _largest_change(outcome: SetOutcome) -> float:
    return max((abs(x) for x in outcome.own.change.flatten().tolist() if not math.isnan(x)), default=0.0)


def _row(outcome: SetOutcome) -> list[str]:
    specificity, largest = outcome.specificity, largest_is_own(outcome.own)
    low, high = (number(end, ".2f") for end in specificity.interval)
    return [
        outcome.name,
        outcome.method,
        span(outcome.sizes),
        number(specificity.own, "+.4f"),
        number(specificity.other, "+.4f"),
        f"{number(specificity.value, '.2f')} [{low}, {high}]",
        f"{sum(largest)} of {len(largest)}",
    ]


def _losses(study: Study, outcome: SetOutcome, scale: float) -> HeatMap:
    unablated = ", ".join(
        f"{language} {number(perplexity(nll), '.1f')}"
        for language, nll in zip(study.languages, study.baseline.tolist(), strict=True)
    )
    caption = (
        f"{outcome.name}: rise of each language's NLL (columns) without each language's {outcome.unit}s (rows). Perplexity "
        f"unablated: {unablated}."
    )
    effects = Effects(outcome.own, outcome.controls)
    return _matrix(study, outcome, effects, caption, "nats a token", scale)


def _answers(study: Study, outcome: SetOutcome) -> Iterator[HeatMap]:
    for measure, effects in outcome.answers.items():
        unablated = ", ".join(
            f"{language} {number(value, '.3f')}"
            for language, value in zip(study.languages, study.answers[measure].tolist(), strict=True)
        )
        caption = (
            f"{outcome.name}: change of the {MEASURED[measure]} of each language's prompts (columns, "
            f"{sum(study.prompts)} prompts) without each language's {outcome.unit}s (rows). Unablated: {unablated}."
        )
        scale = float(effects.own.change.abs().max()) or 1.0
        unit = "fraction of answers" if measure == ACCURACY else "nats"
        yield _matrix(study, outcome, effects, caption, unit, scale)


def _matrix(
    study: Study, outcome: SetOutcome, effects: Effects, caption: str, unit: str, scale: float
) -> HeatMap:
    controls = {control: draws for control, draws in effects.controls.items() if draws}
    rows = []
    for i, language in enumerate(study.languages):
        cells = [
            Cell(value, number(value, "+.3f"), _interval(low, high), strong=i == j)
            for j, (value, low, high) in enumerate(
                zip(
                    *(
                        values[i].tolist()
                        for values in (effects.own.change, effects.own.low, effects.own.high)
                    ),
                    strict=True,
                )
            )
        ]
        control_rises = [
            number(fmean(float(draw.change[i, i]) for draw in draws), "+.4f") for draws in controls.values()
        ]
        cells += [Cell(math.nan, text, plain=True) for text in (count(outcome.sizes[i]), *control_rises)]
        rows.append((f"{language} ablated", cells))
    return HeatMap(
        caption,
        [
            "",
            *study.languages,
            f"{outcome.unit}s",
            *(f"own rise, {control} {outcome.unit}s" for control in controls),
        ],
        rows,
        unit,
        scale=scale,
        min_scale=MIN_SCALE,
    )


def _interval(low: float, high: float) -> str:
    return "" if math.isnan(low) else f"[{number(low, '+.3f')}, {number(high, '+.3f')}]"


def _dose_response(study: Study, outcome: SetOutcome, name: str) -> tuple[Drawing, dict[str, Any]]:
    """The curves, and the caption, head and rows of their table."""
    axis = f"share of the model's {outcome.unit}s" if study.settings.dose_of_model else "share of the set"
    doses = sorted(outcome.doses, key=lambda dose: dose.share)
    curves = []
    for i, language in enumerate(study.languages):
        rise, low, high = (
            [float(getattr(dose.changes, end)[i, i]) for dose in doses] for end in ("change", "low", "high")
        )
        rows = [dose.changes.change[i].tolist() for dose in doses]
        others = [fmean(row[:i] + row[i + 1 :]) if len(row) > 1 else math.nan for row in rows]
        curves.append(Curve(language, rise, low, high, others))
    caption = (
        f"{outcome.name}: rise of the ablated language (solid, with intervals) and mean rise of the others (dashed) as "
        "more of its neurons are ablated, the best first"
    )
    table = {
        "caption": f"{outcome.name}: own language (mean of the others), nats a token",
        "head": [axis, f"{outcome.unit}s", *study.languages],
        "rows": [
            [
                f"{100 * dose.share:.4g} %",
                span(dose.sizes),
                *(f"{number(curve.rise[i], '+.3f')} ({number(curve.others[i], '+.3f')})" for curve in curves),
            ]
            for i, dose in enumerate(doses)
        ],
    }
    return dose_response_drawing(caption, [dose.share for dose in doses], curves, axis, name), table
