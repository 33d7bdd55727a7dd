"""Crossings: openings of texts in one language that go on in another, as rows of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from neurons.models.start_tokens import start_tokens
from neurons.text.batches import TokenBatch
from neurons.text.words import opening


@dataclass(frozen=True)
class Crossing:
    """One row.

    Attributes:
        ids: the tokens, after the tokenizer's start tokens where it adds any.
        crosses: what follows the opening is ids[crosses:].
    """

    ids: tuple[int, ...]
    crosses: int


def openings_and_rests(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """The openings of all texts, and what follows the opening of those that are longer than it."""
    whole = [" ".join(text.split()) for text in texts if text]
    rests = [text[len(opening(text)) :] for text in whole]
    return [opening(text) for text in whole], [rest for rest in rests if rest]


def crossings(tokenizer: Any, openings: Sequence[str], rests: Sequence[str], turn: int) -> list[Crossing]:
    """Every opening with a rest: line i with line i + turn, from the beginning again after the last.

    A row's tokens are those of the joined text; it crosses where they first differ from the opening's own.
    """
    joined = [text + rests[(i + turn) % len(rests)] for i, text in enumerate(openings)]
    start = start_tokens(tokenizer)
    of_openings = tokenizer(list(openings), add_special_tokens=False)["input_ids"]
    of_joined = tokenizer(joined, add_special_tokens=False)["input_ids"]
    return [
        Crossing((*start, *whole), len(start) + _common(whole, own))
        for whole, own in zip(of_joined, of_openings, strict=True)
    ]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def crossing_batch(rows: Sequence[Crossing], most: int) -> TokenBatch:
    """Rows padded on the right and cut after ``most`` tokens; what follows the openings is counted."""
    length = min(most, max(len(row.ids) for row in rows))
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    for i, row in enumerate(rows):
        own = row.ids[:length]
        ids[i, : len(own)] = torch.tensor(own)
    at = torch.arange(length)[None]
    attention = at < torch.tensor([[len(row.ids)] for row in rows])
    return TokenBatch(ids, attention, attention & (at >= torch.tensor([[row.crosses] for row in rows])))
