"""A model's answers to questions, as a file of conversations that is written after every batch and can be continued.

A row is one conversation, in the format of chat datasets:

    {"question_id": "7", "language": "fr", "messages": [{"role": "user", ...}, {"role": "assistant", ...}], "of": "..."}

``of`` is a digest of the weights and the settings: a file never mixes rows of different models or settings.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from editing.evaluation.generation import Continuation
from editing.evaluation.questions import Question
from neurons.errors import BrocaError, UsageError
from neurons.files.artifact import write_atomically

AT_ONCE = 64
# Prompts -> their answers: ``editing.evaluation.generation.generate`` or vLLM's writer.
Write = Callable[..., Sequence[Continuation]]
Row = dict[str, Any]


def settings_digest(fingerprint: str, settings: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of a digest of the weights and the settings."""
    content = json.dumps([fingerprint, dict(settings)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def ask(
    write: Write,
    prompt: Callable[[str], Sequence[int]],
    questions: Mapping[str, Sequence[Question]],
    out: Path,
    of: str,
    progress: Callable[[int], None] | None = None,
) -> list[Row]:
    """Answer the questions that have no answer in ``out``.

    Args:
        write: generates the answers.
        prompt: a question -> its tokens.
        questions: language -> questions.
        out: a ``.jsonl`` file, written after every batch.
        of: ``settings_digest``.
        progress: called with the number of answers in the file, then with the number of answers of each batch.

    Returns:
        All rows, by language in the order of the questions.

    Raises:
        UsageError: ``out`` has answers of another model or with other settings, or an answer to a different question with
            the same id.
        BrocaError: ``out`` is another kind of file.
    """
    rows = read_answers(out, of)
    pairs = [(language, question) for language, of_language in questions.items() for question in of_language]
    for language, question in pairs:
        row = rows.get((language, question.question_id))
        if row is not None and row["messages"][0]["content"] != question.text:
            raise UsageError(
                f"{out} has an answer to a different question {question.question_id} in {language!r}: choose another "
                "file, or remove it"
            )
    missing = [pair for pair in pairs if (pair[0], pair[1].question_id) not in rows]
    if progress is not None:
        progress(len(pairs) - len(missing))
    for first in range(0, len(missing), AT_ONCE):
        batch = missing[first : first + AT_ONCE]
        answers = write([prompt(question.text) for _, question in batch])
        for (language, question), answer in zip(batch, answers, strict=True):
            rows[language, question.question_id] = {
                "question_id": question.question_id,
                "language": language,
                "messages": [
                    {"role": "user", "content": question.text},
                    {"role": "assistant", "content": answer.text},
                ],
                "of": of,
            }
        write_atomically(out, _lines(rows.values()))
        if progress is not None:
            progress(len(batch))
    return [rows[language, question.question_id] for language, question in pairs]


def read_answers(path: Path, of: str | None = None) -> dict[tuple[str, str], Row]:
    """(language, question id) -> row; empty if the file is missing or empty.

    Args:
        path: a file that ``ask`` wrote.
        of: the ``settings_digest`` that all rows must have; None accepts any.

    Raises:
        UsageError: a row with another digest.
        BrocaError: not a file that ``ask`` wrote.
    """
    if not path.exists() or not path.stat().st_size:
        return {}
    rows: dict[tuple[str, str], Row] = {}
    # Not splitlines: an answer may contain other line separators.
    for number, line in enumerate(path.read_bytes().rstrip(b"\n").split(b"\n"), start=1):
        try:
            row = json.loads(line)
            key = str(row["language"]), str(row["question_id"])
            digest = row["of"]
            roles = [message["role"] for message in row["messages"] if isinstance(message["content"], str)]
        except (ValueError, KeyError, TypeError) as error:
            raise BrocaError(
                f"{path}: line {number} is not an answer of `broca ask`: choose another file"
            ) from error
        if of is not None and digest != of:
            raise UsageError(
                f"{path} has answers of another model or with other settings: choose another file, or remove it"
            )
        if roles != ["user", "assistant"]:
            raise BrocaError(f"{path}: line {number} has messages of {', '.join(roles)}: choose another file")
        rows[key] = row
    return rows


def _lines(rows: Any) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
