"""What ``broca tune`` leaves: every trial, the front, the one that was chosen, and how it does on the report part."""

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
        ceiling, continuations: as those of ``Report``.
        goals_met: goal -> whether it is met there.
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
        goals: what was to be reached.
        ceiling: on the text that was searched on.
        trials: in the order in which they were tried.
        front: numbers of the trials that no other is better than in everything.
        chosen: number of the trial that was chosen.
        chosen_meets_goals: on the text that was searched on.
        why: it was chosen, in words.
        report: None where the search was stopped before.
        finished: whether the search came to its end.
        about: its identity, and what it was made of and by which command, as JSON values.
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
        """The trial that was chosen."""
        return next(trial for trial in self.trials if trial.number == self.chosen)

    @property
    def result(self) -> Report | None:
        """The report part's, as ``broca evaluate`` would tell it."""
        one = self.report
        if one is None:
            return None
        about = {"model": self.about.get("model")}
        return Report(self.source, self.target, one.ceiling, one.continuations, one.outcomes, about=about)


def search_document(search: SearchResult) -> dict[str, Any]:
    """The JSON values of tune.json, which ``neurons.files.json_file.checked`` reads; trials with what follows from
    their figures."""
    trials = [
        {**asdict(trial), "share": trial.share, "rise": trial.rise, "harm": trial.harm}
        for trial in search.trials
    ]
    return {**document(search), "trials": trials, "report": search.report}
