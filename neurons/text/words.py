"""Words of a text: its opening as a prompt, and its rate of distinct words."""

from __future__ import annotations

import regex

# Scripts without spaces between words: each character counts as a word.
_UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
# Letters and digits with their marks: vowel signs and accents belong to a word.
_WORD = regex.compile(
    rf"{_UNSPACED}\p{{M}}*|(?:(?!{_UNSPACED})[\p{{L}}\p{{N}}_]\p{{M}}*)+"
    rf"(?:['’\-](?:(?!{_UNSPACED})[\p{{L}}\p{{N}}_]\p{{M}}*)+)*"
)
_IS_UNSPACED = regex.compile(_UNSPACED)
CHARACTERS_A_WORD = 1.5  # in Chinese text


def words(text: str) -> list[str]:
    """Lower-cased words; single characters in scripts without spaces."""
    return pieces(text.lower())


def pieces(text: str) -> list[str]:
    """Words as they are written; single characters in scripts without spaces."""
    matches: list[str] = _WORD.findall(text)
    return matches


def distinct_rate(text: str) -> float:
    """Distinct words over words; 0 for a text without words."""
    all_words = words(text)
    return len(set(all_words)) / len(all_words) if all_words else 0.0


def opening(text: str, count: int = 6) -> str:
    """The first ``count`` words of a text; in scripts without spaces about as many by number of characters."""
    if len(_IS_UNSPACED.findall(text)) * 2 > len(text):
        return text[: round(count * CHARACTERS_A_WORD)]
    return " ".join(text.split()[:count])
