"""A model's own answers to questions, as a file of conversations that grows by whole batches and can be taken up again.

A row is one conversation, in the form that chat datasets have:

    {"question_id": "7", "language": "fr", "messages": [{"role": "user", ...}, {"role": "assistant", ...}], "of": "..."}

``of`` names the model, its weights and the settings: rows of another model are never mixed with these.
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
# Prompts -> their answers, as ``editing.evaluation.generation.generate`` and vLLM's writer.
Write = Callable[..., Sequence[Continuation]]
Row = dict[str, Any]


def settings_digest(fingerprint: str, settings: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of what answers depend on beside the questions."""
    said = json.dumps([fingerprint, dict(settings)], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def ask(
    write: Write,
    prompt: Callable[[str], Sequence[int]],
    questions: Mapping[str, Sequence[Question]],
    out: Path,
    of: str,
    progress: Callable[[int], None] | None = None,
) -> list[Row]:
    """Answer what has no answer in ``out`` yet.

    Args:
        write: the model.
        prompt: a question -> its tokens.
        questions: language -> questions.
        out: a ``.jsonl`` file; after every batch it holds all whole batches.
        of: ``settings_digest``.
        progress: called with numbers of answers, those that were there first.

    Returns:
        All rows, by language in the order of the questions.

    Raises:
        UsageError: ``out`` holds answers of another model or other settings, or to another question of the same number.
        BrocaError: ``out`` is not such a file.
    """
    found = read_answers(out, of)
    wanted = [(language, one) for language, some in questions.items() for one in some]
    for language, one in wanted:
        row = found.get((language, one.question_id))
        if row is not None and row["messages"][0]["content"] != one.text:
            raise UsageError(
                f"{out} answers another question {one.question_id} in {language!r}: name another file, or remove it"
            )
    left = [(language, one) for language, one in wanted if (language, one.question_id) not in found]
    if progress is not None:
        progress(len(wanted) - len(left))
    for first in range(0, len(left), AT_ONCE):
        some = left[first : first + AT_ONCE]
        answers = write([prompt(one.text) for _, one in some])
        for (language, one), answer in zip(some, answers, strict=True):
            found[language, one.question_id] = {
                "question_id": one.question_id,
                "language": language,
                "messages": [
                    {"role": "user", "content": one.text},
                    {"role": "assistant", "content": answer.text},
                ],
                "of": of,
            }
        write_atomically(out, _lines(found.values()))
        if progress is not None:
            progress(len(some))
    return [found[language, one.question_id] for language, one in wanted]


def read_answers(path: Path, of: str | None = None) -> dict[tuple[str, str], Row]:
    """(language, question id) -> row; empty where there is no file.

    Raises:
        UsageError: rows that are not ``of`` this.
        BrocaError: not a file that ``ask`` wrote.
    """
    if not path.exists() or not path.stat().st_size:
        return {}
    found: dict[tuple[str, str], Row] = {}
    # Not splitlines: an answer may hold other characters that end a line.
    for number, line in enumerate(path.read_bytes().rstrip(b"\n").split(b"\n"), start=1):
        try:
            row = json.loads(line)
            key = str(row["language"]), str(row["question_id"])
            said = row["of"]
            roles = [message["role"] for message in row["messages"] if isinstance(message["content"], str)]
        except (ValueError, KeyError, TypeError) as error:
            raise BrocaError(
                f"{path}: line {number} is no answer of `broca ask`: name another file"
            ) from error
        if of is not None and said != of:
            raise UsageError(
                f"{path} holds answers of another model or of other settings: name another file, or remove it"
            )
        if roles != ["user", "assistant"]:
            raise BrocaError(f"{path}: line {number} has messages of {', '.join(roles)}: name another file")
        found[key] = row
    return found


def _lines(rows: Any) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
