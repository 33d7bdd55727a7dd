"""Which answers count as written in a language: those identified as it, but none that goes round in circles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from editing.evaluation.generation import Continuation
from editing.evaluation.language_id import identify_language
from editing.evaluation.repetition import distinct_ngrams, longest_repeat, loops
from neurons.text.words import words


@dataclass(frozen=True)
class Answers:
    """What was written on some prompts.

    Attributes:
        items: the answers.
        labels: the language of each (``editing.evaluation.language_id``), or why it has none.
        looping: whether each goes round in circles (``editing.evaluation.repetition``).
    """

    items: tuple[Continuation, ...]
    labels: tuple[str, ...]
    looping: tuple[bool, ...]

    def are(self, language: str) -> list[bool]:
        """Which of them are in a language and no failure."""
        return [label == language and not loop for label, loop in zip(self.labels, self.looping, strict=True)]

    def share(self, language: str) -> float:
        return sum(self.are(language)) / len(self.items)

    @property
    def distinct_pairs(self) -> float:
        return self._mean([distinct_ngrams(item.text, 2) for item in self.items])

    @property
    def longest_repeat(self) -> float:
        return self._mean([longest_repeat(item.text) / max(len(words(item.text)), 1) for item in self.items])

    @property
    def words(self) -> float:
        return self._mean([len(words(item.text)) for item in self.items])

    @staticmethod
    def _mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)


def identified(items: Sequence[Continuation], languages: Sequence[str]) -> Answers:
    """Answers with their labels.

    Args:
        items: at least one.
        languages: what each may be identified as.
    """
    texts = [item.text for item in items]
    labels = tuple(identify_language(text, languages) for text in texts)
    return Answers(tuple(items), labels, tuple(map(loops, texts)))
