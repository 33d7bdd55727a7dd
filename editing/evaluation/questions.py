"""Question files: rows with ``question_id`` and ``text``, the same questions in several languages."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neurons.errors import UsageError
from neurons.text.corpus import PARTS as CORPUS_PARTS
from neurons.text.corpus_files import language_label
from neurons.text.corpus_rows import parquet_rows, read_lines

SUFFIXES = (".jsonl", ".csv", ".parquet")
EXAMPLE = '{"question_id": "7", "text": "How do I bake bread?"}'
PARTS = {"all": (0, 1), "choose": (0,), "report": (1,)}  # part -> indices of its questions, modulo 2


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        question_id: the same in every language.
        text: the question.
        reference: a good answer in the target language; None if the file has none.
    """

    question_id: str
    text: str
    reference: str | None = None


@dataclass(frozen=True)
class Questions:
    """Questions by language.

    Attributes:
        of: language -> its questions, in file order.
        digest: sha256 over all files, hexadecimal.
        part: "all", "choose" (the half to choose settings on) or "report" (the half to report).
    """

    of: dict[str, tuple[Question, ...]]
    digest: str
    part: str = "all"

    def half(self, part: str) -> Questions:
        """Every other question: "choose" takes the even indices, "report" the odd ones.

        Raises:
            UsageError: a language with a single question.
        """
        kept = {
            language: tuple(question for i, question in enumerate(questions) if i % 2 in PARTS[part])
            for language, questions in self.of.items()
        }
        if not all(kept.values()):
            raise UsageError(
                "settings are chosen on one half of the questions: give two or more in every language"
            )
        return Questions(kept, self.digest, part)


def questions_by_language(path: Path | str) -> Questions:
    """Questions that are asked in their languages.

    Args:
        path: as for ``read_questions``.

    Raises:
        UsageError: as ``read_questions``, or a row without a language.
    """
    questions = read_questions(path)
    if "" in questions.of:
        raise UsageError(
            f"{path}: rows name no language: add `language` to each, or give a directory of <language>.jsonl"
        )
    return questions


def questions_of_part(questions: Sequence[Question], part: str) -> list[Question]:
    """The questions of a part, split like a corpus: a half to estimate from, a quarter to choose on, one to report.

    Args:
        questions: of one language.
        part: a key of ``neurons.text.corpus.PARTS``.
    """
    return [question for i, question in enumerate(questions) if i % 4 in CORPUS_PARTS[part]]


def read_questions(path: Path | str, source: str | None = None) -> Questions:
    """Read questions.

    Args:
        path: a ``.jsonl``, ``.csv`` or ``.parquet`` file with ``question_id``, ``text`` and optionally
            ``reference`` and ``language``; without ``language`` all rows are in the source language.  Or a
            directory of such files named by language, ``en.jsonl``, ``fr.jsonl``, ...
        source: a language that must have questions; None accepts any.

    Raises:
        UsageError: no such file, another suffix, a row without ``question_id`` or ``text``, an id twice in
            a language, or no question in the source language.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(
            file for file in path.iterdir() if file.suffix in SUFFIXES and not file.name.startswith(".")
        )
    elif path.is_file():
        files = [path]
    else:
        raise UsageError(
            f"{path}: no such questions: give a file or a directory of files with rows like {EXAMPLE}"
        )
    by_language: dict[str, list[Question]] = {}
    digest = hashlib.sha256()
    for file in files:
        digest.update(json.dumps(file.name).encode() + file.read_bytes())
        fallback = file.stem if path.is_dir() else source or ""
        for number, row in enumerate(read_rows(file), start=1):
            language = language_label(str(row.get("language") or fallback))
            by_language.setdefault(language, []).append(_question(file, number, row))
    if not by_language or (source is not None and source not in by_language):
        which = "" if source is None else f" in {source!r}, the source language"
        raise UsageError(f"{path}: no question{which} (languages: {', '.join(by_language) or 'none'})")
    for language, questions in by_language.items():
        ids = Counter(question.question_id for question in questions)
        repeated = [question_id for question_id, count in ids.items() if count > 1]
        if repeated:
            raise UsageError(f"{path}: question_id {repeated[0]!r} occurs twice in language {language!r}")
    return Questions(
        {language: tuple(questions) for language, questions in by_language.items()}, digest.hexdigest()
    )


def _question(path: Path, number: int, row: Mapping[str, Any]) -> Question:
    question_id, text, reference = (row.get(name) for name in ("question_id", "text", "reference"))
    if question_id is None or not isinstance(text, str) or not text.strip():
        raise UsageError(f"{path}: row {number} lacks question_id or text: write rows like {EXAMPLE}")
    if reference is not None and not isinstance(reference, str):
        raise UsageError(f"{path}: row {number}: the reference is not a string")
    return Question(str(question_id), text.strip(), (reference or "").strip() or None)


def read_rows(path: Path, example: str = EXAMPLE) -> list[dict[str, Any]]:
    """The rows of a ``.jsonl``, ``.csv`` or ``.parquet`` file, as objects.

    Args:
        path: the file.
        example: a row for the error message.

    Raises:
        UsageError: another suffix, or a file or line that cannot be read.
    """
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path}: questions are read from {', '.join(SUFFIXES)}")
    if path.suffix == ".parquet":
        return parquet_rows(path)
    lines = read_lines(path)
    if path.suffix == ".csv":
        return list(csv.DictReader(io.StringIO("\n".join(lines), newline="")))
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"{path}: line {number} is not JSON: write lines like {example}") from error
        if not isinstance(row, dict):
            raise UsageError(f"{path}: line {number} is not an object like {example}")
        rows.append(row)
    return rows
