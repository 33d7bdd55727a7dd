"""Check for tokens without an embedding, as in fine-tunes that add a ``[PAD]`` to the tokenizer only."""

from __future__ import annotations

from typing import Any

from neurons.errors import UsageError


def require_embedded(name: str, tokenizer: Any, highest: int, rows: int) -> None:
    """Reject a text with a token that has no embedding.

    Args:
        highest: maximum token id of the text.
        rows: of the model's embedding.

    Raises:
        UsageError: the id has no row.
    """
    if highest >= rows:
        token = tokenizer.convert_ids_to_tokens(highest)
        raise UsageError(
            f"{name}: the text has token {highest} ({token!r}), but the model's embedding has {rows} rows: remove {token!r} "
            "from the text, or add a row with resize_token_embeddings() and train it"
        )
