"""Preferences: a ``.jsonl`` whose rows have a prompt, a chosen and a rejected answer.

With a chat template the prompt is the user's message and the answer the assistant's.  Without one the answer follows the
prompt as it stands, so it begins with the space or the line end that belongs between them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from neurons.errors import UsageError
from neurons.models.embedded import require_embedded
from neurons.models.source import LoadedModel
from neurons.text.batches import context_length
from neurons.text.conversations import ASSISTANT, BEFORE_ANSWER, Message
from neurons.text.corpus_rows import Conversation
from neurons.text.prompts import Prompt, answer_tokens, row_strings
from neurons.text.token_rows import TokenRow

CHOSEN, REJECTED = "chosen", "rejected"
EXAMPLE = '{"prompt": "How are you?", "chosen": "Bien, merci.", "rejected": "Fine, thanks."}'


@dataclass(frozen=True)
class Preference:
    """A prompt with two answers."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Preferences:
    """The rows of a file.

    Attributes:
        of: in file order.
        digest: sha256 of the file, hexadecimal.
    """

    of: tuple[Preference, ...]
    digest: str


def read_preferences(path: Path) -> Preferences:
    """Read a ``.jsonl``.

    Raises:
        UsageError: a file without rows, or a row that is not a preference; with an example.
    """
    content = path.read_bytes()
    rows = tuple(
        Preference(*row_strings(path, number, line, ("prompt", CHOSEN, REJECTED), EXAMPLE))
        for number, line in enumerate(content.split(b"\n"), start=1)
        if line.strip()
    )
    if not rows:
        raise UsageError(f"{path}: holds no preference: write lines like {EXAMPLE}")
    return Preferences(rows, hashlib.sha256(content).hexdigest())


def preference_rows(loaded: LoadedModel, preferences: Preferences) -> Mapping[str, list[TokenRow]]:
    """The tokens of prompts with answers, up to the last token of the answer.

    The positions that predict a token of the answer are counted.

    Returns:
        ``CHOSEN`` and ``REJECTED`` -> rows; line i is preference i.

    Raises:
        UsageError: a row longer than the model's context, a token without an embedding, or a conversation that the
            template does not render.
    """
    longest = context_length(loaded.model)
    rows: dict[str, list[TokenRow]] = {CHOSEN: [], REJECTED: []}
    for number, preference in enumerate(preferences.of):
        for kind, of_kind in rows.items():
            row = _row(loaded.tokenizer, number, preference.prompt, getattr(preference, kind))
            if longest is not None and len(row.ids) > longest:
                raise UsageError(
                    f"preference {number + 1}: the prompt with its {kind} answer has {len(row.ids)} tokens, but the model "
                    f"reads {longest}: shorten it"
                )
            require_embedded(loaded.name, loaded.tokenizer, max(row.ids), loaded.embedding_rows)
            of_kind.append(row)
    return rows


def _row(tokenizer: Any, line: int, prompt: str, answer: str) -> TokenRow:
    if getattr(tokenizer, "chat_template", None):
        messages = (Message("user", prompt), Message(ASSISTANT, answer))
        tokens = Conversation(messages, f"preference {line + 1}").tokens(tokenizer)
        counted = tokens.of(BEFORE_ANSWER).nonzero()[:, 0].tolist()
        return TokenRow(line, tokens.ids[: counted[-1] + 2].tolist(), counted)
    ids, of_answer = answer_tokens(tokenizer, Prompt(prompt, answer))
    return TokenRow(line, [*ids, *of_answer], range(len(ids) - 1, len(ids) + len(of_answer) - 1))


def numbered_together(rows: Mapping[str, Sequence[TokenRow]]) -> list[TokenRow]:
    """All rows, chosen before rejected, with the line numbers 0 to 2 n - 1."""
    together = [*rows[CHOSEN], *rows[REJECTED]]
    return [replace(row, line=line) for line, row in enumerate(together)]
