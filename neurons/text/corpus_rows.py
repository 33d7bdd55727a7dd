"""Rows of a ``.jsonl`` or ``.parquet`` corpus: a text, or a conversation as chat datasets write it.

    {"text": "..."}
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}

An assistant's content may begin with its thoughts, ended by ``</think>``.  Further keys are ignored, and so is one of
the two that is null.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neurons.errors import UsageError
from neurons.text.conversations import (
    ASSISTANT,
    KEPT_CONVERSATIONS,
    SPEAKERS,
    Message,
    RoleTokens,
    role_tokens,
)

COLUMNS = ("text", "messages")
EXAMPLE = '[{"role": "user", "content": "..."}, ...]'
_THOUGHT = re.compile(r"\s*(?:<think>)?(.*?)</think>(.*)", re.DOTALL)


@dataclass(frozen=True)
class Conversation:
    """A conversation of a corpus.

    Attributes:
        messages: in order, at least one.
        place: file and line, for errors.
    """

    messages: tuple[Message, ...]
    place: str = field(default="a conversation", compare=False)

    def as_json(self) -> list[list[str | None]]:
        """Role, content and thought of every message."""
        return [[message.role, message.content, message.thought] for message in self.messages]

    def tokens(self, tokenizer: Any) -> RoleTokens:
        """Its tokens by the tokenizer's chat template, which continue to the header unless an answer is last.

        Raises:
            UsageError: there is no template, or it does not render the conversation; the message names the place.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise UsageError(
                f"{self.place}: a conversation, but {tokenizer.name_or_path} has no chat template: give the instruct "
                "model, or plain text"
            )
        answer_follows = self.messages[-1].role != ASSISTANT
        try:
            return role_tokens(tokenizer, self.messages, answer_follows, KEPT_CONVERSATIONS)
        except UsageError as error:
            raise UsageError(f"{self.place}: {error}") from error


Text = str | Conversation


def row_text(place: str, row: Any) -> Text:
    """The text or conversation of a row.

    Args:
        place: file and line or row, for errors.

    Raises:
        UsageError: not an object with a text or messages, both at once, a text that is not Unicode, no message, or a
            message of an unknown role or without content.
    """
    given = [key for key in COLUMNS if isinstance(row, dict) and row.get(key) is not None]
    if not given:
        raise UsageError(f"{place} is not a JSON object with 'text' or 'messages'")
    if len(given) == 2:
        raise UsageError(f"{place} has both 'text' and 'messages': keep one of them")
    if given == ["messages"]:
        return Conversation(_messages(place, row["messages"]), place)
    text = row["text"]
    if not isinstance(text, str) or not _is_unicode(text):
        raise UsageError(f"{place}: 'text' is not a string of Unicode text")
    return text.strip()


def _messages(place: str, values: Any) -> tuple[Message, ...]:
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise UsageError(f"{place}: 'messages' is not a list of messages: write {EXAMPLE}")
    return tuple(
        _message(f"{place}: message {number}", value) for number, value in enumerate(values, start=1)
    )


def _message(place: str, value: Any) -> Message:
    if not isinstance(value, dict) or "role" not in value:
        raise UsageError(f"{place} is not an object with 'role' and 'content': write {EXAMPLE}")
    role, content = value["role"], value.get("content")
    if role not in SPEAKERS:
        raise UsageError(f"{place} has the role {role!r}: give one of {', '.join(SPEAKERS)}")
    if not isinstance(content, str) or not _is_unicode(content):
        raise UsageError(f"{place} ({role}): 'content' is not a string of Unicode text")
    thought = None
    if role == ASSISTANT and (match := _THOUGHT.fullmatch(content)):
        thought, content = match[1].strip() or None, match[2]
    if not content.strip():
        raise UsageError(f"{place} ({role}) has no content: write it, or leave the conversation out")
    return Message(role, content, thought)


def _is_unicode(text: str) -> bool:
    """Whether UTF-8 can encode the text: JSON can hold half a surrogate pair."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def parsed(place: str, line: str) -> Any:
    """The JSON value of a line; None for a blank line.

    Raises:
        UsageError: not JSON.
    """
    if not line.strip():
        return None
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{place} is not a JSON object with 'text' or 'messages'") from error


def read_utf8(path: Path) -> str:
    """The content of a file of text.

    Raises:
        UsageError: not UTF-8; names the line.
    """
    raw = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UsageError(f"{path}: line {line} is not UTF-8: convert the file") from error


def read_lines(path: Path) -> list[str]:
    """The lines of a file of text.

    Raises:
        UsageError: as ``read_utf8``.
    """
    # Not splitlines(): U+2028 and other separators occur within texts and would shift parallel lines.
    lines = read_utf8(path).split("\n")
    if lines and not lines[-1]:
        lines.pop()
    return lines


def parquet_rows(path: Path, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The rows of a parquet file, of these columns if it has them; None: of all.

    Raises:
        UsageError: not a parquet file, or one with none of the columns.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.read_schema(path).names
        kept = [name for name in names if columns is None or name in columns]
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path, columns=kept).to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UsageError(f"{path}: not a parquet file ({error})") from error
    if columns is not None and not kept:
        either = " or ".join(map(repr, columns))
        raise UsageError(f"{path} has no column {either}: rename the column of the texts")
    return rows
