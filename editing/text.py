"""Words of a text: openings to prompt with, and how much a text repeats itself."""

from __future__ import annotations

import re

# Scripts that write no spaces between words: each of their characters is taken as a word.
_UNSPACED = (
    "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0e7f\u0e80-\u0eff\u1000-\u109f\u1780-\u17ff"
)
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+(?:['’\-][^\W{_UNSPACED}]+)*")
_IS_UNSPACED = re.compile(rf"[{_UNSPACED}]")
CHARACTERS_A_WORD = 1.5  # of running Chinese text


def words(text: str) -> list[str]:
    """Lower-cased words; a character each in scripts without spaces."""
    return _WORD.findall(text.lower())


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
