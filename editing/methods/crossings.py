"""Crossings: openings of texts in one language continued in another, as rows of tokens."""

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
    """A row of tokens.

    Attributes:
        ids: the tokens, including the tokenizer's start tokens.
        crosses: index of the first token after the opening.
    """

    ids: tuple[int, ...]
    crosses: int


def openings_and_rests(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """The openings of all texts, and the rests of the texts that are longer than their opening."""
    whole = [" ".join(text.split()) for text in texts if text]
    rests = [text[len(opening(text)) :] for text in whole]
    return [opening(text) for text in whole], [rest for rest in rests if rest]


def crossings(tokenizer: Any, openings: Sequence[str], rests: Sequence[str], turn: int) -> list[Crossing]:
    """Every opening with a rest: opening i with rest i + turn, modulo the number of rests.

    The tokens are those of the joined text; it crosses where they first differ from those of the opening alone.
    """
    joined = [text + rests[(i + turn) % len(rests)] for i, text in enumerate(openings)]
    start = start_tokens(tokenizer)
    of_openings = tokenizer(list(openings), add_special_tokens=False)["input_ids"]
    of_joined = tokenizer(joined, add_special_tokens=False)["input_ids"]
    return [
        Crossing((*start, *whole), len(start) + _common_prefix(whole, alone))
        for whole, alone in zip(of_joined, of_openings, strict=True)
    ]


def _common_prefix(ids: Sequence[int], others: Sequence[int]) -> int:
    pairs = zip(ids, others, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ids), len(others)))


def crossing_batch(rows: Sequence[Crossing], max_tokens: int) -> TokenBatch:
    """Rows padded on the right and truncated to ``max_tokens``; the tokens after the openings are counted."""
    length = min(max_tokens, max(len(row.ids) for row in rows))
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    for i, row in enumerate(rows):
        kept = row.ids[:length]
        ids[i, : len(kept)] = torch.tensor(kept)
    at = torch.arange(length)[None]
    attention = at < torch.tensor([[len(row.ids)] for row in rows])
    return TokenBatch(ids, attention, attention & (at >= torch.tensor([[row.crosses] for row in rows])))
