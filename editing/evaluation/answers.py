"""Label and degenerate repetition of a set of answers.

An answer counts as written in a language if a classifier (``editing.evaluation.classifier``) gives it that label and it
is not a loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from editing.evaluation.classifier import LANGUAGE_IDENTIFICATION, Classifier
from editing.evaluation.generation import Continuation
from editing.evaluation.repetition import distinct_ngrams, longest_repeat, loops
from neurons.text.words import words


@dataclass(frozen=True)
class Answers:
    """Answers to some prompts, with their labels.

    Attributes:
        items: the answers.
        labels: the language of each, or OTHER or EMPTY (``editing.evaluation.language_id``).
        looping: whether each is a loop (``editing.evaluation.repetition``).
    """

    items: tuple[Continuation, ...]
    labels: tuple[str, ...]
    looping: tuple[bool, ...]

    def in_language(self, language: str) -> list[bool]:
        """Whether each answer is in the language and not a loop."""
        return [label == language and not loop for label, loop in zip(self.labels, self.looping, strict=True)]

    def rate(self, language: str) -> float:
        """Fraction of the answers that are in the language and not a loop."""
        return sum(self.in_language(language)) / len(self.items)

    @property
    def distinct_pairs(self) -> float:
        """Mean distinct-2."""
        return self._mean([distinct_ngrams(item.text, 2) for item in self.items])

    @property
    def longest_repeat(self) -> float:
        """Mean fraction of an answer's words in its longest repeated passage."""
        return self._mean([longest_repeat(item.text) / max(len(words(item.text)), 1) for item in self.items])

    @property
    def words(self) -> float:
        """Mean number of words."""
        return self._mean([len(words(item.text)) for item in self.items])

    @staticmethod
    def _mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)


def identify_answers(
    items: Sequence[Continuation],
    languages: Sequence[str],
    classifier: Classifier = LANGUAGE_IDENTIFICATION,
) -> Answers:
    """Label answers with their languages.

    Args:
        items: at least one answer.
        languages: the candidate languages, or labels of the classifier.
        classifier: labels the answers.
    """
    texts = [item.text for item in items]
    labels = tuple(classifier.classify(texts, languages))
    return Answers(tuple(items), labels, tuple(map(loops, texts)))
