"""Results of evaluations: methods on the text that is reported, and settings on the text that they were chosen on.

``broca evaluate`` and ``broca run`` write these to their files and read them back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from editing.evaluation.lens import LanguageLens
from editing.evaluation.outcome import Outcome, Refused
from neurons.files.json_file import Figure, checked, read_json


def _with_dose(outcome: Outcome) -> Outcome:
    if not isinstance(outcome.details.get("dose"), int | float):
        raise ValueError("should have a number, the dose, in its details")
    return outcome


@dataclass(frozen=True)
class Choice:
    """The settings that were tried and chosen.

    Attributes:
        source, target: languages.
        ceiling: on the text that settings were chosen on; NaN if unknown.
        chosen: title of a method -> its chosen settings.
        tried: all settings.
        about: provenance (``editing.study.provenance``) and command, as JSON values.
    """

    source: str
    target: str
    ceiling: Figure
    chosen: Mapping[str, Any]
    tried: tuple[Outcome | Refused, ...]
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """Steering from one language to another by several methods, on the report part of the text.

    A field that is None is not in the file: not every command writes it.

    Attributes:
        source, target: languages.
        ceiling: target-language rate of the unedited model on target prompts.
        continuations: number of answers that each rate is over.
        outcomes: the base first.
        notes: remarks for the reader.
        methods: names of the methods that were compared.
        tried: all their settings, on the part that settings were chosen on.
        curves: title -> the outcomes at fractions of the method's strength, ascending
            (``editing.study.dose_response``), each with ``details["dose"]``; empty if not measured.
        about: provenance (``editing.study.provenance``) and command, as JSON values.
        lens: the logit lens by language.
    """

    source: str
    target: str
    ceiling: Figure
    continuations: int
    outcomes: Annotated[tuple[Outcome, ...], Field(min_length=1)]
    notes: tuple[str, ...] | None = None
    methods: tuple[str, ...] | None = None
    tried: tuple[Outcome | Refused, ...] | None = None
    curves: Mapping[str, tuple[Annotated[Outcome, AfterValidator(_with_dose)], ...]] | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    lens: LanguageLens | None = None

    @property
    def model(self) -> str:
        """The model, as the user named it."""
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
        """The settings that were tried and chosen; None if nothing was compared."""
        if not self.tried:
            return None
        chosen = {outcome.name: outcome.details.get("settings") for outcome in self.outcomes}
        return Choice(self.source, self.target, math.nan, chosen, self.tried)


def report_of(value: Any, file: Path | str) -> Report:
    """The report in a JSON document, or in one entry of a run's report.json.

    Args:
        value: JSON values.
        file: for the error message.

    Raises:
        UsageError: not a report; the message names the field.
    """
    report = checked(Report, value, file)
    if report.curves is None:
        return report
    # The file has the keys in alphabetical order; restore the order of the outcomes.
    order = [*(outcome.name for outcome in report.outcomes), *report.curves]
    titles = sorted(report.curves, key=order.index)
    return replace(report, curves={title: report.curves[title] for title in titles})


def load_reports(path: Path) -> list[Report]:
    """The reports in a file of ``broca evaluate``, or in a measured-*.json or report.json of ``broca run``.

    Raises:
        UsageError: no such file, or not a report; the message names the field.
    """
    value = read_json(path)
    return [report_of(entry, path) for entry in (value if isinstance(value, list) else [value])]


def load_choice(path: Path) -> Choice:
    """The choice in a choice-*.json of ``broca run``.

    Raises:
        UsageError: no such file, or not a choice; the message names the field.
    """
    return checked(Choice, read_json(path), path)
