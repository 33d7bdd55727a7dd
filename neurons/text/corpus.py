"""Corpora: a directory of ``<language>.txt``, ``.jsonl`` or ``.parquet``, one text in each line or row.

A row of ``.jsonl`` or ``.parquet`` may be a conversation (``neurons.text.corpus_rows``).  A corpus may also be one ``.jsonl`` file
whose rows name their ``language``, as ``broca ask`` writes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from neurons.errors import UsageError
from neurons.text.conversations import MESSAGE_ROLES, SELECTABLE
from neurons.text.corpus_files import corpus_files, language_label
from neurons.text.corpus_rows import (
    COLUMNS,
    Conversation,
    Text,
    parquet_rows,
    parsed,
    read_lines,
    row_text,
)

# Half to estimate from, a quarter to choose settings on, a quarter to report on: by line number, so that parallel
# files stay parallel.
PARTS = {"all": (0, 1, 2, 3), "estimate": (0, 1), "choose": (2,), "report": (3,)}


@dataclass(frozen=True)
class Corpus:
    """Texts of several languages.

    Attributes:
        texts: language -> its texts and conversations in file order; blank lines are "", so that line i of every
            language stays parallel.
        digest: sha256 over languages and texts, hexadecimal.
        part: "all", "estimate", "choose" or "report" (``PARTS``, by line number modulo 4).
        tokens: maximum tokens of each language to read, evenly from the whole text; None: what the method needs
            (``neurons.text.token_budget``).
        roles: roles of the counted tokens of conversations (``neurons.text.conversations.SELECTABLE``).
        digests: language -> sha256 of its texts, hexadecimal; empty if unknown.
    """

    texts: dict[str, tuple[Text, ...]]
    digest: str
    part: str
    tokens: int | None = None
    roles: tuple[str, ...] = MESSAGE_ROLES
    digests: dict[str, str] = field(default_factory=dict)

    @property
    def languages(self) -> tuple[str, ...]:
        return tuple(self.texts)

    @property
    def has_conversations(self) -> bool:
        return any(isinstance(text, Conversation) for texts in self.texts.values() for text in texts)

    @property
    def provenance(self) -> dict[str, Any]:
        """Digest, part and, with conversations, roles, as JSON values."""
        roles = {"roles": list(self.roles)} if self.has_conversations else {}
        return {"digest": self.digest, "part": self.part, **roles}

    def file_line(self, line: int) -> int:
        """The line of the file, from 0, of a line of the part."""
        kept = PARTS[self.part]
        return line // len(kept) * 4 + kept[line % len(kept)]

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

    def non_empty(self, language: str) -> list[Text]:
        return [text for text in self.texts[language] if text]

    def require_plain(self, *languages: str, remedy: str = "give plain text") -> None:
        """Check that the languages have no conversations, which have no openings.

        Args:
            languages: languages of the corpus.
            remedy: the fix, as the end of a sentence.

        Raises:
            UsageError: names the first conversation.
        """
        for language in languages:
            for text in self.texts[language]:
                if isinstance(text, Conversation):
                    raise UsageError(
                        f"{text.place} is a conversation, but openings of lines in {language!r} are needed: {remedy}"
                    )

    def lines(self, language: str) -> tuple[str, ...]:
        """A language's texts, in file order.

        Raises:
            UsageError: as ``require_plain``.
        """
        self.require_plain(language)
        return tuple(text for text in self.texts[language] if isinstance(text, str))


def read_corpus(
    directory: Path | str,
    languages: Sequence[str] | None = None,
    part: str = "all",
    min_languages: int = 2,
    roles: Sequence[str] | None = None,
) -> Corpus:
    """Read a corpus.

    Args:
        directory: one file for each language, named by its code (``neurons.text.corpus_files``): ``.txt`` (UTF-8, one
            text in each line; also FLORES' ``.dev`` and ``.devtest``), ``.jsonl`` (objects with ``text`` or
            ``messages``) or ``.parquet`` (columns ``text`` or ``messages``).  Or a ``.jsonl`` file of objects that also have ``language``.
        languages: languages to read, in this order; None reads all, sorted by name.
        part: lines to read, a key of ``PARTS``.
        min_languages: minimum number of languages.
        roles: roles of the counted tokens of conversations (``SELECTABLE``); None: ``MESSAGE_ROLES``.

    Raises:
        UsageError: no such directory, a language without a file or with two, an empty file, bad UTF-8,
            bad JSON, a row that is neither a text nor a conversation, the same text in two files, fewer than
            ``min_languages`` languages, or roles that are unknown or given for plain text.
    """
    directory = Path(directory)
    if part not in PARTS:
        raise UsageError(f"part {part!r} is unknown: choose from {', '.join(PARTS)}")
    if unknown := [role for role in roles or () if role not in SELECTABLE]:
        raise UsageError(f"role {unknown[0]!r} is unknown: choose from {', '.join(SELECTABLE)}")
    if directory.is_file():
        read = _of_one_file(directory, languages)
    else:
        read = {
            language: (path, _read_texts(path))
            for language, path in corpus_files(directory, languages).of.items()
        }
    if len(read) < min_languages:
        raise UsageError(
            f"{directory}: {len(read)} language ({', '.join(read)}), but at least {min_languages} are needed: "
            "neurons are specific to a language only in comparison with others"
        )
    digest = hashlib.sha256()
    texts, digests = {}, {}
    of_content: dict[bytes, str] = {}
    for language, (path, lines) in read.items():
        if not any(lines):
            raise UsageError(f"{path}: language {language!r} has no text")
        # Of the whole file: short parts of different files can be equal by chance.
        content = hashlib.sha256("\n".join(_as_text(line) for line in lines if line).encode()).digest()
        same = of_content.setdefault(content, language)
        if same != language:
            names = (
                f"language {name!r}" if path == directory else read[name][0].name for name in (same, language)
            )
            raise UsageError(
                f"{directory}: {' and '.join(names)} hold the same text: remove one of them, or replace its "
                "text by text of its language"
            )
        kept = tuple(line for i, line in enumerate(lines) if i % 4 in PARTS[part])
        if not any(kept):
            raise UsageError(f"{path}: language {language!r} has too few lines for part {part!r}")
        if roles is not None and any(text and isinstance(text, str) for text in kept):
            raise UsageError(
                f"{path}: language {language!r} has plain text, whose tokens have no role: leave the roles out, or the "
                "plain text"
            )
        texts[language] = kept
        hashed = [text.as_json() if isinstance(text, Conversation) else text for text in kept]
        encoded = json.dumps([language, hashed], ensure_ascii=False).encode()
        digest.update(encoded)
        digests[language] = hashlib.sha256(encoded).hexdigest()
    selected = MESSAGE_ROLES if roles is None else tuple(role for role in SELECTABLE if role in roles)
    return Corpus(texts, digest.hexdigest(), part, roles=selected, digests=digests)


def _as_text(text: Text) -> str:
    return json.dumps(text.as_json()) if isinstance(text, Conversation) else text


def _of_one_file(path: Path, languages: Sequence[str] | None) -> dict[str, tuple[Path, list[Text]]]:
    """Language -> (the file, its texts in the order of the file)."""
    if path.suffix.lower() != ".jsonl":
        raise UsageError(
            f"{path} is a file: give a directory of <language>{path.suffix}, or a .jsonl whose rows have 'language'"
        )
    of_language: dict[str, list[Text]] = {}
    for number, line in enumerate(read_lines(path), start=1):
        place = f"{path}: line {number}"
        row = parsed(place, line)
        if row is None:
            continue
        text = row_text(place, row)
        if not isinstance(row.get("language"), str):
            raise UsageError(
                f"{place} does not name its 'language': write it, or give a directory of <language>.jsonl"
            )
        of_language.setdefault(language_label(row["language"]), []).append(text)
    chosen = sorted(of_language) if languages is None else [language_label(name) for name in languages]
    if missing := [name for name in chosen if name not in of_language]:
        raise UsageError(
            f"{path}: no text for {', '.join(missing)} (it has {', '.join(sorted(of_language))})"
        )
    return {language: (path, of_language[language]) for language in chosen}


def _read_texts(path: Path) -> list[Text]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return [
            "" if all(value is None for value in row.values()) else row_text(f"{path}: row {number}", row)
            for number, row in enumerate(parquet_rows(path, COLUMNS), start=1)
        ]
    lines = read_lines(path)
    if suffix != ".jsonl":
        return [line.strip() for line in lines]
    texts: list[Text] = []
    for number, line in enumerate(lines, start=1):
        place = f"{path}: line {number}"
        row = parsed(place, line)
        texts.append("" if row is None else row_text(place, row))
    return texts
