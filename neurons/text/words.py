"""Words of a text: openings to prompt with, and how much a text repeats itself."""

from __future__ import annotations

import regex

# Scripts that write no spaces between words: each of their characters is taken as a word.
_UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
# Letters and digits with their marks: vowel signs and accents are part of a word.
_WORD = regex.compile(
    rf"{_UNSPACED}\p{{M}}*|(?:(?!{_UNSPACED})[\p{{L}}\p{{N}}_]\p{{M}}*)+"
    rf"(?:['’\-](?:(?!{_UNSPACED})[\p{{L}}\p{{N}}_]\p{{M}}*)+)*"
)
_IS_UNSPACED = regex.compile(_UNSPACED)
CHARACTERS_A_WORD = 1.5  # of running Chinese text


def words(text: str) -> list[str]:
    """Lower-cased words; a character each in scripts without spaces."""
    found: list[str] = _WORD.findall(text.lower())
    return found


def distinct_share(text: str) -> float:
    """Distinct words over words; 0 for a text without words."""
    found = words(text)
    return len(set(found)) / len(found) if found else 0.0


def opening(text: str, count: int = 6) -> str:
    """The first ``count`` words of a text, or as many characters as make that many words in a script
    without spaces."""
    if len(_IS_UNSPACED.findall(text)) * 2 > len(text):
        return text[: round(count * CHARACTERS_A_WORD)]
    return " ".join(text.split()[:count])
