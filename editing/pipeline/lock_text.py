"""What a language lock is made from: questions, and what the unedited model itself answers to them.

Keys are solved on its conversations in every language, each question and answer in one; values are learned from its
answers to the questions in a source language with an instruction to answer in the target.  An answer to the
instruction that is in another language than the target teaches the wrong thing and is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from editing.evaluation.answer_language import prose
from editing.evaluation.generation import Continuation, generate
from editing.evaluation.language_id import identify_language
from editing.evaluation.questions import Question, Questions, taken
from editing.hooks.instructions import instructions
from editing.methods.distilled_values import Example
from neurons.errors import BrocaError, UsageError
from neurons.models.source import LoadedModel
from neurons.recording.text_pass import Progress
from neurons.text.conversations import Message, RoleTokens, role_tokens

# (title, total, unit) -> a context in which work is told.
Stage = Callable[[str, int | None, str], AbstractContextManager[Progress]]
BUILD, CHOOSE, REPORT = "estimate", "choose", "report"
# Languages that a lock keeps where none are named: of many scripts and families.
KEPT = ("ar", "de", "en", "es", "fr", "it", "ja", "pt", "ru", "zh")
ANSWER_TOKENS, KEPT_ANSWER_TOKENS = 60, 32
MOST_EXAMPLES = 64
LANGUAGES_AT_ONCE = 2  # whose questions fill a batch
LEAST_OBEYED = 0.5


def quiet(title: str, total: int | None, unit: str) -> AbstractContextManager[Progress]:
    """A ``Stage`` that tells nothing."""
    return nullcontext(lambda count: None)


@dataclass(frozen=True)
class Taught:
    """Examples of one part of the questions.

    Attributes:
        examples: those whose answer is in the target language.
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
        """Fraction of the questions that the teacher answers in the target language."""
        return len(self.examples) / self.asked if self.asked else 0.0


def require_chat(name: str, tokenizer: Any) -> None:
    """Refuse a model without a chat template.

    Raises:
        UsageError: it has none.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            f"{name} has no chat template, so it answers no questions: steer a base model by text "
            "(`broca run`), or give the instruct model"
        )


def prompt_of(loaded: LoadedModel, question: str, instruction: str | None = None) -> RoleTokens:
    """A question, with an instruction behind it, by the chat template, up to where the answer begins."""
    text = question if instruction is None else f"{question} {instruction}"
    return role_tokens(loaded.tokenizer, [Message("user", text)], answer_follows=True)


def answered(loaded: LoadedModel, prompts: Sequence[RoleTokens], tokens: int) -> list[Continuation]:
    """The likeliest answers of the model as it is."""
    return generate(loaded, [one.ids.tolist() for one in prompts], tokens, temperature=0)


def instruction_to(source: str, target: str) -> str:
    """What tells the teacher to answer in the target: in the source's language where Broca knows it, else in English."""
    return next(iter(instructions(source, target).values()))


def answered_by_language(
    loaded: LoadedModel, prompts: Mapping[str, Sequence[RoleTokens]], tokens: int
) -> dict[str, list[Continuation]]:
    """``answered`` for several languages, whose prompts share batches: a step costs about the same for few as for many."""
    answers = iter(answered(loaded, [one for some in prompts.values() for one in some], tokens))
    return {language: [next(answers) for _ in some] for language, some in prompts.items()}


def own_conversations(
    loaded: LoadedModel, questions: Questions, languages: Sequence[str], stage: Stage = quiet
) -> dict[str, list[RoleTokens]]:
    """Language -> the building half of its questions, each with the unedited model's answer."""
    found: dict[str, list[RoleTokens]] = {}
    with stage("Asking in every language", len(languages), "languages") as tell:
        for first in range(0, len(languages), LANGUAGES_AT_ONCE):
            some = languages[first : first + LANGUAGES_AT_ONCE]
            prompts = {
                language: [prompt_of(loaded, one.text) for one in taken(questions.of[language], BUILD)]
                for language in some
            }
            for language, answers in answered_by_language(loaded, prompts, KEPT_ANSWER_TOKENS).items():
                found[language] = [
                    prompt.answered(answer.ids)
                    for prompt, answer in zip(prompts[language], answers, strict=True)
                ]
            tell(len(some))
    return found


def taught(
    loaded: LoadedModel,
    questions: Questions,
    sources: Sequence[str],
    target: str,
    part: str,
    most: int | None = None,
) -> dict[str, Taught]:
    """Source -> what the unedited model answers, in the target, to the questions of a part with the instruction.

    Args:
        loaded: the unedited model.
        questions: in every source.
        sources: languages of the questions.
        target: language of the answers.
        part: of the questions.
        most: questions of a source; None: all of the part.
    """
    told_apart = tuple(questions.of)
    found = {}
    for source in sources:
        instruction = instruction_to(source, target)
        asked: list[Question] = taken(questions.of[source], part)[:most]
        teachers = [prompt_of(loaded, one.text, instruction) for one in asked]
        answers = answered(loaded, teachers, ANSWER_TOKENS)
        examples = [
            Example(tuple(prompt_of(loaded, one.text).ids.tolist()), tuple(teacher.ids.tolist()), answer.ids)
            for one, teacher, answer in zip(asked, teachers, answers, strict=True)
            if identify_language(prose(answer.text), told_apart) == target
        ]
        found[source] = Taught(tuple(examples), tuple(answer.text for answer in answers))
    return found


def require_obeyed(loaded: LoadedModel, found: dict[str, Taught], target: str) -> None:
    """Refuse a teacher that does not do what it is to teach.

    Raises:
        BrocaError: in some source, too few answers are in the target.
    """
    for source, one in found.items():
        if one.obeyed < LEAST_OBEYED:
            raise BrocaError(
                f"{loaded.name}: told to, it answers {len(one.examples)} of {one.asked} questions in {source!r} in "
                f"{target!r}, so it cannot teach that: choose a language that the model speaks"
            )


def own_answers(
    loaded: LoadedModel, questions: Questions, languages: Sequence[str], part: str
) -> dict[str, tuple[list[Example], list[str]]]:
    """Language -> examples whose teacher is the unedited model without an instruction, and its answers' texts."""
    prompts = {
        language: [prompt_of(loaded, one.text) for one in taken(questions.of[language], part)]
        for language in languages
    }
    found = {}
    for language, answers in answered_by_language(loaded, prompts, ANSWER_TOKENS).items():
        of = [tuple(prompt.ids.tolist()) for prompt in prompts[language]]
        examples = [Example(ids, ids, answer.ids) for ids, answer in zip(of, answers, strict=True)]
        found[language] = (examples, [answer.text for answer in answers])
    return found
