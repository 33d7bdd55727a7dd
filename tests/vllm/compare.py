"""Whether vLLM's answers are those of transformers."""

from __future__ import annotations

from typing import Any

TOLERANCE = 1e-3  # nats


def first_difference(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> str:
    """What differs first; "" if nothing does.

    Args:
        found: vLLM's answers, from generate.py.
        expected: transformers', from reference.py.
    """
    compared = 0
    for own, theirs in zip(found, expected, strict=True):
        if own["prompt"] != theirs["prompt"]:
            return f"the prompt is {own['prompt']} instead of {theirs['prompt']}"
        for place, margin in enumerate(theirs["margins"]):
            # Two tokens this close may fall out either way, and what follows is another text.
            if own["answer"][place] != theirs["answer"][place] and margin < 2 * TOLERANCE:
                break
            off = abs(own["logprobs"][place] - theirs["logprobs"][place])
            if own["answer"][place] != theirs["answer"][place] or not off <= TOLERANCE:
                return (
                    f"token {place} of an answer is {own['answer'][place]} ({own['logprobs'][place]:.3f} nats) "
                    f"instead of {theirs['answer'][place]} ({theirs['logprobs'][place]:.3f})"
                )
            compared += 1
    tokens = sum(len(answer["answer"]) for answer in expected)
    if compared < 0.75 * tokens:
        return f"only {compared} of {tokens} tokens could be compared: too many are near ties"
    return ""
