"""Questions that models answer: files with ``question_id`` and ``text``, the same question in several languages."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neurons.errors import UsageError
from neurons.text.corpus import PARTS as CORPUS_PARTS
from neurons.text.corpus_files import language_label

SUFFIXES = (".jsonl", ".csv", ".parquet")
EXAMPLE = '{"question_id": "7", "text": "How do I bake bread?"}'
PARTS = {"all": (0, 1), "choose": (0,), "report": (1,)}  # by the question's place, modulo 2


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        question_id: the same in every language.
        text: in the language that it is asked in.
        reference: what a good answer is, in the target language; None where the file has none.
    """

    question_id: str
    text: str
    reference: str | None = None


@dataclass(frozen=True)
class Questions:
    """Questions by language.

    Attributes:
        of: language -> its questions, in file order.
        digest: sha256 over all of it, hexadecimal.
        part: "all", or the half to choose settings on, or the half to report.
    """

    of: dict[str, tuple[Question, ...]]
    digest: str
    part: str = "all"

    def half(self, part: str) -> Questions:
        """Every other question: those at even places to choose on, those at odd ones to report.

        Raises:
            UsageError: a single question.
        """
        kept = {
            language: tuple(one for i, one in enumerate(some) if i % 2 in PARTS[part])
            for language, some in self.of.items()
        }
        if not all(kept.values()):
            raise UsageError(
                "settings are chosen on one half of the questions: give two or more in every language"
            )
        return Questions(kept, self.digest, part)


def taken(questions: Sequence[Question], part: str) -> list[Question]:
    """The questions of a part as corpora have them: a half to estimate from, a quarter to choose on, one to report.

    Args:
        questions: of one language.
        part: a key of ``neurons.text.corpus.PARTS``.
    """
    return [one for place, one in enumerate(questions) if place % 4 in CORPUS_PARTS[part]]


def read_questions(path: Path, source: str | None = None) -> Questions:
    """Read questions.

    Args:
        path: a ``.jsonl``, ``.csv`` or ``.parquet`` with ``question_id`` and ``text`` and, if it likes,
            ``reference`` and ``language``; without ``language`` all of it is in the source language.  Or a
            directory of such files named by language, ``en.jsonl``, ``fr.jsonl``, ...
        source: the language that is asked in; it must be there.  None: whatever is there will do.

    Raises:
        UsageError: no such file, another ending, a row without ``question_id`` or ``text``, an id twice in
            a language, or nothing in the source language.
    """
    if path.is_dir():
        files = sorted(
            one for one in path.iterdir() if one.suffix in SUFFIXES and not one.name.startswith(".")
        )
    elif path.is_file():
        files = [path]
    else:
        raise UsageError(f"{path}: there are no such questions: a file or directory with rows like {EXAMPLE}")
    found: dict[str, list[Question]] = {}
    digest = hashlib.sha256()
    for file in files:
        digest.update(json.dumps(file.name).encode() + file.read_bytes())
        fallback = file.stem if path.is_dir() else source or ""
        for number, row in enumerate(_rows(file), start=1):
            language = language_label(str(row.get("language") or fallback))
            found.setdefault(language, []).append(_question(file, number, row))
    if (not found) if source is None else (source not in found):
        there, which = (
            ", ".join(found) or "nothing",
            "" if source is None else f" in {source!r}, the source language",
        )
        raise UsageError(f"{path}: no question{which} (there is {there})")
    for language, some in found.items():
        ids = [one.question_id for one in some]
        repeated = next((one for one in ids if ids.count(one) > 1), None)
        if repeated is not None:
            raise UsageError(f"{path}: question_id {repeated!r} is there twice in language {language!r}")
    return Questions({language: tuple(some) for language, some in found.items()}, digest.hexdigest())


def _question(path: Path, number: int, row: Mapping[str, Any]) -> Question:
    identity, text, reference = (row.get(name) for name in ("question_id", "text", "reference"))
    if identity is None or not isinstance(text, str) or not text.strip():
        raise UsageError(f"{path}: row {number} lacks question_id or text: write rows like {EXAMPLE}")
    if reference is not None and not isinstance(reference, str):
        raise UsageError(f"{path}: row {number}: the reference is not a text")
    return Question(str(identity), text.strip(), (reference or "").strip() or None)


def _rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path}: questions are read from {', '.join(SUFFIXES)}")
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise UsageError(f"{path}: not a parquet file ({error})") from error
        return rows
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8: convert the file") from error
    if path.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(content, newline="")))
    rows = []
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"{path}: line {number} is not JSON: write lines like {EXAMPLE}") from error
        if not isinstance(row, dict):
            raise UsageError(f"{path}: line {number} is not an object like {EXAMPLE}")
        rows.append(row)
    return rows
