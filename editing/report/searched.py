"""What ``broca tune`` found, read from its tune.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from editing.evaluation.evaluation import measured
from editing.report.provenance import Provenance, provenance
from editing.report.run_report import Report, report_from_json
from editing.study.search import Trial


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
        result: of the chosen edit on the report part; None where it was not reported.
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
    result: Report | None
    origin: Provenance

    @property
    def pair(self) -> str:
        return f"{self.source} to {self.target} " if self.target else ""


def read_search(value: Mapping[str, Any]) -> SearchResult:
    """From a tune.json.

    Raises:
        KeyError, TypeError, ValueError: something else.
    """
    chosen, report = value.get("chosen"), value.get("report") or {}
    shared = {key: value.get(key) for key in ("source", "target", "model", "fingerprint", "packages")}
    return SearchResult(
        source=str(value.get("source") or ""),
        target=str(value.get("target") or ""),
        ceiling=measured(value.get("ceiling")),
        trials=tuple(Trial.from_json(one, place) for place, one in enumerate(value["trials"])),
        front=tuple(map(_number, value["front"])),
        chosen=None if chosen is None else _number(chosen),
        why=str(value.get("why") or ""),
        finished=bool(value.get("finished", True)),
        goals=dict(value.get("goals") or {}),
        met={str(goal): bool(met) for goal, met in (report.get("goals_met") or {}).items()},
        result=report_from_json({**shared, **report}) if "outcomes" in report else None,
        origin=provenance(value),
    )


def _number(value: Any) -> int:
    return int(value["number"] if isinstance(value, Mapping) else value)
