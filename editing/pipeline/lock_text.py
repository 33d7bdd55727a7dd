"""What a language lock is made from: questions, and what the unedited model itself answers to them.

Keys are solved on its conversations in every language, each question and answer in one; values are learned from its
answers as a teacher.  A teacher's answer in another language than it should be teaches the wrong thing and is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from editing.evaluation.answer_language import prose
from editing.evaluation.language_id import identify_language
from editing.evaluation.questions import Question, Questions, taken
from editing.methods.distilled_values import Example
from editing.pipeline.drift import Context, drift_contexts
from editing.pipeline.lock_kinds import QUESTION, Lock
from editing.pipeline.lock_prompts import (
    BUILD,
    CHOOSE,
    REPORT,
    answered,
    answered_by_language,
    prompt_of,
)
from neurons.errors import BrocaError, UsageError
from neurons.models.source import LoadedModel
from neurons.recording.text_pass import Progress
from neurons.text.conversations import RoleTokens

# (title, total, unit) -> a context in which work is told.
Stage = Callable[[str, int | None, str], AbstractContextManager[Progress]]
ANSWER_TOKENS, KEPT_ANSWER_TOKENS = 60, 32
MAX_EXAMPLES = 64
LANGUAGES_AT_ONCE = 2  # whose questions fill a batch
MIN_OBEYED = 0.5
# What comes before a part's questions is made of the questions of another part.
_CONTEXTS_FROM = {BUILD: BUILD, CHOOSE: BUILD, REPORT: CHOOSE}


def quiet(title: str, total: int | None, unit: str) -> AbstractContextManager[Progress]:
    """A ``Stage`` that tells nothing."""
    return nullcontext(lambda count: None)


@dataclass(frozen=True)
class Lesson:
    """A question as the edited model gets it, and as the teacher does."""

    student: RoleTokens
    teacher: RoleTokens


@dataclass(frozen=True)
class Taught:
    """Examples of one part of the questions.

    Attributes:
        examples: those whose answer is in the language that it should be in.
        answers: the teacher's answer to every question.
    """

    examples: tuple[Example, ...]
    answers: tuple[str, ...]

    @property
    def asked(self) -> int:
        """How many questions the teacher was asked."""
        return len(self.answers)

    @property
    def obeyed(self) -> float:
        """Fraction of the questions that the teacher answers in the language that it should."""
        return len(self.examples) / self.asked if self.asked else 0.0


def own_conversations(
    loaded: LoadedModel, questions: Questions, languages: Sequence[str], stage: Stage = quiet
) -> dict[str, list[RoleTokens]]:
    """Language -> the building half of its questions, each with the unedited model's answer."""
    conversations: dict[str, list[RoleTokens]] = {}
    with stage("Asking in every language", len(languages), "languages") as tell:
        for first in range(0, len(languages), LANGUAGES_AT_ONCE):
            at_once = languages[first : first + LANGUAGES_AT_ONCE]
            prompts = plain_prompts(loaded, questions, at_once, BUILD)
            for language, answers in answered_by_language(loaded, prompts, KEPT_ANSWER_TOKENS).items():
                conversations[language] = [
                    prompt.answered(answer.ids)
                    for prompt, answer in zip(prompts[language], answers, strict=True)
                ]
            tell(len(at_once))
    return conversations


def plain_prompts(
    loaded: LoadedModel,
    questions: Questions,
    languages: Sequence[str],
    part: str,
    most: int | None = None,
) -> dict[str, list[RoleTokens]]:
    """Language -> the questions of a part, with nothing before or after them; at most ``most``."""
    return {
        language: [
            prompt_of(loaded, question.text) for question in taken(questions.of[language], part)[:most]
        ]
        for language in languages
    }


def lessons(
    loaded: LoadedModel,
    questions: Questions,
    lock: Lock,
    sources: Sequence[str],
    part: str,
    most: int | None = None,
) -> dict[str, list[Lesson]]:
    """Source -> the questions of a part, at most ``most``.

    Raises:
        UsageError: a question that is not there in the language of the teacher's.
    """
    contexts = drift_contexts(loaded, questions, sources, _CONTEXTS_FROM[part]) if lock.target is None else {}
    made = {}
    for source in sources:
        asked = taken(questions.of[source], part)[:most]
        before = contexts.get(source) or [()]
        made[source] = [
            Lesson(
                prompt_of(loaded, question.text, None, before[place % len(before)]),
                _teacher(loaded, questions, lock, source, question, before[place % len(before)]),
            )
            for place, question in enumerate(asked)
        ]
    return made


def _teacher(
    loaded: LoadedModel,
    questions: Questions,
    lock: Lock,
    source: str,
    question: Question,
    context: Context,
) -> RoleTokens:
    if lock.teacher != QUESTION:
        return prompt_of(loaded, question.text, lock.instruction_in(source), context)
    target = lock.target_of(source)
    parallel = {other.question_id: other for other in questions.of[target]}
    if question.question_id not in parallel:
        raise UsageError(
            f"question {question.question_id!r} in {source!r} is not there in {target!r}: a teacher by question needs both"
        )
    return prompt_of(loaded, parallel[question.question_id].text, None, context)


def taught(
    loaded: LoadedModel, questions: Questions, lock: Lock, given: Mapping[str, Sequence[Lesson]]
) -> dict[str, Taught]:
    """Source -> what the unedited model answers as the teacher.

    Args:
        loaded: the unedited model.
        questions: whose languages are told apart.
        lock: gives the language that answers should be in.
        given: source -> lessons.
    """
    told_apart = tuple(questions.of)
    results = {}
    for source, some in given.items():
        answers = answered(loaded, [lesson.teacher for lesson in some], ANSWER_TOKENS)
        examples = [
            Example(tuple(lesson.student.ids.tolist()), tuple(lesson.teacher.ids.tolist()), answer.ids)
            for lesson, answer in zip(some, answers, strict=True)
            if identify_language(prose(answer.text), told_apart) == lock.target_of(source)
        ]
        results[source] = Taught(tuple(examples), tuple(answer.text for answer in answers))
    return results


def require_obeyed(loaded: LoadedModel, lock: Lock, results: Mapping[str, Taught]) -> None:
    """Refuse a teacher that does not do what it is to teach.

    Raises:
        BrocaError: in some source, too few answers are in the target.
    """
    for source, one in results.items():
        if one.obeyed < MIN_OBEYED:
            raise BrocaError(
                f"{loaded.name}: told to, it answers {len(one.examples)} of {one.asked} questions in {source!r} in "
                f"{lock.target_of(source)!r}, so it cannot teach that: choose a language that the model speaks"
            )


def own_answers(
    loaded: LoadedModel, prompts: Mapping[str, Sequence[RoleTokens]]
) -> dict[str, tuple[list[Example], list[str]]]:
    """Language -> examples whose teacher is the unedited model at the same prompt, and its answers' texts."""
    results = {}
    for language, answers in answered_by_language(loaded, prompts, ANSWER_TOKENS).items():
        ids = [tuple(prompt.ids.tolist()) for prompt in prompts[language]]
        examples = [Example(of, of, answer.ids) for of, answer in zip(ids, answers, strict=True)]
        results[language] = (examples, [answer.text for answer in answers])
    return results
