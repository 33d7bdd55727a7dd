"""Corpora of the commands, with notes on the language of each file and on the amount of text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from cli.screen import Screen

if TYPE_CHECKING:
    from neurons.text.corpus import Corpus

MAX_NOTED = 10  # all 204 files of FLORES would fill the screen
# Codes that ISO 639-2 reserves for private use need no warning.
_PRIVATE = re.compile("q[a-t][a-z]")


def noted_corpus(screen: Screen, arguments: SimpleNamespace, min_languages: int = 2) -> Corpus:
    """``neurons.text.corpus.read_corpus`` with the values of ``options.corpus``, followed by ``note_files``."""
    from neurons.text.corpus import read_corpus

    directory, languages, part = arguments.corpus, arguments.languages, arguments.part or "all"
    corpus = read_corpus(directory, languages, part, min_languages, arguments.roles)
    note_files(screen, directory, languages)
    return corpus


def note_files(
    screen: Screen, directory: Path, languages: Sequence[str] | None, classified: bool = False
) -> None:
    """Note the files of a corpus that are renamed or left out, and labels that the language identifier does not know.

    It prints nothing if every file name is a code that the language identifier knows, or for a corpus of one file.

    Args:
        classified: a classifier of the user's knows the labels.
    """
    from editing.evaluation.language_id import unidentified
    from neurons.models.processes import is_first
    from neurons.text.corpus_files import corpus_files

    if not is_first() or directory.is_file():
        return
    files = corpus_files(directory, languages)
    notes = [f"{name} is read as {language}" for name, language in files.renamed.items()]
    if len(notes) > MAX_NOTED:
        notes[MAX_NOTED:] = [f"{len(notes) - MAX_NOTED} more files likewise"]
    if files.left_out:
        notes.append(f"left out, because they are not text of a language: {', '.join(files.left_out)}")
    labels = [label for label in unidentified(tuple(files.of)) if not _PRIVATE.fullmatch(label)]
    if labels and not classified:
        notes.append(
            f"{', '.join(labels)}: labels that the language identifier does not know; evaluate, tune and run need a "
            "classifier that knows them"
        )
    if notes:
        screen.note(f"{directory}: {'; '.join(notes)}")


def read_table(
    screen: Screen, read: Mapping[str, Mapping[str, Any]], min_tokens: int, title: str = "text read"
) -> None:
    """Print the amount of text that was read, and warn of languages with fewer tokens than ``min_tokens``."""
    screen.table(
        title,
        ["language", "tokens", "texts", "available", "left out"],
        [
            [
                language,
                counts["tokens"],
                counts["texts"],
                counts["of"],
                None if counts["cut"] is None else f"{counts['cut']:.0%}",
            ]
            for language, counts in read.items()
        ],
    )
    few = [
        f"{language} {counts['tokens']:,}"
        for language, counts in read.items()
        if counts["tokens"] < min_tokens
    ]
    if few:
        screen.warn(f"few tokens ({', '.join(few)}): figures need at least {min_tokens:,} per language")
