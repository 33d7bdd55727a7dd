"""Conversations rendered by the model's chat template, with the role of every token.

A token's role is that of its last character:

    template   text of the template itself: markers, names of roles, a default system message
    system     a system message
    user       a user's message
    header     the last token before an answer, or before the thought that precedes it, which predicts the first word and so
               the language
    answer     an assistant's message
    thought    the text between <think> and </think> in an assistant's message

The messages are located by rendering the conversation a second time with a placeholder for every message.  A
template that drops a message, or changes it other than by stripping white space, is refused: the roles of its
tokens would be unreliable.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from neurons.errors import UsageError, first_line

ROLES = ("template", "system", "user", "header", "answer", "thought")
TEMPLATE, SYSTEM, USER, HEADER, ANSWER, THOUGHT = ROLES
# The tokens before an answer's tokens, which predict them: the answer's but the last, and the one before the first.
BEFORE_ANSWER = "before-answer"
SELECTABLE = (*ROLES, BEFORE_ANSWER)
MESSAGE_ROLES = tuple(role for role in ROLES if role != TEMPLATE)
ASSISTANT = "assistant"
ANOTHER_MODEL = "give a model with another template"
KEPT_CONVERSATIONS = "give conversations that it renders unchanged"
_SPOKEN = {"system": SYSTEM, "user": USER, ASSISTANT: ANSWER}
SPEAKERS = tuple(_SPOKEN)
OPTIONAL, ALWAYS = "optional", "always"
_BEFORE_THOUGHT, AFTER_THOUGHT = "<think>", "</think>"
END_OF_THOUGHT = f"\n{AFTER_THOUGHT}\n\n"
# Variables by which templates turn thoughts on or off, in Qwen 3, GLM and SmolLM3, and in DeepSeek-V3.1; others ignore them.
_SWITCHES = ("enable_thinking", "thinking")


@dataclass(frozen=True)
class Message:
    """One message.

    Attributes:
        role: "system", "user" or "assistant".
        thought: the assistant's thoughts before it; None: no thoughts.
    """

    role: str
    content: str
    thought: str | None = None

    @property
    def parts(self) -> tuple[tuple[str, str], ...]:
        """(role of its tokens, text), in the order in which they are rendered."""
        content = (_SPOKEN[self.role], self.content.strip())
        return (content,) if self.thought is None else ((THOUGHT, self.thought.strip()), content)

    def written(self, parts: Sequence[str]) -> dict[str, str]:
        """The message as input of a chat template, with the texts ``parts`` in place of its own."""
        content = parts[-1]
        if self.thought is not None:
            content = f"{_BEFORE_THOUGHT}\n{parts[0]}{END_OF_THOUGHT}{content}"
        return {"role": self.role, "content": content}


@dataclass(frozen=True)
class RoleTokens:
    """A rendered conversation.

    Attributes:
        ids: int64 [n].
        roles: int64 [n], each token's index in ``ROLES``.
    """

    ids: torch.Tensor
    roles: torch.Tensor

    def of(self, *roles: str) -> torch.Tensor:
        """bool [n], the tokens with one of the roles (``SELECTABLE``)."""
        tokens = torch.isin(self.roles, torch.tensor([ROLES.index(role) for role in roles if role in ROLES]))
        if BEFORE_ANSWER in roles:
            tokens[:-1] |= self.roles[1:] == ROLES.index(ANSWER)
        return tokens

    def answered(self, ids: Sequence[int]) -> RoleTokens:
        """The conversation followed by the tokens of an answer, as the model continues its prompt."""
        answer = torch.tensor(list(ids), dtype=torch.int64)
        roles = torch.full_like(answer, ROLES.index(ANSWER))
        return RoleTokens(torch.cat([self.ids, answer]), torch.cat([self.roles, roles]))

    def thought(self, ids: Sequence[int], end: Sequence[int]) -> RoleTokens:
        """The conversation followed by the tokens of a thought and of its end, up to the start of the answer."""
        added = torch.tensor([*ids, *end], dtype=torch.int64)
        roles = torch.full_like(added, ROLES.index(TEMPLATE))
        roles[: len(ids)] = ROLES.index(THOUGHT)
        roles[-1] = ROLES.index(HEADER)
        return RoleTokens(torch.cat([self.ids, added]), torch.cat([self.roles, roles]))


def rendered(
    tokenizer: Any,
    chat: Sequence[dict[str, str]],
    answer_follows: bool = False,
    remedy: str = ANOTHER_MODEL,
    thinks: bool | None = None,
) -> str:
    """The text of a chat, rendered by the tokenizer's template.

    Templates of models that also read images may need each message as a list of parts: they get that where the text
    alone is not rendered.

    Args:
        tokenizer: a tokenizer with a chat template.
        chat: messages, as input of the template.
        answer_follows: whether the text ends where an answer begins.
        remedy: alternative to correcting an unusable template, as the end of a sentence.
        thinks: True or False turns thoughts on or off, if the template can; None leaves that to the template.

    Raises:
        UsageError: the template fails, renders no text, or drops a message.
    """
    variables = {} if thinks is None else dict.fromkeys(_SWITCHES, thinks)

    def render(given: Sequence[Mapping[str, Any]]) -> str:
        try:
            text: str = tokenizer.apply_chat_template(
                given, add_generation_prompt=answer_follows, tokenize=False, **variables
            )
        # A template is a program, and may fail in any way.
        except Exception as error:
            raise _unusable(
                tokenizer, f"fails ({type(error).__name__}: {first_line(error)})", remedy
            ) from error
        if not text.strip():
            raise _unusable(tokenizer, "renders nothing", remedy)
        for message in chat:
            if message["content"].strip() not in text:
                raise _unusable(tokenizer, f"renders a text without the {message['role']}'s message", remedy)
        return text

    try:
        return render(chat)
    except UsageError:
        parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in chat]
        with suppress(UsageError):
            text = render(parts)
            # A template that only knows text may write the list itself.
            if "'type': 'text'" not in text:
                return text
        raise


def thinking(tokenizer: Any) -> str | None:
    """Whether a model thinks before it answers, by its chat template.

    Returns:
        ``OPTIONAL`` if the template can turn thoughts off, ``ALWAYS`` if it begins every answer with a thought, None
        otherwise.
    """
    chat = [{"role": "user", "content": "?"}]
    without = rendered(tokenizer, chat, True, thinks=False)
    if without.rstrip().endswith(_BEFORE_THOUGHT):
        return ALWAYS
    return OPTIONAL if without != rendered(tokenizer, chat, True, thinks=True) else None


def up_to_reply(text: str, thinks: bool | None) -> str:
    """A rendered text that ends where the model replies, up to the start of a thought or of an answer without one.

    A template that begins every answer with a thought gets an empty one in place of none (arXiv 2504.09858).
    """
    begun = text.rstrip().endswith(_BEFORE_THOUGHT)
    if thinks is False and begun:
        return text.rstrip() + "\n" + END_OF_THOUGHT
    return f"{text}{_BEFORE_THOUGHT}\n" if thinks and not begun else text


def role_tokens(
    tokenizer: Any,
    messages: Sequence[Message],
    answer_follows: bool = False,
    remedy: str = ANOTHER_MODEL,
    thinks: bool | None = None,
) -> RoleTokens:
    """Render a conversation and assign roles to its tokens.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        answer_follows: whether the conversation ends where an answer begins; its last token is then a header.
        remedy: as ``rendered``.
        thinks: as ``rendered``; with ``answer_follows`` the conversation ends as ``up_to_reply`` says.

    Raises:
        UsageError: a message without text, a tokenizer without character offsets, or a template that fails, drops
            a message or changes it.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UsageError(
            f"the tokenizer of {tokenizer.name_or_path} has no character offsets for its tokens: provide a "
            "tokenizer.json"
        )
    for place, message in enumerate(messages, start=1):
        if not all(text for _, text in message.parts):
            raise UsageError(f"message {place} ({message.role}) of the conversation is empty: leave it out")
    chat = [message.written([text for _, text in message.parts]) for message in messages]
    whole = rendered(tokenizer, chat, answer_follows, remedy, thinks)
    spans = _spans(tokenizer, messages, whole, answer_follows, thinks)
    if answer_follows:
        whole = up_to_reply(whole, thinks)
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    ends = torch.tensor([last for _, last in encoded["offset_mapping"]])
    roles = torch.full((len(ends),), ROLES.index(TEMPLATE))
    begins: list[int] = []  # first characters of thoughts and answers
    for role, first, last in spans:
        roles[(ends > first) & (ends <= last)] = ROLES.index(role)
        if role in (THOUGHT, ANSWER):
            begins.append(first)
    begins += [len(whole)] if answer_follows else []
    for begin in begins:
        earlier = (ends <= begin).nonzero()
        if len(earlier):
            roles[earlier[-1]] = ROLES.index(HEADER)
    return RoleTokens(torch.tensor(encoded["input_ids"]), roles)


