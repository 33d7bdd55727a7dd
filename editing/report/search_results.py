"""What ``broca tune`` tried, read from its tune.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from editing.report.provenance import Provenance, provenance
from editing.report.steering_results import Steering, by_name, measured, read_steering


@dataclass(frozen=True)
class Trial:
    """One edit that was tried.

    Attributes:
        number: in the order in which they were tried.
        method: of the edit.
        settings: of the method.
        state: "measured", or why not in a word.
        share: of the continuations, in the target; NaN where it is not known.
        fluency_gap: nats a token; NaN where it was not measured.
        rise: the largest NLL rise of a third language, nats a token; NaN likewise.
        harm: the third languages' mean KL, nats; NaN likewise.
        why: it was given up, in words.
    """

    number: int
    method: str
    settings: Mapping[str, Any]
    state: str
    share: float
    fluency_gap: float
    rise: float
    harm: float
    why: str

    @property
    def whole(self) -> bool:
        """Whether it was measured to its end."""
        return self.state == "measured"

    @property
    def idle(self) -> bool:
        """Whether it changes nothing, so that there was nothing to measure."""
        return self.state == "changes nothing"


@dataclass(frozen=True)
class SearchResult:
    """A search from one language to another.

    Attributes:
        source, target: languages; empty where the file does not say.
        ceiling: on the text that was searched on; NaN where it is not known.
        trials: in the order in which they were tried.
        front: numbers of the trials that no other is better than in everything.
        chosen: number of the trial taken; None where there is none.
        why: it was chosen, in words.
        finished: whether the search came to its end.
        goals: what was to be reached.
        met: goal -> whether the chosen edit meets it on the report part; empty where it was not reported.
        results: of the chosen edit on the report part.
        origin: where it comes from.
    """

    source: str
    target: str
    ceiling: float
    trials: tuple[Trial, ...]
    front: tuple[int, ...]
    chosen: int | None
    why: str
    finished: bool
    goals: Mapping[str, Any]
    met: Mapping[str, bool]
    results: tuple[Steering, ...]
    origin: Provenance


def read_search(value: Mapping[str, Any]) -> SearchResult:
    """From a tune.json.

    Raises:
        KeyError, TypeError, ValueError: something else.
    """
    chosen = value.get("chosen")
    return SearchResult(
        source=str(value.get("source") or ""),
        target=str(value.get("target") or ""),
        ceiling=measured(value.get("ceiling")),
        trials=tuple(_trial(one, place) for place, one in enumerate(value["trials"])),
        front=tuple(_number(one) for one in value["front"]),
        chosen=None if chosen is None else _number(chosen),
        why=str(value.get("why") or ""),
        finished=bool(value.get("finished", True)),
        goals=dict(value.get("goals") or {}),
        met={str(goal): bool(met) for goal, met in _report(value).get("goals_met", {}).items()},
        results=tuple(_results(value)),
        origin=provenance(value),
    )


def _report(value: Mapping[str, Any]) -> Mapping[str, Any]:
    return value.get("report") or {}


def _results(value: Mapping[str, Any]) -> list[Steering]:
    report = _report(value)
    if "outcomes" not in report:
        return []
    shared = {key: value.get(key) for key in ("source", "target", "model", "fingerprint", "packages")}
    return [read_steering({**shared, **report})]


def _trial(value: Mapping[str, Any], place: int) -> Trial:
    rises, divergences = by_name(value.get("nll_rise")), by_name(value.get("kl"))
    continuations = int(value.get("continuations") or 0)
    share = measured(value.get("share")) if continuations else math.nan
    if math.isnan(share) and continuations:
        share = float(value["found"]) / continuations
    return Trial(
        number=int(value.get("number", place)),
        method=str(value["method"]),
        settings=dict(value["settings"]),
        state=str(value.get("state", "measured")),
        share=share,
        fluency_gap=measured(value.get("fluency_gap")),
        rise=max(rises.values(), default=math.nan),
        harm=sum(divergences.values()) / len(divergences) if divergences else math.nan,
        why=str(value.get("why") or ""),
    )


def _number(value: Any) -> int:
    return int(value["number"] if isinstance(value, Mapping) else value)
