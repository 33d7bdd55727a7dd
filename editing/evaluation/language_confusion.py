"""The Language Confusion Benchmark's pass rates (arXiv 2406.20052), as its published code computes them.

    LPR   line pass rate: fraction of answers whose every line is identified as the language
    WPR   word pass rate: of the answers that pass by lines, the fraction without an English word; only for languages
          that are not written in Latin script
    LCPR  harmonic mean of LPR and WPR

An answer ends before a line that begins with "Q:".  A line counts if it has five words or more; an answer without such
a line is left out.  Words are as written, so that a capitalised name is no English word.  They are separated by spaces,
in Chinese and Japanese by Broca (``neurons.text.words``) where the benchmark uses jieba and MeCab.  The benchmark's
identifier is fastText's lid.176.bin above a probability of 0.3.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import langcodes

from editing.evaluation.relevance import harmonic_mean
from neurons.text.words import pieces

MIN_WORDS = 5
MIN_PROBABILITY = 0.3
MIN_ENGLISH = 4  # letters of an English word
_WITHOUT = str.maketrans("—", " ", string.punctuation + "،")
_UNSPACED = ("zh", "ja")


@dataclass(frozen=True)
class PassRates:
    """Pass rates of answers in one language.

    Attributes:
        lines: LPR; None if no answer has a line of five words.
        words: WPR; None for Latin script, without English words, or if no answer passes by lines.
        both: LCPR; None without one of them.
        answers: number of answers that count.
    """

    lines: float | None
    words: float | None
    both: float | None
    answers: int


def english_words(lines: Sequence[str]) -> frozenset[str]:
    """The words of a dictionary that count: in lower case, with four letters or more."""
    stripped = (line.strip() for line in lines)
    return frozenset(word for word in stripped if word.islower() and len(word) >= MIN_ENGLISH)


def pass_rates(
    answers: Sequence[str],
    language: str,
    identify: Callable[[str], tuple[str, float]],
    english: Collection[str] = (),
) -> PassRates:
    """LPR, WPR and LCPR.

    Args:
        answers: texts.
        language: the language that they should be in.
        identify: a line -> its language and the probability of it.
        english: ``english_words``; empty: WPR is not measured.
    """
    counted = wrong_lines = wrong_words = 0
    for answer in answers:
        # A base model may go on with a question of its own.
        own = answer.split("\nQ:")[0].strip().translate(_WITHOUT)
        lines = [(line, _words(line, language)) for line in own.split("\n")]
        lines = [(line, of_line) for line, of_line in lines if len(of_line) >= MIN_WORDS]
        if not lines:
            continue
        counted += 1
        if not all(_is(line, language, identify) for line, _ in lines):
            wrong_lines += 1
        elif any(word in english for _, of_line in lines for word in of_line):
            wrong_words += 1
    passed = counted - wrong_lines
    by_lines = passed / counted if counted else None
    by_words = (
        (passed - wrong_words) / passed if passed and english and not in_latin_script(language) else None
    )
    both = None if by_lines is None or by_words is None else harmonic_mean(by_lines, by_words)
    return PassRates(by_lines, by_words, both, counted)


def wrong_line(line: str, language: str, identify: Callable[[str], tuple[str, float]]) -> bool:
    """Whether a line counts and is not identified as the language."""
    plain = line.strip().translate(_WITHOUT)
    return len(_words(plain, language)) >= MIN_WORDS and not _is(plain, language, identify)


def in_latin_script(language: str) -> bool:
    """Whether a language is mainly written in Latin script."""
    return bool(langcodes.Language.get(language).maximize().script == "Latn")


def _words(line: str, language: str) -> list[str]:
    return pieces(line) if language in _UNSPACED else line.split()


def _is(line: str, language: str, identify: Callable[[str], tuple[str, float]]) -> bool:
    label, probability = identify(line)
    return label == language and probability > MIN_PROBABILITY
