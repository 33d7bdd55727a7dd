"""Result of ``broca tune``: all trials, the Pareto front, the chosen trial and its outcome on the report part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from editing.evaluation.outcome import Outcome
from editing.study.results import Report
from editing.study.trial import Goals, Trial
from neurons.files.json_file import Figure, document


@dataclass(frozen=True)
class Reported:
    """The chosen edit on the report part.

    Attributes:
        ceiling, continuations: as in ``Report``.
        goals_met: goal -> whether the edit meets it on the report part.
        outcomes: the base and the edit.
    """

    ceiling: Figure
    continuations: int
    goals_met: Mapping[str, bool]
    outcomes: tuple[Outcome, ...]


@dataclass(frozen=True)
class SearchResult:
    """A search from one language to another.

    Attributes:
        source, target: languages.
        goals: of the edit.
        ceiling: on the choosing part.
        trials: in the order in which they were tried.
        front: numbers of the trials on the Pareto front.
        chosen: number of the chosen trial.
        chosen_meets_goals: whether it meets all goals on the choosing part.
        why: the reason of the choice, in words.
        report: None if the search was stopped before its end.
        finished: whether the search ran to its end.
        about: identity, provenance and command, as JSON values.
    """

    source: str
    target: str
    goals: Goals
    ceiling: Figure
    trials: tuple[Trial, ...]
    front: tuple[int, ...]
    chosen: int
    chosen_meets_goals: bool
    why: str
    report: Reported | None
    finished: bool
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def choice(self) -> Trial:
        """The chosen trial."""
        return next(trial for trial in self.trials if trial.number == self.chosen)

    @property
    def result(self) -> Report | None:
        """``report`` in the form of ``broca evaluate``."""
        if self.report is None:
            return None
        return Report(
            self.source,
            self.target,
            self.report.ceiling,
            self.report.continuations,
            self.report.outcomes,
            about={"model": self.about.get("model")},
        )


def search_document(search: SearchResult) -> dict[str, Any]:
    """The JSON values of tune.json; trials also have the values derived from their fields, None if not measured.

    ``neurons.files.json_file.checked`` reads them back.
    """
    trials = [
        {
            **asdict(trial),
            "share": trial.share if trial.continuations else None,
            "rise": trial.rise if trial.nll_rise else None,
            "harm": trial.harm if trial.kl else None,
        }
        for trial in search.trials
    ]
    return {**document(search), "trials": trials, "report": search.report}
