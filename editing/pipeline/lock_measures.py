"""Figures of a language lock on the REPORT questions, compared with the unedited and the prompted model.

Questions in the source languages are answered by the unedited model ("base"), the unedited model with the instruction
("prompted", the reference) and the edited model ("steered").  Questions in kept languages are answered by the unedited
and the edited model.  A divergence is the KL of whole next-token distributions, nats a token: from the prompted model on
the prompted model's answers, or from the unedited model on the unedited model's answers.  With thoughts, these have the
same figures apart; answers are read after the thought of their own model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from editing.evaluation.answer_language import AnswerLanguage, answer_language
from editing.evaluation.asking import CHAT, Prompt
from editing.evaluation.generation import Continuation
from editing.evaluation.questions import Questions, questions_of_part
from editing.evaluation.relevance import ChrfScorer, Scorer
from editing.methods.distilled_values import mean_divergences
from editing.pipeline.lock_kinds import Lock
from editing.pipeline.lock_prompts import REPORT
from editing.pipeline.lock_replies import Reply, replies
from editing.pipeline.lock_text import (
    ANSWER_TOKENS,
    Asked,
    Stage,
    Taught,
    base_replies,
    lessons,
    plain_prompts,
    quiet,
    taught,
)
from editing.plans.applied import applied
from editing.plans.plan import Plan
from neurons.models.source import LoadedModel

BASE, PROMPTED, STEERED = MODELS = ("base", "prompted", "steered")
MAX_LANGUAGES = 5  # that are measured, of the sources and of the kept languages


@dataclass(frozen=True)
class Steering:
    """Figures on questions in one source language.

    Attributes:
        language: model -> fractions of its answers that are in the target.
        chrf: model -> mean chrF (0 to 1) to the prompted model's answers; None for the prompted model.
        divergence: model -> nats a token from the prompted model, on its answers in the target; None for the prompted
            model, or if there are no such answers.
        relevance: model -> mean score (0 to 1) of its answers by a judge; empty without one, and for thoughts.
    """

    language: Mapping[str, AnswerLanguage]
    chrf: Mapping[str, float | None]
    divergence: Mapping[str, float | None]
    relevance: Mapping[str, float]


@dataclass(frozen=True)
class Kept:
    """Figures on questions in a kept language.

    Attributes:
        base, steered: fractions of the model's answers that are in the question's language.
        divergence: nats a token from the unedited to the edited model, on the unedited model's answers.
    """

    base: AnswerLanguage
    steered: AnswerLanguage
    divergence: float


@dataclass(frozen=True)
class SideBySide:
    """A question, and the answers of the unedited and the edited model."""

    question: str
    before: str
    after: str


@dataclass(frozen=True)
class ThoughtFigures:
    """The figures of a lock on thoughts, in place of answers."""

    sources: Mapping[str, Steering]
    kept: Mapping[str, Kept]


@dataclass(frozen=True)
class LockFigures:
    """The figures of a lock.

    Attributes:
        target: language of the answers; None: the language of each question.
        sources: by language of the questions; without a target, the questions follow planted drift.
        kept: by language of the questions; without a target, questions in the sources without drift.
        examples: questions in the first source.
        thoughts: the same of the thoughts before the answers; None without thoughts.
    """

    target: str | None
    sources: Mapping[str, Steering]
    kept: Mapping[str, Kept]
    examples: tuple[SideBySide, ...]
    thoughts: ThoughtFigures | None = None

    def as_json(self) -> dict[str, Any]:
        """The figures as JSON values."""
        values = asdict(self)
        return values if self.thoughts else {k: v for k, v in values.items() if k != "thoughts"}


@dataclass(frozen=True)
class _Measured:
    """The texts and divergences of answers, or of thoughts.

    Attributes:
        before, prompted, after: source -> texts of the unedited, prompted and edited model.
        divergences: source -> model -> ``Steering.divergence``.
        kept: kept language -> (texts of the unedited model, of the edited model, divergence).
    """

    before: Mapping[str, Sequence[str]]
    prompted: Mapping[str, Sequence[str]]
    after: Mapping[str, Sequence[str]]
    divergences: Mapping[str, Mapping[str, float | None]]
    kept: Mapping[str, tuple[Sequence[str], Sequence[str], float]]


def lock_figures(
    loaded: LoadedModel,
    questions: Questions,
    lock: Lock,
    plan: Plan,
    *,
    kept: Sequence[str] | None = None,
    part: str = REPORT,
    judge: Scorer | None = None,
    stage: Stage = quiet,
) -> LockFigures:
    """Measure a lock.

    Args:
        loaded: the unedited model.
        questions: in every language of the lock.
        lock: sources, target and teacher.
        plan: the edit.
        kept: languages whose questions are answered as before; None: the first ``MAX_LANGUAGES`` of ``lock.unchanged``.
        part: part of the questions, a key of ``neurons.text.corpus.PARTS``; of questions that no lock was made from,
            ``all`` can be measured if the lock has a target.
        judge: scores the relevance of answers to their questions; None: no scores.
        stage: shows progress.
    """
    others = list(kept if kept is not None else lock.unchanged[:MAX_LANGUAGES])
    sources = list(lock.sources)[:MAX_LANGUAGES]
    with stage("Measuring the unedited model", 2, "parts") as advance:
        by_source = lessons(loaded, questions, lock, sources, part)
        teachers = taught(loaded, questions, lock, by_source)
        advance(1)
        students = {
            source: [lesson.student for lesson in of_source] for source, of_source in by_source.items()
        }
        before = base_replies(loaded, students, lock.thoughts)
        plain = plain_prompts(loaded, questions, others, part, thinks=lock.thoughts)
        before_others = base_replies(loaded, plain, lock.thoughts)
        advance(1)
    with stage("Measuring the steered model", 2, "parts") as advance:
        with applied(loaded, plan):
            after, after_others = (
                replies(loaded, prompts, ANSWER_TOKENS, lock.thoughts) for prompts in (students, plain)
            )
        advance(1)

        def measured(asked: Callable[[Taught], Asked], text: Callable[[Reply], str]) -> _Measured:
            own = [asked(before_others[language]).examples for language in others]
            of_kept = dict(zip(others, mean_divergences(loaded, own, [plan])[0], strict=True))
            return _Measured(
                before={source: asked(before[source]).texts for source in sources},
                prompted={source: asked(teachers[source]).texts for source in sources},
                after={source: [*map(text, after[source])] for source in sources},
                divergences=_divergences(loaded, {k: asked(teachers[k]) for k in sources}, plan),
                kept={
                    language: (
                        asked(before_others[language]).texts,
                        [*map(text, after_others[language])],
                        of_kept[language],
                    )
                    for language in others
                },
            )

        answers = measured(lambda taught: taught.answers, lambda reply: reply.answer.text)
        thoughts = measured(_thoughts, _thought) if lock.thoughts else None
        advance(1)
    texts = {
        source: [question.text for question in questions_of_part(questions.of[source], part)]
        for source in sources
    }
    of_sources, of_kept = _figures(questions, lock, answers, texts, judge)
    first = sources[0]
    examples = zip(texts[first], answers.before[first], answers.after[first], strict=True)
    return LockFigures(
        lock.target,
        of_sources,
        of_kept,
        tuple(SideBySide(*row) for row in examples),
        None if thoughts is None else ThoughtFigures(*_figures(questions, lock, thoughts, texts, None)),
    )


def mean_chrf(answers: Sequence[str], references: Sequence[str]) -> float:
    """Mean chrF of answers to their references, 0 to 1."""
    return _mean_score(ChrfScorer(), [Prompt("", CHAT, reference) for reference in references], answers)


def _figures(
    questions: Questions,
    lock: Lock,
    measured: _Measured,
    texts: Mapping[str, Sequence[str]],
    judge: Scorer | None,
) -> tuple[dict[str, Steering], dict[str, Kept]]:
    """The figures of answers, or of thoughts, by source and by kept language; ``texts`` are the questions."""
    candidates = lock.candidates(questions)

    def in_language(answers: Sequence[str], language: str, asked_in: str | None = None) -> AnswerLanguage:
        return answer_language(answers, language, candidates, asked_in, lock.classifier_of(language))

    of_sources = {}
    for source, asked in texts.items():
        prompted = measured.prompted[source]
        by_model = {BASE: measured.before[source], PROMPTED: prompted, STEERED: measured.after[source]}
        prompts = [Prompt(text, CHAT) for text in asked]
        of_sources[source] = Steering(
            language={
                model: in_language(answers, lock.target_of(source), source)
                for model, answers in by_model.items()
            },
            chrf={
                model: None if model == PROMPTED else mean_chrf(answers, prompted)
                for model, answers in by_model.items()
            },
            divergence=measured.divergences[source],
            relevance={}
            if judge is None
            else {model: _mean_score(judge, prompts, answers) for model, answers in by_model.items()},
        )
    of_kept = {
        language: Kept(in_language(before, language), in_language(after, language), divergence)
        for language, (before, after, divergence) in measured.kept.items()
    }
    return of_sources, of_kept


def _thoughts(taught: Taught) -> Asked:
    assert taught.thoughts is not None
    return taught.thoughts


def _thought(reply: Reply) -> str:
    assert reply.thought is not None
    return reply.thought.text


def _mean_score(scorer: Scorer, prompts: Sequence[Prompt], answers: Sequence[str]) -> float:
    scores = scorer(prompts, [Continuation((), answer) for answer in answers])
    return sum(scores) / len(scores)


def _divergences(
    loaded: LoadedModel, teachers: Mapping[str, Asked], plan: Plan
) -> dict[str, dict[str, float | None]]:
    """Source -> model -> ``Steering.divergence``."""
    answered = [source for source, teacher in teachers.items() if teacher.examples]
    found = mean_divergences(loaded, [teachers[source].examples for source in answered], [None, plan])
    result: dict[str, dict[str, float | None]] = {source: dict.fromkeys(MODELS) for source in teachers}
    for source, base, steered in zip(answered, *found, strict=True):
        result[source] |= {BASE: base, STEERED: steered}
    return result
