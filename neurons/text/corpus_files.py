"""The files of a corpus directory by language."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import langcodes

from neurons.errors import UsageError

# .dev and .devtest are the parts of FLORES: eng_Latn.dev, eng_Latn.devtest.
SUFFIXES = (".txt", ".jsonl", ".parquet", ".dev", ".devtest")
# Files about the corpus, with any continuation: requirements-dev.txt, LICENSE-MIT.txt.
ABOUT = re.compile(
    r"(readme|requirements|licen[cs]e|copying|notice|changelog|changes|sources|authors|contributors)"
    r"([-_. ].*)?",
    re.IGNORECASE,
)
# Labels of the language identifier that differ from the code by langcodes.
IDENTIFIED_AS = {"fil": "tl", "gn": "gug", "ki": "kik", "nb": "no", "pbt": "ps", "quy": "qu"}


@dataclass(frozen=True)
class CorpusFiles:
    """Files by language.

    Attributes:
        of: language -> its file, in the requested order, or sorted by file name.
        left_out: visible files that may look like text but are not read: files about the corpus with a readable
            suffix (README.txt), and files named by a language with another suffix (en.csv); empty if languages
            were requested by name.
    """

    of: dict[str, Path]
    left_out: tuple[str, ...]

    @property
    def renamed(self) -> dict[str, str]:
        """File name -> language, for files with another spelling of the language."""
        return {path.name: language for language, path in self.of.items() if path.stem != language}


def is_language_code(name: str) -> bool:
    """Whether a name is a valid language tag: ISO 639, optionally with script and region."""
    valid: bool = langcodes.tag_is_valid(name)
    return valid


def language_label(name: str) -> str:
    """The ISO 639-1 code of a language tag in any spelling, or its ISO 639-3 code if it has no other.

    ``EN``, ``eng``, ``eng_Latn`` and ``en-US`` are ``en``; ``cmn_Hans`` and ``zh-CN`` are ``zh``; ``arb_Arab``
    is ``ar``.  A name that is not a language tag is returned unchanged.
    """
    if not is_language_code(name):
        return name
    language: str | None = langcodes.Language.get(name).language
    if language is None:
        return name
    macro: str | None = langcodes.Language.get(langcodes.standardize_tag(language, macro=True)).language
    # A macrolanguage without a code of two letters (Bikol of bcl) is less specific than the language itself.
    code = macro if macro is not None and len(macro) == 2 else language
    return IDENTIFIED_AS.get(code, code)


def corpus_files(
    directory: Path, languages: Sequence[str] | None = None, suffixes: Sequence[str] = SUFFIXES
) -> CorpusFiles:
    """Find the files of a corpus directory.

    Args:
        directory: one file for each language, named by its code in any spelling (``language_label``).
        languages: languages in the wanted order, by code or by file name without suffix; None takes all.
        suffixes: readable suffixes, in lower case.

    Raises:
        UsageError: no such directory, no readable file, a language without a file or with two, or a language named
            twice.
    """
    if not directory.is_dir():
        raise UsageError(f"{directory}: no such corpus directory")
    visible = sorted(path for path in directory.iterdir() if path.is_file() and not path.name.startswith("."))
    readable = [path for path in visible if path.suffix.lower() in suffixes]
    texts = [path for path in readable if not ABOUT.fullmatch(path.stem)]
    if not texts:
        folders = sorted(
            path.name
            for path in directory.iterdir()
            if path.is_dir()
            and not path.name.startswith(".")
            and any(file.suffix.lower() in suffixes for file in path.iterdir())
        )
        inside = f": give one of its folders, {' or '.join(folders)}" if folders else ""
        raise UsageError(f"{directory}: holds no <language>{', '.join(suffixes)}{inside}")
    of_label: dict[str, list[Path]] = {}
    for path in texts:
        of_label.setdefault(language_label(path.stem), []).append(path)
    of_name = dict(of_label)
    if languages is not None:
        # A file's name means that file even if there are several of the language: zho_Hans and zho_Hant.
        of_name = {
            name: [path for path in texts if path.stem == name] or of_label.get(language_label(name), [])
            for name in languages
        }
    missing = [name for name, files in of_name.items() if not files]
    if missing:
        raise UsageError(
            f"{directory}: no text for {', '.join(missing)} (it has {', '.join(sorted(of_label))})"
        )
    chosen: dict[str, Path] = {}
    for name in sorted(of_label) if languages is None else languages:
        language, files = language_label(name), of_name[name]
        if language in chosen:
            raise UsageError(f"language {language} is named twice")
        if len(files) > 1:
            stem = files[0].stem
            # Without an option: recipes and Python have others, and train has none.
            choice = (
                ""
                if all(path.stem == stem for path in files)
                else f", or list {stem} among the languages to read"
            )
            raise UsageError(
                f"{directory}: language {language!r} has {len(files)} files, "
                f"{' and '.join(path.name for path in files)}: keep one{choice}; name dialects by words, as "
                "british.txt"
            )
        chosen[language] = files[0]
    left_out = () if languages is not None else tuple(_left_out(visible, texts, suffixes))
    return CorpusFiles(chosen, left_out)


def _left_out(visible: Sequence[Path], texts: Sequence[Path], suffixes: Sequence[str]) -> Iterator[str]:
    """Names of the files that a user may expect to be read."""
    for path in visible:
        named = bool(path.suffix) and is_language_code(path.stem)
        if path not in texts and (named or path.suffix.lower() in suffixes):
            yield path.name
