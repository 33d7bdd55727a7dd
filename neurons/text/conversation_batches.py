"""Token batches of conversations, with a group for every token: a language's messages, its headers or the template.

    <language>           the messages of user and assistant in the language, including thoughts
    <language>/header    the last token before each answer in the language
    template             the same in every language: the template's tokens and system messages

The first token of every conversation is not counted, because models use it as an attention sink.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from neurons.errors import UsageError
from neurons.models.source import LoadedModel
from neurons.text.batches import (
    TokenBatch,
    context_length,
    counted_tokens,
    fitting_batches,
    require_embedded_tokens,
)
from neurons.text.conversations import ANSWER, HEADER, THOUGHT, USER, RoleTokens

TEMPLATE_GROUP = "template"


@dataclass(frozen=True)
class ConversationBatches:
    """Conversations of several languages.

    Attributes:
        batches: language -> its batches, whose ``groups`` are indices into ``groups``.
    """

    batches: Mapping[str, Sequence[TokenBatch]]
    groups: tuple[str, ...]

    @property
    def languages(self) -> tuple[str, ...]:
        return tuple(self.batches)

    @property
    def tokens(self) -> int:
        """Number of counted tokens."""
        return sum(map(counted_tokens, self.batches.values()))


def groups_of(language: str) -> tuple[str, str]:
    """The names of a language's two groups: messages and headers."""
    return language, f"{language}/header"


def conversation_batches(
    loaded: LoadedModel, conversations: Mapping[str, Sequence[RoleTokens]]
) -> ConversationBatches:
    """Batches (``fitting_batches``) of each language's conversations with the group of every token.

    Raises:
        UsageError: a language without a message or a header, a conversation longer than the model's context, or a
            token without an embedding.
    """
    groups = (*(name for language in conversations for name in groups_of(language)), TEMPLATE_GROUP)
    context = context_length(loaded.model)
    batches: dict[str, list[TokenBatch]] = {}
    for place, (language, of_language) in enumerate(conversations.items()):
        longest = max((len(conversation.ids) for conversation in of_language), default=0)
        if context is not None and longest > context:
            raise UsageError(
                f"a conversation in {language!r} has {longest} tokens, but the model reads {context}: shorten it"
            )
        numbers = [_group_numbers(conversation, 2 * place, len(groups) - 1) for conversation in of_language]
        for number, name in enumerate(groups_of(language), start=2 * place):
            if not any(bool((of_tokens[1:] == number).any()) for of_tokens in numbers):
                raise UsageError(f"the conversations in {language!r} have no token of the group {name!r}")
        rows = fitting_batches(loaded, [conversation.ids.tolist() for conversation in of_language], 1)
        batches[language] = [_grouped(batch, numbers) for batch in rows]
    require_embedded_tokens(loaded, batches)
    return ConversationBatches(batches, groups)


def _group_numbers(conversation: RoleTokens, messages: int, template: int) -> torch.Tensor:
    numbers = torch.full_like(conversation.roles, template)
    numbers[conversation.of(USER, ANSWER, THOUGHT)] = messages
    numbers[conversation.of(HEADER)] = messages + 1
    return numbers


def _grouped(batch: TokenBatch, numbers: Sequence[torch.Tensor]) -> TokenBatch:
    groups = torch.full_like(batch.ids, -1)
    for row, line in enumerate(batch.line_numbers.tolist()):
        groups[row, : len(numbers[line])] = numbers[line]
    return replace(batch, groups=groups)
