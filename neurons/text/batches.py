"""Texts to token batches: packed in full blocks (to count on), or a text a row (to average over texts)."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from neurons.errors import UsageError
from neurons.models.embedded import require_embedded
from neurons.models.memory import MAX_TOKENS, batches_for
from neurons.models.source import LoadedModel
from neurons.models.start_tokens import start_tokens
from neurons.text.corpus import Corpus
from neurons.text.spread import spread

LONGEST_BLOCK = 2048
LONGEST_BLOCK_BACKWARD = (
    512  # what is kept for a gradient grows with the block: 2,048 tokens of a 0.5B take 4 GB
)
TOKENS_A_BATCH = MAX_TOKENS
LINES_AT_ONCE = 1000  # that are tokenised
MOST_PADDING = 128  # positions a batch: a pass for so many costs about what one more batch does


@dataclass(frozen=True)
class TokenBatch:
    """Rows of tokens for one forward pass.

    Attributes:
        ids: integers [rows, length], padded on the right; int64 once they are on a device (``to``).
        attention: bool [rows, length], False on padding.
        counted: bool [rows, length], False on padding and on the tokenizer's start tokens, which are the
            same in every language, and on what stands first where it adds none.
        lines: int64 [rows], which line of its corpus each row is of; None where rows are not of lines.
        shares: float64 [rows], which part of its line's counted tokens a row has; None where rows are whole lines.
        groups: int64 [rows, length], the number of each counted token's group, where the tokens of a row are not
            all of one; None: all are of the batch's language.
    """

    ids: torch.Tensor
    attention: torch.Tensor
    counted: torch.Tensor
    lines: torch.Tensor | None = None
    shares: torch.Tensor | None = None
    groups: torch.Tensor | None = None

    @property
    def line_numbers(self) -> torch.Tensor:
        """``lines``.

        Raises:
            UsageError: the rows are blocks of joined text.
        """
        if self.lines is None:
            raise UsageError("blocks of joined text are no texts of their own: read the corpus text by text")
        return self.lines

    @property
    def padded(self) -> bool:
        return not bool(self.attention.all())

    def to(self, device: torch.device) -> TokenBatch:
        return TokenBatch(
            self.ids.long().to(device),
            self.attention.to(device),
            self.counted.to(device),
            self.lines,
            self.shares,
            None if self.groups is None else self.groups.to(device),
        )


def block_length(model: Any, wanted: int | None = None, backward: bool = False) -> int:
    """Tokens a block: what was asked for, else the model's context, at most ``LONGEST_BLOCK``.

    With ``backward`` at most ``LONGEST_BLOCK_BACKWARD``.

    Raises:
        UsageError: ``wanted`` is below 2 or longer than the model's context.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or LONGEST_BLOCK
    if wanted is None:
        return int(min(context, LONGEST_BLOCK_BACKWARD if backward else LONGEST_BLOCK))
    if not 2 <= wanted <= context:
        raise UsageError(f"a block of {wanted} tokens: the model reads 2 to {context}")
    return wanted


