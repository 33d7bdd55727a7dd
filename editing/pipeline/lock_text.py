"""The text of a language lock: questions, and the unedited model's answers to them.

Keys are solved on its conversations, a question and an answer in the same language each.  Values are learned from its
answers as the teacher; answers in the wrong language are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import cycle

from editing.evaluation.answer_language import judged_text
from editing.evaluation.questions import Questions, questions_of_part
from editing.methods.distilled_values import Example
from editing.pipeline.drift import drift_contexts
from editing.pipeline.lock_kinds import QUESTION, Lock
from editing.pipeline.lock_prompts import (
    BUILD,
    CHOOSE,
    REPORT,
    answered,
    answered_by_language,
    prompt_of,
)
from neurons.errors import BrocaError
from neurons.models.source import LoadedModel
from neurons.recording.text_pass import Progress
from neurons.text.conversations import RoleTokens

# (title, total, unit) -> a context that shows progress.
Stage = Callable[[str, int | None, str], AbstractContextManager[Progress]]
ANSWER_TOKENS, KEPT_ANSWER_TOKENS = 60, 32
# Over all languages, in which they are the same number.
MAX_EXAMPLES, MAX_CONVERSATIONS = 80, 320
LANGUAGES_AT_ONCE = 2  # their questions fill a batch
MIN_OBEYED = 0.5
# Part of the questions -> the part from which their contexts are made.
_CONTEXTS_FROM = {BUILD: BUILD, CHOOSE: BUILD, REPORT: CHOOSE}


def quiet(title: str, total: int | None, unit: str) -> AbstractContextManager[Progress]:
    """A ``Stage`` that shows nothing."""
    return nullcontext(lambda count: None)


@dataclass(frozen=True)
class Lesson:
    """The prompts of a question: the edited model's (student) and the teacher's."""

    student: RoleTokens
    teacher: RoleTokens


@dataclass(frozen=True)
class Taught:
    """The teacher's answers to the questions of one part.

    Attributes:
        examples: examples from the answers in the right language.
        answers: the text of every answer.
    """

    examples: tuple[Example, ...]
    answers: tuple[str, ...]

    @property
    def obeyed(self) -> float:
        """Fraction of the answers that are in the right language."""
        return len(self.examples) / len(self.answers) if self.answers else 0.0


def base_conversations(
    loaded: LoadedModel, questions: Questions, languages: Sequence[str], stage: Stage = quiet
) -> dict[str, list[RoleTokens]]:
    """Language -> its BUILD questions with the unedited model's answers."""
    conversations: dict[str, list[RoleTokens]] = {}
    with stage("Asking in every language", len(languages), "languages") as advance:
        for first in range(0, len(languages), LANGUAGES_AT_ONCE):
            at_once = languages[first : first + LANGUAGES_AT_ONCE]
            prompts = plain_prompts(loaded, questions, at_once, BUILD, MAX_CONVERSATIONS // len(languages))
            for language, answers in answered_by_language(loaded, prompts, KEPT_ANSWER_TOKENS).items():
                conversations[language] = [
                    prompt.answered(answer.ids)
                    for prompt, answer in zip(prompts[language], answers, strict=True)
                ]
            advance(len(at_once))
    return conversations


def plain_prompts(
    loaded: LoadedModel,
    questions: Questions,
    languages: Sequence[str],
    part: str,
    max_questions: int | None = None,
) -> dict[str, list[RoleTokens]]:
    """Language -> prompts of the questions of a part, without context and instruction."""
    return {
        language: [
            prompt_of(loaded, question.text)
            for question in questions_of_part(questions.of[language], part)[:max_questions]
        ]
        for language in languages
    }


def lessons(
    loaded: LoadedModel,
    questions: Questions,
    lock: Lock,
    sources: Sequence[str],
    part: str,
    max_questions: int | None = None,
) -> dict[str, list[Lesson]]:
    """Source -> lessons of the questions of a part; after planted drift if the lock has no target."""
    drift = drift_contexts(loaded, questions, sources, _CONTEXTS_FROM[part]) if lock.target is None else {}
    result: dict[str, list[Lesson]] = {}
    for source in sources:
        # Without a teacher by question, the target may be a label in which there are no questions.
        in_target = questions.of.get(lock.target_of(source), ())
        parallel = {question.question_id: question.text for question in in_target}
        of_part = questions_of_part(questions.of[source], part)[:max_questions]
        result[source] = []
        for question, context in zip(of_part, cycle(drift.get(source) or [()]), strict=False):
            if lock.teacher == QUESTION:
                text, instruction = parallel[question.question_id], None
            else:
                text, instruction = question.text, lock.instruction_in(source)
            student = prompt_of(loaded, question.text, None, context)
            result[source].append(Lesson(student, prompt_of(loaded, text, instruction, context)))
    return result


def taught(
    loaded: LoadedModel, questions: Questions, lock: Lock, by_source: Mapping[str, Sequence[Lesson]]
) -> dict[str, Taught]:
    """Source -> the unedited model's answers as the teacher.

    Args:
        loaded: the unedited model.
        questions: their languages are the candidates of language identification.
        lock: determines the right language of the answers, and the classifier that tells it.
        by_source: source -> lessons.
    """
    candidates = lock.candidates(questions)
    results = {}
    for source, of_source in by_source.items():
        answers = answered(loaded, [lesson.teacher for lesson in of_source], ANSWER_TOKENS)
        classifier = lock.classifier_of(lock.target_of(source))
        labels = classifier.classify([judged_text(one.text, classifier) for one in answers], candidates)
        examples = [
            Example(tuple(lesson.student.ids.tolist()), tuple(lesson.teacher.ids.tolist()), answer.ids)
            for lesson, answer, label in zip(of_source, answers, labels, strict=True)
            if label == lock.target_of(source)
        ]
        results[source] = Taught(tuple(examples), tuple(answer.text for answer in answers))
    return results


def require_obeyed(loaded: LoadedModel, lock: Lock, results: Mapping[str, Taught]) -> None:
    """Check that the teacher answers in the right language.

    A source in which it does not is no reason to refuse the others.

    Raises:
        BrocaError: fewer than ``MIN_OBEYED`` of all answers are in the right language.
    """
    obeyed = sum(len(of_source.examples) for of_source in results.values())
    asked = sum(len(of_source.answers) for of_source in results.values())
    if obeyed < MIN_OBEYED * asked:
        right = "the language of the question" if lock.target is None else repr(lock.target)
        raise BrocaError(
            f"{loaded.name}: as the teacher, it answers {obeyed} of {asked} questions in {right}, too few to learn from: "
            "choose a language that the model speaks"
        )


def base_answers(
    loaded: LoadedModel, prompts: Mapping[str, Sequence[RoleTokens]]
) -> dict[str, tuple[list[Example], list[str]]]:
    """Language -> the unedited model's answers: as examples with equal prompts of student and teacher, and as text."""
    results = {}
    for language, answers in answered_by_language(loaded, prompts, ANSWER_TOKENS).items():
        ids = [tuple(prompt.ids.tolist()) for prompt in prompts[language]]
        examples = [Example(prompt, prompt, answer.ids) for prompt, answer in zip(ids, answers, strict=True)]
        results[language] = (examples, [answer.text for answer in answers])
    return results
