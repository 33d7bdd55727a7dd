"""Conversations as the model's own chat template renders them, every token with the role that it has there.

A token's role is that of its last character:

    template   what the template itself writes: markers, names of roles, a default system message
    system     a system message
    user       a user's message
    header     the last token before an answer: where the answer's first word, and so its language, is chosen
    answer     an assistant's message
    thought    what stands between <think> and </think> in an assistant's message

Where each message stands is found by rendering the conversation a second time with a placeholder for every message: what
is around the placeholders is the template's.  A template that changes messages otherwise than by cutting white space at
their ends, or leaves one out, is refused, as no token of it could be trusted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from neurons.errors import UsageError, first_line

ROLES = ("template", "system", "user", "header", "answer", "thought")
TEMPLATE, SYSTEM, USER, HEADER, ANSWER, THOUGHT = ROLES
ASSISTANT = "assistant"
ANOTHER_MODEL = "give a model with another one"
_SPOKEN = {"system": SYSTEM, "user": USER, ASSISTANT: ANSWER}
_BEFORE_THOUGHT, _AFTER_THOUGHT = "<think>", "</think>"


@dataclass(frozen=True)
class Message:
    """One message.

    Attributes:
        role: "system", "user" or "assistant".
        content: what is said.
        thought: of an assistant: what it thought before; None: nothing.
    """

    role: str
    content: str
    thought: str | None = None

    @property
    def parts(self) -> tuple[tuple[str, str], ...]:
        """(role of its tokens, text), in the order in which they are rendered."""
        own = (_SPOKEN[self.role], self.content.strip())
        return (own,) if self.thought is None else ((THOUGHT, self.thought.strip()), own)

    def written(self, parts: Sequence[str]) -> dict[str, str]:
        """As a chat template takes it, with ``parts`` in place of its own."""
        content = parts[-1]
        if self.thought is not None:
            content = f"{_BEFORE_THOUGHT}\n{parts[0]}\n{_AFTER_THOUGHT}\n\n{content}"
        return {"role": self.role, "content": content}


@dataclass(frozen=True)
class RoleTokens:
    """A rendered conversation.

    Attributes:
        ids: int64 [n].
        roles: int64 [n], each token's place in ``ROLES``.
    """

    ids: torch.Tensor
    roles: torch.Tensor

    def of(self, *roles: str) -> torch.Tensor:
        """bool [n], the tokens of some roles."""
        return torch.isin(self.roles, torch.tensor([ROLES.index(role) for role in roles]))

    def answered(self, ids: Sequence[int]) -> RoleTokens:
        """The conversation with an answer's tokens behind it, as a model goes on from its prompt."""
        answer = torch.tensor(list(ids), dtype=torch.int64)
        roles = torch.full_like(answer, ROLES.index(ANSWER))
        return RoleTokens(torch.cat([self.ids, answer]), torch.cat([self.roles, roles]))


def rendered(
    tokenizer: Any,
    chat: Sequence[dict[str, str]],
    answer_follows: bool = False,
    way_out: str = ANOTHER_MODEL,
) -> str:
    """The text of a chat by the tokenizer's template.

    Args:
        tokenizer: one with a chat template.
        chat: messages, as the template takes them.
        answer_follows: whether the text ends where an answer begins.
        way_out: of a template that cannot be used, as the end of a sentence.

    Raises:
        UsageError: the template fails, or renders nothing or a text without one of the messages.
    """
    try:
        text: str = tokenizer.apply_chat_template(chat, add_generation_prompt=answer_follows, tokenize=False)
    # A template is a program, and may fail in any way.
    except Exception as error:
        raise _unusable(tokenizer, f"fails ({type(error).__name__}: {first_line(error)})", way_out) from error
    if not text.strip():
        raise _unusable(tokenizer, "renders nothing", way_out)
    for message in chat:
        if message["content"].strip() not in text:
            raise _unusable(tokenizer, f"renders a text without the {message['role']}'s message", way_out)
    return text


def role_tokens(tokenizer: Any, messages: Sequence[Message], answer_follows: bool = False) -> RoleTokens:
    """Render a conversation and tell its tokens' roles.

    Args:
        tokenizer: a fast one, with a chat template.
        messages: one after the other.
        answer_follows: whether the conversation ends where an answer begins; its last token then is a header.

    Raises:
        UsageError: a message without text, a tokenizer that does not tell which characters a token is of, or a template
            that fails, leaves out a message or changes it.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UsageError(
            f"the tokenizer of {tokenizer.name_or_path} does not tell which characters a token is of: give a "
            "tokenizer.json"
        )
    for place, message in enumerate(messages, start=1):
        if not all(text for _, text in message.parts):
            raise UsageError(f"message {place} ({message.role}) of the conversation is empty: leave it out")
    whole = rendered(
        tokenizer, [one.written([text for _, text in one.parts]) for one in messages], answer_follows
    )
    spans = _spans(tokenizer, messages, whole, answer_follows)
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    ends = torch.tensor([last for _, last in encoded["offset_mapping"]])
    roles = torch.full((len(ends),), ROLES.index(TEMPLATE))
    before: list[int] = []  # where answers, or the thoughts before them, begin
    for at, (role, first, last) in enumerate(spans):
        roles[(ends > first) & (ends <= last)] = ROLES.index(role)
        if role == THOUGHT or (role == ANSWER and not (at and spans[at - 1][0] == THOUGHT)):
            before.append(first)
    before += [len(whole)] if answer_follows else []
    for begin in before:
        earlier = (ends <= begin).nonzero()
        if len(earlier):
            roles[earlier[-1]] = ROLES.index(HEADER)
    return RoleTokens(torch.tensor(encoded["input_ids"]), roles)


def _spans(
    tokenizer: Any, messages: Sequence[Message], whole: str, answer_follows: bool
) -> list[tuple[str, int, int]]:
    """(role, first character, one past the last) of every message in the rendered text."""
    parts = [part for message in messages for part in message.parts]
    # Of a private use area: no template asks for it, and no message holds it.
    names = [f"\ue000{place}\ue001" for place in range(len(parts))]
    left = list(names)
    chat = []
    for message in messages:
        count = len(message.parts)
        chat.append(message.written(left[:count]))
        left = left[count:]
    frame = rendered(tokenizer, chat, answer_follows)
    pattern, end = "", 0
    for name, (_, text) in zip(names, parts, strict=True):
        at = frame.find(name, end)
        if at < 0:
            raise _unusable(tokenizer, "leaves out or repeats a message", "give conversations that it keeps")
        pattern += rf"{re.escape(frame[end:at])}\s*({re.escape(text)})\s*"
        end = at + len(name)
    found = re.fullmatch(pattern + re.escape(frame[end:]), whole, flags=re.DOTALL)
    if found is None:
        raise _unusable(
            tokenizer, "does more with a message than to repeat it", "give conversations that it keeps"
        )
    return [(role, *found.span(place)) for place, (role, _) in enumerate(parts, start=1)]


def _unusable(tokenizer: Any, fault: str, way_out: str) -> UsageError:
    return UsageError(f"the chat template of {tokenizer.name_or_path} {fault}: correct it, or {way_out}")
