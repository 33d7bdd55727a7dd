"""What a tokenizer puts before a text of its own accord, as every engine that serves the model has it.

Many define a beginning-of-sequence token that they never add (SmolLM2's, Qwen's): no engine serves the model with
it, so figures taken with it are of another use.
"""

from __future__ import annotations

from typing import Any

from neurons.errors import BrocaError


def start_tokens(tokenizer: Any) -> tuple[int, ...]:
    """The ids that the tokenizer puts before a text; what it puts behind one does not count.

    Raises:
        BrocaError: it reads the text itself in another way when it adds its own tokens.
    """
    text: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer("a")["input_ids"]
    for first in range(len(whole) - len(text) + 1):
        if whole[first : first + len(text)] == text:
            return tuple(whole[:first])
    raise BrocaError(
        f"the tokenizer makes {text} of the text 'a', and {whole} where it adds its own tokens, so what it puts "
        "before a text is not known: mend tokenizer.json"
    )
