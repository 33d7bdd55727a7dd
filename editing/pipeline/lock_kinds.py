"""Which lock: from which languages to which, taught by what.

    to a target         questions in the sources are answered in the target
    to stay (no target) questions in each source are answered in it, whatever the conversation holds before

The teacher is the unedited model that gets an instruction behind the question ("Respond in French."), or the same
question in the target language.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from editing.evaluation.language_id import unidentified
from editing.evaluation.questions import Questions
from editing.hooks.instructions import IN_TARGET, instructions
from neurons.errors import UsageError

# Languages that a lock keeps where none are named: of many scripts and families.
KEPT = ("ar", "de", "en", "es", "fr", "it", "ja", "pt", "ru", "zh")
MIN_QUESTIONS = 4  # of which a part each to build on, to choose on and to report
TEACHERS = INSTRUCTION, QUESTION = ("instruction", "question")


@dataclass(frozen=True)
class Lock:
    """What is to be answered how.

    Attributes:
        target: language of the answers; None: each question's own.
        sources: languages of the questions that are to be answered so.
        keep: languages whose questions are answered as before; the target is one, unless it is a source.
        instruction: what the teacher is told, in any language; None: to answer in the target.
        teacher: one of ``TEACHERS``.
    """

    target: str | None
    sources: tuple[str, ...]
    keep: tuple[str, ...]
    instruction: str | None = None
    teacher: str = INSTRUCTION

    @property
    def languages(self) -> tuple[str, ...]:
        """Of all questions that the lock is made from."""
        return (*self.sources, *self.keep)

    @property
    def keyed(self) -> tuple[tuple[str, ...], ...]:
        """The languages of each key: one key for a target, one for each language that is to stay."""
        return (self.sources,) if self.target is not None else tuple((name,) for name in self.sources)

    def target_of(self, source: str) -> str:
        """Language in which questions in a source are to be answered."""
        return self.target or source

    def instruction_in(self, source: str) -> str:
        """What tells the teacher: in the source's language where Broca knows it, else in English."""
        if self.instruction is not None:
            return self.instruction
        target = self.target_of(source)
        if source == target and target in IN_TARGET:
            return IN_TARGET[target]
        return next(iter(instructions(source, target).values()))

    def as_json(self) -> dict[str, Any]:
        """Settings of a plan."""
        return {
            "sources": list(self.sources),
            "kept_languages": [name for name in self.keep if name != self.target],
            "teacher": self.teacher,
            "instructions": {name: self.instruction_in(name) for name in self.sources},
        }


def lock_of(
    questions: Questions,
    target: str | None,
    source: str | None = None,
    keep: Sequence[str] | None = None,
    *,
    instruction: str | None = None,
    teacher: str = INSTRUCTION,
) -> Lock:
    """The lock that was asked for.

    Args:
        questions: by language.
        target: language of the answers; None: each question's own.
        source: of the questions; None: every language that there are questions in.
        keep: None: those of ``KEPT`` that there are questions in.
        instruction: as ``Lock``.
        teacher: as ``Lock``.

    Raises:
        UsageError: a language without questions or that cannot be identified, one that is named twice, an unknown
            teacher, or one that cannot teach this.
    """
    named = [name for name in (target, source, *(keep or ())) if name is not None]
    _require_questions(questions, named)
    _require_teacher(target, source, instruction, teacher)
    offered = [name for name in KEPT if len(questions.of.get(name, ())) >= MIN_QUESTIONS]
    if source is None:
        if keep:
            raise UsageError("from every language nothing but the target is kept: leave --keep out")
        # An instruction may ask for more than a language, so questions in the target have it too.
        every = target is None or instruction is not None
        sources = dict.fromkeys([*([target] if target and every else []), *offered])
        kept = [] if target is None or every else [target]
        return Lock(
            target, tuple(name for name in sources if name not in kept), tuple(kept), instruction, teacher
        )
    if keep is not None and source in keep:
        raise UsageError(f"{source!r} is to be answered otherwise, so it cannot be kept: name it once")
    others = dict.fromkeys([*([target] if target else []), *(offered if keep is None else keep)])
    kept = [name for name in others if name != source]
    return Lock(target, (source,), tuple(kept), instruction, teacher)


def _require_questions(questions: Questions, languages: Sequence[str]) -> None:
    for language in languages:
        if language not in questions.of:
            raise UsageError(
                f"there are no questions in {language!r}: there are some in {', '.join(questions.of)}"
            )
        if (count := len(questions.of[language])) < MIN_QUESTIONS:
            raise UsageError(
                f"there are {count} questions in {language!r}: give {MIN_QUESTIONS} or more, to build on, to choose on "
                "and to report"
            )
    if unknown := unidentified(languages):
        raise UsageError(
            f"the language identifier does not know {unknown[0]!r}, so nothing could be measured in it"
        )


def _require_teacher(target: str | None, source: str | None, instruction: str | None, teacher: str) -> None:
    if teacher not in TEACHERS:
        raise UsageError(f"teacher {teacher!r}: give one of {', '.join(TEACHERS)}")
    if target is not None and source == target and instruction is None:
        raise UsageError(f"questions in {target!r} are answered in {target!r} already: name another language")
    if instruction is not None and not instruction.strip():
        raise UsageError("the instruction is empty: leave --instruction out")
    if target is None and source is not None:
        raise UsageError("to stay in the question's language is of all languages: leave --from out")
    if target is None and (instruction is not None or teacher == QUESTION):
        raise UsageError(
            "to stay in the question's language has its own instruction: leave it and the teacher out"
        )
    if teacher == QUESTION and instruction is not None:
        raise UsageError(
            "a question in the target language teaches without an instruction: give one of the two"
        )
