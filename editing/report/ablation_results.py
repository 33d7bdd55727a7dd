"""What ``broca ablate`` found, read from its JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from editing.report.provenance import Provenance, provenance
from editing.report.steering_results import by_name, measured

Matrix = Mapping[str, Mapping[str, float]]
Intervals = Mapping[str, Mapping[str, tuple[float, float]]]


@dataclass(frozen=True)
class Dose:
    """One point of the dose curves: share ablated, neurons by language, rises and their intervals."""

    share: float
    neurons: Mapping[str, int]
    change: Matrix
    intervals: Intervals


@dataclass(frozen=True)
class AblatedSet:
    """What ablating one neuron set does.

    Attributes:
        name: of the set.
        method: that found it.
        neurons: language -> how many.
        change: ablated language -> language -> rise, nats a token.
        intervals: of the rises; empty where the file has none.
        specificity: value, low, high.
        own, other: mean rise of the ablated language and of the others, nats a token.
        controls: control -> language -> rise of its own language, mean over draws.
        doses: in ascending order of share.
    """

    name: str
    method: str
    neurons: Mapping[str, int]
    change: Matrix
    intervals: Intervals
    specificity: tuple[float, float, float]
    own: float
    other: float
    controls: Mapping[str, Mapping[str, float]]
    doses: tuple[Dose, ...]


@dataclass(frozen=True)
class Ablation:
    """A whole study.

    Attributes:
        languages: in order.
        perplexity: of the untouched model, by language.
        tokens: predicted, by language.
        sets: a neuron set each.
        way: what took the place of the values.
        confidence: of the intervals; NaN where it is not known.
        dose_of_model: whether doses are shares of the model's neurons, not of the set's.
        origin: where it comes from.
    """

    languages: tuple[str, ...]
    perplexity: Mapping[str, float]
    tokens: Mapping[str, int]
    sets: tuple[AblatedSet, ...]
    way: str
    confidence: float
    dose_of_model: bool
    origin: Provenance


def read_ablation(value: Mapping[str, Any]) -> Ablation:
    """From the JSON of a study.

    Raises:
        KeyError, TypeError, ValueError: something else.
    """
    languages = tuple(map(str, value["languages"]))
    settings = value.get("settings") or {}
    way = str(settings.get("way", "not said"))
    if settings.get("mean_of"):
        way = f"mean of {settings['mean_of']}"
    baseline = by_name(value["baseline"])
    return Ablation(
        languages=languages,
        perplexity={language: _perplexity(baseline[language]) for language in languages},
        tokens=_counts(value.get("tokens") or {}),
        sets=tuple(_set(one, languages) for one in value["sets"]),
        way=way,
        confidence=measured(settings.get("confidence")),
        dose_of_model=bool(settings.get("dose_of_model")),
        origin=provenance(value),
    )


def _set(value: Mapping[str, Any], languages: Sequence[str]) -> AblatedSet:
    found = value.get("specificity") or {}
    low, high = found.get("interval") or (None, None)
    controls = {}
    for key, draws in value.items():
        if key.endswith("_draws") and draws:
            controls[key.removesuffix("_draws")] = {
                k: sum(measured(draw["change"][k][k]) for draw in draws) / len(draws) for k in languages
            }
    doses = [
        Dose(
            share=float(one["share"]),
            neurons=_counts(one["neurons"]),
            change=_matrix(one["change"], languages),
            intervals=_intervals(one.get("intervals"), languages),
        )
        for one in value.get("doses") or ()
    ]
    return AblatedSet(
        name=str(value["name"]),
        method=str(value["method"]),
        neurons=_counts(value["neurons"]),
        change=_matrix(value["change"], languages),
        intervals=_intervals(value.get("intervals"), languages),
        specificity=(measured(found.get("value")), measured(low), measured(high)),
        own=measured(found.get("own")),
        other=measured(found.get("other")),
        controls=controls,
        doses=tuple(sorted(doses, key=lambda dose: dose.share)),
    )


def _matrix(value: Mapping[str, Any], languages: Sequence[str]) -> Matrix:
    return {i: {j: measured(value[i][j]) for j in languages} for i in languages}


def _intervals(value: Mapping[str, Any] | None, languages: Sequence[str]) -> Intervals:
    if not value:
        return {}
    return {
        i: {j: (measured(value[i][j][0]), measured(value[i][j][1])) for j in languages} for i in languages
    }


def _counts(value: Mapping[str, Any]) -> dict[str, int]:
    return {str(key): int(item) for key, item in value.items()}


def _perplexity(nll: float) -> float:
    # Past this the exponential is no number of this machine's.
    return math.exp(nll) if nll < 700 else math.inf
