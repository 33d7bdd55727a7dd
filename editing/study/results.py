"""What an evaluation leaves: ways of steering on the text that is reported, and settings on the text that they were
chosen on.  Every file of ``broca evaluate`` and ``broca run`` is made from these, and read back into them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from editing.evaluation.outcome import Outcome, Refused
from neurons.files.json_file import Figure, checked, read_json


def _dosed(outcome: Outcome) -> Outcome:
    if not isinstance(outcome.details.get("dose"), int | float):
        raise ValueError("should have a number, the dose, in its details")
    return outcome


@dataclass(frozen=True)
class Choice:
    """The settings that were tried to choose from.

    Attributes:
        source, target: languages.
        ceiling: on the text that settings were chosen on; NaN where it is not known.
        chosen: way -> its settings.
        tried: every setting.
        about: what it was made of and by which command (``editing.study.origin``), as JSON values.
    """

    source: str
    target: str
    ceiling: Figure
    chosen: Mapping[str, Any]
    tried: tuple[Outcome | Refused, ...]
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """All ways of steering from one language to another, on the report part of the text.

    None, of what not every command leaves: the file does not have it.

    Attributes:
        source, target: languages.
        ceiling: share of the target that the unedited model reaches on target prompts.
        continuations: how many each share is over.
        outcomes: the base first.
        notes: what a reader should know beside the numbers.
        methods: names of the ways that were compared.
        tried: every setting of theirs, on the part that settings were chosen on.
        curves: title -> the outcomes of a way's doses, ascending (``editing.study.doses``), each with
            ``details["dose"]``; empty where none were asked for.
        about: what the figures were made of and by which command (``editing.study.origin``), as JSON values.
    """

    source: str
    target: str
    ceiling: Figure
    continuations: int
    outcomes: Annotated[tuple[Outcome, ...], Field(min_length=1)]
    notes: tuple[str, ...] | None = None
    methods: tuple[str, ...] | None = None
    tried: tuple[Outcome | Refused, ...] | None = None
    curves: Mapping[str, tuple[Annotated[Outcome, AfterValidator(_dosed)], ...]] | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> str:
        """As the user named it."""
        return str(self.about.get("model") or "")

    @property
    def title(self) -> str:
        return (
            f"{self.source} to {self.target}, {self.continuations} continuations, ceiling {self.ceiling:.2f}"
        )

    @property
    def third_languages(self) -> list[str]:
        return [k for k in self.outcomes[0].nll_rise if k not in (self.source, self.target)]

    @property
    def choice(self) -> Choice | None:
        """What settings were chosen from; None where nothing was compared."""
        if not self.tried:
            return None
        chosen = {way.name: way.details.get("settings") for way in self.outcomes}
        return Choice(self.source, self.target, math.nan, chosen, self.tried)


def report_of(value: Any, file: Path | str) -> Report:
    """The report of a document; of a run's report.json, of one of its entries.

    Args:
        value: JSON values.
        file: for the refusal.

    Raises:
        UsageError: something else, by the field.
    """
    found = checked(Report, value, file)
    if found.curves is None:
        return found
    # JSON has its keys in the alphabet's order.
    titles = sorted(found.curves, key=[*(one.name for one in found.outcomes), *found.curves].index)
    return replace(found, curves={title: found.curves[title] for title in titles})


def load_reports(path: Path) -> list[Report]:
    """What a file of ``broca evaluate`` or a measured-*.json of ``broca run`` holds, or its report.json of several.

    Raises:
        UsageError: no such file, or something else, by the field.
    """
    value = read_json(path)
    return [report_of(one, path) for one in (value if isinstance(value, list) else [value])]


def load_choice(path: Path) -> Choice:
    """What a choice-*.json of ``broca run`` holds.

    Raises:
        UsageError: no such file, or something else, by the field.
    """
    return checked(Choice, read_json(path), path)
