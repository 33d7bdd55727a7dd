"""Prompts of a lock: questions by chat template, with or without an instruction and a context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from neurons.errors import UsageError
from neurons.models.source import LoadedModel
from neurons.text.conversations import AFTER_THOUGHT, ALWAYS, Message, RoleTokens, role_tokens, thinking

BUILD, CHOOSE, REPORT = "estimate", "choose", "report"


def require_chat(name: str, tokenizer: Any) -> None:
    """Check that a model has a chat template.

    Raises:
        UsageError: it has none.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            f"{name} has no chat template, so it cannot answer questions: give the instruct model, or steer a base "
            "model with a corpus (`broca run`)"
        )


def steers_thoughts(name: str, tokenizer: Any, asked: bool | None) -> bool:
    """Whether a lock steers thoughts: as asked; not asked, if the template cannot turn them off.

    Args:
        name: of the model.
        tokenizer: its tokenizer.
        asked: by the user; None: not.

    Raises:
        UsageError: as ``require_chat``, thoughts of a model that knows none, or no thoughts of one that always thinks.
    """
    require_chat(name, tokenizer)
    thinks = thinking(tokenizer)
    # A model may open its thoughts itself, so that its template does not show them.
    knows = AFTER_THOUGHT in str(tokenizer.chat_template) or AFTER_THOUGHT in tokenizer.get_vocab()
    if asked and thinks is None and not knows:
        raise UsageError(
            f"{name} does not think before it answers (no {AFTER_THOUGHT} in its chat template and tokens): leave out "
            "--thoughts"
        )
    if asked is False and thinks == ALWAYS:
        raise UsageError(
            f"{name} thinks before every answer, and its chat template cannot turn that off: steer its thoughts, too "
            "(--thoughts)"
        )
    return thinks == ALWAYS if asked is None else asked


def prompt_of(
    loaded: LoadedModel,
    question: str,
    instruction: str | None = None,
    context: Sequence[Message] = (),
    thinks: bool = False,
) -> RoleTokens:
    """A question after a context and before an instruction, up to the start of a thought, or of the answer without one."""
    text = question if instruction is None else f"{question} {instruction}"
    messages = [*context, Message("user", text)]
    return role_tokens(loaded.tokenizer, messages, answer_follows=True, thinks=thinks)
