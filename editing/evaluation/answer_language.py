"""Whether answers are in a language: the whole text, every line, and the first words.

    whole    the whole text is identified as the language
    lines    every line with ``MIN_LETTERS`` letters is identified as the language (LPR of arXiv 2406.20052, for one answer)
    begins   the first ``FIRST_WORDS`` words are more probably in the language than in the language of the question

Fenced code blocks are left out.  A classifier of the user's (``editing.evaluation.classifier``) takes the place of language
identification in ``whole`` and ``lines``, and reads code too; it gives no probabilities, and so no ``begins``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import regex

from editing.evaluation.classifier import LANGUAGE_IDENTIFICATION, Classifier
from editing.evaluation.language_id import EMPTY, MIN_LETTERS, more_probable
from neurons.text.words import words

FIRST_WORDS = 5
_CODE = regex.compile(r"```.*?(?:```|\Z)", regex.DOTALL)
_LETTER = regex.compile(r"\p{L}")


@dataclass(frozen=True)
class AnswerLanguage:
    """Fractions of answers that are in a language.

    Attributes:
        whole, lines, begins: see the module's docstring; ``begins`` is None if the questions are in the language,
            or with a classifier of the user's.
        answers: number of answers.
    """

    whole: float
    lines: float
    begins: float | None
    answers: int


def answer_language(
    answers: Sequence[str],
    language: str,
    languages: Sequence[str],
    question_language: str | None = None,
    classifier: Classifier = LANGUAGE_IDENTIFICATION,
) -> AnswerLanguage:
    """Fractions of answers in ``language``.

    Args:
        answers: texts.
        language: the language that they should be in.
        languages: the candidates of language identification; includes ``language``.
        question_language: the language of the questions; without it, or if it is ``language``, ``begins`` is None.
        classifier: labels the answers.
    """
    texts = [judged_text(text, classifier) for text in answers]
    whole = [label == language for label in classifier.classify(texts, languages)]
    lines = [_every_line(text, language, languages, classifier) for text in texts]
    begins = None
    if question_language not in (None, language) and classifier.identifies_languages:
        assert question_language is not None
        pair = language, question_language
        begins = _fraction([more_probable(beginning(text), pair) == language for text in texts])
    return AnswerLanguage(_fraction(whole), _fraction(lines), begins, len(texts))


def prose(text: str) -> str:
    """The text without its fenced code."""
    return str(_CODE.sub("", text))


def judged_text(text: str, classifier: Classifier) -> str:
    """What is labelled of an answer: its prose for language identification, else the text."""
    return prose(text) if classifier.identifies_languages else text


def beginning(text: str) -> str:
    """The first ``FIRST_WORDS`` words."""
    return " ".join(words(text)[:FIRST_WORDS])


def _every_line(text: str, language: str, languages: Sequence[str], classifier: Classifier) -> bool:
    lines = [line for line in text.splitlines() if len(_LETTER.findall(line)) >= MIN_LETTERS]
    # An answer with short lines only is judged as a whole.
    labels = classifier.classify(lines or [text], languages)
    return all(label == language for label in labels if label != EMPTY) and labels != [EMPTY]


def _fraction(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits) if hits else 0.0
