"""A conversation with a model, with streamed answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from threading import Event, Thread
from typing import Any

import torch

from editing.evaluation.generation import writing
from neurons.errors import UsageError
from neurons.models.embedded import require_embedded
from neurons.models.source import LoadedModel
from neurons.text.batches import context_length
from neurons.text.conversations import rendered


class ContextFullError(UsageError):
    """The conversation leaves no room for an answer."""


@dataclass
class Talk:
    """One conversation.

    Attributes:
        loaded: the model, with a chat template.
        system: a system message; None: that of the template.
        new_tokens: maximum number of tokens of an answer.
        temperature: of sampling; 0 is greedy.
        messages: the conversation so far, as input of a chat template.
    """

    loaded: LoadedModel
    system: str | None = None
    new_tokens: int = 512
    temperature: float = 0.0
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start a new conversation."""
        self.messages[:] = [] if self.system is None else [{"role": "system", "content": self.system}]

    def answer(self, content: str) -> Iterator[str]:
        """The answer to a user's message, in pieces of text; both join the conversation when the answer ends.

        It is cut where the model's context ends.  Closing the iterator stops the model, and nothing joins.

        Raises:
            ContextFullError: the conversation fills the context.
            UsageError: a template that cannot be used, or a token without an embedding.
        """
        import transformers

        tokenizer = self.loaded.tokenizer
        chat = [*self.messages, {"role": "user", "content": content}]
        text = rendered(tokenizer, chat, True, "choose another model")
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        require_embedded(self.loaded.name, tokenizer, int(ids.max()), self.loaded.embedding_rows)
        new_tokens = self.new_tokens
        if (context := context_length(self.loaded.model)) is not None:
            if ids.shape[1] >= context:
                raise ContextFullError(
                    f"the conversation has {ids.shape[1]} tokens and the context of {self.loaded.name} {context}: send a "
                    "shorter message, or start a new conversation"
                )
            new_tokens = min(new_tokens, context - ids.shape[1])
        streamer: Any = transformers.TextIteratorStreamer(
            tokenizer, skip_prompt=True, skip_special_tokens=True
        )
        errors: list[Exception] = []
        closed = Event()

        def write() -> None:
            try:
                with writing(self.loaded, self.temperature) as settings:
                    self.loaded.model.generate(
                        input_ids=ids.to(self.loaded.device),
                        attention_mask=torch.ones_like(ids).to(self.loaded.device),
                        max_new_tokens=new_tokens,
                        streamer=streamer,
                        stopping_criteria=[
                            lambda ids, _: torch.full((len(ids),), closed.is_set(), device=ids.device)
                        ],
                        **settings,
                    )
            except Exception as error:
                errors.append(error)
                streamer.end()

        # The interpreter does not wait for a daemon, so an interrupt ends the command at once.
        writer = Thread(target=write, daemon=True)
        writer.start()
        pieces: list[str] = []
        try:
            for piece in streamer:
                pieces.append(piece)
                yield piece
        except GeneratorExit:
            closed.set()
            writer.join()
            raise
        writer.join()
        if errors:
            raise errors[0]
        self.messages[:] = [*chat, {"role": "assistant", "content": "".join(pieces)}]
