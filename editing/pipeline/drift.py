"""Planted drift: contexts in another language, which make a model answer the next question in that language.

A context is a system message in English or Chinese, the languages into which users report drift, and two questions in
that language with the unedited model's answers.
"""

from __future__ import annotations

from collections.abc import Sequence

from editing.evaluation.questions import Questions, questions_of_part
from editing.pipeline.lock_prompts import BUILD, CHOOSE, prompt_of
from editing.pipeline.lock_replies import answered
from neurons.errors import UsageError
from neurons.models.source import LoadedModel
from neurons.text.conversations import Message

SYSTEM_MESSAGES = {
    "en": "You are a helpful assistant. Answer every question of the user clearly and in detail.",
    "zh": "你是一个乐于助人的助手。请清楚、详细地回答用户的每一个问题。",
}
TURNS = 2
CONTEXTS = 2  # in each language
DRIFT_ANSWER_TOKENS = 40

Context = tuple[Message, ...]


def drift_contexts(
    loaded: LoadedModel, questions: Questions, sources: Sequence[str], part: str
) -> dict[str, list[Context]]:
    """Source -> contexts of its questions, in every language of ``SYSTEM_MESSAGES`` except the source, alternating.

    Args:
        loaded: the unedited model.
        questions: in English and Chinese (``require_drift_questions``); contexts contain the first ones of ``part``,
            without those that the model answers with nothing.
        sources: languages.
        part: of the questions.
    """
    by_language = {language: _contexts(loaded, questions, language, part) for language in SYSTEM_MESSAGES}
    result = {}
    for source in sources:
        others = [contexts for language, contexts in by_language.items() if language != source]
        result[source] = [context for alternating in zip(*others, strict=True) for context in alternating]
    return result


def require_drift_questions(questions: Questions) -> None:
    """Check that every part of the questions has enough of them for contexts, before any work.

    Raises:
        UsageError: too few questions in English or Chinese.
    """
    for language in SYSTEM_MESSAGES:
        of_language = questions.of.get(language, ())
        if any(len(questions_of_part(of_language, part)) < TURNS * CONTEXTS for part in (BUILD, CHOOSE)):
            raise UsageError(
                f"{len(of_language)} questions in {language!r} are too few to plant drift: give {4 * TURNS * CONTEXTS} or "
                "more"
            )


def context_tokens(loaded: LoadedModel, questions: Questions) -> int:
    """The maximum number of tokens of a context, to estimate memory before any answer is known."""
    longest = max(
        len(prompt_of(loaded, question.text).ids)
        for language in SYSTEM_MESSAGES
        for question in questions.of[language]
    )
    return (TURNS + 1) * longest + TURNS * DRIFT_ANSWER_TOKENS


def _contexts(loaded: LoadedModel, questions: Questions, language: str, part: str) -> list[Context]:
    of_part = questions_of_part(questions.of[language], part)
    texts = [question.text for question in of_part[: TURNS * CONTEXTS]]
    answers = answered(loaded, [prompt_of(loaded, text) for text in texts], DRIFT_ANSWER_TOKENS)
    turns = [
        (Message("user", text), Message("assistant", answer.text))
        for text, answer in zip(texts, answers, strict=True)
        if answer.text.strip()
    ]
    system = Message("system", SYSTEM_MESSAGES[language])
    return [
        (system, *(message for turn in turns[first::CONTEXTS] for message in turn))
        for first in range(CONTEXTS)
    ]
