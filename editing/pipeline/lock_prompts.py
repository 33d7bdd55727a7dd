"""What the model is asked for a lock: a question by its chat template, with an instruction or a context or without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from editing.evaluation.generation import Continuation, generate
from neurons.errors import UsageError
from neurons.models.source import LoadedModel
from neurons.text.conversations import Message, RoleTokens, role_tokens

BUILD, CHOOSE, REPORT = "estimate", "choose", "report"


def require_chat(name: str, tokenizer: Any) -> None:
    """Refuse a model without a chat template.

    Raises:
        UsageError: it has none.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            f"{name} has no chat template, so it answers no questions: steer a base model by text "
            "(`broca run`), or give the instruct model"
        )


def prompt_of(
    loaded: LoadedModel, question: str, instruction: str | None = None, context: Sequence[Message] = ()
) -> RoleTokens:
    """A question, behind a context and with an instruction after it, up to where the answer begins."""
    text = question if instruction is None else f"{question} {instruction}"
    return role_tokens(loaded.tokenizer, [*context, Message("user", text)], answer_follows=True)


def answered(loaded: LoadedModel, prompts: Sequence[RoleTokens], tokens: int) -> list[Continuation]:
    """The model's likeliest answers."""
    return generate(loaded, [prompt.ids.tolist() for prompt in prompts], tokens, temperature=0)


def answered_by_language(
    loaded: LoadedModel, prompts: Mapping[str, Sequence[RoleTokens]], tokens: int
) -> dict[str, list[Continuation]]:
    """``answered`` for several languages, whose prompts share batches: a step costs about the same for few as for many."""
    answers = iter(answered(loaded, [prompt for some in prompts.values() for prompt in some], tokens))
    return {language: [next(answers) for _ in some] for language, some in prompts.items()}
