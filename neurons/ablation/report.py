"""An ablation study told as Markdown tables."""

from __future__ import annotations

import math
from collections.abc import Sequence

from neurons.ablation.accuracy import ACCURACY, ANSWER_NLL
from neurons.ablation.matrix import Changes, largest_is_own, perplexity
from neurons.ablation.study import Effects, SetOutcome, Study, set_title, units_of

MEASURED = {ACCURACY: "accuracy", ANSWER_NLL: "negative log-likelihood of the answer (nats)"}


def as_markdown(study: Study) -> str:
    """Tables: specificity of all sets side by side, then each set's matrix, controls and doses."""
    percent = f"{study.settings.confidence:.0%}".replace("%", " %")
    parts = [
        f"Ablation ({_way(study)}), {sum(study.texts):,} texts; rise of the negative log-likelihood, nats a token,",
        f"with {percent} intervals over texts",
        "",
        _table(
            ["neuron set", "method", units_of(study), "own", "others", "specificity", "own is largest"],
            [
                [
                    one.name,
                    one.method,
                    _range(one.sizes),
                    f"{one.specificity.own:+.4f}",
                    f"{one.specificity.other:+.4f}",
                    "{:.2f} [{:.2f}, {:.2f}]".format(one.specificity.value, *one.specificity.interval),
                    f"{sum(largest_is_own(one.own))} of {len(study.languages)}",
                ]
                for one in study.sets
            ],
            words=2,
        ),
    ]
    for one in study.sets:
        unablated = [f"{perplexity(x):.2f}" for x in study.baseline.tolist()]
        matrix = _matrix(study, one, Effects(one.own, one.controls), ["perplexity unablated", "", *unablated])
        parts += ["", f"**{set_title(one.name, one.method)}**", "", matrix]
        for measure, effects in one.answers.items():
            unablated = [f"{x:.3f}" for x in study.answers[measure].tolist()]
            matrix = _matrix(
                study, one, effects, [f"{measure} unablated", "", *unablated], measure == ACCURACY
            )
            title = f"**{one.name}**, {MEASURED[measure]} of {sum(study.prompts):,} prompts, change"
            parts += ["", title, "", matrix]
        if one.doses:
            parts += ["", f"**{one.name}**, doses: own language (mean of the others)", "", _doses(study, one)]
    return "\n".join(parts)


def _matrix(
    study: Study, one: SetOutcome, effects: Effects, unablated: list[str], falls: bool = False
) -> str:
    controls = {control: draws for control, draws in effects.controls.items() if draws}
    rows = [[*unablated, *[""] * len(controls)]]
    for i, language in enumerate(study.languages):
        cells = [_cell(effects.own, i, j) for j in range(len(study.languages))]
        cells[i] = f"**{cells[i]}**"
        beside = []
        for draws in controls.values():
            own = [float(draw.change[i, i]) for draw in draws]
            if falls:
                bound = f"at least {min(float(draw.low[i, i]) for draw in draws):+.4f}"
            else:
                bound = f"at most {max(float(draw.high[i, i]) for draw in draws):+.4f}"
            beside.append(f"{sum(own) / len(own):+.4f} ({bound})")
        rows.append([f"ablated {language}", f"{one.sizes[i]:,}", *cells, *beside])
    head = ["", f"{one.unit}s", *study.languages, *(f"{control}, own language" for control in controls)]
    return _table(head, rows)


def _doses(study: Study, one: SetOutcome) -> str:
    rows = []
    count = len(study.languages)
    for dose in one.doses:
        own = dose.changes.change.diagonal()
        others = (dose.changes.change.sum(1) - own) / (count - 1)
        cells = [f"{a:+.4f} ({b:+.4f})" for a, b in zip(own.tolist(), others.tolist(), strict=True)]
        rows.append([f"{dose.share:.4g}", _range(dose.sizes), *cells])
    whole = "of the model" if study.settings.dose_of_model else "of the set"
    return _table([f"share {whole}", f"{one.unit}s", *study.languages], rows)


def _cell(changes: Changes, i: int, j: int) -> str:
    low, high = float(changes.low[i, j]), float(changes.high[i, j])
    interval = "" if math.isnan(low) else f" [{low:+.3f}, {high:+.3f}]"
    return f"{float(changes.change[i, j]):+.3f}{interval}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    marks = ["---" if i < words else "---:" for i in range(len(head))]
    lines = [head, marks, *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _range(sizes: Sequence[int]) -> str:
    low, high = min(sizes), max(sizes)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _way(study: Study) -> str:
    how = study.settings
    if how.way == "mean":
        return f"mean of {how.mean_of}" if how.mean_of else "mean of all text"
    return how.way
