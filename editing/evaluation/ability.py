"""Whether an edited model can still do what it could: the guard of a lock.

For each language:

    accuracy       of multiple-choice items (``editing.evaluation.choice_accuracy``)
    code           fractions of answers to requests for code that have a fenced block, and whose block is Python
    own answers    likelihood of the unedited model's greedy answers to everyday questions, and KL on them

Of three models: "base" is unedited, "prompted" is unedited with an instruction after the question, "edited" is edited.
Own answers are read by base and edited.  A model that is to answer in another language than the question's is scored on
the choices in that language.  Models that can think answer without thoughts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from editing.evaluation.asking import chat_tokens
from editing.evaluation.choice_accuracy import choice_log_probabilities, right
from editing.evaluation.choices import Choice
from editing.evaluation.code_answers import has_block, has_python
from editing.evaluation.generation import generate_by_language
from editing.evaluation.likelihood import Steering, read_again, read_unedited, unedited_head
from editing.evaluation.own_answers import answer_batches
from editing.evaluation.questions import Question
from neurons.errors import UsageError
from neurons.files.json_file import Figure, checked, read_json
from neurons.models.source import LoadedModel
from neurons.recording.text_pass import Progress
from neurons.statistics.proportions import Interval, paired_change, proportion
from neurons.text.batches import counted_tokens
from neurons.text.conversations import ANOTHER_MODEL

BASE, PROMPTED, EDITED = MODELS = ("base", "prompted", "edited")
CODE_TOKENS, ANSWER_TOKENS = 120, 60


@dataclass(frozen=True)
class Rate:
    """A fraction of items, and its change from the unedited model on the same items; None for that model."""

    items: int
    rate: Interval
    change: Interval | None


@dataclass(frozen=True)
class OwnAnswers:
    """The unedited model's answers.

    Attributes:
        tokens: of the answers, without end tokens.
        base, edited: negative log-likelihood, nats a token.
        divergence: KL from the unedited to the edited model, nats a token.
            NaN: no edit, or no tokens.
    """

    tokens: int
    base: Figure
    edited: Figure
    divergence: Figure


@dataclass(frozen=True)
class Ability:
    """The figures of a model, and of an edit.

    Attributes:
        accuracy, blocks, python: language -> model -> fraction of right items, of answers with a fenced block, and of
            answers whose first block parses as Python.
        own_answers: by language.
        about: provenance, as JSON values.
    """

    accuracy: Mapping[str, Mapping[str, Rate]]
    blocks: Mapping[str, Mapping[str, Rate]]
    python: Mapping[str, Mapping[str, Rate]]
    own_answers: Mapping[str, OwnAnswers]
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Tasks:
    """What a model is asked, by language.

    Attributes:
        choices: multiple-choice items, the same in each language.
        code: requests for code.
        questions: everyday questions.
    """

    choices: Mapping[str, Sequence[Choice]]
    code: Mapping[str, Sequence[Question]]
    questions: Mapping[str, Sequence[Question]]

    def items(self, languages: Iterable[str]) -> int:
        """Number of items and requests in some languages, as ``ability`` reports them to its progress for a model."""
        return sum(len(self.choices[language]) + len(self.code[language]) for language in languages)


def ability(
    loaded: LoadedModel,
    tasks: Tasks,
    languages: Sequence[str],
    *,
    steering: Steering | None = None,
    instructions: Mapping[str, str] | None = None,
    answers_in: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Ability:
    """Measure a model, and an edit of it.

    Args:
        loaded: the unedited model, with a chat template.
        tasks: what it is asked.
        languages: languages of the questions.
        steering: a context in which the model is the edited one; None: base (and prompted) alone.
        instructions: language -> the instruction of "prompted", which follows each question; languages without one have no
            such figures.
        answers_in: language -> the language in which "prompted" and "edited" are to answer questions in it, if another; without
            ``tasks.choices`` in it, they have no multiple choice.
        progress: called with numbers of items.

    Raises:
        UsageError: as ``choice_log_probabilities`` and ``chat_tokens``.
    """
    advance = progress or (lambda count: None)
    prompts = {
        language: _prompts(loaded, [question.text for question in tasks.questions[language]])
        for language in languages
    }
    answers = generate_by_language(loaded, prompts, ANSWER_TOKENS)
    head = None if steering is None else unedited_head(loaded)
    own = {
        language: read_unedited(loaded, answer_batches(loaded, prompts[language], answers[language]), head)
        for language in languages
    }
    hits = {BASE: _hits(loaded, tasks, languages, {}, {}, advance)}
    if instructions:
        hits[PROMPTED] = _hits(loaded, tasks, tuple(instructions), instructions, answers_in or {}, advance)
    again = dict.fromkeys(own, (math.nan, math.nan))
    if steering is not None:
        with steering():
            hits[EDITED] = _hits(loaded, tasks, languages, {}, answers_in or {}, advance)
            again = {language: read_again(loaded, text) for language, text in own.items()}
    accuracy, blocks, python = (
        {
            language: {
                model: _rate(of_model[language][kind], None if model == BASE else hits[BASE][language][kind])
                for model, of_model in hits.items()
                if language in of_model and of_model[language][kind]
            }
            for language in languages
        }
        for kind in range(3)
    )
    return Ability(
        accuracy,
        blocks,
        python,
        {
            language: OwnAnswers(counted_tokens(text.batches), text.nll, *again[language])
            for language, text in own.items()
        },
    )


def load_ability(path: Path | str) -> Ability:
    """The result in a file of ``broca ability``.

    Raises:
        UsageError: no such file, or another one; the message names the field.
    """
    return checked(Ability, read_json(path), path)


def _hits(
    loaded: LoadedModel,
    tasks: Tasks,
    languages: Sequence[str],
    instructions: Mapping[str, str],
    answers_in: Mapping[str, str],
    advance: Progress,
) -> dict[str, tuple[list[bool], list[bool], list[bool]]]:
    """Language -> for each item whether it is right, for each request whether it has a block, and whether it is Python."""
    right_items: dict[str, list[bool]] = {}
    for language in languages:
        items = tasks.choices[language]
        answered_in = answers_in.get(language, language)
        if answered_in not in tasks.choices:
            right_items[language] = []
            advance(len(items))
            continue
        offered = _same_items(tasks, items, answered_in)
        asked = _instructed([item.text for item in items], instructions.get(language))
        scores = choice_log_probabilities(loaded, asked, [item.choices for item in offered], advance)
        right_items[language] = right(scores, [item.answer for item in offered])
    requests = {
        language: _prompts(
            loaded,
            _instructed([request.text for request in tasks.code[language]], instructions.get(language)),
        )
        for language in languages
    }
    results = {}
    for language, answers in generate_by_language(loaded, requests, CODE_TOKENS).items():
        texts = [answer.text for answer in answers]
        results[language] = right_items[language], has_block(texts), has_python(texts)
        advance(len(texts))
    return results


def _same_items(tasks: Tasks, items: Sequence[Choice], language: str) -> list[Choice]:
    """The items in a language, in the order of ``items``."""
    by_id = {item.question_id: item for item in tasks.choices[language]}
    if missing := [item.question_id for item in items if item.question_id not in by_id]:
        raise UsageError(
            f"item {missing[0]!r} is missing in {language!r}: give the same items in each language"
        )
    return [by_id[item.question_id] for item in items]


def _instructed(texts: Sequence[str], instruction: str | None) -> list[str]:
    return [text if instruction is None else f"{text} {instruction}" for text in texts]


def _prompts(loaded: LoadedModel, texts: Sequence[str]) -> list[tuple[int, ...]]:
    return [chat_tokens(loaded.tokenizer, text, ANOTHER_MODEL, thinks=False) for text in texts]


def _rate(hits: Sequence[bool], base: Sequence[bool] | None) -> Rate:
    return Rate(len(hits), proportion(hits), None if base is None else paired_change(base, hits))
