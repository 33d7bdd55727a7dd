"""Multiple-choice items: rows with ``question_id``, ``text``, four ``choices`` and the letter of the ``answer``.

{"question_id": "7", "text": "Which animal barks?", "choices": ["a cat", "a dog", "a hen", "a cow"], "answer": "B"}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editing.evaluation.questions import read_rows
from neurons.errors import UsageError
from neurons.text.corpus_files import language_label

LETTERS = ("A", "B", "C", "D")
EXAMPLE = '{"question_id": "7", "text": "2 + 2 = ?", "choices": ["3", "4", "5", "6"], "answer": "B"}'


@dataclass(frozen=True)
class Choice:
    """One item.

    Attributes:
        question_id: the same in every language.
        text: the question, with the passage or the code that it is about.
        choices: four different answers.
        answer: index of the right one.
    """

    question_id: str
    text: str
    choices: tuple[str, ...]
    answer: int


def read_choices(directory: Path) -> dict[str, tuple[Choice, ...]]:
    """Language -> its items, in file order.

    Args:
        directory: files ``<language>.jsonl``.

    Raises:
        UsageError: no such files, a row that is not as in the module's docstring, or an id twice in a language.
    """
    items: dict[str, tuple[Choice, ...]] = {}
    for file in sorted(directory.glob("*.jsonl")):
        rows = [_choice(file, number, row) for number, row in enumerate(read_rows(file, EXAMPLE), start=1)]
        ids = [row.question_id for row in rows]
        if repeated := [one for one in ids if ids.count(one) > 1]:
            raise UsageError(f"{file}: question_id {repeated[0]!r} occurs twice: give every item its own")
        if rows:
            items[language_label(file.stem)] = tuple(rows)
    if not items:
        raise UsageError(
            f"{directory}: no multiple-choice items: give <language>.jsonl with rows like {EXAMPLE}"
        )
    return items


def _choice(file: Path, number: int, row: Mapping[str, Any]) -> Choice:
    question_id, text, choices, answer = (
        row.get(name) for name in ("question_id", "text", "choices", "answer")
    )
    if question_id is None or not isinstance(text, str) or not text.strip() or not isinstance(choices, list):
        raise UsageError(
            f"{file}: row {number} lacks question_id, text or choices: write rows like {EXAMPLE}"
        )
    texts = tuple(choice.strip() for choice in choices if isinstance(choice, str) and choice.strip())
    if len(texts) != len(choices) or len(set(texts)) != len(texts) or len(texts) != len(LETTERS):
        raise UsageError(
            f"{file}: row {number} does not have four different choices: write rows like {EXAMPLE}"
        )
    if answer not in LETTERS:
        raise UsageError(f"{file}: row {number}: the answer {answer!r} is not one of {', '.join(LETTERS)}")
    return Choice(str(question_id), text.strip(), texts, LETTERS.index(answer))
