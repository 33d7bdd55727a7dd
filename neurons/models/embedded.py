"""Tokens that a tokenizer knows and the model has no embedding of, as fine-tunes leave them that add a ``[PAD]``."""

from __future__ import annotations

from typing import Any

from neurons.errors import UsageError


def require_embedded(name: str, tokenizer: Any, highest: int, rows: int) -> None:
    """Refuse a text before it is worked on.

    Args:
        name: of the model.
        tokenizer: its tokenizer.
        highest: token id of the text.
        rows: of the model's embedding.

    Raises:
        UsageError: the id has no row; both numbers are named.
    """
    if highest >= rows:
        token = tokenizer.convert_ids_to_tokens(highest)
        raise UsageError(
            f"{name}: the text needs token {highest} ({token!r}), and the model's embedding has {rows} rows: take {token!r} "
            "out of the text, or give it a row with resize_token_embeddings() and train it"
        )
