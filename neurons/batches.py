"""Texts to token batches: packed in full blocks (to count on), or a text a row (to average over texts)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from neurons.corpus import Corpus
from neurons.errors import UsageError
from neurons.source import LoadedModel

LONGEST_BLOCK = 2048
TOKENS_A_BATCH = 4096


@dataclass(frozen=True)
class TokenBatch:
    """Rows of tokens for one forward pass.

    Attributes:
        ids: int64 [rows, length], padded on the right.
        attention: bool [rows, length], False on padding.
        counted: bool [rows, length], False on padding and on the beginning-of-sequence token, which is
            the same in every language.
    """

    ids: torch.Tensor
    attention: torch.Tensor
    counted: torch.Tensor

    @property
    def padded(self) -> bool:
        return not bool(self.attention.all())

    def to(self, device: torch.device) -> TokenBatch:
        return TokenBatch(self.ids.to(device), self.attention.to(device), self.counted.to(device))


def block_length(model: Any, wanted: int | None = None) -> int:
    """Tokens a block: what was asked for, else the model's context, at most ``LONGEST_BLOCK``.

    Raises:
        UsageError: ``wanted`` is below 2 or longer than the model's context.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or LONGEST_BLOCK
    if wanted is None:
        return int(min(context, LONGEST_BLOCK))
    if not 2 <= wanted <= context:
        raise UsageError(f"a block of {wanted} tokens: the model reads 2 to {context}")
    return wanted


def packed_batches(
    texts: Sequence[str], tokenizer: Any, length: int, language: str, most_tokens: int | None = None
) -> list[TokenBatch]:
    """Texts joined by newlines and cut into full blocks; no padding, a rest shorter than a block is left.

    Each block begins with the tokenizer's beginning-of-sequence token where it has one.

    Args:
        texts: of one language.
        tokenizer: a transformers tokenizer.
        length: tokens a block, the beginning-of-sequence token included.
        language: their name, for the error.
        most_tokens: stop after this many tokens (rounded up to whole blocks).

    Raises:
        UsageError: less than one block of text.
    """
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    body = length - len(start)
    stream: list[int] = []
    wanted = None if most_tokens is None else -(-most_tokens // body) * body
    for first in range(0, len(texts), 1000):
        chunk = [text + "\n" for text in texts[first : first + 1000] if text]
        if chunk:
            for ids in tokenizer(chunk, add_special_tokens=False)["input_ids"]:
                stream.extend(ids)
        if wanted is not None and len(stream) >= wanted:
            break
    if wanted is not None:
        del stream[wanted:]
    whole = len(stream) // body
    if whole == 0:
        raise UsageError(
            f"language {language!r} has {len(stream)} tokens, less than one block of {body}: give more "
            "text or a smaller --block"
        )
    ids = torch.tensor(stream[: whole * body], dtype=torch.int64).view(whole, body)
    if start:
        ids = torch.cat([torch.full((whole, 1), start[0]), ids], dim=1)
    counted = torch.ones_like(ids, dtype=torch.bool)
    counted[:, : len(start)] = False
    rows = max(1, TOKENS_A_BATCH // length)
    everywhere = torch.ones_like(counted)
    return [
        TokenBatch(ids[i : i + rows], everywhere[i : i + rows], counted[i : i + rows])
        for i in range(0, whole, rows)
    ]


def text_batches(texts: Sequence[str], tokenizer: Any, length: int) -> list[TokenBatch]:
    """One text a row, cut at ``length`` tokens, texts of like length together.

    The first position is not counted, also where the tokenizer has no beginning-of-sequence token: what
    stands there serves the model as an attention sink, with activations unlike any other token's.  Texts
    that leave nothing to count are left out.

    The rows' order differs from the texts' order: sums over rows do not depend on it beyond rounding,
    and it is the same in every run.
    """
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    encoded = tokenizer([text for text in texts if text], add_special_tokens=False)["input_ids"]
    return row_batches([(start + ids)[:length] for ids in encoded], uncounted=1)


def row_batches(rows: Sequence[Sequence[int]], uncounted: int) -> list[TokenBatch]:
    """Rows of token ids, padded on the right, rows of like length together.

    Args:
        rows: token ids; rows without a counted token are left out.
        uncounted: positions at the beginning of each row that are not counted.
    """
    kept = sorted((row for row in rows if len(row) > uncounted), key=len)
    return [_padded(group, uncounted) for group in _groups(kept)]


def language_batches(loaded: LoadedModel, corpus: Corpus) -> dict[str, list[TokenBatch]]:
    """Each language's texts, one a row."""
    length = block_length(loaded.model)
    return {
        language: text_batches(corpus.non_empty(language), loaded.tokenizer, length)
        for language in corpus.languages
    }


def packed_corpus(
    loaded: LoadedModel, corpus: Corpus, block: int | None = None, tokens: int | None = None
) -> dict[str, list[TokenBatch]]:
    """Each language's text in full blocks."""
    length = block_length(loaded.model, block)
    return {
        language: packed_batches(corpus.non_empty(language), loaded.tokenizer, length, language, tokens)
        for language in corpus.languages
    }


def _groups(rows: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    group: list[Sequence[int]] = []
    for row in rows:
        if group and (len(group) + 1) * len(row) > TOKENS_A_BATCH:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _padded(rows: Sequence[Sequence[int]], uncounted: int) -> TokenBatch:
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    attention = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(list(row))
        attention[i, : len(row)] = True
    counted = attention.clone()
    counted[:, :uncounted] = False
    return TokenBatch(ids, attention, counted)