def _spans(
    tokenizer: Any, messages: Sequence[Message], whole: str, answer_follows: bool, thinks: bool | None
) -> list[tuple[str, int, int]]:
    """(role, first character, one past the last) of every message in the rendered text."""
    parts = [part for message in messages for part in message.parts]
    # Of a private use area, so that neither templates nor messages contain them.
    placeholders = [f"\ue000{place}\ue001" for place in range(len(parts))]
    unused = iter(placeholders)
    chat = [message.written([next(unused) for _ in message.parts]) for message in messages]
    frame = rendered(tokenizer, chat, answer_follows, thinks=thinks)
    pattern, end = "", 0
    for placeholder, (_, text) in zip(placeholders, parts, strict=True):
        at = frame.find(placeholder, end)
        if at < 0:
            raise _unusable(tokenizer, "drops or repeats a message", KEPT_CONVERSATIONS)
        pattern += rf"{re.escape(frame[end:at])}\s*({re.escape(text)})\s*"
        end = at + len(placeholder)
    match = re.fullmatch(pattern + re.escape(frame[end:]), whole, flags=re.DOTALL)
    if match is None:
        raise _unusable(tokenizer, "changes a message", KEPT_CONVERSATIONS)
    return [(role, *match.span(place)) for place, (role, _) in enumerate(parts, start=1)]


def _unusable(tokenizer: Any, fault: str, remedy: str) -> UsageError:
    return UsageError(f"the chat template of {tokenizer.name_or_path} {fault}: correct it, or {remedy}")
