"""Is an answer in a language: as a whole, in every line, and from its first words on.

    whole    the language that the whole text is identified as
    lines    whether every line with enough letters is in the language (LPR of arXiv 2406.20052, for one answer)
    begins   whether the first ``FIRST_WORDS`` words are rather in it than in the language of the question

What stands in a fenced code block is in no language and is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import regex

from editing.evaluation.language_id import EMPTY, LEAST_LETTERS, identify_language, more_probable
from neurons.text.words import words

FIRST_WORDS = 5
_CODE = regex.compile(r"```.*?(?:```|\Z)", regex.DOTALL)
_LETTER = regex.compile(r"\p{L}")


@dataclass(frozen=True)
class AnswerLanguage:
    """Fractions of answers that are in a language.

    Attributes:
        whole, lines, begins: as the module's docstring; ``begins`` is None where the question is in the language.
        answers: how many there are.
    """

    whole: float
    lines: float
    begins: float | None
    answers: int


def answer_language(
    answers: Sequence[str], language: str, languages: Sequence[str], asked_in: str | None = None
) -> AnswerLanguage:
    """Fractions of answers in ``language``.

    Args:
        answers: texts.
        language: in which they should be.
        languages: that are told apart; ``language`` among them.
        asked_in: of the questions; None, or ``language`` itself: beginnings are not told.
    """
    texts = [prose(text) for text in answers]
    whole = [identify_language(text, languages) == language for text in texts]
    lines = [_every_line(text, language, languages) for text in texts]
    begins = None
    if asked_in not in (None, language):
        assert asked_in is not None
        begins = _fraction(
            [more_probable(beginning(text), (language, asked_in)) == language for text in texts]
        )
    return AnswerLanguage(_fraction(whole), _fraction(lines), begins, len(texts))


def prose(text: str) -> str:
    """The text without its fenced code."""
    return str(_CODE.sub("", text))


def beginning(text: str) -> str:
    """The first words."""
    return " ".join(words(text)[:FIRST_WORDS])


def _every_line(text: str, language: str, languages: Sequence[str]) -> bool:
    found = [
        identify_language(line, languages)
        for line in text.splitlines()
        if len(_LETTER.findall(line)) >= LEAST_LETTERS
    ]
    # An answer of short lines alone is judged as a whole.
    found = found or [identify_language(text, languages)]
    return all(one == language for one in found if one != EMPTY) and found != [EMPTY]


def _fraction(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits) if hits else 0.0
