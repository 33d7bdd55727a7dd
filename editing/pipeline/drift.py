"""Planted drift: what comes before a question and draws the answer into another language.

A system message in English or Chinese, the languages that users report answers to drift into, and two questions in it
with the unedited model's answers to them.
"""

from __future__ import annotations

from collections.abc import Sequence

from editing.evaluation.questions import Questions, taken
from editing.pipeline.lock_prompts import answered, prompt_of
from neurons.errors import UsageError
from neurons.models.source import LoadedModel
from neurons.text.conversations import Message

SYSTEM_MESSAGES = {
    "en": "You are a helpful assistant. Answer every question of the user clearly and in detail.",
    "zh": "你是一个乐于助人的助手。请清楚、详细地回答用户的每一个问题。",
}
TURNS = 2
CONTEXTS = 2  # of a language
DRIFT_ANSWER_TOKENS = 40

Context = tuple[Message, ...]


def drift_contexts(
    loaded: LoadedModel, questions: Questions, sources: Sequence[str], part: str
) -> dict[str, list[Context]]:
    """Source -> what comes before its questions: contexts in every language of ``SYSTEM_MESSAGES`` but its own, by turns.

    Args:
        loaded: the unedited model.
        questions: in English and Chinese; the first ones of ``part`` are taken.
        sources: languages.
        part: of the questions.

    Raises:
        UsageError: too few questions in a language to drift into.
    """
    of_language = {language: _contexts(loaded, questions, language, part) for language in SYSTEM_MESSAGES}
    return {
        source: [
            context
            for both in zip(*(some for name, some in of_language.items() if name != source), strict=True)
            for context in both
        ]
        for source in sources
    }


def context_tokens(loaded: LoadedModel, questions: Questions) -> int:
    """Most tokens of a context, for an estimate of memory before any answer is known."""
    longest = max(
        len(prompt_of(loaded, one.text).ids)
        for language in SYSTEM_MESSAGES
        for one in questions.of.get(language, ())
    )
    return (TURNS + 1) * longest + TURNS * DRIFT_ANSWER_TOKENS


def _contexts(loaded: LoadedModel, questions: Questions, language: str, part: str) -> list[Context]:
    texts = [question.text for question in taken(questions.of.get(language, ()), part)][: TURNS * CONTEXTS]
    if len(texts) < TURNS * CONTEXTS:
        raise UsageError(
            f"{len(texts)} questions in {language!r} to plant drift with: give {4 * TURNS * CONTEXTS} or more"
        )
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
