"""An ablation study as a JSON document: written and read back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from neurons.ablation.matrix import Changes, Specificity, by_language, clear_of, largest_is_own, perplexity
from neurons.ablation.study import Dose, Effects, SetOutcome, Settings, Study
from neurons.errors import UsageError
from neurons.files.json_file import Figure, checked

Matrix = Mapping[str, Mapping[str, Figure]]


def study_document(study: Study) -> dict[str, Any]:
    """The JSON values of a study, for ``neurons.files.artifact.json_bytes``; ``study_of`` reads them back.

    ``baseline[j]``, ``ablated[i][j]`` and ``random[i][j]`` are mean negative log-likelihoods (nats a token)
    of language j, i being the language whose neurons, or their control, are ablated; ``random`` is the mean
    over ``random_draws``.  They are the first set's; ``sets`` holds all.  ``answers`` has the same for each measure of
    ``neurons.ablation.accuracy``.
    """
    languages = study.languages
    baseline = dict(zip(languages, study.baseline.tolist(), strict=True))
    sets = [_set_json(study, one) for one in study.sets]
    return {
        **study.metadata,
        "languages": list(languages),
        "texts": dict(zip(languages, study.texts, strict=True)),
        "tokens": dict(zip(languages, study.tokens, strict=True)),
        "unit": "nats a token",
        "baseline": baseline,
        "baseline_perplexity": {language: perplexity(nll) for language, nll in baseline.items()},
        **{key: value for key, value in sets[0].items() if key not in ("name", "method", "answers", "unit")},
        **(
            {
                "prompts": dict(zip(languages, study.prompts, strict=True)),
                "answers": {
                    measure: dict(zip(languages, of_untouched.tolist(), strict=True))
                    for measure, of_untouched in study.answers.items()
                },
            }
            if study.answers
            else {}
        ),
        "sets": sets,
    }


def _set_json(study: Study, one: SetOutcome) -> dict[str, Any]:
    languages = study.languages
    written: dict[str, Any] = {
        "name": one.name,
        "method": one.method,
        "unit": one.unit,
        "neurons": dict(zip(languages, one.sizes, strict=True)),
        "ablated": by_language(one.own.nll, languages),
        "perplexity": by_language(one.own.nll.exp(), languages),
        "perplexity_change": by_language(one.own.nll.exp() - study.baseline.exp(), languages),
        **_changes_json(one.own, languages),
        "own_is_largest": dict(zip(languages, largest_is_own(one.own), strict=True)),
        "specificity": one.specificity,
    }
    written |= _controls_json(one.controls, languages)
    for control, draws in one.controls.items():
        if draws:
            written[f"clear_of_{control}"] = dict(zip(languages, clear_of(one.own, draws), strict=True))
    if one.answers:
        written["answers"] = {
            measure: {
                "ablated": by_language(effects.own.nll, languages),
                **_changes_json(effects.own, languages),
                **_controls_json(effects.controls, languages, "ablated"),
            }
            for measure, effects in one.answers.items()
        }
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


def _controls_json(
    controls: Mapping[str, Sequence[Changes]], languages: Sequence[str], mean: str = "nll"
) -> dict[str, Any]:
    written: dict[str, Any] = {}
    for control, draws in controls.items():
        if draws:
            written[control] = by_language(torch.stack([draw.nll for draw in draws]).mean(0), languages)
            written[f"{control}_draws"] = [
                {mean: by_language(draw.nll, languages), **_changes_json(draw, languages)} for draw in draws
            ]
    return written


def _changes_json(changes: Changes, languages: Sequence[str]) -> dict[str, Any]:
    ends = torch.stack([changes.low, changes.high], dim=-1)
    return {"change": by_language(changes.change, languages), "intervals": by_language(ends, languages)}


@dataclass(frozen=True)
class _Matrices:
    """Of a document, ablated language -> measured language -> value; ``nll`` of a draw, ``ablated`` of all else."""

    change: Matrix
    intervals: Mapping[str, Mapping[str, tuple[Figure, Figure]]]
    ablated: Matrix = field(default_factory=dict)
    nll: Matrix = field(default_factory=dict)

    def changes(self, languages: Sequence[str]) -> Changes:
        nll, change, ends = (
            torch.tensor([[one[i][j] for j in languages] for i in languages], dtype=torch.float64)
            for one in (self.nll or self.ablated, self.change, self.intervals)
        )
        return Changes(nll, change, *ends.unbind(-1))


@dataclass(frozen=True, kw_only=True)
class _Dose(_Matrices):
    share: float
    neurons: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class _Effects(_Matrices):
    matched_draws: tuple[_Matrices, ...] = ()
    random_draws: tuple[_Matrices, ...] = ()

    def controls(self, languages: Sequence[str]) -> dict[str, tuple[Changes, ...]]:
        draws = {"matched": self.matched_draws, "random": self.random_draws}
        return {
            control: tuple(one.changes(languages) for one in some) for control, some in draws.items() if some
        }


@dataclass(frozen=True, kw_only=True)
class _Set(_Effects):
    name: str
    method: str
    neurons: Mapping[str, int]
    specificity: Specificity
    doses: tuple[_Dose, ...]
    answers: Mapping[str, _Effects] = field(default_factory=dict)
    unit: str = "neuron"

    def outcome(self, languages: Sequence[str]) -> SetOutcome:
        return SetOutcome(
            name=self.name,
            method=self.method,
            sizes=tuple(self.neurons[k] for k in languages),
            own=self.changes(languages),
            controls=self.controls(languages),
            doses=tuple(
                Dose(one.share, tuple(one.neurons[k] for k in languages), one.changes(languages))
                for one in self.doses
            ),
            specificity=self.specificity,
            answers={
                measure: Effects(effects.changes(languages), effects.controls(languages))
                for measure, effects in self.answers.items()
            },
            unit=self.unit,
        )


@dataclass(frozen=True)
class _Document:
    languages: Annotated[tuple[str, ...], Field(min_length=2)]
    texts: Mapping[str, int]
    tokens: Mapping[str, int]
    baseline: Mapping[str, Figure]
    sets: Annotated[tuple[_Set, ...], Field(min_length=1)]
    settings: Settings
    about: Mapping[str, Any]
    prompts: Mapping[str, int] = field(default_factory=dict)
    answers: Mapping[str, Mapping[str, Figure]] = field(default_factory=dict)


def study_of(value: Any, file: Path | str) -> Study:
    """The study of a document.

    Args:
        value: JSON values.
        file: for the refusal.

    Raises:
        UsageError: something else, by the field, or a language of which a figure is missing.
    """
    found = checked(_Document, value, file)
    languages = found.languages
    # The first set stands at the top too.
    derived = {"unit", "baseline_perplexity", *value["sets"][0]}
    try:
        return Study(
            languages=languages,
            texts=tuple(found.texts[k] for k in languages),
            tokens=tuple(found.tokens[k] for k in languages),
            baseline=torch.tensor([found.baseline[k] for k in languages], dtype=torch.float64),
            sets=tuple(one.outcome(languages) for one in found.sets),
            settings=found.settings,
            metadata={k: one for k, one in found.about.items() if k not in derived}
            | {"settings": value["settings"]},
            prompts=tuple(found.prompts[k] for k in languages) if found.prompts else (),
            answers={
                measure: torch.tensor([of_untouched[k] for k in languages], dtype=torch.float64)
                for measure, of_untouched in found.answers.items()
            },
        )
    except KeyError as error:
        raise UsageError(
            f"{file}: not a result of Broca's, or a damaged one: a figure of language {error} is missing"
        ) from error
