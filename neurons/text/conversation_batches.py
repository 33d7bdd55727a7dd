"""Conversations as token batches in which every token is of a group: what is said in a language, its headers, the rest.

    <language>           what the user and the assistant say in it, thoughts included
    <language>/header    the last token before an answer in it
    template             what is the same in every language: the template's own tokens and system messages

The first token of every conversation is not counted: it serves a model as an attention sink.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from neurons.errors import UsageError
from neurons.models.embedded import require_embedded
from neurons.models.memory import MAX_TOKENS, batches_for
from neurons.models.source import LoadedModel
from neurons.text.batches import TokenBatch, block_length, row_batches
from neurons.text.conversations import ANSWER, HEADER, THOUGHT, USER, RoleTokens

TEMPLATE_GROUP = "template"


@dataclass(frozen=True)
class ConversationBatches:
    """Conversations of several languages.

    Attributes:
        batches: language -> its batches, whose ``groups`` number ``groups``.
        groups: names.
    """

    batches: Mapping[str, Sequence[TokenBatch]]
    groups: tuple[str, ...]

    @property
    def languages(self) -> tuple[str, ...]:
        return tuple(self.batches)

    @property
    def tokens(self) -> int:
        """How many are counted."""
        return sum(int(batch.counted.sum()) for some in self.batches.values() for batch in some)


def said_in(language: str) -> tuple[str, str]:
    """The groups of a language."""
    return language, f"{language}/header"


def conversation_batches(
    loaded: LoadedModel, conversations: Mapping[str, Sequence[RoleTokens]], tokens_a_batch: int | None = None
) -> ConversationBatches:
    """Group the tokens of conversations.

    Args:
        loaded: the model.
        conversations: language -> its conversations.
        tokens_a_batch: None takes what memory allows for a pass without gradients.

    Raises:
        UsageError: a language without a token or a header, a conversation longer than the model's context, or a token that
            the model has no embedding of.
    """
    groups = (*(name for language in conversations for name in said_in(language)), TEMPLATE_GROUP)
    context = block_length(loaded.model)
    batches: dict[str, list[TokenBatch]] = {}
    for place, (language, some) in enumerate(conversations.items()):
        longest = max((len(one.ids) for one in some), default=0)
        if longest > context:
            raise UsageError(
                f"a conversation in {language!r} has {longest} tokens, and {context} are read at once: shorten it"
            )
        most = tokens_a_batch or min(MAX_TOKENS, batches_for(loaded, False, max(1, longest))[0])
        numbers = [_group_numbers(one, 2 * place, len(groups) - 1) for one in some]
        for number, name in enumerate(said_in(language), start=2 * place):
            if not any(bool((own[1:] == number).any()) for own in numbers):
                raise UsageError(f"the conversations in {language!r} have no token of the group {name!r}")
        rows = row_batches([one.ids.tolist() for one in some], 1, tokens_a_batch=most)
        batches[language] = [_grouped(batch, numbers) for batch in rows]
    highest = max((int(batch.ids.max()) for some in batches.values() for batch in some), default=0)
    require_embedded(loaded.name, loaded.tokenizer, highest, loaded.embedding_rows)
    return ConversationBatches(batches, groups)


def _group_numbers(one: RoleTokens, own: int, template: int) -> torch.Tensor:
    numbers = torch.full_like(one.roles, template)
    numbers[one.of(USER, ANSWER, THOUGHT)] = own
    numbers[one.of(HEADER)] = own + 1
    return numbers


def _grouped(batch: TokenBatch, numbers: Sequence[torch.Tensor]) -> TokenBatch:
    groups = torch.full_like(batch.ids, -1)
    for row, line in enumerate(batch.line_numbers.tolist()):
        groups[row, : len(numbers[line])] = numbers[line]
    return replace(batch, groups=groups)
