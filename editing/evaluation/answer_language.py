"""Whether answers are in a language: the whole text, every line, and the first words.

    whole    the whole text is identified as the language
    lines    every line with ``MIN_LETTERS`` letters is identified as the language (LPR of arXiv 2406.20052, for one answer)
    begins   the first ``FIRST_WORDS`` words are more probably in the language than in the language of the question

Fenced code blocks are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import regex

from editing.evaluation.language_id import EMPTY, MIN_LETTERS, identify_language, more_probable
from neurons.text.words import words

FIRST_WORDS = 5
_CODE = regex.compile(r"```.*?(?:```|\Z)", regex.DOTALL)
_LETTER = regex.compile(r"\p{L}")


@dataclass(frozen=True)
class AnswerLanguage:
    """Fractions of answers that are in a language.

    Attributes:
        whole, lines, begins: see the module's docstring; ``begins`` is None if the questions are in the language.
        answers: number of answers.
    """

    whole: float
    lines: float
    begins: float | None
    answers: int


def answer_language(
    answers: Sequence[str], language: str, languages: Sequence[str], question_language: str | None = None
) -> AnswerLanguage:
    """Fractions of answers in ``language``.

    Args:
        answers: texts.
        language: the language that they should be in.
        languages: the candidates of language identification; includes ``language``.
        question_language: the language of the questions; without it, or if it is ``language``, ``begins`` is None.
    """
    texts = [prose(text) for text in answers]
    whole = [identify_language(text, languages) == language for text in texts]
    lines = [_every_line(text, language, languages) for text in texts]
    begins = None
    if question_language is not None and question_language != language:
        pair = language, question_language
        begins = _fraction([more_probable(beginning(text), pair) == language for text in texts])
    return AnswerLanguage(_fraction(whole), _fraction(lines), begins, len(texts))


def prose(text: str) -> str:
    """The text without its fenced code."""
    return str(_CODE.sub("", text))


def beginning(text: str) -> str:
    """The first ``FIRST_WORDS`` words."""
    return " ".join(words(text)[:FIRST_WORDS])


def _every_line(text: str, language: str, languages: Sequence[str]) -> bool:
    labels = [
        identify_language(line, languages)
        for line in text.splitlines()
        if len(_LETTER.findall(line)) >= MIN_LETTERS
    ]
    # An answer with short lines only is judged as a whole.
    labels = labels or [identify_language(text, languages)]
    return all(label == language for label in labels if label != EMPTY) and labels != [EMPTY]


def _fraction(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits) if hits else 0.0
