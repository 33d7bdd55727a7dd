"""Degenerate repetition: distinct n-grams, the longest repeated passage, and which texts count as loops."""

from __future__ import annotations

from collections.abc import Sequence

from neurons.text.words import words

# Broca's own bounds, which running text of 8 words or more does not come near.  A text is a loop if its longest
# repeated passage covers half of its words, or if more than half of its pairs of words are repetitions.
MIN_WORDS = 8
MAX_REPEATED = 0.5
MIN_DISTINCT_PAIRS = 0.5


def distinct_ngrams(text: str, n: int) -> float:
    """distinct-n: the number of distinct n-grams of words over the number of n-grams; 0 without n-grams."""
    ngrams = _ngrams(words(text), n)
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def longest_repeat(text: str) -> int:
    """The length in words of the longest passage that occurs twice, also overlapping; 0 if none does."""
    text_words = words(text)
    # If n words occur twice, so do the first n - 1 of them: binary search.
    low, high = 0, max(len(text_words) - 1, 0)
    while low < high:
        middle = (low + high + 1) // 2
        ngrams = _ngrams(text_words, middle)
        if len(set(ngrams)) < len(ngrams):
            low = middle
        else:
            high = middle - 1
    return low


def loops(text: str) -> bool:
    """Whether the text is a loop by the bounds above; texts of fewer than ``MIN_WORDS`` words never are."""
    count = len(words(text))
    if count < MIN_WORDS:
        return False
    return longest_repeat(text) >= MAX_REPEATED * count or distinct_ngrams(text, 2) < MIN_DISTINCT_PAIRS


def _ngrams(text_words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(text_words[i : i + n]) for i in range(len(text_words) - n + 1)]
