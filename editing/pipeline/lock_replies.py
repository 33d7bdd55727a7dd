"""The model's greedy replies to prompts: an answer, and a thought before it if the prompt ends where one begins.

A thought that is longer than an answer may be is ended there, so that every reply has an answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from editing.evaluation.generation import Continuation, generate, generate_by_language
from editing.methods.distilled_values import Example
from neurons.models.source import LoadedModel
from neurons.text.conversations import AFTER_THOUGHT, END_OF_THOUGHT, RoleTokens


@dataclass(frozen=True)
class Reply:
    """The reply to a prompt.

    Attributes:
        prompt: up to the start of the reply.
        answer: the answer.
        thought: the thought before it; None without thoughts.
        end: the tokens between thought and answer.
    """

    prompt: RoleTokens
    answer: Continuation
    thought: Continuation | None = None
    end: tuple[int, ...] = ()

    def up_to_answer(self, prompt: RoleTokens) -> RoleTokens:
        """A prompt, followed by the thought."""
        return prompt if self.thought is None else prompt.thought(self.thought.ids, self.end)

    @property
    def conversation(self) -> RoleTokens:
        """The prompt and the reply."""
        return self.up_to_answer(self.prompt).answered(self.answer.ids)

    def example(self, student: RoleTokens) -> Example:
        """The answer as an example, after the same thought of student and teacher."""
        return Example(
            _ids(self.up_to_answer(student)), _ids(self.up_to_answer(self.prompt)), self.answer.ids
        )

    def thought_example(self, student: RoleTokens) -> Example:
        """The thought as an example."""
        assert self.thought is not None
        return Example(_ids(student), _ids(self.prompt), self.thought.ids)


def replies(
    loaded: LoadedModel, prompts: Mapping[str, Sequence[RoleTokens]], tokens: int, thinks: bool = False
) -> dict[str, list[Reply]]:
    """The replies to the prompts of several languages, in shared batches.

    Args:
        loaded: the model, which the caller may have edited.
        prompts: language -> prompts.
        tokens: maximum number of tokens of an answer, and of a thought.
        thinks: whether the prompts end where a thought begins.
    """
    if not thinks:
        answers = answered_by_language(loaded, prompts, tokens)
        return {
            language: [Reply(*pair) for pair in zip(of_language, answers[language], strict=True)]
            for language, of_language in prompts.items()
        }
    written = answered_by_language(loaded, prompts, tokens)
    thoughts = {
        language: [ended_thought(loaded.tokenizer, one) for one in of_language]
        for language, of_language in written.items()
    }
    before = {
        language: [
            prompt.thought(thought.ids, end)
            for prompt, (thought, end) in zip(of_language, thoughts[language], strict=True)
        ]
        for language, of_language in prompts.items()
    }
    answers = answered_by_language(loaded, before, tokens)
    return {
        language: [
            Reply(prompt, answer, thought, end)
            for prompt, answer, (thought, end) in zip(
                of_language, answers[language], thoughts[language], strict=True
            )
        ]
        for language, of_language in prompts.items()
    }


def ended_thought(tokenizer: Any, written: Continuation) -> tuple[Continuation, tuple[int, ...]]:
    """(thought, tokens of its end) of what a model has written from the start of a thought on."""

    def tokens(text: str) -> tuple[int, ...]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return tuple(ids)

    def closes(first: int, last: int) -> bool:
        return AFTER_THOUGHT in tokenizer.decode(written.ids[first:last])

    count = len(written.ids)
    if not closes(0, count):
        return written, tokens(END_OF_THOUGHT)
    last = next(at for at in range(count + 1) if closes(0, at))
    first = next(at for at in reversed(range(last)) if closes(at, last))
    thought = written.ids[:first]
    text = tokenizer.decode(thought, skip_special_tokens=True)
    _, _, after = END_OF_THOUGHT.partition(AFTER_THOUGHT)
    return Continuation(thought, text), (*written.ids[first:last], *tokens(after))


def answered(loaded: LoadedModel, prompts: Sequence[RoleTokens], tokens: int) -> list[Continuation]:
    """What the model writes after each prompt, of at most ``tokens`` tokens."""
    return generate(loaded, [prompt.ids.tolist() for prompt in prompts], tokens, temperature=0)


def answered_by_language(
    loaded: LoadedModel, prompts: Mapping[str, Sequence[RoleTokens]], tokens: int
) -> dict[str, list[Continuation]]:
    """``answered`` for several languages, in shared batches."""
    ids = {
        language: [prompt.ids.tolist() for prompt in of_language] for language, of_language in prompts.items()
    }
    return generate_by_language(loaded, ids, tokens)


def _ids(tokens: RoleTokens) -> tuple[int, ...]:
    return tuple(tokens.ids.tolist())
