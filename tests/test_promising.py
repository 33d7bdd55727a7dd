"""Settings that hardly steer on a few prompts are not measured, and said to be refused for that."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from editing.comparison import Candidate, promising


def evaluation_of(shares, ceiling=0.8):
    """Candidates' shares on the few prompts come in their order."""
    left = iter(shares)
    return SimpleNamespace(ceiling=ceiling, target="fr", few=lambda steering, instruction: next(left))


def candidates(count):
    return [Candidate("way", {"strength": i}, None, nullcontext) for i in range(count)]


@pytest.mark.parametrize(
    ("shares", "kept"),
    [
        ([0.0, 0.9, 0.37, 0.35], [1, 2]),  # 0.45 of the ceiling is 0.36
        ([0.1, 0.3, 0.3], [1, 2]),  # none reaches it: those that reach most
        ([0.0, 0.0], [0]),  # none reaches anything: the first, for a row in the table
        ([], []),
    ],
)
def test_what_is_worth_measuring(shares, kept):
    some = candidates(len(shares))
    found, left = promising(evaluation_of(shares), some)
    assert found == [some[i] for i in kept]
    assert [one["settings"]["strength"] for one in left] == [i for i in range(len(shares)) if i not in kept]
    assert all(one["name"] == "way" and "fr" in one["refused"] for one in left)
