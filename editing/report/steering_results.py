"""What ``broca run`` and ``broca evaluate`` measured, read from their JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from editing.evaluation.evaluation import Outcome
from editing.report.provenance import Provenance, provenance
from editing.report.samples import Sample

# Fields of an outcome that have places of their own.
_KNOWN = frozenset(("name", "target_share", "source_share", "distinct", "fluency_gap"))


@dataclass(frozen=True)
class Way:
    """One way of steering, measured.

    Attributes:
        name: of the way.
        target_share, source_share: of the continuations; NaN where it is not known.
        distinct: mean share of distinct words.
        fluency_gap: nats a token.
        nll_rise: language -> nats a token.
        kl: third language -> nats a position.
        samples: what it wrote.
        details: settings and what else is known.
        further: figure -> value, of those that have no place of their own.
        failures: label -> how many answers count as nothing.
        relevance: name of the scorer, and figure -> value; "" and none where it was not measured.
        others: other language -> figure -> value, of answers to its own prompts.
        refused: why there is nothing to measure; empty where there is.
    """

    name: str
    target_share: float
    source_share: float
    distinct: float
    fluency_gap: float
    nll_rise: Mapping[str, float]
    kl: Mapping[str, float]
    samples: tuple[Sample, ...]
    details: Mapping[str, Any]
    further: Mapping[str, float]
    failures: Mapping[str, int]
    relevance: tuple[str, Mapping[str, float]]
    others: Mapping[str, Mapping[str, float]]
    refused: str = ""


@dataclass(frozen=True)
class Steering:
    """All ways of steering from one language to another.

    Attributes:
        source, target: languages.
        ceiling: share of the target that the unedited model reaches on target prompts.
        continuations: that each share is over.
        ways: the base first.
        notes: what a reader should know beside the numbers.
        origin: where it comes from.
        curves: way -> its outcomes at parts of its strength, ascending, each with ``details["dose"]``; empty
            where no doses were asked for.
    """

    source: str
    target: str
    ceiling: float
    continuations: int
    ways: tuple[Way, ...]
    notes: tuple[str, ...]
    origin: Provenance
    curves: Mapping[str, tuple[Outcome, ...]] = field(default_factory=dict)

    @property
    def languages(self) -> list[str]:
        """The target first and the source last: that its own text becomes less likely is what steering is for."""
        named = dict.fromkeys(language for way in self.ways for language in way.nll_rise)
        ends = (self.target, self.source)
        return [k for k in [self.target, *(k for k in named if k not in ends), self.source] if k in named]

    @property
    def key(self) -> tuple[Any, ...]:
        """What two files that hold the same measurement have in common."""
        return (
            self.source,
            self.target,
            self.continuations,
            tuple(repr((way.name, way.target_share, way.fluency_gap, way.nll_rise)) for way in self.ways),
            tuple((name, *(one.details["dose"] for one in doses)) for name, doses in self.curves.items()),
        )


@dataclass(frozen=True)
class Choice:
    """The settings that were tried to choose from.

    Attributes:
        target: language.
        ceiling: on the text that settings were chosen on; NaN where it is not known.
        chosen: way -> its settings.
        tried: every setting, measured.
        source: language; empty where the file does not say.
    """

    target: str
    ceiling: float
    chosen: Mapping[str, Any]
    tried: tuple[Way, ...]
    source: str = ""


def read_steering(value: Mapping[str, Any]) -> Steering:
    """From a measured-*.json, an entry of a report.json, or what ``broca evaluate`` wrote.

    Raises:
        KeyError, TypeError, ValueError: something else.
    """
    return Steering(
        source=str(value["source"]),
        target=str(value["target"]),
        ceiling=measured(value["ceiling"]),
        continuations=int(value["continuations"]),
        ways=tuple(map(read_way, value["outcomes"])),
        notes=tuple(map(str, value.get("notes") or ())),
        origin=provenance(value),
        curves=_curves(value.get("curves") or {}, [str(one["name"]) for one in value["outcomes"]]),
    )


def read_choice(value: Mapping[str, Any], target: str) -> Choice:
    """From a choice-*.json.

    Args:
        target: where the file does not say.

    Raises:
        KeyError, TypeError, ValueError: something else.
    """
    return Choice(
        target=str(value.get("target") or target),
        ceiling=measured(value["ceiling"]),
        chosen=dict(value["chosen"]),
        tried=tuple(map(read_way, value["tried"])),
        source=str(value.get("source") or ""),
    )


def read_tried(value: Mapping[str, Any]) -> Choice | None:
    """The settings that ``broca evaluate --methods`` tried; None where it compared nothing.

    Raises:
        KeyError, TypeError, ValueError: something else.
    """
    if not value.get("tried"):
        return None
    outcomes = map(read_way, value["outcomes"])
    return Choice(
        target=str(value["target"]),
        ceiling=math.nan,
        chosen={way.name: way.details.get("settings") for way in outcomes},
        tried=tuple(map(read_way, value["tried"])),
        source=str(value["source"]),
    )


def read_way(value: Mapping[str, Any]) -> Way:
    """One outcome, or a setting that was refused."""
    details = dict(value.get("details") or {})
    if "settings" in value:
        details.setdefault("settings", value["settings"])
    refused = str(value.get("refused") or "")
    further = {
        key: float(item)
        for key, item in value.items()
        if key not in _KNOWN and isinstance(item, int | float) and not isinstance(item, bool)
    }
    return Way(
        name=str(value["name"]),
        target_share=measured(value.get("target_share") if refused else value["target_share"]),
        source_share=measured(value.get("source_share")),
        distinct=measured(value.get("distinct")),
        fluency_gap=measured(value.get("fluency_gap")),
        nll_rise=by_name(value.get("nll_rise")),
        kl=by_name(value.get("kl")),
        samples=tuple(
            Sample(str(one["prompt"]), str(one["continuation"]), str(one.get("language", "")))
            for one in value.get("samples") or ()
        ),
        details=details,
        further=further,
        failures={str(key): int(item) for key, item in (value.get("failures") or {}).items()},
        relevance=_relevance(value.get("relevance") or {}),
        others={str(key): by_name(item) for key, item in (value.get("others") or {}).items()},
        refused=refused,
    )


def _curves(value: Mapping[str, Any], ways: Sequence[str]) -> dict[str, tuple[Outcome, ...]]:
    """Way -> its doses, in the ways' own order: JSON has its keys in the alphabet's."""
    order = {name: place for place, name in enumerate(ways)}
    names = sorted(map(str, value), key=lambda name: (order.get(name, len(order)), name))
    return {name: tuple(map(_read_dose, value[name])) for name in names}


def _read_dose(value: Mapping[str, Any]) -> Outcome:
    """One outcome at part of the strength: the figures that doses are set side by side by, and its details."""
    way = read_way(value)
    return Outcome(
        name=way.name,
        target_share=way.target_share,
        source_share=way.source_share,
        distinct=way.distinct,
        fluency_gap=way.fluency_gap,
        nll={},
        nll_rise=dict(way.nll_rise),
        kl=dict(way.kl),
        languages_found={},
        samples=(),
        details={**way.details, "dose": float(way.details["dose"])},
    )


def _relevance(value: Mapping[str, Any]) -> tuple[str, Mapping[str, float]]:
    return str(value.get("scorer", "")), by_name({k: v for k, v in value.items() if k != "scorer"})


def measured(value: Any) -> float:
    """A figure; NaN where the file has null, which is how JSON says that nothing was measured."""
    return math.nan if value is None else float(value)


def by_name(value: Mapping[str, Any] | None) -> dict[str, float]:
    return {str(key): measured(item) for key, item in (value or {}).items()}