def packed_batches(
    texts: Sequence[str],
    tokenizer: Any,
    length: int,
    language: str,
    most_tokens: int | None = None,
    tokens_a_batch: int | None = None,
) -> list[TokenBatch]:
    """Texts joined by newlines and cut into full blocks; no padding, a rest shorter than a block is left.

    Each block begins with the tokenizer's start tokens where it adds any.  The first position is not counted
    either way, as in ``text_batches``: a block begins in the middle of a text, and what stands first serves
    the model as an attention sink there too, with activations that would weigh in a mean like thousands.

    Args:
        texts: of one language.
        tokenizer: a transformers tokenizer.
        length: tokens a block, start tokens included.
        language: their name, for the error.
        most_tokens: read so many (rounded up to whole blocks), evenly from the whole text; None reads all.
        tokens_a_batch: None takes ``TOKENS_A_BATCH``.

    Raises:
        UsageError: less than one block of text.
    """
    start = start_tokens(tokenizer)
    body = length - len(start)
    blocks = None if most_tokens is None else -(-most_tokens // body)
    stream = array("i")
    for tokens in _drawn(texts, tokenizer, None if blocks is None else blocks * body, "\n").values():
        stream.extend(tokens)
    whole = len(stream) // body
    if whole == 0:
        raise UsageError(
            f"language {language!r} has {len(stream)} tokens, less than one block of {body}: give more "
            "text or a smaller --block"
        )
    ids = torch.frombuffer(stream, dtype=torch.int32)[: whole * body].view(whole, body)
    if blocks is not None and whole > blocks:
        ids = ids[sorted(spread(whole)[:blocks])]
        whole = blocks
    if start:
        ids = torch.cat([torch.tensor([start], dtype=torch.int32).expand(whole, -1), ids], dim=1)
    # One row stands for all: no token takes more memory than its number.
    attention = torch.ones(1, length, dtype=torch.bool)
    counted = attention.clone()
    counted[:, : max(1, len(start))] = False
    rows = max(1, (TOKENS_A_BATCH if tokens_a_batch is None else tokens_a_batch) // length)
    return [
        TokenBatch(some, attention.expand(len(some), -1), counted.expand(len(some), -1))
        for some in ids.split(rows)
    ]


def text_batches(
    texts: Sequence[str],
    tokenizer: Any,
    length: int,
    most_tokens: int | None = None,
    tokens_a_batch: int | None = None,
) -> list[TokenBatch]:
    """One text a row, texts of like length together; one longer than ``length`` tokens has several rows.

    The first position is not counted, also where the tokenizer adds no start token: what
    stands there serves the model as an attention sink, with activations unlike any other token's.  Texts
    that leave nothing to count are left out.

    The rows' order differs from the texts' order: sums over rows do not depend on it beyond rounding,
    and it is the same in every run.

    Args:
        texts: of one language; "" keeps a line's place in the count.
        most_tokens: read so many (rounded up to whole rows), evenly from the whole text; None reads all.
        tokens_a_batch: None takes ``TOKENS_A_BATCH``.
    """
    start = start_tokens(tokenizer)
    uncounted, body = max(1, len(start)), length - len(start)
    rows: list[list[int]] = []
    lines: list[int] = []
    used = 0
    for line, tokens in _drawn(texts, tokenizer, most_tokens).items():
        pieces = [[*start, *tokens[first : first + body]] for first in range(0, len(tokens), body)]
        taken = []
        for place in spread(len(pieces)):
            if most_tokens is None or used < most_tokens:
                taken.append(place)
                used += max(0, len(pieces[place]) - uncounted)
        rows += [pieces[place] for place in sorted(taken)]
        lines += [line] * len(taken)
    return row_batches(rows, uncounted, lines, tokens_a_batch)


def row_batches(
    rows: Sequence[Sequence[int]],
    uncounted: int,
    lines: Sequence[int] | None = None,
    tokens_a_batch: int | None = None,
) -> list[TokenBatch]:
    """Rows of token ids, padded on the right, rows of like length together.

    A batch ends where it is full, or where the next row would leave more than ``MOST_PADDING`` positions empty.

    Args:
        rows: token ids; rows without a counted token are left out.
        uncounted: positions at the beginning of each row that are not counted.
        lines: which line each row is; None counts the rows.
        tokens_a_batch: None takes ``TOKENS_A_BATCH``.
    """
    numbered = zip(range(len(rows)) if lines is None else lines, rows, strict=True)
    kept = sorted(
        ((line, row) for line, row in numbered if len(row) > uncounted), key=lambda item: len(item[1])
    )
    most = TOKENS_A_BATCH if tokens_a_batch is None else tokens_a_batch
    of_line: dict[int, int] = {}
    for line, row in kept:
        of_line[line] = of_line.get(line, 0) + len(row) - uncounted
    split = len(of_line) < len(kept)
    return [_padded(group, uncounted, of_line if split else None) for group in _groups(kept, most)]


def language_batches(
    loaded: LoadedModel,
    corpus: Corpus,
    tokens: int | None = None,
    tokens_a_batch: int | None = None,
    default: int | None = None,
) -> dict[str, list[TokenBatch]]:
    """Each language's texts, one a row.

    Args:
        loaded: the model.
        corpus: text by language.
        tokens: most of a language, evenly from the whole text; None: the corpus's own number, else the default.
        tokens_a_batch: None takes what memory allows for a pass without gradients.
        default: where neither says so; None takes all.

    Raises:
        UsageError: a text with a token that the model has no embedding of.
    """
    length, most = block_length(loaded.model), _most(corpus, tokens, default)
    at_once = (
        min(TOKENS_A_BATCH, batches_for(loaded, False, 1)[0]) if tokens_a_batch is None else tokens_a_batch
    )
    found = {
        language: text_batches(corpus.texts[language], loaded.tokenizer, length, most, at_once)
        for language in corpus.languages
    }
    _require_embedded(loaded, found)
    return found


def longest_row(batches: Mapping[str, Sequence[TokenBatch]]) -> int:
    """Tokens of the longest row; 1 where there is none."""
    return max((batch.ids.shape[1] for some in batches.values() for batch in some), default=1)


def unknown_share(batches: Sequence[TokenBatch], tokenizer: Any) -> float:
    """Share of the counted tokens that are the tokenizer's unknown token."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    counted = sum(int(batch.counted.sum()) for batch in batches)
    if unknown is None or not counted:
        return 0.0
    return sum(int((batch.counted & (batch.ids == unknown)).sum()) for batch in batches) / counted


def packed_corpus(
    loaded: LoadedModel,
    corpus: Corpus,
    block: int | None = None,
    tokens: int | None = None,
    tokens_a_batch: int | None = None,
    default: int | None = None,
) -> dict[str, list[TokenBatch]]:
    """Each language's text in full blocks.

    Raises:
        UsageError: as ``packed_batches``, or a text with a token that the model has no embedding of.
    """
    length, most = block_length(loaded.model, block), _most(corpus, tokens, default)
    found = {
        language: packed_batches(
            corpus.non_empty(language), loaded.tokenizer, length, language, most, tokens_a_batch
        )
        for language in corpus.languages
    }
    _require_embedded(loaded, found)
    return found


def _require_embedded(loaded: LoadedModel, found: Mapping[str, Sequence[TokenBatch]]) -> None:
    highest = max((int(batch.ids.max()) for batches in found.values() for batch in batches), default=0)
    require_embedded(loaded.name, loaded.tokenizer, highest, loaded.embedding_rows)


def _groups(
    rows: Sequence[tuple[int, Sequence[int]]], tokens_a_batch: int
) -> Iterator[list[tuple[int, Sequence[int]]]]:
    group: list[tuple[int, Sequence[int]]] = []
    tokens = 0
    for row in rows:
        length = len(row[1])
        size = (len(group) + 1) * length
        if group and (size > tokens_a_batch or size - tokens - length > MOST_PADDING):
            yield group
            group, tokens = [], 0
        group.append(row)
        tokens += length
    if group:
        yield group


def _most(corpus: Corpus, tokens: int | None, default: int | None) -> int | None:
    return next((number for number in (tokens, corpus.tokens) if number is not None), default)


def _drawn(
    texts: Sequence[str], tokenizer: Any, most_tokens: int | None, ending: str = ""
) -> dict[int, list[int]]:
    """Line -> its tokens, in file order: of all lines, or of as many, spread over all, as have so many tokens."""
    lines = [line for line, text in enumerate(texts) if text]
    order = lines if most_tokens is None else [line for line in spread(len(texts)) if texts[line]]
    found: dict[int, list[int]] = {}
    used = 0
    for first in range(0, len(order), LINES_AT_ONCE):
        some = order[first : first + LINES_AT_ONCE]
        read = tokenizer([texts[line] + ending for line in some], add_special_tokens=False)["input_ids"]
        for line, tokens in zip(some, read, strict=True):
            if most_tokens is None or used < most_tokens:
                found[line] = tokens
                used += len(tokens)
        if most_tokens is not None and used >= most_tokens:
            break
    return dict(sorted(found.items()))


def _padded(
    rows: Sequence[tuple[int, Sequence[int]]], uncounted: int, of_line: Mapping[int, int] | None = None
) -> TokenBatch:
    longest = max(len(row) for _, row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    attention = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, (_, row) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(list(row))
        attention[i, : len(row)] = True
    counted = attention.clone()
    counted[:, :uncounted] = False
    lines = torch.tensor([line for line, _ in rows])
    if of_line is None:
        return TokenBatch(ids, attention, counted, lines)
    shares = [(len(row) - uncounted) / of_line[line] for line, row in rows]
    return TokenBatch(ids, attention, counted, lines, torch.tensor(shares, dtype=torch.float64))
