"""Prompts and greedy answers of a lock: questions by chat template, with or without an instruction and a context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from editing.evaluation.generation import Continuation, generate, generate_by_language
from neurons.errors import UsageError
from neurons.models.source import LoadedModel
from neurons.text.conversations import ALWAYS, Message, RoleTokens, role_tokens, thinking

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


def require_answers(name: str, tokenizer: Any) -> None:
    """Check that a model has a chat template with which it answers without thinking before.

    Raises:
        UsageError: as ``require_chat``, or a template that begins every answer with a thought.
    """
    require_chat(name, tokenizer)
    if thinking(tokenizer) == ALWAYS:
        raise UsageError(
            f"{name} thinks before every answer, and its chat template cannot turn that off: give a model that can answer "
            "without thoughts"
        )


def prompt_of(
    loaded: LoadedModel, question: str, instruction: str | None = None, context: Sequence[Message] = ()
) -> RoleTokens:
    """A question after a context and before an instruction, up to the start of the answer, without thoughts."""
    text = question if instruction is None else f"{question} {instruction}"
    messages = [*context, Message("user", text)]
    return role_tokens(loaded.tokenizer, messages, answer_follows=True, thinks=False)


def answered(loaded: LoadedModel, prompts: Sequence[RoleTokens], tokens: int) -> list[Continuation]:
    """The model's greedy answers, of at most ``tokens`` tokens."""
    return generate(loaded, [prompt.ids.tolist() for prompt in prompts], tokens, temperature=0)


def answered_by_language(
    loaded: LoadedModel, prompts: Mapping[str, Sequence[RoleTokens]], tokens: int
) -> dict[str, list[Continuation]]:
    """``answered`` for several languages, in shared batches."""
    ids = {
        language: [prompt.ids.tolist() for prompt in of_language] for language, of_language in prompts.items()
    }
    return generate_by_language(loaded, ids, tokens)
