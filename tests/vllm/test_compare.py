"""What counts as the same answer."""

import pytest
from compare import TOLERANCE, first_difference


def answer(tokens, logprobs, margins=None):
    """Of one prompt."""
    return {
        "prompt": [0, 5],
        "answer": tokens,
        "logprobs": logprobs,
        "margins": margins or [1.0] * len(tokens),
    }


EXPECTED = answer([7, 8, 9, 4], [-1.0, -2.0, -3.0, -1.0])


def test_rounding_is_no_difference():
    found = EXPECTED | {"logprobs": [value + 0.9 * TOLERANCE for value in EXPECTED["logprobs"]]}
    assert first_difference([found], [EXPECTED]) == ""


@pytest.mark.parametrize(
    "change",
    [
        {"answer": [7, 8, 2, 4]},
        {"logprobs": [-1.0, -2.0, -3.0 - 2 * TOLERANCE, -1.0]},
        {"logprobs": [-1.0, -2.0, float("nan"), -1.0]},
        {"prompt": [5]},
    ],
)
def test_another_token_probability_or_prompt_is_one(change):
    said = first_difference([EXPECTED | change], [EXPECTED])
    assert ("token 2" in said) != ("prompt" in change)
    assert said


def test_after_a_near_tie_another_text_may_follow_if_enough_was_compared():
    tied = answer([7, 8, 9, 4], [-1.0, -2.0, -3.0, -1.0], [1.0, 1.0, 1.0, TOLERANCE])
    assert first_difference([tied | {"answer": [7, 8, 9, 5]}], [tied]) == ""
    early = tied | {"margins": [1.0, TOLERANCE, 1.0, 1.0]}
    assert "1 of 4" in first_difference([early | {"answer": [7, 5, 6, 6]}], [early])
