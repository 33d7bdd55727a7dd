"""A corpus read, and on stderr which files were which languages where that is not plain from their names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.screen import Screen

if TYPE_CHECKING:
    from neurons.text.corpus import Corpus

TOLD = 10  # files of all 204 languages of FLORES would fill the screen
# ISO 639-2 sets these aside for languages that are somebody's own: no mistake, so no warning.
_PRIVATE = re.compile("q[a-t][a-z]")


def read(
    screen: Screen, directory: Path, languages: Sequence[str] | None, part: str = "all", least: int = 2
) -> Corpus:
    """``neurons.text.corpus.read_corpus``, and ``tell``."""
    from neurons.text.corpus import read_corpus

    corpus = read_corpus(directory, languages, part, least)
    tell(screen, directory, languages)
    return corpus


def tell(screen: Screen, directory: Path, languages: Sequence[str] | None) -> None:
    """Say which files of a corpus are read under another name, left out, or of no language that is known.

    Nothing where every file is named by a code that the language identifier knows.
    """
    from editing.evaluation.language_id import unidentified
    from neurons.models.processes import is_first
    from neurons.text.corpus_files import corpus_files

    if not is_first():
        return
    files = corpus_files(directory, languages)
    said = [f"{name} is read as {language}" for name, language in files.renamed.items()]
    if len(said) > TOLD:
        said[TOLD:] = [f"{len(said) - TOLD} more alike"]
    if files.left_out:
        said.append(f"left out, as no text of a language: {', '.join(files.left_out)}")
    if said:
        screen.note(f"{directory}: {'; '.join(said)}")
    for language in files.no_codes:
        screen.warn(
            f"{files.of[language]}: {language!r} is no language code: read as a label; rename the file, or name "
            "the languages with --languages"
        )
    codes = [one for one in files.of if one not in files.no_codes and not _PRIVATE.fullmatch(one)]
    if unknown := unidentified(codes):
        screen.warn(
            f"the language identifier does not know {', '.join(unknown)}: neurons can be found, but evaluate, "
            "tune and run will refuse it"
        )


def tell_read(
    screen: Screen, read: Mapping[str, Mapping[str, Any]], least: int, title: str = "text read"
) -> None:
    """Say what of the text was read, and warn of languages with fewer tokens than the figures need."""
    screen.table(
        title,
        ["language", "tokens", "texts", "of", "left out"],
        [
            [
                language,
                own["tokens"],
                own["texts"],
                own["of"],
                None if own["cut"] is None else f"{own['cut']:.0%}",
            ]
            for language, own in read.items()
        ],
    )
    few = {language: own["tokens"] for language, own in read.items() if own["tokens"] < least}
    if few:
        told = ", ".join(f"{language} {tokens:,}" for language, tokens in few.items())
        screen.warn(
            f"few tokens ({told}): with less than {least:,} of a language figures from them say little"
        )
