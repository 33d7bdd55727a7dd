"""The text of a language lock: questions, and the unedited model's answers to them.

Keys are solved on its conversations, a question and an answer in the same language each.  Values are learned from its
answers as the teacher; answers in the wrong language are left out.  Thoughts are treated like answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import cycle

from editing.evaluation.answer_language import judged_text
from editing.evaluation.classifier import Classifier
from editing.evaluation.questions import Questions, questions_of_part
from editing.methods.distilled_values import Example
from editing.pipeline.drift import drift_contexts
from editing.pipeline.lock_kinds import QUESTION, Lock
from editing.pipeline.lock_prompts import BUILD, CHOOSE, REPORT, prompt_of
from editing.pipeline.lock_replies import Reply, replies
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
class Asked:
    """The unedited model's answers to questions, or its thoughts.

    Attributes:
        examples: examples of them; as the teacher, of those in the right language.
        texts: all of them.
    """

    examples: tuple[Example, ...]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Taught:
    """The unedited model's replies to the questions of one part.

    Attributes:
        students: the edited model's prompt of each question.
        answers: the answers.
        thoughts: the thoughts before them; None without thoughts.
    """

    students: tuple[RoleTokens, ...]
    answers: Asked
    thoughts: Asked | None = None

    @property
    def obeyed(self) -> float:
        """Fraction of the teacher's answers that are in the right language."""
        return _fraction([self.answers])

    @property
    def examples(self) -> tuple[Example, ...]:
        """Examples of thoughts and answers."""
        return (*(self.thoughts.examples if self.thoughts else ()), *self.answers.examples)


def base_conversations(
    loaded: LoadedModel,
    questions: Questions,
    languages: Sequence[str],
    stage: Stage = quiet,
    thinks: bool = False,
) -> dict[str, list[RoleTokens]]:
    """Language -> its BUILD questions with the unedited model's replies."""
    conversations: dict[str, list[RoleTokens]] = {}
    with stage("Asking in every language", len(languages), "languages") as advance:
        for first in range(0, len(languages), LANGUAGES_AT_ONCE):
            at_once = languages[first : first + LANGUAGES_AT_ONCE]
            count = MAX_CONVERSATIONS // len(languages)
            prompts = plain_prompts(loaded, questions, at_once, BUILD, count, thinks)
            for language, of_language in replies(loaded, prompts, KEPT_ANSWER_TOKENS, thinks).items():
                conversations[language] = [reply.conversation for reply in of_language]
            advance(len(at_once))
    return conversations


def plain_prompts(
    loaded: LoadedModel,
    questions: Questions,
    languages: Sequence[str],
    part: str,
    max_questions: int | None = None,
    thinks: bool = False,
) -> dict[str, list[RoleTokens]]:
    """Language -> prompts of the questions of a part, without context and instruction."""
    return {
        language: [
            prompt_of(loaded, question.text, thinks=thinks)
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
            student = prompt_of(loaded, question.text, None, context, lock.thoughts)
            teacher = prompt_of(loaded, text, instruction, context, lock.thoughts)
            result[source].append(Lesson(student, teacher))
    return result


def taught(
    loaded: LoadedModel, questions: Questions, lock: Lock, by_source: Mapping[str, Sequence[Lesson]]
) -> dict[str, Taught]:
    """Source -> the unedited model's replies as the teacher.

    Args:
        loaded: the unedited model.
        questions: their languages are the candidates of language identification.
        lock: determines the right language of the replies, and the classifier that tells it.
        by_source: source -> lessons.
    """
    candidates = lock.candidates(questions)
    results = {}
    for source, of_source in by_source.items():
        prompts = {source: [lesson.teacher for lesson in of_source]}
        made = replies(loaded, prompts, ANSWER_TOKENS, lock.thoughts)[source]
        target = lock.target_of(source)
        classifier = lock.classifier_of(target)

        def is_right(
            texts: Sequence[str], classifier: Classifier = classifier, to: str = target
        ) -> list[bool]:
            judged = [judged_text(text, classifier) for text in texts]
            return [label == to for label in classifier.classify(judged, candidates)]

        results[source] = _taught(made, [lesson.student for lesson in of_source], is_right)
    return results


def require_obeyed(loaded: LoadedModel, lock: Lock, results: Mapping[str, Taught]) -> None:
    """Check that the teacher answers in the right language.

    A source in which it does not is no reason to refuse the others.

    Raises:
        BrocaError: fewer than ``MIN_OBEYED`` of all answers are in the right language.
    """
    answers = [of_source.answers for of_source in results.values()]
    if _fraction(answers) < MIN_OBEYED:
        obeyed, asked = (sum(len(getattr(one, name)) for one in answers) for name in ("examples", "texts"))
        right = "the language of the question" if lock.target is None else repr(lock.target)
        raise BrocaError(
            f"{loaded.name}: as the teacher, it answers {obeyed} of {asked} questions in {right}, too few to learn from: "
            "choose a language that the model speaks"
        )


def thoughts_obey(results: Mapping[str, Taught]) -> bool:
    """Whether the teacher thinks in the right language: at least ``MIN_OBEYED`` of all thoughts are."""
    return _fraction([one.thoughts for one in results.values() if one.thoughts]) >= MIN_OBEYED


def base_replies(
    loaded: LoadedModel, prompts: Mapping[str, Sequence[RoleTokens]], thinks: bool = False
) -> dict[str, Taught]:
    """Language -> the unedited model's replies, as examples with equal prompts of student and teacher."""
    made = replies(loaded, prompts, ANSWER_TOKENS, thinks)
    return {
        language: _taught(of_language, prompts[language], lambda texts: [True] * len(texts))
        for language, of_language in made.items()
    }


def _taught(
    made: Sequence[Reply], students: Sequence[RoleTokens], is_right: Callable[[Sequence[str]], list[bool]]
) -> Taught:
    def asked(texts: Sequence[str], examples: Sequence[Example]) -> Asked:
        kept = zip(examples, is_right(texts), strict=True)
        return Asked(tuple(example for example, right in kept if right), tuple(texts))

    pairs = list(zip(made, students, strict=True))
    answers = asked(
        [reply.answer.text for reply in made], [reply.example(student) for reply, student in pairs]
    )
    thoughts = [reply.thought.text for reply in made if reply.thought is not None]
    if not thoughts:
        return Taught(tuple(students), answers)
    return Taught(
        tuple(students),
        answers,
        asked(thoughts, [reply.thought_example(student) for reply, student in pairs]),
    )


def _fraction(asked: Sequence[Asked]) -> float:
    """Fraction that are examples."""
    total = sum(len(one.texts) for one in asked)
    return sum(len(one.examples) for one in asked) / total if total else 0.0
