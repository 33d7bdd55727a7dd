"""Which texts are loops."""

import random

import pytest

from editing.evaluation.repetition import distinct_ngrams, longest_repeat, loops


def naive_longest_repeat(words):
    best = 0
    for i in range(len(words)):
        for j in range(i + 1, len(words)):
            n = 0
            while j + n < len(words) and words[i + n] == words[j + n]:
                n += 1
            best = max(best, n)
    return best


def test_longest_repeat_equals_the_naive_one():
    chooser = random.Random(3)
    for length in (0, 1, 2, 5, 12, 40):
        for letters in (1, 2, 3, 8):
            words = chooser.choices("abcdefgh"[:letters], k=length)
            assert longest_repeat(" ".join(words)) == naive_longest_repeat(words), words


@pytest.mark.parametrize(
    ("text", "n", "expected"),
    [
        ("a b a b", 1, 2 / 4),
        ("a b a b", 2, 2 / 3),
        ("A b, a B!", 2, 2 / 3),
        ("a", 2, 0.0),
        ("", 1, 0.0),
        ("你好你好", 2, 2 / 3),
    ],
)
def test_distinct_ngrams(text, n, expected):
    assert distinct_ngrams(text, n) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the dog and " * 6, True),
        ("one two three four five six seven eight nine ten", False),
        # Half of its words come again: the bound itself counts as a loop.
        ("one two three four one two three four", True),
        ("one two three four five one two three four six seven", False),
        ("no no no no no no no", False),  # too short to tell
        ("no no no no no no no no", True),
        ("", False),
        ("好好好好好好好好好好", True),
    ],
)
def test_loops(text, expected):
    assert loops(text) is expected
