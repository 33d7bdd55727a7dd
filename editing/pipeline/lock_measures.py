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
from editing.pipeline.lock import Lock
from editing.pipeline.lock_text import (
    ANSWER_TOKENS,
    REPORT,
    Stage,
    Taught,
    answered_by_language,
    own_answers,
    prompt_of,
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
        target: language of the answers.
        sources: by language of the questions.
        kept: likewise.
        examples: questions in the first source.
    """

    target: str
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
            keeps.
        stage: tells of the work.
    """
    told_apart = tuple(questions.of)
    others = list(lock.keep if kept is None else kept)[: MEASURED_KEPT if kept is None else None]
    sources = list(lock.sources)[:MEASURED_KEPT]
    texts = {name: [one.text for one in taken(questions.of[name], REPORT)] for name in [*sources, *others]}
    with stage("Measuring the unedited model", 3, "parts") as tell:
        teachers = taught(loaded, questions, sources, lock.target, REPORT)
        tell(1)
        own = own_answers(loaded, questions, [*sources, *others], REPORT)
        tell(1)
        before = {name: _from_teacher(loaded, teachers[name], None) for name in sources}
        tell(1)
    with stage("Measuring the steered model", 2, "parts") as tell:
        prompts = {name: [prompt_of(loaded, text) for text in texts[name]] for name in texts}
        with applied(loaded, plan):
            answers = answered_by_language(loaded, prompts, ANSWER_TOKENS)
        steered = {name: [one.text for one in some] for name, some in answers.items()}
        tell(1)
        after = {name: _from_teacher(loaded, teachers[name], plan) for name in sources}
        changed = {name: mean_divergence(loaded, own[name][0], plan) for name in others}
        tell(1)
    of_sources = {}
    for name in sources:
        prompted = teachers[name].answers
        texts_of = {BASE: own[name][1], PROMPTED: prompted, STEERED: steered[name]}
        of_sources[name] = Steering(
            language={
                model: answer_language(found, lock.target, told_apart, name)
                for model, found in texts_of.items()
            },
            chrf={
                model: None if model == PROMPTED else mean_chrf(found, prompted)
                for model, found in texts_of.items()
            },
            divergence={BASE: before[name], PROMPTED: None, STEERED: after[name]},
        )
    of_kept = {
        name: Kept(
            base=answer_language(own[name][1], name, told_apart),
            steered=answer_language(steered[name], name, told_apart),
            divergence=changed[name],
        )
        for name in others
    }
    first = sources[0]
    side_by_side = [
        SideBySide(*three) for three in zip(texts[first], own[first][1], steered[first], strict=True)
    ]
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
