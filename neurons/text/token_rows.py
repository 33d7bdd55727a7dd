"""Rows of tokens: a text, a part of a long one or a conversation, with the positions that are counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from neurons.errors import UsageError
from neurons.models.start_tokens import start_tokens
from neurons.text.corpus_rows import Conversation


@dataclass(frozen=True)
class TokenRow:
    """Tokens that the model reads together.

    Attributes:
        line: the line of the corpus.
        counted: the counted positions, ascending.
    """

    line: int
    ids: Sequence[int]
    counted: Sequence[int]


def conversation_row(
    line: int, conversation: Conversation, tokenizer: Any, roles: Sequence[str], context: int
) -> TokenRow:
    """A conversation's tokens; those of the roles are counted, but never the start tokens or the first token.

    Args:
        line: the line of the corpus.
        tokenizer: a tokenizer with a chat template.
        roles: of ``neurons.text.conversations.SELECTABLE``.
        context: maximum number of tokens.

    Raises:
        UsageError: a conversation that is longer, or that the template does not render; the message names its place.
    """
    tokens = conversation.tokens(tokenizer)
    if len(tokens.ids) > context:
        raise UsageError(
            f"{conversation.place}: the conversation has {len(tokens.ids)} tokens, but the model reads {context}: "
            "shorten it"
        )
    chosen = tokens.of(*roles)
    chosen[: max(1, len(start_tokens(tokenizer)))] = False
    return TokenRow(line, tokens.ids.tolist(), chosen.nonzero()[:, 0].tolist())
