"""The kinds of lock: languages of the questions, language of the answers, and the teacher.

    with a target       questions in the sources are answered in the target
    without a target    questions are answered in their own language, whatever language precedes them

The teacher is the unedited model, which gets an instruction after the question ("Respond in French."), or the same
question in the target language.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from editing.evaluation.classifier import LANGUAGE_IDENTIFICATION, Classifier
from editing.evaluation.questions import Questions
from editing.hooks.instructions import IN_TARGET, in_english
from editing.pipeline.drift import require_drift_questions
from neurons.errors import UsageError
from neurons.text.conversation_batches import groups_of

# Languages that a lock keeps by default: several scripts and families.
KEPT = ("ar", "de", "en", "es", "fr", "it", "ja", "pt", "ru", "zh")
MIN_QUESTIONS = 4  # two to build on, one to choose on and one to report
TEACHERS = INSTRUCTION, QUESTION = ("instruction", "question")


@dataclass(frozen=True)
class Lock:
    """The languages and the teacher of a lock.

    Attributes:
        target: language of the answers; None: the language of each question.
        sources: languages of the questions whose answers change.
        keep: languages whose questions are answered as before; includes the target unless that is a source.
        instruction: instruction to the teacher, in any language; None: to answer in the target.
        teacher: one of ``TEACHERS``.
        classifier: tells the language, or another label, of answers (``classifier_of``).
        thoughts: whether the model thinks before it answers, and its thoughts are steered like its answers.
    """

    target: str | None
    sources: tuple[str, ...]
    keep: tuple[str, ...]
    instruction: str | None = None
    teacher: str = INSTRUCTION
    classifier: Classifier = LANGUAGE_IDENTIFICATION
    thoughts: bool = False

    @property
    def languages(self) -> tuple[str, ...]:
        """All languages in which the lock needs questions."""
        return (*self.sources, *self.keep)

    @property
    def from_all(self) -> bool:
        """Whether questions in every language are answered in the target."""
        return self.target is not None and len(self.sources) > 1

    @property
    def key_groups(self) -> tuple[tuple[str, ...], ...]:
        """The groups of tokens (``groups_of``) of each key.

        With a target, one key for the sources' messages and one for their headers; without, one for each source.  A
        single key for messages and headers makes one value serve both: the divergence of Qwen2.5-Coder-0.5B-Instruct
        from the teacher, English to German, is then 0.083 nats a token instead of 0.060.

        From every language the keys are 1 on the target's tokens too.  A key that has to tell one language from all
        others does not have the same mean in languages that it has not seen.
        """
        by_language = [groups_of(name) for name in (self.languages if self.from_all else self.sources)]
        return tuple(by_language) if self.target is None else tuple(zip(*by_language, strict=True))

    @property
    def own_answers(self) -> tuple[str, ...]:
        """The languages in which the keys are 1 although answers must not change: the model also trains on its own."""
        if self.target is None:
            return self.sources
        return self.keep if self.from_all else ()

    @property
    def unchanged(self) -> tuple[str, ...]:
        """The languages whose questions, asked alone, are answered as before."""
        return self.keep if self.target is not None else self.sources

    def target_of(self, source: str) -> str:
        """The language of the answers to questions in a source."""
        return self.target or source

    def classifier_of(self, label: str) -> Classifier:
        """What tells whether answers have a label: the classifier, or language identification if it lacks the label."""
        return self.classifier if self.classifier.knows(label) else LANGUAGE_IDENTIFICATION

    def candidates(self, questions: Questions) -> tuple[str, ...]:
        """The labels that answers may have: the languages of the questions, and the target."""
        return tuple(dict.fromkeys([*questions.of, *([self.target] if self.target else [])]))

    def instruction_in(self, source: str) -> str:
        """The teacher's instruction: to answer in the question's language in that language, in another in English.

        Small models obey an instruction in the question's language to answer in another one less often.  To think and
        answer in a language is always said in English.
        """
        if self.instruction is not None:
            return self.instruction
        target = self.target_of(source)
        if source == target and target in IN_TARGET and not self.thoughts:
            return IN_TARGET[target]
        return in_english(target, self.thoughts)

    def as_json(self) -> dict[str, Any]:
        """The lock as settings of a plan; a teacher by question has no instructions."""
        return {
            "sources": list(self.sources),
            "kept_languages": [name for name in self.keep if name != self.target],
            "teacher": self.teacher,
            "instructions": (
                {} if self.teacher == QUESTION else {name: self.instruction_in(name) for name in self.sources}
            ),
            "classifier": self.classifier.provenance,
            **({"thoughts": True} if self.thoughts else {}),
        }


def lock_of(
    questions: Questions,
    target: str | None,
    source: str | None = None,
    keep: Sequence[str] | None = None,
    *,
    instruction: str | None = None,
    teacher: str = INSTRUCTION,
    classifier: Classifier = LANGUAGE_IDENTIFICATION,
    thoughts: bool = False,
) -> Lock:
    """The lock with these languages and this teacher.

    Args:
        questions: by language.
        target: language of the answers; None: the language of each question.
        source: language of the questions; None: with a target, all languages in which there are enough questions, and
            without one, those of them in ``KEPT``.
        keep: languages to keep; None: those of ``KEPT`` in which there are enough questions.
        instruction: as in ``Lock``.
        teacher: as in ``Lock``.
        classifier: as in ``Lock``; a target that it knows needs no questions.
        thoughts: as in ``Lock``; a model that always thinks needs it (``steers_thoughts``).

    Raises:
        UsageError: a language with too few questions or that cannot be identified, a language that is both source and
            kept, an unknown teacher, a teacher that this lock cannot have, a question that a teacher by question lacks
            in the target, or too few questions to plant drift.
    """
    asked = [name for name in (source, *(keep or ())) if name is not None]
    if target is not None and (classifier.identifies_languages or target in questions.of):
        asked.insert(0, target)
    _require_questions(questions, asked)
    _require_labels(classifier, [*asked, *([target] if target else [])])
    _require_teacher(target, source, instruction, teacher)
    if target is None:
        require_drift_questions(questions)
    lock = replace(
        _lock(questions, target, source, keep, instruction, teacher, classifier), thoughts=thoughts
    )
    if teacher == QUESTION:
        _require_parallel(questions, lock)
    return lock


def _lock(
    questions: Questions,
    target: str | None,
    source: str | None,
    keep: Sequence[str] | None,
    instruction: str | None,
    teacher: str,
    classifier: Classifier,
) -> Lock:
    asked_in_target = [target] if target in questions.of else []
    enough = [name for name, of_language in questions.of.items() if len(of_language) >= MIN_QUESTIONS]
    offered = [name for name in KEPT if name in enough]
    if source is None and target is not None:
        # Languages that the edit has not seen answer the more often in the target the more languages it has seen.
        offered += [name for name in enough if name not in offered and _is_told(classifier, name)]
    if source is None:
        if keep:
            raise UsageError("--keep is for a lock from one language: leave it out")
        # An instruction may ask for more than a language, so the target is a source too.
        target_is_source = target is None or instruction is not None
        sources = dict.fromkeys([*(asked_in_target if target_is_source else []), *offered])
        kept = [] if target_is_source else asked_in_target
        return Lock(
            target,
            tuple(name for name in sources if name not in kept),
            tuple(kept),
            instruction,
            teacher,
            classifier,
        )
    if keep is not None and source in keep:
        raise UsageError(f"{source!r} is both the source and a language to keep: leave it out of one of them")
    others = dict.fromkeys([*asked_in_target, *(offered if keep is None else keep)])
    kept = [name for name in others if name != source]
    return Lock(target, (source,), tuple(kept), instruction, teacher, classifier)


def _require_questions(questions: Questions, languages: Sequence[str]) -> None:
    for language in languages:
        if language not in questions.of:
            raise UsageError(
                f"there are no questions in {language!r}: choose from {', '.join(questions.of)}, or give others with "
                "--questions"
            )
        if (count := len(questions.of[language])) < MIN_QUESTIONS:
            raise UsageError(
                f"there are {count} questions in {language!r}: give {MIN_QUESTIONS} or more, to build on, to choose on "
                "and to report"
            )


def _is_told(classifier: Classifier, label: str) -> bool:
    """Whether something tells which answers have a label."""
    return classifier.knows(label) or LANGUAGE_IDENTIFICATION.knows(label)


def _require_labels(classifier: Classifier, labels: Sequence[str]) -> None:
    for label in labels:
        if not _is_told(classifier, label):
            known = "the language identifier" if classifier.identifies_languages else classifier.name
            raise UsageError(
                f"{known} does not know {label!r}, so answers in it cannot be measured: choose another language, or "
                "give a --classifier that knows it"
            )


def _require_parallel(questions: Questions, lock: Lock) -> None:
    for source in lock.sources:
        target = lock.target_of(source)
        there = {question.question_id for question in questions.of.get(target, ())}
        for question in questions.of[source]:
            if question.question_id not in there:
                raise UsageError(
                    f"question {question.question_id!r} in {source!r} is missing in {target!r}: add it, or leave out "
                    "--teacher question"
                )


def _require_teacher(target: str | None, source: str | None, instruction: str | None, teacher: str) -> None:
    if teacher not in TEACHERS:
        raise UsageError(f"teacher {teacher!r}: give one of {', '.join(TEACHERS)}")
    if target is not None and source == target and instruction is None:
        raise UsageError(
            f"questions in {target!r} are already answered in {target!r}: choose another language, or give an instruction"
        )
    if instruction is not None and not instruction.strip():
        raise UsageError("the instruction is empty: leave --instruction out")
    if target is None and source is not None:
        raise UsageError("a lock to the question's language applies to all languages: leave --from out")
    if target is None and (instruction is not None or teacher == QUESTION):
        raise UsageError(
            "a lock to the question's language has an instruction of its own: leave --instruction and --teacher out"
        )
    if teacher == QUESTION and instruction is not None:
        raise UsageError(
            "a teacher by question gets no instruction: leave out --instruction, or --teacher question"
        )
