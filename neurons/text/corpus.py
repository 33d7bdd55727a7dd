"""Corpora: a directory of ``<language>.txt``, ``.jsonl`` or ``.parquet``, one text in each line or row."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from neurons.errors import UsageError
from neurons.text.corpus_files import corpus_files

# Half to estimate from, a quarter to choose settings on, a quarter to report on: by line number, so that parallel
# files stay parallel.
PARTS = {"all": (0, 1, 2, 3), "estimate": (0, 1), "choose": (2,), "report": (3,)}


@dataclass(frozen=True)
class Corpus:
    """Texts of several languages.

    Attributes:
        texts: language -> its texts in file order; blank lines are "", so that line i of every language stays
            parallel.
        digest: sha256 over languages and texts, hexadecimal.
        part: "all", "estimate", "choose" or "report" (``PARTS``, by line number modulo 4).
        tokens: maximum tokens of each language to read, evenly from the whole text; None: what the method needs
            (``neurons.text.token_budget``).
    """

    texts: dict[str, tuple[str, ...]]
    digest: str
    part: str
    tokens: int | None = None

    @property
    def languages(self) -> tuple[str, ...]:
        return tuple(self.texts)

    def require(self, *languages: str) -> None:
        """Check that the corpus has the languages.

        Raises:
            UsageError: names the first missing language.
        """
        for language in languages:
            if language not in self.texts:
                raise UsageError(
                    f"the corpus has no language {language!r}: it has {', '.join(self.languages)}"
                )

    def only(self, *languages: str) -> Corpus:
        """The corpus without its other languages."""
        return replace(self, texts={language: self.texts[language] for language in languages})

    def non_empty(self, language: str) -> list[str]:
        return [text for text in self.texts[language] if text]


def read_corpus(
    directory: Path | str, languages: Sequence[str] | None = None, part: str = "all", min_languages: int = 2
) -> Corpus:
    """Read a corpus directory.

    Args:
        directory: one file for each language, named by its code (``neurons.text.corpus_files``): ``.txt`` (UTF-8, one
            text in each line; also FLORES' ``.dev`` and ``.devtest``), ``.jsonl`` (objects with ``text``) or
            ``.parquet`` (column ``text``).
        languages: languages to read, in this order; None reads all, sorted by name.
        part: lines to read, a key of ``PARTS``.
        min_languages: minimum number of languages.

    Raises:
        UsageError: no such directory, a language without a file or with two, an empty file, bad UTF-8,
            bad JSON, the same text in two files, or fewer than ``min_languages`` languages.
    """
    directory = Path(directory)
    if part not in PARTS:
        raise UsageError(f"part {part!r} is unknown: choose from {', '.join(PARTS)}")
    files = corpus_files(directory, languages).of
    if len(files) < min_languages:
        raise UsageError(
            f"{directory}: {len(files)} language ({', '.join(files)}), but at least {min_languages} are needed: "
            "neurons are specific to a language only in comparison with others"
        )
    digest = hashlib.sha256()
    texts = {}
    of_content: dict[bytes, Path] = {}
    for language, path in files.items():
        lines = _read_texts(path)
        if not any(lines):
            raise UsageError(f"{path}: language {language!r} has no text")
        # Of the whole file: short parts of different files can be equal by chance.
        content = hashlib.sha256("\n".join(filter(None, lines)).encode()).digest()
        same = of_content.setdefault(content, path)
        if same != path:
            raise UsageError(
                f"{directory}: {same.name} and {path.name} hold the same text: remove one of them, or replace its "
                "text by text of its language"
            )
        kept = tuple(line for i, line in enumerate(lines) if i % 4 in PARTS[part])
        if not any(kept):
            raise UsageError(f"{path}: language {language!r} has too few lines for part {part!r}")
        texts[language] = kept
        digest.update(json.dumps([language, kept], ensure_ascii=False).encode())
    return Corpus(texts=texts, digest=digest.hexdigest(), part=part)


def _read_texts(path: Path) -> list[str]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _read_parquet(path)
    raw = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        content = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UsageError(f"{path}: line {line} is not UTF-8: convert the file") from error
    # Not splitlines(): U+2028 and other separators occur within texts and would shift parallel lines.
    lines = content.split("\n")
    if lines and not lines[-1]:
        lines.pop()
    if suffix != ".jsonl":
        return [line.strip() for line in lines]
    texts = []
    for number, row in enumerate(lines, start=1):
        if not row.strip():
            texts.append("")
            continue
        try:
            text = json.loads(row)["text"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UsageError(f"{path}: line {number} is not a JSON object with 'text'") from error
        if not isinstance(text, str) or not _is_unicode(text):
            raise UsageError(f"{path}: line {number}: 'text' is not a string of Unicode text")
        texts.append(text.strip())
    return texts


def _is_unicode(text: str) -> bool:
    """Whether UTF-8 can encode the text: JSON can hold half a surrogate pair."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _read_parquet(path: Path) -> list[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        column = pyarrow.parquet.read_table(path, columns=["text"]).column("text").to_pylist()
    except (pyarrow.ArrowInvalid, KeyError, OSError) as error:
        raise UsageError(f"{path}: not a parquet file with a column 'text' ({error})") from error
    if any(not isinstance(text, str | None) for text in column):
        raise UsageError(f"{path}: column 'text' holds values that are not strings")
    return [(text or "").strip() for text in column]
