"""Does a text go round in circles: shares of distinct n-grams, the longest repeat, and what counts as a loop."""

from __future__ import annotations

from collections.abc import Sequence

from neurons.text.words import words

# Broca's own bounds.  Running text of 8 words or more keeps well clear of both: a text is a loop where the
# longest passage that it repeats covers half of its words, or where more than half of its pairs of words
# have been there before.
LEAST_WORDS = 8
MOST_REPEATED = 0.5
LEAST_DISTINCT_PAIRS = 0.5


def distinct_ngrams(text: str, n: int) -> float:
    """distinct-n: distinct runs of ``n`` words over runs of ``n`` words; 0 for a text of fewer words."""
    found = _runs(words(text), n)
    return len(set(found)) / len(found) if found else 0.0


def longest_repeat(text: str) -> int:
    """The most consecutive words that stand in the text twice or more, overlapping or not; 0 where none do."""
    found = words(text)
    # If n words stand there twice then so do the first n - 1 of them: the answer can be halved in on.
    least, most = 0, max(len(found) - 1, 0)
    while least < most:
        middle = (least + most + 1) // 2
        runs = _runs(found, middle)
        if len(set(runs)) < len(runs):
            least = middle
        else:
            most = middle - 1
    return least


def loops(text: str) -> bool:
    """Whether the text goes round in circles, by the bounds above; shorter texts never do."""
    count = len(words(text))
    if count < LEAST_WORDS:
        return False
    return longest_repeat(text) >= MOST_REPEATED * count or distinct_ngrams(text, 2) < LEAST_DISTINCT_PAIRS


def _runs(found: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(found[i : i + n]) for i in range(len(found) - n + 1)]
