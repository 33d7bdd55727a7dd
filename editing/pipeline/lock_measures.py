"""What a language lock does, on the reporting quarter of the questions: beside the unedited model, told and not told.

Three models answer the questions in the source languages: the unedited one, the unedited one with the instruction
("prompted", which is the mark to meet), and the edited one.  Questions in languages that are kept are answered by the
unedited and the edited model.  Divergences are of whole next-token distributions, nats a token: to the prompted model on
its own answers, and to the unedited model on its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from editing.evaluation.answer_language import AnswerLanguage, answer_language
from editing.evaluation.questions import Questions, taken
from editing.methods.distilled_values import mean_divergence
from editing.pipeline.lock_kinds import Lock
from editing.pipeline.lock_prompts import REPORT, answered_by_language
from editing.pipeline.lock_text import (
    ANSWER_TOKENS,
    Stage,
    Taught,
    lessons,
    own_answers,
    plain_prompts,
    quiet,
    taught,
)
from editing.plans.applied import applied
from editing.plans.plan import Plan
from neurons.models.source import LoadedModel

BASE, PROMPTED, STEERED = MODELS = ("base", "prompted", "steered")
MEASURED_KEPT = 5  # languages


@dataclass(frozen=True)
class Steering:
    """Questions in one source language.

    Attributes:
        language: model -> how its answers are in the target language.
        chrf: model -> mean chrF (0 to 1) to the prompted model's answers; of the prompted model itself None.
        divergence: model -> nats a token to the prompted model, on its answers in the target; None: there are none.
    """

    language: Mapping[str, AnswerLanguage]
    chrf: Mapping[str, float | None]
    divergence: Mapping[str, float | None]


@dataclass(frozen=True)
class Kept:
    """Questions in a language that is kept.

    Attributes:
        base, steered: how the answers are in the question's language.
        divergence: nats a token from the unedited to the edited model, on the unedited model's answers.
    """

    base: AnswerLanguage
    steered: AnswerLanguage
    divergence: float


@dataclass(frozen=True)
class SideBySide:
    """A question and its answers before and after."""

    question: str
    before: str
    after: str


@dataclass(frozen=True)
class LockFigures:
    """All that was measured.

    Attributes:
        target: language of the answers; None: each question's own.
        sources: by language of the questions; without a target, questions behind planted drift.
        kept: likewise; without a target, the same languages' questions alone.
        examples: questions in the first source.
    """

    target: str | None
    sources: Mapping[str, Steering]
    kept: Mapping[str, Kept]
    examples: tuple[SideBySide, ...]

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def lock_figures(
    loaded: LoadedModel,
    questions: Questions,
    lock: Lock,
    plan: Plan,
    *,
    kept: Sequence[str] | None = None,
    stage: Stage = quiet,
) -> LockFigures:
    """Measure a lock.

    Args:
        loaded: the unedited model.
        questions: in every language of the lock.
        lock: which.
        plan: the edit.
        kept: languages of questions that are to be answered as before; None: the first ``MEASURED_KEPT`` that the lock
            keeps, or, where it keeps none, of its sources.
        stage: tells of the work.
    """
    told_apart = tuple(questions.of)
    others = list(kept if kept is not None else (lock.keep or lock.sources)[:MEASURED_KEPT])
    sources = list(lock.sources)[:MEASURED_KEPT]
    with stage("Measuring the unedited model", 3, "parts") as tell:
        given = lessons(loaded, questions, lock, sources, REPORT)
        teachers = taught(loaded, questions, lock, given)
        tell(1)
        students = {source: [lesson.student for lesson in some] for source, some in given.items()}
        before = {source: answers for source, (_, answers) in own_answers(loaded, students).items()}
        plain = plain_prompts(loaded, questions, others, REPORT)
        own = own_answers(loaded, plain)
        tell(1)
        base = {source: _from_teacher(loaded, teachers[source], None) for source in sources}
        tell(1)
    with stage("Measuring the steered model", 2, "parts") as tell:
        with applied(loaded, plan):
            after, kept_answers = (
                {name: [answer.text for answer in some] for name, some in answers.items()}
                for answers in (answered_by_language(loaded, of, ANSWER_TOKENS) for of in (students, plain))
            )
        tell(1)
        steered = {source: _from_teacher(loaded, teachers[source], plan) for source in sources}
        changed = {language: mean_divergence(loaded, own[language][0], plan) for language in others}
        tell(1)
    of_sources = {}
    for source in sources:
        prompted = teachers[source].answers
        answers_of = {BASE: before[source], PROMPTED: prompted, STEERED: after[source]}
        of_sources[source] = Steering(
            language={
                model: answer_language(answers, lock.target_of(source), told_apart, source)
                for model, answers in answers_of.items()
            },
            chrf={
                model: None if model == PROMPTED else mean_chrf(answers, prompted)
                for model, answers in answers_of.items()
            },
            divergence={BASE: base[source], PROMPTED: None, STEERED: steered[source]},
        )
    of_kept = {
        language: Kept(
            base=answer_language(own[language][1], language, told_apart),
            steered=answer_language(kept_answers[language], language, told_apart),
            divergence=changed[language],
        )
        for language in others
    }
    first = sources[0]
    asked = [question.text for question in taken(questions.of[first], REPORT)]
    side_by_side = [SideBySide(*three) for three in zip(asked, before[first], after[first], strict=True)]
    return LockFigures(lock.target, of_sources, of_kept, tuple(side_by_side))


def mean_chrf(answers: Sequence[str], references: Sequence[str]) -> float:
    """chrF (sacrebleu's defaults) of each answer to its reference, / 100, the mean; an empty answer has 0."""
    from sacrebleu.metrics import CHRF

    metric = CHRF()
    scores = [
        metric.sentence_score(answer, [reference]).score / 100 if answer.strip() else 0.0
        for answer, reference in zip(answers, references, strict=True)
    ]
    return sum(scores) / len(scores)


def _from_teacher(loaded: LoadedModel, one: Taught, plan: Plan | None) -> float | None:
    return mean_divergence(loaded, one.examples, plan) if one.examples else None
