"""Which files of a directory are languages, and which language each is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import langcodes

from neurons.errors import UsageError

# FLORES names its parts by suffix: eng_Latn.dev, eng_Latn.devtest.
SUFFIXES = (".txt", ".jsonl", ".parquet", ".dev", ".devtest")
# What lies beside text and is about it, whatever follows: requirements-dev.txt, LICENSE-MIT.txt.
ABOUT = re.compile(
    r"(readme|requirements|licen[cs]e|copying|notice|changelog|changes|sources|authors|contributors)"
    r"([-_. ].*)?",
    re.IGNORECASE,
)
# Where the language identifier's label is not the code that langcodes comes to.
IDENTIFIED_AS = {"fil": "tl", "gn": "gug", "ki": "kik", "nb": "no", "pbt": "ps", "quy": "qu"}


@dataclass(frozen=True)
class CorpusFiles:
    """Files by language.

    Attributes:
        of: language -> its file, in the order asked for, or sorted by file name.
        left_out: visible files of a readable suffix that are about text (README.txt), and files named by a
            language whose suffix is not readable (en.csv); empty where languages were asked for by name.
    """

    of: dict[str, Path]
    left_out: tuple[str, ...]

    @property
    def renamed(self) -> dict[str, str]:
        """File name -> language, where the name spells it differently."""
        return {path.name: language for language, path in self.of.items() if path.stem != language}

    @property
    def no_codes(self) -> tuple[str, ...]:
        """Languages whose names are no language codes."""
        return tuple(language for language in self.of if not is_language_code(language))


def is_language_code(name: str) -> bool:
    """Whether a name is a valid language tag: ISO 639, with a script or a region if it likes."""
    valid: bool = langcodes.tag_is_valid(name)
    return valid


def language_label(name: str) -> str:
    """The ISO 639-1 code of a language tag in any spelling, the ISO 639-3 code where there is none.

    ``EN``, ``eng``, ``eng_Latn`` and ``en-US`` are ``en``; ``cmn_Hans`` and ``zh-CN`` are ``zh``; ``arb_Arab``
    is ``ar``.  A name that is no language tag is a label as it stands.
    """
    if not is_language_code(name):
        return name
    own: str | None = langcodes.Language.get(name).language
    if own is None:
        return name
    whole: str | None = langcodes.Language.get(langcodes.standardize_tag(own, macro=True)).language
    # A macrolanguage without a code of two letters (Bikol of bcl) says less than the language itself.
    code = whole if whole is not None and len(whole) == 2 else own
    return IDENTIFIED_AS.get(code, code)


def corpus_files(
    directory: Path, languages: Sequence[str] | None = None, suffixes: Sequence[str] = SUFFIXES
) -> CorpusFiles:
    """Find the files of a corpus directory.

    Args:
        directory: one file a language, named by its code in any spelling (``language_label``).
        languages: which, in this order, by code or by a file's name without its suffix; None takes all.
        suffixes: of files that can be read, in lower case.

    Raises:
        UsageError: no such directory, no file in it, a language without a file, with two, or named twice.
    """
    if not directory.is_dir():
        raise UsageError(f"{directory}: there is no such corpus directory")
    there = sorted(path for path in directory.iterdir() if path.is_file() and not path.name.startswith("."))
    readable = [path for path in there if path.suffix.lower() in suffixes]
    texts = [path for path in readable if not ABOUT.fullmatch(path.stem)]
    if not texts:
        folders = sorted(
            path.name
            for path in directory.iterdir()
            if path.is_dir()
            and not path.name.startswith(".")
            and any(one.suffix.lower() in suffixes for one in path.iterdir())
        )
        inside = f": name a folder in it, {' or '.join(folders)}" if folders else ""
        raise UsageError(f"{directory}: holds no <language>{', '.join(suffixes)}{inside}")
    of_label: dict[str, list[Path]] = {}
    for path in texts:
        of_label.setdefault(language_label(path.stem), []).append(path)
    of_name = dict(of_label)
    if languages is not None:
        # A file's own name means that file, where several are of the language: zho_Hans beside zho_Hant.
        of_name = {
            name: [path for path in texts if path.stem == name] or of_label.get(language_label(name), [])
            for name in languages
        }
    missing = [name for name, files in of_name.items() if not files]
    if missing:
        raise UsageError(
            f"{directory}: no text for {', '.join(missing)} (there is {', '.join(sorted(of_label))})"
        )
    found: dict[str, Path] = {}
    for name in sorted(of_label) if languages is None else languages:
        language, files = language_label(name), of_name[name]
        if language in found:
            raise UsageError(f"language {language} is named twice")
        if len(files) > 1:
            one = files[0].stem
            choice = "" if all(path.stem == one for path in files) else f", or --languages {one},..."
            raise UsageError(
                f"{directory}: language {language!r} has {len(files)} files, "
                f"{' and '.join(path.name for path in files)}: keep one{choice}"
            )
        found[language] = files[0]
    left_out = () if languages is not None else tuple(_left_out(there, texts, suffixes))
    return CorpusFiles(found, left_out)


def _left_out(there: Sequence[Path], texts: Sequence[Path], suffixes: Sequence[str]) -> Iterator[str]:
    """What somebody might think is read."""
    for path in there:
        named = bool(path.suffix) and is_language_code(path.stem)
        if path not in texts and (named or path.suffix.lower() in suffixes):
            yield path.name
