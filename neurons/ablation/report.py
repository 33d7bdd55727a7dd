"""An ablation study told: as a JSON document, which can be read back, and as Markdown tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch

from neurons.ablation.matrix import Changes, Specificity, by_language, clear_of, largest_is_own, perplexity
from neurons.ablation.study import Dose, SetOutcome, Settings, Study, set_title


def as_json(study: Study, command: str | None = None) -> dict[str, Any]:
    """JSON values.

    ``baseline[j]``, ``ablated[i][j]`` and ``random[i][j]`` are mean negative log-likelihoods (nats a token)
    of language j, i being the language whose neurons, or their control, are ablated; ``random`` is the mean
    over ``random_draws``.  They are the first set's; ``sets`` holds all.

    Args:
        command: that makes the study again.
    """
    languages = study.languages
    baseline = dict(zip(languages, study.baseline.tolist(), strict=True))
    sets = [_set_json(study, one) for one in study.sets]
    return {
        **study.metadata,
        "command": command,
        "languages": list(languages),
        "texts": dict(zip(languages, study.texts, strict=True)),
        "tokens": dict(zip(languages, study.tokens, strict=True)),
        "unit": "nats a token",
        "baseline": baseline,
        "baseline_perplexity": {language: perplexity(nll) for language, nll in baseline.items()},
        **{key: value for key, value in sets[0].items() if key not in ("name", "method")},
        "sets": sets,
    }


def _set_json(study: Study, one: SetOutcome) -> dict[str, Any]:
    languages = study.languages
    written: dict[str, Any] = {
        "name": one.name,
        "method": one.method,
        "neurons": dict(zip(languages, one.sizes, strict=True)),
        "ablated": by_language(one.own.nll, languages),
        "perplexity": by_language(one.own.nll.exp(), languages),
        "perplexity_change": by_language(one.own.nll.exp() - study.baseline.exp(), languages),
        **_changes_json(one.own, languages),
        "own_is_largest": dict(zip(languages, largest_is_own(one.own), strict=True)),
        "specificity": {
            "value": one.specificity.value,
            "interval": [one.specificity.low, one.specificity.high],
            "own": one.specificity.own,
            "other": one.specificity.other,
        },
    }
    for control, draws in one.controls.items():
        if draws:
            mean = torch.stack([draw.nll for draw in draws]).mean(0)
            written[control] = by_language(mean, languages)
            written[f"{control}_draws"] = [
                {"nll": by_language(draw.nll, languages), **_changes_json(draw, languages)} for draw in draws
            ]
            written[f"clear_of_{control}"] = dict(zip(languages, clear_of(one.own, draws), strict=True))
    written["doses"] = [
        {
            "share": dose.share,
            "neurons": dict(zip(languages, dose.sizes, strict=True)),
            "ablated": by_language(dose.changes.nll, languages),
            **_changes_json(dose.changes, languages),
        }
        for dose in one.doses
    ]
    return written


def _changes_json(changes: Changes, languages: Sequence[str]) -> dict[str, Any]:
    low, high = by_language(changes.low, languages), by_language(changes.high, languages)
    return {
        "change": by_language(changes.change, languages),
        "intervals": {i: {j: [low[i][j], high[i][j]] for j in languages} for i in languages},
    }


def study_from_json(value: Mapping[str, Any]) -> Study:
    """What ``as_json`` gave, also an older Broca's: figures that it lacks, or has as null, are NaN, and counts 0.

    The metadata have the settings as the document says them: ``Study.settings`` has the default of those unsaid.

    Raises:
        KeyError, TypeError, ValueError, UsageError: something else.
    """
    languages = [str(name) for name in value["languages"]]
    if not languages:
        raise ValueError("it has no languages")
    known = {one.name for one in fields(Settings)}
    settings: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in (value.get("settings") or {}).items()
    }
    baseline = torch.tensor([_figure(value["baseline"][k]) for k in languages], dtype=torch.float64)
    return Study(
        languages=tuple(languages),
        texts=_sizes(value.get("texts"), languages),
        tokens=_sizes(value.get("tokens"), languages),
        baseline=baseline,
        sets=tuple(_set_from_json(one, languages) for one in value["sets"]),
        settings=Settings(**{k: v for k, v in settings.items() if k in known}),
        metadata={k: v for k, v in value.items() if k not in ("sets", *_KEYS)},
    )


_KEYS = ("languages", "texts", "tokens", "baseline")


def _set_from_json(value: Mapping[str, Any], languages: Sequence[str]) -> SetOutcome:
    found = value.get("specificity") or {}
    low, high = found.get("interval") or (None, None)
    return SetOutcome(
        name=str(value["name"]),
        method=str(value["method"]),
        sizes=_sizes(value["neurons"], languages),
        own=_changes(value, languages),
        controls={
            key.removesuffix("_draws"): tuple(_changes(draw, languages) for draw in draws)
            for key, draws in value.items()
            if key.endswith("_draws")
        },
        doses=tuple(
            Dose(float(one["share"]), _sizes(one["neurons"], languages), _changes(one, languages))
            for one in value.get("doses") or ()
        ),
        specificity=Specificity(
            *map(_figure, (found.get("value"), low, high, found.get("own"), found.get("other")))
        ),
    )


def _changes(value: Mapping[str, Any], languages: Sequence[str]) -> Changes:
    missing = {i: dict.fromkeys(languages) for i in languages}
    nll = value.get("nll") or value.get("ablated") or missing
    ends = value.get("intervals") or {i: dict.fromkeys(languages, (None, None)) for i in languages}
    return Changes(
        *(
            torch.tensor([[_figure(rows[i][j]) for j in languages] for i in languages], dtype=torch.float64)
            for rows in (
                nll,
                value["change"],
                *({i: {j: ends[i][j][end] for j in languages} for i in languages} for end in (0, 1)),
            )
        )
    )


def _sizes(value: Mapping[str, Any] | None, languages: Sequence[str]) -> tuple[int, ...]:
    return tuple(int(value[k]) for k in languages) if value else (0,) * len(languages)


def _figure(value: Any) -> float:
    return math.nan if value is None else float(value)


def as_markdown(study: Study) -> str:
    """Tables: specificity of all sets side by side, then each set's matrix, controls and doses."""
    percent = f"{study.settings.confidence:.0%}".replace("%", " %")
    parts = [
        f"Ablation ({_way(study)}), {sum(study.texts):,} texts; rise of the negative log-likelihood, nats a token,",
        f"with {percent} intervals over texts",
        "",
        _table(
            ["neuron set", "method", "neurons", "own", "others", "specificity", "own is largest"],
            [
                [
                    one.name,
                    one.method,
                    _range(one.sizes),
                    f"{one.specificity.own:+.4f}",
                    f"{one.specificity.other:+.4f}",
                    f"{one.specificity.value:.2f} [{one.specificity.low:.2f}, {one.specificity.high:.2f}]",
                    f"{sum(largest_is_own(one.own))} of {len(study.languages)}",
                ]
                for one in study.sets
            ],
            words=2,
        ),
    ]
    for one in study.sets:
        parts += ["", f"**{set_title(one.name, one.method)}**", "", _matrix(study, one)]
        if one.doses:
            parts += ["", f"**{one.name}**, doses: own language (mean of the others)", "", _doses(study, one)]
    return "\n".join(parts)


def _matrix(study: Study, one: SetOutcome) -> str:
    controls = {control: draws for control, draws in one.controls.items() if draws}
    rows = [["perplexity unablated", "", *(f"{perplexity(x):.2f}" for x in study.baseline.tolist())]]
    rows[0] += [""] * len(controls)
    for i, language in enumerate(study.languages):
        cells = [_cell(one.own, i, j) for j in range(len(study.languages))]
        cells[i] = f"**{cells[i]}**"
        beside = []
        for draws in controls.values():
            own = [float(draw.change[i, i]) for draw in draws]
            highest = max(float(draw.high[i, i]) for draw in draws)
            beside.append(f"{sum(own) / len(own):+.4f} (at most {highest:+.4f})")
        rows.append([f"ablated {language}", f"{one.sizes[i]:,}", *cells, *beside])
    head = ["", "neurons", *study.languages, *(f"{control}, own language" for control in controls)]
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
    return _table([f"share {whole}", "neurons", *study.languages], rows)


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
