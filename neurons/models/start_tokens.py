"""The tokens that a tokenizer adds before a text, as in every engine that serves the model.

Many define a beginning-of-sequence token that they never add (SmolLM2's, Qwen's): no engine uses it, so results
with it would not describe the served model.
"""

from __future__ import annotations

from typing import Any

from neurons.errors import BrocaError


def start_tokens(tokenizer: Any) -> tuple[int, ...]:
    """The ids that the tokenizer adds before a text, without those that it adds after it.

    Raises:
        BrocaError: the tokenizer splits the text differently when it adds special tokens.
    """
    text: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer("a")["input_ids"]
    for first in range(len(whole) - len(text) + 1):
        if whole[first : first + len(text)] == text:
            return tuple(whole[:first])
    raise BrocaError(
        f"the tokenizer encodes 'a' as {text}, and with special tokens as {whole}, so its start tokens are unknown: "
        "fix tokenizer.json"
    )
