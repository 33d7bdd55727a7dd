"""A file of answers scored as published benchmarks score: CLaS-Bench, and the Language Confusion Benchmark."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from editing.evaluation.language_confusion import PassRates, pass_rates
from editing.evaluation.language_forcing import Forcing, forcing
from editing.evaluation.relevance import harmonic_mean

ALL = "all"


@dataclass(frozen=True)
class OfQuestions:
    """Scores of the answers to the questions in one language, or in all.

    Attributes:
        forcing: CLaS-Bench (``editing.evaluation.language_forcing``).
        confusion: the Language Confusion Benchmark (``editing.evaluation.language_confusion``).
    """

    forcing: Forcing
    confusion: PassRates


@dataclass(frozen=True)
class AnswerScores:
    """Scores of a file of answers.

    Attributes:
        target: the language that the answers should be in; None: that of each question.
        questions: language of the questions, and last "all" -> scores.
        about: provenance.
    """

    target: str | None
    questions: Mapping[str, OfQuestions]
    about: Mapping[str, Any] = field(default_factory=dict)


def answer_scores(
    answers: Mapping[str, Sequence[str]],
    target: str | None,
    identify: Callable[[str], tuple[str, float]],
    ratings: Mapping[str, Sequence[int | None]],
    english: Collection[str] = (),
) -> dict[str, OfQuestions]:
    """Scores by language of the questions.  "all" has their unweighted means.

    Args:
        answers: language of the questions -> texts.
        target: as in ``AnswerScores``.
        identify: a text -> its language and the probability of it.
        ratings: language of the questions -> a judge's ratings; empty without a judge.
        english: as in ``pass_rates``.
    """
    result = {
        language: OfQuestions(
            forcing(texts, target or language, identify, ratings.get(language, ())),
            pass_rates(texts, target or language, identify, english),
        )
        for language, texts in answers.items()
    }
    if len(result) > 1:
        forced = [one.forcing for one in result.values()]
        passed = [one.confusion for one in result.values()]
        relevance = _mean([one.relevance for one in forced])
        share = _mean([one.forcing for one in forced]) or 0.0
        result[ALL] = OfQuestions(
            Forcing(
                share,
                relevance,
                None if relevance is None else harmonic_mean(share, relevance),
                sum(one.answers for one in forced),
                sum(one.rated for one in forced),
            ),
            PassRates(
                _mean([one.lines for one in passed]),
                _mean([one.words for one in passed]),
                _mean([one.both for one in passed]),
                sum(one.answers for one in passed),
            ),
        )
    return result


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
